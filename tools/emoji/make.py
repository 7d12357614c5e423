"""Make emoji-sd, emoji-clip, emoji-judge and emoji-aesthetic: data, training and export, on a CPU.

    pip install torch diffusers transformers pillow numpy resvg-py      (and npm, to fetch the artwork)
    python tools/emoji/make.py all --out ~/emoji-train --tokenizer CLIP_TOKENIZER

CLIP_TOKENIZER is the folder of the CLIP tokenizer of Stable Diffusion 1.5 (vocab.json, merges.txt). A stage can be run
alone (`make.py unet --minutes 30`), and continues from its checkpoint in --out where there is one. `all` passes over the
stages that are finished, up to the first one that is not: started again after an interruption, it goes on with that one,
from its last checkpoint and with its whole budget. To train a finished stage further, run it alone. The stage `latents`
fixes what the UNet learns on: after it, more minutes of `vae` train the decoder alone, and more minutes of `clip` the
reward but not the text encoder of emoji-sd. `head` belongs after the last minutes of `clip` and `unet`: remove head.npz,
the samples that it learns from, and head.pt before you make it for another `unet`. `export` writes the weights, in f16,
to assets/. Budgets are minutes, not steps, so numbers differ from machine to machine; log.jsonl is the log of the
committed weights.

`all` takes about two hours with its own budgets, 115 minutes of them training. What --minutes does not govern, with one
thread: data 1 minute, and the fetching; pictures for `clip` half a minute; latents 1.5; sheets and start of unet half a
minute; the samples for `head` 6 to 8; evaluate 1. `all --minutes 0.5 --threads 1` rehearses everything in 14 minutes.
"""
import argparse, json, os
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STAGES = {"data": 0, "vae": 20, "clip": 20, "judge": 6, "latents": 0, "unet": 60, "head": 9, "evaluate": 0, "export": 0}  # and their minutes
PRODUCTS = {"data": "heldout.npz", "vae": "vae.pt", "clip": "clip.pt", "judge": "judge.pt", "latents": "text_encoder.pt", "unet": "unet.pt", "head": "head.pt"}  # what each writes last


def finished(stage, out):
    """Whether its product is there and used up its budget: a checkpoint alone may be that of an interrupted run."""
    log = os.path.join(out, "log.jsonl")
    if stage not in PRODUCTS or not all(map(os.path.exists, (log, os.path.join(out, PRODUCTS[stage])))):
        return False
    name = "captions" if stage == "latents" else stage  # what it logs last
    with open(log) as f:
        shares = [r.get("share", 1) for r in map(json.loads, f) if r["stage"] == name]
    return bool(shares) and shares[-1] == 1


def run(stage, out, minutes, tokenizer, threads):
    from common import Log, make_tokenizer
    import data
    log = Log(os.path.join(out, "log.jsonl"))
    if stage == "data":
        words = {w for c in data.all_captions() for w in c.replace("3d", "3 d").split()}
        make_tokenizer(tokenizer, os.path.join(out, "tokenizer"), sorted(words))
        data.make(out, log)
    elif stage == "vae":
        import vae
        vae.train(out, minutes, log)
    elif stage in ("clip", "judge"):
        import clip
        clip.train(out, stage, minutes, log)
    elif stage == "latents":
        if os.path.exists(os.path.join(out, "unet.pt")):
            raise SystemExit("unet.pt was trained on the latents and caption features that are there: remove it before you make new ones")
        import clip, vae
        vae.encode_all(out, log)
        clip.encode_captions(out, log)
    elif stage == "unet":
        import unet
        unet.train(out, minutes, log, threads)
    elif stage == "head":
        import head
        head.train(out, minutes, log)
    elif stage == "evaluate":
        import evaluate
        evaluate.run(out, ROOT, log)
    elif stage == "export":
        import export
        export.write(out, ROOT, log)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--out", default="~/emoji-train", help="folder for packages, pictures, checkpoints and logs")
    parser.add_argument("--tokenizer", default=os.path.join(ROOT, "tokenizer"), help="folder of the CLIP tokenizer (stage data)")
    parser.add_argument("--minutes", type=float, help="training budget of one stage")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = os.path.expanduser(args.out)
    os.makedirs(os.path.join(out, "sheets"), exist_ok=True)
    passing = args.stage == "all"
    for stage, minutes in STAGES.items():
        passing = passing and finished(stage, out)
        if passing:
            print(f"{stage}: finished before, {PRODUCTS[stage]} is there", flush=True)
        elif args.stage in ("all", stage):
            run(stage, out, args.minutes or minutes, args.tokenizer, args.threads)


if __name__ == "__main__":
    main()
