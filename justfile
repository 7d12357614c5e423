# The recipes that CI runs too.

check: test lint doc cuda-check

test:
    cargo test --release --locked

lint:
    cargo fmt --check
    cargo clippy --release --locked --all-targets -- -D warnings

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps

# Recomputes recorded PyTorch numbers with this build.
verify DIR:
    cargo run --release --locked -- verify {{DIR}}

# The GPU's code, as far as that needs no GPU.
cuda-check:
    tools/cuda/check.sh

# The real CUDA program on a CPU that stands in for a GPU: ten minutes, and as long again to build.
cuda-standin OUT:
    tools/cuda/standin/check.sh {{OUT}}

# Changed inputs for a reader of files (tests/fuzz/readers; or all, one after the other), as long as it is told. The flags count
# the branches that an input takes, and make a wrapped number a panic.
fuzz READER="all" SECONDS="60" SEED="1":
    #!/usr/bin/env bash
    set -euo pipefail
    export FUZZ_READER={{READER}} FUZZ_SECONDS={{SECONDS}} FUZZ_SEED={{SEED}}
    export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
        -Clink-arg=-Wl,--unresolved-symbols=ignore-all -Coverflow-checks=on"
    host=$(rustc -vV | sed -n 's/^host: //p')
    fuzz="cargo test --release --locked --target-dir target/fuzz-build --target $host --test fuzz"
    $fuzz --no-run
    $fuzz -- --ignored --nocapture for_hours 2>/dev/null |
        grep --line-buffered -E '^(FAILED|HANGS|  the input|[a-z-]+: [0-9]+ inputs|test result)'
