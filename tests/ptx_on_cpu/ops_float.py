"""Floating point arithmetic. Functions marked .approx in PTX are those of the C library, closer than a GPU's."""

from .instruction_table import CPP, Context, instruction

FLOPS = {"f32": "fp32", "f64": "fp64"}


def _count(type_: str, operations: int) -> str:
    packed = 2 if type_.endswith("x2") else 1
    return f"PTX_FLOPS({FLOPS.get(type_, 'fp32' if type_ == 'f32x2' else 'half')}, {operations * packed}); "


def _narrow(c: Context, type_: str, count: int, body: str, relu: bool, saturate: bool, flush: bool) -> str:
    """f16, bf16 and their pairs: `body` is an fp32 expression of x, y, z, which is rounded once."""
    one = type_.removesuffix("x2")
    if saturate:
        body = f"saturate({body})"
    if relu:
        body = f"max_number({body}, 0.0f)"
    del flush  # .ftz exists for f16 only, whose subnormals the conversions keep: stricter kernels do not rely on it
    names = "xyz"[:count]
    parameters = ", ".join(f"{one} {n}_" for n in names)
    reads = " ".join(f"const f32 {n} = to_f32({n}_);" for n in names)
    function = f"[]({parameters}) {{ {reads} return from_f32<{one}>({body}); }}"
    if type_.endswith("x2"):
        values = ", ".join(c.value(i + 1, "b32") for i in range(count))
        return c.assign(0, "b32", f"each_half<{one}>({values}, {function})")
    values = ", ".join(c.value(i + 1, one) for i in range(count))
    return c.assign(0, one, f"({function})({values})")


def _wide(c: Context, type_: str, expression: str, saturate: bool, flush: bool) -> str:
    if saturate:
        expression = f"saturate({expression})"
    if flush:
        expression = f"flush({expression})"
    return c.assign(0, type_, expression)


def _operand(c: Context, index: int, type_: str, flush: bool) -> str:
    a = c.value(index, type_)
    return f"flush({a})" if flush else a


def _pair(c: Context, count: int, body: str) -> str:
    """f32x2: two fp32 in 64 bits."""
    text = "{ "
    for i, name in enumerate("abc"[:count]):
        text += f"const u64 {name} = {c.value(i + 1, 'b64')}; "
    parts = []
    for shift in (0, 32):
        half = body
        for name in "abc"[:count]:
            half = half.replace(f"${name}", f"PTX_BITS(f32, u32({name} >> {shift}))")
        parts.append(f"u64(PTX_BITS(u32, f32({half}))) << {shift}")
    return text + c.assign(0, "b64", " | ".join(parts)) + " }"


@instruction("add", "sub", "mul", types="float")
def add_mul(c: Context) -> str:
    rounding, flush, saturate, type_ = c.rounding(), c.flag("ftz"), c.flag("sat"), c.type()
    sign = {"add": "+", "sub": "-", "mul": "*"}[c.opcode]
    count = _count(type_, 1)
    if type_ == "f32x2":
        return count + _pair(c, 2, f"$a {sign} $b")
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        if rounding != "kNearest":
            c.fail("rounding mode not supported")
        # Sums of bf16 with far exponents are not exact in fp32; products are.
        body = "x * y" if c.opcode == "mul" else f"odd_f32(odd_sum(x, {'-' if c.opcode == 'sub' else ''}f64(y)))"
        return count + _narrow(c, type_, 2, body, False, saturate, flush)
    flush = flush and type_ == "f32"
    a, b = _operand(c, 1, type_, flush), _operand(c, 2, type_, flush)
    if rounding == "kNearest":
        return count + _wide(c, type_, f"({a} {sign} {b})", saturate, flush)
    b = f"-{b}" if c.opcode == "sub" else b
    name = "mul_rounded" if c.opcode == "mul" else "add_rounded"
    return count + _wide(c, type_, f"{name}<{type_}>({a}, {b}, {rounding})", saturate, flush)


@instruction("fma", "mad", types="float")
def fma(c: Context) -> str:
    rounding, flush, saturate, relu, type_ = c.rounding(), c.flag("ftz"), c.flag("sat"), c.flag("relu"), c.type()
    count = _count(type_, 2)
    if type_ == "f32x2":
        return count + _pair(c, 3, "__builtin_fmaf($a, $b, $c)")
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        if rounding != "kNearest":
            c.fail("rounding mode not supported")
        return count + _narrow(c, type_, 3, "fma_narrow(x, y, z)", relu, saturate, flush)
    flush = flush and type_ == "f32"
    a, b, d = (_operand(c, i, type_, flush) for i in (1, 2, 3))
    if rounding == "kNearest":
        name = "__builtin_fmaf" if type_ == "f32" else "__builtin_fma"
        return count + _wide(c, type_, f"{name}({a}, {b}, {d})", saturate, flush)
    return count + _wide(c, type_, f"fma_rounded<{type_}>({a}, {b}, {d}, {rounding})", saturate, flush)


@instruction("div", types="float")
def div(c: Context) -> str:
    c.drop("approx", "full")
    rounding, flush, type_ = c.rounding(), c.flag("ftz"), c.type()
    if type_ not in ("f32", "f64"):
        c.fail("type not supported")
    a, b = _operand(c, 1, type_, flush), _operand(c, 2, type_, flush)
    quotient = f"({a} / {b})" if rounding == "kNearest" else f"div_rounded<{type_}>({a}, {b}, {rounding})"
    return _count(type_, 1) + _wide(c, type_, quotient, False, flush)


@instruction("min", "max", types="float")
def min_max(c: Context) -> str:
    nan, flush, xor_sign, type_ = c.flag("NaN"), c.flag("ftz"), c.flag("abs"), c.type()
    if xor_sign:
        c.fail("not supported with .xorsign.abs")
    name = f"{c.opcode}_{'nan' if nan else 'number'}"
    count = _count(type_, 1)
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        return count + _narrow(c, type_, 2, f"{name}(x, y)", False, False, flush)
    flush = flush and type_ == "f32"
    operands = [_operand(c, i, type_, flush) for i in range(1, len(c.operands))]
    value = operands[0]
    for operand in operands[1:]:
        value = f"{name}<{type_}>({value}, {operand})"
    return count + _wide(c, type_, value, False, flush)


@instruction("abs", "neg", types="float")
def abs_neg(c: Context) -> str:
    flush, type_ = c.flag("ftz"), c.type()
    # On the bits, so that NaN keep their payload.
    sign = {"f16": "0x8000", "bf16": "0x8000", "f16x2": "0x80008000u", "bf16x2": "0x80008000u", "f32": "0x80000000u"}
    mask = sign.get(type_, "0x8000000000000000ull")
    bits = {2: "b16", 4: "b32", 8: "b64"}[{"0x8000": 2, "0x8000000000000000ull": 8}.get(mask, 4)]
    value = c.value(1, bits)
    value = f"({value} & ~{CPP[bits]}({mask}))" if c.opcode == "abs" else f"({value} ^ {mask})"
    if flush and type_ == "f32":
        return c.assign(0, "f32", f"flush(PTX_BITS(f32, {value}))")
    return c.assign(0, bits, value)


FUNCTIONS = {
    "rcp": "(1 / {x})",
    "sqrt": "std::sqrt({x})",
    "rsqrt": "(1 / std::sqrt({x}))",
    "sin": "std::sin({x})",
    "cos": "std::cos({x})",
    "lg2": "std::log2({x})",
    "ex2": "std::exp2({x})",
    "tanh": "std::tanh({x})",
}


@instruction(*FUNCTIONS)
def function(c: Context) -> str:
    c.drop("approx")
    rounding, flush, type_ = c.rounding(), c.flag("ftz"), c.type()
    count = _count(type_, 1)
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        return count + _narrow(c, type_, 1, FUNCTIONS[c.opcode].format(x="x"), False, False, flush)
    flush = flush and type_ == "f32"
    a = _operand(c, 1, type_, flush)
    if rounding != "kNearest":
        exact = {"rcp": f"div_rounded<{type_}>(1, {a}, {rounding})", "sqrt": f"sqrt_rounded<{type_}>({a}, {rounding})"}
        if c.opcode not in exact:
            c.fail("rounding mode not supported")
        return count + _wide(c, type_, exact[c.opcode], False, flush)
    if c.opcode == "rsqrt" and type_ == "f32":
        return count + _wide(c, type_, f"f32(1 / std::sqrt(f64({a})))", False, flush)
    return count + _wide(c, type_, FUNCTIONS[c.opcode].format(x=a), False, flush)


@instruction("copysign")
def copysign(c: Context) -> str:
    type_ = c.type()
    return c.assign(0, type_, f"std::copysign({c.value(2, type_)}, {c.value(1, type_)})")


@instruction("testp")
def test(c: Context) -> str:
    what = c.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    type_ = c.type()
    a = c.value(1, type_)
    text = {
        "finite": f"bool(std::isfinite({a}))",
        "infinite": f"bool(std::isinf({a}))",
        "number": f"!std::isnan({a})",
        "notanumber": f"bool(std::isnan({a}))",
        "normal": f"bool(std::isnormal({a}))",
        "subnormal": f"(std::fpclassify({a}) == FP_SUBNORMAL)",
    }[what]
    return c.assign(0, "pred", text)
