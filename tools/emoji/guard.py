"""With and without the guard and each regulariser: trains configs/emoji-guard.toml in variants and writes a table.

    cargo build --release --locked
    python tools/emoji/guard.py                                        (about an hour on two CPU cores)
    python tools/emoji/guard.py --steps 4 --prompts 2 --docs /tmp/docs (a rehearsal)

The section "With and without the guard" of docs/results.md is replaced, or added at its end: run it after results.py.
What is done already in --work is not done again. No packages are needed.
"""
import argparse, json, os, re, subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIG = os.path.join("configs", "emoji-guard.toml")
FINAL, EMA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_ema.safetensors"
WATCHED = ["guard.patience=0"]  # logged, never stopped
# name: settings; the cap is in minus kB and set by --cap
RUNS = {
    "none": WATCHED,
    "guard": [],
    "kl": WATCHED + ["regularization.kl_weight={kl}"],
    "cap": WATCHED + ["regularization.reward_cap.compressibility={cap}"],
    "ema": WATCHED + ["regularization.ema_decay=0.95"],
}
# what is judged: (label, run, adapter, more arguments of eval)
ROWS = [
    ("no guard", "none", FINAL, []),
    ("guard: where it stopped", "guard", FINAL, []),
    ("guard: its best checkpoint", "guard", "best", []),
    ("KL term, weight {kl}", "kl", FINAL, []),
    ("reward cap at {cap} kB", "cap", FINAL, []),
    ("moving average, decay 0.95", "ema", EMA, []),
    ("no guard, LoRA below timestep 500", "none", FINAL, ["--lora-start", "500"]),
    ("no guard, LoRA scale 0.25", "none", FINAL, ["--lora-scale", "0.25"]),
    ("no guard, LoRA scale 0.5", "none", FINAL, ["--lora-scale", "0.5"]),
]
# The judge as `pickscore`, which is a CLIP cosine like `clip-score`: all numbers come from the same images.
EVALUATION = """[model]
path = "assets/emoji-sd"
[sampler]
num_inference_steps = 20
guidance_scale = 4.0
[reward.clip-score]
model = "assets/emoji-clip"
[reward.pickscore]
model = "assets/emoji-judge"
[reward.compressibility]
"""
HEADING = "## With and without the guard"


def alignprop(args, log, *arguments):
    with open(os.path.join(args.work, log), "w") as out:
        code = subprocess.call([os.path.abspath(args.binary), *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    if code != 0:
        raise SystemExit(f"alignprop {' '.join(arguments)} failed: see {os.path.join(args.work, log)}")


def fill(text, args):
    return text.format(kl=args.kl, cap=args.cap)


def train(args, name):
    folder = os.path.join(args.work, name)
    if os.path.exists(os.path.join(folder, FINAL)):
        return
    if os.path.exists(os.path.join(folder, "config.toml")):
        return alignprop(args, f"{name}.log", "train", "--resume", folder)
    settings = [fill(s, args) for s in RUNS[name]] + [f"run.dir={json.dumps(folder)}", "run.sample_every=0"]
    if args.steps:
        settings += [f"train.steps={args.steps}", "guard.every=2", "guard.num_prompts=2"]
    line = ["train", "--config", CONFIG]
    for setting in settings:
        line += ["--set", setting]
    alignprop(args, f"{name}.log", *line)


def metrics(args, name):
    """Lines of the guard, by their steps."""
    lines = [json.loads(line) for line in open(os.path.join(args.work, name, "metrics.jsonl"))]
    return {line["step"]: line for line in lines if "guard/reward" in line}


def prompts(args):
    """Held-out prompts that no guard has seen."""
    config = open(os.path.join(ROOT, CONFIG)).read()
    lines = open(os.path.join(ROOT, "assets", "prompts", "emoji-heldout.txt")).read().split("\n")
    unseen = [line for line in lines if line.strip() and f'"{line}"' not in config]
    path = os.path.join(args.work, "prompts.txt")
    step = max(1, len(unseen) // args.prompts)
    open(path, "w").write("\n".join(unseen[::step][:args.prompts]) + "\n")
    return path


def judge(args, number, row, file):
    label, run, adapter, more = row
    lines = metrics(args, run)
    step = max(lines)
    if adapter == "best":
        step = max(sorted(lines), key=lambda at: (lines[at]["guard/held_out"], -at))
        adapter = os.path.join("checkpoints", f"step-{step:06d}", FINAL)
    out = os.path.join(args.work, f"eval-{number}")
    if not os.path.exists(os.path.join(out, "eval.json")):
        alignprop(args, f"eval-{number}.log", "eval", "--checkpoint", os.path.join(args.work, run, adapter), "--config",
                  os.path.join(args.work, "evaluation.toml"), "--prompts", file, "--seeds", "2", "--out", out, *more)
    rewards = {r["reward"]: r["overall"] for r in json.load(open(os.path.join(out, "eval.json")))["rewards"]}
    # the guard measures the raw adapters as they are: not averages, gates and scales
    watched = lines[step] if not more and adapter != EMA else {}
    return {"label": fill(label, args), "step": step, "rewards": rewards,
            "distance": watched.get("guard/distance"), "diversity": watched.get("guard/diversity")}


def table(results, first):
    def cell(overall, side, digits, sign=1):
        return f"{sign * overall[side]['mean']:.{digits}f}"

    def with_difference(overall, digits, sign=1):
        d = overall["difference"]
        return f"{cell(overall, 'tuned', digits, sign)} ({sign * d['mean']:+.{digits}f} ± {d['stderr']:.{digits}f})"

    def number(value):
        return "–" if value is None else f"{value:.4f}"

    lines = ["| | steps | kB | judge | alignment | distance | diversity |", "|---|---|---|---|---|---|---|"]
    base = results[0]["rewards"]
    lines.append("| base model | 0 | " + " | ".join([cell(base["compressibility"], "base", 3, -1), cell(base["pickscore"], "base", 4),
                 cell(base["clip-score"], "base", 4), number(first["guard/distance"]), number(first["guard/diversity"])]) + " |")
    for r in results:
        s = r["rewards"]
        lines.append(f"| {r['label']} | {r['step']} | " + " | ".join([with_difference(s["compressibility"], 3, -1),
                     with_difference(s["pickscore"], 4), with_difference(s["clip-score"], 4), number(r["distance"]), number(r["diversity"])]) + " |")
    return "\n".join(lines)


def section(args, results):
    best = metrics(args, "none")
    return f"""{HEADING}

Written by `tools/emoji/guard.py`: `{CONFIG}` trains for small JPEG files (**kB**), which empty pictures have. The **judge** and
the **alignment** are CLIP cosines as above, on {sum(1 for _ in open(os.path.join(args.work, "prompts.txt")))} held-out prompts that neither the run nor its guard has seen, 2 images each; in
parentheses the difference to the base model, picture by picture, ± its standard error. The **distance** is that of the noise
predictions from the base model's (mean square), the **diversity** the mean of 1 - cosine between the judge's embeddings of one
prompt's images, both on the guard's prompts and noise. One seed.

{table(results, best[min(best)])}
"""


def write(path, text):
    old = open(path).read() if os.path.exists(path) else "# Results\n"
    old = re.sub(rf"\n*{re.escape(HEADING)}\n.*?(?=\n## |\Z)", "", old, flags=re.S).rstrip("\n")
    open(path, "w").write(f"{old}\n\n{text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=os.path.join(ROOT, "target", "release", "alignprop"))
    parser.add_argument("--work", default=os.path.join(ROOT, "runs", "guard"), help="folder for runs and evaluations")
    parser.add_argument("--docs", default=os.path.join(ROOT, "docs"), help="where results.md is")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the config's")
    parser.add_argument("--prompts", type=int, default=39, help="held-out prompts to judge on")
    parser.add_argument("--kl", type=float, default=3.0, help="weight of the KL term")
    parser.add_argument("--cap", type=float, default=-1.8, help="cap of the reward, in minus kB")
    args = parser.parse_args()
    args.work = os.path.abspath(args.work)
    for folder in (args.work, args.docs):
        os.makedirs(folder, exist_ok=True)
    open(os.path.join(args.work, "evaluation.toml"), "w").write(EVALUATION)
    for name in RUNS:
        train(args, name)
    file = prompts(args)
    results = [judge(args, number, row, file) for number, row in enumerate(ROWS)]
    write(os.path.join(args.docs, "results.md"), section(args, results))
    print(os.path.join(args.docs, "results.md"))


if __name__ == "__main__":
    main()
