"""The emulator instruction by instruction: addressing forms, registers, page edges, and misuse that it must refuse."""

import ctypes
import itertools
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from . import cpu_flags, enable, needed, unavailable
from .programs import PAGE, Pages, address, assemble, call, config, text, tiles

pytestmark = pytest.mark.skipif(needed() and unavailable() is not None, reason=f"AMX emulator: {unavailable()}")
emulated = pytest.mark.skipif(not needed(), reason="about the emulator itself, and this CPU has AMX")

REGISTERS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
SAVE = "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15"
RESTORE = "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx"
FULL = np.frombuffer(config((3, 16, 64), (4, 16, 64), (5, 16, 64)), np.uint8)
INSTRUCTIONS = {
    "load": "tileloadd {}, %tmm5",
    "load with hint": "tileloaddt1 {}, %tmm5",
    "store": "tilestored %tmm5, {}",
    "load config": "ldtilecfg {}",
    "store config": "sttilecfg {}",
}


@pytest.fixture(scope="module")
def lib():
    if needed():
        enable()
    return tiles()


class Form(NamedTuple):
    """One instruction whose memory operand is at the target. A tile has `rows` rows, `stride` bytes apart."""

    kind: str
    operand: str
    base: str | None
    index: str | None
    base_value: int
    index_value: int
    rows: int
    stride: int


def forms(target: int):
    """Every base with every index (None: absent), scales, displacements of 0, 8 and 32 bits and strides in turn."""
    turns = itertools.count()
    indices = [r for r in REGISTERS if r != "rsp"] + [None]
    for base, index, kind in itertools.product([*REGISTERS, None], indices, INSTRUCTIONS):
        n = next(turns)
        scale = (1, 2, 4, 8)[n // 5 % 4]
        displacement = (0, 8, -128, 127, 128, -129, 0x12345)[n // 3 % 7]
        value = (20, 24, -36, 0)[n // 7 % 4] if index else 0
        if base == "rsp":  # signal frames are written below it
            displacement, value = abs(displacement), abs(value)
        rows, is_config = 5, kind.endswith("config")
        offset = value * scale if is_config else 0  # the index moves a configuration; for a tile it is the stride
        if base is None:
            displacement, base_value = target - offset, 0
        elif base == index:
            factor, rows = (1 + scale if is_config else 1), 1
            displacement += (target - displacement) % factor
            base_value = value = (target - displacement) // factor
        else:
            base_value = target - displacement - offset
        inside = (f"%{base}" if base else "") + (f",%{index},{scale}" if index else "")
        operand = f"{displacement}({inside})" if inside else f"{displacement}"
        yield Form(kind, operand, base, index, base_value, value, rows, value * scale)


def function_of_form(name: str, form: Form) -> str:
    """f(base value, index value, plain): the instruction, before or after it the opposite one at the plain address."""
    return text(
        name,
        f"""
        {SAVE}
        mov %rsp, stack(%rip); mov %rdi, base(%rip); mov %rsi, index(%rip); mov %rdx, plain(%rip); mov $64, %ecx
        {"tileloadd (%rdx,%rcx), %tmm5" if form.kind == "store" else ""}
        {f"mov index(%rip), %{form.index}" if form.index else ""}
        {f"mov base(%rip), %{form.base}" if form.base else ""}
        {INSTRUCTIONS[form.kind].format(form.operand)}
        mov stack(%rip), %rsp; mov plain(%rip), %rdx; mov $64, %ecx
        {"tilestored %tmm5, (%rdx,%rcx)" if form.kind in ("load", "load with hint") else ""}
        {"sttilecfg (%rdx)" if form.kind == "load config" else ""}
        {RESTORE}""",
    )


def test_every_addressing_form(lib, tmp_path):
    memory = Pages(1 << 20, low=True)
    target = memory.start + (1 << 19)
    cases = list(forms(target))
    functions = "".join(function_of_form(f"form{i}", form) for i, form in enumerate(cases))
    variables = ".data\nbase: .quad 0\nindex: .quad 0\nplain: .quad 0\nstack: .quad 0\n"
    code = ctypes.CDLL(str(assemble(tmp_path, functions + variables)))

    rng = np.random.default_rng(0)
    around = np.frombuffer((ctypes.c_uint8 * (2 * PAGE)).from_address(target - PAGE), np.uint8)
    for i, form in enumerate(cases):
        around[:] = rng.integers(0, 256, around.size)
        plain = rng.integers(0, 256, (16, 64)).astype(np.uint8)
        cfg = np.frombuffer(config((5, form.rows, 20), (i % 5, 1 + i % 16, 4 * (1 + i % 13))), np.uint8)
        if form.kind == "load config":
            around[PAGE : PAGE + 64] = cfg
        else:
            call(lib.load_config, cfg)
        want, want_plain = around.copy(), plain.copy()
        for row in range(form.rows):
            here = slice(PAGE + row * form.stride, PAGE + row * form.stride + 20)
            if form.kind in ("load", "load with hint"):
                want_plain[row, :20] = want[here]
            elif form.kind == "store":
                want[here] = plain[row, :20]
        if form.kind == "load config":
            want_plain.ravel()[:64] = cfg
        elif form.kind == "store config":
            want[PAGE : PAGE + 64] = cfg
        call(code[f"form{i}"], form.base_value, form.index_value, plain)
        lib.release()
        # Where rsp is the base, the memory below it belongs to the signal frame.
        mine = slice(PAGE if form.base == "rsp" else 0, None)
        assert (around[mine] == want[mine]).all(), form
        assert (plain == want_plain).all(), form
    memory.close()


def test_no_base_although_the_prefix_extends_one(lib):
    """mod 0 and base 101 mean a displacement alone, VEX.B or not; no assembler writes it with VEX.B."""
    memory = Pages(2 * PAGE, low=True)
    cfg = memory.put(config((5, 1, 4)), memory.start)
    for second in (0xE2, 0xC2):
        code = bytes([0xC4, second, 0x78, 0x49, 0x04, 0x25, *cfg.to_bytes(4, "little"), 0xC3])
        ctypes.CFUNCTYPE(None)(memory.put(code))()
        stored = np.zeros(64, np.uint8)
        call(lib.store_config, stored)
        lib.release()
        assert stored.tobytes() == memory.get(cfg, 64)
    memory.close()


def test_configuration_relative_to_rip(lib, tmp_path):
    cfg = config((2, 9, 44))
    data = ".data\ncfg: .byte " + ", ".join(map(str, cfg)) + "\ncopy: .skip 64\n.text\n"
    body = "ldtilecfg cfg(%rip); sttilecfg copy(%rip); tilerelease; lea copy(%rip), %rsi; mov $64, %ecx; rep movsb"
    code = ctypes.CDLL(str(assemble(tmp_path, data + text("f", body))))
    out = np.zeros(64, np.uint8)
    call(code.f, out)
    assert out.tobytes() == cfg


def test_keeps_every_register(lib, tmp_path):
    """General, vector and mask registers and the flags after a tile product are those set before it."""
    wide = "avx512bw" in cpu_flags()
    vector, count, size, move = ("zmm", 32, 64, "vmovdqu64") if wide else ("ymm", 16, 32, "vmovdqu")
    general = [r for r in REGISTERS if r not in ("rsp", "rdi")]
    at = {r: 8 * i for i, r in enumerate([*general, "rdi", "flags", *(f"k{i}" for i in range(8))])}
    vectors = {f"{vector}{i}": 256 + size * i for i in range(count)}
    masks = [f"k{i}" for i in range(8)] if wide else []
    body = f"""
        {SAVE}; mov %rsi, out(%rip); mov %rsp, stack(%rip)
        {"; ".join(f"{move} {offset}(%rdi), %{r}" for r, offset in vectors.items())}
        {"; ".join(f"kmovq {at[r]}(%rdi), %{r}" for r in masks)}
        push {at["flags"]}(%rdi); popf
        {"; ".join(f"mov {at[r]}(%rdi), %{r}" for r in [*general, "rdi"])}
        tdpbf16ps %tmm5, %tmm4, %tmm3
        mov %rdi, first(%rip); mov out(%rip), %rdi; mov stack(%rip), %rsp
        {"; ".join(f"mov %{r}, {at[r]}(%rdi)" for r in general)}
        pushf; pop {at["flags"]}(%rdi); mov first(%rip), %rax; mov %rax, {at["rdi"]}(%rdi)
        {"; ".join(f"{move} %{r}, {offset}(%rdi)" for r, offset in vectors.items())}
        {"; ".join(f"kmovq %{r}, {at[r]}(%rdi)" for r in masks)}
        vzeroupper; {RESTORE}"""
    variables = ".data\nout: .quad 0\nfirst: .quad 0\nstack: .quad 0\n"
    code = ctypes.CDLL(str(assemble(tmp_path, text("f", body) + variables)))
    given = np.random.default_rng(0).integers(0, 2**63, (256 + size * count) // 8, np.int64)
    given[at["flags"] // 8] = 0xAD7  # carry, parity, adjust, zero, sign, overflow and interrupts
    found = np.zeros_like(given)
    call(lib.load_config, FULL)
    call(code.f, given, found)
    lib.release()
    used = [at[r] // 8 for r in [*general, "rdi", "flags", *masks]] + list(range(32, given.size))
    assert (found[used] == given[used]).all()


def test_code_at_page_edges(lib, tmp_path):
    """The same code over a page edge at each of its bytes, and with its last byte before memory that cannot be read."""
    body = """ldtilecfg (%rdi); tilezero %tmm3; tileloadd 0x100(%rsi,%rdx), %tmm4; tileloadd (%rcx,%rdx), %tmm5
              tdpbf16ps %tmm5, %tmm4, %tmm3; tilestored %tmm3, (%r8,%rdx); tilerelease"""
    code = ctypes.CDLL(str(assemble(tmp_path, text("f", body))))
    start, end = address(code, "f"), address(code, "f_end")
    machine, ldtilecfg, ret = ctypes.string_at(start, end - start), 5, 1
    memory = Pages(2 * PAGE)
    edge = memory.start + PAGE
    ones = np.full((16, 32), 0x3F80, np.uint16)
    amx = enable() if needed() else None
    for at in [memory.end - len(machine), *(edge - before for before in range(len(machine) + 1))]:
        memory.put(machine, at)
        out = np.zeros((16, 16), np.float32)
        before = amx.counts() if amx else {}
        call(ctypes.CFUNCTYPE(None)(at), FULL, ones.ctypes.data - 0x100, 64, ones, out)
        assert (out == 32).all()
        if amx:
            # One trap for all; two where the edge leaves whole instructions before it and tile code behind it.
            two = at < edge and ldtilecfg <= edge - at < len(machine) - ret
            assert amx.counts()["traps"] - before["traps"] == 1 + two
    memory.close()


SETUP = f"""
import ctypes, faulthandler, sys, threading
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from amx_on_cpu import enable
from amx_on_cpu.programs import Pages, call, config, tiles
amx, lib, memory = enable(), tiles(), Pages(8192)
full = (3, 16, 64), (4, 16, 64), (5, 16, 64)
def configure(*shapes, **bytes_):
    data = bytearray(config(*shapes))
    for name, value in bytes_.items():
        data[int(name[1:])] = value
    call(lib.load_config, memory.put(bytes(data)))
def run(code):
    ctypes.CFUNCTYPE(None)(memory.put(bytes.fromhex(code) + bytes([0xc3]), memory.start))()
"""


def died(code: str, message: str, how: signal.Signals) -> str:
    done = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True)
    assert done.returncode == -how, done.stderr
    assert message in done.stderr
    return done.stderr


CONFIGURATIONS = [
    ("b0=0", "palette 0, want 1"),
    ("b0=2", "palette 2, want 1"),
    ("b1=3", "start_row 3, want 0"),
    *((f"b{i}=9", f"reserved byte {i} is 9, want 0") for i in (2, 15, 32, 47, 56, 63)),
    ("b51=17", "tile 3 has 17 rows, want at most 16"),
    ("b51=0", "tile 3 has 0 rows but colsb 64"),
    ("b22=65", "tile 3 has colsb 65, want at most 64"),
    ("b23=1", "tile 3 has colsb 320, want at most 64"),
    ("b22=0", "tile 3 has 16 rows but colsb 0"),
]


@emulated
@pytest.mark.parametrize("change, message", CONFIGURATIONS)
def test_bad_configuration(change, message):
    died(f"configure(*full, {change})", message, signal.SIGABRT)


MISUSES = {
    "load without configuration": ("call(lib.load_tile, memory.start, 64)", "TILELOADD", "no tile configuration"),
    "store without configuration": ("call(lib.store_tile, memory.start, 64)", "TILESTORED", "no tile configuration"),
    "zero without configuration": ("lib.zero_tile()", "TILEZERO", "no tile configuration"),
    "product without configuration": ("lib.dot()", "TDPBF16PS", "no tile configuration"),
    "product after release": ("configure(*full); lib.release(); lib.dot()", "TDPBF16PS", "no tile configuration"),
    "another thread's configuration": (
        "configure(*full); t = threading.Thread(target=lib.dot); t.start(); t.join()",
        "TDPBF16PS",
        "no tile configuration",
    ),
    "tile not configured": ("configure((3, 1, 4)); lib.zero_tile()", "TILEZERO", "tile 5 is not in the configuration"),
    "B not configured": ("configure(*full[:2]); lib.dot()", "TDPBF16PS", "tile 5 is not in the configuration"),
    "part of an element": (
        "configure((5, 2, 6)); call(lib.load_tile, memory.start, 64)",
        "TILELOADD",
        "tile 5 has colsb 6, want a multiple of 4",
    ),
    "C is A": ("configure(*full); run('c4e2525cdb')", "TDPBF16PS", "tiles 3, 3, 5 are not distinct"),
    "C is B": ("configure(*full); run('c4e2625cdc')", "TDPBF16PS", "tiles 3, 4, 3 are not distinct"),
    "A is B": ("configure(*full); run('c4e25a5cdc')", "TDPBF16PS", "tiles 3, 4, 4 are not distinct"),
    "depths differ": (
        "configure((3, 16, 64), (4, 16, 32), (5, 16, 64)); lib.dot()",
        "TDPBF16PS",
        "tile 4 (A) has colsb / 4 = 8 but tile 5 (B) has 16 rows",
    ),
    "columns differ": (
        "configure((3, 16, 60), (4, 16, 64), (5, 16, 64)); lib.dot()",
        "TDPBF16PS",
        "tile 3 (C) has colsb 60 but tile 5 (B) has colsb 64",
    ),
    "rows differ": (
        "configure((3, 15, 64), (4, 16, 64), (5, 16, 64)); lib.dot()",
        "TDPBF16PS",
        "tile 3 (C) has 15 rows but tile 4 (A) has 16",
    ),
    "configurations never released": (
        """
for i in range(300):
    t = threading.Thread(target=configure, args=full); t.start(); t.join()""",
        "LDTILECFG",
        "256 threads hold a tile configuration",
    ),
}


@emulated
@pytest.mark.parametrize("name", MISUSES)
def test_misuse(name):
    code, instruction, message = MISUSES[name]
    stderr = died(code, message, signal.SIGABRT)
    assert f"amx_on_cpu: {instruction} at 0x" in stderr


REFUSED = {
    "tdpbssd": "c4 e2 53 5e dc",
    "tdpfp16ps": "c4 e2 53 5c dc",
    "tdpbf16ps with VEX.L": "c4 e2 56 5c dc",
    "tdpbf16ps with VEX.W": "c4 e2 d2 5c dc",
    "tdpbf16ps of memory": "c4 e2 52 5c 1c 24",
    "tdpbf16ps to tmm11": "c4 62 52 5c dc",
    "tdpbf16ps of tmm12": "c4 c2 52 5c dc",
    "tdpbf16ps by tmm13": "c4 e2 12 5c dc",
    "tilezero tmm8": "c4 62 7b 49 c0",
    "tilezero with rm 1": "c4 e2 7b 49 c1",
    "tilezero with vvvv": "c4 e2 73 49 c0",
    "tilerelease with rm 1": "c4 e2 78 49 c1",
    "tileloadd without SIB": "c4 e2 7b 4b 2f",
    "tileloadd of registers": "c4 e2 7b 4b ec",
    "tileloadd with vvvv": "c4 e2 73 4b 2c 24",
    "4b without prefix": "c4 e2 78 4b 2c 24",
    "ldtilecfg with reg 1": "c4 e2 78 49 0c 24",
    "tileloadd in map 3": "c4 e3 7b 4b 2c 24",
    "segment prefix": "64 c4 e2 7b 4b 2c 24",
    "ud2": "0f 0b",
}


@emulated
@pytest.mark.parametrize("name", REFUSED)
def test_other_instructions_stay_illegal(name):
    code = f"configure(*full); run({REFUSED[name]!r})"
    died(code, f"not one that is emulated: {REFUSED[name]}", signal.SIGILL)


@emulated
def test_previous_handler_follows():
    stderr = died("faulthandler.enable(); enable(); run('0f 0b')", "not one that is emulated: 0f 0b", signal.SIGILL)
    assert "Fatal Python error: Illegal instruction" in stderr
    assert stderr.count("amx_on_cpu") == stderr.count("Fatal Python error") == 1
    # A signal that was sent is no instruction.
    assert "amx_on_cpu" not in died("import os; os.kill(os.getpid(), 4)", "", signal.SIGILL)
    # A handler installed later takes the place of the emulator's until enable() is called again.
    died("faulthandler.enable(); run('c4e27849c0')", "Fatal Python error: Illegal instruction", signal.SIGILL)


@pytest.mark.parametrize(
    "code",
    [
        "call(lib.load_tile, memory.end - 16 * 64 + 1, 64)",
        "call(lib.load_tile, memory.end - 15 * 80 - 63, 80)",
        "call(lib.load_tile, memory.start + 64, -64)",
        "call(lib.store_tile, memory.end - 16 * 64 + 1, 64)",
        "call(lib.load_config, memory.end - 63)",
    ],
)
@emulated
def test_one_byte_too_far(code):
    died(f"configure(*full); {code}", "", signal.SIGSEGV)


@emulated
def test_enable_again_changes_nothing(lib):
    amx = enable()
    assert amx is enable()
    before = amx.counts()
    call(lib.load_config, FULL)
    lib.release()
    after = amx.counts()
    assert after["LDTILECFG"] == before["LDTILECFG"] + 1 and after["traps"] == before["traps"] + 2
