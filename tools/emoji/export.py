"""Write the weights as f16 safetensors: emoji-sd in the diffusers layout, the contrastive models and the
aesthetic one in the transformers layout."""
import json, os, shutil
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
import clip, data, head, unet, vae
from common import load_checkpoint

PIPELINE = {"_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}


def halves(weights, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in weights.items()}, path, metadata={"format": "pt"})


def config(path, values):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        json.dump({k: v for k, v in values.items() if k not in ("_name_or_path", "transformers_version", "_diffusers_version", "_use_default_values")}, f, indent=2, sort_keys=True)
        f.write("\n")


def tokenizer(folder, out):
    os.makedirs(out, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copyfile(os.path.join(folder, "tokenizer", name), os.path.join(out, name))


def contrastive(folder, kind, out):
    model, _ = clip.load(folder, kind)
    halves(model.state_dict(), os.path.join(out, "model.safetensors"))
    config(os.path.join(out, "config.json"), {**model.config.to_dict(), "architectures": ["CLIPModel"], "dtype": "float16"})
    preprocessor(out)
    tokenizer(folder, out)


def aesthetic(folder, out):
    """The tower by itself, which is all that a head needs, and the head."""
    model = head.load(folder)
    tower, layers = model["tower"], model["head"]
    halves({k: v for k, v in tower.state_dict().items() if k.startswith(("vision_model.", "visual_projection."))}, os.path.join(out, "model.safetensors"))
    config(os.path.join(out, "config.json"), {**tower.config.vision_config.to_dict(), "projection_dim": tower.config.projection_dim,
                                              "architectures": ["CLIPVisionModelWithProjection"], "dtype": "float16"})
    halves(layers.state_dict(), os.path.join(out, "aesthetic_head.safetensors"))
    preprocessor(out)


def preprocessor(out):
    config(os.path.join(out, "preprocessor_config.json"), {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": data.SIZE}, "do_center_crop": True, "resample": 3,
        "crop_size": {"height": data.SIZE, "width": data.SIZE}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(clip.MEAN), "image_std": list(clip.STD)})


def write(folder, root, log):
    assets = os.path.join(root, "assets")
    sd = os.path.join(assets, "emoji-sd")
    ready = lambda name: os.path.exists(os.path.join(folder, name))
    if ready("unet.pt"):
        config(os.path.join(sd, "model_index.json"), PIPELINE)
        config(os.path.join(sd, "scheduler", "scheduler_config.json"), {**DDIMScheduler(**unet.SCHEDULER).config, "_class_name": "DDIMScheduler"})
        tokenizer(folder, os.path.join(sd, "tokenizer"))
        model = unet.load(folder)
        halves(model.state_dict(), os.path.join(sd, "unet", "diffusion_pytorch_model.safetensors"))
        config(os.path.join(sd, "unet", "config.json"), {**model.config, "_class_name": "UNet2DConditionModel"})
        model = vae.load(folder)
        halves(model.state_dict(), os.path.join(sd, "vae", "diffusion_pytorch_model.safetensors"))
        config(os.path.join(sd, "vae", "config.json"), {**model.config, "_class_name": "AutoencoderKL"})
        weights = load_checkpoint(os.path.join(folder, "text_encoder.pt"))["weights"]
        halves({"text_model." + k: v for k, v in weights.items()}, os.path.join(sd, "text_encoder", "model.safetensors"))
        config(os.path.join(sd, "text_encoder", "config.json"), {**clip.load(folder, "clip")[0].config.text_config.to_dict(), "architectures": ["CLIPTextModel"], "dtype": "float16"})
    for kind in ("clip", "judge"):
        if ready(kind + ".pt"):
            contrastive(folder, kind, os.path.join(assets, "emoji-" + kind))
    if ready("head.pt"):
        aesthetic(folder, os.path.join(assets, "emoji-aesthetic"))
    prompts = os.path.join(assets, "prompts")
    os.makedirs(prompts, exist_ok=True)
    for name, lines in zip(("emoji-train.txt", "emoji-heldout.txt"), data.prompt_lists(data.artwork(folder))):
        with open(os.path.join(prompts, name), "w") as f:
            f.write("".join(line + "\n" for line in lines))
    sizes = {}
    for top in ("emoji-sd", "emoji-clip", "emoji-judge", "emoji-aesthetic"):
        for where, _, names in os.walk(os.path.join(assets, top)):
            sizes[top] = sizes.get(top, 0) + sum(os.path.getsize(os.path.join(where, n)) for n in names)
    log(stage="export", bytes=sizes)
    shutil.copyfile(os.path.join(folder, "log.jsonl"), os.path.join(root, "tools", "emoji", "log.jsonl"))
