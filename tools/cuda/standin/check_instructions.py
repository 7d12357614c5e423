#!/usr/bin/env python3
"""Instruction by instruction: PTX written here, translated, run, and compared with exact arithmetic in Python.

check_instructions.py FOLDER        a folder for what is made; needs g++
"""

import math
import os
import random
import struct
import subprocess
import sys
from fractions import Fraction

import library
from library import Failed, Library, Memory

HERE = os.path.dirname(os.path.abspath(__file__))
random.seed(1)
SIZES = {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4}
SIZES.update({kind + str(8 * size): size for kind in "bsu" for size in (1, 2, 4, 8)})
# significand bits and the exponent of the smallest subnormal number
FLOATS = {"f16": (11, -24, 15), "bf16": (8, -133, 127), "f32": (24, -149, 127), "f64": (53, -1074, 1023)}


# --- numbers as bits


def value(kind, bits):
    """The Fraction of a float's bits, or inf, -inf, nan as float."""
    p, low, top = FLOATS[kind]
    width = 8 * SIZES[kind]
    sign = -1 if bits >> (width - 1) else 1
    exponent, rest = bits >> (p - 1) & ((1 << (width - p)) - 1), bits & ((1 << (p - 1)) - 1)
    if exponent == (1 << (width - p)) - 1:
        return float("nan") if rest else sign * float("inf")
    if exponent == 0:
        return sign * Fraction(rest) * Fraction(2) ** low
    return sign * Fraction(rest + (1 << (p - 1))) * Fraction(2) ** (low + exponent - 1)


def negative(kind, bits):
    return bits >> (8 * SIZES[kind] - 1) == 1


def encode(kind, x, mode="rn", zero_sign=False):
    """The bits of a Fraction, rounded; `zero_sign` is the sign of an exact zero."""
    p, low, top = FLOATS[kind]
    width = 8 * SIZES[kind]
    sign = zero_sign if x == 0 else x < 0
    x = abs(x)
    exponent = low
    if x:
        exponent = max(low, x.numerator.bit_length() - x.denominator.bit_length() - p)
        while x >= Fraction(2) ** (exponent + p):
            exponent += 1
        while exponent > low and x < Fraction(2) ** (exponent + p - 1):
            exponent -= 1
    scaled = x / Fraction(2) ** exponent
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": False,
        "rm": sign and rest > 0,
        "rp": not sign and rest > 0,
    }[mode]
    whole += up
    if whole == 1 << p:
        whole >>= 1
        exponent += 1
    infinity = ((1 << (width - p)) - 1) << (p - 1)
    if exponent + p - 1 > top:
        to_infinity = mode == "rn" or (mode == "rm" and sign) or (mode == "rp" and not sign)
        magnitude = infinity if to_infinity else infinity - 1
    elif whole < 1 << (p - 1):
        magnitude = whole
    else:
        magnitude = (exponent - low + 1) << (p - 1) | (whole - (1 << (p - 1)))
    return magnitude | sign << (width - 1)


def is_nan(kind, bits):
    return isinstance(value(kind, bits), float) and value(kind, bits) != value(kind, bits)


def signed(bits, width):
    return bits - (1 << width) if bits >> (width - 1) else bits


def integer(kind, bits):
    width = 8 * SIZES[kind]
    return signed(bits & ((1 << width) - 1), width) if kind[0] == "s" else bits & ((1 << width) - 1)


# --- inputs


def samples(kind, n):
    width = 8 * SIZES[kind]
    if kind == "pred":
        return [random.getrandbits(1) for _ in range(n)]
    if kind in ("f16x2", "bf16x2"):
        halves = samples(kind[:-2], 2 * n)
        random.shuffle(halves)
        return [halves[2 * i] | halves[2 * i + 1] << 16 for i in range(n)]
    out = []
    if kind in FLOATS:
        p = FLOATS[kind][0]
        infinity = ((1 << (width - p)) - 1) << (p - 1)
        special = [0, 1, infinity, infinity - 1, infinity + 1, 1 << (p - 1), (1 << (p - 1)) - 1]
        special += [encode(kind, Fraction(x)) for x in (1, 2, 3, Fraction(1, 2), Fraction(3, 2), 100, 65504, Fraction(1, 3))]
        special += [s | 1 << (width - 1) for s in special]
        for _ in range(n):
            if random.random() < 0.3:
                out.append(random.choice(special))
            elif random.random() < 0.6:
                x = Fraction(random.getrandbits(60) - (1 << 59), 1 << 56) * Fraction(2) ** random.choice([0, 0, 3, -3, 20])
                out.append(encode(kind, x))
            else:
                out.append(random.getrandbits(width))
        return out
    special = [0, 1, 2, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1, 31, 32, 33, 63, 64]
    for _ in range(n):
        out.append(
            random.choice(special) & ((1 << width) - 1)
            if random.random() < 0.3
            else random.getrandbits(width) >> random.choice([0, 0, width // 2])
        )
    return out


# --- the table: instruction, types of its operands and of its result, the result's bits from those of the operands

CASES = []  # (text, kinds, result kind, function or None, given inputs)


def case(text, kinds, result, function, inputs=None):
    CASES.append((text, kinds, result, function, inputs))


def exact(kind, function, mode="rn", zero=lambda *bits: False, ftz=False, sat=False):
    """A float operation by exact arithmetic; None where the operands are not finite (not compared)."""

    def compute(*bits):
        if ftz:
            bits = [
                b if abs(value(kind, b)) >= Fraction(2) ** -126 or value(kind, b) != value(kind, b) else b & 1 << 31
                for b in bits
            ]
        values = [value(kind, b) for b in bits]
        if any(isinstance(v, float) for v in values):
            return None
        x = function(*values)
        if x is None:
            return None
        result = encode(kind, x, mode, zero(*bits))
        if (
            ftz
            and value(kind, result) != 0
            and not isinstance(value(kind, result), float)
            and abs(value(kind, result)) < Fraction(2) ** -126
        ):
            result &= 1 << 31
        if sat:
            v = value(kind, result)
            result = 0 if v <= 0 else encode(kind, Fraction(1)) if v >= 1 else result
        return result

    return compute


def sum_sign(mode):
    def zero(*bits):
        signs = {negative("f64" if b > 0xFFFFFFFF else "f32", b) for b in bits}
        return signs, mode

    return zero


def zero_of_sum(kind, mode):
    """The sign of an exact zero sum: that of both, else + (- towards minus infinity)."""

    def zero(a, b):
        x, y = negative(kind, a), negative(kind, b)
        return x if x == y else mode == "rm"

    return zero


def zero_of_product(kind):
    return lambda a, b: negative(kind, a) != negative(kind, b)


def root(kind, mode):
    def compute(bits):
        x = value(kind, bits)
        if isinstance(x, float) or x < 0:
            return None
        if x == 0:
            return bits
        # enough bits of the root, and a sticky one
        shift = 2 * 1200
        scaled = x * (1 << shift)
        whole = math.isqrt(scaled.numerator // scaled.denominator)
        approximation = Fraction(whole, 1 << shift // 2)
        if approximation * approximation != x:
            approximation += Fraction(1, 1 << (shift // 2 + 1))
        return encode(kind, approximation, mode)

    return compute


def add_float_cases():
    for kind in ("f32", "f64"):
        for mode in ("rn", "rz", "rm", "rp"):
            case(f"add.{mode}.{kind}", [kind] * 2, kind, exact(kind, lambda a, b: a + b, mode, zero_of_sum(kind, mode)))
            case(
                f"sub.{mode}.{kind}",
                [kind] * 2,
                kind,
                exact(
                    kind,
                    lambda a, b: a - b,
                    mode,
                    lambda a, b, k=kind, m=mode: zero_of_sum(k, m)(a, b ^ 1 << (8 * SIZES[k] - 1)),
                ),
            )
            case(f"mul.{mode}.{kind}", [kind] * 2, kind, exact(kind, lambda a, b: a * b, mode, zero_of_product(kind)))

            def fma_zero(a, b, c, k=kind, m=mode):
                x, y = negative(k, a) != negative(k, b), negative(k, c)
                return x if x == y else m == "rm"

            case(f"fma.{mode}.{kind}", [kind] * 3, kind, exact(kind, lambda a, b, c: a * b + c, mode, fma_zero))
        case(f"div.rn.{kind}", [kind] * 2, kind, exact(kind, lambda a, b: a / b if b else None, "rn", zero_of_product(kind)))
        case(f"rcp.rn.{kind}", [kind], kind, exact(kind, lambda a: 1 / a if a else None))
        case(f"sqrt.rn.{kind}", [kind], kind, root(kind, "rn"))
    f32 = lambda function, **rest: exact("f32", function, **rest)
    case("add.ftz.f32", ["f32"] * 2, "f32", f32(lambda a, b: a + b, zero=zero_of_sum("f32", "rn"), ftz=True))
    case("mul.ftz.f32", ["f32"] * 2, "f32", f32(lambda a, b: a * b, zero=zero_of_product("f32"), ftz=True))
    case("add.sat.f32", ["f32"] * 2, "f32", f32(lambda a, b: a + b, sat=True))
    case("rcp.approx.ftz.f32", ["f32"], "f32", f32(lambda a: 1 / a if a else None, ftz=True))
    for kind in ("f16", "bf16"):

        def fma_zero(a, b, c, k=kind):
            x, y = negative(k, a) != negative(k, b), negative(k, c)
            return x if x == y else False

        fma = exact(kind, lambda a, b, c: a * b + c, "rn", fma_zero)
        case(f"fma.rn.{kind}", [kind] * 3, kind, fma)
        halves = lambda function: lambda *bits: pair(*[function(*[b >> s & 0xFFFF for b in bits]) for s in (0, 16)])
        pair = lambda low, high: None if low is None or high is None else low | high << 16
        case(f"fma.rn.{kind}x2", [kind + "x2"] * 3, kind + "x2", halves(fma))
        case(f"add.{kind}", [kind] * 2, kind, exact(kind, lambda a, b: a + b, "rn", zero_of_sum(kind, "rn")))
        case(
            f"sub.{kind}",
            [kind] * 2,
            kind,
            exact(kind, lambda a, b: a - b, "rn", lambda a, b, k=kind: zero_of_sum(k, "rn")(a, b ^ 0x8000)),
        )
        case(f"mul.{kind}", [kind] * 2, kind, exact(kind, lambda a, b: a * b, "rn", zero_of_product(kind)))
        case(f"neg.{kind}x2", [kind + "x2"], kind + "x2", lambda a: a ^ 0x80008000)
        case(f"abs.{kind}", [kind], kind, lambda a: a & 0x7FFF)

    for kind in ("f16", "bf16", "f32", "f64"):

        def extreme(largest, nan, k=kind):
            def compute(a, b):
                x, y = value(k, a), value(k, b)
                quiet = encode(k, Fraction(1)) if k == "" else (1 << (8 * SIZES[k] - 1)) - 1
                if is_nan(k, a) or is_nan(k, b):
                    return quiet if nan or (is_nan(k, a) and is_nan(k, b)) else b if is_nan(k, a) else a
                if x == y:
                    return (a if not negative(k, a) else b) if largest else (a if negative(k, a) else b)
                return (a if x > y else b) if largest else (a if x < y else b)

            return compute

        case(f"min.{kind}", [kind] * 2, kind, extreme(False, False))
        case(f"max.{kind}", [kind] * 2, kind, extreme(True, False))
        if kind != "f64":
            case(f"min.NaN.{kind}", [kind] * 2, kind, extreme(False, True))
            case(f"max.NaN.{kind}", [kind] * 2, kind, extreme(True, True))
    for kind in ("f32", "f64"):
        top = 1 << (8 * SIZES[kind] - 1)
        case(f"copysign.{kind}", [kind] * 2, kind, lambda a, b, t=top: b & ~t | a & t)
        case(f"neg.{kind}", [kind], kind, lambda a, t=top: a ^ t)
        case(f"abs.{kind}", [kind], kind, lambda a, t=top: a & ~t)


def add_comparison_cases():
    compare = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b}
    compare.update({"gt": lambda a, b: a > b, "ge": lambda a, b: a >= b})
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        for how, function in compare.items():
            case(
                f"setp.{how}.{kind}",
                [kind] * 2,
                "pred",
                lambda a, b, f=function, k=kind: int(f(integer(k, a), integer(k, b))),
            )
    for how, like in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
        case(f"setp.{how}.u32", ["u32"] * 2, "pred", lambda a, b, f=compare[like]: int(f(a, b)))
    for kind in ("f16", "bf16", "f32", "f64"):

        def ordered(function, unordered, k=kind):
            def compute(a, b):
                return int(unordered) if is_nan(k, a) or is_nan(k, b) else int(function(value(k, a), value(k, b)))

            return compute

        for how, function in compare.items():
            case(f"setp.{how}.{kind}", [kind] * 2, "pred", ordered(function, False))
            case(f"setp.{how}u.{kind}", [kind] * 2, "pred", ordered(function, True))
        case(f"setp.num.{kind}", [kind] * 2, "pred", ordered(lambda a, b: True, False))
        case(f"setp.nan.{kind}", [kind] * 2, "pred", ordered(lambda a, b: False, True))
    nan = lambda a, b: is_nan("f32", a) or is_nan("f32", b)
    case(
        "set.gt.f32.f32",
        ["f32"] * 2,
        "f32",
        lambda a, b: 0x3F800000 if not nan(a, b) and value("f32", a) > value("f32", b) else 0,
    )
    case(
        "set.eq.u32.f32",
        ["f32"] * 2,
        "u32",
        lambda a, b: 0xFFFFFFFF if not nan(a, b) and value("f32", a) == value("f32", b) else 0,
    )
    case(
        "setp.lt.and.s32 $d, $0, $1, $2",
        ["s32", "s32", "pred"],
        "pred",
        lambda a, b, p: int(integer("s32", a) < integer("s32", b) and p),
    )
    case(
        "setp.lt.or.s32 $d, $0, $1, !$2",
        ["s32", "s32", "pred"],
        "pred",
        lambda a, b, p: int(integer("s32", a) < integer("s32", b) or not p),
    )
    case(
        "setp.lt.s32 $d|%p9, $0, $1; @%p9 xor.pred $d, $d, $d",
        ["s32", "s32"],
        "pred",
        lambda a, b: int(integer("s32", a) < integer("s32", b)),
    )
    case(
        "setp.lt.xor.s32 %p9|$d, $0, $1, $2",
        ["s32", "s32", "pred"],
        "pred",
        lambda a, b, p: int(integer("s32", a) >= integer("s32", b)) ^ p,
    )
    case("selp.b64 $d, $0, $1, $2", ["b64", "b64", "pred"], "b64", lambda a, b, p: a if p else b)
    case("selp.f32 $d, $0, $1, $2", ["f32", "f32", "pred"], "f32", lambda a, b, p: a if p else b)


def add_integer_cases():
    for width in (16, 32, 64):
        mask = (1 << width) - 1
        for sign in "us":
            kind = sign + str(width)
            number = lambda bits, k=kind: integer(k, bits)
            for name, function in {
                "add": lambda a, b: a + b,
                "sub": lambda a, b: a - b,
                "mul.lo": lambda a, b: a * b,
                "min": min,
                "max": max,
            }.items():
                case(f"{name}.{kind}", [kind] * 2, kind, lambda a, b, f=function, n=number, m=mask: f(n(a), n(b)) & m)
            case(f"mul.hi.{kind}", [kind] * 2, kind, lambda a, b, n=number, m=mask, w=width: n(a) * n(b) >> w & m)
            case(f"mad.lo.{kind}", [kind] * 3, kind, lambda a, b, c, m=mask: a * b + c & m)
            case(
                f"mad.hi.{kind}", [kind] * 3, kind, lambda a, b, c, n=number, m=mask, w=width: (n(a) * n(b) >> w) + n(c) & m
            )
            if width < 64:
                wide = sign + str(2 * width)
                case(
                    f"mul.wide.{kind}", [kind] * 2, wide, lambda a, b, n=number, m=mask, w=width: n(a) * n(b) & (m << w | m)
                )
                case(
                    f"mad.wide.{kind}",
                    [kind, kind, wide],
                    wide,
                    lambda a, b, c, n=number, m=mask, w=width: n(a) * n(b) + c & (m << w | m),
                )

            def quotient(a, b, n=number, m=mask):
                x, y = n(a), n(b)
                if y == 0:
                    return None
                q = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
                return q & m

            def rest(a, b, n=number, m=mask):
                x, y = n(a), n(b)
                if y == 0:
                    return None
                return abs(x) % abs(y) * (-1 if x < 0 else 1) & m

            case(f"div.{kind}", [kind] * 2, kind, quotient)
            case(f"rem.{kind}", [kind] * 2, kind, rest)
            case(f"shr.{kind}", [kind, "u32"], kind, lambda a, by, n=number, m=mask, w=width: n(a) >> min(by, w) & m)
        number = lambda bits, k="s" + str(width): integer(k, bits)
        case(f"shl.b{width}", [f"b{width}", "u32"], f"b{width}", lambda a, by, m=mask, w=width: a << min(by, w) & m)
        case(f"neg.s{width}", [f"s{width}"], f"s{width}", lambda a, m=mask: -a & m)
        case(f"abs.s{width}", [f"s{width}"], f"s{width}", lambda a, n=number, m=mask: abs(n(a)) & m)
        case(f"and.b{width}", [f"b{width}"] * 2, f"b{width}", lambda a, b: a & b)
        case(f"or.b{width}", [f"b{width}"] * 2, f"b{width}", lambda a, b: a | b)
        case(f"xor.b{width}", [f"b{width}"] * 2, f"b{width}", lambda a, b: a ^ b)
        case(f"not.b{width}", [f"b{width}"], f"b{width}", lambda a, m=mask: ~a & m)
    for name, function in {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}.items():
        case(f"{name}.pred", ["pred"] * 2, "pred", function)
    case("not.pred", ["pred"], "pred", lambda a: 1 - a)
    for width in (32, 64):
        mask = (1 << width) - 1
        case(f"clz.b{width}", [f"b{width}"], "u32", lambda a, w=width: w - a.bit_length())
        case(f"popc.b{width}", [f"b{width}"], "u32", lambda a: bin(a).count("1"))
        case(f"brev.b{width}", [f"b{width}"], f"b{width}", lambda a, w=width: int(format(a, f"0{w}b")[::-1], 2))
        case(f"bfind.u{width}", [f"u{width}"], "u32", lambda a: (a.bit_length() - 1) & 0xFFFFFFFF)
        case(
            f"bfind.shiftamt.s{width}",
            [f"s{width}"],
            "u32",
            lambda a, w=width: (
                (lambda x: 0xFFFFFFFF if x == 0 else w - x.bit_length())(a if not a >> (w - 1) else ~a & ((1 << w) - 1))
            ),
        )

        def insert(a, b, c, d, w=width):
            at, length = c & 0xFF, d & 0xFF
            for i in range(length):
                if at + i < w:
                    b = b & ~(1 << (at + i)) | (a >> i & 1) << (at + i) if i < w else b
            return b

        case(f"bfi.b{width}", [f"b{width}", f"b{width}", "u32", "u32"], f"b{width}", insert)
        for sign in "us":

            def extract(a, b, c, w=width, s=sign):
                at, length = b & 0xFF, c & 0xFF
                top = 0
                if s == "s" and length:
                    top = a >> min(at + length - 1, w - 1) & 1
                out = 0
                for i in range(w):
                    out |= (a >> (at + i) & 1 if i < length and at + i < w else top) << i
                return out

            case(f"bfe.{sign}{width}", [f"{sign}{width}", "u32", "u32"], f"{sign}{width}", extract)
    case("shr.s32 $d, $0, 33", ["s32"], "s32", lambda a: 0xFFFFFFFF if a >> 31 else 0)

    def permuted(a, b, s):
        both, out = b << 32 | a, 0
        for i in range(4):
            pick = s >> 4 * i & 15
            byte = both >> 8 * (pick & 7) & 0xFF
            out |= (byte if pick < 8 else 0xFF * (byte >> 7)) << 8 * i
        return out

    case("prmt.b32", ["b32"] * 3, "b32", permuted)
    for table in (0x00, 0x96, 0xE8, 0x6A, 0xFF, 0x1B):

        def lookup(a, b, c, t=table):
            return sum((t >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

        case(f"lop3.b32 $d, $0, $1, $2, {table:#x}", ["b32"] * 3, "b32", lookup)
    for how in ("wrap", "clamp"):
        by = lambda c, h=how: c & 31 if h == "wrap" else min(c, 32)
        case(f"shf.l.{how}.b32", ["b32"] * 3, "b32", lambda a, b, c, by=by: (b << 32 | a) << by(c) >> 32 & 0xFFFFFFFF)
        case(f"shf.r.{how}.b32", ["b32"] * 3, "b32", lambda a, b, c, by=by: (b << 32 | a) >> by(c) & 0xFFFFFFFF)
    halves = "{{ .reg .b32 l0,h0,l1,h1; mov.b64 {{l0,h0}}, $0; mov.b64 {{l1,h1}}, $1; {} mov.b64 $d, {{l0,h0}}; }}"
    case(halves.format("add.cc.u32 l0,l0,l1; addc.u32 h0,h0,h1;"), ["b64"] * 2, "b64", lambda a, b: a + b & (1 << 64) - 1)
    case(halves.format("sub.cc.u32 l0,l0,l1; subc.u32 h0,h0,h1;"), ["b64"] * 2, "b64", lambda a, b: a - b & (1 << 64) - 1)
    case(
        halves.format("mad.lo.cc.u32 l0,l0,l1,h0; madc.hi.u32 h0,h0,l1,h1;"),
        ["b64"] * 2,
        "b64",
        lambda a, b: (
            lambda l0, h0, l1, h1: (
                s := (l0 * l1 & 0xFFFFFFFF) + h0,
                s & 0xFFFFFFFF | ((h0 * l1 >> 32) + h1 + (s >> 32) & 0xFFFFFFFF) << 32,
            )[1]
        )(a & 0xFFFFFFFF, a >> 32, b & 0xFFFFFFFF, b >> 32),
    )
    case("mov.b64 $d, {$0, $1}", ["b32"] * 2, "b64", lambda a, b: b << 32 | a)
    case("mov.b32 $d, {$0, $1}", ["b16"] * 2, "b32", lambda a, b: b << 16 | a)
    case("mov.b32 $d, {0, $0}", ["b16"], "f32", lambda a: a << 16)
    case("{ .reg .b16 low; mov.b32 {low, $d}, $0; }", ["f32"], "b16", lambda a: a >> 16)


def add_conversion_cases():
    kinds = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
    for target in kinds:
        for source in kinds:
            if target == source:
                continue
            mask = (1 << 8 * SIZES[target]) - 1
            case(f"cvt.{target}.{source}", [source], target, lambda a, s=source, m=mask: integer(s, a) & m)
            low = -(1 << 8 * SIZES[target] - 1) if target[0] == "s" else 0
            case(
                f"cvt.sat.{target}.{source}",
                [source],
                target,
                lambda a, s=source, m=mask, low=low: max(low, min(low + m, integer(s, a))) & m,
            )
    rounding = {"rni": lambda x: round(x), "rzi": lambda x: int(x), "rmi": math.floor, "rpi": math.ceil}
    for source in ("f16", "f32", "f64"):
        for how, function in rounding.items():
            for target in kinds:
                width = 8 * SIZES[target]
                low = -(1 << width - 1) if target[0] == "s" else 0

                def to_integer(bits, k=source, t=target, f=function, w=width, low=low):
                    x = value(k, bits)
                    if x != x:
                        return 1 << (w - 1) if k == "f64" or w == 64 else 0
                    if isinstance(x, float):
                        x = 2**70 if x > 0 else -(2**70)
                    return max(low, min(low + (1 << w) - 1, f(x))) & ((1 << w) - 1)

                case(f"cvt.{how}.{target}.{source}", [source], target, to_integer)

            def whole(bits, k=source, f=function):
                x = value(k, bits)
                return (
                    None
                    if isinstance(x, float)
                    else encode(k, Fraction(f(x)), "rn", negative(k, bits)) if f(x) == 0 else encode(k, Fraction(f(x)))
                )

            case(f"cvt.{how}.{source}.{source}", [source], source, whole)
    for target in ("f32", "f64"):
        for source in kinds:
            for mode in ("rn", "rz", "rm", "rp"):
                case(
                    f"cvt.{mode}.{target}.{source}",
                    [source],
                    target,
                    lambda a, s=source, t=target, m=mode: encode(t, Fraction(integer(s, a)), m),
                )
    for source in kinds:
        case(f"cvt.rn.f16.{source}", [source], "f16", lambda a, s=source: encode("f16", Fraction(integer(s, a))))

    def between(target, source, mode="rn"):
        def compute(bits):
            x = value(source, bits)
            width, p = 8 * SIZES[target], FLOATS[target][0]
            if x != x:
                return (1 << (width - 1)) - 1
            if isinstance(x, float):
                return (((1 << (width - p)) - 1) << (p - 1)) | (x < 0) << (width - 1)
            return encode(target, x, mode, negative(source, bits))

        return compute

    for mode in ("rn", "rz", "rm", "rp"):
        case(f"cvt.{mode}.f32.f64", ["f64"], "f32", between("f32", "f64", mode))
    for text in ("f64.f32", "f32.f16", "f32.bf16", "f64.f16"):
        target, source = text.split(".")
        case(f"cvt.{text}", [source], target, between(target, source))
    for text in ("f16.f32", "bf16.f32", "f16.f64", "bf16.f64"):
        target, source = text.split(".")
        case(f"cvt.rn.{text}", [source], target, between(target, source))
    for kind in ("f16", "bf16"):
        case(f"cvt.rn.{kind}x2.f32", ["f32"] * 2, kind + "x2", lambda a, b, c=between(kind, "f32"): c(a) << 16 | c(b))

    def saturated(bits):
        x = value("f32", bits)
        return 0 if x != x or x <= 0 else 0x3F800000 if x >= 1 else bits

    case("cvt.sat.f32.f32", ["f32"], "f32", saturated)


def add_approximate_cases():
    # to a unit in the last place of f32 or so
    near = lambda function: lambda a: (function, a)
    inputs = [
        struct.unpack("<I", struct.pack("<f", x))[0] for x in [-20.5, -3.25, -1.0, -0.3, 0.0, 0.1, 0.75, 1.0, 2.5, 9.0, 20.5]
    ]
    positive = [bits for bits in inputs if bits < 1 << 31 and bits]
    case("ex2.approx.ftz.f32", ["f32"], "f32", near(lambda x: 2.0**x), [[b] for b in inputs])
    case("ex2.approx.f32", ["f32"], "f32", near(lambda x: 2.0**x), [[b] for b in inputs])
    case("lg2.approx.ftz.f32", ["f32"], "f32", near(math.log2), [[b] for b in positive])
    case("rsqrt.approx.f32", ["f32"], "f32", near(lambda x: 1 / math.sqrt(x)), [[b] for b in positive])
    case("sqrt.approx.ftz.f32", ["f32"], "f32", near(math.sqrt), [[b] for b in positive])
    case("sin.approx.f32", ["f32"], "f32", near(math.sin), [[b] for b in inputs])
    case("cos.approx.f32", ["f32"], "f32", near(math.cos), [[b] for b in inputs])
    case("tanh.approx.f32", ["f32"], "f32", near(math.tanh), [[b] for b in inputs])
    case("div.approx.f32", ["f32"] * 2, "f32", exact("f32", lambda a, b: a / b if b else None, zero=zero_of_product("f32")))
    case(
        "rcp.approx.ftz.f64",
        ["f64"],
        "f64",
        lambda a: (
            None
            if isinstance(value("f64", a), float) or abs(value("f64", a)) < 1 or abs(value("f64", a)) > 2**900
            else encode("f64", 1 / value("f64", a & ~0xFFFFFFFF)) & ~0xFFFFFFFF
        ),
    )


# --- PTX of a case


def register_type(kind):
    return "pred" if kind == "pred" else {"f32": "f32", "f64": "f64"}.get(kind, f"b{8 * max(2, SIZES[kind])}")


def case_ptx(index, text, kinds, result):
    """A kernel: thread i reads 8 bytes for each operand and writes 8 for the result."""
    lines = [
        f".visible .entry case_{index}(.param .u64 case_{index}_in, .param .u64 case_{index}_out, .param .u32 case_{index}_n)",
        "{",
    ]
    lines.append(".reg .pred %p<10>; .reg .b32 %r<9>; .reg .b64 %rd<9>;")
    for k, kind in enumerate(kinds + [result]):
        lines.append(f".reg .{register_type(kind)} %x{k};")
    lines += [
        f"ld.param.u64 %rd1, [case_{index}_in]; ld.param.u64 %rd2, [case_{index}_out]; ld.param.u32 %r5, [case_{index}_n];",
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x; mad.lo.s32 %r4, %r1, %r2, %r3;",
        "setp.ge.u32 %p1, %r4, %r5; @%p1 bra END;",
        f"mul.wide.u32 %rd3, %r4, {8 * len(kinds)}; add.s64 %rd4, %rd1, %rd3; mul.wide.u32 %rd5, %r4, 8; add.s64 %rd6, %rd2, %rd5;",
    ]
    for k, kind in enumerate(kinds):
        if kind == "pred":
            lines.append(f"ld.global.u32 %r6, [%rd4+{8 * k}]; setp.ne.s32 %x{k}, %r6, 0;")
        else:
            lines.append(
                f"ld.global.{'b' + str(8 * SIZES[kind]) if kind not in ('f32', 'f64') else kind} %x{k}, [%rd4+{8 * k}];"
            )
    operands = [f"%x{k}" for k in range(len(kinds))]
    target = f"%x{len(kinds)}"
    if "$" not in text:
        text += " $d, " + ", ".join(f"${k}" for k in range(len(kinds)))
    for k, operand in enumerate(operands):
        text = text.replace(f"${k}", operand)
    text = text.replace("$d", target)
    lines.append(text if text.startswith("{") else text + ";")
    if result == "pred":
        lines.append(f"selp.u32 %r7, 1, 0, {target}; st.global.u32 [%rd6], %r7;")
    else:
        lines.append(
            f"st.global.{'b' + str(8 * SIZES[result]) if result not in ('f32', 'f64') else result} [%rd6], {target};"
        )
    return "\n".join(lines + ["END: ret;", "}"])


# --- kernels of several instructions

KERNELS = """
.visible .entry vectors(.param .u64 from, .param .u64 to) {
    .reg .f32 %f<5>; .reg .b64 %rd<5>; .reg .b16 %rs<5>; .reg .b32 %r<5>;
    ld.param.u64 %rd1, [from]; ld.param.u64 %rd2, [to]; cvta.to.global.u64 %rd3, %rd1;
    ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd3]; st.global.v2.f32 [%rd2+8], {%f1, %f2}; st.global.v2.f32 [%rd2], {%f3, %f4};
    ld.global.nc.v4.u16 {%rs1, %rs2, %rs3, %rs4}, [%rd1+16]; st.global.v4.u16 [%rd2+16], {%rs4, %rs3, %rs2, %rs1};
    ld.global.s8 %r1, [%rd1+24]; st.global.u32 [%rd2+24], %r1; ld.global.u8 %r2, [%rd1+24]; st.global.u32 [%rd2+28], %r2;
    ret;
}
.visible .entry misaligned(.param .u64 from, .param .u32 by) {
    .reg .f32 %f<5>; .reg .b64 %rd<5>; .reg .b32 %r<3>;
    ld.param.u64 %rd1, [from]; ld.param.u32 %r1, [by]; cvt.u64.u32 %rd2, %r1; add.s64 %rd3, %rd1, %rd2;
    ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd3]; ret;
}
.visible .entry parameters(.param .align 8 .b8 all[24], .param .u64 to, .param .u32 which) {
    .reg .b64 %rd<9>; .reg .b32 %r<5>; .local .align 8 .b8 depot[24]; .reg .b64 %SP; .reg .b64 %SPL;
    mov.u64 %SPL, depot; cvta.local.u64 %SP, %SPL;
    ld.param.u64 %rd1, [all+8]; ld.param.u64 %rd2, [to]; ld.param.u32 %r1, [which]; ld.param.u64 %rd3, [all]; ld.param.u64 %rd4, [all+16];
    st.local.u64 [%SPL], %rd3; st.u64 [%SP+8], %rd1; st.local.u64 [%SPL+16], %rd4;
    mul.wide.u32 %rd5, %r1, 8; add.u64 %rd6, %SP, %rd5; ld.u64 %rd7, [%rd6]; st.global.u64 [%rd2], %rd7; ret;
}
.shared .align 4 .b8 fixed[128];
.extern .shared .align 16 .b8 dynamic[];
.visible .entry shared_reverse(.param .u64 to, .param .u32 at, .param .u32 skip) {
    .reg .pred %p<3>; .reg .b64 %rd<9>; .reg .b32 %r<12>;
    ld.param.u64 %rd1, [to]; ld.param.u32 %r8, [at]; ld.param.u32 %r9, [skip];
    mov.u32 %r1, %tid.x; mov.u32 %r2, fixed; mad.lo.s32 %r3, %r1, 4, %r2; st.shared.u32 [%r3], %r1;
    mov.u32 %r4, dynamic; add.s32 %r4, %r4, %r8; mad.lo.s32 %r5, %r1, 4, %r4; st.shared.u32 [%r5], %r1;
    setp.lt.u32 %p1, %r1, %r9; @%p1 bra AFTER;
    bar.sync 0;
AFTER:
    sub.s32 %r6, 31, %r1; mad.lo.s32 %r3, %r6, 4, %r2; ld.shared.u32 %r7, [%r3];
    mov.u64 %rd2, dynamic; cvta.shared.u64 %rd3, %rd2; mul.wide.u32 %rd4, %r6, 4; add.s64 %rd5, %rd3, %rd4; ld.u32 %r10, [%rd5];
    mad.lo.s32 %r7, %r10, 100, %r7;
    mul.wide.u32 %rd6, %r1, 4; add.s64 %rd7, %rd1, %rd6; st.global.u32 [%rd7], %r7; ret;
}
.visible .entry counted(.param .u64 to) {
    .reg .b64 %rd<3>; .reg .b32 %r<9>; .reg .f32 %f<3>; .reg .pred %p<2>;
    ld.param.u64 %rd1, [to]; mov.u32 %r1, %tid.x; mov.u32 %r5, %ctaid.x;
    atom.global.add.u32 %r2, [%rd1], 2; red.global.add.f32 [%rd1+4], 0f3F000000; atom.global.max.s32 %r3, [%rd1+8], %r1;
    red.global.add.f64 [%rd1+16], 0d3FE0000000000000;
    ld.global.u32 %r6, [%rd1+12];
AGAIN:
    add.u32 %r7, %r6, 3; atom.global.cas.b32 %r8, [%rd1+12], %r6, %r7; setp.eq.u32 %p1, %r8, %r6; mov.u32 %r6, %r8; @!%p1 bra AGAIN;
    ret;
}
.visible .entry stops(.param .u32 at) {
    .reg .pred %p<2>; .reg .b32 %r<3>;
    ld.param.u32 %r1, [at]; mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r1, %r2; @%p1 trap; ret;
}
.visible .entry votes(.param .u64 to, .param .u32 ends) {
    .reg .pred %p<5>; .reg .b64 %rd<5>; .reg .b32 %r<9>;
    ld.param.u64 %rd1, [to]; ld.param.u32 %r5, [ends]; mov.u32 %r1, %tid.x; setp.ge.u32 %p3, %r1, %r5; @%p3 ret;
    and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 1;
    vote.sync.ballot.b32 %r3, %p1, -1; vote.sync.any.pred %p2, %p1, -1; selp.u32 %r4, 1, 0, %p2; vote.sync.all.pred %p2, %p1, -1;
    selp.u32 %r6, 2, 0, %p2; or.b32 %r4, %r4, %r6;
    mul.wide.u32 %rd2, %r1, 8; add.s64 %rd3, %rd1, %rd2; st.global.v2.u32 [%rd3], {%r3, %r4}; ret;
}
.visible .entry copies(.param .u64 to, .param .u64 from, .param .u32 wait) {
    .reg .pred %p<5>; .reg .b64 %rd<9>; .reg .b32 %r<12>;
    ld.param.u64 %rd1, [to]; ld.param.u64 %rd2, [from]; ld.param.u32 %r9, [wait];
    mov.u32 %r1, %tid.x; mov.u32 %r2, dynamic; mad.lo.s32 %r3, %r1, 16, %r2; mul.wide.u32 %rd3, %r1, 16; add.s64 %rd4, %rd2, %rd3;
    setp.lt.u32 %p1, %r1, 16; selp.u32 %r4, 16, 4, %p1;
    cp.async.cg.shared.global [%r3], [%rd4], 16, %r4; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+512], [%rd4], 8; cp.async.commit_group;
    setp.eq.u32 %p2, %r9, 0; @%p2 bra READ;
    cp.async.wait_group 1;
READ:
    ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3];
    ld.shared.u32 %r10, [%r3+512];
    cp.async.wait_group 0;
    add.s64 %rd5, %rd1, %rd3; st.global.v4.u32 [%rd5], {%r5, %r6, %r7, %r8};
    st.global.u32 [%rd5+512], %r10; ld.shared.u32 %r10, [%r3+516]; st.global.u32 [%rd5+516], %r10; ret;
}
.func (.param .b64 result) twice(.param .b64 x) {
    .reg .b64 %rd<3>; ld.param.b64 %rd1, [x]; shl.b64 %rd2, %rd1, 1; st.param.b64 [result+0], %rd2; ret;
}
.visible .entry calls(.param .u64 to) {
    .reg .b64 %rd<5>; .reg .b32 %r<3>; ld.param.u64 %rd1, [to]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 8; add.s64 %rd1, %rd1, %rd2;
    { .reg .b32 temp_param_reg; .param .b64 param0; st.param.b64 [param0+0], %rd2; .param .b64 retval0;
    call.uni (retval0), twice, (param0); ld.param.b64 %rd3, [retval0+0]; }
    st.global.u64 [%rd1], %rd3; ret;
}
.const .align 4 .u32 table[4] = {7, 11, 13, 17};
.visible .entry constants(.param .u64 to) {
    .reg .b64 %rd<5>; .reg .b32 %r<3>; ld.param.u64 %rd1, [to]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
    mov.u64 %rd3, table; add.s64 %rd3, %rd3, %rd2; ld.const.u32 %r2, [%rd3]; st.global.u32 [%rd1], %r2; ret;
}
"""

SHUFFLE = """
.visible .entry shuffle_{name}(.param .u64 from, .param .u64 to) {{
    .reg .pred %p<3>; .reg .b64 %rd<9>; .reg .b32 %r<9>;
    ld.param.u64 %rd1, [from]; ld.param.u64 %rd2, [to]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 8; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
    ld.global.v2.u32 {{%r2, %r3}}, [%rd4]; shfl.sync.{how}.b32 %r4|%p1, %r2, %r3, {c}, -1; selp.u32 %r5, 1, 0, %p1;
    st.global.v2.u32 [%rd5], {{%r4, %r5}}; ret;
}}
"""

MATRICES = """
.visible .entry matrix_{kind}(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d) {{
    .reg .pred %p<3>; .reg .b64 %rd<9>; .reg .b32 %r<20>; .reg .f32 %f<9>;
    ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [c]; ld.param.u64 %rd4, [d]; mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd5, %r1, 16; add.s64 %rd1, %rd1, %rd5; add.s64 %rd3, %rd3, %rd5; add.s64 %rd4, %rd4, %rd5; mul.wide.u32 %rd5, %r1, 8; add.s64 %rd2, %rd2, %rd5;
    ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%rd1]; ld.global.v2.u32 {{%r6, %r7}}, [%rd2]; ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd3];
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%f1,%f2,%f3,%f4}}, {{%r2,%r3,%r4,%r5}}, {{%r6,%r7}}, {{%f1,%f2,%f3,%f4}};
    st.global.v4.f32 [%rd4], {{%f1, %f2, %f3, %f4}}; ret;
}}
"""

LDMATRIX = """
.visible .entry ldmatrix_{trans}(.param .u64 from, .param .u64 to) {{
    .reg .b64 %rd<9>; .reg .b32 %r<20>;
    ld.param.u64 %rd1, [from]; ld.param.u64 %rd2, [to]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd5, %r1, 16; add.s64 %rd1, %rd1, %rd5; add.s64 %rd2, %rd2, %rd5;
    ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%rd1]; mov.u32 %r6, dynamic; mad.lo.s32 %r7, %r1, 16, %r6; st.shared.v4.u32 [%r7], {{%r2, %r3, %r4, %r5}};
    bar.warp.sync -1;
    sub.s32 %r8, 31, %r1; mad.lo.s32 %r7, %r8, 16, %r6;
    ldmatrix.sync.aligned.m8n8.x4{dot}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r7]; st.global.v4.u32 [%rd2], {{%r2, %r3, %r4, %r5}}; ret;
}}
"""
SHUFFLES = {"up": ("up", 0), "down": ("down", 31), "bfly": ("bfly", 31), "idx": ("idx", 31), "bfly8": ("bfly", 0x181F)}
SHUFFLES |= {"down16": ("down", 0x101F), "idx8": ("idx", 0x181F), "up16": ("up", 0x1000), "up5": ("up", 5)}

CHECKS = FAILURES = 0


def check(good, what):
    global CHECKS, FAILURES
    CHECKS += 1
    if not good:
        FAILURES += 1
        if FAILURES < 40:
            print("FAILED", what)


def words(memory, kind="u32"):
    return library.unpack(kind, memory.bytes())


def fails(run, *parts):
    try:
        run()
    except Failed as failed:
        check(all(part in str(failed) for part in parts), f"the error says {parts}: {failed}")
        return
    check(False, f"no error: {parts}")


def check_cases(lib):
    compared = 0
    for index, (text, kinds, result, function, inputs) in enumerate(CASES):
        if inputs is None:
            columns = [samples(kind, 300) for kind in kinds]
            inputs = [list(row) for row in zip(*columns)]
            if len(kinds) == 2 and kinds[0] == kinds[1] and kinds[0] in FLOATS:
                # zeros of both signs, 1, infinity, NaN
                width, p = 8 * SIZES[kinds[0]], FLOATS[kinds[0]][0]
                infinity = ((1 << (width - p)) - 1) << (p - 1)
                edges = [
                    0,
                    1 << (width - 1),
                    encode(kinds[0], Fraction(1)),
                    infinity,
                    infinity | 1 << (width - 1),
                    infinity + 1,
                ]
                inputs += [[a, b] for a in edges for b in edges]
        n = len(inputs)
        source = Memory(library.pack("u64", [bits for row in inputs for bits in row]))
        target = Memory(bytes(8 * n))
        lib.run(f"case_{index}", [source, target, ("u32", n)], grid=((n + 63) // 64, 1, 1), block=(64, 1, 1))
        width = 8 * SIZES[result]
        for row, found in zip(inputs, words(target, "u64")):
            expected = function(*row)
            if expected is None:
                continue
            compared += 1
            if isinstance(expected, tuple):
                y, x = struct.unpack("<f", struct.pack("<I", found))[0], struct.unpack("<f", struct.pack("<I", row[0]))[0]
                good = abs(y - expected[0](x)) <= 3e-7 * abs(expected[0](x)) + 1e-7 * (text[:3] in ("sin", "cos"))
            else:
                good = found & ((1 << width) - 1) == expected
                if result in FLOATS and is_nan(result, expected):
                    good = is_nan(result, found)
            check(
                good,
                f"{text} of {[hex(b) for b in row]}: {found:#x}, not {expected if isinstance(expected, tuple) else hex(expected)}",
            )
    return compared


def check_shuffles(lib):
    for name, (how, c) in SHUFFLES.items():
        values = [random.getrandbits(32) for _ in range(32)]
        lanes = [random.randrange(32) for _ in range(32)]
        if how != "idx":
            lanes = [random.choice([1, 2, 4, 16])] * 32
        source = Memory(library.pack("u32", [x for pair in zip(values, lanes) for x in pair]))
        target = Memory(bytes(256))
        lib.run(f"shuffle_{name}", [source, target])
        found = words(target)
        clamp, segment = c & 31, c >> 8 & 31
        for lane in range(32):
            low = lane & segment
            last = low | clamp & ~segment & 31
            by = lanes[lane]
            at = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | by & ~segment & 31}[how]
            inside = at >= last if how == "up" else at <= last
            check(
                found[2 * lane : 2 * lane + 2] == [values[at if inside else lane], int(inside)], f"shfl {name}, lane {lane}"
            )


def check_matrices(lib):
    for kind in ("bf16", "f16"):
        a = [[Fraction(random.randrange(-16, 17), 8) for _ in range(16)] for _ in range(16)]
        b = [[Fraction(random.randrange(-16, 17), 8) for _ in range(8)] for _ in range(16)]
        c = [[Fraction(random.randrange(-64, 65), 8) for _ in range(8)] for _ in range(16)]
        half = lambda x: encode(kind, x)
        two = lambda x, y: half(x) | half(y) << 16
        fa, fb, fc, expected = [], [], [], []
        for lane in range(32):
            g, t = lane // 4, lane % 4 * 2
            fa += [two(a[g][t], a[g][t + 1]), two(a[g + 8][t], a[g + 8][t + 1])]
            fa += [two(a[g][t + 8], a[g][t + 9]), two(a[g + 8][t + 8], a[g + 8][t + 9])]
            fb += [two(b[t][g], b[t + 1][g]), two(b[t + 8][g], b[t + 9][g])]
            for row, column in ((g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)):
                fc.append(float(c[row][column]))
                expected.append(float(c[row][column] + sum(a[row][k] * b[k][column] for k in range(16))))
        target = Memory(bytes(512))
        lib.run(
            f"matrix_{kind}",
            [Memory(library.pack("u32", fa)), Memory(library.pack("u32", fb)), Memory(library.pack("f32", fc)), target],
        )
        check(words(target, "f32") == expected, f"mma {kind}")
    for trans in ("plain", "trans"):
        halves = [random.getrandbits(16) for _ in range(256)]
        target = Memory(bytes(512))
        lib.run(f"ldmatrix_{trans}", [Memory(library.pack("u16", halves)), target], shared=512)
        found = words(target, "u16")
        for lane in range(32):
            for m in range(4):
                for e in range(2):
                    i, j = (lane // 4, lane % 4 * 2 + e) if trans == "plain" else (lane % 4 * 2 + e, lane // 4)
                    # lane 8 m + i gives row i, and the kernel gives the rows in reverse
                    check(
                        found[8 * lane + 2 * m + e] == halves[8 * (31 - (8 * m + i)) + j],
                        f"ldmatrix {trans}, lane {lane}, matrix {m}",
                    )
    fails(
        lambda: lib.run("ldmatrix_plain", [Memory(bytes(512)), Memory(bytes(512))], block=(16, 1, 1), shared=512),
        "of the whole warp",
    )


def check_kernels(lib):
    data = struct.pack("<4f4H", 1, 2, 3, 4, 5, 6, 7, 8) + bytes([0x80]) + bytes(7)
    target = Memory(bytes(32))
    lib.run("vectors", [Memory(data), target], block=(1, 1, 1))
    check(target.bytes() == struct.pack("<4f4HiI", 3, 4, 1, 2, 8, 7, 6, 5, -128, 128), "vectors")

    source = Memory(bytes(64))
    lib.run("misaligned", [source, ("u32", 16)])
    fails(lambda: lib.run("misaligned", [source, ("u32", 8)]), "misaligned", "16 bytes", "block 0 0 0", "check.ptx:")
    inside = lambda address, size: source.address <= address and address + size <= source.address + source.size
    lib.memory(inside)
    lib.run("misaligned", [source, ("u32", 48)])
    fails(
        lambda: lib.run("misaligned", [source, ("u32", 64)]),
        "memory that is not there",
        hex(source.address + 64),
        "16 bytes",
    )
    lib.memory(None)
    lib.run("misaligned", [source, ("u32", 64)])

    for which in range(3):
        target = Memory(bytes(8))
        numbers = [random.getrandbits(64) for _ in range(3)]
        info = library.Memory(struct.pack("<3Q", *numbers))
        run_with_struct(lib, "parameters", info, target, which)
        check(words(target, "u64") == [numbers[which]], "parameters and local memory")

    for order in (0, 1, 2):
        lib.library.kernel_order(order)
        target = Memory(bytes(128))
        lib.run("shared_reverse", [target, ("u32", 0), ("u32", 0)], shared=128)
        check(words(target) == [101 * (31 - i) for i in range(32)], "shared memory")
        fails(
            lambda: lib.run("shared_reverse", [target, ("u32", 4), ("u32", 0)], shared=128),
            "out of bounds",
            "4 bytes at 256 of 256",
            "thread 31 0 0",
        )
        fails(lambda: lib.run("shared_reverse", [target, ("u32", 2), ("u32", 0)], shared=256), "misaligned", "shared")
        # with dynamic memory of its own behind, nothing is out of bounds
        fails(lambda: lib.run("shared_reverse", [target, ("u32", 0), ("u32", 5)], shared=128), "ended before a barrier")
        target = Memory(bytes(1024))
        source = Memory(library.pack("u32", range(256)))
        lib.run("copies", [target, source, ("u32", 1)], shared=1024)
        found = words(target)
        check(found[:64] == list(range(64)), "cp.async")
        check(
            [found[4 * i : 4 * i + 4] for i in range(16, 32)] == [[4 * i, 0, 0, 0] for i in range(16, 32)],
            "cp.async with zeros",
        )
        late = [4 * i if order == 0 else 0xFFFFFFFF for i in range(32)]
        check([found[128 + 4 * i] for i in range(32)] == late, f"cp.async arrives late in order {order}")
        check([found[129 + 4 * i] for i in range(32)] == [4 * i + 1 for i in range(32)], "cp.async of 8 bytes")
        lib.run("copies", [target, source, ("u32", 0)], shared=1024)
        check((words(target)[0] == 0) == (order == 0), f"a wait that is missing is seen in order {order}")
    lib.library.kernel_order(1)

    target = Memory(bytes(24))
    lib.run("counted", [target], grid=(100, 1, 1), block=(96, 1, 1))
    check(struct.unpack("<IfiId", target.bytes()) == (19200, 4800.0, 95, 28800, 4800.0), "atomics")
    lib.run("stops", [("u32", 40)])
    fails(lambda: lib.run("stops", [("u32", 40)], block=(41, 1, 1)), "stops: a trap", "thread 40 0 0")
    fails(lambda: lib.run("stops", [("u32", 40)], block=(1025, 1, 1)), "1025 threads")
    fails(lambda: lib.run("stops", [("u32", 40)], grid=(1, 65536, 1)), "65536")

    for ends in (32, 20):
        target = Memory(bytes(256))
        lib.run("votes", [target, ("u32", ends)])
        found = words(target)
        check(found[: 2 * ends] == [0xAAAAAAAA & ((1 << ends) - 1), 1] * ends, f"votes of {ends} lanes")
    target = Memory(bytes(256))
    lib.run("calls", [target])
    check(words(target, "u64") == [16 * i for i in range(32)], "calls")
    target = Memory(bytes(16))
    lib.run("constants", [target], block=(4, 1, 1))
    check(words(target) == [7, 11, 13, 17], "constants")
    lib.memory(lambda address, size: target.address <= address and address + size <= target.address + target.size)
    lib.run("constants", [target], block=(4, 1, 1))  # a kernel's own variables are always there
    fails(lambda: lib.run("constants", [target], block=(5, 1, 1)), "memory that is not there", "thread 4 0 0")
    lib.memory(None)


def run_with_struct(lib, name, info, target, which):
    """A launch whose first parameter is a structure."""
    import ctypes

    kernel = lib.library.kernel_find(name.encode())
    check([kernel.contents.sizes[k] for k in range(3)] == [24, 8, 4], "sizes of parameters")
    values = [ctypes.c_uint64(target.address), ctypes.c_uint32(which)]
    addresses = (ctypes.c_void_p * 3)(info.address, ctypes.addressof(values[0]), ctypes.addressof(values[1]))
    one = (ctypes.c_uint * 3)(1, 1, 1)
    error = lib.library.kernel_run(kernel, addresses, one, one, 0)
    if error:
        raise Failed(error.decode())


def check_unknown(folder):
    path = os.path.join(folder, "unknown.ptx")
    with open(path, "w") as file:
        file.write(".visible .entry f(.param .u64 f_0)\n{\n.reg .b32 %r<3>;\ndp4a.u32.u32 %r1, %r2, %r2, %r2;\nret;\n}\n")
    done = subprocess.run([sys.executable, os.path.join(HERE, "ptx.py"), folder, path], capture_output=True, text=True)
    check(
        done.returncode != 0 and "unknown.ptx:4:" in done.stderr and "dp4a.u32.u32 %r1" in done.stderr,
        "an unknown instruction",
    )


def main():
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    add_float_cases()
    add_comparison_cases()
    add_integer_cases()
    add_conversion_cases()
    add_approximate_cases()
    text = [".version 9.0", ".target sm_90", ".address_size 64"]
    text += [case_ptx(index, *rest[:3]) for index, rest in enumerate(CASES)]
    text += [KERNELS] + [SHUFFLE.format(name=name, how=how, c=c) for name, (how, c) in SHUFFLES.items()]
    text += [MATRICES.format(kind=kind) for kind in ("bf16", "f16")]
    text += [LDMATRIX.format(trans=trans, dot=dot) for trans, dot in (("plain", ""), ("trans", ".trans"))]
    path = os.path.join(folder, "check.ptx")
    with open(path, "w") as file:
        file.write("\n".join(text) + "\n")
    done = subprocess.run(
        [sys.executable, os.path.join(HERE, "ptx.py"), folder, path], stdout=subprocess.PIPE, text=True, check=True
    )
    flags = "-std=c++17 -march=native -ffp-contract=off -fwrapv -fno-strict-aliasing -fPIC -U_FORTIFY_SOURCE -O1 -w -shared -pthread"
    so = os.path.join(folder, "libcheck.so")
    command = ["g++", *flags.split(), "-I", HERE, "-o", so, os.path.join(HERE, "kernels.cpp"), *done.stdout.split()]
    subprocess.run(command, check=True)
    lib = Library(os.path.abspath(so))
    compared = check_cases(lib)
    check_shuffles(lib)
    check_matrices(lib)
    check_kernels(lib)
    check_unknown(folder)
    print(f"instructions: {len(CASES)} forms, {compared} results, {CHECKS} checks, {FAILURES} failed")
    sys.exit(FAILURES > 0)


main()
