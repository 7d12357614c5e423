"""Times one optimizer step of this program beside a PyTorch script that does the same work, in alternating pairs.

    python tools/compare_cpu.py PEER.py [--pairs 5] [--cases emoji sd15-quarter sd15] [--python .venv/bin/python]

PEER.py takes --model --clip --size H W --batch --steps --backprop-steps --reps --warmup and prints one line of JSON with
step_s, rollout_s and peak_mib. Prints a table of medians and of the median ratio ours / PyTorch. Use an idle machine.
"""
import argparse
import json
import statistics
import subprocess

OURS = ["target/release/alignprop", "bench", "--json"]
CASES = {
    "emoji": (["--model", "assets/emoji-sd", "--clip", "assets/emoji-clip"], (64, 64), 4, 20, 5),
    "sd15-quarter": (["--arch", "sd15-quarter", "--random-weights"], (256, 256), 1, 10, 2),
    "sd15": (["--arch", "sd15", "--random-weights"], (256, 256), 1, 2, 1),
}


def run(command):
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("peer")
    ap.add_argument("--pairs", type=int, default=5)
    ap.add_argument("--cases", nargs="+", default=list(CASES))
    ap.add_argument("--python", default="python3")
    ap.add_argument("--reps", type=int, default=1)
    a = ap.parse_args()
    print("| work | step_s | ratio | rollout_s | ratio | peak MiB | ratio | GFLOP/s reached |\n|---|---|---|---|---|---|---|---|")
    for name in a.cases:
        source, (h, w), batch, steps, back = CASES[name]
        work = ["--batch", str(batch), "--steps", str(steps), "--backprop-steps", str(back), "--reps", str(a.reps)]
        ours = OURS + source + ["--size", f"{h}x{w}"] + work
        model = source if source[0] == "--model" else ["--model", name]
        peer = [a.python, a.peer] + model + ["--size", str(h), str(w)] + work
        pairs = [(run(ours), run(peer)) for _ in range(a.pairs)]
        cells = [f"{name}, {h}x{w}, batch {batch}, {steps} steps, {back} back"]
        for key, form in (("step_s", "{:.2f}"), ("rollout_s", "{:.2f}"), ("peak_mib", "{:.0f}")):
            median = lambda i: statistics.median(pair[i][key] for pair in pairs)
            cells.append((form + " / " + form).format(median(0), median(1)))
            cells.append("{:.2f}".format(statistics.median(o[key] / p[key] for o, p in pairs)))
        tflop = sum(pairs[0][0][k] for k in ("rollout_tflop", "kept_steps_tflop", "reward_tflop", "backprop_tflop"))
        cells.append("{:.0f}".format(statistics.median(tflop * 1e3 / o["step_s"] for o, _ in pairs)))
        print("| " + " | ".join(cells) + " |", flush=True)


main()
