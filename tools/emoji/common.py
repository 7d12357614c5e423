"""What the stages share: the log, the state of a training that goes on bit-exactly, averaged weights and the reduced tokenizer."""
import gzip, importlib.resources, json, math, os, time
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

BOS_TEXT, EOS_TEXT = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32  # tokens of a caption, the two special ones included
# Averaged weights in f16, committed: what a stage starts from, and what later stages use, where the folder has no state.
PIECES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pieces")


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


class Log:
    """JSON lines: one file for all stages."""

    def __init__(self, path):
        self.path = path

    def __call__(self, **record):
        line = json.dumps(rounded(record))
        print(line, flush=True)
        with open(self.path, "a") as f:
            f.write(line + "\n")


def rate(peak, step, steps, warmup=100, floor=0.02):
    """The learning rate: linear warm-up, then half a cosine down to `floor`."""
    return peak * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def set_rate(optimizer, value):
    for group in optimizer.param_groups:
        group["lr"] = value


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices and convolutions (Jordan et al., 2024), scaled to the size of Adam's steps (Liu et al., 2502.16982)."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(m, group["momentum"]).flatten(1)
                size, tall = max(x.shape), x.shape[0] > x.shape[1]
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((x.T if tall else x).reshape(p.shape), alpha=-0.2 * size**0.5 * group["lr"])


def muon_and_adam(module, lr, ends):
    """Muon for the matrices and convolutions whose names have none of `ends` in them, AdamW for the rest."""
    inner, rest = [], []
    for name, p in module.named_parameters():
        (rest if p.ndim < 2 or any(e in name for e in ends) else inner).append(p)
    return Muon(inner, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)


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

    def state_dict(self):
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state):
        self.weights, self.steps = state["weights"], state["steps"]


class Training:
    """The state of a stage: `for step, rng in Training(..)` takes its remaining steps, at most `minutes` of them.

    The numpy generator `rng` and torch's are seeded by the step, so that nothing depends on where a piece ended.
    Parts are whatever has `state_dict` and `load_state_dict`; FOLDER/STAGE.pt keeps them every two minutes and at the end.
    Where there is none, the module `model` and its `average` start from the committed piece, at the piece's step, with a fresh
    optimizer: weights and schedule go on, bits do not.
    Of several processes each has its own numbers, and `agree` tells all of them the first one's word whether to go on.
    """

    def __init__(self, folder, stage, steps, seed, minutes, model, average, rank=0, agree=bool, **parts):
        self.path, self.steps, self.seed, self.minutes = os.path.join(folder, stage + ".pt"), steps, seed, minutes
        self.rank, self.agree = rank, agree
        self.parts, self.step = {"model": model, "average": average, **parts}, 0
        if os.path.exists(self.path):
            saved = torch.load(self.path, weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.step = saved["step"]
        elif os.path.exists(piece := os.path.join(PIECES, stage + ".safetensors")):
            weights, self.step = read_piece(piece)
            model.load_state_dict(weights)
            average.__init__(model, average.decay)

    @property
    def share(self):
        return self.step / self.steps

    def save(self):
        if self.rank:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({**state, "step": self.step, "steps": self.steps}, self.path + ".tmp")
        os.replace(self.path + ".tmp", self.path)

    def __iter__(self):
        start = kept = time.time()
        while self.agree(self.step < self.steps and time.time() - start < self.minutes * 60):
            torch.manual_seed(self.seed * 10**7 + self.step + 10**12 * self.rank)
            yield self.step, np.random.default_rng([self.seed, self.step] + [self.rank] * (self.rank > 0))
            self.step += 1
            if time.time() - kept > 120:
                self.save()
                kept = time.time()
        self.save()


def averaged(folder, stage):
    """(averaged weights of a stage, the share of its steps that they took): from the folder, else from the committed piece."""
    path, piece = os.path.join(folder, stage + ".pt"), os.path.join(PIECES, stage + ".safetensors")
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        return saved["average"]["weights"], saved["step"] / saved["steps"]
    if os.path.exists(piece):
        with safe_open(piece, "pt") as f:
            steps = int(f.metadata()["steps"])
        weights, step = read_piece(piece)
        return weights, step / steps
    raise SystemExit(f"no weights of the stage `{stage}`: neither {path} nor {piece} is there; run `make.py {stage}` first")


def trained(folder, stage):
    """The share of its steps that a stage has taken; 0 where there is nothing of it."""
    exists = any(map(os.path.exists, (os.path.join(folder, stage + ".pt"), os.path.join(PIECES, stage + ".safetensors"))))
    return averaged(folder, stage)[1] if exists else 0.0


def read_piece(path):
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k).float() if f.get_tensor(k).is_floating_point() else f.get_tensor(k) for k in f.keys()}, int(f.metadata()["step"])


def write_piece(folder, stage):
    """PIECES/STAGE.safetensors from the state in the folder."""
    saved = torch.load(os.path.join(folder, stage + ".pt"), weights_only=True)
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in saved["average"]["weights"].items()}
    os.makedirs(PIECES, exist_ok=True)
    save_file(weights, os.path.join(PIECES, stage + ".safetensors"), {"step": str(saved["step"]), "steps": str(saved["steps"])})


def save_arrays(path, **arrays):
    np.savez(path + ".tmp.npz", **arrays)
    os.replace(path + ".tmp.npz", path)


def to_float(pictures):
    """uint8 NHWC to float NCHW in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pictures):
    """float NCHW in -1..1 to uint8 NHWC."""
    return ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def bytes_to_unicode():
    """The characters that stand for bytes in the vocabulary of GPT-2 and CLIP, in its order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


def make_tokenizer(folder, words):
    """Write tokenizer/ in the folder: CLIP's tokenizer reduced to the merges that these words use, so that ids are small."""
    out = os.path.join(folder, "tokenizer")
    with gzip.open(importlib.resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as f:
        merges = [tuple(line.split()) for line in f.read().split("\n")[1:49152 - 256 - 2 + 1]]
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
    kept, letters = [merges[i] for i in sorted(used)], bytes_to_unicode()
    tokens = letters + [b + "</w>" for b in letters] + ["".join(m) for m in kept] + [BOS_TEXT, EOS_TEXT]
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
    """`folder`: the one that holds tokenizer/."""
    from transformers import CLIPTokenizer
    return CLIPTokenizer.from_pretrained(os.path.join(folder, "tokenizer"))


def encode(tokenizer, captions):
    return torch.tensor(tokenizer(list(captions), padding="max_length", max_length=LENGTH, truncation=True)["input_ids"])
