"""libkernels.so from Python, for the checks: launches with numbers and lists as parameters."""

import ctypes
import struct

FORMATS = {"u8": "B", "s8": "b", "u16": "H", "s16": "h", "u32": "I", "s32": "i", "u64": "Q", "s64": "q", "i64": "q"}
FORMATS.update({"f16": "e", "f32": "f", "f64": "d"})


class KernelInfo(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("parameters", ctypes.c_uint),
        ("sizes", ctypes.POINTER(ctypes.c_uint)),
        ("static_shared", ctypes.c_uint),
    ]


class Failed(Exception):
    """What kernel_run said."""


def pack(kind, values):
    """Numbers as bytes; bf16 is rounded to nearest."""
    if kind == "bf16":
        return b"".join(struct.pack("<H", to_bf16(value)) for value in values)
    return struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)


def unpack(kind, data):
    if kind == "bf16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    return list(struct.unpack(f"<{len(data) // struct.calcsize(FORMATS[kind])}{FORMATS[kind]}", data))


def to_bf16(value):
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return 0x7FFF if value != value else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


class Memory:
    """Device memory of some bytes, at a multiple of 256."""

    def __init__(self, data):
        self.size = len(data)
        self.buffer = ctypes.create_string_buffer(self.size + 512)
        self.address = (ctypes.addressof(self.buffer) + 255) // 256 * 256
        ctypes.memmove(self.address, bytes(data), self.size)

    def bytes(self):
        return ctypes.string_at(self.address, self.size)


class Library:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.kernel_find.restype = ctypes.POINTER(KernelInfo)
        self.library.kernel_find.argtypes = [ctypes.c_char_p]
        self.library.kernel_run.restype = ctypes.c_char_p
        self.library.kernel_order.argtypes = [ctypes.c_int]
        self.hook = None

    def run(self, name, parameters, grid=(1, 1, 1), block=(32, 1, 1), shared=0):
        """`parameters` are Memory, None for a null pointer, or (kind, number)."""
        info = self.library.kernel_find(name.encode())
        if not info:
            raise Failed(f"no kernel {name}")
        values = []
        for parameter in parameters:
            if isinstance(parameter, Memory) or parameter is None:
                parameter = ("u64", parameter.address if parameter else 0)
            values.append(ctypes.create_string_buffer(pack(parameter[0], [parameter[1]])))
        if len(values) != info.contents.parameters:
            raise Failed(f"{name} has {info.contents.parameters} parameters")
        for k, value in enumerate(values):
            if len(value) - 1 != info.contents.sizes[k]:
                raise Failed(f"{name}: parameter {k} has {info.contents.sizes[k]} bytes")
        addresses = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        three = lambda sizes: (ctypes.c_uint * 3)(*sizes)
        error = self.library.kernel_run(info, addresses, three(grid), three(block), ctypes.c_uint(shared))
        if error:
            raise Failed(error.decode())

    def memory(self, valid):
        """Has every global access looked at by `valid(address, bytes)`; None ends that."""
        self.hook = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_size_t)(valid or 0)
        self.library.kernel_memory(self.hook if valid else None)
