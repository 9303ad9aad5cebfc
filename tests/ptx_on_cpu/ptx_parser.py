"""Reads PTX text into a Module: variables, functions and their instructions, each with its line.

It knows the syntax, not the instructions.
"""

import bisect
import re
from dataclasses import dataclass, field

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
SIZES |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "u16x2": 4, "s16x2": 4, "tf32": 4}
SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8, "b128": 16}

LINKAGE = {"visible", "extern", "weak", "common"}
SPACES = {"global", "const", "shared", "local", "param"}
DECLARATIONS = SPACES | {"reg"}


class PtxError(ValueError):
    """PTX that this package cannot read or translate; the message holds the line."""


@dataclass
class Variable:
    """A variable or a parameter. `bytes` is None for an array without a length (dynamic shared memory)."""

    space: str
    name: str
    type: str
    bytes: int | None
    align: int
    initial: list[str] | None = None
    external: bool = False
    offset: int = 0


@dataclass
class Registers:
    """`.reg .b32 %r<10>` gives prefix "%r", count 10; a single register has count None."""

    type: str
    prefix: str
    count: int | None


@dataclass
class Instruction:
    opcode: str
    modifiers: list[str]
    operands: list[str]
    guard: str | None
    negated: bool
    line: int
    location: tuple[int, int] | None
    text: str


@dataclass
class Label:
    name: str


@dataclass
class Scope:
    """One { } block of a body: what is declared inside is not seen outside."""

    items: list = field(default_factory=list)


@dataclass
class BranchTargets:
    name: str
    labels: list[str]


@dataclass
class Function:
    name: str
    entry: bool
    parameters: list[Variable]
    results: list[Variable]
    body: Scope | None
    max_threads: int = 0
    required_threads: tuple[int, int, int] = (0, 0, 0)

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + (p.bytes or 0) for p in self.parameters), default=0)


@dataclass
class Module:
    target: str = ""
    files: dict[int, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)


def split(text: str, separator: str = ",") -> list[str]:
    """Splits at `separator` outside of brackets; the pieces are stripped, empty ones dropped."""
    pieces, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == separator and not depth:
            pieces.append(text[start:i].strip())
            start = i + 1
    pieces.append(text[start:].strip())
    return [p for p in pieces if p]


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match.group())


class _Reader:
    """A position in the text, which keeps every newline of the source so that positions give lines."""

    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/", _blank, text, flags=re.S)
        text = re.sub(r"//[^\n]*", _blank, text)
        text = re.sub(r"^\s*\.section\s+\S+\s*\{.*?\}", _blank, text, flags=re.S | re.M)
        text = re.sub(r"^\s*@@\w[^\n]*", _blank, text, flags=re.M)
        self.text, self.at = text, 0
        self.location: tuple[int, int] | None = None
        self.newlines = [m.start() for m in re.finditer("\n", text)]

    def line(self, at: int | None = None) -> int:
        return bisect.bisect(self.newlines, self.at if at is None else at) + 1

    def skip_space(self) -> bool:
        """Moves to the next character that is not white space; False at the end."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.at < len(self.text)

    def take(self, pattern: str) -> re.Match | None:
        match = re.compile(pattern).match(self.text, self.at)
        if match:
            self.at = match.end()
        return match

    def until(self, stops: str) -> str:
        """The text up to the first of `stops`, which is consumed and kept in `self.stop`."""
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in stops:
            self.at += 1
        self.stop = self.text[self.at : self.at + 1]
        self.at += 1
        return self.text[start : self.at - 1]

    def fail(self, message: str, at: int | None = None):
        raise PtxError(f"PTX line {self.line(at)}: {message}")


def parse(text: str) -> Module:
    """The module of a PTX text. PtxError names the line that is not understood."""
    reader, module = _Reader(text), Module()
    while reader.skip_space():
        start = reader.at
        if reader.take(r"\.(version|address_size)\s[^\n]*"):
            continue
        if match := reader.take(r"\.target\s+([^\n]*)"):
            module.target = match[1].split(",")[0].strip()
        elif match := reader.take(r'\.file\s+(\d+)\s+"([^"]*)"[^\n]*'):
            module.files[int(match[1])] = match[2]
        elif reader.take(r"\.(pragma|alias)\b[^;]*;") or reader.take(r"\.loc\b[^\n]*"):
            continue
        elif re.compile(r"(\.(visible|extern|weak)\s+)*\.(entry|func)\b").match(reader.text, reader.at):
            module.functions.append(_function(reader))
        else:
            declaration = reader.until(";")
            variable = _variable(declaration)
            if variable is None:
                reader.fail(f"not understood: {declaration.strip()[:100]}", start)
            module.variables.append(variable)
    # A declaration and its definition are one function.
    defined = {f.name for f in module.functions if f.body}
    module.functions = [f for f in module.functions if f.body or f.name not in defined]
    return module


def _variable(text: str) -> Variable | None:
    """A declaration such as `.visible .shared .align 16 .b8 name[64] = {1, 2}`, without its semicolon."""
    head, _, initial = text.partition("=")
    match = re.fullmatch(r"\s*(.*?)([\w$%.]+)\s*((?:\[[^\]]*\]\s*)*)", head, flags=re.S)
    if not match:
        return None
    words = re.findall(r"\.?(\w+)", match[1])
    space = next((w for w in words if w in SPACES), None)
    kind = next((w for w in reversed(words) if w in SIZES), None)
    if not space or not kind:
        return None
    bytes_: int | None = SIZES[kind] * next((int(w[1]) for w in words if w in ("v2", "v4")), 1)
    align = re.search(r"\.?align\s+(\d+)", match[1])
    for length in re.findall(r"\[([^\]]*)\]", match[3]):
        bytes_ = None if not length.strip() or bytes_ is None else bytes_ * int(length, 0)
    values = split(initial.strip().strip("{}")) if initial.strip() else None
    return Variable(space, match[2], kind, bytes_, int(align[1]) if align else SIZES[kind], values, "extern" in words)


def _parameters(reader: _Reader, text: str) -> list[Variable]:
    out, offset = [], 0
    for piece in split(text):
        p = _variable(re.sub(r"\.ptr\b(\s*\.(global|const|shared|local|generic)\b)?", " ", piece))
        if p is None or p.bytes is None:
            reader.fail(f"parameter not understood: {piece}")
        p.offset = -(-offset // p.align) * p.align
        offset = p.offset + p.bytes
        out.append(p)
    return out


def _function(reader: _Reader) -> Function:
    start = reader.at
    head = reader.until("{;")
    match = re.search(r"\.(entry|func)\s*(?:\((.*?)\))?\s*([\w$]+)\s*(?:\((.*?)\))?(.*)$", head, flags=re.S)
    if not match:
        reader.fail(f"function not understood: {head[:100]}", start)
    results, parameters = _parameters(reader, match[2] or ""), _parameters(reader, match[4] or "")
    function = Function(match[3], match[1] == "entry", parameters, results, None)
    for name, numbers in re.findall(r"\.(maxntid|reqntid)\s+([\d,\s]+)", match[5] or ""):
        x, y, z = ([int(n) for n in numbers.split(",")] + [1, 1])[:3]
        if name == "maxntid":
            function.max_threads = x * y * z
        else:
            function.required_threads = (x, y, z)
    if reader.stop == "{":
        reader.location = None
        function.body = _scope(reader)
    return function


def _scope(reader: _Reader) -> Scope:
    """The rest of a { } block whose opening brace has been read."""
    scope = Scope()
    while reader.skip_space():
        start = reader.at
        if reader.take(r"\}"):
            return scope
        if reader.take(r"\{"):
            scope.items.append(_scope(reader))
        elif reader.take(";"):
            continue
        elif match := reader.take(r"\.loc\s+(\d+)\s+(\d+)[^\n]*"):
            # Line 0 marks code that belongs to no line of the source: the last known one is the better answer.
            reader.location = (int(match[1]), int(match[2])) if match[2] != "0" else reader.location
        elif match := reader.take(r"([\w$%]+)\s*:\s*\.branchtargets\b([^;]*);"):
            scope.items.append(BranchTargets(match[1], split(match[2])))
        elif match := reader.take(r"([\w$%]+)\s*:(?!:)"):
            scope.items.append(Label(match[1]))
        elif reader.take(r"\.(pragma|callprototype)\b[^;]*;"):
            continue
        else:
            statement = re.sub(r"\s+", " ", reader.until(";")).strip()
            if statement.startswith("."):
                scope.items.extend(_declaration(reader, statement, start))
            else:
                scope.items.append(_instruction(reader, statement, reader.line(start), reader.location))
    reader.fail("a { is not closed")
    raise AssertionError


def _declaration(reader: _Reader, statement: str, start: int) -> list:
    if match := re.match(r"\.reg\s*(?:\.v[24]\s*)?\.(\w+)\s+(.*)$", statement):
        if match[1] not in SIZES:
            reader.fail(f"unknown register type: {statement}", start)
        out = []
        for name in split(match[2]):
            ranged = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            out.append(Registers(match[1], ranged[1], int(ranged[2])) if ranged else Registers(match[1], name, None))
        return out
    variable = _variable(statement)
    if variable is None:
        reader.fail(f"not understood: {statement}", start)
    return [variable]


def _instruction(reader: _Reader, text: str, line: int, location: tuple[int, int] | None) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
    if not match:
        raise PtxError(f"PTX line {line}: not understood: {text}")
    opcode, *modifiers = match[3].split(".")
    return Instruction(opcode, modifiers, split(match[4]), match[2], match[1] == "!", line, location, text)
