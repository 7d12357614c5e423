"""Make tests/fixtures/fit: heads on embeddings, each the optimum of a convex problem, found by Newton's method in float64.

    pip install numpy safetensors
    python tools/make_fit_fixture.py tests/fixtures

ridge       minimise 1/n sum (w.x + b - y)^2 + lambda |w|^2
logistic    minimise 1/n sum log(1 + exp(-(2y - 1)(w.x + b))) + lambda/2 |w|^2, y 0 or 1
choices     minimise 1/m sum c log(1 + exp(-w.(x_better - x_worse))) + lambda/2 |w|^2; a draw stands in both directions with c = 1/2

There are more numbers in a vector than choices in one set, so that the optimum is also found where rows are few.
"""
import json, os, sys
import numpy as np
from safetensors.numpy import save_file

softplus = lambda s: np.logaddexp(0, s)
sigmoid = lambda s: 1 / (1 + np.exp(-s))


def newton(rows, target, weight, kappa, squared, penalised):
    """Of sum weight loss(rows.p, target) + kappa/2 |p|^2, without the last of p where it is a bias."""
    ridge = np.full(rows.shape[1], kappa); ridge[penalised:] = 0
    loss = lambda p: (weight * ((rows @ p - target) ** 2 if squared else softplus(rows @ p) - target * (rows @ p))).sum() + (ridge * p * p).sum() / 2
    p = np.zeros(rows.shape[1])
    for _ in range(100):
        s = rows @ p
        first, second = (2 * (s - target), np.full(len(s), 2.0)) if squared else (sigmoid(s) - target, sigmoid(s) * sigmoid(-s))
        g = rows.T @ (weight * first) + ridge * p
        step, scale = np.linalg.solve(rows.T @ (rows * (weight * second)[:, None]) + np.diag(ridge), g), 1.0
        while loss(p - scale * step) > loss(p) + 1e-15 and scale > 1e-6:
            scale /= 2
        p = p - scale * step
    assert np.linalg.norm(g) < 1e-10
    return p, loss(p)


def main(fixtures):
    out, rng, d, n = f"{fixtures}/fit", np.random.default_rng(4), 20, 26
    os.makedirs(out, exist_ok=True)
    single = lambda x: np.asarray(x).astype(np.float32)
    common = rng.normal(size=d)
    def unit(k):
        x = rng.normal(size=(k, d)) + 1.5 * common
        return single(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float64)
    x, held_out, taste = unit(n), unit(7), rng.normal(size=d)
    value = x @ taste + rng.normal(0, 0.3, n)
    scores, labels = single(5 + value).astype(np.float64), (value > np.median(value)).astype(np.int64)
    pairs = [tuple(rng.choice(n, 2, replace=False)) for _ in range(15)]
    better, worse = (np.array([pick(pair, key=lambda i: value[i]) for pair in pairs]) for pick in (max, min))
    draw = (np.arange(15) % 6 == 5).astype(np.int64)
    save_file(dict(embeddings=single(x), held_out=single(held_out), scores=single(scores), labels=labels, better=better, worse=worse, draw=draw), f"{out}/data.safetensors")
    one = np.hstack([x, np.ones((n, 1))])
    both, heads = np.hstack([better, worse[draw == 1]]), {}
    differences = x[both] - x[np.hstack([worse, better[draw == 1]])]
    halves = np.hstack([np.where(draw == 1, 0.5, 1.0), np.full(draw.sum(), 0.5)]) / len(better)
    for kind, lam in [("ridge", 1e-3), ("ridge", 1e-1), ("logistic", 1e-3), ("choices", 1e-3), ("choices", 1e-1)]:
        if kind == "choices":
            w, loss = newton(differences, np.ones(len(differences)), halves, lam, False, d)
            b = 0.0
        else:
            p, loss = newton(one, scores if kind == "ridge" else labels, np.full(n, 1 / n), 2 * lam if kind == "ridge" else lam, kind == "ridge", d)
            w, b = p[:d], p[d]
        name = f"{kind}_{lam:g}"
        save_file(dict(weight=single(w), bias=single([b]), held_out_scores=single(held_out @ w + b)), f"{out}/{name}.safetensors")
        heads[name] = {"kind": kind, "lambda": lam, "loss": loss}
    json.dump(dict(kind="fit", heads=heads), open(f"{out}/reference.json", "w"), indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
