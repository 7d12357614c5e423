# The recipes that CI runs too.

check: test lint doc

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
