#!/usr/bin/env bash
# Runs the real CUDA program on a CPU that stands in for a GPU (build.sh) and compares: the tests that want a GPU, PyTorch's
# recorded numbers in every number format, a run with CUDA graphs and stored steps with one without, and memory over 100 steps.
# Takes ten minutes on two cores, and the first time as long again to build.
#
#   tools/cuda/standin/check.sh OUT_DIR
#
#   CARGO_TARGET_DIR, CUDA_PREFIX   as for tools/cuda/build.sh
#   REFERENCES                      folders for `alignprop verify` (default: those of the tests)
set -euo pipefail
[ $# -eq 1 ] || { sed -n 2,9p "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../../.."
references=${REFERENCES:-"tests/fixtures/tiny-sd15 tests/fixtures/tiny-sd21"}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}

tools/cuda/build.sh
tools/cuda/build.sh --lib --tests --message-format=json 2>/dev/null | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line) if line.startswith("{") else {}
    if message.get("executable") and message["target"]["kind"] == ["lib"]:
        print(message["executable"])' >"$out/tests"
tools/cuda/standin/build.sh "$out"
program=$CARGO_TARGET_DIR/cuda/x86_64-unknown-linux-gnu/release/alignprop
export LD_LIBRARY_PATH=$out

"$(cat "$out/tests")" --test-threads 1 gpu cuda:: replay

for reference in $references; do
    for precision in f32 bf16 f16; do
        echo "verify $reference in $precision: $("$program" verify "$reference" --device cuda --precision $precision | tail -n 1)"
    done
done

# one chain of each kind: as it is, with its steps stored, and as a graph; the same adapters
train() {
    rm -rf "$out/run"
    "$program" train --device cuda --precision bf16 --set run.dir="$out/run" --set train.steps=1 --set run.sample_every=0 \
        --set sampler.num_inference_steps=5 --set truncation.k=2 --set train.batch_size=1 \
        --set train.gradient_accumulation_steps=1 "$@" 2>"$out/train.log" || { cat "$out/train.log" >&2; return 1; }
    sha256sum <"$out/run/pytorch_lora_weights.safetensors"
}
plain=$(train --set train.checkpointing=step)
for other in "train.stored_steps=2" "run.cuda_graphs=true" "train.stored_steps=2 --set run.cuda_graphs=true"; do
    # shellcheck disable=SC2086
    [ "$(train --set train.checkpointing=step --set $other)" = "$plain" ] || { echo "$other: another adapter" >&2; exit 1; }
    echo "$other: the same adapter to the last bit"
done

# does memory grow? Stable Diffusion 1.5 at 512x512, nothing computed
STANDIN=count STANDIN_LOG=$out/growth.log "$program" bench --arch sd15 --random-weights --device cuda --size 512x512 --steps 10 \
    --backprop-steps 2 --reps 100 >"$out/growth.txt"
python3 - "$out/growth.log" <<'GROWTH'
import json, sys
steps = [line["live"] for line in map(json.loads, open(sys.argv[1])) if line["kernels"] and line["from_device"] == 0][-100 * 4 + 3::4]
print(f"100 steps: {steps[0]:,} bytes after the first, {steps[-1]:,} after the last")
sys.exit(steps[0] != steps[-1])
GROWTH
