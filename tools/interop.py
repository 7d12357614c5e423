"""Check that other programs read what `alignprop export` writes, and that alignprop reads what they write.

    pip install torch diffusers transformers peft
    cargo build --release && python tools/interop.py [--binary target/release/alignprop] [--write docs/interop.md] [SET ...]

A SET is a folder with a pipeline in `model`, by default the two tiny ones in tests/fixtures. For each, peft makes a random
adapter on all layers of the transformers, whose alpha is not its rank; alignprop paints with it (`sample --save-tensors`),
and each reader paints the same prompts from the same initial latents, with DDIM, guidance and float32. What is compared is
the last latents and the image before rounding: ||x - y|| / ||y||. `--write` replaces the table in a document.
"""
import argparse, json, os, subprocess, sys, tempfile
import diffusers, peft, torch, transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

PROMPTS = ["a cat", "A photo of an astronaut riding a horse, 4k!"]
NEGATIVE = "blurred"
STEPS, GUIDANCE, SIZE = 6, 5.0, (64, 96)
BOUND = 1e-4  # float32 over six steps, two implementations
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def load(model):
    """The pipeline's parts one by one: not all have the same variant."""
    def part(cls, name):
        folder = os.path.join(model, name)
        variant = "fp16" if any(".fp16." in file for file in os.listdir(folder)) else None
        return cls.from_pretrained(folder, variant=variant).to(torch.float32).eval()
    return StableDiffusionPipeline(
        unet=part(UNet2DConditionModel, "unet"), vae=part(AutoencoderKL, "vae"), text_encoder=part(CLIPTextModel, "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(os.path.join(model, "tokenizer")),
        scheduler=DDIMScheduler.from_pretrained(os.path.join(model, "scheduler")),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@torch.no_grad()
def paint(pipe, latents):
    pipe.set_progress_bar_config(disable=True)
    height, width = SIZE
    out = pipe(PROMPTS, negative_prompt=[NEGATIVE] * len(PROMPTS), num_inference_steps=STEPS, guidance_scale=GUIDANCE, eta=0.0,
               height=height, width=width, latents=latents, output_type="latent").images
    return dict(latents=out, images=pipe.vae.decode(out / pipe.vae.config.scaling_factor).sample)


def distance(ours, theirs):
    return max(((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in ("latents", "images"))


def merge_like_sd_scripts(unet, file):
    """As sd-scripts and the web interfaces do: names from the modules of each Transformer2DModel, W + alpha / dim up down."""
    tensors, used = load_file(file), set()
    for name, module in unet.named_modules():
        if module.__class__.__name__ != "Transformer2DModel":
            continue
        for child_name, child in module.named_modules():
            key = "lora_unet_" + f"{name}.{child_name}".replace(".", "_")
            if not isinstance(child, (torch.nn.Linear, torch.nn.Conv2d)) or f"{key}.lora_down.weight" not in tensors:
                continue
            down, up, alpha = (tensors[f"{key}.{part}"].float() for part in ("lora_down.weight", "lora_up.weight", "alpha"))
            # load_state_dict wants the shapes of the layer that it made
            assert down.dim() == child.weight.dim() == up.dim(), (key, down.shape, child.weight.shape)
            delta = (alpha / down.shape[0]) * (up.flatten(1) @ down.flatten(1))
            child.weight.data += delta.reshape(child.weight.shape)
            used.update(f"{key}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert used == set(tensors), sorted(set(tensors) - used)[:3]


def to_original(pipe):
    """The tensors of a pipeline under the names of the original Stable Diffusion code."""
    out, unet, vae, text = {}, pipe.unet, pipe.vae, pipe.text_encoder
    layers = unet.config.layers_per_block
    resnet = dict(norm1="in_layers.0", conv1="in_layers.2", time_emb_proj="emb_layers.1", norm2="out_layers.0", conv2="out_layers.3",
                  conv_shortcut="skip_connection")
    fixed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
             "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}
    for b, block in enumerate(unet.down_blocks):
        for l in range(layers):
            fixed[f"down_blocks.{b}.resnets.{l}"] = f"input_blocks.{1 + b * (layers + 1) + l}.0"
            fixed[f"down_blocks.{b}.attentions.{l}"] = f"input_blocks.{1 + b * (layers + 1) + l}.1"
        fixed[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{(b + 1) * (layers + 1)}.0.op"
    for b, block in enumerate(unet.up_blocks):
        for l in range(layers + 1):
            fixed[f"up_blocks.{b}.resnets.{l}"] = f"output_blocks.{b * (layers + 1) + l}.0"
            fixed[f"up_blocks.{b}.attentions.{l}"] = f"output_blocks.{b * (layers + 1) + l}.1"
        place = 2 if hasattr(block, "attentions") else 1
        fixed[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{b * (layers + 1) + layers}.{place}.conv"
    for name, tensor in unet.state_dict().items():
        stem = max((s for s in fixed if name.startswith(s + ".")), key=len)
        rest = name[len(stem) + 1:]
        if ".resnets." in stem:
            head = rest.split(".")[0]
            rest = resnet[head] + rest[len(head):]
        out[f"model.diffusion_model.{fixed[stem]}.{rest}"] = tensor
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        for new, old in [("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
                         ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"), ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
                         ("mid_block.attentions.0.to_k", "mid.attn_1.k"), ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
                         ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                         ("resnets", "block"), ("down_blocks", "down")]:
            name = name.replace(new, old)
        for b in range(levels):
            name = name.replace(f"up_blocks.{b}.", f"up.{levels - 1 - b}.")
        out[f"first_stage_model.{name}"] = tensor[:, :, None, None] if "attn_1" in name and tensor.dim() == 2 else tensor
    state = {name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()}
    if not unet.config.use_linear_projection:
        return out | {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in state.items()}
    clip = "cond_stage_model.model."
    for name, tensor in state.items():
        for new, old in [("embeddings.token_embedding", "token_embedding"), ("embeddings.position_embedding.weight", "positional_embedding"), ("final_layer_norm", "ln_final"),
                         ("encoder.layers", "transformer.resblocks"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("self_attn.out_proj", "attn.out_proj"),
                         ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]:
            name = name.replace(new, old)
        if "q_proj" in name:
            kind = name.split(".")[-1]
            joined = torch.cat([state[f"encoder.layers.{name.split('.')[2]}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
            out[clip + name.split(".self_attn")[0] + f".attn.in_proj_{kind}"] = joined
        elif "self_attn" not in name:
            out[clip + name] = tensor
    # the last layer, which Stable Diffusion 2.x does not read
    n = text.config.num_hidden_layers
    last = {name.replace(f"resblocks.{n - 1}.", f"resblocks.{n}."): torch.randn_like(tensor) for name, tensor in out.items() if f"{clip}transformer.resblocks.{n - 1}." in name}
    width = text.config.hidden_size
    return out | last | {clip + "text_projection": torch.randn(width, width), clip + "logit_scale": torch.tensor(4.6)}


def check(binary, name, model, folder, rows):
    def run(*line):
        # what peft and diffusers keep in memory is in `folder`; nothing is fetched
        done = subprocess.run([binary, *line], cwd=folder, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if done.returncode:
            sys.exit(f"alignprop {' '.join(line)}\n{done.stderr}")
        return done.stdout.strip()

    def ours(*more, base=model):
        height, width = map(str, SIZE)
        run("sample", "--prompt", *PROMPTS, "--negative-prompt", NEGATIVE, "--model", base, "--steps", str(STEPS), "--guidance-scale", str(GUIDANCE),
            "--eta", "0", "--seed", "3", "--height", height, "--width", width, "-o", "out.png", "--save-tensors", "out.safetensors", *more)
        return load_file(os.path.join(folder, "out.safetensors"))

    def row(what, by, x, y):
        rows.append((name, what, by, distance(x, y)))

    # an adapter that peft made
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, init_lora_weights=False)
    adapted = get_peft_model(load(model).unet, config)
    source = os.path.join(folder, "source")
    adapted.save_pretrained(source)
    state = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(adapted).items()}
    base, expected = ours(), ours("--lora", source)
    latents = expected["initial_latents"]
    effect = distance(base, expected)
    assert effect > 0.05, f"the adapter changes the picture by {effect} only"
    pipe = load(model)
    row("the base model", "diffusers", base, paint(pipe, latents))
    pipe.unet = PeftModel.from_pretrained(pipe.unet, source).base_model.model
    row("LoRA of peft", "read by alignprop", expected, paint(pipe, latents))

    # written by others, read here
    StableDiffusionPipeline.save_lora_weights(os.path.join(folder, "saved"), unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict())
    row("LoRA of diffusers", "read by alignprop", ours("--lora", "saved"), expected)
    kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
    # it counts the product once; the scalar says how often
    kohya = {key.replace("unet_", "lora_unet_", 1) if key.startswith("unet_") else key: value for key, value in kohya.items()}
    kohya = {key: torch.tensor(6.0) if key.endswith(".alpha") else value for key, value in kohya.items()}
    save_file(kohya, os.path.join(folder, "foreign.safetensors"))
    row("kohya by diffusers' converter", "read by alignprop", ours("--lora", "foreign.safetensors"), expected)

    # written here, read by others
    for form, out in [("diffusers", "diffusers.safetensors"), ("kohya", "kohya.safetensors"), ("peft", "peft"), ("merged", "merged")]:
        run("export", source, "--format", form, "--model", model, "--out", out, *(["--precision", "f32"] if form == "merged" else []))
        path = os.path.join(folder, out)
        if form == "merged":
            row("export: merged", "diffusers, from_pretrained", expected, paint(StableDiffusionPipeline.from_pretrained(path), latents))
            row("export: merged", "read by alignprop", ours(base="merged"), expected)
            continue
        pipe = load(model)
        if form == "peft":
            pipe.unet = PeftModel.from_pretrained(pipe.unet, path).base_model.model
            row("export: peft", "peft, PeftModel.from_pretrained", expected, paint(pipe, latents))
        else:
            pipe.load_lora_weights(path)
            row(f"export: {form}", "diffusers, load_lora_weights", expected, paint(pipe, latents))
        if form == "kohya":
            pipe = load(model)
            merge_like_sd_scripts(pipe.unet, path)
            row("export: kohya", "merged as sd-scripts does", expected, paint(pipe, latents))
        row(f"export: {form}", "read by alignprop", ours("--lora", out), expected)

    # one file
    pipe = load(model)
    # the tiny pipelines have no encoder in their VAE, and diffusers wants one: zeros, which nobody reads
    whole = {k: torch.zeros(v.shape) if v.is_meta else v.contiguous().clone() for k, v in to_original(pipe).items()}
    save_file(whole, os.path.join(folder, "single.safetensors"))
    single = ours("--set", f"model.config={model}", base="single.safetensors")
    row("single file", "alignprop beside the folder", single, base)
    theirs = single_file_by_diffusers(os.path.join(folder, "single.safetensors"), model)
    row("single file", "diffusers, from_single_file", single, paint(theirs, latents))


def single_file_by_diffusers(file, model):
    pipe = StableDiffusionPipeline.from_single_file(file, config=model, local_files_only=True, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe.to(torch.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=[os.path.join(ROOT, "tests/fixtures", name) for name in ("tiny-sd15", "tiny-sd21")])
    parser.add_argument("--binary", default=os.path.join(ROOT, "target/release/alignprop"))
    parser.add_argument("--write", metavar="FILE")
    args = parser.parse_args()
    rows = []
    for path in args.sets:
        path = os.path.abspath(path)
        with tempfile.TemporaryDirectory() as folder:
            check(os.path.abspath(args.binary), os.path.basename(path), os.path.join(path, "model"), folder, rows)
    names = list(dict.fromkeys(name for name, *_ in rows))
    table = ["| | | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for what, by in dict.fromkeys((what, by) for _, what, by, _ in rows):
        found = {name: d for name, w, b, d in rows if (w, b) == (what, by)}
        table.append(f"| {what} | {by} | " + " | ".join(f"{found[name]:.1e}" for name in names) + " |")
    versions = f"torch {torch.__version__.split('+')[0]}, diffusers {diffusers.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    text = "\n".join([*table, "", f"Versions: {versions}."])
    print(text)
    if args.write:
        begin, end = "<!-- table of tools/interop.py -->\n", "<!-- end of table -->"
        with open(args.write) as file:
            head, rest = file.read().split(begin)
        document = head + begin + text + "\n" + end + rest.split(end)[1]
        with open(args.write, "w") as file:
            file.write(document)
    bad = [row for row in rows if not row[3] < BOUND]
    if bad:
        sys.exit("\n".join(["not the same picture:", *map(str, bad)]))


if __name__ == "__main__":
    main()
