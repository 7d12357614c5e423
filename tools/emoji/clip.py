"""The two contrastive models: `clip`, the reward and the text encoder of emoji-sd, and `judge`, never trained against."""
import os
import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
import data
from common import LENGTH, Average, Clock, encode, load_checkpoint, load_tokenizer, save_arrays, save_checkpoint, to_float

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODELS = {
    "clip": dict(seed=2, width=128, layers=4, heads=4, patch=8, act="quick_gelu", text=(128, 4, 4), projection=128, peak=1e-3),
    "judge": dict(seed=3, width=192, layers=4, heads=6, patch=16, act="gelu", text=(96, 3, 4), projection=96, peak=1e-3),
}
BATCH, RECONSTRUCTIONS = 64, 1800


def new(kind, vocab_size):
    m = MODELS[kind]
    tw, tl, th = m["text"]
    text = CLIPTextConfig(vocab_size=vocab_size, hidden_size=tw, intermediate_size=4 * tw, projection_dim=m["projection"], num_hidden_layers=tl, num_attention_heads=th,
                          max_position_embeddings=LENGTH, hidden_act=m["act"], bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1)
    vision = CLIPVisionConfig(hidden_size=m["width"], intermediate_size=4 * m["width"], projection_dim=m["projection"], num_hidden_layers=m["layers"],
                              num_attention_heads=m["heads"], image_size=data.SIZE, patch_size=m["patch"], hidden_act=m["act"])
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=m["projection"]))


def normalise(x):
    """-1..1 to CLIP's input."""
    return ((x + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def image_features(model, x):
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=normalise(x)).pooler_output).float(), dim=-1)


def text_features(model, ids):
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def augment(x, rng):
    """Small shifts, blur, noise, contrast: what makes the model look at shapes and bear with generated pictures."""
    n = len(x)
    padded = F.pad(x, (4, 4, 4, 4), mode="replicate")
    r, c = rng.integers(0, 9, 2)
    x = padded[..., r:r + data.SIZE, c:c + data.SIZE]
    pick = lambda p: torch.from_numpy(rng.random(n) < p)
    for factor in (2, 4):
        soft = F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear")
        x = torch.where(pick(0.3 / factor * 2)[:, None, None, None], soft, x)
    amount = torch.from_numpy(rng.uniform(0, 0.3, n).astype(np.float32)) * pick(0.4)
    x = x + amount[:, None, None, None] * torch.randn(x.shape)
    coarse = F.interpolate(torch.randn(n, 3, 8, 8), scale_factor=8, mode="bilinear")
    amount = torch.from_numpy(rng.uniform(0, 0.3, n).astype(np.float32)) * pick(0.3)
    x = (x + amount[:, None, None, None] * coarse) * torch.from_numpy(rng.uniform(0.85, 1.1, n).astype(np.float32))[:, None, None, None]
    return x.clamp(-1, 1)


def reconstructions(folder):
    """Pictures as the autoencoder draws them from noisy latents, as soon as there is an autoencoder: (pictures, indices)."""
    path = os.path.join(folder, "reconstructions.npz")
    if not os.path.exists(path):
        if not os.path.exists(os.path.join(folder, "vae.pt")):
            return None
        import vae
        from common import to_uint8
        model = vae.load(folder)
        pictures, _ = data.load(folder)
        rng = np.random.default_rng(5)
        torch.manual_seed(5)
        index, out = np.sort(rng.choice(len(pictures), RECONSTRUCTIONS, replace=False)), []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for part in np.array_split(index, RECONSTRUCTIONS // 60):
                d = model.encode(to_float(pictures[part])).latent_dist
                noise = torch.from_numpy(rng.uniform(0, 0.35, len(part)).astype(np.float32))[:, None, None, None] / model.config.scaling_factor
                out.append(to_uint8(model.decode(d.mean + noise * torch.randn(d.mean.shape)).sample))
        save_arrays(path, pictures=np.concatenate(out), index=index)
    z = np.load(path)
    return z["pictures"], z["index"]


@torch.no_grad()
def accuracy(model, tokenizer, pictures, labels):
    """Top-1 accuracies: the full caption among all captions of these pictures, and the animal among the 45 ("a {name}")."""
    images = torch.cat([image_features(model, to_float(p)) for p in np.array_split(pictures, max(1, len(pictures) // 90))])
    captions = [data.label_caption(l) for l in labels]
    unique = sorted(set(captions))
    best = (images @ text_features(model, encode(tokenizer, unique)).T).argmax(1)
    full = np.mean([unique[b] == c for b, c in zip(best, captions)])
    names = [name for name, _, animal in data.CONCEPTS if animal]
    of_list = [i for i, l in enumerate(labels) if data.CONCEPTS[l[1]][2]]
    best = (images[of_list] @ text_features(model, encode(tokenizer, [data.caption(None, n, None) for n in names])).T).argmax(1)
    animal = np.mean([names[b] == data.CONCEPTS[labels[i][1]][0] for b, i in zip(best, of_list)])
    return float(full), float(animal)


def train(folder, kind, minutes, log):
    torch.manual_seed(MODELS[kind]["seed"])
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer"))
    pictures, labels = data.load(folder)
    test = data.load_held_out(folder)
    ids = encode(tokenizer, data.all_captions())
    ids = ids[:, :(ids != ids[0, -1]).sum(1).max() + 1]  # attention is causal: nothing behind a caption's end matters here
    model = new(kind, len(tokenizer))
    width = MODELS[kind]["width"]
    heads = torch.nn.ModuleList([torch.nn.Linear(width, n) for n in (len(data.STYLES), len(data.CONCEPTS), len(data.BACKGROUNDS))])  # only speed training up
    both = torch.nn.ModuleList([model, heads])
    decay = [p for p in both.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": [p for p in both.parameters() if p.ndim < 2], "weight_decay": 0.0}],
                                  MODELS[kind]["peak"], betas=(0.9, 0.98))
    average, step, path = Average(both, 0.995), 0, os.path.join(folder, kind + ".pt")
    if saved := load_checkpoint(path):
        both.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.weights, average.steps, step = saved["average"], saved["step"], saved["step"]
    extra = reconstructions(folder)
    groups = [np.flatnonzero((labels[:, 0] == s) & (labels[:, 2] == b)) for s in range(len(data.STYLES)) for b in range(len(data.BACKGROUNDS))]
    rng, clock, first, sums = np.random.default_rng(step + MODELS[kind]["seed"]), Clock(minutes), step, []

    def report():
        live = torch.nn.ModuleList([new(kind, len(tokenizer)), torch.nn.ModuleList([torch.nn.Linear(h.in_features, h.out_features) for h in heads])])
        live.load_state_dict(average.weights)
        live.eval()
        some = np.arange(300)
        a, b = accuracy(live[0], tokenizer, *test), accuracy(live[0], tokenizer, pictures[some], labels[some])
        save_checkpoint(path, model=both.state_dict(), optimizer=optimizer.state_dict(), average=average.weights, step=step)
        log(stage=kind, step=step, share=clock.share, loss=float(np.mean([s[0] for s in sums])), classify=float(np.mean([s[1] for s in sums])),
            held_out_caption=a[0], held_out_animal=a[1], train_caption=b[0], train_animal=b[1])
        sums.clear()

    while clock.share < 1:
        alike = rng.random() < 0.5  # one style and background throughout, so that only the concepts tell the captions apart
        i = rng.choice(groups[rng.integers(len(groups))], BATCH) if alike else rng.integers(0, len(pictures), BATCH)
        x = to_float(pictures[i])
        if extra is not None and not alike:
            j = rng.integers(0, RECONSTRUCTIONS, BATCH // 4)
            i[:len(j)], x[:len(j)] = extra[1][j], to_float(extra[0][j])
        x = augment(x, rng)
        which = torch.from_numpy(data.caption_index(labels[i], rng.random(BATCH) < 0.12, rng.random(BATCH) < 0.12))
        target = torch.from_numpy(labels[i].astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(MODELS[kind]["peak"], step - first, warmup=100)
        pooled = model.vision_model(pixel_values=normalise(x)).pooler_output
        images = F.normalize(model.visual_projection(pooled), dim=-1)
        texts = text_features(model, ids[which])
        guesses = [h(pooled) for h in heads]
        scores = model.logit_scale.exp().clamp(max=60) * images @ texts.T
        same = (which[:, None] == which[None]).float()
        same = same / same.sum(1, keepdim=True)
        contrastive = (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
        classify = sum(w * F.cross_entropy(g, target[:, k]) for k, (w, g) in enumerate(zip((0.3, 1.0, 0.3), guesses)))
        loss = contrastive + classify
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        average.update(both)
        sums.append((contrastive.item(), classify.item()))
        step += 1
        if step % 200 == 0:
            report()
    report()


def load(folder, kind):
    """(model with averaged weights, tokenizer)"""
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer"))
    model = new(kind, len(tokenizer))
    model.load_state_dict({k[2:]: v for k, v in load_checkpoint(os.path.join(folder, kind + ".pt"))["average"].items() if k.startswith("0.")})
    return model.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def encode_captions(folder, log):
    """text.npy: the hidden states of all captions, f16, from the weights as they will be exported; and the text tower that made them."""
    model, tokenizer = load(folder, "clip")
    text = model.text_model.half().float()
    ids = encode(tokenizer, data.all_captions())
    out = torch.cat([text(input_ids=b).last_hidden_state.half() for b in ids.split(256)])
    np.save(os.path.join(folder, "text.npy"), out.numpy())
    save_checkpoint(os.path.join(folder, "text_encoder.pt"), weights=text.state_dict())
    log(stage="captions", count=len(ids), std=out.float().std().item())
