"""What the training stages share: the clock, the log, averaged weights, checkpoints and the reduced tokenizer."""
import json, math, os, time
import numpy as np
import torch

BOS_TEXT, EOS_TEXT = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32  # tokens of a caption, the two special ones included


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


class Log:
    """JSON lines: one file for all stages."""

    def __init__(self, path):
        self.path, self.start = path, time.time()

    def __call__(self, **record):
        line = json.dumps(rounded(record))
        print(line, flush=True)
        with open(self.path, "a") as f:
            f.write(line + "\n")


class Clock:
    """A training budget in minutes. The learning rate follows the share of the budget that is used up."""

    def __init__(self, minutes):
        self.start, self.seconds = time.time(), minutes * 60

    @property
    def share(self):
        return min(1.0, (time.time() - self.start) / self.seconds)

    def rate(self, peak, step, warmup=50, floor=0.02):
        s = self.share
        return peak * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * s)))


class Average:
    """Exponential moving average of a module's weights, with a horizon that grows with the number of steps."""

    def __init__(self, module, decay):
        self.decay, self.steps = decay, 0
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module):
        self.steps += 1
        d = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for k, v in module.state_dict().items():
            if v.dtype.is_floating_point:
                self.weights[k].lerp_(v, 1 - d)


def save_checkpoint(path, **parts):
    torch.save(parts, path + ".tmp")
    os.replace(path + ".tmp", path)


def save_arrays(path, **arrays):
    np.savez(path + ".tmp.npz", **arrays)
    os.replace(path + ".tmp.npz", path)


def load_checkpoint(path):
    return torch.load(path, weights_only=True) if os.path.exists(path) else None


def to_float(pictures):
    """uint8 NHWC to float NCHW in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pictures):
    """float NCHW in -1..1 to uint8 NHWC."""
    return ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def make_tokenizer(source, out, words):
    """Write CLIP's tokenizer reduced to the merges that these words use, so that ids are small."""
    with open(os.path.join(source, "vocab.json"), encoding="utf-8") as f:
        vocab = sorted(json.load(f).items(), key=lambda kv: kv[1])
    with open(os.path.join(source, "merges.txt"), encoding="utf-8") as f:
        merges = [tuple(line.split()) for line in f.read().split("\n")[1:] if line.strip()]
    rank = {m: i for i, m in enumerate(merges)}
    used = set()
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: rank.get(p, math.inf))
            if pair not in rank:
                break
            used.add(rank[pair])
            i, merged = 0, []
            while i < len(parts):
                if tuple(parts[i:i + 2]) == pair:
                    merged.append("".join(pair))
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
    kept = [merges[i] for i in sorted(used)]
    tokens = [t for t, _ in vocab[:512]] + ["".join(m) for m in kept] + [BOS_TEXT, EOS_TEXT]
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "vocab.json"), "w", encoding="utf-8") as f:
        json.dump({t: i for i, t in enumerate(tokens)}, f, ensure_ascii=False)
    with open(os.path.join(out, "merges.txt"), "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in kept))
    with open(os.path.join(out, "special_tokens_map.json"), "w") as f:
        json.dump({"bos_token": BOS_TEXT, "eos_token": EOS_TEXT, "unk_token": EOS_TEXT, "pad_token": EOS_TEXT}, f, indent=2)
    with open(os.path.join(out, "tokenizer_config.json"), "w") as f:
        json.dump({"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, "add_prefix_space": False,
                   "bos_token": BOS_TEXT, "eos_token": EOS_TEXT, "unk_token": EOS_TEXT, "pad_token": EOS_TEXT}, f, indent=2)


def load_tokenizer(folder):
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(folder)


def encode(tokenizer, captions):
    return torch.tensor(tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"])
