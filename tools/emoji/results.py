"""Train and judge the embedded experiments, and write docs/results.md with its pictures.

    pip install pillow
    cargo build --release --locked
    python tools/emoji/results.py                                (on two cores: see docs/results.md)
    python tools/emoji/results.py --steps 3 --prompts 4 --seeds 0 1 --docs /tmp/docs     (a rehearsal)

Three configs are trained with every seed; each adapter is evaluated beside the base model on combinations that it was
trained with and on held-out ones, on the same noise. What is done already in --work is not done again.
"""
import argparse, json, math, os, subprocess, time
from concurrent.futures import ThreadPoolExecutor
from PIL import Image, ImageDraw

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIGS = {"alignment": "emoji", "compressibility": "emoji-compress", "aesthetic": "emoji-aesthetic"}
SETS = {"trained": "emoji-train", "held-out": "emoji-heldout"}
REWARDS = {"clip-score": ("alignment", 1), "pickscore": ("judge", 1), "aesthetic": ("aesthetic", 1), "compressibility": ("kB", -1)}
SOUP = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
# The judge is a second CLIP that nothing is trained against; `pickscore` is a CLIP cosine like `clip-score`, so all
# four numbers come from the same images.
EVALUATION = """[model]
path = "assets/emoji-sd"
[sampler]
num_inference_steps = 20
guidance_scale = 4.0
[reward.clip-score]
model = "assets/emoji-clip"
[reward.pickscore]
model = "assets/emoji-judge"
[reward.aesthetic]
clip = "assets/emoji-aesthetic"
head = "assets/emoji-aesthetic/aesthetic_head.safetensors"
[reward.compressibility]
"""


def mean(values):
    return sum(values) / len(values)


def stderr(values):
    """Of the mean; None for a single value."""
    if len(values) < 2:
        return None
    m = mean(values)
    return math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1) / len(values))


class Runner:
    def __init__(self, args):
        self.args = args
        self.work = os.path.abspath(args.work)
        os.makedirs(self.work, exist_ok=True)
        with open(os.path.join(self.work, "evaluation.toml"), "w") as f:
            f.write(EVALUATION)
        for name, file in SETS.items():
            lines = open(os.path.join(ROOT, "assets", "prompts", file + ".txt")).read().split("\n")
            prompts = [line for line in lines if line.strip()]
            step = max(1, len(prompts) // args.prompts)
            with open(os.path.join(self.work, f"prompts-{name}.txt"), "w") as f:
                f.write("\n".join(prompts[::step][:args.prompts]) + "\n")

    def alignprop(self, log, *arguments):
        """Runs the binary from the repository's folder, its output into WORK/LOG."""
        threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
        with open(os.path.join(self.work, log), "w") as out:
            code = subprocess.call([os.path.abspath(self.args.binary), *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                   env={**os.environ, "RAYON_NUM_THREADS": str(threads)})
        if code != 0:
            raise SystemExit(f"alignprop {' '.join(arguments)} failed: see {os.path.join(self.work, log)}")

    def adapter(self, name, seed):
        return os.path.join(self.work, f"{name}-{seed}", "pytorch_lora_weights.safetensors")

    def train(self, name, seed):
        folder = os.path.join(self.work, f"{name}-{seed}")
        if os.path.exists(self.adapter(name, seed)):
            return
        if os.path.exists(os.path.join(folder, "config.toml")):
            return self.alignprop(f"{name}-{seed}.log", "train", "--resume", folder)
        steps = [] if self.args.steps is None else ["--set", f"train.steps={self.args.steps}"]
        self.alignprop(f"{name}-{seed}.log", "train", "--config", f"configs/{CONFIGS[name]}.toml", *steps, "--set", f"run.seed={seed}",
                       "--set", f"run.dir={json.dumps(folder)}")

    def evaluate(self, name, adapter, prompts):
        """WORK/eval-NAME-SET with eval.json and grid.png."""
        out = os.path.join(self.work, f"eval-{name}-{prompts}")
        if not os.path.exists(os.path.join(out, "eval.json")):
            self.alignprop(f"eval-{name}-{prompts}.log", "eval", "--checkpoint", adapter, "--config", os.path.join(self.work, "evaluation.toml"),
                           "--prompts", os.path.join(self.work, f"prompts-{prompts}.txt"), "--seeds", "1", "--out", out)

    def soup(self, c):
        """A mixture of the first seed's adapters: 1 - c of alignment, c of compressibility."""
        seed, out = self.args.seeds[0], os.path.join(self.work, f"soup-{c}.safetensors")
        if not os.path.exists(out):
            parts = [f"{self.adapter('alignment', seed)}={1 - c:.3f}", f"{self.adapter('compressibility', seed)}={c:.3f}"]
            self.alignprop(f"soup-{c}.log", "soup", *parts, "-o", out)
        self.evaluate(f"soup-{c}", out, "trained")

    def all(self):
        def each(work, jobs):
            with ThreadPoolExecutor(self.args.jobs) as pool:
                list(pool.map(lambda job: work(*job), jobs))
        each(self.train, [(name, seed) for seed in self.args.seeds for name in CONFIGS])
        each(self.evaluate, [(f"{name}-{seed}", self.adapter(name, seed), prompts)
                             for seed in self.args.seeds for name in CONFIGS for prompts in SETS])
        each(self.soup, [(c,) for c in SOUP])

    def scores(self, name, prompts):
        """{metric: (base, tuned)}, lists over prompts."""
        report = json.load(open(os.path.join(self.work, f"eval-{name}-{prompts}", "eval.json")))
        out = {}
        for reward in report["rewards"]:
            metric, sign = REWARDS[reward["reward"]]
            out[metric] = tuple([sign * row[side]["mean"] for row in reward["per_prompt"]] for side in ("base", "tuned"))
        return out


def collect(runner):
    seeds = runner.args.seeds
    results = {"seeds": seeds, "prompts": {s: sum(1 for _ in open(os.path.join(runner.work, f"prompts-{s}.txt"))) for s in SETS},
               "base": {}, "runs": {}, "soup": []}
    for prompts in SETS:
        for name in CONFIGS:
            scores = [runner.scores(f"{name}-{seed}", prompts) for seed in seeds]
            for metric, (base, _) in scores[0].items():
                results["base"].setdefault(prompts, {})[metric] = {"mean": mean(base), "stderr_over_prompts": stderr(base)}
                tuned = [mean(s[metric][1]) for s in scores]
                gains = [mean(s[metric][1]) - mean(s[metric][0]) for s in scores]
                by_prompt = [mean([s[metric][1][p] - s[metric][0][p] for s in scores]) for p in range(len(base))]
                results["runs"].setdefault(name, {}).setdefault(prompts, {})[metric] = {
                    "by_seed": tuned, "mean": mean(tuned), "difference": mean(gains),
                    "stderr_over_seeds": stderr(gains), "stderr_over_prompts": stderr(by_prompt)}
    for c in SOUP:
        row = runner.scores(f"soup-{c}", "trained")
        results["soup"].append({"c": c, **{metric: mean(tuned) for metric, (_, tuned) in row.items()}})
    for name in CONFIGS:
        rows = [metrics(runner, name, seed) for seed in seeds]
        results["runs"][name]["steps"] = max(r["step"] for r in rows[0])
        results["runs"][name]["minutes"] = [round(sum(r.get("seconds", 0) for r in run) / 60, 2) for run in rows]
    log = [json.loads(line) for line in open(os.path.join(ROOT, "tools", "emoji", "log.jsonl"))]
    for key, stage in (("judge", "evaluate"), ("head", "head")):
        results[key] = next((row for row in reversed(log) if row.get("stage") == stage), {})
    return results


def metrics(runner, name, seed):
    return [json.loads(line) for line in open(os.path.join(runner.work, f"{name}-{seed}", "metrics.jsonl"))]


# ---------------------------------------------------------------------------------------------------- pictures

STYLE = """<style>text{font:13px system-ui,sans-serif;fill:#57606a}.t{font-weight:600;fill:#24292f}.g{stroke:#d0d7de;stroke-width:1}
.c0{stroke:#0969da;fill:#0969da}.c1{stroke:#bf3989;fill:#bf3989}.c2{stroke:#1a7f37;fill:#1a7f37}.line{fill:none;stroke-width:2}.raw{fill:none;stroke-width:1;opacity:.25}.dash{stroke:#8b949e;stroke-width:1;stroke-dasharray:4 4}
@media(prefers-color-scheme:dark){text{fill:#8b949e}.t{fill:#e6edf3}.g{stroke:#30363d}}</style>"""


def ticks(low, high, count=5):
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= count)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Chart:
    """A small SVG with two axes."""
    W, H, LEFT, TOP, RIGHT, BOTTOM = 640, 320, 62, 34, 16, 46

    def __init__(self, title, x_label, y_label, xs, ys):
        pad = 0.05 * ((max(ys) - min(ys)) or 1)
        self.x = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
        self.y = (min(ys) - pad, max(ys) + pad)
        self.parts = [f'<text class="t" x="{self.LEFT}" y="20">{title}</text>']
        for v in ticks(*self.y):
            y = self.place(self.x[0], v)[1]
            self.parts.append(f'<line class="g" x1="{self.LEFT}" x2="{self.W - self.RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                              f'<text x="{self.LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{v:.6g}</text>')
        for v in ticks(*self.x):
            self.parts.append(f'<text x="{self.place(v, 0)[0]:.1f}" y="{self.H - self.BOTTOM + 18}" text-anchor="middle">{v:.6g}</text>')
        self.parts.append(f'<text x="{(self.LEFT + self.W - self.RIGHT) / 2}" y="{self.H - 8}" text-anchor="middle">{x_label}</text>'
                          f'<text transform="translate(14,{(self.TOP + self.H - self.BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{y_label}</text>')

    def place(self, x, y):
        share = lambda v, r: (v - r[0]) / (r[1] - r[0])
        return (self.LEFT + share(x, self.x) * (self.W - self.LEFT - self.RIGHT), self.H - self.BOTTOM - share(y, self.y) * (self.H - self.TOP - self.BOTTOM))

    def line(self, points, style):
        d = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*p) for p in points))
        self.parts.append(f'<polyline class="{style}" style="fill:none" points="{d}"/>')

    def dot(self, x, y, label, style="c0", anchor="start"):
        px, py = self.place(x, y)
        shift = 9 if anchor == "start" else -9
        self.parts.append(f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="4"/><text x="{px + shift:.1f}" y="{py - 7:.1f}" text-anchor="{anchor}">{label}</text>')

    def save(self, path):
        stack([self], path)


def stack(charts, path):
    """One SVG of charts, one below the other."""
    width, height = Chart.W, Chart.H * len(charts)
    groups = "\n".join(f'<g transform="translate(0,{i * Chart.H})">\n' + "\n".join(chart.parts) + "\n</g>" for i, chart in enumerate(charts))
    with open(path, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">{STYLE}\n{groups}\n</svg>\n')


def running(values, width=15):
    return [mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))]


def curve(runner, path):
    runs = {}
    for seed in runner.args.seeds:
        rows = [r for r in metrics(runner, "alignment", seed) if "reward/clip-score" in r]
        runs[seed] = ([r["step"] for r in rows], [r["reward/clip-score"] for r in rows])
    chart = Chart("Reward of each batch, and the mean of the last 15", "optimizer step", "clip-score",
                  [x for xs, _ in runs.values() for x in xs], [y for _, ys in runs.values() for y in ys])
    for i, (xs, ys) in enumerate(runs.values()):
        chart.line(list(zip(xs, ys)), f"raw c{i % 3}")
    for i, (xs, ys) in enumerate(runs.values()):
        chart.line(list(zip(xs, running(ys))), f"line c{i % 3}")
    chart.save(path)


def trade_off(results, path):
    base = results["base"]["trained"]
    points = [(row["kB"], row["alignment"]) for row in results["soup"]]
    chart = Chart("Soups of an alignment and a compressibility adapter", "size of the pictures, kB (JPEG, quality 95)", "alignment (clip-score)",
                  [x for x, _ in points] + [base["kB"]["mean"]], [y for _, y in points] + [base["alignment"]["mean"]])
    chart.line(points, "line c0")
    for row, (x, y) in zip(results["soup"], points):
        chart.dot(x, y, f"c = {row['c']:g}", anchor="end" if x > sum(chart.x) / 2 else "start")
    x, y = base["kB"]["mean"], base["alignment"]["mean"]
    chart.dot(x, y, "base model", "c1", anchor="end" if x > sum(chart.x) / 2 else "start")
    chart.save(path)


CELL, SHOWN, LABEL = 96, 8, 110


def cells(evaluation, side, every=1):
    """Pictures of an evaluation's grid, which has rows of eight base pictures and the tuned ones under them."""
    grid = Image.open(os.path.join(evaluation, "grid.png")).convert("RGB")
    columns, rows = (grid.width + 4) // 132, (grid.height + 4) // 132 // 2
    places = [(column * 132, (2 * row + side) * 132) for row in range(rows) for column in range(columns)]
    return [grid.crop((x, y, x + 128, y + 128)).resize((CELL, CELL), Image.LANCZOS) for x, y in places[::every][:SHOWN]]


def sheet(rows, path):
    """Labelled rows of pictures, few colours: a page carries several."""
    width = LABEL + max(len(pictures) for _, pictures in rows) * (CELL + 4)
    out = Image.new("RGB", (width, len(rows) * (CELL + 4)), (255, 255, 255))
    draw = ImageDraw.Draw(out)
    for r, (label, pictures) in enumerate(rows):
        draw.text((4, r * (CELL + 4) + CELL // 2 - 6), label, fill=(40, 40, 40))
        for i, picture in enumerate(pictures):
            out.paste(picture, (LABEL + i * (CELL + 4), r * (CELL + 4)))
    out.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def pictures(runner, results, folder):
    os.makedirs(folder, exist_ok=True)
    seed = runner.args.seeds[0]
    for prompts in SETS:
        shown = lambda name, side: cells(os.path.join(runner.work, f"eval-{name}-{prompts}"), side)
        rows = [("base model", shown(f"alignment-{seed}", 0))] + [(name, shown(f"{name}-{seed}", 1)) for name in CONFIGS]
        sheet(rows, os.path.join(folder, f"results-{prompts}.png"))
    sheet([(f"c = {c:g}", cells(os.path.join(runner.work, f"eval-soup-{c}-trained"), 1)) for c in SOUP], os.path.join(folder, "results-soup.png"))
    trade_off(results, os.path.join(folder, "results-soup.svg"))
    curve(runner, os.path.join(folder, "results-curve.svg"))


# ---------------------------------------------------------------------------------------------------- the page

UNITS = {"alignment": 4, "judge": 4, "aesthetic": 2, "kB": 3}


def number(value, digits, sign=False):
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def table(results, prompts):
    lines = ["| | " + " | ".join(UNITS) + " |", "|---" * (len(UNITS) + 1) + "|"]
    base = results["base"][prompts]
    lines.append("| base model | " + " | ".join(number(base[m]["mean"], d) for m, d in UNITS.items()) + " |")
    for name, run in results["runs"].items():
        entries = [run[prompts][m] for m in UNITS]
        lines.append(f"| trained for {name} | " + " | ".join(
            f"{number(e['mean'], d)} ({number(e['difference'], d, True)} ± {number(e['stderr_over_seeds'], d)}; ± {number(e['stderr_over_prompts'], d)})"
            for e, d in zip(entries, UNITS.values())) + " |")
    return "\n".join(lines)


def exploited(results):
    """Which rewards rose while the judge fell by more than twice its standard error over the prompts."""
    found = []
    for name, run in results["runs"].items():
        for prompts in SETS:
            judge = run[prompts]["judge"]
            if judge["difference"] < -2 * judge["stderr_over_prompts"]:
                found.append(f"trained for {name}, on {prompts} prompts, by {-judge['difference']:.4f}")
    if not found:
        fall, name, prompts = min((run[p]["judge"]["difference"], name, p) for name, run in results["runs"].items() for p in SETS)
        error = results["runs"][name][prompts]["judge"]
        return (f"The judge fell by more than twice its standard error over the prompts nowhere; it fell most for the run trained for {name}, on\n"
                f"{prompts} prompts: {fall:+.4f} ± {error['stderr_over_seeds']:.4f} over the seeds, ± {error['stderr_over_prompts']:.4f} over the prompts.")
    return ("The held-out judge fell by more than twice its standard error (over the prompts): " + "; ".join(found)
            + ". There the reward is exploited, and the pictures show how: the last rows of the sheets above.")


PAIRS = {"sample": "a sample of the base model for the same caption", "sample_varied": "one with other guidance and steps", "blur": "its blurred copy",
         "noise": "a noisy one", "cut_and_paste": "a cut and pasted one", "warp": "a warped one", "colours": "one in false colours", "autoencoder": "one decoded from noisy latents"}


def preferences(head):
    shares = head.get("pair_accuracy", {})
    return ("Of held-out renders it prefers to " + ", to ".join(f"{PAIRS[k]} {100 * shares[k]:.0f}%" for k in PAIRS if k in shares)
            + f" (mean scores: renders {head['mean']['render']:.2f}, samples {head['mean']['sample']:.2f})." if shares else "")


def page(results, args):
    judge, runs, counts = results["judge"], results["runs"], results["prompts"]
    minutes = ", ".join(f"{name} {mean(run['minutes']):.1f} ({run['steps']} steps)" for name, run in runs.items())
    pair = lambda key: " and ".join(f"{100 * share:.0f}%" for share in judge.get(key, []))
    soup = ["| c | " + " | ".join(UNITS) + " |", "|---" * (len(UNITS) + 1) + "|"]
    soup += [f"| {row['c']:g} | " + " | ".join(number(row[m], d) for m, d in UNITS.items()) + " |" for row in results["soup"]]
    return f"""# Results

Written by `tools/emoji/results.py` from measured runs; the numbers are in [results.json](results.json). The embedded model is
trained with each of three configs and the seeds {", ".join(map(str, results["seeds"]))}, and every adapter is compared with the base model
on the same prompts and noise.

- **alignment**: cosine of picture and prompt in `assets/emoji-clip`, the reward of `configs/emoji.toml`.
- **judge**: the same in `assets/emoji-judge`, a second CLIP of another shape, trained by itself, that nothing is trained against.
- **aesthetic**: the tower and head in `assets/emoji-aesthetic`, the reward of `configs/emoji-aesthetic.toml`. Synthetic
  preferences, no human labels: true renders over spoilt ones and over the base model's samples (`tools/emoji/head.py`). It sees no
  caption. {preferences(results["head"])}
- **kB**: size of the picture as a JPEG file of quality 95; `configs/emoji-compress.toml` makes it small.

In parentheses: the difference to the base model, picture by picture, ± its standard error over the seeds; ± that over the
prompts. Minutes of one training run, {args.jobs} of them at a time on {os.cpu_count()} CPU cores: {minutes}.

## Prompts of the training set ({counts["trained"]})

{table(results, "trained")}

![Samples on trained prompts](img/results-trained.png)

## Held-out combinations of animal, style and background ({counts["held-out"]})

{table(results, "held-out")}

![Samples on held-out prompts](img/results-held-out.png)

## Where a reward is exploited

{exploited(results)}

## How good are the model and the judge?

The share of pictures whose full prompt is found among 45, and whose animal is found among 45, by the judge: of the base
model's samples of trained combinations {pair("judge_on_samples_trained")}, of held-out ones {pair("judge_on_samples_held_out")}; of real renders of
held-out combinations {pair("judge_on_renders_held_out")} (`tools/emoji/evaluate.py`, guidance {judge.get("guidance")}, {judge.get("steps")} steps). Chance is 2%.

## Soups

`alignprop soup ALIGNMENT=1-c COMPRESSIBILITY=c`: averages of two adapters, on the prompts of the training set.

{chr(10).join(soup)}

![Trade-off](img/results-soup.svg)

![Samples of the soups](img/results-soup.png)

## Reward while training

![Curve](img/results-curve.svg)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=os.path.join(ROOT, "target", "release", "alignprop"))
    parser.add_argument("--work", default=os.path.join(ROOT, "runs", "results"), help="folder for runs and evaluations")
    parser.add_argument("--docs", default=os.path.join(ROOT, "docs"), help="where results.md, results.json and img/ go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the configs'")
    parser.add_argument("--prompts", type=int, default=90, help="prompts of each set; 45 are one for each animal")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, which share the cores")
    args = parser.parse_args()
    started = time.time()
    runner = Runner(args)
    runner.all()
    results = collect(runner)
    os.makedirs(args.docs, exist_ok=True)
    pictures(runner, results, os.path.join(args.docs, "img"))
    with open(os.path.join(args.docs, "results.json"), "w") as f:
        json.dump(results, f, indent=1)
        f.write("\n")
    with open(os.path.join(args.docs, "results.md"), "w") as f:
        f.write(page(results, args))
    print(f"{(time.time() - started) / 60:.1f} minutes; {os.path.join(args.docs, 'results.md')}")


if __name__ == "__main__":
    main()
