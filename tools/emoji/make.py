"""Make the embedded models (emoji-sd, emoji-clip, emoji-judge, emoji-aesthetic, emoji-detector, emoji-detector-judge) on a CPU.

    pip install torch torchvision diffusers transformers open_clip_torch scipy pillow numpy resvg-py      (and npm, to fetch the artwork)
    python tools/emoji/make.py all --out ~/emoji-train

`all` passes over what is finished and takes up the first stage that is not. Every training has a fixed number of steps and
keeps its whole state in --out: a call trains for at most --minutes and ends there if steps are left; call again to go on, bit for
bit as if it had not ended. A stage can be run alone (`make.py unet --minutes 30`): vae and clip go side by side, one thread each, then
judge and the detectors, which wait for the contrastive model of their half.

tools/emoji/pieces holds averaged weights of the trainings in f16, with the step that each is at. A training with no state in --out
starts from them, with a new optimizer: the rest of its schedule, but not the same bits; one that is finished there is passed over. Remove a
piece to make it from nothing. `make.py pieces` writes them from --out, with their log and sheets.

`latents` fixes what the UNet learns on: after it, more steps of `vae` train the decoder alone, and more steps of `clip` the reward but not
the text encoder of emoji-sd. `head` learns from samples of the UNet: remove head.npz and head.pt before you make it for another one.
`export` writes to assets/ what is trained, in f16, and log.jsonl, its log.

As long as assets/ has emoji-train.txt and no emoji-train.jsonl, the models there, log.jsonl, results.py and guard.py are those of an
earlier recipe: one animal a picture, 100 kinds, six styles.
"""
import argparse, os, shutil
import torch
import common, data

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TRAININGS = ("vae", "clip", "judge", "unet", "detector", "detector_judge", "head")
STAGES = ("data", "vae", "clip", "judge", "latents", "unet", "detector", "detector_judge", "head", "evaluate", "export")


def finished(stage, out):
    if stage == "data":
        return os.path.exists(data.path(out, "heldout", "half")) and data.load_held_out(out).classes[-1, 0] >= 0
    if stage == "latents":
        return os.path.exists(os.path.join(out, "latents.npy")) and common.trained(out, "text_encoder") == 1
    return stage in TRAININGS and common.trained(out, stage) >= 1


def run(stage, out, minutes, threads, log, start):
    if stage == "data":
        common.make_tokenizer(out, data.words())
        data.make(out, log, threads)
    elif stage == "vae":
        import vae
        vae.train(out, minutes, log, start)
    elif stage in ("clip", "judge"):
        import clip
        clip.train(out, stage, minutes, log)
    elif stage == "latents":
        if common.trained(out, "unet"):
            raise SystemExit("there is a UNet that was trained on other latents and hidden states: remove unet.pt and its piece before you make new ones")
        import clip, vae
        clip.text_encoder(out)
        vae.encode_all(out, log)
    elif stage == "unet":
        import unet
        unet.train(out, minutes, log, threads)
    elif stage in ("detector", "detector_judge"):
        import detector
        detector.train(out, stage, minutes, log)
    elif stage == "head":
        import head
        head.train(out, minutes, log)
    elif stage == "evaluate":
        import evaluate
        evaluate.run(out, ROOT, log)
    elif stage == "export":
        import export
        export.write(out, ROOT, log)
    elif stage == "pieces":
        for name in (*TRAININGS, "text_encoder"):
            if os.path.exists(os.path.join(out, name + ".pt")):
                common.write_piece(out, name)
        shutil.copyfile(log.path, os.path.join(common.PIECES, "log.jsonl"))
        for name in ("data.png", "vae.png"):
            shutil.copyfile(os.path.join(out, "sheets", name), os.path.join(common.PIECES, name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES, "pieces"])
    parser.add_argument("--out", default="~/emoji-train", help="folder for artwork, scenes, states and logs")
    parser.add_argument("--minutes", type=float, default=110, help="of one stage in this call, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", help="folder of an AutoencoderKL with which the stage `vae` begins")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = os.path.expanduser(args.out)
    os.makedirs(os.path.join(out, "sheets"), exist_ok=True)
    log = common.Log(os.path.join(out, "log.jsonl"))
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if args.stage == "all" and finished(stage, out):
            print(f"{stage}: finished", flush=True)
            continue
        run(stage, out, args.minutes, args.threads, log, args.start)
        if stage in TRAININGS and not finished(stage, out):
            print(f"{stage}: {common.trained(out, stage):.0%} of its steps are taken; call again to go on", flush=True)
            break


if __name__ == "__main__":
    main()
