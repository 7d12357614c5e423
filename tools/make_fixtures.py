"""Make the small reference sets that the tests read: random tiny models and their numbers, in float64 PyTorch.

    pip install torch torchvision diffusers transformers peft open-clip-torch
    python tools/make_fixtures.py TOKENIZER tests/fixtures

TOKENIZER is the folder of the CLIP tokenizer of Stable Diffusion 1.5 (vocab.json, merges.txt, two configs); its first
merges become a small tokenizer. The result is committed, so building and testing never need this file.

tiny-sd15, tiny-sd21   one reference set each, the folders that `alignprop verify` reads:
    model/                   a pipeline in the diffusers layout
    clip/                    a CLIPModel in the transformers layout
    hps/                     a CLIP in open_clip's layout and key names, as safetensors and as a PyTorch pickle
    aesthetic_head.safetensors   five random linear layers under the names of the LAION aesthetic head
    parts.safetensors        inputs, outputs and input gradients of each model alone
    chain_*.safetensors      rewards and LoRA gradients through the DDIM chain, one file per case of reference.json
    train3.safetensors       the LoRA factors after three optimizer steps
tiny-yolos             a detector in the transformers layout (model/), what it sees in two images (parts.safetensors), and the distribution
                       of counts of given logits (count.safetensors)
tiny-imagereward       an ImageReward with the published keys, as pickle and safetensors, with its vocabulary and scores (parts.safetensors)
tiny-siglip            a SigLIP in the transformers layout (model/) with its embeddings (parts.safetensors)
lora/                  the adapter tiny-sd15/lora_start.safetensors in three file formats
tokenizer_cases.json   prompts and their ids in both small tokenizers
guidance_rescale.safetensors   guidance of two images with diffusers' rescale_noise_cfg, and its gradients, in f64

The two sets differ in whatever real checkpoints differ in: see the comments at SETS. Everything random that a number
depends on is stored. Numbers come from the weights as stored (f16 or bf16), computed in f64 and stored as f32.
"""
import argparse, json, os, shutil
import open_clip, torch, torchvision
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, SiglipConfig, SiglipModel, YolosConfig, YolosForObjectDetection
from transformers import BertTokenizer

MERGES = 600
BOS, EOS = 512 + MERGES, 513 + MERGES  # 256 bytes, 256 bytes that end a word, the merges, two special tokens
VOCAB = dict(vocab_size=514 + MERGES, max_position_embeddings=77, bos_token_id=BOS, eos_token_id=EOS)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
IMAGE = 224  # the side of the CLIP input; parts.safetensors stores it per prompt, so it decides the size of a set
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

SETS = {
    # Stored as the SD 1.5 repository is: vocab.json + merges.txt, `text_model.` prefix and position_ids in the text
    # encoder, old attention names in the VAE and its variant file name; and a UNet in two shards.
    # 88x56 gives 11x7 latents: neither side is a multiple of the UNet's factor of 8.
    "tiny-sd15": dict(variant="sd15", seed=1, size=(88, 56), steps=4, rank=2, text_dim=24, text_act="quick_gelu", pad="<|endoftext|>",
                      channels=(8, 8, 16, 16), heads=2, layers=1, groups=4, prompts=["a cat", "A photo of an astronaut riding a horse, 4k!"]),
    # Stored as transformers 5 and diffusers write it: tokenizer.json, no prefix, bf16 text encoder.
    "tiny-sd21": dict(variant="sd21", seed=5, size=(64, 96), steps=4, rank=3, text_dim=32, text_act="gelu", pad="!",
                      channels=(8, 8, 16, 16), heads=[1, 1, 2, 2], layers=2, groups=8, prompts=["Two red foxes,  in the snow"]),
}
# name, eta, guidance scale, guidance rescale, reward, the kept steps of four
CASES = [("k1_eta0_cfg7.5", 0.0, 7.5, 0.0, "aesthetic", [3]), ("k3_eta1_cfg5", 1.0, 5.0, 0.0, "hps", [1, 2, 3]),
         ("full_eta0_cfg1", 0.0, 1.0, 0.0, "aesthetic", [0, 1, 2, 3]), ("per_step_eta0_cfg7.5", 0.0, 7.5, 0.0, "hps", [0, 2, 3]),
         ("k2_eta0_cfg7.5_rescale0.7", 0.0, 7.5, 0.7, "aesthetic", [2, 3])]
TRAIN = dict(lr=1e-3, weight_decay=0.1, max_grad_norm=7e-5, loss_coeff=0.01, aesthetic_target=10, eta=0.0, guidance_scale=7.5, backprop_steps=2)

TOKENIZER_PROMPTS = [
    "", " ", "a cat", "A Cat", "  two  double   spaces ", "tab\tand\nnewline\r\nand nbsp\u00a0here", "don't", "it's we're I've he'd she'll I'm o'clock 'quoted'",
    "4k 1920x1080 3.14 007 ½ ² ४२", "café naïve Zürich Ångström", "cafe\u0301 de\u0301compose\u0301", "İstanbul STRASSE straße", "ΑΒΓ αβγς Привет МИР",
    "東京タワー 日本語", "한국어 中文，标点。", "🦦 otter 👩‍🚀🏽 ❤️", "zero\u200bwidth\u200djoiner \ufeffbom", "control \u0000\u0001\u0007\u001b chars \u007f \u0085",
    "&lt;b&gt; &amp; &amp;amp; &quot;quoted&quot; &#39; &eacute;", "<b>tags</b> </w> <|startoftext|> mid <|endoftext|> after", "<|endoftext|>", "<|ENDOFTEXT|>",
    "!!! ?!?! ... --- ___ ### $$$ %^&*()", "a,b;c:d(e)[f]{g}|h\\i/j", "“curly” ‘quotes’ — dash … ellipsis", "ﬁ ﬂ ligatures ＦＵＬＬ ｗｉｄｔｈ", "â€œmojibakeâ€\u009d schÃ¶n",
    "supercalifragilisticexpialidocious antidisestablishmentarianism", "x" * 200, "a photo of an astronaut riding a horse, " * 20, "1 " * 75, "1 " * 76, "م مرحبا עברית ไทย हिन्दी",
]


def random(*shape):
    return torch.randn(*shape, dtype=torch.float32).double()


def small_tokenizer(source, out):
    os.makedirs(out, exist_ok=True)
    vocab = json.load(open(f"{source}/vocab.json", encoding="utf-8"))
    small = {t: i for t, i in sorted(vocab.items(), key=lambda v: v[1]) if i < BOS}
    small |= {"<|startoftext|>": BOS, "<|endoftext|>": EOS}
    json.dump(small, open(f"{out}/vocab.json", "w", encoding="utf-8"), ensure_ascii=False)
    lines = open(f"{source}/merges.txt", encoding="utf-8").read().split("\n")[:1 + MERGES]  # a version line comes first
    open(f"{out}/merges.txt", "w", encoding="utf-8").write("\n".join(lines) + "\n")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(f"{source}/{name}", f"{out}/{name}")


def perturb(model, gain=1.0):
    """Random biases and norms, so that no parameter can be ignored unnoticed. The gain keeps gradients of order 1."""
    for _, p in model.named_parameters():
        p.data = p.data + 0.1 * torch.randn_like(p) if p.ndim == 1 else p.data * gain
    return model.eval().requires_grad_(False)


def pipeline(s, out):
    """Makes and stores the text encoder, the UNet, the VAE and the scheduler; returns them in f64, rounded as stored."""
    v21 = s["variant"] == "sd21"
    text = perturb(CLIPTextModel(CLIPTextConfig(**VOCAB, hidden_size=s["text_dim"], intermediate_size=2 * s["text_dim"], num_hidden_layers=2, num_attention_heads=4,
                                                hidden_act=s["text_act"], pad_token_id=0 if v21 else EOS, projection_dim=s["text_dim"])), gain=4)
    unet = perturb(UNet2DConditionModel(
        sample_size=s["size"][0] // 8, in_channels=4, out_channels=4, block_out_channels=s["channels"], layers_per_block=s["layers"],
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=s["text_dim"], attention_head_dim=s["heads"], use_linear_projection=v21, norm_num_groups=s["groups"]))
    vae = perturb(AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=s["size"][0], scaling_factor=0.18215))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                              steps_offset=1, prediction_type="v_prediction" if v21 else "epsilon")
    scheduler.save_pretrained(f"{out}/scheduler")
    text.to(torch.bfloat16 if v21 else torch.float16).save_pretrained(f"{out}/text_encoder")
    unet.half().save_pretrained(f"{out}/unet", **({} if v21 else dict(max_shard_size="150KB")))
    vae.half().save_pretrained(f"{out}/vae", variant=None if v21 else "fp16")
    rewrite(f"{out}/vae/diffusion_pytorch_model{'' if v21 else '.fp16'}.safetensors", lambda k: vae_key(k, old=not v21))
    if not v21:
        position_ids = {"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)}
        rewrite(f"{out}/text_encoder/model.safetensors", lambda k: "text_model." + k, position_ids)
    index = dict(scheduler=("diffusers", "DDIMScheduler"), text_encoder=("transformers", "CLIPTextModel"), tokenizer=("transformers", "CLIPTokenizer"),
                 unet=("diffusers", "UNet2DConditionModel"), vae=("diffusers", "AutoencoderKL"))
    json.dump({"_class_name": "StableDiffusionPipeline", **index}, open(f"{out}/model_index.json", "w"), indent=2)
    return text.double(), unet.double(), vae.double(), scheduler


def rewrite(path, rename, extra={}):
    """Renames the tensors of a file; those renamed to None are dropped."""
    save_file({**{rename(k): v for k, v in load_file(path).items() if rename(k)}, **extra}, path, metadata={"format": "pt"})


def vae_key(key, old):
    if key.startswith(("encoder.", "quant_conv.")):  # only the decoder is ever used
        return None
    if old and ".attentions." in key:
        for new_name, old_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new_name}.", f".{old_name}.")
    return key


def reward_models(out):
    tower = dict(num_hidden_layers=2, num_attention_heads=4, hidden_act="quick_gelu", projection_dim=24)
    clip = perturb(CLIPModel(CLIPConfig(projection_dim=24,
        text_config=dict(VOCAB, **tower, hidden_size=16, intermediate_size=32, pad_token_id=EOS),
        vision_config=dict(tower, hidden_size=32, intermediate_size=64, image_size=IMAGE, patch_size=16))), gain=4)
    clip.half().save_pretrained(f"{out}/clip")
    config = dict(embed_dim=20, quick_gelu=False, vision_cfg=dict(image_size=IMAGE, layers=2, width=16, head_width=8, patch_size=16),
                  text_cfg=dict(context_length=77, vocab_size=VOCAB["vocab_size"], width=16, heads=2, layers=2))
    hps = perturb(open_clip.CLIP(**config, output_dict=True), gain=2).half()
    os.makedirs(f"{out}/hps", exist_ok=True)
    weights = {k: v.contiguous() for k, v in hps.state_dict().items()}
    save_file(weights, f"{out}/hps/model.safetensors")
    torch.save({"state_dict": weights}, f"{out}/hps/HPS_tiny.pt")  # the form of the published HPSv2 weights
    json.dump(config, open(f"{out}/hps/open_clip_config.json", "w"), indent=2)
    head = AestheticHead().requires_grad_(False)
    head.layers[-1].bias += 5
    save_file({k: v.contiguous() for k, v in head.state_dict().items()}, f"{out}/aesthetic_head.safetensors")
    return clip.double(), hps.double(), head.double()


class AestheticHead(torch.nn.Module):
    """The LAION head with other widths; layers 1, 3 and 5 stand for its dropouts, which are off."""

    def __init__(self, widths=(24, 32, 16, 8, 4, 1)):
        super().__init__()
        linear = [torch.nn.Linear(*w) for w in zip(widths, widths[1:])]
        for l in linear:
            l.weight.data.mul_(2.0)
        none = torch.nn.Identity
        self.layers = torch.nn.Sequential(linear[0], none(), linear[1], none(), linear[2], none(), linear[3], linear[4])


def preprocess(image):
    """[-1, 1] RGB -> CLIP input: to [0, 1], clamp, antialiased bilinear resize of the short side to IMAGE, centre crop, normalise."""
    x = (image / 2 + 0.5).clamp(0, 1)
    x = torchvision.transforms.functional.resize(x, IMAGE, antialias=True)
    x = torchvision.transforms.functional.center_crop(x, IMAGE)
    return (x - torch.tensor(MEAN, dtype=x.dtype).view(1, 3, 1, 1)) / torch.tensor(STD, dtype=x.dtype).view(1, 3, 1, 1)


def unit_features(features):
    return F.normalize(features if torch.is_tensor(features) else features.pooler_output, dim=-1)  # transformers 5 wraps them


def aesthetic(clip, head, image):
    return head.layers(unit_features(clip.get_image_features(pixel_values=preprocess(image)))).squeeze(1)


def hps_score(model, ids, image):
    out = model(preprocess(image), ids)
    return (out["image_features"] * out["text_features"]).sum(-1)


def guide(u, c, guidance, rescale):
    eps = u + guidance * (c - u)
    return rescale_noise_cfg(eps, c, rescale) if rescale > 0 else eps


def denoise(unet, scheduler, x, cond, uncond, noises, steps, eta, guidance, keep, rescale=0.0):
    """DDIM chain; where keep[i] is False, step i's noise prediction is detached."""
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(keep[i]):
            if guidance == 1.0:
                eps = unet(x, t, cond).sample
            else:
                u, c = unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample.chunk(2)
                eps = guide(u, c, guidance, rescale)
        x = scheduler.step(eps if keep[i] else eps.detach(), t, x, eta=eta, variance_noise=noises[i] if eta > 0 else None).prev_sample
    return x


def save_f32(tensors, path):
    save_file({k: (v.detach().float() if v.is_floating_point() else v).clone().contiguous() for k, v in tensors.items()}, path)


def make_set(s, out, tokenizer):
    torch.manual_seed(s["seed"])
    prompts, steps, B, (h, w) = s["prompts"], s["steps"], len(s["prompts"]), (n // 8 for n in s["size"])
    text, unet, vae, scheduler = pipeline(s, f"{out}/model")
    clip, hps, head = reward_models(out)

    def ids_of(texts):
        return tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    ids, uncond_ids = ids_of(prompts), ids_of([""] * B)
    after_eos = (ids == EOS).cumsum(1) - (ids == EOS).long() > 0
    hps_ids = ids.masked_fill(after_eos, 0)  # open_clip pads with 0
    cond, uncond = text(ids)[0], text(uncond_ids)[0]

    # Each model alone.
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps[1]
    x, dy = random(B, 4, h, w).requires_grad_(True), random(B, 4, h, w)
    y = unet(x, t, cond).sample
    (dx,) = torch.autograd.grad(y, x, dy)
    z = random(B, 4, h, w).requires_grad_(True)
    decoded = vae.decode(z / vae.config.scaling_factor).sample
    d_decoded = random(*decoded.shape)
    (dz,) = torch.autograd.grad(decoded, z, d_decoded)
    image = (torch.rand(B, 3, *s["size"]).double() * 2.4 - 1.2).requires_grad_(True)  # some of it is clamped
    r_aesthetic, r_hps = aesthetic(clip, head, image), hps_score(hps, hps_ids, image)
    (d_aesthetic,) = torch.autograd.grad(r_aesthetic.sum(), image)
    (d_hps,) = torch.autograd.grad(r_hps.sum(), image)
    parts = dict(input_ids=ids, uncond_ids=uncond_ids, open_clip_ids=hps_ids, text_embeds=cond, uncond_embeds=uncond, timesteps=scheduler.timesteps,
                 unet_x=x, unet_t=t.reshape(1), unet_y=y, unet_dy=dy, unet_dx=dx, vae_z=z, vae_image=decoded, vae_dimage=d_decoded, vae_dz=dz,
                 reward_image=image, clip_input=preprocess(image), aesthetic=r_aesthetic, aesthetic_dimage=d_aesthetic, hps=r_hps, hps_dimage=d_hps)
    if s["variant"] == "sd15":
        image_features = unit_features(clip.get_image_features(pixel_values=preprocess(image)))
        parts["clip_score_cosine"] = (image_features * unit_features(clip.get_text_features(input_ids=ids))).sum(-1)
    save_f32(parts, f"{out}/parts.safetensors")

    # LoRA gradients through the chain.
    unet.add_adapter(LoraConfig(r=s["rank"], lora_alpha=s["rank"], target_modules=TARGETS))
    lora = {n.replace(".default", ""): p for n, p in unet.named_parameters() if "lora_" in n}
    for n, p in lora.items():
        p.data = random(*p.shape) * (0.05 if "lora_B" in n else 0.2)
        p.requires_grad_(True)
    save_f32(lora, f"{out}/lora_start.safetensors")
    x_T, noises = random(B, 4, h, w), random(steps, B, 4, h, w)
    save_f32(dict(x_T=x_T, noises=noises), f"{out}/chain_inputs.safetensors")
    cases = {}
    for name, eta, guidance, rescale, reward, kept in CASES:
        keep = [i in kept for i in range(steps)]
        latents = denoise(unet, scheduler, x_T, cond, uncond, noises, steps, eta, guidance, keep, rescale)
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
        r = aesthetic(clip, head, decoded) if reward == "aesthetic" else hps_score(hps, hps_ids, decoded)
        loss = (r - 10).abs().mean() if reward == "aesthetic" else (1 - r).mean()
        grads = dict(zip(lora, torch.autograd.grad(loss, list(lora.values()))))
        cases[f"{name}_{reward}"] = dict(eta=eta, guidance_scale=guidance, guidance_rescale=rescale, keep=keep, reward=reward, loss=loss.item(), rewards=r.tolist())
        save_f32({**{f"grad.{n}": g for n, g in grads.items()}, "latents": latents, "image": decoded, "rewards": r}, f"{out}/chain_{name}_{reward}.safetensors")

    # Three steps of AdamW with clipped gradients.
    optimizer = torch.optim.AdamW(lora.values(), lr=TRAIN["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=TRAIN["weight_decay"])
    log, x_T = [], random(3, B, 4, h, w)
    keep = [i >= steps - TRAIN["backprop_steps"] for i in range(steps)]
    for start in x_T:
        optimizer.zero_grad()
        latents = denoise(unet, scheduler, start, cond, uncond, noises, steps, TRAIN["eta"], TRAIN["guidance_scale"], keep)
        r = aesthetic(clip, head, vae.decode(latents / vae.config.scaling_factor).sample)
        loss = (r - TRAIN["aesthetic_target"]).abs().mean() * TRAIN["loss_coeff"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lora.values(), TRAIN["max_grad_norm"])
        optimizer.step()
        log.append(dict(loss=loss.item(), reward_mean=r.mean().item(), grad_norm=norm.item()))
    save_f32({**{f"lora.{n}": p for n, p in lora.items()}, "x_T": x_T}, f"{out}/train3.safetensors")
    json.dump(dict(variant=s["variant"], seed=s["seed"], size=list(s["size"]), steps=steps, rank=s["rank"], lora_alpha=s["rank"], prompts=prompts, cases=cases,
                   train3=dict(log=log, **TRAIN)), open(f"{out}/reference.json", "w"), indent=1)


def make_lora_files(set_dir, out):
    """The adapter of lora_start.safetensors as diffusers, peft and the old attention processors store it."""
    for d in ("diffusers", "peft", "attn_procs"):
        os.makedirs(f"{out}/{d}", exist_ok=True)
    lora, rank = load_file(f"{set_dir}/lora_start.safetensors"), SETS["tiny-sd15"]["rank"]
    unet = UNet2DConditionModel.from_pretrained(f"{set_dir}/model/unet", torch_dtype=torch.float32)
    model = get_peft_model(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    model.load_state_dict({"base_model.model." + k.replace(".weight", ".default.weight"): v for k, v in lora.items()}, strict=False)
    model.peft_config["default"].base_model_name_or_path = None
    model.peft_config["default"].target_modules = TARGETS  # in a fixed order
    model.save_pretrained(f"{out}/peft")
    os.remove(f"{out}/peft/README.md")  # an empty model card
    layers = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    assert layers.keys() == lora.keys() and all(layers[k].equal(lora[k]) for k in lora)
    StableDiffusionPipeline.save_lora_weights(f"{out}/diffusers", unet_lora_layers=layers)
    old = {}
    for k, v in lora.items():
        for new_name, old_name in ((".to_out.0.", ".to_out."), (".to_", ".processor.to_"), (".lora_A.", "_lora.down."), (".lora_B.", "_lora.up.")):
            k = k.replace(new_name, old_name)
        old[k] = v
    save_file(old, f"{out}/attn_procs/pytorch_lora_weights.safetensors", metadata={"format": "pt"})


def make_guidance_rescale(path):
    torch.manual_seed(11)
    u, c, d = random(2, 4, 3, 5), 0.8 * random(2, 4, 3, 5) + 0.3, random(2, 4, 3, 5)
    tensors = dict(uncond=u, cond=c, cotangent=d)
    u.requires_grad_(True), c.requires_grad_(True)
    for rescale in (0.0, 0.7, 1.0):
        y = guide(u, c, 7.5, rescale)
        d_u, d_c = torch.autograd.grad(y, (u, c), d)
        tensors |= {f"{rescale}.guided": y, f"{rescale}.d_uncond": d_u, f"{rescale}.d_cond": d_c}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)


def count_log_probs(logits, label):
    """log P(N = 0..Q) of the number N of tokens of a class, and the expected number."""
    everything = torch.logsumexp(logits, -1)
    p = logits[:, label] - everything
    q = torch.logsumexp(torch.cat([logits[:, :label], logits[:, label + 1:]], 1), -1) - everything
    rows = [torch.zeros((), dtype=logits.dtype)]
    for i in range(len(p)):
        rows = [rows[0] + q[i]] + [torch.logaddexp(rows[k] + q[i], rows[k - 1] + p[i]) for k in range(1, i + 1)] + [rows[i] + p[i]]
    return torch.stack(rows), p.exp().sum()


def make_yolos(out):
    """A YOLOS of 4 detection tokens with position embeddings between its layers. The second image is resized to multiples of the patch."""
    torch.manual_seed(7)
    labels, patch, tokens = ["N/A", "cat", "dog", "fox", "N/A"], 8, 4
    model = perturb(YolosForObjectDetection(YolosConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[3 * patch, 4 * patch], patch_size=patch,
        num_detection_tokens=tokens, use_mid_position_embeddings=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})), gain=4)
    for name, p in model.named_parameters():
        if p.ndim > 2 and ("token" in name or "position" in name):
            p.data = torch.randn_like(p) * 0.5
    model.save_pretrained(f"{out}/model")
    statistics = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    json.dump(dict(feature_extractor_type="YolosFeatureExtractor", **statistics), open(f"{out}/model/preprocessor_config.json", "w"), indent=2)
    model, resized, parts, cases = model.double(), [2 * patch, 4 * patch], {}, []
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in statistics.values())
    for n, size in enumerate([(3 * patch, 3 * patch), (2 * patch + 5, 5 * patch - 3)]):
        image = (torch.rand(1, 3, *size).double() * 2.4 - 1.2).requires_grad_(True)
        x = (image / 2 + 0.5).clamp(0, 1)
        if any(v % patch for v in size):
            x = torchvision.transforms.functional.resize(x, resized, antialias=True)
        pixels = (x - mean) / std
        found = model(pixel_values=pixels)
        logits = found.logits[0]
        parts |= {f"image_{n}": image, f"pixels_{n}": pixels, f"logits_{n}": logits, f"boxes_{n}": found.pred_boxes[0]}
        for label in (1, 3):
            distribution, expected = count_log_probs(logits, label)
            parts[f"log_probs_{n}_class{label}"] = distribution
            (parts[f"dexpected_{n}_class{label}"],) = torch.autograd.grad(expected, image, retain_graph=True)
            for count in (0, 2):
                (parts[f"dreward_{n}_class{label}_n{count}"],) = torch.autograd.grad(distribution[count], image, retain_graph=True)
                cases.append(dict(image=n, label=label, name=labels[label], n=count, reward=distribution[count].item(), expected=expected.item()))
    save_f32(parts, f"{out}/parts.safetensors")
    plain, alone = random(tokens, len(labels) + 1), {}
    sure = plain.clone()
    sure[:, -1] += 25; sure[0, 1] = 38; sure[1, 1] = -41
    for name, logits in (("plain", plain), ("sure", sure)):
        logits = logits.float().double().requires_grad_(True)
        distribution, expected = count_log_probs(logits, 1)
        alone |= {f"{name}_logits": logits, f"{name}_log_probs": distribution, f"{name}_expected": expected.reshape(1)}
        (alone[f"{name}_dexpected"],) = torch.autograd.grad(expected, logits, retain_graph=True)
        for count in (0, 1, tokens):
            (alone[f"{name}_dlogits_n{count}"],) = torch.autograd.grad(distribution[count], logits, retain_graph=True)
    save_f32(alone, f"{out}/count.safetensors")
    json.dump(dict(kind="yolos", labels=labels, detection_tokens=tokens, cases=cases, count_label=1), open(f"{out}/reference.json", "w"), indent=1)


class Heads(torch.nn.Module):
    """Multi-head attention without its output projection."""

    def __init__(self, width, source, heads, names):
        super().__init__()
        self.heads, self.names = heads, names
        for name, inputs in zip(names, (width, source, source)):
            setattr(self, name, torch.nn.Linear(inputs, width))

    def forward(self, x, source):
        split = lambda y: y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)
        q, k, v = (split(getattr(self, name)(y)) for name, y in zip(self.names, (x, source, source)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def tree(**parts):
    return torch.nn.ModuleDict(parts)


class ImageReward(torch.nn.Module):
    """ImageReward's modules under its names, with q, k and v of the ViT apart (they are put together where it is saved)."""

    def __init__(self, side, patch, c, h, words, layers, heads, widths):
        super().__init__()
        L, N, P = torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Parameter
        names = ("query", "key", "value")
        attend = lambda source: tree(self=Heads(h, source, heads, names), output=tree(dense=L(h, h), LayerNorm=N(h, 1e-12)))
        block = lambda: tree(norm1=N(c, 1e-6), attn=tree(qkv=Heads(c, c, c // 64, "qkv"), proj=L(c, c)), norm2=N(c, 1e-6), mlp=tree(fc1=L(c, 2 * c), fc2=L(2 * c, c)))
        layer = lambda: tree(attention=attend(h), crossattention=attend(c), intermediate=tree(dense=L(h, 2 * h)), output=tree(dense=L(2 * h, h), LayerNorm=N(h, 1e-12)))
        visual = tree(patch_embed=tree(proj=torch.nn.Conv2d(3, c, patch, patch)), blocks=torch.nn.ModuleList(block() for _ in range(layers[0])), norm=N(c, 1e-6))
        visual.cls_token, visual.pos_embed = P(torch.randn(1, 1, c)), P(torch.randn(1, (side // patch) ** 2 + 1, c))
        embeddings = tree(word_embeddings=torch.nn.Embedding(words, h), position_embeddings=torch.nn.Embedding(16, h), LayerNorm=N(h, 1e-12))
        text = tree(embeddings=embeddings, encoder=tree(layer=torch.nn.ModuleList(layer() for _ in range(layers[1]))))
        self.blip = tree(visual_encoder=visual, text_encoder=text)
        none = torch.nn.Identity
        linear = [L(*w) for w in zip((h, *widths), (*widths, 1))]
        self.mlp = tree(layers=torch.nn.Sequential(linear[0], none(), linear[1], none(), linear[2], none(), linear[3], linear[4]))

    def image(self, pixels):
        v = self.blip["visual_encoder"]
        x = v["patch_embed"]["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.cls_token.expand(len(x), -1, -1), x], 1) + v.pos_embed
        for block in v["blocks"]:
            y = block["norm1"](x)
            x = x + block["attn"]["proj"](block["attn"]["qkv"](y, y))
            x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return v["norm"](x)

    def text(self, ids, image):
        t = self.blip["text_encoder"]
        e = t["embeddings"]
        x = e["LayerNorm"](e["word_embeddings"](ids) + e["position_embeddings"].weight[: ids.shape[1]])
        for layer in t["encoder"]["layer"]:
            for part, source in ((layer["attention"], None), (layer["crossattention"], image)):
                x = part["output"]["LayerNorm"](x + part["output"]["dense"](part["self"](x, x if source is None else source)))
            x = layer["output"]["LayerNorm"](x + layer["output"]["dense"](F.gelu(layer["intermediate"]["dense"](x))))
        return x

    def forward(self, pixels, ids):
        return (self.mlp["layers"](self.text(ids, self.image(pixels))[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072


def make_image_reward(out):
    """Two ViT blocks of one head of 64 channels, one text layer; the second image is resized and cropped."""
    torch.manual_seed(13)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "dog", "in", "the", "snow", "##s", ",", "!", "two", "fox", "##es", "cafe"]
    os.makedirs(out, exist_ok=True)
    open(f"{out}/vocab.txt", "w").write("".join(word + "\n" for word in words))
    json.dump(dict(model_type="bert", hidden_act="gelu", layer_norm_eps=1e-12, num_attention_heads=2, encoder_width=16), open(f"{out}/med_config.json", "w"), indent=2)
    model = perturb(ImageReward(32, 16, 64, 16, len(words) + 2, (2, 1), 2, (24, 16, 8, 8)), gain=1.5).half()
    tensors = {}
    for key, value in model.state_dict().items():
        block, projection, kind = key.rpartition(".attn.qkv.")[0], key.split(".")[-2], key.split(".")[-1]
        if not block:
            tensors[key] = value
        elif projection == "q":
            of = model.get_submodule(f"{block}.attn.qkv")
            tensors[f"{block}.attn.qkv.{kind}"] = torch.cat([getattr(getattr(of, name), kind) for name in "qkv"])
    save_file(tensors, f"{out}/model.safetensors")
    torch.save(tensors, f"{out}/ImageReward.pt")
    model = model.double()
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"}), tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    prompts = ["a cat", "Two red foxes, in the SNOW! [ENC] Caf\u00e9 wug"]
    encoded = tokenizer(prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    ids, mask = encoded.input_ids, encoded.attention_mask
    parts, sizes, scores = dict(input_ids=ids, attention_mask=mask), [(32, 32), (21, 40)], []
    resize = torchvision.transforms.functional
    for n, size in enumerate(sizes):
        image = (torch.rand(1, 3, *size).double() * 2.4 - 1.2).requires_grad_(True)
        x = resize.resize((image / 2 + 0.5).clamp(0, 1), 32, interpolation=torchvision.transforms.InterpolationMode.BICUBIC, antialias=True)
        pixels = (resize.center_crop(x, 32) - torch.tensor(MEAN).double().view(1, 3, 1, 1)) / torch.tensor(STD).double().view(1, 3, 1, 1)
        of = [model(pixels, ids[p : p + 1, : mask[p].sum()])[0] for p in range(len(prompts))]
        scores.append(torch.stack(of))
        parts |= {f"image_{n}": image, f"pixels_{n}": pixels}
        (parts[f"dimage_{n}"],) = torch.autograd.grad(of[n], image, retain_graph=True)
        (parts[f"dimage_{n}_prompt1"],) = torch.autograd.grad(of[1], image)
        if n == 0:
            tokens = model.image(pixels)
            hidden = [F.pad(model.text(ids[p : p + 1, : mask[p].sum()], tokens), (0, 0, 0, 16 - mask[p].sum())) for p in range(len(prompts))]
            parts |= {"visual_0": tokens, "hidden_0": torch.cat(hidden)}
    save_f32(parts | dict(scores=torch.stack(scores)), f"{out}/parts.safetensors")
    json.dump(dict(kind="imagereward", prompts=prompts, image_sizes=sizes), open(f"{out}/reference.json", "w"), indent=1)


def make_siglip(out):
    torch.manual_seed(17)
    tower = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = perturb(SiglipModel(SiglipConfig(text_config=dict(tower, vocab_size=24, max_position_embeddings=6), vision_config=dict(tower, image_size=24, patch_size=8))), gain=2).half()
    model.save_pretrained(f"{out}/model")
    model = model.double()
    pixels, ids = random(2, 3, 24, 24).requires_grad_(True), torch.randint(0, 24, (2, 6))
    image, text = (x if torch.is_tensor(x) else x.pooler_output for x in (model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=ids)))
    cosine = (unit_features(image) * unit_features(text)).sum(-1)
    (d_pixels,) = torch.autograd.grad(cosine.sum(), pixels)
    save_f32(dict(pixels=pixels, input_ids=ids, image_embeds=image, text_embeds=text, cosine=cosine, d_pixels=d_pixels), f"{out}/parts.safetensors")
    json.dump(dict(kind="siglip"), open(f"{out}/reference.json", "w"), indent=1)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("tokenizer")
    ap.add_argument("out")
    a = ap.parse_args()
    torch.set_num_threads(1)
    tokenizers = {}
    for name, s in SETS.items():
        small = f"{a.out}/tiny-sd15/model/tokenizer"
        if name == "tiny-sd15":
            small_tokenizer(a.tokenizer, small)
        tokenizers[name] = CLIPTokenizer.from_pretrained(small, pad_token=s["pad"])
        if name != "tiny-sd15":
            tokenizers[name].save_pretrained(f"{a.out}/{name}/model/tokenizer")
        make_set(s, f"{a.out}/{name}", tokenizers[name])
    make_lora_files(f"{a.out}/tiny-sd15", f"{a.out}/lora")
    make_guidance_rescale(f"{a.out}/guidance_rescale.safetensors")
    make_yolos(f"{a.out}/tiny-yolos")
    make_image_reward(f"{a.out}/tiny-imagereward")
    make_siglip(f"{a.out}/tiny-siglip")
    stored = {name: CLIPTokenizer.from_pretrained(f"{a.out}/{name}/model/tokenizer") for name in SETS}
    cases = [dict(prompt=p, **{name: t(p, padding="max_length", truncation=True, max_length=77).input_ids for name, t in stored.items()}) for p in TOKENIZER_PROMPTS]
    with open(f"{a.out}/tokenizer_cases.json", "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")


if __name__ == "__main__":
    main()
