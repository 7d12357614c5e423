#!/usr/bin/env python3
"""Translates the kernels of PTX files to C++ functions, one for each .entry, which kernels.cpp runs on the CPU.

    ptx.py OUT_FOLDER FILE.ptx... [--only REGEX] [--size STATEMENTS]

Writes FILE_0.cpp, FILE_1.cpp, ... of about STATEMENTS instructions each, and leaves files that are already right as they
are. --only takes the entries whose whole names match. An instruction that is not known is an error; names of sections below
are those of the PTX ISA.
"""

import argparse
import os
import re
import sys


class Unknown(Exception):
    """What is not translated."""


SIZES = {"pred": 1, "f16x2": 4, "bf16x2": 4, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
SIZES.update({kind + str(8 * size): size for kind in "bsu" for size in (1, 2, 4, 8)})
UNSIGNED = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}
SIGNED = {size: name[1:] for size, name in UNSIGNED.items()}
SHORT = ("f16", "bf16")  # in bits
PAIRS = ("f16x2", "bf16x2")


def c_type(kind):
    """The C++ type of values of a PTX type."""
    if kind in ("pred", "f32", "f64"):
        return {"pred": "bool", "f32": "float", "f64": "double"}[kind]
    return SIGNED[SIZES[kind]] if kind[0] == "s" else UNSIGNED[SIZES[kind]]


def register_type(kind):
    return c_type(kind) if kind in ("pred", "f32", "f64") else UNSIGNED[max(2, SIZES[kind])]


def width(ctype):
    """Bytes of a C++ type."""
    named = {"bool": 1, "float": 4, "double": 8}
    return named[ctype] if ctype in named else int(re.sub(r"\D", "", ctype)) // 8


def identifier(name):
    return name.lstrip("%").replace("$", "_")


# --- reading


def without_comments(text):
    """Comments and the directives that have no end of their own as blanks, line for line."""
    blank = lambda match: re.sub(r"[^\n]", " ", match.group())
    text = re.sub(r"/\*.*?\*/|//[^\n]*", blank, text, flags=re.S)
    return re.sub(r"^[ \t]*\.(version|target|address_size|file|loc)\b[^\n]*", blank, text, flags=re.M)


def closing(text, at):
    """The place behind the brace that closes the one at `at`."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    raise Unknown("a brace that is never closed")


def statements(text, line):
    """(line, kind, text) of a body: kind is `open`, `close`, `label` or `statement`."""
    at, end = 0, len(text)
    label = re.compile(r"([A-Za-z_$][\w$]*)\s*:(?!:)")
    while True:
        start = at
        while at < end and text[at].isspace():
            at += 1
        line += text.count("\n", start, at)
        if at == end:
            return
        if text[at] in "{}":
            yield line, "open" if text[at] == "{" else "close", ""
            at += 1
            continue
        found = label.match(text, at)
        if found:
            yield line, "label", found.group(1)
        else:
            found = re.compile(r"[^;]*;").match(text, at)
            if not found:
                raise Unknown("a statement without its end: " + text[at : at + 60])
            yield line, "statement", " ".join(found.group()[:-1].split())
        line += found.group().count("\n")
        at = found.end()


def split(text):
    """Operands: the parts between commas that are not inside brackets."""
    parts, depth, last = [], 0, 0
    for at, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[last:at].strip())
            last = at + 1
    parts.append(text[last:].strip())
    return [part for part in parts if part]


class Variable:
    """A declared variable: .align, type, name, number of elements, initial bytes."""

    def __init__(self, text):
        found = re.match(
            r"(?:\.align (\d+) )?\.(\w+) ([\w$%]+)\s*(?:\[(\d*)\])?(?:\s*=\s*(.*))?$", text.strip().replace(" .ptr", "")
        )
        if not found:
            raise Unknown("this declaration: " + text)
        align, kind, self.name, count, initial = found.groups()
        element = SIZES[kind]
        self.align = int(align or element)
        self.open = count == ""
        self.size = element * int(count or 1)
        self.initial = None
        if initial is not None:
            values = re.findall(r"[-\w]+", initial)
            self.initial = b"".join((int(v, 0) & (256**element - 1)).to_bytes(element, "little") for v in values)


class Function:
    def __init__(self, name, entry, parameters, results, body, line, max_threads):
        self.name, self.entry, self.parameters, self.results = name, entry, parameters, results
        self.body, self.line, self.max_threads = body, line, max_threads


class Module:
    """The functions and variables of a PTX file."""

    def __init__(self, path):
        self.path, self.name = path, re.sub(r"\W", "_", os.path.basename(path)[: -len(".ptx")])
        self.functions, self.data, self.shared = {}, {}, {}
        with open(path) as file:
            text = without_comments(file.read())
        at = 0
        while True:
            found = re.compile(r"\s*([^;{]*)([;{])").match(text, at)
            if not found:
                break
            head, line = " ".join(found.group(1).split()), text.count("\n", 0, found.start(1)) + 1
            at = found.end()
            try:
                if re.search(r"\.(entry|func)\b", head):
                    if found.group(2) == "{":
                        end = closing(text, at - 1)
                        self.function(head, text[at : end - 1], text.count("\n", 0, at) + 1)
                        at = end
                else:
                    if found.group(2) == "{":
                        at = text.index(";", at) + 1
                        head = " ".join(text[found.start(1) : at - 1].split())
                    self.variable(head)
            except Unknown as unknown:
                sys.exit(f"{path}:{line}: {unknown}")

    def variable(self, text):
        found = re.match(r"(?:\.(?:visible|extern|weak|common) )*\.(global|const|shared) (.*)", text)
        if not found:
            raise Unknown("this declaration: " + text)
        variable = Variable(found.group(2))
        (self.shared if found.group(1) == "shared" else self.data)[variable.name] = variable

    def function(self, head, body, line):
        found = re.match(
            r"(?:\.(?:visible|extern|weak|noinline) )*\.(entry|func)\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?(.*)",
            head,
        )
        kind, results, name, parameters, rest = found.groups()
        read = lambda text: [Variable(re.sub(r"^\.param ", "", part)) for part in split(text or "")]
        threads = re.search(r"\.(?:maxntid|reqntid) (\d+)(?:, (\d+))?(?:, (\d+))?", rest)
        most = 1024
        if threads:
            most = 1
            for part in threads.groups():
                most *= int(part or 1)
        self.functions[name] = Function(name, kind == "entry", read(parameters), read(results), body, line, most)


# --- translation of a function

SPECIAL = {
    f"%{name}.{axis}": f"t.{name}[{k}]" for name in ("tid", "ntid", "ctaid", "nctaid") for k, axis in enumerate("xyz")
}
SPECIAL.update({"%laneid": "t.lane", "%warpid": "(t.index / 32)", "%dynamic_smem_size": "t.dynamic_size", "WARP_SZ": "32u"})
SPECIAL["%total_smem_size"] = "t.shared_size"

SPACES = ("global", "shared", "local", "const", "param")
COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
# unordered forms: not the opposite
OPPOSITE = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
EXCHANGES = ("bar", "barrier", "shfl", "vote", "mma", "ldmatrix", "cp")
INTEGER_ROUNDING = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
DIRECTED = {"rz": "RZ", "rm": "RM", "rp": "RP"}


class Translation:
    """The C++ of one function."""

    def __init__(self, module, function):
        self.module, self.function = module, function
        self.scopes = [{}]  # names to (C++ name, C++ type)
        self.scope_count = 0
        self.declarations, self.lines = [], []
        self.registers = {}  # C++ names that are used, to their types
        self.data, self.shared, self.calls = set(), {}, set()
        self.exchanges = self.carry = False
        self.count = 0
        for k, variable in enumerate(function.parameters):
            name = f"((const unsigned char*)p[{k}])" if function.entry else identifier(variable.name)
            self.scopes[0][variable.name] = (name, "param")
        for variable in function.results:
            self.scopes[0][variable.name] = (identifier(variable.name), "param")
        for self.line, kind, text in statements(function.body, function.line):
            try:
                self.statement(kind, text)
            except (Unknown, ValueError, LookupError, TypeError, AttributeError) as error:
                what = error if isinstance(error, Unknown) else f"its form ({error})"
                sys.exit(f"{module.path}:{self.line}: not translated: {what} in `{text}`")

    # --- names and operands

    def find(self, name):
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        found = re.match(r"(%[A-Za-z_]+)\d+$", name)
        if found:
            for scope in reversed(self.scopes):
                if found.group(1) + "<" in scope:
                    suffix, ctype = scope[found.group(1) + "<"]
                    return identifier(name) + suffix, ctype
        return None

    def register(self, name):
        found = self.find(name)
        if found and found[1] not in ("param", "local"):
            self.registers[found[0]] = found[1]
            return found
        return None

    def declare(self, text):
        space, rest = re.match(r"\.(\w+)\s*(.*)", text).groups()
        suffix = f"_s{self.scope_count}" if len(self.scopes) > 1 else ""
        if space == "reg":
            kind, names = re.match(r"\.(\w+)\s*(.*)", rest).groups()
            for name in split(names):
                many = re.match(r"(%?[\w$]+)<(\d+)>$", name)
                if many:
                    self.scopes[-1][many.group(1) + "<"] = (suffix, register_type(kind))
                else:
                    self.scopes[-1][name] = (identifier(name) + suffix, register_type(kind))
        elif space in ("local", "param"):
            variable = Variable(rest)
            name = identifier(variable.name) + suffix
            self.scopes[-1][variable.name] = (name, space)
            self.declarations.append(f"alignas({max(variable.align, 16)}) unsigned char {name}[{variable.size}];")
            self.declarations.append(f"memset({name}, 0xff, sizeof {name});")
        elif space == "shared":
            variable = Variable(rest)
            self.module.shared[variable.name] = variable
        elif space != "pragma":
            raise Unknown("this declaration")

    def symbol(self, name):
        """The address of a variable, as uint64_t."""
        found = self.find(name)
        if found:
            return f"(uint64_t){found[0]}"
        if name in self.module.shared:
            self.shared[name] = self.module.shared[name]
            return f"(uint64_t)SHARED_{identifier(name)}"
        if name in self.module.data:
            self.data.add(name)
            return f"(uint64_t){self.module.name}_{identifier(name)}"
        return None

    def read(self, operand, kind):
        """An operand as a value of the C++ type of `kind`."""
        ctype = c_type(kind)
        if operand.startswith("!") and kind == "pred":
            return f"!{self.read(operand[1:], kind)}"
        found = self.register(operand)
        if found:
            return self.convert(found[0], found[1], ctype)
        if operand in SPECIAL:
            return self.convert(SPECIAL[operand], "uint32_t", ctype)
        number = re.match(r"0([fFdD])([0-9a-fA-F]+)$", operand)
        if number:
            bits = f"0x{number.group(2)}u" if number.group(1) in "fF" else f"0x{number.group(2)}ull"
            source = "float" if number.group(1) in "fF" else "double"
            if ctype == source:
                return f"bits<{ctype}>({bits})"
            return self.convert(bits, UNSIGNED[width(source)], ctype)
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", operand):
            value = int(operand.rstrip("U"), 0)
            if kind == "pred":
                return "true" if value else "false"
            if ctype in ("float", "double"):
                return self.convert(f"{value & (256 ** SIZES[kind] - 1):#x}ull"[:None], UNSIGNED[SIZES[kind]], ctype)
            return f"({ctype}){value & 0xffffffffffffffff:#x}"
        address = self.symbol(operand)
        if address:
            return self.convert(f"({address})", "uint64_t", ctype)
        raise Unknown(f"operand {operand}")

    @staticmethod
    def convert(text, source, ctype):
        if source == ctype:
            return text
        if "bool" in (source, ctype):
            raise Unknown("a predicate among numbers")
        float_source, float_type = source in ("float", "double"), ctype in ("float", "double")
        if not float_source and not float_type:
            return f"({ctype}){text}"
        if width(source) == width(ctype):
            return f"bits<{ctype}>(({UNSIGNED[width(source)]}){text})" if not float_source else f"bits<{ctype}>({text})"
        if float_source:
            return f"({ctype})bits<{UNSIGNED[width(source)]}>({text})"
        return f"bits<{ctype}>(({UNSIGNED[width(ctype)]}){text})"

    def write(self, operand, kind, value):
        """`operand = value`, a value of the C++ type of `kind`; wider registers are extended by the sign of the type."""
        if operand == "_":
            return f"(void)({value});"
        found = self.register(operand)
        if not found:
            raise Unknown(f"destination {operand}")
        name, target = found
        ctype = c_type(kind)
        if target == ctype:
            return f"{name} = {value};"
        if "bool" in (target, ctype):
            raise Unknown("a predicate among numbers")
        if target in ("float", "double"):
            return f"{name} = bits<{target}>(({UNSIGNED[width(target)]})({value}));"
        if ctype in ("float", "double"):
            return f"{name} = bits<{UNSIGNED[width(ctype)]}>({value});"
        return f"{name} = ({target})({ctype})({value});"

    def address(self, operand):
        """[base + offset] as an expression."""
        found = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
        if not found:
            raise Unknown(f"address {operand}")
        base, offset = found.group(1), int(found.group(2) or "0", 0)
        register = self.register(base)
        if register:
            unsigned = UNSIGNED[width(register[1])]
            return f"({unsigned})({register[0]} + ({unsigned}){offset})" if offset else register[0]
        if re.match(r"\d+$", base):
            return f"{int(base) + offset}ull"
        address = self.symbol(base)
        if not address:
            raise Unknown(f"address {operand}")
        return f"({address} + {offset})"

    # --- statements

    def put(self, text):
        self.lines.append(text)

    def statement(self, kind, text):
        if kind == "open":
            self.scope_count += 1
            self.scopes.append({})
        elif kind == "close":
            self.scopes.pop()
        elif kind == "label":
            self.put(f"{identifier(text)}:;")
        elif text.startswith("."):
            self.declare(text)
        else:
            self.count += 1
            guard = re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", text)
            first = len(self.lines)
            if guard:
                text = guard.group(3)
            opcode, _, operands = text.partition(" ")
            self.instruction(opcode.split("."), split(operands))
            if guard:
                condition = guard.group(1) + self.read(guard.group(2), "pred")
                self.lines[first:] = [f"if ({condition}) {{ " + " ".join(self.lines[first:]) + " }"]

    def instruction(self, parts, operands):
        name = parts[0]
        modifiers = [part for part in parts[1:] if part]
        kinds = [part for part in modifiers if part in SIZES]
        others = [part for part in modifiers if part not in SIZES]
        method = getattr(self, "do_" + name, None)
        if name in EXCHANGES:
            self.exchanges = True
        if method is None:
            raise Unknown(f"instruction {name}")
        method(kinds, others, operands)

    @staticmethod
    def only(modifiers, *allowed):
        for modifier in modifiers:
            if modifier not in allowed:
                raise Unknown(f"modifier .{modifier}")

    # --- arithmetic

    def float_result(self, kind, modifiers, value):
        if "ftz" in modifiers:
            value = f"ftz({value})"
        if "sat" in modifiers:
            value = f"saturate({value})"
        return value

    def float_operands(self, kind, modifiers, operands):
        values = [self.read(operand, kind) for operand in operands]
        return [f"ftz({value})" for value in values] if "ftz" in modifiers else values

    def arithmetic(self, name, sign, kinds, modifiers, operands):
        (kind,) = kinds
        if kind in SHORT or kind in PAIRS:
            self.only(modifiers, "rn", "noftz")
            return self.short(name, kind, operands)
        if kind in ("f32", "f64"):
            self.only(modifiers, "rn", "rz", "rm", "rp", "ftz", "sat", "full", "approx")
            values = self.float_operands(kind, modifiers, operands[1:])
            directed = [DIRECTED[m] for m in modifiers if m in DIRECTED]
            if directed:
                function = {"+": "plus", "-": "minus", "*": "times", "/": "over"}[sign]
                value = f"rounded({directed[0]}, {function}, {', '.join(values)})"
            else:
                value = f"{values[0]} {sign} {values[1]}"
            return self.put(self.write(operands[0], kind, self.float_result(kind, modifiers, value)))
        self.only(modifiers)
        unsigned = "u" + kind[1:]
        a, b = (self.read(operand, unsigned) for operand in operands[1:])
        self.put(self.write(operands[0], unsigned, f"({c_type(unsigned)})({a} {sign} {b})"))

    def short(self, name, kind, operands):
        """f16 and bf16 by functions of their bits, pairs of them half by half."""
        values = [self.read(operand, "b32" if kind in PAIRS else "b16") for operand in operands[1:]]
        if kind in PAIRS:
            return self.put(self.write(operands[0], "b32", f"both({name}_{kind[:-2]}, {', '.join(values)})"))
        self.put(self.write(operands[0], "b16", f"{name}_{kind}({', '.join(values)})"))

    def with_carry(self, sign, use, keep, kind, operands):
        """add.cc, addc, sub.cc, subc: the carry of a sum is that of the difference's borrow."""
        if kind not in ("u32", "s32", "b32"):
            raise Unknown(f"a carry of .{kind}")
        self.carry = True
        a, b = (self.read(operand, "u32") for operand in operands[1:])
        value = f"(uint64_t){a} {sign} {b}" + (f" {sign} carry" if use else "")
        result = self.write(operands[0], "u32", "(uint32_t)wide")
        self.put(f"{{ uint64_t wide = {value}; {result} {'carry = wide >> 32 & 1; ' if keep else ''}}}")

    def do_add(self, kinds, modifiers, operands):
        if "cc" in modifiers:
            self.only(modifiers, "cc")
            return self.with_carry("+", False, True, kinds[0], operands)
        self.arithmetic("add", "+", kinds, modifiers, operands)

    def do_sub(self, kinds, modifiers, operands):
        if "cc" in modifiers:
            self.only(modifiers, "cc")
            return self.with_carry("-", False, True, kinds[0], operands)
        self.arithmetic("sub", "-", kinds, modifiers, operands)

    def do_addc(self, kinds, modifiers, operands):
        self.only(modifiers, "cc")
        self.with_carry("+", True, "cc" in modifiers, kinds[0], operands)

    def do_subc(self, kinds, modifiers, operands):
        self.only(modifiers, "cc")
        self.with_carry("-", True, "cc" in modifiers, kinds[0], operands)

    def product(self, kind, modifiers, a, b):
        """The product of two integers and its PTX type: .lo, .hi or .wide."""
        unsigned = "u" + kind[1:]
        if "lo" in modifiers:
            x, y = self.read(a, unsigned), self.read(b, unsigned)
            return f"({c_type(unsigned)})((uint64_t){x} * {y})", unsigned
        x, y = self.read(a, kind), self.read(b, kind)
        if "hi" in modifiers:
            return f"high_product<{c_type(kind)}>({x}, {y})", kind
        if "wide" in modifiers and SIZES[kind] < 8:
            wide = kind[0] + str(16 * SIZES[kind])
            return f"({c_type(wide)})(({c_type(wide)}){x} * ({c_type(wide)}){y})", wide
        raise Unknown("this product")

    def do_mul(self, kinds, modifiers, operands):
        (kind,) = kinds
        if kind[0] not in "us":
            return self.arithmetic("mul", "*", kinds, modifiers, operands)
        self.only(modifiers, "lo", "hi", "wide")
        value, result = self.product(kind, modifiers, *operands[1:])
        self.put(self.write(operands[0], result, value))

    def do_mad(self, kinds, modifiers, operands, use_carry=False):
        (kind,) = kinds
        if kind in ("f32", "f64"):
            return self.do_fma(kinds, modifiers, operands)
        self.only(modifiers, "lo", "hi", "wide", "cc")
        value, result = self.product(kind, modifiers, *operands[1:3])
        unsigned = "u" + result[1:]
        ctype = c_type(unsigned)
        c = self.read(operands[3], unsigned)
        if not use_carry and "cc" not in modifiers:
            return self.put(self.write(operands[0], unsigned, f"({ctype})(({ctype}){value} + {c})"))
        if SIZES[result] != 4:
            raise Unknown("a carry of this product")
        self.carry = True
        total = f"(uint64_t)(uint32_t){value} + {c}" + (" + carry" if use_carry else "")
        keep = "carry = wide >> 32 & 1; " if "cc" in modifiers else ""
        self.put(f"{{ uint64_t wide = {total}; {self.write(operands[0], 'u32', '(uint32_t)wide')} {keep}}}")

    def do_madc(self, kinds, modifiers, operands):
        self.do_mad(kinds, modifiers, operands, True)

    def do_fma(self, kinds, modifiers, operands):
        (kind,) = kinds
        if kind in SHORT or kind in PAIRS:
            self.only(modifiers, "rn")
            return self.short("fma", kind, operands)
        self.only(modifiers, "rn", "rz", "rm", "rp", "ftz", "sat")
        values = ", ".join(self.float_operands(kind, modifiers, operands[1:]))
        directed = [DIRECTED[m] for m in modifiers if m in DIRECTED]
        function = "__builtin_fmaf" if kind == "f32" else "__builtin_fma"
        value = f"rounded({directed[0]}, multiply_add, {values})" if directed else f"{function}({values})"
        self.put(self.write(operands[0], kind, self.float_result(kind, modifiers, value)))

    def do_div(self, kinds, modifiers, operands):
        (kind,) = kinds
        if kind in ("f32", "f64"):
            return self.arithmetic("div", "/", kinds, modifiers, operands)
        self.only(modifiers)
        a, b = (self.read(operand, kind) for operand in operands[1:])
        self.put(self.write(operands[0], kind, f"divide<{c_type(kind)}>({a}, {b})"))

    def do_rem(self, kinds, modifiers, operands):
        (kind,) = kinds
        self.only(modifiers)
        a, b = (self.read(operand, kind) for operand in operands[1:])
        self.put(self.write(operands[0], kind, f"remainder<{c_type(kind)}>({a}, {b})"))

    def unary(self, kinds, modifiers, operands, allowed, value):
        (kind,) = kinds
        self.only(modifiers, *allowed)
        (a,) = self.float_operands(kind, modifiers, operands[1:])
        self.put(self.write(operands[0], kind, self.float_result(kind, modifiers, value(a))))

    def do_neg(self, kinds, modifiers, operands):
        if kinds[0] in SHORT or kinds[0] in PAIRS:
            self.only(modifiers)
            return self.short("neg", kinds[0], operands)
        ctype = c_type(kinds[0])
        self.unary(
            kinds, modifiers, operands, ["ftz"], lambda a: f"({ctype})-{a}" if kinds[0][0] == "f" else f"({ctype})(0 - {a})"
        )

    def do_abs(self, kinds, modifiers, operands):
        kind = kinds[0]
        if kind in SHORT or kind in PAIRS:
            self.only(modifiers)
            return self.short("abs", kind, operands)
        if kind[0] == "f":
            return self.unary(kinds, modifiers, operands, ["ftz"], lambda a: f"std::fabs({a})")
        self.unary(kinds, modifiers, operands, [], lambda a: f"({c_type(kind)})({a} < 0 ? 0 - {a} : {a})")

    def extreme(self, name, sign, kinds, modifiers, operands):
        (kind,) = kinds
        if kind[0] in "us":
            self.only(modifiers)
            a, b = (self.read(operand, kind) for operand in operands[1:])
            return self.put(self.write(operands[0], kind, f"{a} {sign} {b} ? {a} : {b}"))
        if len(operands) != 3:
            raise Unknown("more than two operands")
        self.only(modifiers, "ftz", "NaN")
        suffix = "_nan" if "NaN" in modifiers else ""
        if kind in SHORT or kind in PAIRS:
            self.only(modifiers, "NaN")
            return self.short(name + suffix, kind, operands)
        values = self.float_operands(kind, modifiers, operands[1:])
        self.put(self.write(operands[0], kind, f"float_{name}{suffix}<{c_type(kind)}>({', '.join(values)})"))

    def do_min(self, kinds, modifiers, operands):
        self.extreme("min", "<", kinds, modifiers, operands)

    def do_max(self, kinds, modifiers, operands):
        self.extreme("max", ">", kinds, modifiers, operands)

    def do_copysign(self, kinds, modifiers, operands):
        self.only(modifiers)
        sign, value = (self.read(operand, kinds[0]) for operand in operands[1:])
        self.put(self.write(operands[0], kinds[0], f"std::copysign({value}, {sign})"))

    def do_rcp(self, kinds, modifiers, operands):
        if kinds == ["f64"] and "approx" in modifiers:
            self.only(modifiers, "approx", "ftz")
            return self.put(self.write(operands[0], "f64", f"reciprocal_upper({self.read(operands[1], 'f64')})"))
        one = "1.0f" if kinds == ["f32"] else "1.0"
        self.unary(kinds, modifiers, operands, ["rn", "approx", "ftz"], lambda a: f"{one} / {a}")

    def do_sqrt(self, kinds, modifiers, operands):
        self.unary(kinds, modifiers, operands, ["rn", "approx", "ftz"], lambda a: f"std::sqrt({a})")

    def do_rsqrt(self, kinds, modifiers, operands):
        # in f64, so that the f32 result has one rounding
        self.unary(
            kinds, modifiers, operands, ["approx", "ftz"], lambda a: f"({c_type(kinds[0])})(1 / std::sqrt((double){a}))"
        )

    def approximate(self, function):
        def do(kinds, modifiers, operands):
            if kinds != ["f32"]:
                raise Unknown(f"this type of {function}")
            self.unary(kinds, modifiers, operands, ["approx", "ftz"], lambda a: f"std::{function}({a})")

        return do

    def do_ex2(self, kinds, modifiers, operands):
        self.approximate("exp2")(kinds, modifiers, operands)

    def do_lg2(self, kinds, modifiers, operands):
        self.approximate("log2")(kinds, modifiers, operands)

    def do_sin(self, kinds, modifiers, operands):
        self.approximate("sin")(kinds, modifiers, operands)

    def do_cos(self, kinds, modifiers, operands):
        self.approximate("cos")(kinds, modifiers, operands)

    def do_tanh(self, kinds, modifiers, operands):
        self.approximate("tanh")(kinds, modifiers, operands)

    # --- bits

    def logic(self, sign, kinds, modifiers, operands):
        (kind,) = kinds
        self.only(modifiers)
        a, b = (self.read(operand, kind) for operand in operands[1:])
        if kind == "pred":
            sign = {"&": "&&", "|": "||", "^": "!="}[sign]
            return self.put(self.write(operands[0], kind, f"{a} {sign} {b}"))
        self.put(self.write(operands[0], kind, f"({c_type(kind)})({a} {sign} {b})"))

    def do_and(self, kinds, modifiers, operands):
        self.logic("&", kinds, modifiers, operands)

    def do_or(self, kinds, modifiers, operands):
        self.logic("|", kinds, modifiers, operands)

    def do_xor(self, kinds, modifiers, operands):
        self.logic("^", kinds, modifiers, operands)

    def do_not(self, kinds, modifiers, operands):
        sign = "!" if kinds == ["pred"] else "~"
        self.unary(kinds, modifiers, operands, [], lambda a: f"({c_type(kinds[0])}){sign}{a}")

    def do_cnot(self, kinds, modifiers, operands):
        self.unary(kinds, modifiers, operands, [], lambda a: f"({c_type(kinds[0])})({a} == 0)")

    def do_shl(self, kinds, modifiers, operands):
        self.only(modifiers)
        kind = "u" + kinds[0][1:]
        a, by = self.read(operands[1], kind), self.read(operands[2], "u32")
        self.put(self.write(operands[0], kind, f"shift_left<{c_type(kind)}>({a}, {by})"))

    def do_shr(self, kinds, modifiers, operands):
        self.only(modifiers)
        a, by = self.read(operands[1], kinds[0]), self.read(operands[2], "u32")
        self.put(self.write(operands[0], kinds[0], f"shift_right<{c_type(kinds[0])}>({a}, {by})"))

    def do_shf(self, kinds, modifiers, operands):
        self.only(modifiers, "l", "r", "wrap", "clamp")
        values = ", ".join(self.read(operand, "b32") for operand in operands[1:])
        name = "funnel_left" if "l" in modifiers else "funnel_right"
        self.put(self.write(operands[0], "b32", f"{name}({values}, {'true' if 'wrap' in modifiers else 'false'})"))

    def do_bfe(self, kinds, modifiers, operands):
        self.only(modifiers)
        values = ", ".join([self.read(operands[1], kinds[0])] + [self.read(operand, "u32") for operand in operands[2:]])
        self.put(self.write(operands[0], kinds[0], f"extract<{c_type(kinds[0])}>({values})"))

    def do_bfi(self, kinds, modifiers, operands):
        self.only(modifiers)
        values = [self.read(operand, kinds[0]) for operand in operands[1:3]] + [
            self.read(operand, "u32") for operand in operands[3:]
        ]
        self.put(self.write(operands[0], kinds[0], f"insert<{c_type(kinds[0])}>({', '.join(values)})"))

    def do_prmt(self, kinds, modifiers, operands):
        self.only(modifiers)
        self.put(
            self.write(operands[0], "b32", f"permute({', '.join(self.read(operand, 'b32') for operand in operands[1:])})")
        )

    def do_lop3(self, kinds, modifiers, operands):
        self.only(modifiers)
        values = ", ".join(self.read(operand, "b32") for operand in operands[1:])
        self.put(self.write(operands[0], "b32", f"logic3<uint32_t>({values})"))

    def counted(self, kinds, modifiers, operands, value):
        self.only(modifiers)
        self.put(self.write(operands[0], "u32", value(self.read(operands[1], kinds[0]))))

    def do_clz(self, kinds, modifiers, operands):
        self.counted(kinds, modifiers, operands, lambda a: f"leading_zeros<{c_type(kinds[0])}>({a})")

    def do_popc(self, kinds, modifiers, operands):
        self.counted(kinds, modifiers, operands, lambda a: f"(uint32_t)__builtin_popcountll({a})")

    def do_bfind(self, kinds, modifiers, operands):
        amount = "true" if "shiftamt" in modifiers else "false"
        rest = [m for m in modifiers if m != "shiftamt"]
        self.counted(kinds, rest, operands, lambda a: f"find_bit<{c_type(kinds[0])}>({a}, {amount})")

    def do_brev(self, kinds, modifiers, operands):
        self.unary(kinds, modifiers, operands, [], lambda a: f"reverse_bits<{c_type(kinds[0])}>({a})")

    # --- comparison and selection

    def comparable(self, kind, modifiers, operand):
        """An operand as something that C++ compares."""
        if kind in SHORT:
            return ("h2f" if kind == "f16" else "b2f") + f"({self.read(operand, 'b16')})"
        value = self.read(operand, kind)
        return f"ftz({value})" if "ftz" in modifiers else value

    def comparison(self, kind, how, modifiers, a, b):
        x, y = self.comparable(kind, modifiers, a), self.comparable(kind, modifiers, b)
        floating = kind in ("f32", "f64") or kind in SHORT
        if not floating:
            if how not in COMPARE:
                raise Unknown(f"comparison .{how}")
            return f"{x} {COMPARE[how]} {y}"
        if how in OPPOSITE:
            return f"!({x} {OPPOSITE[how]} {y})"
        special = {
            "ne": f"__builtin_islessgreater({x}, {y})",
            "equ": f"!__builtin_islessgreater({x}, {y})",
            "neu": f"{x} != {y}",
            "num": f"!__builtin_isunordered({x}, {y})",
            "nan": f"__builtin_isunordered({x}, {y})",
        }
        if how in special:
            return special[how]
        if how not in ("eq", "lt", "le", "gt", "ge"):
            raise Unknown(f"comparison .{how}")
        return f"{x} {COMPARE[how]} {y}"

    def do_setp(self, kinds, modifiers, operands):
        how, rest = modifiers[0], modifiers[1:]
        self.only(rest, "ftz", "and", "or", "xor")
        value = f"({self.comparison(kinds[0], how, rest, operands[1], operands[2])})"
        opposite = f"!{value}"
        joined = [m for m in rest if m != "ftz"]
        if joined:
            sign = {"and": "&&", "or": "||", "xor": "!="}[joined[0]]
            c = self.read(operands[3], "pred")
            value, opposite = f"{value} {sign} {c}", f"{opposite} {sign} {c}"
        first, _, second = operands[0].partition("|")
        if not second:
            return self.put(self.write(first, "pred", value))
        self.put(
            f"{{ const bool yes = {value}, no = {opposite}; {self.write(first, 'pred', 'yes')} {self.write(second, 'pred', 'no')} }}"
        )

    def do_set(self, kinds, modifiers, operands):
        how, rest = modifiers[0], modifiers[1:]
        self.only(rest, "ftz")
        target, kind = kinds
        condition = self.comparison(kind, how, rest, operands[1], operands[2])
        yes, no = {
            "f32": ("1.0f", "0.0f"),
            "f16": ("(uint16_t)0x3c00", "(uint16_t)0"),
            "bf16": ("(uint16_t)0x3f80", "(uint16_t)0"),
            "u32": ("~0u", "0u"),
            "s32": ("-1", "0"),
        }[target]
        self.put(self.write(operands[0], target, f"({condition}) ? {yes} : {no}"))

    def do_selp(self, kinds, modifiers, operands):
        self.only(modifiers)
        kind = "b" + kinds[0][1:] if kinds[0] in SHORT else kinds[0]
        a, b = (self.read(operand, kind) for operand in operands[1:3])
        self.put(self.write(operands[0], kind, f"{self.read(operands[3], 'pred')} ? {a} : {b}"))

    def do_testp(self, kinds, modifiers, operands):
        function = {
            "finite": "std::isfinite",
            "infinite": "std::isinf",
            "notanumber": "std::isnan",
            "normal": "std::isnormal",
        }
        (how,) = modifiers
        if how == "number":
            function["number"] = "!std::isnan"
        if how not in function:
            raise Unknown(f"modifier .{how}")
        self.put(self.write(operands[0], "pred", f"{function[how]}({self.read(operands[1], kinds[0])})"))

    # --- conversion and moving

    def do_cvt(self, kinds, modifiers, operands):
        self.only(modifiers, "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat")
        target, source = kinds
        if target in PAIRS:
            if source != "f32" or modifiers != ["rn"]:
                raise Unknown("this conversion")
            to = "f2h" if target == "f16x2" else "f2b"
            high, low = (self.read(operand, "f32") for operand in operands[1:])
            return self.put(self.write(operands[0], "b32", f"(uint32_t){to}({high}) << 16 | {to}({low})"))
        floats = ("f16", "bf16", "f32", "f64")
        if target not in floats and source not in floats:
            value = self.read(operands[1], source)
            value = f"clamp_integer<{c_type(target)}>({value})" if "sat" in modifiers else f"({c_type(target)}){value}"
            return self.put(self.write(operands[0], target, value))
        rounding = [m for m in modifiers if m in INTEGER_ROUNDING]
        directed = [DIRECTED[m] for m in modifiers if m in DIRECTED]
        # the operand as float, double or an integer
        if source in SHORT:
            value, ctype = ("h2f" if source == "f16" else "b2f") + f"({self.read(operands[1], 'b16')})", "float"
        else:
            value, ctype = self.read(operands[1], source), c_type(source)
        if "ftz" in modifiers and source == "f32":
            value = f"ftz({value})"
        if rounding:
            if source not in floats:
                raise Unknown("this conversion")
            value = f"std::{INTEGER_ROUNDING[rounding[0]]}({value})"
        if target not in floats:
            if not rounding:
                raise Unknown("this conversion")
            # f16 counts as narrow in the rule for NaN, as its float does
            return self.put(self.write(operands[0], target, f"to_integer<{c_type(target)}>({value})"))
        if "sat" in modifiers:
            if source not in floats:
                raise Unknown("this conversion")
            value = f"saturate({value})"
        if target in SHORT:
            if directed or (source == "bf16") != (target == "bf16") and source in SHORT:
                raise Unknown("this conversion")
            if source in ("f32", "f16", "bf16"):
                value = ("f2h" if target == "f16" else "f2b") + f"({value})"
            elif source == "f64" or SIZES[source] <= 4 or target == "f16":
                value = ("d2h" if target == "f16" else "d2b") + f"((double){value})"
            else:
                raise Unknown("this conversion")
            return self.put(self.write(operands[0], "b16", value))
        to = "to_" + target
        if directed:
            value = f"rounded({directed[0]}, {to}, {value})"
        elif ctype != c_type(target):
            value = f"({c_type(target)}){value}"
        if "ftz" in modifiers and target == "f32":
            value = f"ftz({value})"
        self.put(self.write(operands[0], target, value))

    def do_mov(self, kinds, modifiers, operands):
        self.only(modifiers)
        (kind,) = kinds
        target, source = operands
        if source.startswith("{"):
            parts = split(source[1:-1])
            size = SIZES[kind] // len(parts)
            part, whole = f"b{8 * size}", f"b{8 * SIZES[kind]}"
            value = " | ".join(f"({c_type(whole)}){self.read(x, part)} << {8 * size * k}" for k, x in enumerate(parts))
            return self.put(self.write(target, whole, f"({c_type(whole)})({value})"))
        if target.startswith("{"):
            parts = split(target[1:-1])
            size = SIZES[kind] // len(parts)
            part, whole = f"b{8 * size}", f"b{8 * SIZES[kind]}"
            writes = " ".join(
                self.write(x, part, f"({c_type(part)})(whole >> {8 * size * k})") for k, x in enumerate(parts) if x != "_"
            )
            return self.put(f"{{ const {c_type(whole)} whole = {self.read(source, whole)}; {writes} }}")
        self.put(self.write(target, kind, self.read(source, kind)))

    def do_cvta(self, kinds, modifiers, operands):
        self.only(modifiers, "to", *SPACES)
        value = self.read(operands[1], "u64")
        if "shared" in modifiers:
            value += " - (uint64_t)t.shared" if "to" in modifiers else " + (uint64_t)t.shared"
        self.put(self.write(operands[0], "u64", value))

    # --- memory

    HINTS = (
        "nc",
        "ca",
        "cg",
        "cs",
        "lu",
        "cv",
        "wb",
        "wt",
        "weak",
        "relaxed",
        "acquire",
        "release",
        "acq_rel",
        "cta",
        "gpu",
        "sys",
    )

    def access(self, modifiers, kind, count, address):
        """(a pointer to the first of `count` values, the type that it points to)."""
        space = ([m for m in modifiers if m in SPACES] or ["generic"])[0]
        ctype = c_type("b" + str(8 * SIZES[kind]) if kind in SHORT or kind in PAIRS else kind)
        if "volatile" in modifiers:
            ctype = "volatile " + ctype
        if space == "const":
            space = "global"
        return f"{space}_at<{ctype}>(t, {self.address(address)}, {SIZES[kind] * count}, {self.line})"

    def vector(self, modifiers, operand):
        """The registers of a vector operand, and modifiers without its size."""
        self.only([m for m in modifiers if "::" not in m], "v2", "v4", "volatile", *SPACES, *self.HINTS)
        counts = [int(m[1]) for m in modifiers if m in ("v2", "v4")]
        parts = split(operand[1:-1]) if counts else [operand]
        if counts and len(parts) != counts[0]:
            raise Unknown("a vector of another size")
        return parts

    def do_ld(self, kinds, modifiers, operands):
        (kind,) = kinds
        parts = self.vector(modifiers, operands[0])
        kind = "b16" if kind in SHORT else kind
        if "param" in modifiers:
            base = f"(const unsigned char*)({self.address(operands[1])})"
            for k, part in enumerate(parts):
                self.put(self.write(part, kind, f"parameter<{c_type(kind)}>({base} + {k * SIZES[kind]})"))
            return
        pointer = self.access(modifiers, kind, len(parts), operands[1])
        if len(parts) == 1:
            return self.put(self.write(parts[0], kind, "*" + pointer))
        writes = " ".join(self.write(part, kind, f"q[{k}]") for k, part in enumerate(parts))
        self.put(f"{{ const auto q = {pointer}; {writes} }}")

    def do_ldu(self, kinds, modifiers, operands):
        self.do_ld(kinds, modifiers, operands)

    def do_st(self, kinds, modifiers, operands):
        (kind,) = kinds
        parts = self.vector(modifiers, operands[1])
        kind = "b16" if kind in SHORT else kind
        values = [self.read(part, kind) for part in parts]
        if "param" in modifiers:
            for k, value in enumerate(values):
                self.put(
                    f"{{ const {c_type(kind)} v = {value}; memcpy((void*)({self.address(operands[0])} + {k * SIZES[kind]}), &v, sizeof v); }}"
                )
            return
        pointer = self.access(modifiers, kind, len(parts), operands[0])
        if len(parts) == 1:
            return self.put(f"*{pointer} = {values[0]};")
        writes = " ".join(f"q[{k}] = {value};" for k, value in enumerate(values))
        self.put(f"{{ const auto q = {pointer}; {writes} }}")

    def do_atom(self, kinds, modifiers, operands, wanted=True):
        (kind,) = kinds
        self.only(
            modifiers,
            "add",
            "min",
            "max",
            "and",
            "or",
            "xor",
            "exch",
            "cas",
            "inc",
            "dec",
            "noftz",
            "global",
            "shared",
            *self.HINTS,
        )
        (how,) = [m for m in modifiers if m in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")]
        target, address, values = (
            ("_", operands[0], operands[1:]) if not wanted else (operands[0], operands[1], operands[2:])
        )
        unsigned = UNSIGNED[SIZES[kind]]
        held = f"b{8 * SIZES[kind]}"
        pointer = self.access([m for m in modifiers if m in SPACES], held, 1, address)
        signed_or_not = kind if kind[0] in "us" else held
        b = self.read(values[0], held if kind in SHORT + PAIRS else kind)
        ctype = "auto" if kind in SHORT + PAIRS else c_type(kind)
        old = f"bits<{c_type(kind)}>(old)" if kind in ("f32", "f64") else f"({c_type(signed_or_not)})old"
        if how == "add" and kind in SHORT:
            new = f"add_{kind}(old, b)"
        elif how == "add" and kind in PAIRS:
            new = f"both(add_{kind[:-2]}, old, b)"
        elif how == "add":
            new = f"bits<{unsigned}>(({c_type(kind)})({old} + b))"
        elif kind[0] == "f" or kind in SHORT + PAIRS:
            raise Unknown(f".{how} of this type")
        else:
            new = {
                "min": f"({unsigned})({old} < b ? {old} : b)",
                "max": f"({unsigned})({old} > b ? {old} : b)",
                "and": "(" + unsigned + ")(old & b)",
                "or": "(" + unsigned + ")(old | b)",
                "xor": "(" + unsigned + ")(old ^ b)",
                "exch": f"({unsigned})b",
                "inc": f"old >= b ? 0 : old + 1",
                "dec": f"old == 0 || old > b ? b : old - 1",
            }.get(how, "")
        extra = ""
        if how == "cas":
            extra = f"const auto c = {self.read(values[1], held)}; "
            new = f"({unsigned})(old == b ? c : old)"
        write = "" if target == "_" else self.write(target, held, "before")
        self.put(
            f"{{ const {ctype} b = {b}; {extra}const {unsigned} before = atomic({pointer}, "
            f"[&]({unsigned} old) -> {unsigned} {{ return {new}; }}); (void)before; {write} }}"
        )

    def do_red(self, kinds, modifiers, operands):
        self.do_atom(kinds, modifiers, operands, False)

    def do_membar(self, kinds, modifiers, operands):
        self.put("__atomic_thread_fence(__ATOMIC_SEQ_CST);")

    do_fence = do_membar

    def do_cp(self, kinds, modifiers, operands):
        modifiers = [m for m in modifiers if "::" not in m]
        if modifiers[0] != "async":
            raise Unknown("this copy")
        how = modifiers[1]
        if how == "commit_group":
            return self.put("copy_commit(t);")
        if how == "wait_group":
            return self.put(f"copy_wait(t, {int(operands[0])});")
        if how == "wait_all":
            return self.put("copy_commit(t); copy_wait(t, 0);")
        self.only(modifiers[1:], "ca", "cg", "shared", "global")
        if len(operands) not in (3, 4):
            raise Unknown("these operands")
        size = self.read(operands[2], "u32")
        source_size = self.read(operands[3], "u32") if len(operands) == 4 else size
        self.put(
            f"copy_async(t, {self.address(operands[0])}, {self.address(operands[1])}, {size}, {source_size}, {self.line});"
        )

    # --- exchanges between threads

    def do_bar(self, kinds, modifiers, operands):
        if modifiers == ["warp", "sync"]:
            return self.put(f"warp_barrier(t, {self.read(operands[0], 'u32')}, {self.line});")
        self.only(modifiers, "sync", "aligned", "cta")
        if operands != ["0"]:
            raise Unknown("another barrier than 0 or one of some threads")
        self.put(f"barrier(t, {self.line});")

    do_barrier = do_bar

    def do_shfl(self, kinds, modifiers, operands):
        how = [m for m in modifiers if m != "sync"]
        if "sync" not in modifiers or len(how) != 1 or kinds != ["b32"]:
            raise Unknown("this shuffle")
        value, _, in_range = operands[0].partition("|")
        a, b, c, mask = (self.read(operand, "b32") for operand in operands[1:])
        writes = self.write(value, "b32", "s.value") + (" " + self.write(in_range, "pred", "s.in_range") if in_range else "")
        self.put(
            f"{{ const Shuffled s = shuffle(t, SHUFFLE_{how[0].upper()}, {a}, {b}, {c}, {mask}, {self.line}); {writes} }}"
        )

    def do_vote(self, kinds, modifiers, operands):
        (how,) = [m for m in modifiers if m != "sync"]
        if "sync" not in modifiers:
            raise Unknown("this vote")
        call = f"vote(t, VOTE_{how.upper()}, {self.read(operands[1], 'pred')}, {self.read(operands[2], 'b32')}, {self.line})"
        self.put(self.write(operands[0], "b32" if how == "ballot" else "pred", call if how == "ballot" else f"{call} != 0"))

    def do_mma(self, kinds, modifiers, operands):
        if modifiers != ["sync", "aligned", "m16n8k16", "row", "col"] or kinds not in (["f32", k, k, "f32"] for k in SHORT):
            raise Unknown("this product")
        d, a, b, c = (split(operand[1:-1]) for operand in operands)
        read = lambda parts, kind: ", ".join(self.read(part, kind) for part in parts)
        writes = " ".join(self.write(part, "f32", f"d[{k}]") for k, part in enumerate(d))
        self.put(
            f"{{ float d[4]; const uint32_t a[4] = {{{read(a, 'b32')}}}, b[2] = {{{read(b, 'b32')}}}; "
            f"const float c[4] = {{{read(c, 'f32')}}}; mma(t, {'true' if 'bf16' in kinds else 'false'}, d, a, b, c, {self.line}); {writes} }}"
        )

    def do_ldmatrix(self, kinds, modifiers, operands):
        self.only(modifiers, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared")
        parts = split(operands[0][1:-1])
        if f"x{len(parts)}" not in modifiers or kinds != ["b16"]:
            raise Unknown("these matrices")
        writes = " ".join(self.write(part, "b32", f"m[{k}]") for k, part in enumerate(parts))
        transposed = "true" if "trans" in modifiers else "false"
        self.put(
            f"{{ uint32_t m[{len(parts)}]; ldmatrix(t, {len(parts)}, {transposed}, m, {self.address(operands[1])}, {self.line}); {writes} }}"
        )

    # --- control

    def do_bra(self, kinds, modifiers, operands):
        self.only(modifiers, "uni")
        self.put(f"goto {identifier(operands[0])};")

    def do_ret(self, kinds, modifiers, operands):
        self.only(modifiers, "uni")
        self.put("return;")

    def do_exit(self, kinds, modifiers, operands):
        if not self.function.entry:
            raise Unknown("exit of a function")
        self.put("return;")

    def do_trap(self, kinds, modifiers, operands):
        self.put(f'fail(t, {self.line}, "a trap: the kernel stopped itself");')

    def do_call(self, kinds, modifiers, operands):
        self.only(modifiers, "uni")
        inside = lambda text: split(text[1:-1])
        results = inside(operands.pop(0)) if operands[0].startswith("(") else []
        name = operands[0]
        arguments = inside(operands[1]) if len(operands) > 1 else []
        places = [self.find(argument)[0] for argument in results + arguments]
        if name == "__assertfail":
            what, file, line = places[:3]
            return self.put(
                f"fail_assert(t, {self.line}, parameter<const char*>({what}), parameter<const char*>({file}), parameter<unsigned>({line}));"
            )
        if name not in self.module.functions:
            raise Unknown(f"function {name}")
        self.calls.add(name)
        self.put(f"{self.module.name}_{identifier(name)}({', '.join(['t'] + places)});")

    # --- the whole

    def text(self):
        name = f"{self.module.name}_{identifier(self.function.name)}"
        if self.function.entry:
            head = f"static void {name}(Thread& t, void* const* p) {{\n    (void)t, (void)p;"
        else:
            head = self.prototype() + " {"
        lines = [head]
        place = 0
        for variable in sorted(self.shared.values(), key=lambda v: v.open):
            place = -(-place // variable.align) * variable.align
            lines.append(f"    constexpr uint32_t SHARED_{identifier(variable.name)} = {place};")
            place += 0 if variable.open else variable.size
        self.static_shared = place
        if any(v.open for v in self.shared.values()):
            self.static_shared = -(-place // 16) * 16
        by_type = {}
        for register, ctype in self.registers.items():
            by_type.setdefault(ctype, []).append(register)
        for ctype, names in by_type.items():
            lines.append(f"    {ctype} " + ", ".join(name + " = 0" for name in names) + ";")
        if self.carry:
            lines.append("    uint32_t carry = 0;")
        lines += ["    " + line for line in self.declarations + self.lines]
        return "\n".join(lines + ["}"])

    def prototype(self):
        places = "".join(f", unsigned char* {identifier(v.name)}" for v in self.function.results + self.function.parameters)
        return f"void {self.module.name}_{identifier(self.function.name)}(Thread& t{places})"


# --- files


def all_calls(translations, name):
    seen, todo = set(), [name]
    while todo:
        for called in translations[todo.pop()].calls:
            if called not in seen:
                seen.add(called)
                todo.append(called)
    return seen


def write(path, text):
    if os.path.exists(path):
        with open(path) as file:
            if file.read() == text:
                return
    with open(path, "w") as file:
        file.write(text)


def translate(path, out, only, size):
    """Writes the C++ of one PTX file; the names of the files and of the kernels."""
    module = Module(path)
    names = [f.name for f in module.functions.values() if not f.entry or re.fullmatch(only, f.name)]
    translations = {name: Translation(module, module.functions[name]) for name in names}
    for name, translation in translations.items():
        called = all_calls(translations, name)
        translation.exchanges |= any(translations[c].exchanges for c in called)
        if any(translations[c].shared for c in called):
            sys.exit(f"{path}: {name} calls a function with shared memory of its own: not translated")
    head = f'// Written by ptx.py from {os.path.basename(path)}.\n#include "kernels.h"\nusing namespace standin;\n'
    head += "".join(f"extern unsigned char {module.name}_{identifier(v)}[{module.data[v].size}];\n" for v in module.data)
    helpers = [t for t in translations.values() if not t.function.entry]
    head += "".join(t.prototype() + ";\n" for t in helpers)

    # functions and variables in the first file, then the kernels
    first = head
    for variable in module.data.values():
        initial = (variable.initial or b"").ljust(variable.size, b"\0")
        values = ", ".join(map(str, initial))
        first += f"alignas({variable.align}) unsigned char {module.name}_{identifier(variable.name)}[{variable.size}] = {{{values}}};\n"
    files, kernels = [], []
    chunk = [first + "".join(t.text() + "\n" for t in helpers)] if module.data or helpers else []
    table, count = [], 0

    def finish():
        nonlocal chunk, table, count
        if not chunk:
            return
        if table:
            chunk.append("static const Kernel kernels[] = {\n" + "".join(f"    {row},\n" for row in table) + "};")
            chunk.append(f"static const Table known(kernels, {len(table)});")
        name = f"{module.name}_{len(files)}.cpp"
        write(os.path.join(out, name), "\n".join(chunk) + "\n")
        files.append(name)
        chunk, table, count = [], [], 0

    for translation in sorted((t for t in translations.values() if t.function.entry), key=lambda t: -t.count):
        if count and count + translation.count > size:
            finish()
        if not chunk:
            chunk.append(head)
        f = translation.function
        chunk.append(translation.text())
        sizes = ", ".join(str(v.size) for v in f.parameters)
        chunk.append(f"static const unsigned {identifier(f.name)}_sizes[] = {{{sizes or 0}}};")
        info = f'{{"{f.name}", {len(f.parameters)}, {identifier(f.name)}_sizes, {translation.static_shared}}}'
        exchanges = "true" if translation.exchanges else "false"
        table.append(
            f'{{{info}, {module.name}_{identifier(f.name)}, {exchanges}, {f.max_threads}, "{os.path.basename(path)}"}}'
        )
        kernels.append(f.name)
        count += translation.count
    finish()
    return files, kernels


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--only", default=".*")
    parser.add_argument("--size", type=int, default=4000)
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    for path in options.files:
        files, kernels = translate(path, options.out, options.only, options.size)
        for name in files:
            print(os.path.join(options.out, name))
        print(f"{path}: {len(kernels)} kernels in {len(files)} files", file=sys.stderr)


if __name__ == "__main__":
    main()
