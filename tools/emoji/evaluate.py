"""What the models are worth: emoji-sd's samples of trained and of never-seen combinations, judged by both contrastive models."""
import os
import numpy as np
import torch
import clip, data, unet, vae


def run(folder, root, log):
    """The models as exported: f16 weights, computed in f32. Writes a sample sheet to docs/img/."""
    decoder, denoiser = vae.load(folder).half().float(), unet.load(folder).half().float()
    text = torch.from_numpy(np.load(os.path.join(folder, "text.npy")))
    held_pictures, held_labels = data.load_held_out(folder)
    per = data.HELD_OUT_PER_ANIMAL
    sets = {"trained": unet.animal_labels(folder, 9), "held_out": held_labels[::per]}
    judges = {k: clip.load(folder, k) for k in ("clip", "judge") if os.path.exists(os.path.join(folder, k + ".pt"))}
    results = {"held_out_psnr": vae.psnr(decoder, held_pictures[:60])[0]}
    drawn = {}
    for name, labels in sets.items():
        captions = text[data.caption_index(labels, False, False)].float()
        drawn[name] = unet.sample(denoiser, decoder, captions, text[:1].float(), 7)
        for k, (model, tokenizer) in judges.items():
            results[f"{k}_on_samples_{name}"] = clip.accuracy(model, tokenizer, drawn[name], labels)
    for k, (model, tokenizer) in judges.items():
        results[f"{k}_on_renders_held_out"] = clip.accuracy(model, tokenizer, held_pictures[::per], held_labels[::per])
    log(stage="evaluate", guidance=unet.SCALE, steps=unet.STEPS, note="pairs: full caption among the 45 of the set, animal among 45", **results)
    out = os.path.join(root, "docs", "img")
    os.makedirs(out, exist_ok=True)
    data.sheet(drawn["trained"], 15, os.path.join(out, "emoji-sd-trained.png"))
    data.sheet(drawn["held_out"], 15, os.path.join(out, "emoji-sd-heldout.png"))
