"""Make tests/fixtures/tiny-sdxl: a random tiny Stable Diffusion XL and its numbers, in float64 PyTorch.

    pip install torch torchvision diffusers transformers peft open-clip-torch
    python tools/make_sdxl.py tests/fixtures

The companion of make_fixtures.py, with the same files, rewards and names. What else is in parts.safetensors: ids of both tokenizers
(`*_2`), `negative_*` and `empty_*` (prompts that are given), `uncond_*` (none is given: zeros), `*_pooled`, what the UNet adds to its
time embedding (`added_*`), and the same with other sizes (`other_*`). The text encoders' hidden states before the last layer, without
the final norm, side by side; time ids (H, W, 0, 0, H, W). The scheduler's config is that of SDXL (Euler), computed with as DDIM.
"""
import json, os, sys
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
import make_fixtures as m

SIZE, STEPS, RANK, EOS = (64, 48), 4, 2, m.EOS
PROMPTS, NEGATIVE, MORE = ["a cat", "A photo of an astronaut riding a horse, 4k!"], ["blurry!", "two people"], ["", "!", "so cute!!! " * 40]
CASES = [("k1_eta0_cfg7.5", 0.0, 7.5, "aesthetic", [3], None), ("k3_eta1_cfg5", 1.0, 5.0, "hps", [1, 2, 3], NEGATIVE), ("full_eta0_cfg1", 0.0, 1.0, "aesthetic", [0, 1, 2, 3], None)]
TRAIN = {**m.TRAIN, "max_grad_norm": 1e-5}


def pipeline(out, tokenizers):
    kw = dict(m.VOCAB, num_attention_heads=2)
    text = m.perturb(CLIPTextModel(CLIPTextConfig(**kw, hidden_size=8, intermediate_size=16, num_hidden_layers=2, hidden_act="quick_gelu", pad_token_id=EOS, projection_dim=8)), gain=4)
    text2 = m.perturb(CLIPTextModelWithProjection(CLIPTextConfig(**kw, hidden_size=16, intermediate_size=32, num_hidden_layers=3, hidden_act="gelu", pad_token_id=EOS, projection_dim=12)), gain=4)
    unet = m.perturb(UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=24, attention_head_dim=[1, 1, 2],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, transformer_layers_per_block=[1, 2, 3], addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=60))
    vae = m.perturb(AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64, scaling_factor=0.13025))
    for model, name in ((text, "text_encoder"), (text2, "text_encoder_2"), (unet, "unet"), (vae, "vae")):
        model.half().save_pretrained(f"{out}/{name}")
    os.makedirs(f"{out}/scheduler", exist_ok=True)
    json.dump(dict(_class_name="EulerDiscreteScheduler", beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085, clip_sample=False, interpolation_type="linear",
                   num_train_timesteps=1000, prediction_type="epsilon", sample_max_value=1.0, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
                   timestep_spacing="leading", trained_betas=None, use_karras_sigmas=False), open(f"{out}/scheduler/scheduler_config.json", "w"), indent=2)
    clip = lambda kind: ["transformers", kind]
    json.dump({"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, "scheduler": ["diffusers", "EulerDiscreteScheduler"],
               "text_encoder": clip("CLIPTextModel"), "text_encoder_2": clip("CLIPTextModelWithProjection"), "tokenizer": clip("CLIPTokenizer"),
               "tokenizer_2": clip("CLIPTokenizer"), "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]},
              open(f"{out}/model_index.json", "w"), indent=2)
    for tokenizer, name in zip(tokenizers, ("tokenizer", "tokenizer_2")):
        tokenizer.save_pretrained(f"{out}/{name}")
    return text.double(), text2.double(), unet.double(), vae.double(), DDIMScheduler.from_pretrained(f"{out}/scheduler")


def main(fixtures):
    torch.manual_seed(21)
    torch.set_num_threads(1)
    m.IMAGE = 48
    out, B, (h, w) = f"{fixtures}/tiny-sdxl", len(PROMPTS), (n // 8 for n in SIZE)
    small = f"{fixtures}/tiny-sd15/model/tokenizer"
    tokenizers = [CLIPTokenizer.from_pretrained(small, pad_token=pad) for pad in ("<|endoftext|>", "!")]
    text, text2, unet, vae, scheduler = pipeline(f"{out}/model", tokenizers)
    clip, hps, head = m.reward_models(out)
    os.remove(f"{out}/hps/HPS_tiny.pt")

    ids_of = lambda texts: [t(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids for t in tokenizers]

    def encode(texts):
        one, two = (model(ids, output_hidden_states=True) for model, ids in zip((text, text2), ids_of(texts)))
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds

    cond, negative, empty = encode(PROMPTS), encode(NEGATIVE), encode([""] * B)
    zeros = tuple(torch.zeros_like(x) for x in cond)
    pipe = StableDiffusionXLPipeline.from_pretrained(f"{out}/model", add_watermarker=False, torch_dtype=torch.float64)
    for given, expected in ((None, zeros), (NEGATIVE, negative), ([""] * B, empty)):
        found = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True, negative_prompt=given)
        assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(found, (cond[0], expected[0], cond[1], expected[1])))
    time_ids = torch.tensor([[*SIZE, 0, 0, *SIZE]] * B).double()
    other_ids = torch.tensor([[300, 200, 16, 24, 96, 160], [768, 1344, 0, 3, 1024, 1000]]).double()

    added = {}
    hook = unet.add_embedding.register_forward_hook(lambda _, i, y: added.update(input=i[0], output=y))
    call = lambda x, t, context, pooled, sizes: unet(x, t, context, added_cond_kwargs=dict(text_embeds=pooled, time_ids=sizes)).sample
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[1]
    x, dy = m.random(B, 4, h, w).requires_grad_(True), m.random(B, 4, h, w)
    y = call(x, t, *cond, time_ids); first = dict(added)
    (dx,) = torch.autograd.grad(y, x, dy)
    other_y = call(x, t, *cond, other_ids); second = dict(added)
    uncond_y = call(x, t, *zeros, time_ids)
    hook.remove()
    z = m.random(B, 4, h, w).requires_grad_(True)
    decoded = vae.decode(z / vae.config.scaling_factor).sample
    d_decoded = m.random(*decoded.shape)
    (dz,) = torch.autograd.grad(decoded, z, d_decoded)
    image = (torch.rand(B, 3, *SIZE).double() * 2.4 - 1.2).requires_grad_(True)
    ids, ids_2 = ids_of(PROMPTS)
    hps_ids = ids.masked_fill((ids == EOS).cumsum(1) - (ids == EOS).long() > 0, 0)
    r_aesthetic, r_hps = m.aesthetic(clip, head, image), m.hps_score(hps, hps_ids, image)
    (d_aesthetic,), (d_hps,) = torch.autograd.grad(r_aesthetic.sum(), image), torch.autograd.grad(r_hps.sum(), image)
    parts = dict(input_ids=ids, input_ids_2=ids_2, open_clip_ids=hps_ids, text_embeds=cond[0], pooled_embeds=cond[1], timesteps=scheduler.timesteps, time_ids=time_ids,
                 other_time_ids=other_ids, added_input=first["input"], added_embedding=first["output"], other_added_input=second["input"], other_added_embedding=second["output"],
                 unet_x=x, unet_t=t.reshape(1), unet_y=y, unet_dy=dy, unet_dx=dx, other_unet_y=other_y, uncond_unet_y=uncond_y, vae_z=z, vae_image=decoded, vae_dimage=d_decoded,
                 vae_dz=dz, reward_image=image, clip_input=m.preprocess(image), aesthetic=r_aesthetic, aesthetic_dimage=d_aesthetic, hps=r_hps, hps_dimage=d_hps)
    for name, texts in (("uncond", [""] * B), ("negative", NEGATIVE), ("more", MORE)):
        parts[f"{name}_ids"], parts[f"{name}_ids_2"] = ids_of(texts)
    for name, (hidden, pooled) in (("uncond", zeros), ("negative", negative), ("empty", empty)):
        parts[f"{name}_embeds"], parts[f"{name}_pooled"] = hidden, pooled
    m.save_f32(parts, f"{out}/parts.safetensors")

    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=m.TARGETS))
    lora = {n.replace(".default", ""): p for n, p in unet.named_parameters() if "lora_" in n}
    for n, p in lora.items():
        p.data = m.random(*p.shape) * (0.05 if "lora_B" in n else 0.2)
        p.requires_grad_(True)
    m.save_f32(lora, f"{out}/lora_start.safetensors")
    x_T, noises = m.random(B, 4, h, w), m.random(STEPS, B, 4, h, w)
    m.save_f32(dict(x_T=x_T, noises=noises), f"{out}/chain_inputs.safetensors")

    def chain(start, negative, eta, guidance, keep):
        def branches(x, t, context):
            pooled = cond[1] if len(x) == B else torch.cat([negative[1], cond[1]])
            return unet(x, t, context, added_cond_kwargs=dict(text_embeds=pooled, time_ids=time_ids.repeat(len(x) // B, 1)))
        return m.denoise(branches, scheduler, start, cond[0], negative[0], noises, STEPS, eta, guidance, keep)

    cases = {}
    for name, eta, guidance, reward, kept, given in CASES:
        keep = [i in kept for i in range(STEPS)]
        latents = chain(x_T, negative if given else zeros, eta, guidance, keep)
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
        r = m.aesthetic(clip, head, decoded) if reward == "aesthetic" else m.hps_score(hps, hps_ids, decoded)
        loss = (r - 10).abs().mean() if reward == "aesthetic" else (1 - r).mean()
        grads = dict(zip(lora, torch.autograd.grad(loss, list(lora.values()))))
        cases[f"{name}_{reward}"] = dict(eta=eta, guidance_scale=guidance, keep=keep, reward=reward, negative_prompts=given, loss=loss.item(), rewards=r.tolist())
        m.save_f32({**{f"grad.{n}": g for n, g in grads.items()}, "latents": latents, "image": decoded, "rewards": r}, f"{out}/chain_{name}_{reward}.safetensors")

    optimizer = torch.optim.AdamW(lora.values(), lr=TRAIN["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=TRAIN["weight_decay"])
    log, more_x = [], m.random(3, B, 4, h, w)
    keep = [i >= STEPS - TRAIN["backprop_steps"] for i in range(STEPS)]
    for start in more_x:
        optimizer.zero_grad()
        r = m.aesthetic(clip, head, vae.decode(chain(start, zeros, TRAIN["eta"], TRAIN["guidance_scale"], keep) / vae.config.scaling_factor).sample)
        loss = (r - TRAIN["aesthetic_target"]).abs().mean() * TRAIN["loss_coeff"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lora.values(), TRAIN["max_grad_norm"])
        optimizer.step()
        log.append(dict(loss=loss.item(), reward_mean=r.mean().item(), grad_norm=norm.item()))
    m.save_f32({**{f"lora.{n}": p for n, p in lora.items()}, "x_T": more_x}, f"{out}/train3.safetensors")
    json.dump(dict(variant="sdxl", seed=21, size=list(SIZE), steps=STEPS, rank=RANK, lora_alpha=RANK, prompts=PROMPTS, negative_prompts=NEGATIVE, more_prompts=MORE, cases=cases,
                   train3=dict(log=log, **TRAIN)), open(f"{out}/reference.json", "w"), indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
