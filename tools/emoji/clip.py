"""The two contrastive models: `clip`, the reward and the text encoder of emoji-sd, and `judge`, never trained against.

A small vision transformer that sees only whole pictures and their captions needs millions of them. What makes do with
some ten thousand pictures: the scenes' boxes, by which every patch is told what it shows (`dense`), local attention as a start
(`start_local`), Muon for the vision tower's matrices, and captions that differ in one thing (`change`). The extra heads
are used in training only; detector.py starts from the vision tower and uses them, too.
"""
import os, time
import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
import data
from common import LENGTH, Average, Muon, Training, averaged, encode, load_tokenizer, rate, save_arrays, set_rate, to_float, to_uint8, trained

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODELS = {  # half: of the combinations, 0 for A and 1 for B
    "clip": dict(half=0, seed=2, steps=2400, width=128, layers=4, heads=4, act="quick_gelu", text=(128, 4, 4), projection=128),
    "judge": dict(half=1, seed=3, steps=2000, width=96, layers=6, heads=3, act="gelu", text=(96, 3, 4), projection=96),
}
PATCH, GRID = 8, data.SIZE // 8
BATCH, MUON, ADAM = 32, 4e-3, 1e-3  # and peak learning rates
RECONSTRUCTIONS = 1500  # of scenes of each half
KINDS, COUNTS = len(data.KINDS), data.MOST + 1


def new(kind, vocab_size):
    m = MODELS[kind]
    tw, tl, th = m["text"]
    text = CLIPTextConfig(vocab_size=vocab_size, hidden_size=tw, intermediate_size=4 * tw, projection_dim=m["projection"], num_hidden_layers=tl, num_attention_heads=th,
                          max_position_embeddings=LENGTH, hidden_act=m["act"], bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1)
    vision = CLIPVisionConfig(hidden_size=m["width"], intermediate_size=4 * m["width"], projection_dim=m["projection"], num_hidden_layers=m["layers"],
                              num_attention_heads=m["heads"], image_size=data.SIZE, patch_size=PATCH, hidden_act=m["act"])
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=m["projection"]))


def with_heads(kind, vocab_size):
    """The model and the heads of training: on the picture's embedding style, background and counts, on each patch `dense`'s and style."""
    width = MODELS[kind]["width"]
    sizes = {"style": len(data.STYLES), "background": len(data.BACKGROUNDS), "counts": KINDS * COUNTS, "patches": KINDS + 6, "patch_style": len(data.STYLES)}
    return torch.nn.ModuleDict({"model": new(kind, vocab_size), "heads": torch.nn.ModuleDict({k: torch.nn.Linear(width, n) for k, n in sizes.items()})})


@torch.no_grad()
def start_local(embedding, position, attentions, heads):
    """Sinusoids as positions, and q k^T and v o^T near multiples of 1, so that patches attend to their like and to their
    neighbours from the start (Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, 2305.09828).
    `position`: (cls and patches, width), written in place; `attentions`: [(q, k, v, o)], linear layers."""
    width = position.shape[1]
    rate = 100 ** -(torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [c.flatten()[:, None] * rate for c in (y, x)]
    position[1:1 + GRID * GRID] = 0.5 * torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    torch.nn.init.normal_(embedding.weight, std=0.5 * embedding.weight[0].numel() ** -0.5)
    near = lambda a, b: torch.linalg.svd(a * torch.randn(width, width) / width ** 0.5 + b * torch.eye(width))
    for q, k, v, o in attentions:
        rows = width // heads
        for h in range(heads):
            u, s, w = near(0.7, 0.7)
            q.weight[h * rows:(h + 1) * rows] = (u[:, :rows] * s[:rows].sqrt()).T
            k.weight[h * rows:(h + 1) * rows] = w[:rows] * s[:rows, None].sqrt()
        u, s, w = near(0.4, -0.4)
        v.weight.copy_(s[:, None].sqrt() * w)
        o.weight.copy_(u * s.sqrt())


def attentions(vision):
    return [(a.q_proj, a.k_proj, a.v_proj, a.out_proj) for a in (layer.self_attn for layer in vision.encoder.layers)]


def optimizers(module, hidden):
    """Muon for the matrices under the names that `hidden` accepts, AdamW for the rest."""
    muon, decay, rest = [], [], []
    for name, p in module.named_parameters():
        (rest if p.ndim < 2 else muon if hidden(name) else decay).append(p)
    return [Muon(muon, MUON, weight_decay=0.05), torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], ADAM, betas=(0.9, 0.98))]


def step_all(optimizers, step, steps):
    for optimizer, peak in zip(optimizers, (MUON, ADAM)):
        set_rate(optimizer, rate(peak, step, steps, warmup=60))
        optimizer.step()


def normalise(x):
    """-1..1 to CLIP's input."""
    return ((x + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def image_features(model, x):
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=normalise(x)).pooler_output).float(), dim=-1)


def text_features(model, ids):
    ids = ids[:, :(ids != ids[0, -1]).sum(1).max() + 1]  # attention is causal: nothing behind a caption's end matters
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def augment(x, rng):
    """Blur, noise, contrast: what makes the model look at shapes and bear with generated pictures."""
    n = len(x)
    pick = lambda p: torch.from_numpy(rng.random(n) < p)[:, None, None, None]
    amount = lambda low, high: torch.from_numpy(rng.uniform(low, high, (n, 1, 1, 1)).astype(np.float32))
    for factor, p in ((2, 0.25), (4, 0.06)):
        x = torch.where(pick(p), F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear"), x)
    x = x + amount(0, 0.25) * pick(0.3) * torch.randn(x.shape)
    x = x + amount(0, 0.3) * pick(0.25) * F.interpolate(torch.randn(n, 3, 8, 8), scale_factor=8, mode="bilinear")
    return (x * amount(0.85, 1.1)).clamp(-1, 1)


# ---------------------------------------------------------------- captions

MIRROR = np.array([0, 2, 1, 4, 3])  # PLACES as seen from the other kind


def sorted_labels(labels):
    """Labels with the two kinds in one order."""
    out = np.array(labels, np.int64).reshape(-1, 7)
    swap = (out[:, 3] >= 0) & (out[:, 1] > out[:, 3])
    out[swap] = out[swap][:, [0, 3, 4, 1, 2, 5, 6]]
    out[swap, 6] = MIRROR[out[swap, 6]]
    return out


def match(captions, says, labels):
    """(caption x picture): 1 where the caption is true, 0 where false, -1 where it names a position and the label does not say
    where the animals are. `says`: (captions, 3) flags: the caption names style, background, position."""
    c, p = sorted_labels(captions)[:, None], sorted_labels(labels)[None]
    same = (c[..., 1:5] == p[..., 1:5]).all(-1) & (~says[:, :1] | (c[..., 0] == p[..., 0])) & (~says[:, 1:2] | (c[..., 5] == p[..., 5]))
    placed = says[:, 2:] & (c[..., 6] > 0) & (c[..., 6] != p[..., 6])
    return np.where(same & placed & (p[..., 6] == 0), -1, same & ~placed)


def change(label, rng):
    """A label that differs in one thing, most often in an animal or a number."""
    while True:
        new = data.Label(*map(int, label))
        what = rng.choice(5, p=(0.35, 0.35, 0.12, 0.12, 0.06))
        if what == 0:
            field = "second" if new.second >= 0 and rng.random() < 0.5 else "kind"
            new = new._replace(**{field: int(rng.integers(KINDS))})
        elif what == 1:
            field = "second_count" if new.second >= 0 and rng.random() < 0.5 else "count"
            new = new._replace(**{field: int(rng.integers(1, COUNTS))})
        elif what == 2:
            new = new._replace(style=int(rng.integers(len(data.STYLES))))
        elif what == 3:
            new = new._replace(background=int(rng.integers(len(data.BACKGROUNDS))))
        elif new.place:
            new = new._replace(place=int(rng.integers(1, len(data.PLACES))))
        if new != tuple(label) and new.kind != new.second and new.total <= data.MOST:
            return new


def captions(labels, says):
    return [data.caption(l, *map(bool, s)) for l, s in zip(labels, says)]


# ---------------------------------------------------------------- the heads of training

def dense_targets(boxes, classes):
    """What each patch shows, (B, patches, 6): the kind of the animal whose ellipse it is in (KINDS: none), whether the middle of
    the animal is in this patch, and the box, relative to the patch's middle and in patches."""
    c = (torch.arange(GRID) + 0.5) / GRID
    at = torch.stack([c.repeat(GRID), c.repeat_interleave(GRID)], 1)  # x, y of each patch
    offset = boxes[:, None, :, :2] - at[None, :, None]  # (B, patches, animals, 2)
    distance = (offset / boxes[:, None, :, 2:].clamp(min=1e-3) * 2).square().sum(-1)
    distance = torch.where((classes >= 0)[:, None], distance, torch.inf)
    nearest, which = distance.min(-1)
    inside = nearest < 1
    kind = torch.where(inside, classes[:, None].expand(-1, len(at), -1).gather(2, which[..., None])[..., 0], KINDS)
    offset = offset.gather(2, which[..., None, None].expand(-1, -1, 1, 2))[:, :, 0] * GRID
    size = boxes[:, None, :, 2:].expand(-1, len(at), -1, -1).gather(2, which[..., None, None].expand(-1, -1, 1, 2))[:, :, 0] * GRID
    middle = (offset.abs() < 0.5).all(-1) & inside
    return torch.cat([kind[..., None], middle[..., None], offset, size], -1)


def dense(logits, targets):
    """The loss of all patches; logits (B, patches, KINDS + 1 + 5)."""
    kind, inside = targets[..., 0].long(), targets[..., 0] < KINDS
    loss = F.cross_entropy(logits[..., :KINDS + 1].flatten(0, 1), kind.flatten())
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(logits[..., KINDS + 1], targets[..., 1], pos_weight=torch.tensor(4.0))
    return loss + 0.1 * F.smooth_l1_loss(logits[..., KINDS + 2:][inside], targets[..., 2:][inside])


def dense_loss(heads, patches, targets, labels):
    """`dense`, and the style where there is an animal."""
    inside = targets[..., 0] < KINDS
    style = torch.from_numpy(labels[:, 0].astype(np.int64))[:, None].expand(-1, GRID * GRID)
    return dense(heads["patches"](patches), targets) + 0.5 * F.cross_entropy(heads["patch_style"](patches[inside]), style[inside])


def global_loss(heads, pooled, scenes_labels, counts):
    """Style, background, and how many there are of each kind."""
    label = torch.from_numpy(scenes_labels.astype(np.int64))
    loss = 0.5 * F.cross_entropy(heads["style"](pooled), label[:, 0]) + 0.2 * F.cross_entropy(heads["background"](pooled), label[:, 5], ignore_index=-1)
    return loss + 8 * F.cross_entropy(heads["counts"](pooled).view(-1, COUNTS), torch.from_numpy(counts).flatten())


# ---------------------------------------------------------------- tests

@torch.no_grad()
def embed(model, pictures, size=100):
    return torch.cat([image_features(model, to_float(pictures[i:i + size])) for i in range(0, len(pictures), size)])


def animal_hits(model, tokenizer, pictures, labels):
    """Of pictures with one animal: which of the 20 ("a cat") the model takes it for is right, as booleans."""
    with torch.no_grad():
        texts = text_features(model, encode(tokenizer, [data.some(1, k) for k in data.KINDS]))
    return ((embed(model, pictures) @ texts.T).argmax(1).numpy() == np.asarray(labels)[:, 1])


def hard_captions(label, rng, count=50):
    """The label's caption and count - 1 others, each of which differs in one thing, or in two where there are no more of those."""
    out, tries = [data.caption(label)], 0
    while len(out) < count:
        other = change(label, rng)
        other, tries = change(other, rng) if tries > 300 else other, tries + 1
        if not match([other], np.ones((1, 3), bool), [label])[0, 0] and (text := data.caption(other)) not in out:
            out.append(text)
    return out


def caption_hits(model, tokenizer, pictures, labels, seed=9):
    """The full caption is taken for the right one among 50 hard ones, as booleans."""
    rng, out = np.random.default_rng(seed), []
    for image, label in zip(embed(model, pictures), labels):
        with torch.no_grad():
            out.append((text_features(model, encode(tokenizer, hard_captions(label, rng))) @ image).argmax().item() == 0)
    return np.array(out)


def singles(labels):
    """Indices of the scenes with one animal."""
    return np.flatnonzero(labels[:, 2] + labels[:, 4] == 1)


# ---------------------------------------------------------------- training

def alike(groups, labels, rng, size):
    """Scenes of one style and background, most of them with few kinds, so that only animals and numbers tell the captions apart."""
    own = groups[rng.integers(len(groups))]
    few = np.append(rng.choice(KINDS, 5, replace=False), -1)
    near = own[np.isin(labels[own, 1], few) & np.isin(labels[own, 3], few)]
    return rng.permutation(np.concatenate([rng.permutation(near)[:size * 3 // 4], rng.permutation(own)]))[:size] if len(near) < size else rng.permutation(near)[:size]


def reconstructions(folder, half):
    """(indices of scenes of this half, pictures): what the autoencoder makes of them, by way of noisy latents. None as long as it is not trained."""
    path = os.path.join(folder, f"reconstructions-{half}.npz")
    if trained(folder, "vae") < 1:
        return None
    if not os.path.exists(path):
        import vae
        model, scenes, rng = vae.load(folder), data.load(folder), np.random.default_rng([5, half])
        torch.manual_seed(5)
        index, out = np.sort(rng.choice(np.flatnonzero(scenes.half == half), RECONSTRUCTIONS, replace=False)), []
        with torch.no_grad():
            for part in np.array_split(index, RECONSTRUCTIONS // 50):
                mean = model.encode(to_float(scenes.pictures[part])).latent_dist.mean
                noise = torch.from_numpy(rng.uniform(0, 0.35, (len(part), 1, 1, 1)).astype(np.float32)) / model.config.scaling_factor
                out.append(to_uint8(model.decode(mean + noise * torch.randn(mean.shape)).sample))
        save_arrays(path, index=index, pictures=np.concatenate(out))
    with np.load(path) as z:
        return z["index"], z["pictures"]


def batch(scenes, index, fresh, half, art, scaled, rng, coded=None):
    """These scenes, a quarter of them replaced by reconstructions where there are any, and the last `fresh` of them by new ones on
    backgrounds that no caption names (-1 in their labels). Without those the models learn which animals never come with which
    background, and miss just the ones that are held out."""
    redrawn = rng.integers(0, RECONSTRUCTIONS, len(index) // 4)
    if coded:
        index = np.concatenate([coded[0][redrawn], index[len(redrawn):]])
    out = data.Scenes(*(np.array(f[index]) for f in scenes))
    if coded:
        out.pictures[:len(redrawn)] = coded[1][redrawn]
    for j in range(len(index) - fresh, len(index)):
        label = data.draw(rng, False)
        while data.half(label) != half:
            label = data.draw(rng, False)
        side = int(rng.integers(1, 5))
        behind = F.interpolate(torch.from_numpy(rng.random((1, 3, side, side))), size=data.SIZE, mode="bilinear")[0].permute(1, 2, 0).numpy() * 255
        out.pictures[j], out.boxes[j] = data.compose(label, art, scaled, rng, behind)
        out.labels[j] = label._replace(background=-1)
        out.classes[j] = ([k for k, n in label.parts for _ in range(n)] + [-1] * data.MOST)[:data.MOST]
    return out


def contrastive(model, images, labels, tokenizer, rng, hard):
    """Both directions of the contrastive loss, where several captions may be true of a picture; `hard`: and, for each picture, a
    caption that differs in one thing."""
    says = rng.random((len(labels), 3)) < (0.7, 0.7, 0.9)
    stated = [data.Label(*map(int, l)) for l in labels]
    if hard:
        stated += [change(l, rng) for l in stated]
        says = np.concatenate([says, says | True])
    says[:, 1] &= np.array([l.background for l in stated]) >= 0
    scores = model.logit_scale.exp().clamp(max=60) * images @ text_features(model, encode(tokenizer, captions(stated, says))).T
    true = torch.from_numpy(match(stated, says, labels)).T  # (pictures, captions)
    scores = scores.masked_fill(true < 0, -1e4)
    true = (true > 0).float()
    own = true[:, :len(labels)]
    return (F.cross_entropy(scores, true / true.sum(1, keepdim=True)) + F.cross_entropy(scores[:, :len(labels)].T, (own / own.sum(0)).T)) / 2


def train(folder, kind, minutes, log):
    m = MODELS[kind]
    torch.manual_seed(m["seed"])
    tokenizer = load_tokenizer(folder)
    scenes, test = data.load(folder), data.load_held_out(folder)
    both = with_heads(kind, len(tokenizer))
    model, heads = both["model"], both["heads"]
    start_local(model.vision_model.embeddings.patch_embedding, model.vision_model.embeddings.position_embedding.weight, attentions(model.vision_model), m["heads"])
    muon, adam = optimizers(both, lambda name: name.startswith("model.vision_model.encoder"))
    average = Average(both, 0.995)
    training = Training(folder, kind, m["steps"], m["seed"], minutes, both, average, muon=muon, adam=adam)
    mine = np.flatnonzero(scenes.half == m["half"])
    groups = [g for s in range(len(data.STYLES)) for b in range(len(data.BACKGROUNDS)) if len(g := mine[(scenes.labels[mine, 0] == s) & (scenes.labels[mine, 5] == b)])]
    coded, art, scaled, begin, sums, single = reconstructions(folder, m["half"]), data.artwork(folder), {}, time.time(), [], singles(test.labels)[:300]
    own = mine[singles(scenes.labels[mine])[:300]]

    def report():
        live = with_heads(kind, len(tokenizer))
        live.load_state_dict(average.weights)
        live, last = live["model"].eval(), training.step == training.steps
        hits = {"held_out_animal": animal_hits(live, tokenizer, test.pictures[single], test.labels[single]), "trained_animal": animal_hits(live, tokenizer, scenes.pictures[own], scenes.labels[own]),
                "held_out_hard_caption": caption_hits(live, tokenizer, test.pictures[:300 if last else 60], test.labels[:300 if last else 60])}
        log(stage=kind, step=training.step, share=training.share, seconds=time.time() - begin, **dict(zip(("contrastive", "dense", "global"), np.mean(sums, 0).tolist())),
            **{k: float(v.mean()) for k, v in hits.items()})
        sums.clear()

    for step, rng in training:
        hard = rng.random() < 0.5
        i = rng.choice(mine, BATCH, replace=False) if hard else alike(groups, scenes.labels, rng, BATCH)
        some = batch(scenes, i, BATCH // 2 if hard else 0, m["half"], art, scaled, rng, coded if hard else None)
        x = augment(to_float(some.pictures), rng)
        out = model.vision_model(pixel_values=normalise(x), output_hidden_states=True)
        images = F.normalize(model.visual_projection(out.pooler_output), dim=-1)
        targets = dense_targets(torch.from_numpy(some.boxes), torch.from_numpy(some.classes.astype(np.int64)))
        # the layer before the last one knows the animals, too, so that the last one can gather them
        shown = [dense_loss(heads, model.vision_model.post_layernorm(h[:, 1:]), targets, some.labels) for h in out.hidden_states[-2:]]
        losses = [contrastive(model, images, some.labels, tokenizer, rng, hard),
                  sum(shown) / 2,
                  global_loss(heads, out.pooler_output, some.labels, some.counts())]
        both.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 2.0)
        step_all((muon, adam), step, training.steps)
        average.update(both)
        sums.append([l.item() for l in losses])
        if step % 100 == 99 and step + 1 < training.steps:
            report()
    if sums:
        report()


def load(folder, kind, heads=False):
    """(model with averaged weights, or it with the heads of training; tokenizer)"""
    tokenizer = load_tokenizer(folder)
    both = with_heads(kind, len(tokenizer))
    both.load_state_dict(averaged(folder, kind)[0])
    both.eval().requires_grad_(False)
    return both if heads else both["model"], tokenizer


# ---------------------------------------------------------------- the text encoder of emoji-sd

def text_encoder(folder):
    """(text encoder of emoji-sd, tokenizer): clip's text tower with its weights in f16, as they were when it was first asked for.
    From then on text_encoder.pt keeps it: a UNet lives on its hidden states, whatever happens to `clip`."""
    model, tokenizer = load(folder, "clip")
    text = model.text_model.half().float()
    if not trained(folder, "text_encoder"):
        torch.save({"average": {"weights": text.state_dict()}, "step": 1, "steps": 1}, os.path.join(folder, "text_encoder.pt"))
    text.load_state_dict(averaged(folder, "text_encoder")[0])
    return text, tokenizer


@torch.no_grad()
def hidden_states(text, tokenizer, captions):
    """(N, LENGTH, width), padding included, as diffusers' pipeline gives them to the UNet."""
    return torch.cat([text(input_ids=ids).last_hidden_state for ids in encode(tokenizer, captions).split(256)])
