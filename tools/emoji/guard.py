"""With and without the guard and each regulariser: trains configs/emoji-guard.toml in variants, writes a table and pictures.

    pip install pillow
    cargo build --release --locked
    python tools/emoji/guard.py                                        (half an hour on two CPU cores)
    python tools/emoji/guard.py --steps 4 --prompts 2 --docs /tmp/docs (a rehearsal)

The section "With and without the guard" of docs/results.md is replaced, or added at its end: run it after results.py.
What is done already in --work is not done again.
"""
import argparse, json, os, re, subprocess
from concurrent.futures import ThreadPoolExecutor
from results import Chart, cells, sheet, stack

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIG = os.path.join("configs", "emoji-guard.toml")
FINAL, EMA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_ema.safetensors"
WATCHED = ["guard.patience=0"]  # logged, never stopped
SELDOM = WATCHED + ["guard.every=10"]
# name: settings; the cap is in minus kB and set by --cap
RUNS = {
    "none": WATCHED,
    "guard": [],
    "kl": SELDOM + ["regularization.kl_weight={kl}"],
    "cap": SELDOM + ["regularization.reward_cap.compressibility={cap}"],
    "ema": SELDOM + ["regularization.ema_decay={ema}"],
}
# what is judged: (label, run, adapter, more arguments of eval), and its short name in the sheet
ROWS = [
    ("no guard", "none", FINAL, [], "no guard"),
    ("guard: where it stopped", "guard", FINAL, [], "guard: stopped"),
    ("guard: its best checkpoint", "guard", "best", [], "guard: best"),
    ("KL term, weight {kl}", "kl", FINAL, [], "KL term"),
    ("reward cap at {cap} kB", "cap", FINAL, [], "reward cap"),
    ("moving average, decay {ema}", "ema", EMA, [], "moving average"),
    ("no guard, LoRA below timestep 500", "none", FINAL, ["--lora-start", "500"], "LoRA, t < 500"),
    ("no guard, LoRA scale 0.25", "none", FINAL, ["--lora-scale", "0.25"], "LoRA x 0.25"),
    ("no guard, LoRA scale 0.5", "none", FINAL, ["--lora-scale", "0.5"], "LoRA x 0.5"),
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
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with open(os.path.join(args.work, log), "w") as out:
        code = subprocess.call([os.path.abspath(args.binary), *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                               env={**os.environ, "RAYON_NUM_THREADS": str(threads)})
    if code != 0:
        raise SystemExit(f"alignprop {' '.join(arguments)} failed: see {os.path.join(args.work, log)}")


def fill(text, args):
    return text.format(kl=args.kl, cap=args.cap, ema=args.ema)


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
    label, run, adapter, more, _ = row
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


def curves(args, path):
    """What is trained and what is held out, over the steps: the guard's evaluations of every run on the same prompts and noise."""
    runs = {"no guard": "none", "KL term": "kl", "reward cap": "cap"}
    lines = {label: metrics(args, run) for label, run in runs.items()}
    stop = max(metrics(args, "guard"))
    charts = []
    for title, axis, value in (("Trained for: small files", "kB", lambda line: -line["guard/reward"]), ("Held out: the judge", "cosine", lambda line: line["guard/held_out"])):
        series = {label: [(step, value(line)) for step, line in sorted(by_step.items())] for label, by_step in lines.items()}
        points = [point for run in series.values() for point in run]
        chart = Chart(title, "optimizer step", axis, [x for x, _ in points], [y for _, y in points])
        base = series["no guard"][0][1]
        chart.line([(chart.x[0], base), (chart.x[1], base)], "dash")
        chart.line([(stop, chart.y[0]), (stop, chart.y[1])], "dash")
        for i, (label, run) in enumerate(series.items()):
            chart.line(run, f"line c{i}")
            chart.dot(*run[-1], label, f"c{i}", anchor="end")
        chart.dot(stop, dict(series["no guard"])[stop], f"the guard stops: step {stop}", "c0")
        charts.append(chart)
    stack(charts, path)


def pictures(args):
    folder = os.path.join(args.docs, "img")
    os.makedirs(folder, exist_ok=True)
    shown = lambda number, side: cells(os.path.join(args.work, f"eval-{number}"), side, every=2)  # two images of each prompt
    rows = [("base model", shown(0, 0))] + [(row[-1], shown(number, 1)) for number, row in enumerate(ROWS)]
    sheet(rows, os.path.join(folder, "guard.png"))
    curves(args, os.path.join(folder, "guard-curves.svg"))


def section(args, results):
    best = metrics(args, "none")
    return f"""{HEADING}

Written by `tools/emoji/guard.py`: `{CONFIG}` trains for small JPEG files (**kB**), which empty pictures have. The **judge** and
the **alignment** are CLIP cosines as above, on {sum(1 for _ in open(os.path.join(args.work, "prompts.txt")))} held-out prompts that neither the run nor its guard has seen, 2 images each; in
parentheses the difference to the base model, picture by picture, ± its standard error. The **distance** is that of the noise
predictions from the base model's (mean square), the **diversity** the mean of 1 - cosine between the judge's embeddings of one
prompt's images, both on the guard's prompts and noise. One seed.

{table(results, best[min(best)])}

![Reward and judge over the steps](img/guard-curves.svg)

![The same prompts and noise](img/guard.png)
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
    parser.add_argument("--kl", type=float, default=5.0, help="weight of the KL term")
    parser.add_argument("--cap", type=float, default=-2.3, help="cap of the reward, in minus kB")
    parser.add_argument("--ema", type=float, default=0.98, help="decay of the moving average")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, which share the cores")
    args = parser.parse_args()
    args.work = os.path.abspath(args.work)
    for folder in (args.work, args.docs):
        os.makedirs(folder, exist_ok=True)
    open(os.path.join(args.work, "evaluation.toml"), "w").write(EVALUATION)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: train(args, name), RUNS))
        file = prompts(args)
        results = list(pool.map(lambda numbered: judge(args, *numbered, file), enumerate(ROWS)))
    pictures(args)
    write(os.path.join(args.docs, "results.md"), section(args, results))
    print(os.path.join(args.docs, "results.md"))


if __name__ == "__main__":
    main()
