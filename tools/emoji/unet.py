"""The denoiser: epsilon prediction on precomputed latents and the hidden states of captions, with min-SNR weights."""
import os, signal
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
import clip, data, detector, vae
from common import Average, Training, averaged, set_rate, to_uint8, trained

CONFIG = dict(sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 160), layers_per_block=1,
              down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
              cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)
SCHEDULER = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon",
                 steps_offset=1, set_alpha_to_one=False, clip_sample=False, timestep_spacing="leading")
TRAINING, PEAK, BATCH, GAMMA = 31250, 1e-3, 32, 5.0  # steps: a million samples
SCALE, STEPS = 4.0, 25  # guidance and DDIM steps of the sample sheets


def new():
    torch.manual_seed(4)
    return UNet2DConditionModel(**CONFIG)


def load(folder):
    model = new()
    model.load_state_dict(averaged(folder, "unet")[0])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample(model, decoder, text, empty, seed, scale=SCALE, steps=STEPS):
    """DDIM with guidance; text: hidden states of captions, empty: those of the empty caption. uint8 pictures."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    z = torch.randn(len(text), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([empty.expand_as(text), text])
    for t in scheduler.timesteps:
        low, high = model(torch.cat([z, z]), t, both).sample.chunk(2)
        z = scheduler.step(low + scale * (high - low), t, z).prev_sample
    return to_uint8(decoder.decode(z / decoder.config.scaling_factor).sample)


def train(folder, minutes, log, processes):
    """One process for each core, each with its part of the batch: on small layers faster than one process with threads."""
    rendezvous = os.path.join(folder, "rendezvous")
    if os.path.exists(rendezvous):
        os.remove(rendezvous)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    clip.text_encoder(folder)  # text_encoder.pt, once
    torch.multiprocessing.spawn(work, (folder, minutes, log, processes, rendezvous), processes)


def rate(step):
    """Flat for the first 60% of the steps, then linearly down to 2%."""
    return PEAK * min(1.0, (step + 1) / 200) * min(1.0, 0.02 + 0.98 * (1 - step / TRAINING) / 0.4)


def average_gradients(model, processes):
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    for g, part in zip(gradients, flat.div_(processes).split([g.numel() for g in gradients])):
        g.copy_(part.view_as(g))


def from_first(value):
    """The first process's truth value, in all processes."""
    flag = torch.tensor([int(value)])
    torch.distributed.broadcast(flag, 0)
    return bool(flag)


def shortened(label, rng):
    """A caption as training sees it: 10% empty, the others without style, background or position now and then."""
    without = rng.random(4) < (0.1, 0.12, 0.12, 0.3)
    return "" if without[0] else data.caption(label, *~without[1:])


def work(rank, folder, minutes, log, processes, rendezvous):
    # SIGINT is what ends this process when make.py is killed; where make.py is a job in the background, it would be ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=processes)
    labels = data.load(folder).labels
    latents = np.load(os.path.join(folder, "latents.npy"), mmap_mode="r")
    text, tokenizer = clip.text_encoder(folder)
    model = new()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.99), weight_decay=0.01)
    average, losses = Average(model, 0.999), []
    training = Training(folder, "unet", TRAINING, 4, minutes, model, average, rank, from_first, optimizer=optimizer)
    snr = DDIMScheduler(**SCHEDULER).alphas_cumprod
    signal_amount, noise_amount = snr.sqrt(), (1 - snr).sqrt()
    snr = snr / (1 - snr)
    weights = snr.clamp(max=GAMMA) / snr
    weights = weights / weights.mean()
    count = BATCH // processes

    def report(draw):
        scores = {}
        if draw:
            prompts = data.prompts(True)[::2]
            live, decoder = new(), vae.load(folder)
            live.load_state_dict(average.weights)
            states = clip.hidden_states(text, tokenizer, ["", *(p["prompt"] for p in prompts)])
            pictures = sample(live.eval(), decoder, states[1:], states[:1], 0)
            data.sheet(pictures, 10, os.path.join(folder, "sheets", f"unet-{training.step:06}.png"), 2, [p["prompt"] for p in prompts])
            true = np.array([[p["count"] * (p["object"] == k) for k in data.KINDS] for p in prompts])
            for kind in detector.MODELS:
                if trained(folder, kind):
                    right = (detector.counts(detector.load(folder, kind), pictures) == true).all(1)
                    scores[kind] = {"one": float(right[true.sum(1) == 1].mean()), "several": float(right[true.sum(1) > 1].mean())}
        log(stage="unet", step=training.step, share=training.share, samples=training.step * BATCH, loss=float(np.mean(losses)), **scores)
        losses.clear()

    for step, rng in training:
        if rank == 0 and losses and step % 200 == 0:
            report(step % 2000 == 0)
        i = rng.integers(0, len(latents), count)
        z = torch.from_numpy(latents[i].astype(np.float32))
        z = z[:, :4] + z[:, 4:] * torch.randn(count, 4, 16, 16)
        c = clip.hidden_states(text, tokenizer, [shortened(labels[k], rng) for k in i])
        t = torch.from_numpy(rng.integers(0, 1000, count))
        noise = torch.randn_like(z)
        x = signal_amount[t][:, None, None, None] * z + noise_amount[t][:, None, None, None] * noise
        set_rate(optimizer, rate(step))
        loss = (weights[t] * (model(x, t, c).sample - noise).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, processes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rank == 0:
            average.update(model)
        losses.append(loss.item())
    if rank == 0 and losses:
        report(True)
    torch.distributed.destroy_process_group()
