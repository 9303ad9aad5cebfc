"""Matrix products: mma.sync, wmma and wgmma, of f16, bf16 and tf32."""

import re

from .instruction_table import Context, instruction
from .ops_memory import CHECKS, space_of
from .ptx_parser import split

ELEMENTS = {"f16": "kF16", "bf16": "kBf16", "tf32": "kTf32"}


def _registers(operand: str) -> list[str]:
    return split(operand.strip().strip("{}"))


def _array(c: Context, name: str, operands: list[str], size: int) -> str:
    return f"const u32 {name}[{size}] = {{{', '.join(c.get(o, 'b32') for o in operands)}}};"


def _shape(c: Context) -> tuple[int, int, int]:
    for m in c.left:
        if match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", m):
            c.left.remove(m)
            return int(match[1]), int(match[2]), int(match[3])
    c.fail("a shape is wanted")
    raise AssertionError


@instruction("mma")
def mma(c: Context) -> str:
    c.need("sync")
    c.need("aligned")
    m, n, k = _shape(c)
    c.need("row")
    c.need("col")
    types = c.types()
    if (
        len(types) != 4
        or types[1] != types[2]
        or types[0] != types[3]
        or types[1] not in ELEMENTS
        or types[0] not in ("f16", "f32")
    ):
        c.fail("types not supported")
    element = types[1]
    if (m, n) != (16, 8) or k not in ({4, 8} if element == "tf32" else {8, 16}):
        c.fail("shape not supported")
    d, a, b, accumulators = (_registers(o) for o in c.operands)
    half = types[0] == "f16"
    words = k // 2 if element == "tf32" else k // 4
    if len(a) != words or len(b) != words // 2 or len(d) != len(accumulators) or len(d) != (2 if half else 4):
        c.fail("wrong number of registers")
    # The lanes meet in order, so results may overwrite operands only afterwards.
    text = f"{{ {_array(c, 'a', a, 4)} {_array(c, 'b', b, 2)} {_array(c, 'c', accumulators, 4)} u32 d[4]; "
    text += f"PTX_FLOPS(tensor, {2 * m * n * k // 32}); "
    text += f"mma(t, {ELEMENTS[element]}, {k}, {str(half).lower()}, d, a, b, c, {c.site}); "
    return text + " ".join(c.set(o, "b32", f"d[{i}]") for i, o in enumerate(d)) + " }"


@instruction("wmma")
def wmma(c: Context) -> str:
    operation = c.need("load", "store", "mma")
    matrix = c.take("a", "b", "c", "d") if operation != "mma" else None
    c.need("sync")
    c.need("aligned")
    if operation == "mma":
        return _wmma_product(c)
    layout = c.need("row", "col")
    m, n, k = _shape(c)
    space = space_of(c)
    type_ = c.type()
    rows, columns = {"a": (m, k), "b": (k, n)}.get(matrix or "", (m, n))
    bytes_ = 2 if type_ in ("f16", "bf16") else 4
    store = operation == "store"
    registers = _registers(c.operands[1 if store else 0])
    address = c.function.address(c, c.operands[0 if store else 1].strip("[] "))
    stride = c.get(c.operands[2], "u32") if len(c.operands) > 2 else str(rows if layout == "col" else columns)
    each = rows * columns // 32
    at = f"fragment_address(t, {{{rows}, {columns}, {bytes_}}}, e, {str(layout == 'col').lower()}, {address}, {stride})"
    checked = f"{CHECKS[space]}<{str(store).lower()}>(t, {at}, {bytes_}, {c.site})"
    word, mask = ("e / 2", "16 * (e & 1)") if bytes_ == 2 else ("e", "0")
    cpp = f"u{bytes_ * 8}"
    size = max(len(registers), (each * bytes_ + 3) // 4)
    if store:
        text = f"{{ {_array(c, 'r', registers, size)} for (u32 e = 0; e < {each}; e++) "
        return text + f"store<{cpp}>({checked}, {cpp}(r[{word}] >> {mask})); }}"
    text = f"{{ u32 r[{size}] = {{}}; for (u32 e = 0; e < {each}; e++) "
    text += f"r[{word}] |= u32(load<{cpp}>({checked})) << {mask}; "
    return text + " ".join(c.set(o, "b32", f"r[{i}]") for i, o in enumerate(registers)) + " }"


def _wmma_product(c: Context) -> str:
    c.need("row", "col")
    c.need("row", "col")
    m, n, k = _shape(c)
    types = c.types()
    # f16 is not written in its own products: .d.c then, .d.a.b.c for the others.
    element = types[1] if len(types) == 4 else "f16"
    if (
        len(types) not in (2, 4)
        or element not in ELEMENTS
        or types[0] not in ("f16", "f32")
        or types[-1] not in ("f16", "f32")
    ):
        c.fail("types not supported")
    d, a, b, accumulators = (_registers(o) for o in c.operands)
    arrays = [_array(c, n, r, len(r)) for n, r in (("a", a), ("b", b), ("c", accumulators))]
    text = f"{{ {' '.join(arrays)} u32 d[{len(d)}]; "
    halves = f"{str(types[-1] == 'f16').lower()}, {str(types[0] == 'f16').lower()}"
    text += f"PTX_FLOPS(tensor, {2 * m * n * k // 32}); "
    text += f"wmma(t, {ELEMENTS[element]}, {m}, {n}, {k}, {halves}, d, a, b, c, {c.site}); "
    return text + " ".join(c.set(o, "b32", f"d[{i}]") for i, o in enumerate(d)) + " }"


@instruction("wgmma")
def wgmma(c: Context) -> str:
    operation = c.need("fence", "commit_group", "wait_group", "mma_async")
    c.need("sync")
    c.need("aligned")
    if operation != "mma_async":
        return ";"  # products are done when they are issued
    m, n, k = _shape(c)
    types = c.types()
    if len(types) != 3 or types[1] != types[2] or types[1] not in ELEMENTS or types[0] not in ("f16", "f32"):
        c.fail("types not supported")
    element = types[1]
    if m != 64 or k != (8 if element == "tf32" else 16):
        c.fail("shape not supported")
    d, a, b, accumulate, *flags = c.operands
    registers = _registers(d)
    half = types[0] == "f16"
    from_registers = a.startswith("{")
    negate_a, negate_b, *transposes = [int(f) for f in flags]
    # tf32 has none, operands in registers neither.
    transpose_a, transpose_b = (0, *transposes, 0)[:2] if from_registers else (*transposes, 0, 0)[:2]
    if len(registers) != n // (4 if half else 2):
        c.fail("wrong number of registers")
    text = f"{{ u32 d[{len(registers)}] = {{{', '.join(c.get(o, 'b32') for o in registers)}}}; "
    if from_registers:
        text += _array(c, "a", _registers(a), 4) + " "
    accumulates = c.get(accumulate, "pred")
    text += f"Wgmma w{{{ELEMENTS[element]}, {n}, {str(half).lower()}, {accumulates}, {negate_a} < 0, {negate_b} < 0, "
    text += f"bool({transpose_a}), bool({transpose_b}), "
    text += ("a, 0" if from_registers else f"nullptr, {c.get(a, 'b64')}") + f", {c.get(b, 'b64')}, d}}; "
    text += f"PTX_FLOPS(tensor, {2 * m * n * k // 128}); wgmma(t, w, {c.site}); "
    return text + " ".join(c.set(o, "b32", f"d[{i}]") for i, o in enumerate(registers)) + " }"
