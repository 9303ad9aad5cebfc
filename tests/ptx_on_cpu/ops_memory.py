"""mov, loads and stores, atomics, address conversions, fences and hints."""

from .instruction_table import CPP, Context, instruction
from .ptx_parser import SIZES, split

# They say where a line should stay in the caches, which are not modelled.
HINTS = [f"L1::{p}" for p in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")]
HINTS += [f"L2::{p}" for p in ("evict_first", "evict_last", "evict_normal", "64B", "128B", "256B", "cache_hint")]
HINTS += ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"]
SCOPES = ("cta", "gpu", "sys", "cluster")
CHECKS = {
    "global": "at_global",
    "shared": "at_shared",
    "local": "at_local",
    "generic": "at_generic",
    "const": "at_global",
}


def space_of(c: Context) -> str:
    space = c.take("global", "shared", "shared::cta", "local", "const", "param", "param::entry", "param::func")
    return (space or "generic").split("::")[0]


def bracketed(c: Context, operand: str) -> str:
    """The address inside [ ]."""
    if not (operand.startswith("[") and operand.endswith("]")):
        c.fail(f"{operand} is no address")
    return c.function.address(c, operand[1:-1].strip())


def checked(c: Context, space: str, address: str, bytes_: int | str, write: bool) -> str:
    """C++ of the host's address after the checks of its space."""
    if space == "param":
        return address
    return f"{CHECKS[space]}<{'true' if write else 'false'}>(t, {address}, {bytes_}, {c.site})"


@instruction("mov")
def move(c: Context) -> str:
    type_ = c.type()
    to, value = c.operands
    if to.startswith("{") and len(parts := split(to[1:-1])) > 1:
        size = SIZES[type_] // len(parts)
        whole = c.get(value, type_)
        one = f"b{size * 8}"
        moves = " ".join(
            c.set(p, one, f"u{size * 8}(whole >> {size * 8 * i})") for i, p in enumerate(parts) if p != "_"
        )
        return f"{{ const u{SIZES[type_] * 8} whole = {whole}; {moves} }}"
    if value.startswith("{") and len(parts := split(value[1:-1])) > 1:
        size, wide = SIZES[type_] // len(parts), f"u{SIZES[type_] * 8}"
        joined = " | ".join(f"{wide}({c.get(p, f'b{size * 8}')}) << {size * 8 * i}" for i, p in enumerate(parts))
        return c.assign(0, type_, f"{wide}({joined})")
    if type_ == "pred":
        return c.assign(0, type_, c.get(value, type_))
    # A move of bits: no conversion, NaN stay as they are.
    bits = f"b{SIZES[type_] * 8}"
    return c.assign(0, bits, c.get(value, bits if type_[0] == "f" or type_ == "bf16" else type_))


def _vector(c: Context, operand: str, count: int) -> list[str]:
    parts = split(operand[1:-1]) if operand.startswith("{") else [operand]
    if len(parts) != count:
        c.fail(f"{count} registers are wanted")
    return parts


def _raw(type_: str) -> str:
    """Floats travel as their bits."""
    return f"b{SIZES[type_] * 8}" if type_[0] in "fb" else type_


def _order(c: Context) -> str | None:
    order = c.take("acquire", "release", "relaxed", "volatile", "weak", "mmio")
    c.take(*SCOPES)
    return order


def _access(name: str, order: str | None) -> tuple[str, str]:
    """The function of an access and its last argument."""
    if order in (None, "weak"):
        return name, ""
    ordering = {"acquire": "__ATOMIC_ACQUIRE", "release": "__ATOMIC_RELEASE"}.get(order or "", "__ATOMIC_RELAXED")
    return f"{name}_atomic", f", {ordering}"


@instruction("ld", "ldu")
def load(c: Context) -> str:
    order, space = _order(c), space_of(c)
    c.drop(*HINTS, "unified")
    count = int((c.take("v2", "v4", "v8") or "v1")[1:])
    type_ = c.type()
    raw, size = _raw(type_), SIZES[type_]
    name, last = _access("load", order)
    address = checked(c, space, bracketed(c, c.operands[1]), count * size, False)
    parts = _vector(c, c.operands[0], count)
    loads = [c.set(p, raw, f"{name}<{CPP[raw]}>(at + {size * i}{last})") for i, p in enumerate(parts) if p != "_"]
    return f"{{ const u64 at = {address}; {' '.join(loads)} }}"


@instruction("st")
def store(c: Context) -> str:
    order, space = _order(c), space_of(c)
    c.drop(*HINTS)
    count = int((c.take("v2", "v4", "v8") or "v1")[1:])
    type_ = c.type()
    raw, size = _raw(type_), SIZES[type_]
    name, last = _access("store", order)
    address = checked(c, space, bracketed(c, c.operands[0]), count * size, True)
    parts = _vector(c, c.operands[1], count)
    stores = [f"{name}<{CPP[raw]}>(at + {size * i}, {c.get(p, raw)}{last});" for i, p in enumerate(parts)]
    return f"{{ const u64 at = {address}; {' '.join(stores)} }}"


def _update(c: Context, operation: str, type_: str, value: str) -> str:
    """The new value from `x`, the old one, both of the C++ type of the bits."""
    cpp = CPP[type_]
    if type_ in ("f32", "f64"):
        x, v = f"PTX_BITS({type_}, x)", f"PTX_BITS({type_}, {value})"
        text = {"add": f"{x} + {v}", "min": f"min_number({x}, {v})", "max": f"max_number({x}, {v})"}.get(operation)
        return f"PTX_BITS(u{SIZES[type_] * 8}, {type_}({text}))" if text else c.fail("not supported") or ""
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        one, bits = type_.removesuffix("x2"), "u16" if not type_.endswith("x2") else "u32"
        body = {
            "add": "to_f32(a) + to_f32(b)",
            "min": "min_number(to_f32(a), to_f32(b))",
            "max": "max_number(to_f32(a), to_f32(b))",
        }
        if operation not in body:
            c.fail("not supported")
        function = f"[]({one} a, {one} b) {{ return from_f32<{one}>({body[operation]}); }}"
        return f"{bits}(each_half<{one}>(u32(x), u32({value}), {function}))"
    x, v = f"{cpp}(x)", f"{cpp}({value})"
    text = {
        "add": f"x + {value}",
        "and": f"x & {value}",
        "or": f"x | {value}",
        "xor": f"x ^ {value}",
        "exch": value,
        "min": f"{x} < {v} ? {x} : {v}",
        "max": f"{x} > {v} ? {x} : {v}",
        "inc": f"x >= {value} ? 0 : x + 1",
        "dec": f"!x || x > {value} ? {value} : x - 1",
    }
    return text[operation]


@instruction("atom", "red")
def atomic(c: Context) -> str:
    c.take("relaxed", "acquire", "release", "acq_rel")
    c.take(*SCOPES)
    space = space_of(c)
    c.drop("noftz", "L2::cache_hint")
    operation = c.need("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    count = int((c.take("v2", "v4", "v8") or "v1")[1:])
    type_ = c.type()
    operands = list(c.operands)
    out = operands.pop(0) if c.opcode == "atom" else "_"
    bits, size = f"b{SIZES[type_] * 8}", SIZES[type_]
    cpp = CPP[bits]
    address = checked(c, space, bracketed(c, operands[0]), count * size, True)
    text = f"{{ const u64 at = {address}; "
    if operation == "cas":
        text += f"const {cpp} want = {c.get(operands[1], bits)}, next = {c.get(operands[2], bits)}; "
        return text + c.set(out, bits, f"atomic<{cpp}>(at, [&]({cpp} x) {{ return x == want ? next : x; }})") + " }"
    outs = _vector(c, out, count) if out != "_" else ["_"] * count
    for i, (o, v) in enumerate(zip(outs, _vector(c, operands[1], count), strict=True)):
        update = _update(c, operation, type_, f"v{i}")
        text += f"const {cpp} v{i} = {c.get(v, bits)}; "
        text += c.set(o, bits, f"atomic<{cpp}>(at + {size * i}, [&]({cpp} x) -> {cpp} {{ return {update}; }})") + " "
    return text + "}"


@instruction("cvta")
def convert_address(c: Context) -> str:
    to = c.flag("to")
    space = space_of(c)
    type_ = c.type()
    value = c.value(1, type_)
    if space == "shared":
        return c.assign(0, type_, f"{value} - u64(t.shared)" if to else f"{value} + u64(t.shared)")
    return c.assign(0, type_, value)


@instruction("isspacep")
def is_space(c: Context) -> str:
    space = space_of(c)
    address = c.value(1, "u64")
    shared, local = f"{address} - u64(t.shared) < kSharedWindow", f"on_stack(t, {address})"
    text = {"shared": shared, "local": local, "global": f"!({shared}) && !{local}", "const": "false", "param": "false"}
    return c.assign(0, "pred", text[space])


@instruction("createpolicy")
def create_policy(c: Context) -> str:
    c.left = []
    return c.assign(0, "b64", "u64(0)")


@instruction("prefetch", "prefetchu", "applypriority", "discard")
def hint(c: Context) -> str:
    c.left = []
    return ";"


@instruction("membar", "fence")
def fence(c: Context) -> str:
    c.drop("gl", "cta", "sys", "gpu", "cluster", "acq_rel", "sc", "acquire", "release", "proxy", "async", "alias")
    c.drop("async::generic", "shared::cta", "shared::cluster", "global", "sync_restrict", "mbarrier_init")
    return "fence(t);"
