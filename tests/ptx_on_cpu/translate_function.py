"""Translates one PTX function to C++: registers are local variables, labels are goto targets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .instruction_table import CPP, Context, translate_instruction
from .ptx_parser import (
    SIZES,
    BranchTargets,
    Function,
    Instruction,
    Label,
    PtxError,
    Registers,
    Scope,
    Variable,
)

if TYPE_CHECKING:
    from .translate import ModuleTranslator

SPECIAL = {
    "%laneid": "t.lane",
    "%warpid": "(t.linear / 32)",
    "%nwarpid": "t.block->warps",
    "%lanemask_eq": "(1u << t.lane)",
    "%lanemask_lt": "((1u << t.lane) - 1)",
    "%lanemask_le": "((2u << t.lane) - 1)",
    "%lanemask_gt": "(~((2u << t.lane) - 1))",
    "%lanemask_ge": "(~((1u << t.lane) - 1))",
    "%clock": "u32(next_clock())",
    "%clock64": "next_clock()",
    "%globaltimer": "next_clock()",
    "%smid": "0u",
    "%nsmid": "u32(ptx_options()->processors)",
    "%gridid": "u64(0)",
    "%cluster_ctarank": "0u",
    "%cluster_nctarank": "1u",
    "%dynamic_smem_size": "(t.shared_bytes - SHARED_BYTES)",
    "WARP_SZ": "32u",
}
for _axis in "xyz":
    SPECIAL[f"%tid.{_axis}"] = f"t.id.{_axis}"
    SPECIAL[f"%ntid.{_axis}"] = f"t.block->size.{_axis}"
    SPECIAL[f"%ctaid.{_axis}"] = f"t.block->id.{_axis}"
    SPECIAL[f"%nctaid.{_axis}"] = f"t.block->grid.{_axis}"
    SPECIAL[f"%clusterid.{_axis}"] = f"t.block->id.{_axis}"
    SPECIAL[f"%nclusterid.{_axis}"] = f"t.block->grid.{_axis}"
    SPECIAL[f"%cluster_ctaid.{_axis}"] = "0u"
    SPECIAL[f"%cluster_nctaid.{_axis}"] = "1u"

UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64", 16: "u128"}


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.replace("$", "_D_").replace("%", ""))


class _Names:
    """What the names of one { } block mean; unknown ones are looked up outside."""

    def __init__(self, outer: _Names | None, suffix: str):
        self.outer, self.suffix = outer, suffix
        self.registers: dict[str, str] = {}  # register, or prefix of numbered ones, to its type
        self.ranges: dict[str, tuple[str, int]] = {}
        self.variables: dict[str, str] = {}
        self.labels: set[str] = set()
        self.targets: dict[str, list[str]] = {}

    def chain(self):
        names: _Names | None = self
        while names:
            yield names
            names = names.outer


class FunctionTranslator:
    """Collects the C++ of one function."""

    def __init__(self, module: ModuleTranslator, function: Function):
        self.module, self.function = module, function
        self.locals: dict[str, str] = {}
        self.arrays: list[str] = []
        self.code: list[str] = []
        self.scopes = 0
        self.names = _Names(None, "")
        self.shared: dict[str, int] = {}
        self.location: tuple[int, int] | None = None
        self.uses_carry = False
        self.called: set[str] = set()

    def run(self) -> str:
        assert self.function.body
        self._scope(self.function.body, self.names)
        f = self.function
        head = (
            f"void e_{identifier(f.name)}(Thread& t, const u8* P)"
            if f.entry
            else f"void f_{identifier(f.name)}(Thread& t, u8* const* R, u8* const* A)"
        )
        declarations = [f"  {cpp} {name}{{}};" for name, cpp in self.locals.items()] + self.arrays
        if self.uses_carry:
            declarations.append("  u32 carry = 0;")
        return "\n".join([head + " {", *declarations, *self.code, "}"])

    # Statements

    def _scope(self, scope: Scope, names: _Names) -> None:
        for item in scope.items:
            if isinstance(item, Label):
                names.labels.add(item.name)
            elif isinstance(item, BranchTargets):
                names.targets[item.name] = item.labels
        self.names = names
        for item in scope.items:
            if isinstance(item, Scope):
                self.scopes += 1
                self._scope(item, _Names(names, f"_{self.scopes}"))
                self.names = names
            elif isinstance(item, Registers):
                if item.count is None:
                    names.registers[item.prefix] = item.type
                else:
                    names.ranges[item.prefix] = (item.type, item.count)
            elif isinstance(item, Variable):
                self._variable(item, names)
            elif isinstance(item, Label):
                self.code.append(f"{self.label(item.name)}:;")
            elif isinstance(item, Instruction):
                self._instruction(item)

    def _variable(self, v: Variable, names: _Names) -> None:
        if v.space == "shared":
            offset = self.module.place_shared(v, self.function)
            names.variables[v.name] = f"u64({offset})"
        elif v.space in ("local", "param"):
            name = f"m_{identifier(v.name)}{names.suffix}"
            names.variables[v.name] = f"u64({name})"
            self.arrays.append(f"  alignas({max(v.align, 8)}) u8 {name}[{max(v.bytes or 0, 1)}];")
        else:
            names.variables[v.name] = self.module.add_global(v, self.function.name)

    def _instruction(self, item: Instruction) -> None:
        text = translate_instruction(self, item)
        if item.guard:
            guard = self.register(item.guard)
            if not guard or guard[1] != "pred":
                raise PtxError(f"PTX line {item.line}: no such predicate: {item.text}")
            text = f"if ({'!' if item.negated else ''}{guard[0]}) {{ {text} }}"
        if item.location and item.location != self.location:
            self.location = item.location
            self.code.append(f'#line {item.location[1]} "{self.module.file(item.location[0])}"')
        self.code.append("  " + text)

    # Names

    def register(self, name: str) -> tuple[str, str] | None:
        """The C++ variable and the PTX type of a register, None when the name is no register."""
        for names in self.names.chain():
            if type_ := names.registers.get(name):
                return self._declare(name, names, type_)
            if match := re.fullmatch(r"(.*?)(\d+)", name):
                ranged = names.ranges.get(match[1])
                if ranged and int(match[2]) < ranged[1]:
                    return self._declare(name, names, ranged[0])
        return None

    def _declare(self, name: str, names: _Names, type_: str) -> tuple[str, str]:
        cpp = "bool" if type_ == "pred" else UNSIGNED[SIZES[type_]]
        variable = f"r_{identifier(name)}{names.suffix}"
        self.locals[variable] = cpp
        return variable, type_

    def label(self, name: str) -> str:
        for names in self.names.chain():
            if name in names.labels:
                return f"L_{identifier(name)}{names.suffix}"
        raise PtxError(f"{self.function.name}: no such label: {name}")

    def targets(self, name: str) -> list[str]:
        for names in self.names.chain():
            if name in names.targets:
                return [self.label(label) for label in names.targets[name]]
        raise PtxError(f"{self.function.name}: no such branch targets: {name}")

    def symbol(self, context: Context, name: str) -> str:
        """The address of a variable as a u64; for shared memory the offset."""
        for names in self.names.chain():
            if address := names.variables.get(name):
                return address
        f = self.function
        for i, p in enumerate(f.parameters):
            if p.name == name:
                return f"(u64(P) + {p.offset})" if f.entry else f"u64(A[{i}])"
        for i, p in enumerate(f.results):
            if p.name == name:
                return f"u64(R[{i}])"
        if address := self.module.symbol(name, f):
            return address
        context.fail(f"unknown name {name}")
        raise AssertionError

    def site(self, item: Instruction) -> int:
        return self.module.site(item)

    # Operands

    def value(self, context: Context, operand: str, type_: str) -> str:
        """A C++ expression of type CPP[type_]."""
        cpp = CPP[type_]
        if operand.startswith("{") and len(inner := operand.strip("{} ").split(",")) == 1:
            operand = inner[0].strip()
        if operand.startswith("!") and type_ == "pred":
            return f"!{self.value(context, operand[1:].strip(), type_)}"
        if found := self.register(operand):
            return self._view(context, found[0], found[1], type_)
        if operand in SPECIAL:
            return f"{cpp}({SPECIAL[operand]})"
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return (
                f"PTX_BITS(f32, 0x{match[1]}u)"
                if type_ == "f32"
                else self._literal(context, f"0x{match[1]}u", type_, 4)
            )
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            return (
                f"PTX_BITS(f64, 0x{match[1]}ull)"
                if type_ == "f64"
                else self._literal(context, f"0x{match[1]}ull", type_, 8)
            )
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0 if not re.fullmatch(r"-?0\d+U?", operand) else 8)
            if type_ == "pred":
                return "true" if number else "false"
            if type_ in ("f32", "f64"):
                return f"{cpp}({number})"
            return self._literal(context, f"{number & (1 << 64) - 1:#x}ull", type_, SIZES[type_])
        if type_ in ("f32", "f64") and re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", operand):
            return f"{cpp}({operand})"
        return f"{cpp}({self.address(context, operand)})"

    def _literal(self, context: Context, bits: str, type_: str, size: int) -> str:
        if type_ in ("f16", "bf16", "f32", "f64"):
            if SIZES[type_] != size:
                context.fail(f"a constant of {size} bytes where .{type_} is wanted")
            return f"PTX_BITS({CPP[type_]}, {UNSIGNED[size]}({bits}))"
        return f"{CPP[type_]}({bits})"

    def _view(self, context: Context, name: str, held: str, type_: str) -> str:
        if (held == "pred") != (type_ == "pred"):
            context.fail(f"a register of type .{held} where .{type_} is wanted")
        if type_ == "pred":
            return name
        size, want = SIZES[held], SIZES[type_]
        if want > size and held[0] != type_[0] and type_ in ("f32", "f64"):
            context.fail(f"a register of type .{held} is too small for .{type_}")
        bits = name if want == size else f"{UNSIGNED[want]}({name})"
        cpp = CPP[type_]
        if cpp in ("f16", "bf16", "f32", "f64"):
            return f"PTX_BITS({cpp}, {bits})"
        return bits if cpp == UNSIGNED[want] else f"{cpp}({bits})"

    def assign(self, context: Context, operand: str, type_: str, expression: str) -> str:
        """A statement that puts an expression of type CPP[type_] into a register; narrow values are extended."""
        if operand == "_":
            return f"(void)({expression});"
        if operand.startswith("{") and len(inner := operand.strip("{} ").split(",")) == 1:
            operand = inner[0].strip()
        found = self.register(operand)
        if not found:
            context.fail(f"{operand} is no register")
            raise AssertionError
        name, held = found
        if (held == "pred") != (type_ == "pred"):
            context.fail(f"a register of type .{held} where .{type_} is wanted")
        if type_ == "pred":
            return f"{name} = {expression};"
        cpp, want = CPP[type_], SIZES[type_]
        if cpp in ("f16", "bf16", "f32", "f64"):
            return f"{name} = PTX_BITS({UNSIGNED[want]}, {cpp}({expression}));"
        if SIZES[held] < want:
            context.fail(f"a register of type .{held} is too small for .{type_}")
        # Through the value's own type, so that signed values extend their sign.
        return f"{name} = {UNSIGNED[SIZES[held]]}({cpp}({expression}));"

    def address(self, context: Context, text: str) -> str:
        """`name`, `register`, either with + or - a constant, or a constant: a u64."""
        if match := re.fullmatch(r"generic\((.*)\)", text):
            text = match[1]
        match = re.fullmatch(r"([%\w$.]+?)\s*(?:([+-])\s*(-?(?:0[xX][0-9a-fA-F]+|\d+)))?", text)
        if not match:
            context.fail(f"address not understood: {text}")
            raise AssertionError
        offset = int(match[3], 0) * (-1 if match[2] == "-" else 1) if match[3] else 0
        if found := self.register(match[1]):
            base = f"u64({found[0]})"
        elif re.fullmatch(r"0[xX][0-9a-fA-F]+|\d+", match[1]):
            base = f"u64({match[1]})"
        else:
            base = self.symbol(context, match[1])
        return f"({base} {'-' if offset < 0 else '+'} {abs(offset)})" if offset else base
