"""Single instructions against Python's integers and exact fractions; the PTX is written here, so nvcc is not needed."""

import ctypes
import functools
from fractions import Fraction

import numpy as np
import pytest

from . import build_ptx, runtime, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable(cuda=False)), reason=unavailable(cuda=False) or "")

N, M32, M64 = 128, (1 << 32) - 1, (1 << 64) - 1


def signed(x: int, bits: int = 32) -> int:
    return (x & (1 << bits) - 1) - (1 << bits if x >> bits - 1 & 1 else 0)


def bytes_of(a: int, b: int, s: int) -> int:
    out = 0
    for i in range(4):
        k = s >> 4 * i & 15
        byte = (b << 32 | a) >> 8 * (k & 7) & 255
        out |= (255 * (byte >> 7) if k & 8 else byte) << 8 * i
    return out


def field(a: int, position: int, length: int, sign: bool) -> int:
    position, length = position & 255, length & 255
    if not length:
        return 0
    top = a >> min(position + length - 1, 31) & 1 if sign else 0
    bits = [a >> position + i & 1 if i < length and position + i < 32 else top for i in range(32)]
    return sum(b << i for i, b in enumerate(bits))


def inserted(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < 32:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


# Instruction to what it gives for 32-bit a, b, c. %r1 is the result.
INTEGER = {
    "add.s32 %r1, %r2, %r3": lambda a, b, c: a + b,
    "add.sat.s32 %r1, %r2, %r3": lambda a, b, c: max(-(2**31), min(2**31 - 1, signed(a) + signed(b))),
    "sub.u32 %r1, %r2, %r3": lambda a, b, c: a - b,
    "mul.lo.u32 %r1, %r2, %r3": lambda a, b, c: a * b,
    "mul.hi.u32 %r1, %r2, %r3": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r1, %r2, %r3": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r1, %r2, %r3, %r4": lambda a, b, c: a * b + c,
    "mad.hi.u32 %r1, %r2, %r3, %r4": lambda a, b, c: (a * b >> 32) + c,
    "div.u32 %r1, %r2, %r3": lambda a, b, c: a // b if b else M32,
    "rem.s32 %r1, %r2, %r3": lambda a, b, c: signed(a) - signed(b) * int(Fraction(signed(a), signed(b))) if b else a,
    "min.s32 %r1, %r2, %r3": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r1, %r2, %r3": lambda a, b, c: max(a, b),
    "abs.s32 %r1, %r2": lambda a, b, c: abs(signed(a)),
    "neg.s32 %r1, %r2": lambda a, b, c: -a,
    "sad.u32 %r1, %r2, %r3, %r4": lambda a, b, c: abs(a - b) + c,
    "lop3.b32 %r1, %r2, %r3, %r4, 0x96": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 %r1, %r2, %r3, %r4, 0xCA": lambda a, b, c: a & b | ~a & c,
    "shl.b32 %r1, %r2, %r3": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %r1, %r2, %r3": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 %r1, %r2, %r3": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r1, %r2, %r3, %r4": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32 %r1, %r2, %r3, %r4": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 %r1, %r2, %r3, %r4": lambda a, b, c: field(a, b, c, False),
    "bfe.s32 %r1, %r2, %r3, %r4": lambda a, b, c: field(a, b, c, True),
    "bfi.b32 %r1, %r2, %r3, %r4, 7": lambda a, b, c: inserted(a, b, c, 7),
    "bmsk.clamp.b32 %r1, %r2, %r3": lambda a, b, c: ((1 << min(b, 32)) - 1) << a if a < 32 else 0,
    "prmt.b32 %r1, %r2, %r3, %r4": bytes_of,
    "brev.b32 %r1, %r2": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "popc.b32 %r1, %r2": lambda a, b, c: a.bit_count(),
    "clz.b32 %r1, %r2": lambda a, b, c: 32 - a.bit_length(),
    "bfind.u32 %r1, %r2": lambda a, b, c: a.bit_length() - 1,
    "bfind.s32 %r1, %r2": lambda a, b, c: (~a & M32 if a >> 31 else a).bit_length() - 1,
    "dp4a.s32.u32 %r1, %r2, %r3, %r4": lambda a, b, c: (
        c + sum(signed(a >> 8 * i & 255, 8) * (b >> 8 * i & 255) for i in range(4))
    ),
    "cvt.s32.s8 %r1, %r2": lambda a, b, c: signed(a & 255, 8),
    "cvt.u32.u16 %r1, %r2": lambda a, b, c: a & 0xFFFF,
    "cvt.sat.u8.s32 %r1, %r2": lambda a, b, c: max(0, min(255, signed(a))),
    "setp.lt.s32 %p1, %r2, %r3; selp.u32 %r1, %r2, %r3, %p1": lambda a, b, c: min(signed(a), signed(b)),
    "setp.hi.u32 %p1, %r2, %r3; selp.u32 %r1, %r2, %r3, %p1": lambda a, b, c: max(a, b),
    "slct.u32.s32 %r1, %r2, %r3, %r4": lambda a, b, c: a if signed(c) >= 0 else b,
    "set.ge.u32.u32 %r1, %r2, %r3": lambda a, b, c: M32 if a >= b else 0,
    "add.cc.u32 %r5, %r2, %r3; addc.u32 %r1, %r4, 0": lambda a, b, c: c + (a + b >> 32),
    "sub.cc.u32 %r5, %r2, %r3; subc.u32 %r1, %r4, 0": lambda a, b, c: c - (a < b),
    "mad.wide.u32 %d1, %r2, %r3, 5; cvt.u32.u64 %r1, %d1": lambda a, b, c: a * b + 5,
    "mul.wide.s32 %d1, %r2, %r3; shr.u64 %d1, %d1, 32; cvt.u32.u64 %r1, %d1": lambda a, b, c: (
        signed(a) * signed(b) >> 32
    ),
}


def rounded(x: Fraction, mantissa: int, lowest: int, mode: str) -> Fraction:
    """x with `mantissa` bits, or multiples of 2**lowest below them."""
    if not x:
        return x
    exponent = max(abs(x).numerator.bit_length() - abs(x).denominator.bit_length() - 1, lowest)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = max(Fraction(2) ** (exponent - mantissa + 1), Fraction(2) ** lowest)
    q = x / unit
    floor = q.numerator // q.denominator
    rest = q - floor
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor & 1)
    elif mode == "rna":
        up = abs(rest) >= Fraction(1, 2) if x > 0 else rest > Fraction(1, 2)
    else:
        up = {"rz": x < 0 and rest > 0, "rm": False, "rp": rest > 0}[mode]
    return (floor + up) * unit


F32, F16, BF16, TF32 = (24, -149), (11, -24), (8, -133), (11, -136)
# Instruction, the format and the mode of its one rounding, and the exact value from fp32 a, b, c.
FLOAT = {
    "fma.rn.f32 %r1, %r2, %r3, %r4": (F32, "rn", lambda a, b, c: a * b + c),
    "fma.rz.f32 %r1, %r2, %r3, %r4": (F32, "rz", lambda a, b, c: a * b + c),
    "add.rp.f32 %r1, %r2, %r3": (F32, "rp", lambda a, b, c: a + b),
    "sub.rm.f32 %r1, %r2, %r3": (F32, "rm", lambda a, b, c: a - b),
    "mul.rm.f32 %r1, %r2, %r3": (F32, "rm", lambda a, b, c: a * b),
    "div.rn.f32 %r1, %r2, %r3": (F32, "rn", lambda a, b, c: a / b),
    "rcp.rz.f32 %r1, %r2": (F32, "rz", lambda a, b, c: 1 / a),
    "cvt.rna.tf32.f32 %r1, %r2": (TF32, "rna", lambda a, b, c: a),
    "cvt.rn.f16.f32 %h1, %r2; cvt.f32.f16 %r1, %h1": (F16, "rn", lambda a, b, c: a),
    "cvt.rz.f16.f32 %h1, %r2; cvt.f32.f16 %r1, %h1": (F16, "rz", lambda a, b, c: a),
    "cvt.rm.f16.f32 %h1, %r2; cvt.f32.f16 %r1, %h1": (F16, "rm", lambda a, b, c: a),
    "cvt.rp.f16.f32 %h1, %r2; cvt.f32.f16 %r1, %h1": (F16, "rp", lambda a, b, c: a),
    "cvt.rn.bf16.f32 %h1, %r2; cvt.f32.bf16 %r1, %h1": (BF16, "rn", lambda a, b, c: a),
    "cvt.rz.bf16.f32 %h1, %r2; cvt.f32.bf16 %r1, %h1": (BF16, "rz", lambda a, b, c: a),
    "cvt.rn.bf16x2.f32 %r5, %r2, %r3; and.b32 %r1, %r5, 0xffff0000": (BF16, "rn", lambda a, b, c: a),
    "cvt.rn.bf16x2.f32 %r5, %r2, %r3; shl.b32 %r1, %r5, 16": (BF16, "rn", lambda a, b, c: b),
    "cvt.rn.relu.bf16.f32 %h1, %r2; cvt.f32.bf16 %r1, %h1": (BF16, "rn", lambda a, b, c: max(a, Fraction(0))),
    "cvt.f64.f32 %d1, %r2; cvt.f64.f32 %d2, %r3; mul.f64 %d1, %d1, %d2; cvt.rz.f32.f64 %r1, %d1": (
        F32,
        "rz",
        lambda a, b, c: a * b,
    ),
    "cvt.rni.f32.f32 %r1, %r2": ((200, 0), "rn", lambda a, b, c: a),
    "cvt.rmi.f32.f32 %r1, %r2": ((200, 0), "rm", lambda a, b, c: a),
    "cvt.rzi.s32.f32 %r5, %r2; cvt.rn.f32.s32 %r1, %r5": ((200, 0), "rz", lambda a, b, c: a),
}
# One rounding, of operands that are of the type already.
NARROW = {
    "fma.rn.{t} %h1, %h2, %h3, %h4": lambda x, y, z: x * y + z,
    "add.{t} %h1, %h2, %h3": lambda x, y, z: x + y,
    "sub.{t} %h1, %h2, %h3": lambda x, y, z: x - y,
    "mul.{t} %h1, %h2, %h3": lambda x, y, z: x * y,
    "max.{t} %h1, %h2, %h3": lambda x, y, z: max(x, y),
}


def narrow_text(form: str, type_: str) -> str:
    loads = " ".join(f"cvt.rn.{type_}.f32 %h{i}, %r{i};" for i in (2, 3, 4))
    return f"{loads} {form.format(t=type_)}; cvt.f32.{type_} %r1, %h1"


PROGRAMS = [*INTEGER, *FLOAT, *(narrow_text(f, t) for f in NARROW for t in ("f16", "bf16"))]


@functools.cache
def results() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs [3, N] and outputs [N], as 32-bit words, of each program: one kernel a program, one thread an input."""
    rng = np.random.default_rng(0)
    integers = rng.integers(0, 1 << 32, (3, N), dtype=np.uint32)
    integers[1, ::2] %= 40  # shift counts and positions that matter
    integers[2, ::3] %= 36
    integers[:, :4] = [[0, 1 << 31, M32, 1], [M32, M32, 0, 0], [0, 32, 31, 255]]
    floats = (rng.standard_normal((3, N)) * 2.0 ** rng.integers(-12, 12, (3, N))).astype(np.float32)
    floats[:, 0] = 1
    floats[0, 1:9] = [65519, 2.0**-25, -(2.0**-24) * 1.5, 2.5, 3.5, -0.5, 1 + 2.0**-11, 1 + 3 * 2.0**-9]
    head = ".version 8.0\n.target sm_80\n.address_size 64\n"
    text = "".join(
        f".visible .entry k{i}(.param .u64 from, .param .u64 to) {{ .reg .b64 %a<4>; .reg .b64 %d<4>; .reg .b32 %r<8>;"
        " .reg .b16 %h<8>; .reg .pred %p<4>; mov.u32 %r7, %tid.x; mul.wide.u32 %a3, %r7, 4; ld.param.u64 %a1, [from];"
        " ld.param.u64 %a2, [to]; add.u64 %a1, %a1, %a3; add.u64 %a2, %a2, %a3;"
        f" ld.global.b32 %r2, [%a1]; ld.global.b32 %r3, [%a1+{4 * N}]; ld.global.b32 %r4, [%a1+{8 * N}];\n"
        f"{program};\n st.global.b32 [%a2], %r1; ret; }}\n"
        for i, program in enumerate(PROGRAMS)
    )
    library, run = ctypes.CDLL(str(build_ptx(head + text, "instructions"))), runtime().library
    module = ctypes.c_void_p.in_dll(library, "ptx_exported_module")
    out = {}
    for i, program in enumerate(PROGRAMS):
        inputs = integers if program in INTEGER else floats.view(np.uint32)
        to = np.zeros(N, np.uint32)
        parameters = np.array([inputs.ctypes.data, to.ctypes.data], np.uint64)
        kernel = ctypes.c_void_p(run.ptx_find(module, f"k{i}".encode()))
        code = run.ptx_run(kernel, (ctypes.c_uint * 6)(1, 1, 1, N, 1, 1), 0, ctypes.c_void_p(parameters.ctypes.data))
        assert not code, runtime().message()
        out[program] = inputs, to
    return out


@pytest.mark.parametrize("program", INTEGER)
def test_integer(program):
    inputs, out = results()[program]
    for a, b, c, got in zip(*inputs.tolist(), out.tolist(), strict=True):
        if "rem" in program and (a, b) == (0x80000000, M32):
            continue
        assert got == INTEGER[program](a, b, c) & M32, (a, b, c)


def check_floats(program, format_, mode, exact, operand_format=None):
    inputs, out = results()[program]
    for *words, got in zip(*inputs.view(np.float32).tolist(), out.view(np.float32).tolist(), strict=True):
        operands = [Fraction(w) for w in words]
        if operand_format:
            operands = [rounded(x, *operand_format, "rn") for x in operands]
        want = rounded(exact(*operands), *format_, mode)
        if format_ == F16 and max(abs(want), *map(abs, operands if operand_format else [0])) > 65504:
            continue  # infinity, where fractions have none
        assert Fraction(got) == want, (words, got, float(want))


@pytest.mark.parametrize("program", FLOAT)
def test_rounding(program):
    check_floats(program, *FLOAT[program])


@pytest.mark.parametrize("type_", ["f16", "bf16"])
@pytest.mark.parametrize("form", NARROW)
def test_narrow_arithmetic_rounds_once(form, type_):
    format_ = F16 if type_ == "f16" else BF16
    check_floats(narrow_text(form, type_), format_, "rn", NARROW[form], format_)
