#!/usr/bin/env bash
# Builds a stand-in for a GPU in OUT_DIR: libkernels.so, the kernels of src/ops/cuda and candle's, translated from their PTX to
# code for this machine, and libcuda.so.1, the driver and NVIDIA's other libraries as far as the program calls them. With OUT_DIR
# in LD_LIBRARY_PATH the program of tools/cuda/build.sh runs on it (driver.cpp says how it can be told what to do).
# Needs nvcc (tools/cuda/build.sh puts one together), python3 and g++ 12 or newer. Does again only what has changed.
#
#   tools/cuda/standin/build.sh OUT_DIR
#
#   NVCC           the compiler, else CUDA_PREFIX/bin/nvcc (default ~/.cache/alignprop-cuda-13.0)
#   CANDLE_PTX     the folder of candle's PTX, else the newest in the target folder of tools/cuda/build.sh; `none`: without it
#   PTX_SOURCES    names of the sources in src/ops/cuda, all unless set
#   JOBS           compilers at a time (default: one a core)
set -euo pipefail
[ $# -eq 1 ] || { sed -n 2,14p "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../../.."
here=tools/cuda/standin
prefix=${CUDA_PREFIX:-$HOME/.cache/alignprop-cuda-13.0}
export nvcc=${NVCC:-$prefix/bin/nvcc} out here
jobs=${JOBS:-$(nproc)}
mkdir -p "$out/ptx" "$out/cpp" "$out/o"
in_parallel() { xargs -P "$jobs" -I{} bash -euc "$1"; }

if [ -n "${PTX_SOURCES:-}" ]; then read -ra sources <<<"$PTX_SOURCES"; else
    for source in src/ops/cuda/*.cu; do sources+=("$(basename "$source" .cu)"); done
fi
newest_header=$(ls -t src/ops/cuda/*.cuh | head -n 1)
for name in "${sources[@]}"; do
    ptx=$out/ptx/$name.ptx
    if [ ! "$ptx" -nt "src/ops/cuda/$name.cu" ] || [ ! "$ptx" -nt "$newest_header" ]; then echo "$name"; fi
done | in_parallel '"$nvcc" -std=c++17 -O3 --ptx -arch=sm_80 -o "$out/ptx/{}.new" "src/ops/cuda/{}.cu" && mv "$out/ptx/{}.new" "$out/ptx/{}.ptx"'

candle=${CANDLE_PTX:-}
if [ -z "$candle" ]; then
    target=${CARGO_TARGET_DIR:-target}/cuda
    candle=$(ls -td "$target"/*/release/build/candle-kernels-*/out 2>/dev/null | head -n 1 || true)
    [ -n "$candle" ] || { echo "no candle-kernels-*/out in $target: run tools/cuda/build.sh, or set CANDLE_PTX" >&2; exit 1; }
fi
# file by file, to a list of the C++ files
ptx_files=()
for name in "${sources[@]}"; do ptx_files+=("$out/ptx/$name.ptx"); done
if [ "$candle" != none ]; then
    for name in affine binary cast conv fill indexing reduce sort ternary unary; do ptx_files+=("$candle/$name.ptx"); done
fi
for ptx in "${ptx_files[@]}"; do
    list=$out/cpp/$(basename "$ptx" .ptx).list
    if [ ! "$list" -nt "$ptx" ] || [ ! "$list" -nt $here/ptx.py ]; then echo "$ptx"; fi
    # types that nothing here has are left out
done | in_parallel 'list=$out/cpp/$(basename {} .ptx).list
    python3 $here/ptx.py "$out/cpp" {} --only "(?!.*_(f8|i16|i32)).*" >"$list.new" && mv "$list.new" "$list"'
for ptx in "${ptx_files[@]}"; do cat "$out/cpp/$(basename "$ptx" .ptx).list"; done >"$out/files"

# what the code is compiled with counts as one of its inputs
export flags="-std=c++17 -march=native -ffp-contract=off -fwrapv -fno-strict-aliasing -fPIC -U_FORTIFY_SOURCE -I $here"
cat $here/kernels.h - <<<"$flags" | cmp -s - "$out/base" || cat $here/kernels.h - <<<"$flags" >"$out/base"
while read -r file; do
    object=$out/o/$(basename "$file" .cpp).o
    if [ ! "$object" -nt "$file" ] || [ ! "$object" -nt "$out/base" ]; then basename "$file" .cpp; fi
done <"$out/files" | in_parallel 'g++ $flags -O1 -w -c "$out/cpp/{}.cpp" -o "$out/o/{}.new" && mv "$out/o/{}.new" "$out/o/{}.o"'
if [ ! "$out/o/kernels.o" -nt $here/kernels.cpp ] || [ ! "$out/o/kernels.o" -nt "$out/base" ]; then
    g++ $flags -O2 -Wall -Wextra -c $here/kernels.cpp -o "$out/o/kernels.o"
fi
objects=("$out/o/kernels.o")
while read -r file; do objects+=("$out/o/$(basename "$file" .cpp).o"); done <"$out/files"
newest=$(ls -t "${objects[@]}" | head -n 1)
if [ ! "$out/libkernels.so" -nt "$newest" ] || [ "$(cat "$out/linked" 2>/dev/null)" != "${objects[*]}" ]; then
    g++ -shared -pthread -Wl,--no-undefined -o "$out/libkernels.new" "${objects[@]}"
    echo "${objects[*]}" >"$out/linked"
    mv "$out/libkernels.new" "$out/libkernels.so"
fi
echo "built $out/libkernels.so"

# the driver, under its name and those of the libraries
if [ ! "$out/libcuda.so.1" -nt $here/driver.cpp ] || [ ! "$out/libcuda.so.1" -nt $here/libraries.cpp ] ||
    [ ! "$out/libcuda.so.1" -nt $here/standin.h ] || [ ! "$out/libcuda.so.1" -nt $here/kernels.h ]; then
    g++ -std=c++17 -O3 -march=native -fPIC -shared -pthread -Wall -Wextra -I "${nvcc%/bin/*}/include" -I $here \
        $here/driver.cpp $here/libraries.cpp -o "$out/libcuda.new" -ldl
    mv "$out/libcuda.new" "$out/libcuda.so.1"
fi
for library in cublas.so.13 cublasLt.so.13 curand.so.10 cudnn.so.9; do ln -sf libcuda.so.1 "$out/lib$library"; done
echo "built $out/libcuda.so.1"
