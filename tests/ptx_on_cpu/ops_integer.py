"""Integer arithmetic, logic, bit fields, comparisons and selection."""

from .instruction_table import CPP, FLOATS, Context, instruction
from .ptx_parser import SIZES

COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64", "u64": "u128", "s64": "s128"}


def _unsigned(type_: str) -> str:
    return f"u{SIZES[type_] * 8}"


def _halves(c: Context, type_: str, expression: str) -> str:
    """Applies an expression of x and y to both 16-bit halves."""
    cpp = type_[:3]
    body = f"[](auto x, auto y) {{ return {cpp}({expression}); }}"
    return c.assign(0, "b32", f"each_half<{cpp}>({c.value(1, 'b32')}, {c.value(2, 'b32')}, {body})")


@instruction("add", "sub", types="integer")
def add(c: Context) -> str:
    sign = {"add": "+", "sub": "-"}[c.opcode]
    saturating = c.flag("sat")
    carry_out = c.flag("cc")
    type_ = c.type()
    if type_.endswith("x2"):
        return _halves(c, type_, f"x {sign} y")
    a, b = c.value(1, type_), c.value(2, type_)
    if carry_out:
        return _with_carry(c, type_, _product_or_value(c, type_), sign, b, carry_in=False, carry_out=True)
    if saturating:
        return c.assign(0, type_, f"clamp_to<{type_}>(s64({a}) {sign} s64({b}))")
    u = _unsigned(type_)
    return c.assign(0, type_, f"{CPP[type_]}({u}({u}({a}) {sign} {u}({b})))")


def _product_or_value(c: Context, type_: str) -> str:
    return f"{_unsigned(type_)}({c.value(1, type_)})"


def _with_carry(c: Context, type_: str, a: str, sign: str, b: str, carry_in: bool, carry_out: bool) -> str:
    """The carry flag of PTX: the borrow for subtractions."""
    c.function.uses_carry = True
    u, bits = _unsigned(type_), SIZES[type_] * 8
    total = f"u128({a}) {sign} u128({u}({b}))" + (f" {sign} carry" if carry_in else "")
    keep = f" carry = u32(sum >> {bits}) & 1;" if carry_out else ""
    return f"{{ const u128 sum = {total};{keep} {c.assign(0, type_, f'{CPP[type_]}({u}(sum))')} }}"


@instruction("addc", "subc")
def add_carry(c: Context) -> str:
    carry_out, type_ = c.flag("cc"), c.type()
    sign = "+" if c.opcode == "addc" else "-"
    return _with_carry(c, type_, _product_or_value(c, type_), sign, c.value(2, type_), True, carry_out)


def _product(c: Context, type_: str, part: str) -> str:
    a, b, u = c.value(1, type_), c.value(2, type_), _unsigned(type_)
    if part == "lo":
        return f"{CPP[type_]}({u}(u64({u}({a})) * u64({u}({b}))))"
    wide = WIDER[type_]
    if part == "wide":
        return f"({wide}({a}) * {wide}({b}))"
    return f"{CPP[type_]}(({wide}({a}) * {wide}({b})) >> {SIZES[type_] * 8})"


@instruction("mul", types="integer")
def mul(c: Context) -> str:
    part, type_ = c.need("lo", "hi", "wide"), c.type()
    return c.assign(0, WIDER[type_] if part == "wide" else type_, _product(c, type_, part))


@instruction("mad", "madc", types="integer")
def mad(c: Context) -> str:
    part, carry_out, saturating, type_ = c.need("lo", "hi", "wide"), c.flag("cc"), c.flag("sat"), c.type()
    out = WIDER[type_] if part == "wide" else type_
    u = _unsigned(out)
    product, addend = _product(c, type_, part), c.value(3, out)
    if carry_out or c.opcode == "madc":
        return _with_carry(c, type_, f"{u}({product})", "+", addend, c.opcode == "madc", carry_out)
    if saturating:
        return c.assign(0, out, f"clamp_to<{out}>(s64({product}) + s64({addend}))")
    return c.assign(0, out, f"{CPP[out]}({u}({u}({product}) + {u}({addend})))")


@instruction("mul24", "mad24")
def mul24(c: Context) -> str:
    part, type_ = c.need("lo"), c.type()
    del part
    shift = f"({CPP[type_]}(u32({{}}) << 8) >> 8)"
    product = f"u32({shift.format(c.value(1, type_))}) * u32({shift.format(c.value(2, type_))})"
    return c.assign(0, type_, f"{product} + u32({c.value(3, type_)})" if c.opcode == "mad24" else product)


@instruction("sad")
def sad(c: Context) -> str:
    type_ = c.type()
    a, b, u = c.value(1, type_), c.value(2, type_), _unsigned(type_)
    return c.assign(0, type_, f"{u}({c.value(3, type_)}) + ({a} < {b} ? {u}({b}) - {u}({a}) : {u}({a}) - {u}({b}))")


@instruction("div", "rem", types="integer")
def div(c: Context) -> str:
    type_ = c.type()
    name = {"div": "divide", "rem": "remainder"}[c.opcode]
    return c.assign(0, type_, f"simt::{name}<{CPP[type_]}>({c.value(1, type_)}, {c.value(2, type_)})")


@instruction("min", "max", types="integer")
def min_max(c: Context) -> str:
    relu, type_ = c.flag("relu"), c.type()
    sign = {"min": "<", "max": ">"}[c.opcode]
    if type_.endswith("x2"):
        best = f"(x {sign} y ? x : y)"
        return _halves(c, type_, f"({best} > 0 ? {best} : 0)" if relu else best)
    a, b, cpp = c.value(1, type_), c.value(2, type_), CPP[type_]
    out = c.assign(0, type_, "best < 0 ? 0 : best" if relu else "best")
    return f"{{ const {cpp} a = {a}, b = {b}; const {cpp} best = a {sign} b ? a : b; {out} }}"


@instruction("abs", "neg", types="integer")
def abs_neg(c: Context) -> str:
    type_ = c.type()
    a, u = c.value(1, type_), _unsigned(type_)
    negated = f"{CPP[type_]}({u}(0 - {u}({a})))"
    return c.assign(0, type_, negated if c.opcode == "neg" else f"({a} < 0 ? {negated} : {a})")


@instruction("and", "or", "xor")
def logic(c: Context) -> str:
    type_ = c.type()
    sign = {"and": "&", "or": "|", "xor": "^"}[c.opcode]
    if type_ == "pred":
        sign = {"and": "&&", "or": "||", "xor": "!="}[c.opcode]
    return c.assign(0, type_, f"({c.value(1, type_)} {sign} {c.value(2, type_)})")


@instruction("not", "cnot")
def invert(c: Context) -> str:
    type_ = c.type()
    if c.opcode == "cnot":
        return c.assign(0, type_, f"({c.value(1, type_)} == 0 ? 1 : 0)")
    return c.assign(0, type_, f"{'!' if type_ == 'pred' else '~'}{c.value(1, type_)}")


@instruction("lop3")
def lop3(c: Context) -> str:
    type_ = c.type()
    table = c.value(4, "u32")
    return c.assign(0, type_, f"lop3({c.value(1, type_)}, {c.value(2, type_)}, {c.value(3, type_)}, {table})")


@instruction("shl", "shr")
def shift(c: Context) -> str:
    type_ = c.type()
    name = {"shl": "shift_left", "shr": "shift_right"}[c.opcode]
    return c.assign(0, type_, f"{name}<{CPP[type_]}>({c.value(1, type_)}, {c.value(2, 'u32')})")


@instruction("shf")
def funnel(c: Context) -> str:
    way, mode, type_ = c.need("l", "r"), c.need("wrap", "clamp"), c.type()
    by = c.value(3, "u32") + (" & 31" if mode == "wrap" else "")
    name = {"l": "funnel_left", "r": "funnel_right"}[way]
    # funnel_left(low, high, n) gives the upper word.
    return c.assign(0, type_, f"{name}({c.value(1, 'u32')}, {c.value(2, 'u32')}, {by})")


@instruction("bfe")
def bit_extract(c: Context) -> str:
    type_ = c.type()
    return c.assign(
        0, type_, f"extract_bits<{CPP[type_]}>({c.value(1, type_)}, {c.value(2, 'u32')}, {c.value(3, 'u32')})"
    )


@instruction("bfi")
def bit_insert(c: Context) -> str:
    type_ = c.type()
    values = f"{c.value(1, type_)}, {c.value(2, type_)}, {c.value(3, 'u32')}, {c.value(4, 'u32')}"
    return c.assign(0, type_, f"insert_bits<{CPP[type_]}>({values})")


@instruction("bmsk")
def mask(c: Context) -> str:
    mode, type_ = c.need("wrap", "clamp"), c.type()
    wrap = "true" if mode == "wrap" else "false"
    return c.assign(0, type_, f"bit_mask({c.value(1, 'u32')}, {c.value(2, 'u32')}, {wrap})")


@instruction("szext")
def sign_extend(c: Context) -> str:
    mode, type_ = c.need("wrap", "clamp"), c.type()
    by = c.value(2, "u32") + (" & 31" if mode == "wrap" else "")
    return c.assign(0, type_, f"extract_bits<{type_}>({c.value(1, type_)}, 0, {by})")


@instruction("brev", "popc", "clz")
def bit_count(c: Context) -> str:
    type_ = c.type()
    a = c.value(1, type_)
    if c.opcode == "brev":
        return c.assign(0, type_, f"reverse_bits<{CPP[type_]}>({a})")
    return c.assign(0, "u32", f"u32(__builtin_popcountll({a}))" if c.opcode == "popc" else f"count_leading_zeros({a})")


@instruction("bfind")
def bit_find(c: Context) -> str:
    as_shift, type_ = c.flag("shiftamt"), c.type()
    return c.assign(0, "u32", f"highest_bit<{CPP[type_]}>({c.value(1, type_)}, {'true' if as_shift else 'false'})")


@instruction("prmt")
def permute(c: Context) -> str:
    type_ = c.type()
    return c.assign(0, type_, f"permute_bytes({c.value(1, type_)}, {c.value(2, type_)}, {c.value(3, type_)})")


@instruction("dp4a")
def dot_bytes(c: Context) -> str:
    a, b = (t.replace("32", "8") for t in c.types())
    return c.assign(0, "u32", f"dot_bytes<{a}, {b}>({c.value(1, 'u32')}, {c.value(2, 'u32')}, {c.value(3, 'u32')})")


@instruction("selp")
def select(c: Context) -> str:
    type_ = c.type()
    return c.assign(0, type_, f"({c.value(3, 'pred')} ? {c.value(1, type_)} : {c.value(2, type_)})")


@instruction("slct")
def select_by_sign(c: Context) -> str:
    flush, (type_, by) = c.flag("ftz"), c.types()
    sign = c.value(3, by)
    sign = f"flush({sign})" if flush else sign
    return c.assign(0, type_, f"({sign} >= 0 ? {c.value(1, type_)} : {c.value(2, type_)})")


def comparison(c: Context, how: str, type_: str, a: str, b: str) -> str:
    """A C++ condition. Floats: the ordered forms are false for NaN, those ending in u true."""
    if type_ in ("f16", "bf16"):
        a, b = f"to_f32({a})", f"to_f32({b})"
    if how == "num":
        return f"({a} == {a} && {b} == {b})"
    if how == "nan":
        return f"({a} != {a} || {b} != {b})"
    if how.endswith("u"):
        return f"({a} != {a} || {b} != {b} || {a} {COMPARE[how[:-1]]} {b})"
    if how == "ne" and type_ in FLOATS:
        return f"({a} < {b} || {a} > {b})"
    return f"({a} {COMPARE[how]} {b})"


def _how(c: Context) -> str:
    return c.need(*COMPARE, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


@instruction("setp")
def set_predicate(c: Context) -> str:
    # The comparison is the first modifier; .lo and .hi are no parts of a product here.
    how, joined, flush, type_ = _how(c), c.take("and", "or", "xor"), c.flag("ftz"), c.type()
    outputs = [p.strip() for p in c.operands[0].split("|")]
    if type_ in ("f16x2", "bf16x2"):
        half = type_[:-2]
        results = []
        for out, shift in zip(outputs, (0, 16), strict=True):
            a, b = (f"PTX_BITS({half}, u16({c.value(i, 'b32')} >> {shift}))" for i in (1, 2))
            results.append(c.set(out, "pred", comparison(c, how, half, a, b)))
        if joined:
            c.fail("not supported with packed types")
        return " ".join(results)
    a, b = c.value(1, type_), c.value(2, type_)
    if flush and type_ == "f32":
        a, b = f"flush({a})", f"flush({b})"
    sign = {"and": "&&", "or": "||", "xor": "!="}.get(joined or "", "")
    other = f" {sign} other" if joined else ""
    text = f"{{ const bool is = {comparison(c, how, type_, a, b)};"
    if joined:
        text += f" const bool other = {c.value(3, 'pred')};"
    text += " " + c.set(outputs[0], "pred", f"is{other}")
    if len(outputs) > 1:
        text += " " + c.set(outputs[1], "pred", f"!is{other}")
    return text + " }"


@instruction("set")
def set_value(c: Context) -> str:
    how, joined, flush, (out, type_) = _how(c), c.take("and", "or", "xor"), c.flag("ftz"), c.types()
    if type_ in ("f16x2", "bf16x2"):
        half = type_[:-2]
        if joined:
            c.fail("not supported with packed types")
        # Both halves become 1.0 of the type, or all ones.
        one = {"f16x2": "0x3c00", "bf16x2": "0x3f80"}.get(out, "0xffff")
        text = []
        for shift in (0, 16):
            a, b = (f"PTX_BITS({half}, u16({c.value(i, 'b32')} >> {shift}))" for i in (1, 2))
            text.append(f"({comparison(c, how, half, a, b)} ? {one}u << {shift} : 0u)")
        return c.assign(0, "b32", " | ".join(text))
    a, b = c.value(1, type_), c.value(2, type_)
    if flush and type_ == "f32":
        a, b = f"flush({a})", f"flush({b})"
    is_ = comparison(c, how, type_, a, b)
    if joined:
        sign = {"and": "&&", "or": "||", "xor": "!="}[joined]
        is_ = f"({is_} {sign} {c.value(3, 'pred')})"
    if out == "f32":
        return c.assign(0, "f32", f"({is_} ? 1.0f : 0.0f)")
    if out in ("f16", "bf16"):
        return c.assign(0, "b16", f"({is_} ? {'0x3c00' if out == 'f16' else '0x3f80'} : 0)")
    return c.assign(0, out, f"({is_} ? {CPP[out]}(~{CPP[out]}(0)) : {CPP[out]}(0))")
