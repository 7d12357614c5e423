"""A PyTorch model as a differentiable reward: [reward.command] of alignprop (docs/rewards.md).

    program = ["python", "docs/rewards/reward.py", "openai/clip-vit-base-patch32"]
    gradient = true

Put your own model into `scores`; what it prints belongs on stderr.
"""
import json, sys
import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms import CenterCrop, Normalize, Resize
from transformers import CLIPModel, CLIPTokenizer

name = sys.argv[1]
clip, tokenizer = CLIPModel.from_pretrained(name).float().eval(), CLIPTokenizer.from_pretrained(sys.argv[2] if len(sys.argv) > 2 else name)
side = clip.config.vision_config.image_size
normalize = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

def scores(images, prompts):
    """One score for each image of (B, 3, H, W) in [0, 1]: here the cosine of CLIP's embeddings."""
    pixels = normalize(CenterCrop(side)(Resize(side, antialias=True)(images)))
    text = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    out = clip(pixel_values=pixels, input_ids=text.input_ids)
    return (out.image_embeds * out.text_embeds).sum(1)

for line in sys.stdin:
    question = json.loads(line)
    images = load_file(question["images"])["images"].requires_grad_()
    answer = scores(images, question["prompts"])
    if question["gradients"]:
        (gradients,) = torch.autograd.grad(answer.sum(), images)
        save_file({"gradients": gradients.contiguous()}, question["gradients"])
    print(json.dumps({"scores": answer.tolist()}), flush=True)
