"""The denoiser: epsilon prediction on precomputed latents and caption features, with min-SNR weights."""
import os, signal
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
import clip, data, vae
from common import Average, Clock, load_checkpoint, save_checkpoint, to_uint8

CONFIG = dict(sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 128), layers_per_block=1,
              down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
              up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
              cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)
SCHEDULER = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon",
                 steps_offset=1, set_alpha_to_one=False, clip_sample=False, timestep_spacing="leading")
PEAK, BATCH, GAMMA = 1e-3, 32, 5.0
ANIMAL_SHARE = 0.85  # of the training samples
SCALE, STEPS = 4.0, 25  # guidance and DDIM steps of the sample sheets


def load(folder):
    model = UNet2DConditionModel(**CONFIG)
    model.load_state_dict(load_checkpoint(os.path.join(folder, "unet.pt"))["average"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample(model, decoder, text, empty, seed, scale=SCALE, steps=STEPS):
    """DDIM with guidance; text: caption features, empty: those of the empty caption. uint8 pictures."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    z = torch.randn(len(text), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([empty.expand_as(text), text])
    for t in scheduler.timesteps:
        low, high = model(torch.cat([z, z]), t, both).sample.float().chunk(2)
        z = scheduler.step(low + scale * (high - low), t, z).prev_sample
    return to_uint8(decoder.decode(z / decoder.config.scaling_factor).sample)


def animal_labels(folder, seed, count=None):
    """Labels of trained combinations with animals in a fixed random order: one of each animal, then again."""
    _, labels = data.load(folder)
    rng = np.random.default_rng(seed)
    animals = [i for i, (_, _, animal) in enumerate(data.CONCEPTS) if animal]
    return np.array([labels[rng.choice(np.flatnonzero(labels[:, 1] == c))] for c in animals][:count])


def train(folder, minutes, log, processes):
    """One process for each core, each with its part of the batch: on small layers faster than one process with threads."""
    rendezvous = os.path.join(folder, "rendezvous")
    if os.path.exists(rendezvous):
        os.remove(rendezvous)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work, (folder, minutes, log, processes, rendezvous), processes)


def rate(share, step):
    """Flat for the first 60% of the budget, then linearly down to 2%."""
    return PEAK * min(1.0, (step + 1) / 100) * min(1.0, 0.02 + 0.98 * (1 - share) / 0.4)


def average_gradients(model, processes):
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    for g, part in zip(gradients, flat.div_(processes).split([g.numel() for g in gradients])):
        g.copy_(part.view_as(g))


def work(rank, folder, minutes, log, processes, rendezvous):
    # SIGINT is what ends this process when make.py is killed; where make.py is a job in the background, it would be ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=processes)
    torch.manual_seed(4)
    _, labels = data.load(folder)
    latents = np.load(os.path.join(folder, "latents.npy"), mmap_mode="r")
    text = torch.from_numpy(np.load(os.path.join(folder, "text.npy")))
    decoder = vae.load(folder)
    judges = {k: clip.load(folder, k) for k in ("clip", "judge") if os.path.exists(os.path.join(folder, k + ".pt"))}
    model = UNet2DConditionModel(**CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.99), weight_decay=0.01)
    average, step, samples, path = Average(model, 0.9985), 0, 0, os.path.join(folder, "unet.pt")
    if saved := load_checkpoint(path):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.weights, average.steps, step = saved["average"], saved["step"], saved["step"]
        samples = saved.get("samples", step * 64)
    snr = DDIMScheduler(**SCHEDULER).alphas_cumprod
    signal_amount, noise_amount = snr.sqrt(), (1 - snr).sqrt()
    snr = snr / (1 - snr)
    weights = snr.clamp(max=GAMMA) / snr
    weights = weights / weights.mean()
    rng, clock, losses = np.random.default_rng([step, 4, rank]), Clock(minutes), []
    torch.manual_seed(step * 100 + rank)
    count, share = BATCH // processes, torch.zeros(1)
    shown = animal_labels(folder, 9)
    is_animal = np.array([animal for _, _, animal in data.CONCEPTS])[labels[:len(latents), 1]]
    animals, others = np.flatnonzero(is_animal), np.flatnonzero(~is_animal)

    def report(draw):
        scores = {}
        save_checkpoint(path, model=model.state_dict(), optimizer=optimizer.state_dict(), average=average.weights, step=step, samples=samples)
        if draw:
            live = load(folder)
            pictures = sample(live, decoder, text[data.caption_index(shown, False, False)].float(), text[:1].float(), 0)
            data.sheet(pictures, 9, os.path.join(folder, "sheets", f"unet-{step:06}.png"), 2)
            for k, (m, tokenizer) in judges.items():
                scores[k + "_caption"], scores[k + "_animal"] = clip.accuracy(m, tokenizer, pictures, shown)
        log(stage="unet", step=step, samples=samples, share=clock.share, loss=float(np.mean(losses)), **scores)
        losses.clear()

    while True:
        share[0] = clock.share
        torch.distributed.broadcast(share, 0)  # all stop at the same step
        if share[0] >= 1:
            break
        i = np.where(rng.random(count) < ANIMAL_SHARE, rng.choice(animals, count), rng.choice(others, count))
        z = torch.from_numpy(latents[i].astype(np.float32))
        z = z[:, :4] + z[:, 4:] * torch.randn(count, 4, 16, 16)
        u = rng.random(count)  # 10% without a caption, 6% only the name, 7% each without style or background
        which = data.caption_index(labels[i], u < 0.23, ((u >= 0.17) & (u < 0.3)) | (u < 0.10))
        c = text[np.where(u < 0.1, 0, which)].float()
        t = torch.from_numpy(rng.integers(0, 1000, count))
        noise = torch.randn_like(z)
        x = signal_amount[t][:, None, None, None] * z + noise_amount[t][:, None, None, None] * noise
        for group in optimizer.param_groups:
            group["lr"] = rate(share.item(), step)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x, t, c).sample.float()
        loss = (weights[t] * (out - noise).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, processes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rank == 0:
            average.update(model)
        losses.append(loss.item())
        step, samples = step + 1, samples + BATCH
        if rank == 0 and step % 100 == 0:
            report(step % 500 == 0)
    if rank == 0:
        report(True)
    torch.distributed.destroy_process_group()
