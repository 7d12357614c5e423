"""The aesthetic head: five linear layers on emoji-clip's unit image embedding, in the layout and key names of LAION's head.

Its preferences are synthetic: true renders over corrupted renders of the same picture and over samples of the untuned
model. No human label is in it. The score of a true render is put near 7, that of a spoilt one below.
"""
import os
import numpy as np
import torch
import torch.nn.functional as F
import clip, data, unet, vae
from common import Clock, load_checkpoint, save_checkpoint, to_float, to_uint8

SIZES = (64, 32, 16, 8, 1)
KEYS = (0, 2, 4, 6, 7)
PICTURES, SAMPLES, SAMPLES_HELD_OUT = 1500, 270, 90
TRUE_SCORE, MARGIN = 7.0, 3.0


def new(width):
    sizes = (width, *SIZES)
    layers = torch.nn.Module()
    layers.layers = torch.nn.ModuleDict({str(k): torch.nn.Linear(a, b) for k, a, b in zip(KEYS, sizes, sizes[1:])})
    return layers


def score(head, embedding):
    for layer in head.layers.values():
        embedding = layer(embedding)
    return embedding[:, 0]


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


def artefacts(decoder):
    def apply(x, rng):
        z = decoder.encode(x).latent_dist.mean * decoder.config.scaling_factor
        return decoder.decode((z + float(rng.uniform(0.25, 0.8)) * torch.randn(z.shape)) / decoder.config.scaling_factor).sample.clamp(-1, 1)
    return apply


@torch.no_grad()
def train(folder, minutes, log):
    torch.manual_seed(6)
    rng = np.random.default_rng(6)
    model, _ = clip.load(folder, "clip")
    decoder = vae.load(folder)
    pictures, _ = data.load(folder)
    text = torch.from_numpy(np.load(os.path.join(folder, "text.npy")))
    denoiser = unet.load(folder)
    kinds = {"blur": blur, "noise": noise, "cut_and_paste": cut_and_paste, "warp": warp, "autoencoder": artefacts(decoder)}
    embed = lambda x: torch.cat([clip.image_features(model, b) for b in x.split(100)])

    def pairs(x):
        """(embeddings of the pictures, embeddings of their spoilt versions by kind)"""
        return embed(x), {k: torch.cat([embed(f(b, rng)) for b in x.split(50)]) for k, f in kinds.items()}

    true, spoilt = pairs(to_float(pictures[np.sort(rng.choice(len(pictures), PICTURES, replace=False))]))
    labels = np.concatenate([unet.animal_labels(folder, s) for s in range(100, 100 + -(-SAMPLES // 45))])[:SAMPLES]
    captions = text[data.caption_index(labels, False, False)].float()
    samples = [unet.sample(denoiser, decoder, c, text[:1].float(), 50 + i, scale=float(rng.choice([1, 2.5, 4])), steps=12) for i, c in enumerate(captions.split(45))]
    samples = embed(to_float(np.concatenate(samples)))
    test_true, test_spoilt = pairs(to_float(data.load_held_out(folder)[0]))
    head = new(true.shape[1])
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(head.parameters(), 2e-3, weight_decay=1e-2)
        clock, steps = Clock(minutes), 1500
        for step in range(steps):
            i, k = torch.randint(0, PICTURES, (128,)), list(spoilt.values())[step % len(spoilt)]
            j = torch.randint(0, SAMPLES - SAMPLES_HELD_OUT, (64,))
            good, bad, drawn = score(head, true[i]), score(head, k[i]), score(head, samples[j])
            loss = F.softplus(MARGIN - (good - bad)).mean() + F.softplus(MARGIN - (good[:64] - drawn)).mean() + 0.05 * (good - TRUE_SCORE).square().mean() + 0.02 * (bad - 4).square().mean()
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if clock.share >= 1:
                break
    good = score(head, test_true)
    log(stage="head", steps=step + 1, loss=loss.item(), held_out_mean=good.mean().item(), samples_mean=score(head, samples[-SAMPLES_HELD_OUT:]).mean().item(),
        held_out_pair_accuracy={k: (good > score(head, e)).float().mean().item() for k, e in test_spoilt.items()},
        spoilt_mean={k: score(head, e).mean().item() for k, e in test_spoilt.items()})
    save_checkpoint(os.path.join(folder, "head.pt"), weights=head.state_dict())
