#!/usr/bin/env bash
# Holds the compiled kernels of OUT_DIR/libkernels.so (built here, see build.sh): instruction by instruction, candle's kernels,
# and ours by the checks of tools/cuda/emulate.sh. With names: only these of our checks, e.g. `check_ptx.sh /tmp/standin norm`.
# With --broken: puts a fault into the PTX of one kernel after the other, which the checks must see.
#
#   tools/cuda/standin/check_ptx.sh OUT_DIR [NAME... | --broken]
set -euo pipefail
[ $# -ge 1 ] || { sed -n 2,7p "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$here/../../.."
"$here/build.sh" "$out" 2>"$out/build.log" || { cat "$out/build.log" >&2; exit 1; }
export out STANDIN_KERNELS=$out/libkernels.so
mkdir -p "$out/checks"

# NAME: 0 if all its checks pass
check() {
    local program=$out/checks/check_$1
    if [ ! "$program" -nt "tools/cuda/check_$1.cpp" ] || [ -n "$(find tools/cuda/*.h src/ops/cuda -newer "$program")" ]; then
        g++ -std=c++17 -O2 -march=native -ffp-contract=off -U_FORTIFY_SOURCE -Wall -Wno-unknown-pragmas -Wno-unused-function \
            -I tools/cuda -I src/ops/cuda "tools/cuda/check_$1.cpp" -o "$program" -ldl
    fi
    "$program"
}
export -f check

# WHAT CHECK SOURCE KERNEL PATTERN REPLACEMENT: replaces the pattern wherever it is in the kernel; the check must fail.
fault() {
    python3 - "$out/ptx/$3.ptx" "$out/broken/ptx/$3.ptx" "$4" "$5" "$6" <<'PYTHON'
import re, sys
source, target, kernel, pattern, replacement = sys.argv[1:]
with open(source) as file:
    text = file.read()
start = text.index(f".entry {kernel}(")
end = text.find(".entry ", start + 1)
end = len(text) if end < 0 else end
broken, count = re.subn(pattern, replacement, text[start:end])
if not count:
    sys.exit(f"{kernel} has no {pattern}")
with open(target, "w") as file:
    file.write(text[:start] + broken + text[end:])
PYTHON
    CANDLE_PTX=none "$here/build.sh" "$out/broken" 2>"$out/build.log" >/dev/null || { cat "$out/build.log" >&2; exit 1; }
    if STANDIN_KERNELS=$out/broken/libkernels.so check "$2" >"$out/broken/said" 2>&1; then
        echo "NOT SEEN: $1 in $4"
        missed=1
    else
        echo "seen: $1 in $4: $({ grep -m 1 -E 'FAILED|emulator:' "$out/broken/said" || head -n 1 "$out/broken/said"; } | head -c 200)"
    fi
    cp -p "$out/ptx/$3.ptx" "$out/broken/ptx/$3.ptx"
    touch "$out/broken/ptx/$3.ptx"
}

if [ "${1:-}" = --broken ]; then
    missed=0
    mkdir -p "$out/broken"
    cp -a "$out/ptx" "$out/cpp" "$out/o" "$out/base" "$out/broken/"
    mma='(mma\S+ \{[^}]*\}, \{[^,]*),([^,]*),([^,]*)'
    fault "a barrier left out" softmax softmax softmax_fwd_f32 'bar\.sync\s+0;' ''
    fault "a shuffle with the wrong lane" softmax softmax softmax_bwd_bf16 '(mov\.u32\s+%r\d+, )16;' '\g<1>8;'
    fault "a barrier left out" norm norm group_norm_sums_bf16 'bar\.sync\s+0;' ''
    fault "a barrier left out" jpeg jpeg jpeg_coefficients_f32 'bar\.sync\s+0;' ''
    fault "a barrier left out" lora lora lora_fwd_f16 'bar\.sync\s+0;' ''
    fault "a sum that is a difference" elementwise elementwise add_bf16 'add\.f32' 'sub.f32'
    fault "a comparison the other way" elementwise elementwise activation_bwd_f32 'setp\.lt\.f32' 'setp.gt.f32'
    fault "another order of a's fragments" attention attention_bf16 attention_fwd_48_bf16 "$mma" '\1,\3,\2'
    fault "a and b exchanged" attention attention_bf16 attention_bwd_q_48_bf16 \
        '(mma\S+ \{[^}]*\}, )\{([^,]*),([^,]*)(,[^}]*)\}, \{([^,]*),([^}]*)\}' '\1{\5,\6\4}, {\2,\3}'
    fault "a matrix that is not transposed" attention attention_bf16 attention_fwd_48_bf16 '\.trans\b' ''
    fault "a wait for copies left out" attention attention_bf16 attention_fwd_48_bf16 'cp\.async\.wait_group [01];' ''
    fault "a wait that leaves one group more" attention attention_f16 attention_fwd_48_f16 'cp\.async\.wait_group 0;' 'cp.async.wait_group 1;'
    fault "a barrier left out" attention attention_bf16 attention_bwd_kv_48_bf16 'bar\.sync\s+0;' ''
    fault "a barrier of a warp left out" attention attention_f32 attention_fwd_48_f32 'bar\.warp\.sync\s+[^;]*;' ''
    exit $missed
fi

failed=0
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
    python3 "$here/check_instructions.py" "$out/instructions" 2>/dev/null || failed=1
    if [ "${CANDLE_PTX:-}" != none ]; then python3 "$here/check_candle.py" "$out/libkernels.so" || failed=1; fi
    for source in tools/cuda/check_*.cpp; do
        name=${source##*/check_}
        names+=("${name%.cpp}")
    done
fi
printf '%s\n' "${names[@]}" | xargs -P "${JOBS:-$(nproc)}" -I{} bash -euc 'check {}' || failed=1
exit $failed
