"""Translates a PTX module to C++: one C++ function for each of its own, tables of kernels, variables and lines."""

import re

from . import ops_async, ops_control, ops_convert, ops_float, ops_integer, ops_memory, ops_mma, ops_warp  # noqa: F401
from .ptx_parser import SIZES, Function, Instruction, Module, PtxError, Variable
from .translate_function import UNSIGNED, FunctionTranslator, identifier


def _align(offset: int, align: int) -> int:
    return -(-offset // align) * align


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
                values.append(f"{UNSIGNED[size]}({text})")
            else:
                raise PtxError(f"variable {v.name}: its value {text} is an address, which is not supported")
        length = max(1, (v.bytes or 0) // size)
        return f"alignas({max(v.align, 16)}) {UNSIGNED[size]} {name}[{length}] = {{{', '.join(values)}}};"

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
            f"extern {UNSIGNED[SIZES[v.type]]} {g}[{max(1, (v.bytes or 0) // SIZES[v.type])}];"
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
