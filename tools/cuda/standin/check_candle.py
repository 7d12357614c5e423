#!/usr/bin/env python3
"""candle's kernels in a libkernels.so against Python: what a tensor is made, moved, converted, mapped and summed with.

check_candle.py LIBKERNELS.SO
"""

import math
import random
import struct
import sys

from library import Failed, Library, Memory, pack, to_bf16, unpack

random.seed(2)
ROUNDING = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}
LIB = None
CHECKS = FAILURES = 0


def check(found, expected, bound, what):
    """Each number within `bound` of max(1, what is expected)."""
    global CHECKS, FAILURES
    CHECKS += 1
    same = lambda y, e: (y != y and e != e) or y == e or abs(y - e) <= bound * max(1, abs(e))
    wrong = [(y, e) for y, e in zip(found, expected) if not same(y, e)]
    if wrong or len(found) != len(expected):
        FAILURES += 1
        print(f"FAILED {what}: {len(wrong)} of {len(expected)} numbers, first {wrong[:1]}")


def rounded(kind, values):
    """As numbers of the type."""
    return unpack(kind, pack(kind, values))


class Layout:
    """A tensor of some shape in memory, contiguous or with its last two dimensions exchanged."""

    def __init__(self, shape, transposed=False):
        self.shape = shape
        order = list(range(len(shape)))
        if transposed:
            order[-1], order[-2] = order[-2], order[-1]
        self.strides, step = [0] * len(shape), 1
        for d in reversed(order):
            self.strides[d], step = step, step * shape[d]
        self.size = step

    def places(self):
        all_places = [0]
        for size, stride in zip(self.shape, self.strides):
            all_places = [at + i * stride for at in all_places for i in range(size)]
        return all_places


def info(*layouts):
    return Memory(pack("u64", layouts[0].shape + [stride for layout in layouts for stride in layout.strides]))


def run(name, parameters, n):
    LIB.run(name, parameters, grid=((n + 63) // 64, 1, 1), block=(64, 1, 1))


def result(kind, n):
    return Memory(pack(kind, [77] * n))


def of(memory, kind):
    return unpack(kind, memory.bytes())


LAYOUTS = [Layout([3, 7, 10]), Layout([3, 7, 10], True)]


def unary():
    cdf = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))
    functions = {
        "copy": lambda x: x, "neg": lambda x: -x, "recip": lambda x: 1 / x, "exp": math.exp, "sin": math.sin, "cos": math.cos,
        "tanh": math.tanh, "erf": math.erf, "ceil": math.ceil, "floor": math.floor, "round": lambda x: math.copysign(math.floor(abs(x) + 0.5), x),
        "normcdf": cdf, "abs": abs, "sqr": lambda x: x * x, "relu": lambda x: max(x, 0), "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_erf": lambda x: x * cdf(x), "sigmoid": lambda x: 1 / (1 + math.exp(-x)), "sign": lambda x: (x > 0) - (x < 0),
        "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan, "log": lambda x: math.log(x) if x > 0 else math.nan,
    }  # fmt: skip
    for kind in ROUNDING:
        # several roundings where a formula is in 16 bits
        bound = ROUNDING[kind] * (8 if kind in ("f32", "f64") else 4)
        for layout in LAYOUTS:
            x = rounded(kind, [random.gauss(0, 2) for _ in range(layout.size)])
            source, shape = Memory(pack(kind, x)), info(layout)
            for name, function in functions.items():
                to = result(kind, layout.size)
                run(f"u{name}_{kind}", [("u64", layout.size), ("u64", 3), shape, source, to], layout.size)
                check(of(to, kind), [function(x[i]) for i in layout.places()], bound, f"u{name}_{kind} {layout.strides}")
            for name, parameter, function in (
                ("elu", 0.5, lambda x: x if x > 0 else 0.5 * math.expm1(x)),
                ("powf", 3.0, lambda x: x**3),
            ):
                to = result(kind, layout.size)
                value = ("u16", to_bf16(parameter)) if kind == "bf16" else (kind, parameter)
                run(f"u{name}_{kind}", [("u64", layout.size), ("u64", 3), shape, value, source, to], layout.size)
                check(of(to, kind), [function(x[i]) for i in layout.places()], bound, f"u{name}_{kind} {layout.strides}")
        # large arguments: the sine's slow path
        if kind in ("f32", "f64"):
            x = rounded(kind, [1e3, -7e5, 1e7, 3e10])
            for name, function in (("sin", math.sin), ("cos", math.cos)):
                to = result(kind, 4)
                run(f"u{name}_{kind}", [("u64", 4), ("u64", 0), None, Memory(pack(kind, x)), to], 4)
                check(of(to, kind), [function(v) for v in x], bound, f"u{name}_{kind} of large numbers")


def binary():
    arithmetic = {"badd": lambda a, b: a + b, "bsub": lambda a, b: a - b, "bmul": lambda a, b: a * b}
    arithmetic.update({"bmaximum": max, "bminimum": min})
    compare = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b}
    compare.update({"gt": lambda a, b: a > b, "ge": lambda a, b: a >= b})
    for kind in [*ROUNDING, "u8", "u32", "i64"]:
        width = 8 * {"u8": 1, "u32": 4, "i64": 8}.get(kind, 0)
        for a_layout in LAYOUTS:
            for b_layout in LAYOUTS:
                draw = (
                    (lambda: random.choice([-1, 1]) * random.randint(1, 24) / 8)
                    if not width
                    else (lambda: random.randint(1, 12))
                )
                x, y = ([draw() for _ in range(a_layout.size)] for _ in "xy")
                operands = [Memory(pack(kind, x)), Memory(pack(kind, y))]
                pairs = [(x[i], y[j]) for i, j in zip(a_layout.places(), b_layout.places())]
                head = [("u64", a_layout.size), ("u64", 3), info(a_layout, b_layout)]
                for name, function in {**arithmetic, **compare}.items():
                    out = kind if name in arithmetic else "u8"
                    to = result(out, a_layout.size)
                    run(f"{name}_{kind}", head + operands + [to], a_layout.size)
                    expected = [function(*pair) for pair in pairs]
                    if width and out == kind:
                        wrap = 0 if kind == "i64" else (1 << width) - 1
                        expected = [e & wrap if wrap else e for e in expected]
                    check(
                        of(to, out), expected, ROUNDING.get(out, 0), f"{name}_{kind} {a_layout.strides} {b_layout.strides}"
                    )
                to = result(kind, a_layout.size)
                run(f"bdiv_{kind}", head + operands + [to], a_layout.size)
                expected = [a // b if width else a / b for a, b in pairs]
                check(of(to, kind), expected, ROUNDING.get(kind, 0), f"bdiv_{kind}")


def casts():
    kinds = ["bf16", "f16", "f32", "f64", "u8", "u32", "i64"]
    done = 0
    for source in kinds:
        for target in kinds:
            if not LIB.library.kernel_find(f"cast_{source}_{target}".encode()):
                continue
            done += 1
            for layout in LAYOUTS:
                x = rounded(
                    source,
                    [
                        random.randint(0, 200) + (random.choice([0, 0.25, 0.5]) if source in ROUNDING else 0)
                        for _ in range(layout.size)
                    ],
                )
                to = result(target, layout.size)
                run(
                    f"cast_{source}_{target}",
                    [("u64", layout.size), ("u64", 3), info(layout), Memory(pack(source, x)), to],
                    layout.size,
                )
                picked = [x[i] for i in layout.places()]
                expected = rounded(target, picked) if target in ROUNDING else [int(v) for v in picked]
                check(of(to, target), expected, 0, f"cast_{source}_{target} {layout.strides}")
    check([done], [45], 0, "conversions")


def making():
    for kind in [*ROUNDING, "u8", "u32", "i64"]:
        number = lambda x: ("u16", to_bf16(x)) if kind == "bf16" else (kind, x)
        to = result(kind, 100)
        run(f"fill_{kind}", [to, number(5), ("u64", 99)], 99)
        check(of(to, kind), [5] * 99 + [77], 0, f"fill_{kind}")
        x = list(range(1, 61))
        to = result(kind, 80)
        run(f"copy2d_{kind}", [Memory(pack(kind, x)), to, ("u32", 5), ("u32", 6), ("u32", 12), ("u32", 16)], 30)
        expected = [77] * 80
        for row in range(5):
            expected[16 * row : 16 * row + 6] = x[12 * row : 12 * row + 6]
        check(of(to, kind), expected, 0, f"copy2d_{kind}")
        for layout in LAYOUTS:
            n = layout.size
            to = result(kind, n)
            run(f"const_set_{kind}", [("u64", n), ("u64", 3), info(layout), number(3), to], n)
            check(of(to, kind), [3] * n, 0, f"const_set_{kind}")
            x = rounded(kind, [random.randint(0, 60) for _ in range(n)])
            to = result(kind, n)
            run(f"affine_{kind}", [("u64", n), ("u64", 3), info(layout), Memory(pack(kind, x)), to, number(3), number(2)], n)
            check(
                of(to, kind),
                [3 * x[i] + 2 for i in layout.places()],
                ROUNDING.get(kind, 0),
                f"affine_{kind} {layout.strides}",
            )
            y, ids = rounded(kind, [random.randint(0, 60) for _ in range(n)]), [random.randint(0, 1) for _ in range(n)]
            for index in ("u8", "u32", "i64"):
                to = result(kind, n)
                operands = [Memory(pack(index, ids)), Memory(pack(kind, x)), Memory(pack(kind, y)), to]
                run(f"where_{index}_{kind}", [("u64", n), ("u64", 3), info(layout, layout, LAYOUTS[0])] + operands, n)
                expected = [x[i] if ids[i] else y[j] for i, j in zip(layout.places(), LAYOUTS[0].places())]
                check(of(to, kind), expected, 0, f"where_{index}_{kind} {layout.strides}")


def indexing():
    left, dim, right, picks = 3, 7, 10, 5
    for kind in [*ROUNDING, "u8", "u32", "i64"]:
        for index in ("u8", "u32", "i64"):
            ids = [random.randrange(dim) for _ in range(picks)]
            sizes = [("u64", left), ("u64", dim), ("u64", picks), ("u64", right)]
            n = left * picks * right
            for layout in LAYOUTS:
                x = rounded(kind, [random.randint(0, 99) for _ in range(layout.size)])
                places = layout.places()
                to = result(kind, n)
                head = [("u64", n), ("u64", 3), info(layout), Memory(pack(index, ids)), Memory(pack(kind, x)), to]
                run(f"is_{index}_{kind}", head + sizes, n)
                expected = [x[places[(a * dim + i) * right + c]] for a in range(left) for i in ids for c in range(right)]
                check(of(to, kind), expected, 0, f"is_{index}_{kind} {layout.strides}")
            x = rounded(kind, [random.randint(0, 9) for _ in range(n)])
            to = Memory(pack(kind, [1] * (left * dim * right)))
            head = [Memory(pack(index, ids)), ("u64", picks), Memory(pack(kind, x)), to]
            run(f"ia_{index}_{kind}", head + [("u64", left), ("u64", picks), ("u64", dim), ("u64", right)], left * right)
            expected = [1] * (left * dim * right)
            for a in range(left):
                for j, i in enumerate(ids):
                    for c in range(right):
                        expected[(a * dim + i) * right + c] += x[(a * picks + j) * right + c]
            check(of(to, kind), expected, 0, f"ia_{index}_{kind}")
            x = rounded(kind, [random.randint(0, 99) for _ in range(left * dim * right)])
            ids = [random.randrange(dim) for _ in range(n)]
            to = result(kind, n)
            run(f"gather_{index}_{kind}", [("u64", n), Memory(pack(index, ids)), Memory(pack(kind, x)), to] + sizes, n)
            expected = [
                x[(a * dim + ids[(a * picks + j) * right + c]) * right + c]
                for a in range(left)
                for j in range(picks)
                for c in range(right)
            ]
            check(of(to, kind), expected, 0, f"gather_{index}_{kind}")
    try:
        run(
            "is_u32_f32",
            [
                ("u64", 1),
                ("u64", 1),
                Memory(pack("u64", [4, 1])),
                Memory(pack("u32", [4])),
                Memory(bytes(16)),
                Memory(bytes(4)),
            ]
            + [("u64", 1), ("u64", 4), ("u64", 1), ("u64", 1)],
            1,
        )
        check([0], [1], 0, "an index that is too large is an error")
    except Failed as failed:
        check([int("ids[id_i] < src_dim_size" in str(failed))], [1], 0, str(failed))


def sums():
    functions = {
        "sum": sum,
        "min": min,
        "max": max,
        "argmin": lambda x: x.index(min(x)),
        "argmax": lambda x: x.index(max(x)),
    }
    for kind in [*ROUNDING, "u8", "u32", "i64"]:
        for layout in (Layout([6, 5, 8]), Layout([6, 5, 8], True), Layout([2, 5, 40])):
            rows, count = layout.shape[0], layout.shape[1] * layout.shape[2]
            x = rounded(
                kind,
                (
                    random.sample(range(0, 256), layout.size)
                    if layout.size <= 256
                    else [random.randint(0, 8) for _ in range(layout.size)]
                ),
            )
            if kind == "u8":
                x = [v % 6 for v in x]
            ordered = [x[i] for i in layout.places()]
            for name, function in functions.items():
                if name.startswith("arg") and len(set(ordered)) < len(ordered):
                    continue
                out = "u32" if name.startswith("arg") else kind
                for threads in (64, 256):
                    to = result(out, rows)
                    head = [("u64", layout.size), ("u64", count), ("u64", 3), info(layout), Memory(pack(kind, x)), to]
                    LIB.run(f"fast_{name}_{kind}", head, grid=(rows, 1, 1), block=(threads, 1, 1))
                    expected = [function(ordered[row * count : (row + 1) * count]) for row in range(rows)]
                    # sums of f16 are rounded at every step; a place is one in the last dimension
                    bound = 0 if out == "u32" else ROUNDING.get(kind, 0) * (1 if kind != "f16" else 8)
                    if name.startswith("arg"):
                        expected = [e % layout.shape[2] for e in expected]
                    check(
                        of(to, out),
                        [e % 256 if kind == "u8" else e for e in expected],
                        bound,
                        f"fast_{name}_{kind} {layout.shape} {layout.strides}",
                    )


def main():
    global LIB
    LIB = Library(sys.argv[1])
    for part in (unary, binary, casts, making, indexing, sums):
        part()
    print(f"candle: {CHECKS} checks, {FAILURES} failed")
    sys.exit(FAILURES > 0)


main()
