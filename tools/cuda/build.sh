#!/usr/bin/env bash
# Builds alignprop with its CUDA kernels where no CUDA is installed: Linux on x86-64 with gcc, cargo and pip, no GPU needed.
#
#   tools/cuda/build.sh [arguments for cargo build]
#
# With CUDA 12 or 13 installed, `cargo build --release --features cuda` is all it takes; that program needs the CUDA libraries
# to start. The one made here starts everywhere, and loads them when `--device cuda` is asked for.
#
#   CUDA_PREFIX         where the toolkit is put together (default ~/.cache/alignprop-cuda-13.0): 104 MB of wheels, 271 MB
#   CUDA_COMPUTE_CAP    the oldest card that is wanted (default 80: A100, RTX 30)
#   CARGO_TARGET_DIR    the build goes into its folder `cuda`
set -euo pipefail
cd "$(dirname "$0")/../.."
toolkit=${CUDA_PREFIX:-$HOME/.cache/alignprop-cuda-13.0}

make_toolkit() {
    local wheels
    wheels=$(mktemp -d)
    python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    rm -rf "$toolkit.new"
    mkdir -p "$toolkit.new"
    for wheel in "$wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$toolkit.new"; done
    rm -rf "$toolkit" "$wheels"
    mv "$toolkit.new/nvidia/cu13" "$toolkit"
    rm -rf "$toolkit.new"
    chmod a+x "$toolkit"/bin/* "$toolkit"/nvvm/bin/*
    ln -s lib "$toolkit/lib64"
    # the build scripts ask the linker for these libraries, and the code loads them by itself: empty archives do
    mkdir "$toolkit/lib/stubs"
    for library in cuda cublas cublasLt curand nvrtc cudnn; do ar rcs "$toolkit/lib/stubs/lib$library.a"; done
    ln -s ../libcudart_static.a "$toolkit/lib/stubs/libcudart.a"
}

# candle has kernels for quantized weights and mixtures of experts, which take nvcc 12 minutes and are never called here:
# functions that end the program stand in for them
write_nvcc_lite() {
    cat >"$toolkit/bin/nvcc-lite" <<'LITE'
#!/usr/bin/env bash
set -e
mode= out= source= previous= objects=()
for argument in "$@"; do
    if [ "$previous" = -o ]; then out=$argument; previous=; continue; fi
    case "$argument" in
        -o) previous=-o ;;
        -c) mode=compile ;;
        --lib) mode=library ;;
        *.cu) source=$argument ;;
        *.o) objects+=("$argument") ;;
    esac
done
case "$mode:$source" in
    compile:src/mmvq_gguf.cu)
        {
            echo '#include <stdio.h>'
            echo '#include <stdlib.h>'
            grep -oE 'pub fn [A-Za-z0-9_]+' src/ffi.rs | sed 's/pub fn //' | sort -u |
                sed 's/.*/void &(void) { fputs("& was left out of this build\\n", stderr); abort(); }/'
        } | gcc -x c -O1 -fPIC -c -o "$out" -
        ;;
    compile:src/moe/* | compile:src/mmq_gguf/*) gcc -x c -fPIC -c -o "$out" /dev/null ;;
    library:*) rm -f "$out"; ar rcs "$out" "${objects[@]}" ;;
    *) exec "$(dirname "$0")/nvcc" "$@" ;;
esac
LITE
    chmod a+x "$toolkit/bin/nvcc-lite"
}

[ -x "$toolkit/bin/nvcc" ] || make_toolkit
[ -x "$toolkit/bin/nvcc-lite" ] || write_nvcc_lite
unset CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR CUDNN_LIB
export CUDA_HOME=$toolkit NVCC=$toolkit/bin/nvcc-lite PATH=$toolkit/bin:$PATH
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80} CUDARC_CUDA_VERSION=13000
# candle asks cudarc to link; this cfg, which cudarc alone reads, makes its code load instead. --target keeps it from the
# build scripts, which would object.
export RUSTFLAGS="${RUSTFLAGS:-} --cfg feature=\"dynamic-loading\""
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda
cargo build --release --locked --features cuda --target x86_64-unknown-linux-gnu "$@"
echo "built $CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release/alignprop"
