"""Write the weights as f16 safetensors: emoji-sd in the diffusers layout, the contrastive models, the aesthetic one and the
detectors in the transformers layout; and the prompt lists."""
import json, os, shutil
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
import clip, data, detector, head, unet, vae
from common import trained

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


def detection(folder, kind, out):
    model = detector.load(folder, kind)
    halves(model.state_dict(), os.path.join(out, "model.safetensors"))
    config(os.path.join(out, "config.json"), {**model.config.to_dict(), "architectures": ["YolosForObjectDetection"], "dtype": "float16"})
    config(os.path.join(out, "preprocessor_config.json"), {
        "image_processor_type": "YolosImageProcessor", "format": "coco_detection", "do_resize": True, "size": {"height": data.SIZE, "width": data.SIZE}, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(detector.MEAN), "image_std": list(detector.STD), "do_pad": False})


def pipeline(folder, out):
    config(os.path.join(out, "model_index.json"), PIPELINE)
    config(os.path.join(out, "scheduler", "scheduler_config.json"), {**DDIMScheduler(**unet.SCHEDULER).config, "_class_name": "DDIMScheduler"})
    tokenizer(folder, os.path.join(out, "tokenizer"))
    for name, model in (("unet", unet.load(folder)), ("vae", vae.load(folder))):
        halves(model.state_dict(), os.path.join(out, name, "diffusion_pytorch_model.safetensors"))
        config(os.path.join(out, name, "config.json"), {**model.config, "_class_name": type(model).__name__})
    text, _ = clip.text_encoder(folder)
    halves({"text_model." + k.removeprefix("text_model."): v for k, v in text.state_dict().items()}, os.path.join(out, "text_encoder", "model.safetensors"))
    config(os.path.join(out, "text_encoder", "config.json"), {**text.config.to_dict(), "architectures": ["CLIPTextModel"], "dtype": "float16"})


def write(folder, root, log):
    """Whatever is trained; the pipeline when its UNet is."""
    assets = os.path.join(root, "assets")
    models = {"unet": ("emoji-sd", pipeline), "head": ("emoji-aesthetic", aesthetic)}
    models |= {kind: ("emoji-" + kind, lambda folder, out, kind=kind: contrastive(folder, kind, out)) for kind in clip.MODELS}
    models |= {kind: ("emoji-" + kind.replace("_", "-"), lambda folder, out, kind=kind: detection(folder, kind, out)) for kind in detector.MODELS}
    sizes = {}
    for stage, (name, export) in models.items():
        if trained(folder, stage):
            export(folder, os.path.join(assets, name))
        for where, _, names in os.walk(os.path.join(assets, name)):
            sizes[name] = sizes.get(name, 0) + sum(os.path.getsize(os.path.join(where, n)) for n in names)
    for name, held in (("emoji-train", False), ("emoji-heldout", True)):
        path = os.path.join(assets, "prompts", name + ".jsonl")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write("".join(json.dumps(line) + "\n" for line in data.prompts(held)))
    log(stage="export", bytes=sizes)
    shutil.copyfile(os.path.join(folder, "log.jsonl"), os.path.join(root, "tools", "emoji", "log.jsonl"))
