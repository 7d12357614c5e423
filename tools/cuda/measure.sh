#!/usr/bin/env bash
# Everything that a GPU has to say about this program, in one go: the card, the comparison with PyTorch's recorded numbers, the
# reward curve beside the CPU's, time and memory of a step beside a PyTorch script, growth of memory, and a profile.
#
#   tools/cuda/measure.sh PROGRAM OUT [PEER.py]
#
# PROGRAM is a build with the feature `cuda`; OUT a folder for the results; PEER a script that takes the arguments below and
# prints one line of JSON with step_s and peak_mib. A part that fails is noted in OUT/summary.txt, and the next one runs.
#
#   DEVICE      cuda, or cuda:N (default cuda)
#   PYTHON      for the peer (default python3); the CUDA libraries of its pip packages are used where there are any
#   REFERENCES  folders for `alignprop verify` (default: those of the tests)
#   SIZE STEPS REPS BATCHES KEPT   of the benchmark (default 512 50 3 "1 4" "1 5 25")
#   CURVE GROWTH   optimizer steps of the reward curve, and repetitions to see memory grow in (default 30 "10 100")
set -uo pipefail
program=$(realpath "$1") out=$2 peer=${3:-}
mkdir -p "$out"
out=$(realpath "$out")
[ -z "$peer" ] || peer=$(realpath "$peer")
cd "$(dirname "$0")/../.."
device=${DEVICE:-cuda} python=${PYTHON:-python3}
size=${SIZE:-512} steps=${STEPS:-50} reps=${REPS:-3} batches=${BATCHES:-"1 4"} kept=${KEPT:-"1 5 25"}
curve=${CURVE:-30} growth=${GROWTH:-"10 100"}
references=${REFERENCES:-"tests/fixtures/tiny-sd15 tests/fixtures/tiny-sd21"}
summary=$out/summary.txt
: >"$summary"

say() { echo "$*" | tee -a "$summary"; }
# part NAME COMMAND...: output to OUT/NAME.txt, its last line and how it ended to the summary
part() {
    local name=$1 started=$SECONDS status
    shift
    "$@" >"$out/$name.txt" 2>"$out/$name.err"
    status=$?
    say "$name: exit $status after $((SECONDS - started)) s: $(tail -n 1 "$out/$name.txt")"
    [ $status = 0 ] || say "    $(tail -n 1 "$out/$name.err")"
}

# the libraries of PyTorch's pip packages, under the names that the program looks for
libraries=$(mktemp -d)
for folder in $("$python" -c 'import nvidia; print(*nvidia.__path__)' 2>/dev/null); do
    for file in "$folder"/*/lib/*.so*; do [ -e "$file" ] && ln -sf "$file" "$libraries/"; done
done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

part card nvidia-smi
part versions "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())'

# right?
for reference in $references; do
    name=$(basename "$reference")
    part "verify-$name-f32" "$program" verify "$reference" --device "$device" --precision f32
    part "verify-$name-tf32" "$program" verify "$reference" --device "$device" --precision f32 --allow-tf32
    part "verify-$name-bf16" "$program" verify "$reference" --device "$device" --precision bf16
    part "verify-$name-f16" "$program" verify "$reference" --device "$device" --precision f16
done

# the embedded model's reward curve, the same noise: on the CPU, and on the GPU in three precisions
train() { rm -rf "$out/run-$1"; shift; "$program" train --set train.steps=$curve --set run.sample_every=0 "$@"; }
part curve-cpu train cpu --set run.dir="$out/run-cpu"
for precision in f32 bf16 f16; do
    part "curve-$precision" train "$precision" --set run.dir="$out/run-$precision" --device "$device" --precision "$precision"
done
part curve-graphs train graphs --set run.dir="$out/run-graphs" --device "$device" --precision bf16 --set run.cuda_graphs=true
part curves "$program" runs "$out"

# fast?
work="--steps $steps --reps $reps"
for batch in $batches; do
    for k in $kept; do
        here="--batch $batch --backprop-steps $k $work"
        ours="--json --arch sd15 --random-weights --device $device --precision bf16 --size ${size}x$size $here"
        part "ours-b$batch-k$k" "$program" bench $ours
        part "ours-b$batch-k$k-graphs" "$program" bench $ours --cuda-graphs
        # every kept step stored: without a second evaluation, where memory allows
        part "ours-b$batch-k$k-stored" "$program" bench $ours --stored-steps "$k"
        part "ours-b$batch-k$k-stored-graphs" "$program" bench $ours --stored-steps "$k" --cuda-graphs
        part "ours-b$batch-k$k-block" "$program" bench $ours --checkpointing block
        if [ -n "$peer" ]; then
            their="--model sd15 --device cuda --dtype bfloat16 --size $size $size $here"
            part "peer-b$batch-k$k" "$python" "$peer" $their
            part "peer-b$batch-k$k-channels-last" "$python" "$peer" $their --channels-last
            part "peer-b$batch-k$k-checkpoint" "$python" "$peer" $their --channels-last --checkpoint
        fi
    done
done
for precision in f32 f16; do
    part "ours-b1-k1-$precision" "$program" bench --json --arch sd15 --random-weights --device "$device" --precision $precision \
        --size "${size}x$size" $work
done
part ours-b1-k1-reward-f32 "$program" bench --json --arch sd15 --random-weights --device "$device" --precision bf16 \
    --reward-precision f32 --size "${size}x$size" $work
if [ -n "$peer" ]; then
    part peer-b1-k1-compile "$python" "$peer" --model sd15 --device cuda --dtype bfloat16 --size "$size" "$size" $work --channels-last --compile
fi

# does memory grow? the same work 10 and 100 times
for n in $growth; do
    part "growth-$n" "$program" bench --json --arch sd15-quarter --random-weights --device "$device" --size 256x256 --steps 5 \
        --backprop-steps 2 --reps $n
done

# where the time goes, by kernel
if command -v nsys >/dev/null; then
    for k in 1 25; do
        part "profile-k$k" nsys profile --force-overwrite true --output "$out/profile-k$k" --stats=true \
            "$program" bench --arch sd15 --random-weights --device "$device" --precision bf16 --size "${size}x$size" \
            --steps "$steps" --backprop-steps $k --reps 1
    done
else
    say "profile: nsys is not here, so there is none"
fi

# one table of it all
"$python" - "$out" <<'TABLE' | tee -a "$summary"
import json, pathlib, re, sys
print(f"{'run':40} {'step s':>9} {'peak MiB':>9} {'TFLOP/s':>8} {'of peak':>8}")
best = {}  # by work and whose: (least seconds, its run), (least MiB, its run)
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.txt")):
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("{")]
    try:
        r = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        continue
    if "step_s" not in r:
        continue
    tflop = sum(r.get(k, 0) for k in ("rollout_tflop", "kept_steps_tflop", "reward_tflop", "backprop_tflop"))
    share = f"{r['share_of_peak']:.2f}" if "share_of_peak" in r else "-"
    rate = f"{tflop / r['step_s']:.0f}" if tflop else "-"
    # what each program's allocator took from the card
    mib = r.get("peak_mib") or r.get("allocated_mib") or 0
    print(f"{path.stem:40} {r['step_s']:9.3f} {mib:9.0f} {rate:>8} {share:>8}")
    # the runs in bf16 with the same work
    work = re.fullmatch(r"(ours|peer)-(b\d+-k\d+)((?:-stored|-graphs|-block|-channels-last|-checkpoint|-compile)*)", path.stem)
    if work:
        found = best.setdefault(work[2], {}).setdefault(work[1], [])
        found.append((r["step_s"], mib, work[3].lstrip("-") or "plain"))
print(f"\n{'work':10} {'ours / best peer, time':38} {'ours / best peer, memory':38}")
for work, runs in sorted(best.items()):
    if len(runs) == 2:
        cells = []
        for key in (0, 1):
            ours, peer = (min(runs[whose], key=lambda run: run[key]) for whose in ("ours", "peer"))
            cells.append(f"{ours[key] / peer[key]:.2f} ({ours[2]} / {peer[2]})" if peer[key] else "-")
        print(f"{work:10} {cells[0]:38} {cells[1]:38}")
TABLE
rm -rf "$libraries"
