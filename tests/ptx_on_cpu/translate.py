"""Translates a PTX module to C++: one function per entry, registers as local variables, labels as goto targets."""

import re

from . import ops_async, ops_control, ops_convert, ops_float, ops_integer, ops_memory, ops_mma, ops_warp  # noqa: F401
from .instruction_table import CPP, Context, translate_instruction
from .ptx_parser import (
    SIZES,
    BranchTargets,
    Function,
    Instruction,
    Label,
    Module,
    PtxError,
    Registers,
    Scope,
    Variable,
)

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

# Provided by the runtime.
EXTERNAL = {"vprintf", "__assertfail"}
_UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64", 16: "u128"}


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.replace("$", "_D_").replace("%", ""))


def _align(offset: int, align: int) -> int:
    return -(-offset // align) * align


class _Names:
    """What the names of one { } block mean; unknown ones are looked up outside."""

    def __init__(self, outer: "_Names | None", suffix: str):
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

    def __init__(self, module: "ModuleTranslator", function: Function):
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
        cpp = "bool" if type_ == "pred" else _UNSIGNED[SIZES[type_]]
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
            return f"PTX_BITS({CPP[type_]}, {_UNSIGNED[size]}({bits}))"
        return f"{CPP[type_]}({bits})"

    def _view(self, context: Context, name: str, held: str, type_: str) -> str:
        if (held == "pred") != (type_ == "pred"):
            context.fail(f"a register of type .{held} where .{type_} is wanted")
        if type_ == "pred":
            return name
        size, want = SIZES[held], SIZES[type_]
        if want > size and held[0] != type_[0] and type_ in ("f32", "f64"):
            context.fail(f"a register of type .{held} is too small for .{type_}")
        bits = name if want == size else f"{_UNSIGNED[want]}({name})"
        cpp = CPP[type_]
        if cpp in ("f16", "bf16", "f32", "f64"):
            return f"PTX_BITS({cpp}, {bits})"
        return bits if cpp == _UNSIGNED[want] else f"{cpp}({bits})"

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
            return f"{name} = PTX_BITS({_UNSIGNED[want]}, {cpp}({expression}));"
        if SIZES[held] < want:
            context.fail(f"a register of type .{held} is too small for .{type_}")
        # Through the value's own type, so that signed values extend their sign.
        return f"{name} = {_UNSIGNED[SIZES[held]]}({cpp}({expression}));"

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


class ModuleTranslator:
    """Names and memory that the functions of a module share."""

    def __init__(self, module: Module):
        self.module = module
        self.sites: list[Instruction] = []
        self.site_of: dict[int, int] = {}
        self.globals: list[tuple[Variable, str]] = []
        self.addresses: dict[str, str] = {}
        self.defined = {f.name: f for f in module.functions if f.body}
        self.shared_end = 0  # of variables that any function may use
        self.shared_own: dict[str, int] = {}
        self.shared_offsets: dict[str, int] = {}
        self.dynamic: dict[str, int] = {}  # names of arrays without a length, with their alignment
        for v in module.variables:
            if v.space == "shared":
                if v.bytes is None:
                    self.dynamic[v.name] = v.align
                else:
                    self.shared_offsets[v.name] = self._append_shared(v)
            else:
                self.addresses[v.name] = self.add_global(v, "")

    def _append_shared(self, v: Variable) -> int:
        offset = _align(self.shared_end, v.align)
        self.shared_end = offset + (v.bytes or 0)
        return offset

    def place_shared(self, v: Variable, function: Function) -> str:
        if v.bytes is None:
            self.dynamic[v.name] = v.align
            return f"SHARED_{identifier(function.name)}"
        if not function.entry:  # shared by all callers
            return str(self._append_shared(v))
        offset = _align(self.shared_own.get(function.name, 0), v.align)
        self.shared_own[function.name] = offset + (v.bytes or 0)
        return f"SHARED_COMMON + {offset}"

    def add_global(self, v: Variable, scope: str) -> str:
        if v.bytes is None or v.external:
            raise PtxError(f"variable {v.name} is defined in another module, which is not supported")
        name = f"g_{identifier(scope + v.name)}"
        self.globals.append((v, name))
        return f"u64({name})"

    def symbol(self, name: str, function: Function) -> str | None:
        if name in self.dynamic:
            if not function.entry:
                raise PtxError(
                    f"{function.name}: dynamic shared memory in a function that is not inlined is not supported"
                )
            return f"u64(SHARED_{identifier(function.name)})"
        if name in self.shared_offsets:
            return f"u64({self.shared_offsets[name]})"
        return self.addresses.get(name)

    def file(self, number: int) -> str:
        return self.module.files.get(number, "?").replace("\\", "\\\\").replace('"', '\\"')

    def site(self, item: Instruction) -> int:
        if id(item) not in self.site_of:
            self.site_of[id(item)] = len(self.sites)
            self.sites.append(item)
        return self.site_of[id(item)]

    def _data(self, v: Variable, name: str) -> str:
        size = SIZES[v.type]
        values = []
        for text in v.initial or []:
            if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
                values.append(f"0x{match[1]}u" + ("ll" if size == 8 else ""))
            elif re.fullmatch(r"-?\w+", text) and text.lstrip("-")[0].isdigit():
                values.append(f"{_UNSIGNED[size]}({text})")
            else:
                raise PtxError(f"variable {v.name}: its value {text} is an address, which is not supported")
        length = max(1, (v.bytes or 0) // size)
        return f"alignas({max(v.align, 16)}) {_UNSIGNED[size]} {name}[{length}] = {{{', '.join(values)}}};"

    def run(self, name: str, lines: int) -> list[str]:
        """The C++ sources of the module, in namespace `name`, of about `lines` lines; the first holds the tables."""
        bodies = [(f, FunctionTranslator(self, f).run()) for f in self.defined.values()]
        common = _align(self.shared_end, 16)
        constants = [f"constexpr u32 SHARED_COMMON = {common};"]
        kernels, layouts = [], []
        dynamic_align = max([16, *self.dynamic.values()])
        for f, _ in bodies:
            if not f.entry:
                continue
            own = self.shared_own.get(f.name, 0)
            end = common + own if own else self.shared_end
            if self.dynamic:
                end = _align(end, dynamic_align)
            own_name = identifier(f.name)
            constants.append(f"constexpr u32 SHARED_{own_name} = {end};")
            numbers = ", ".join(f"{p.offset}, {p.bytes}" for p in f.parameters)
            layouts.append(f"static const unsigned layout_{own_name}[] = {{{numbers or 0}}};")
            required = ", ".join(map(str, f.required_threads))
            kernels.append(
                f'{{"{f.name}", e_{own_name}, {end}, {dynamic_align}, {f.max_threads}, {{{required}}}, '
                f"{f.parameter_bytes}, {len(f.parameters)}, layout_{own_name}}}"
            )
        declarations = ["namespace {", *constants, "}"]
        for _, body in bodies:
            declarations.append(body[: body.index(" {")] + ";")
        declarations += [
            f"extern {_UNSIGNED[SIZES[v.type]]} {g}[{max(1, (v.bytes or 0) // SIZES[v.type])}];"
            for v, g in self.globals
        ]
        declarations.append("extern const Site sites[];")
        head = [
            '#include "translated.h"',
            "using namespace simt;",
            f'namespace {name} __attribute__((visibility("hidden"))) {{',
        ]

        sites = ["const Site sites[] = {"]
        for item in self.sites:
            file, line = (self.file(item.location[0]), item.location[1]) if item.location else ("", 0)
            sites.append(f'  {{"{file}", {line}, {item.line}}},')
        sites.append('  {"", 0, 0}};')
        variables = ", ".join(
            f'{{"{v.name}", {g}, sizeof {g}, {"false" if v.space == "const" else "true"}}}' for v, g in self.globals
        )
        tables = [
            *sites,
            *(self._data(v, g) for v, g in self.globals),
            *layouts,
            f"const Kernel kernels[] = {{{', '.join(kernels + ['{}'])}}};",
            f"const Variable variables[] = {{{', '.join([variables] * bool(variables) + ['{}'])}}};",
            f"const Module module = {{kernels, {len(kernels)}, variables, {len(self.globals)}}};",
            "struct Registration {",
            "  Registration() { ptx_register(&module), PTX_ADD_MODULE(&module); }",
            "  ~Registration() { ptx_unregister(&module); }",
            "} registration;",
            "}",
        ]
        # Long functions first, each to the file that is shortest so far.
        count = -(-sum(body.count("\n") for _, body in bodies) // lines)
        parts: list[list[str]] = [[] for _ in range(max(1, min(count, len(bodies))))]
        for _, body in sorted(bodies, key=lambda b: -len(b[1])):
            min(parts, key=lambda p: sum(map(len, p))).append(body)
        sources = ["\n".join([*head, *declarations, *part, "}"]) for part in parts]
        sources[0] = sources[0][: -len("}")] + '\n#line 1 "tables"\n' + "\n".join(tables)
        return [s + "\n" for s in sources]


def translate(module: Module, name: str = "ptx_module", lines: int = 6000) -> list[str]:
    """C++ sources of a parsed module. PtxError names the line of an instruction that is not known."""
    return ModuleTranslator(module).run(name, lines)
