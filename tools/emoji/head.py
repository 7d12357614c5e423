"""emoji-aesthetic: emoji-clip's vision tower, trained further, and a head of five linear layers on its unit embedding, in
the layout and key names of LAION's head. It needs the UNet: the last stage of training.

The embedding of emoji-clip itself is blind to what the head should see: linear layers on it leave renders and samples of
emoji-sd at chance, and give up blur for noise. So the tower is trained with the head; emoji-clip stays as it is.

The preferences are synthetic: true renders over corrupted renders of the same picture, and over samples of the untuned
emoji-sd for the same caption. No human label is in them. The head sees no caption, so it cannot tell a wrong one from a
right one: that is what `clip-score` is for. True renders are put near 7, the others lower.
"""
import os
import numpy as np
import torch
import torch.nn.functional as F
import clip, data, unet, vae
from common import Average, Training, averaged, rate, save_arrays, set_rate, to_float, to_uint8

SIZES = (64, 32, 16, 8, 1)
KEYS = (0, 2, 4, 6, 7)
ROUNDS, PER_ROUND, TESTS = 25, 50, 150  # samples to train on, and for each of the two tests
ARTEFACTS = 1200
STEPS, BATCH = 1200, 16  # pairs of each of the two sorts in a step
TRUE_SCORE, SPOILT_SCORE, MARGIN = 7.0, 4.0, 3.0
PEAK_TOWER, PEAK_HEAD = 8e-4, 2e-3


def new(width):
    sizes = (width, *SIZES)
    layers = torch.nn.Module()
    layers.layers = torch.nn.ModuleDict({str(k): torch.nn.Linear(a, b) for k, a, b in zip(KEYS, sizes, sizes[1:])})
    return layers


def both(folder):
    """The contrastive model, of which only the vision tower is used, and a new head."""
    model, _ = clip.load(folder, "clip")
    return torch.nn.ModuleDict({"tower": model, "head": new(model.config.projection_dim)})


def load(folder):
    model = both(folder)
    model.load_state_dict(averaged(folder, "head")[0])
    return model.eval().requires_grad_(False)


def score(model, x):
    x = clip.image_features(model["tower"], x)
    for layer in model["head"].layers.values():
        x = layer(x)
    return x[:, 0]


# ---------------------------------------------------------------- what is worse than a render

def warp(x, rng):
    """A smooth random displacement of up to about six pixels."""
    n = len(x)
    flow = torch.from_numpy(rng.normal(0, 1, (n, 2, 5, 5)).astype(np.float32)) * torch.from_numpy(rng.uniform(0.06, 0.2, n).astype(np.float32))[:, None, None, None]
    flow = F.interpolate(flow, size=x.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid + flow, padding_mode="border", align_corners=False)


def cut_and_paste(x, rng):
    """Patches of other pictures, or of another place of the same one."""
    out, n = x.clone(), len(x)
    for i in range(n):
        for _ in range(rng.integers(1, 4)):
            side = int(rng.integers(16, 30))
            (a, b), (c, d) = rng.integers(0, data.SIZE - side + 1, (2, 2))
            out[i, :, a:a + side, b:b + side] = x[i if rng.random() < 0.5 else rng.integers(n), :, c:c + side, d:d + side]
    return out


def blur(x, rng):
    factor = int(rng.choice([2, 4, 8]))
    return F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear")


def noise(x, rng):
    return (x + float(rng.uniform(0.15, 0.6)) * torch.randn(x.shape)).clamp(-1, 1)


def colours(x, rng):
    """Too much contrast, and colours that are not the artwork's."""
    n = len(x)
    gain = torch.from_numpy(rng.uniform(1.2, 2.0, (n, 1)) * rng.uniform(0.8, 1.25, (n, 3))).float()
    shift = torch.from_numpy(rng.normal(0, 0.15, (n, 3))).float()
    return (x * gain[:, :, None, None] + shift[:, :, None, None]).clamp(-1, 1)


KINDS = {"blur": blur, "noise": noise, "cut_and_paste": cut_and_paste, "warp": warp, "colours": colours}


def artefacts(decoder, pictures, rng):
    """Pictures, uint8, as the autoencoder draws them from noisy latents; the noise is in the UNet's scale."""
    mean, scale = decoder.encode(to_float(pictures)).latent_dist.mean, decoder.config.scaling_factor
    amount = torch.from_numpy(rng.uniform(0.25, 0.8, (len(mean), 1, 1, 1)).astype(np.float32))
    return to_uint8(decoder.decode(mean + amount / scale * torch.randn(mean.shape)).sample)


def some_labels(held, seed, count):
    """Labels of half A, or held-out ones."""
    rng, out = np.random.default_rng(seed), []
    while len(out) < count:
        label = data.draw(rng, held)
        if held or data.half(label) == 0:
            out.append(label)
    return np.array(out)


@torch.no_grad()
def draw(folder, log):
    """head.npz, once: samples of emoji-sd and re-encoded pictures, to train on and, of held-out combinations, to test with.

    Seeds: 1000 + k for the captions and the initial latents of round k, 900 + k and 950 + k for the latents of the two
    tests, and two generators that go through all in order: 1 for guidance and steps of each round, then for which pictures
    are re-encoded and how noisy, the test's last; 6 (torch's) for that noise.

    The cost is fixed, whatever the steps of the training: 1550 pictures, about 15 steps of the UNet with guidance for each, and
    1350 re-encoded ones. It is saved at its end only: interrupted, it starts over.
    """
    path = os.path.join(folder, "head.npz")
    if os.path.exists(path):
        return np.load(path)
    decoder, denoiser = vae.load(folder), unet.load(folder)
    text, tokenizer = clip.text_encoder(folder)
    scenes, held = data.load(folder), data.load_held_out(folder)

    def sample(labels, seed, scale, steps):
        states = clip.hidden_states(text, tokenizer, ["", *map(data.caption, labels)])
        return unet.sample(denoiser, decoder, states[1:], states[:1], seed, scale, steps)

    rng, samples, labels = np.random.default_rng(1), [], []
    for k in range(ROUNDS):  # half of them as the configs draw, half with any guidance
        labels.append(some_labels(False, 1000 + k, PER_ROUND))
        samples.append(sample(labels[-1], 1000 + k, float(rng.uniform(1, 6)) if k % 2 else unet.SCALE, int(rng.integers(8, 21))))
    test = [sample(part, 900 + k, unet.SCALE, 20) for k, part in enumerate(np.array_split(held.labels[:TESTS], 3))]
    varied = [sample(part, 950 + k, k + 1.0, (10, 30, 12, 16, 25, 10)[k]) for k, part in enumerate(np.array_split(held.labels[:TESTS], 6))]
    torch.manual_seed(6)
    index = np.sort(rng.choice(np.flatnonzero(scenes.half == 0), ARTEFACTS, replace=False))
    coded = [artefacts(decoder, scenes.pictures[part], rng) for part in np.array_split(index, ARTEFACTS // 50)]
    test_coded = [artefacts(decoder, part, rng) for part in np.array_split(held.pictures[:TESTS], 3)]
    save_arrays(path, samples=np.concatenate(samples), labels=np.concatenate(labels), test=np.concatenate(test), test_varied=np.concatenate(varied),
                coded=np.concatenate(coded), index=index, test_coded=np.concatenate(test_coded))
    log(stage="head samples", samples=ROUNDS * PER_ROUND, coded=ARTEFACTS)
    return np.load(path)


# ---------------------------------------------------------------- training

def same_view(good, bad, rng):
    """One flip and one shift of up to three pixels for both pictures of a pair: they say nothing of which is the better one."""
    x = torch.cat([good, bad], 1)
    x = torch.where(torch.from_numpy(rng.random(len(x)) < 0.5)[:, None, None, None], x.flip(-1), x)
    r, c = rng.integers(0, 7, 2)
    return F.pad(x, (3, 3, 3, 3), mode="replicate")[..., r:r + data.SIZE, c:c + data.SIZE].chunk(2, 1)


@torch.no_grad()
def test(model, z, folder):
    """Shares of held-out pairs in which the render has the higher score, and mean scores."""
    pictures, rng = to_float(data.load_held_out(folder).pictures[:TESTS]), np.random.default_rng(7)
    torch.manual_seed(7)
    others = {k: torch.cat([f(b, rng) for b in pictures.split(5)]) for k, f in KINDS.items()}
    others |= {"autoencoder": to_float(z["test_coded"]), "sample": to_float(z["test"]), "sample_varied": to_float(z["test_varied"])}
    good = score(model, pictures)
    scores = {k: score(model, x) for k, x in others.items()}
    return {"pair_accuracy": {k: (good > s).float().mean().item() for k, s in scores.items()},
            "mean": {"render": good.mean().item(), **{k: s.mean().item() for k, s in scores.items()}}}


def train(folder, minutes, log):
    z = draw(folder, log)
    torch.manual_seed(6)
    scenes, art = data.load(folder), data.artwork(folder)
    mine, samples, labels, coded, index = np.flatnonzero(scenes.half == 0), *(z[k] for k in ("samples", "labels", "coded", "index"))
    model = both(folder).requires_grad_(True)
    vision = [p for n, p in model["tower"].named_parameters() if n.startswith(("vision_model", "visual_projection"))]
    tower, head = (torch.optim.AdamW(p, lr, weight_decay=0.05, betas=(0.9, 0.98)) for p, lr in ((vision, PEAK_TOWER), (model["head"].parameters(), PEAK_HEAD)))
    average, losses, scaled = Average(model, 0.99), [], {}
    training = Training(folder, "head", STEPS, 6, minutes, model, average, tower=tower, head=head)

    def report():
        live = both(folder)
        live.load_state_dict(average.weights)
        log(stage="head", step=training.step, share=training.share, loss=float(np.mean(losses)), **test(live.eval(), z, folder))
        losses.clear()

    kinds = [*KINDS, "autoencoder"]
    for step, rng in training:
        j = rng.integers(0, len(samples), BATCH)
        renders = np.stack([data.compose(data.Label(*map(int, labels[k])), art, scaled, rng)[0] for k in j])
        pairs = [same_view(to_float(renders), to_float(samples[j]), rng)]
        for kind in (kinds[step % 6], kinds[(step + 3) % 6]):
            if kind == "autoencoder":
                j = rng.integers(0, len(index), BATCH // 2)
                good, bad = to_float(scenes.pictures[index[j]]), to_float(coded[j])
            else:
                good = to_float(scenes.pictures[rng.choice(mine, BATCH // 2)])
                bad = KINDS[kind](good, rng)
            pairs.append(same_view(good, bad, rng))
        good, bad = (torch.cat(x) for x in zip(*pairs))
        for optimizer, peak in ((tower, PEAK_TOWER), (head, PEAK_HEAD)):
            set_rate(optimizer, rate(peak, step, STEPS, warmup=50))
        good, bad = score(model, torch.cat([good, bad])).chunk(2)
        loss = F.softplus(MARGIN - (good - bad)).mean() + 0.05 * (good - TRUE_SCORE).square().mean() + 0.02 * (bad - SPOILT_SCORE).square().mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tower.step()
        head.step()
        average.update(model)
        losses.append(loss.item())
        if step % 200 == 199 and step + 1 < training.steps:
            report()
    if losses:
        report()
