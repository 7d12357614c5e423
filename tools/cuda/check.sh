#!/usr/bin/env bash
# What can be said of the GPU's code without a GPU: the Rust is linted, the kernels are compiled where there is an nvcc, and
# their source is run on the CPU and compared with f64 where there is a g++. Says what was left out.
set -euo pipefail
cd "$(dirname "$0")/../.."

# the libraries' bindings are those of CUDA 13; nothing of it is needed to read them
NVCC=$PWD/tools/cuda/nvcc-none CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=80 \
    cargo clippy --release --locked --all-targets --features cuda -- -D warnings

nvcc=${NVCC:-$(command -v nvcc || true)}
for prefix in "${CUDA_HOME:-/usr/local/cuda}" "${CUDA_PREFIX:-$HOME/.cache/alignprop-cuda-13.0}"; do
    if [ -z "$nvcc" ] && [ -x "$prefix/bin/nvcc" ]; then nvcc=$prefix/bin/nvcc; fi
done
if [ -n "$nvcc" ]; then
    out=$(mktemp -d)
    for source in src/ops/cuda/*.cu; do
        "$nvcc" -std=c++17 -O3 --cubin -arch=sm_80 -o "$out/$(basename "$source" .cu).cubin" "$source"
        echo "compiled $source for sm_80 with $nvcc"
    done
    rm -rf "$out"
else
    echo "LEFT OUT: no nvcc here, so the kernels in src/ops/cuda were not compiled"
fi

if command -v g++ >/dev/null; then
    tools/cuda/emulate.sh
else
    echo "LEFT OUT: no g++ here, so the kernels in src/ops/cuda were not run on the CPU"
fi
