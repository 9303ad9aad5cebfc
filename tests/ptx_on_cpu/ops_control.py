"""Branches, calls and the end of threads."""

from .instruction_table import Context, instruction
from .ptx_parser import split
from .translate_function import identifier


@instruction("bra")
def branch(c: Context) -> str:
    c.flag("uni")
    return f"goto {c.function.label(c.operands[0])};"


@instruction("brx")
def branch_table(c: Context) -> str:
    c.need("idx")
    c.flag("uni")
    cases = " ".join(f"case {i}: goto {label};" for i, label in enumerate(c.function.targets(c.operands[1])))
    return f"switch ({c.value(0, 'u32')}) {{ {cases} }}"


@instruction("ret", "exit")
def leave(c: Context) -> str:
    c.flag("uni")
    if c.opcode == "exit" and not c.function.function.entry:
        c.fail("not supported in a function that is not inlined")
    return "return;"


@instruction("call")
def call(c: Context) -> str:
    c.flag("uni")
    operands = list(c.operands)
    results = split(operands.pop(0).strip("()")) if operands[0].startswith("(") else []
    name = operands.pop(0)
    arguments = split(operands[0].strip("()")) if operands else []
    addresses = [c.function.symbol(c, a) for a in arguments]
    if name == "vprintf":
        loads = ", ".join(f"load<u64>({a})" for a in addresses)
        return f"device_printf(t, {loads}, {c.site}); store<u32>({c.function.symbol(c, results[0])}, 0);"
    if name == "__assertfail":
        message, file, line, function = addresses[:4]
        values = f"load<u64>({message}), load<u64>({file}), load<u32>({line}), load<u64>({function})"
        return f"device_assert(t, {values}, {c.site});"
    if name not in c.function.module.defined:
        c.fail("calls of functions that are not in the module, and through pointers, are not supported")
    c.function.called.add(name)
    def pointers(values: list[str]) -> str:
        return ", ".join(f"reinterpret_cast<u8*>({v})" for v in values) or "nullptr"

    returned = [c.function.symbol(c, r) for r in results]
    text = f"{{ u8* const R_[] = {{{pointers(returned)}}}; u8* const A_[] = {{{pointers(addresses)}}}; "
    return text + f"f_{identifier(name)}(t, R_, A_); }}"


@instruction("trap")
def trap(c: Context) -> str:
    return f'fail(t, {c.site}, kLaunchFailure, "trap");'


@instruction("nanosleep")
def sleep(c: Context) -> str:
    c.types()
    return "yield(t);"


@instruction("griddepcontrol", "setmaxnreg", "pmevent", "brkpt", "nop")
def nothing(c: Context) -> str:
    c.left = []
    return ";"
