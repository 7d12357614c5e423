"""The autoencoder: AutoencoderKL with 4 latent channels and factor 4, trained on random crops, then on whole pictures."""
import os
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
import data
from common import Average, Clock, load_checkpoint, save_checkpoint, to_float, to_uint8

CONFIG = dict(block_out_channels=(32, 64, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
              latent_channels=4, norm_num_groups=4, sample_size=64, in_channels=3, out_channels=3)
KL, EDGES, PEAK = 1e-6, 1.0, 2e-3
LATENTS = 20000  # so many of the pictures are encoded for the UNet


def edges(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def psnr(model, pictures):
    with torch.no_grad():
        x = to_float(pictures)
        out = torch.cat([model.decode(model.encode(b).latent_dist.mode()).sample for b in x.split(30)]).clamp(-1, 1)
        return (10 * torch.log10(4 / (out - x).square().mean((1, 2, 3)))).mean().item(), out


def train(folder, minutes, log):
    torch.manual_seed(1)
    pictures, _ = data.load(folder)
    test, _ = data.load_held_out(folder)
    model = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.98), weight_decay=1e-4)
    average, step, path = Average(model, 0.995), 0, os.path.join(folder, "vae.pt")
    if saved := load_checkpoint(path):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.weights, average.steps, step = saved["average"], saved["step"], saved["step"]
        if os.path.exists(os.path.join(folder, "latents.npy")):  # a UNet lives on these latents: only the decoder may go on learning
            model.load_state_dict(saved["average"])
            for part in (model.encoder, model.quant_conv):
                part.requires_grad_(False)
    rng, clock, first, sums = np.random.default_rng(step + 1), Clock(minutes), step, []

    def report():
        live = AutoencoderKL(**CONFIG)
        live.load_state_dict(average.weights)
        value, out = psnr(live.eval(), test[:60])
        save_checkpoint(path, model=model.state_dict(), optimizer=optimizer.state_dict(), average=average.weights, step=step)
        log(stage="vae", step=step, share=clock.share, loss=float(np.mean(sums)), held_out_psnr=value)
        sums.clear()
        data.sheet([p for pair in zip(test[:24], to_uint8(out[:24])) for p in pair], 12, os.path.join(folder, "sheets", "vae.png"), 2)
        return value

    while clock.share < 1:
        whole = clock.share > 0.8
        side, count = (64, 8) if whole else (32, 24)
        corner = rng.integers(0, 64 - side + 1, (count, 2))
        x = to_float(np.stack([pictures[i, r:r + side, c:c + side] for i, (r, c) in zip(rng.integers(0, len(pictures), count), corner)]))
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(PEAK, step - first)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            out = model.decode(posterior.sample()).sample.float()
        loss = F.l1_loss(out, x) + F.mse_loss(out, x) + EDGES * sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(x)))
        loss = loss + KL * posterior.kl().float().mean() / (side * side / 4096)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        sums.append(loss.item())
        step += 1
        if step % 200 == 0:
            report()
    return report()


def load(folder):
    """The averaged weights, with the scaling factor that gives latents of unit variance."""
    saved = load_checkpoint(os.path.join(folder, "vae.pt"))
    pictures, _ = data.load(folder)
    model = AutoencoderKL(**CONFIG)
    model.load_state_dict(saved["average"])
    model.eval().requires_grad_(False)
    with torch.no_grad():
        z = model.encode(to_float(pictures[:256])).latent_dist.mode()
    model.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    return model


def encode_all(folder, log, batch=64):
    """latents.npy: the scaled means and, as a second set of channels, standard deviations of the first pictures; f16."""
    model = load(folder)
    pictures = data.load(folder)[0][:LATENTS]
    out = np.lib.format.open_memmap(os.path.join(folder, "latents.npy"), "w+", np.float16, (len(pictures), 8, 16, 16))
    with torch.no_grad():
        for i in range(0, len(pictures), batch):
            with torch.autocast("cpu", torch.bfloat16):
                d = model.encode(to_float(pictures[i:i + batch])).latent_dist
            out[i:i + batch] = (torch.cat([d.mean, d.std], 1).float() * model.config.scaling_factor).half().numpy()
    out.flush()
    log(stage="latents", scaling_factor=model.config.scaling_factor, std=float(out[:500, :4].astype(np.float32).std()))
