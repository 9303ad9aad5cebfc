"""cvt between all integer and floating point types, with PTX's rounding modes, saturation and packing."""

from .instruction_table import CPP, INTEGER_ROUNDINGS, ROUNDINGS, Context, instruction
from .ptx_parser import SIZES

NARROW = ("f16", "bf16")


def _to_narrow(half: str, value: str, rounding: str, relu: bool, finite: bool) -> str:
    """An fp32 expression rounded to f16 or bf16."""
    if relu:
        value = f"({value} < 0 ? 0.0f : {value})"
    if finite:
        limit = {"f16": "65504.0f", "bf16": "PTX_BITS(f32, 0x7f7f0000u)"}[half]
        value = f"({value} > {limit} ? {limit} : {value} < -{limit} ? -{limit} : {value})"
    return f"from_f32<{half}>({value}, {rounding})"


@instruction("cvt")
def convert(c: Context) -> str:
    integer_rounding = c.take(*INTEGER_ROUNDINGS)
    tie_away = c.flag("rna")
    named_rounding = c.take(*ROUNDINGS)
    rounding = ROUNDINGS[named_rounding or "rn"]
    flush, relu = c.flag("ftz"), c.flag("relu")
    finite, saturate = c.flag("satfinite"), c.flag("sat")
    types = c.types()
    if len(types) != 2:
        c.fail("two types are wanted")
    to, of = types
    if to == "tf32":
        if tie_away and not (relu or finite):
            return c.assign(0, "b32", f"to_tf32_rna({c.value(1, 'f32')})")
        value = c.value(1, "f32")
        value = f"({value} < 0 ? 0.0f : {value})" if relu else value
        return c.assign(0, "b32", f"round_bits<13>(PTX_BITS(u32, {value}), {rounding})")
    if tie_away:
        c.fail("rounding mode not supported")
    if to in ("f16x2", "bf16x2"):
        if of != "f32" or saturate:
            c.fail("not supported")
        half = to[:-2]
        high, low = (_to_narrow(half, c.value(i, "f32"), rounding, relu, finite) for i in (1, 2))
        return c.assign(0, "b32", f"u32(PTX_BITS(u16, {high})) << 16 | PTX_BITS(u16, {low})")
    to_float, from_float = to in (*NARROW, "f32", "f64"), of in (*NARROW, "f32", "f64")
    value = c.value(1, of)
    if flush and of == "f32":
        value = f"flush({value})"
    if to_float and from_float:
        return _float_to_float(
            c, to, of, value, INTEGER_ROUNDINGS.get(integer_rounding or ""), rounding, saturate, relu, finite, flush
        )
    if relu or finite:
        c.fail("not supported")
    if to_float:
        return _integer_to_float(c, to, of, value, rounding)
    if from_float:
        if not integer_rounding:
            c.fail("a rounding mode to integer is wanted")
        wide = f"to_f32({value})" if of in NARROW else value
        # To 8 bits by way of the register's 32, clamped to the type.
        return c.assign(0, to, f"to_integer<{CPP[to]}>({wide}, {INTEGER_ROUNDINGS[integer_rounding or 'rni']})")
    if saturate:
        if of == "u64":
            return c.assign(0, to, f"clamp_to<{CPP[to]}>(s64({value} >> 63 ? ~0ull >> 1 : {value}))")
        return c.assign(0, to, f"clamp_to<{CPP[to]}>(s64({value}))")
    return c.assign(0, to, f"{CPP[to]}({value})")


def _float_to_float(
    c: Context,
    to: str,
    of: str,
    value: str,
    integral: str | None,
    rounding: str,
    saturate: bool,
    relu: bool,
    finite: bool,
    flush: bool,
) -> str:
    if integral:
        if of in NARROW:
            value = f"to_f32({value})"
        value = f"to_integral({value}, {integral})"
        if to in NARROW:
            value = f"from_f32<{to}>({value})"
    elif to in NARROW:
        wide = f"to_f32({value})" if of in NARROW else f"odd_f32({value})" if of == "f64" else value
        if saturate:
            wide = f"saturate({wide})"
        return c.assign(0, to, _to_narrow(to, wide, rounding, relu, finite))
    elif of in NARROW:
        value = f"{to}(to_f32({value}))"
    elif of == "f64" and to == "f32" and rounding != "kNearest":
        value = f"f64_to_f32({value}, {rounding})"
    if relu or finite:
        c.fail("not supported")
    if saturate:
        value = f"saturate({value})"
    if flush and to == "f32":
        value = f"flush(f32({value}))"
    return c.assign(0, to, value)


def _integer_to_float(c: Context, to: str, of: str, value: str, rounding: str) -> str:
    if to in NARROW:
        # fp64 holds all 32-bit integers; an odd last bit in fp32 makes the second rounding the only one that counts.
        if SIZES[of] == 8:
            c.fail("not supported")
        return c.assign(0, to, f"from_f32<{to}>(odd_f32(f64({value})), {rounding})")
    if rounding == "kNearest":
        return c.assign(0, to, f"{to}({value})")
    wide = of if SIZES[of] >= 4 else of[0] + "32"
    return c.assign(0, to, f"integer_to_float<{to}, {wide}>({wide}({value}), {rounding})")
