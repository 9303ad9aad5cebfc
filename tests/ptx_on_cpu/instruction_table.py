"""The table of instructions, which the ops_* files fill, and what a handler sees of one instruction.

A handler returns C++ statements. It takes the modifiers that it understands; one that is left over makes the
translation fail, so that no variant of an instruction passes as another one.
"""

from collections.abc import Callable

from .ptx_parser import SIZES, Instruction, PtxError

# C++ types by PTX type. Packed types are handled as their bits.
CPP = {t: t.replace("b", "u", 1) if t[0] == "b" and t[1].isdigit() else t for t in SIZES}
CPP |= {"pred": "bool", "f16x2": "u32", "bf16x2": "u32", "u16x2": "u32", "s16x2": "u32", "tf32": "u32", "f32x2": "u64"}
FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2"}
ROUNDINGS = {"rn": "kNearest", "rz": "kZero", "rm": "kDown", "rp": "kUp"}
INTEGER_ROUNDINGS = {"rni": "kNearest", "rzi": "kZero", "rmi": "kDown", "rpi": "kUp"}

Handler = Callable[["Context"], str]
_table: dict[tuple[str, str], Handler] = {}


def instruction(*opcodes: str, types: str = "any"):
    """Registers a handler for opcodes; types "integer" or "float" where one opcode has two."""

    def register(handler: Handler) -> Handler:
        for opcode in opcodes:
            _table[opcode, types] = handler
        return handler

    return register


class Context:
    """One instruction in translation: its modifiers as far as not yet taken, and its operands as C++ text."""

    def __init__(self, function, item: Instruction):
        self.function, self.item = function, item
        self.opcode = item.opcode
        self.left = list(item.modifiers)
        self.operands = item.operands

    def fail(self, reason: str):
        raise PtxError(f"PTX line {self.item.line}: {reason}: {self.item.text}")

    def take(self, *names: str) -> str | None:
        """The first of `names` among the modifiers, which is then taken; None without one."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return None

    def flag(self, name: str) -> bool:
        return self.take(name) is not None

    def need(self, *names: str) -> str:
        return self.take(*names) or self.fail(f"one of .{', .'.join(names)} is wanted")

    def drop(self, *names: str) -> None:
        """Takes modifiers that change nothing here, such as cache hints."""
        self.left = [m for m in self.left if m not in names]

    def types(self) -> list[str]:
        found = [m for m in self.left if m in SIZES]
        self.left = [m for m in self.left if m not in SIZES]
        return found

    def type(self) -> str:
        """The one type of the instruction."""
        found = self.types()
        if len(found) != 1:
            self.fail("one type is wanted")
        return found[0]

    def rounding(self) -> str:
        return ROUNDINGS[self.take(*ROUNDINGS) or "rn"]

    def value(self, index: int, type_: str) -> str:
        if index >= len(self.operands):
            self.fail("an operand is missing")
        return self.function.value(self, self.operands[index], type_)

    def assign(self, index: int, type_: str, expression: str) -> str:
        return self.function.assign(self, self.operands[index], type_, expression)

    def set(self, operand: str, type_: str, expression: str) -> str:
        return self.function.assign(self, operand, type_, expression)

    def get(self, operand: str, type_: str) -> str:
        return self.function.value(self, operand, type_)

    @property
    def site(self) -> str:
        return f"S({self.function.site(self.item)})"


def translate_instruction(function, item: Instruction) -> str:
    """C++ of one instruction without its guard. PtxError where the table has no such instruction or variant."""
    context = Context(function, item)
    types = [m for m in item.modifiers if m in SIZES]
    family = "float" if types and types[-1] in FLOATS else "integer"
    handler = _table.get((item.opcode, family)) or _table.get((item.opcode, "any"))
    if not handler:
        context.fail("unknown instruction")
        raise AssertionError
    text = handler(context)
    if context.left:
        context.fail(f"unknown modifier .{context.left[0]}")
    return text
