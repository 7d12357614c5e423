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
