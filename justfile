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

# A release in dist/: a Python wheel, and an archive to unpack in a prefix such as ~/.local; both have the program, its man pages
# and completions. maturin comes from pip.
release:
    #!/usr/bin/env bash
    set -euo pipefail
    cargo build --release --locked
    rm -rf dist alignprop.data
    trap 'rm -rf alignprop.data' EXIT
    prefix=alignprop.data/data # what a wheel installs beside Python's own bin/
    share=$prefix/share
    mkdir -p dist $share/{bash-completion/completions,zsh/site-functions,fish/vendor_completions.d,doc/alignprop}
    target/release/alignprop man $share/man/man1
    target/release/alignprop completions bash >$share/bash-completion/completions/alignprop
    target/release/alignprop completions zsh >$share/zsh/site-functions/_alignprop
    target/release/alignprop completions fish >$share/fish/vendor_completions.d/alignprop.fish
    cp README.md LICENSE assets/LICENSES.md $share/doc/alignprop
    [ -x target/maturin/bin/maturin ] || { python3 -m venv target/maturin && target/maturin/bin/pip -q install 'maturin>=1.9,<2'; }
    target/maturin/bin/maturin build --release --out dist
    name=alignprop-$(target/release/alignprop --version | cut -d' ' -f2)-$(rustc -vV | sed -n 's/^host: //p')
    mkdir $prefix/bin
    install -s target/release/alignprop $prefix/bin
    tar -czf "dist/$name.tar.gz" --transform "s,^\.,$name," --owner=0 --group=0 -C $prefix .
    cd dist && sha256sum -- * | tee SHA256SUMS

# Does dist/'s wheel work without Rust and without the clone? In an empty virtual environment and folder it trains and samples.
wheel-test:
    #!/usr/bin/env bash
    set -euo pipefail
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" -q install --no-index dist/*.whl
    cd "$folder"
    run() { env -i HOME="$folder" PATH="$folder/venv/bin:/usr/bin:/bin" "$@"; }
    short=(--set train.steps=1 --set train.batch_size=1 --set sampler.num_inference_steps=2 --set truncation.k=1 --set run.num_samples=1)
    run alignprop train "${short[@]}"
    run alignprop train "${short[@]}"
    run alignprop sample --model assets/emoji-sd --prompt "a cat" --lora runs/emoji-2 --steps 2 -o cat.png
    run man -w alignprop-train || ls venv/share/man/man1/alignprop-train.1
    ls -l cat.png runs/emoji/report.html runs/emoji-2/report.html

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
