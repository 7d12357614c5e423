#!/usr/bin/env bash
# Runs the CUDA kernels' source on the CPU and compares forward and backward with f64 references. Needs g++ 12 or newer,
# no GPU and no toolkit. With arguments: only these, e.g. `tools/cuda/emulate.sh norm attention`.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${EMULATE_DIR:-$(mktemp -d)}
mkdir -p "$out"
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
    for source in tools/cuda/check_*.cpp; do
        name=${source##*/check_}
        names+=("${name%.cpp}")
    done
fi
build_and_run() {
    g++ -std=c++17 -O2 -march=native -ffp-contract=off -U_FORTIFY_SOURCE -Wall -Wno-unknown-pragmas -Wno-unused-function \
        -I tools/cuda -I src/ops/cuda "tools/cuda/check_$1.cpp" -o "$out/check_$1" -ldl
    "$out/check_$1"
}
export -f build_and_run
export out
printf '%s\n' "${names[@]}" | xargs -P "$(nproc)" -I{} bash -c 'build_and_run {}'
