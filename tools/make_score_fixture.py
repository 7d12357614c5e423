"""Make tests/fixtures/score: pictures of several kinds and sizes, and what the original packages' preprocessing and models make of them.

    pip install torch torchvision transformers open-clip-torch pillow
    python tools/make_score_fixture.py tests/fixtures

The models are those of tests/fixtures/tiny-sd15, computed in float64. As the packages do it, a picture is opened with PIL, made RGB (alpha is
dropped), and its bytes are resized with PIL's bicubic filter: for CLIP scores and the aesthetic head the short side to the tower's size and the
centre of that, for HPSv2 the long side and black around it.
"""
import json, os, sys
import numpy as np, open_clip, torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import functional as TF
from transformers import CLIPModel, CLIPTokenizer

MEAN, STD = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
KINDS = [("RGB", (61, 37)), ("L", (40, 91)), ("RGBA", (300, 57)), ("P", (45, 33))]
PROMPTS = ["a cat", "A photo of an astronaut riding a horse, 4k!", "otter", "a cat"]


def main(fixtures):
    models, out, rng = f"{fixtures}/tiny-sd15", f"{fixtures}/score", np.random.default_rng(3)
    os.makedirs(f"{out}/pictures", exist_ok=True)
    clip = CLIPModel.from_pretrained(f"{models}/clip").double().eval()
    hps = open_clip.CLIP(**json.load(open(f"{models}/hps/open_clip_config.json")), output_dict=True)
    hps.load_state_dict(load_file(f"{models}/hps/model.safetensors")); hps = hps.double().eval()
    head = {k: v.double() for k, v in load_file(f"{models}/aesthetic_head.safetensors").items()}
    tokenizer = CLIPTokenizer.from_pretrained(f"{models}/model/tokenizer")
    side, unit = clip.config.vision_config.image_size, lambda v: F.normalize(v, dim=-1)
    normal = lambda picture: ((TF.to_tensor(picture).double() - MEAN) / STD)[None]
    rows = {}
    for i, ((mode, size), prompt) in enumerate(zip(KINDS, PROMPTS)):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        picture = Image.fromarray(np.clip(np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 21, (size[1], size[0], 3)), 0, 255).astype(np.uint8))
        if mode == "RGBA":
            picture.putalpha(Image.fromarray(rng.integers(0, 256, (size[1], size[0]), dtype=np.uint8)))
        elif mode == "P":
            picture = picture.quantize(32)
        elif mode == "L":
            picture = picture.convert("L")
        name = f"{i}-{mode.lower()}.png"
        picture.save(f"{out}/pictures/{name}"); open(f"{out}/pictures/{name[:-4]}.txt", "w").write(prompt + "\n")
        rgb = Image.open(f"{out}/pictures/{name}").convert("RGB")
        centre = TF.center_crop(TF.resize(rgb, side, TF.InterpolationMode.BICUBIC), side)
        scale = side / max(rgb.size)
        small = TF.resize(rgb, [round(rgb.height * scale), round(rgb.width * scale)], TF.InterpolationMode.BICUBIC)
        dw, dh = side - small.width, side - small.height
        padded = TF.pad(small, [dw // 2, dh // 2, dw - dw // 2, dh - dh // 2], fill=0)
        ids = tokenizer([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        eos = (ids == tokenizer.eos_token_id).int().argmax(-1).item()
        zeros = ids.clone(); zeros[:, eos + 1:] = 0  # open_clip pads with 0
        with torch.no_grad():
            vision = clip.vision_model(pixel_values=normal(centre)).pooler_output
            text = clip.text_model(input_ids=ids).pooler_output
            image, text = unit(clip.visual_projection(vision)), unit(clip.text_projection(text))
            score = image
            for layer in sorted({k.rsplit(".", 1)[0] for k in head}, key=lambda k: int(k.rsplit(".", 1)[1])):
                score = F.linear(score, head[f"{layer}.weight"], head[f"{layer}.bias"])
            other = hps(normal(padded), zeros)
        rows[name] = {"prompt": prompt, "clip-score": (image * text).sum().item(), "aesthetic": score.item(),
                      "hps": (other["image_features"] * other["text_features"]).sum().item()}
    json.dump(dict(kind="score", pictures=rows), open(f"{out}/reference.json", "w"), indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
