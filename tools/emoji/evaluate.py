"""What the models are worth, with the weights as exported (f16) and standard errors of the shares.

On true renders of held-out combinations: the autoencoder's PSNR; how often each contrastive model finds the animal among all of them
(scenes with one) and the caption among 50 hard ones; how often each detector counts every animal right. On samples of emoji-sd
for the held-out prompts, where there is a UNet: of one animal, whether each contrastive model finds the right one and each detector
exactly that one; of two to five, whether each detector finds exactly so many.
"""
import os
import numpy as np
import torch
import clip, data, detector, unet, vae
from common import trained

CAPTIONS = 1000  # held-out scenes whose caption is looked for
ROUNDS = 2  # samples of each held-out prompt


def share(hits):
    """[share, standard error, number]; the error by Agresti and Coull, so that it is not 0 where all are right."""
    hits = np.asarray(hits)
    n, p = len(hits), (hits.sum() + 2) / (len(hits) + 4)
    return [float(hits.mean()), float((p * (1 - p) / (n + 4)) ** 0.5), n]


def by_count(right, totals):
    return {"all": share(right), **{str(n): share(right[totals == n]) for n in range(1, data.MOST + 1)}}


def rounded(model):
    return model.half().float()


def judges(folder):
    """({name: (contrastive model, tokenizer)}, {name: detector}): those that there are."""
    return ({k: (rounded(m), t) for k in clip.MODELS if trained(folder, k) for m, t in [clip.load(folder, k)]},
            {k: rounded(detector.load(folder, k)) for k in detector.MODELS if trained(folder, k)})


def on_renders(folder, contrastive, detectors):
    test, out = data.load_held_out(folder), {}
    single = clip.singles(test.labels)
    for k, (model, tokenizer) in contrastive.items():
        out[k] = {"animal": share(clip.animal_hits(model, tokenizer, test.pictures[single], test.labels[single])),
                  "caption_among_50": share(clip.caption_hits(model, tokenizer, test.pictures[:CAPTIONS], test.labels[:CAPTIONS]))}
    for k, model in detectors.items():
        out[k] = {"exact_by_count": by_count(*detector.exact(model, test, len(test.labels)))}
    if trained(folder, "vae"):
        out["psnr"] = vae.psnr(rounded(vae.load(folder)), test.pictures[:300])[0]
    return out


def draw(folder, prompts, seed):
    """Samples of emoji-sd for the prompts, uint8."""
    decoder, denoiser = rounded(vae.load(folder)), rounded(unet.load(folder))
    text, tokenizer = clip.text_encoder(folder)
    states = clip.hidden_states(text, tokenizer, ["", *(p["prompt"] for p in prompts)])
    parts = states[1:].split(50)
    return np.concatenate([unet.sample(denoiser, decoder, part, states[:1], seed + i, unet.SCALE, unet.STEPS) for i, part in enumerate(parts)])


def on_samples(folder, contrastive, detectors):
    prompts = data.prompts(True) * ROUNDS
    pictures = draw(folder, prompts, 700)
    kinds, totals = np.array([data.KINDS.index(p["object"]) for p in prompts]), np.array([p["count"] for p in prompts])
    true, one, out = (kinds[:, None] == np.arange(len(data.KINDS))) * totals[:, None], totals == 1, {}
    for k, (model, tokenizer) in contrastive.items():
        labels = np.stack([0 * kinds, kinds], 1)
        out[k] = {"animal": share(clip.animal_hits(model, tokenizer, pictures[one], labels[one]))}
    for k, model in detectors.items():
        out[k] = {"exact_by_count": by_count((detector.counts(model, pictures) == true).all(1), totals)}
    return out, pictures, prompts


def run(folder, root, log):
    """Writes a sheet of samples to docs/img/ where there is a UNet."""
    torch.manual_seed(0)
    contrastive, detectors = judges(folder)
    log(stage="evaluate", on="renders", steps={k: trained(folder, k) for k in (*contrastive, *detectors)}, **on_renders(folder, contrastive, detectors))
    if trained(folder, "unet"):
        numbers, pictures, prompts = on_samples(folder, contrastive, detectors)
        log(stage="evaluate", on="samples", guidance=unet.SCALE, steps=unet.STEPS, unet=trained(folder, "unet"), **numbers)
        out = os.path.join(root, "docs", "img")
        os.makedirs(out, exist_ok=True)
        some = len(prompts) // ROUNDS
        data.sheet(pictures[:some:2], 10, os.path.join(out, "emoji-sd-heldout.png"), 1, [p["prompt"] for p in prompts[:some:2]])
