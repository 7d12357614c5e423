"""The autoencoder: AutoencoderKL with 4 latent channels and factor 4.

Most of it is learnt on 32x32 crops around animals, since that is where the detail is, the end on whole pictures. L1 and the
differences of neighbouring pixels are the loss; in the last third a small patch discriminator joins, with LDM's weight: the
ratio of both gradients at the last layer.
"""
import os
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
import data
from common import Average, Training, averaged, muon_and_adam, rate, set_rate, to_float, to_uint8

CONFIG = dict(block_out_channels=(32, 64, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
              latent_channels=4, norm_num_groups=4, sample_size=64, in_channels=3, out_channels=3)
STEPS, PEAK, KL, EDGES = 8000, 1e-3, 1e-6, 1.5
CROP, CROPS = 32, 8  # in the last WHOLE of the steps a quarter as many whole pictures
WHOLE, ADVERSARIAL, ADVERSARIAL_WEIGHT = 0.1, 1 / 3, 0.3
LATENTS = 40000  # so many of the pictures are encoded for the UNet


def edges(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


class Discriminator(torch.nn.Sequential):
    """Real or drawn, for patches of 10x10 pixels."""

    def __init__(self, width=32):
        act = lambda: torch.nn.LeakyReLU(0.2)
        super().__init__(torch.nn.Conv2d(3, width, 4, 2, 1), act(), torch.nn.Conv2d(width, 2 * width, 4, 2, 1), torch.nn.GroupNorm(4, 2 * width), act(), torch.nn.Conv2d(2 * width, 1, 1))


def crops(scenes, rng, count):
    """Crops whose middle is near that of an animal."""
    out = []
    for i in rng.integers(0, len(scenes.labels), count):
        box = scenes.boxes[i, rng.integers((scenes.classes[i] >= 0).sum())]
        r, c = np.clip((box[[1, 0]] * data.SIZE + rng.uniform(-12, 12, 2) - CROP / 2).round().astype(int), 0, data.SIZE - CROP)
        out.append(scenes.pictures[i, r:r + CROP, c:c + CROP])
    return np.stack(out)


def psnr(model, pictures):
    with torch.no_grad():
        x = to_float(pictures)
        out = torch.cat([model.decode(model.encode(b).latent_dist.mode()).sample for b in x.split(30)]).clamp(-1, 1)
        return (10 * torch.log10(4 / (out - x).square().mean((1, 2, 3)))).mean().item(), out


def train(folder, minutes, log, start=None):
    """`start`: a folder with an AutoencoderKL of the same config to begin with; from random weights ten times the steps are needed."""
    scenes, test = data.load(folder), data.load_held_out(folder)
    torch.manual_seed(1)
    model = AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32) if start and os.path.exists(start) else AutoencoderKL(**CONFIG)
    critic, last = Discriminator(), model.decoder.conv_out.weight
    muon, adam = muon_and_adam(model, PEAK, ("conv_in", "conv_out", "quant_conv"))
    critic_optimizer = torch.optim.AdamW(critic.parameters(), PEAK, betas=(0.5, 0.9), weight_decay=1e-4)
    average, sums = Average(model, 0.995), []
    training = Training(folder, "vae", STEPS, 1, minutes, model, average, muon=muon, adam=adam, critic=critic, critic_optimizer=critic_optimizer)
    if os.path.exists(os.path.join(folder, "latents.npy")):  # a UNet lives on these latents: only the decoder may go on learning
        for part in (model.encoder, model.quant_conv):
            part.requires_grad_(False)

    def report(step):
        live = AutoencoderKL(**CONFIG)
        live.load_state_dict(average.weights)
        value, out = psnr(live.eval(), test.pictures[:60])
        log(stage="vae", step=step, of=STEPS, held_out_psnr=value, **{k: float(np.mean([s[k] for s in sums if k in s])) for k in (sums[-1] if sums else {})})
        sums.clear()
        data.sheet([p for pair in zip(test.pictures[:36], to_uint8(out[:36])) for p in pair], 12, os.path.join(folder, "sheets", "vae.png"), 2)

    for step, rng in training:
        whole, adversarial = step >= (1 - WHOLE) * STEPS, step >= (1 - ADVERSARIAL) * STEPS
        x = to_float(scenes.pictures[rng.integers(0, len(scenes.labels), CROPS // 4)] if whole else crops(scenes, rng, CROPS))
        for optimizer in (muon, adam):
            set_rate(optimizer, rate(PEAK, step, STEPS, warmup=20))
        set_rate(critic_optimizer, rate(PEAK, step, STEPS, warmup=1))
        posterior = model.encode(x).latent_dist
        out = model.decode(posterior.sample()).sample
        pixels, outline = F.l1_loss(out, x) + F.mse_loss(out, x), sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(x)))
        loss = pixels + EDGES * outline
        seen = {"l1_l2": pixels.item(), "edges": outline.item()}
        if adversarial:
            fooled = -critic(out).mean()
            ratio = [torch.autograd.grad(l, last, retain_graph=True)[0].norm() for l in (loss, fooled)]
            begin = min(1.0, (step - (1 - ADVERSARIAL) * STEPS) / 200)  # the critic learns first
            loss = loss + ADVERSARIAL_WEIGHT * begin * (ratio[0] / (ratio[1] + 1e-4)).clamp(max=1e3) * fooled
        loss = loss + KL * posterior.kl().mean() / (x.shape[-1] / data.SIZE) ** 2
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        average.update(model)
        if adversarial:
            critic_loss = F.relu(1 - critic(x)).mean() + F.relu(1 + critic(out.detach())).mean()
            critic_optimizer.zero_grad()
            critic_loss.backward()
            critic_optimizer.step()
            seen["critic"] = critic_loss.item()
        sums.append(seen)
        if (step + 1) % 200 == 0:
            report(step + 1)
    report(training.step)


def load(folder):
    """The averaged weights, with the scaling factor that gives latents of unit variance."""
    model = AutoencoderKL(**CONFIG)
    model.load_state_dict(averaged(folder, "vae")[0])
    model.eval().requires_grad_(False)
    with torch.no_grad():
        z = model.encode(to_float(data.load(folder).pictures[:256])).latent_dist.mode()
    model.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    return model


def encode_all(folder, log, batch=64):
    """latents.npy: the scaled means and, as a second set of channels, standard deviations of the first pictures; f16."""
    model, pictures = load(folder), data.load(folder).pictures[:LATENTS]
    out = np.lib.format.open_memmap(os.path.join(folder, "latents.npy"), "w+", np.float16, (len(pictures), 8, 16, 16))
    with torch.no_grad():
        for i in range(0, len(pictures), batch):
            d = model.encode(to_float(pictures[i:i + batch])).latent_dist
            out[i:i + batch] = (torch.cat([d.mean, d.std], 1) * model.config.scaling_factor).half().numpy()
    out.flush()
    log(stage="latents", scaling_factor=model.config.scaling_factor, std=float(out[:500, :4].astype(np.float32).std()))
