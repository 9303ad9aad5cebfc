"""gated_conv1d: outputs and gradients by the error rule, for every form, size and dtype. `#n` names a line of the
project's failure checklist."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykernels import gated_conv1d
from tests.gated_conv_cases import Case, check_case, evaluate, problem
from tests.helpers import FLOATS, SIZES, assert_equal, by_precision, bytes_kept_for_backward

RESIDUALS, ACTS, PADDINGS = ("highway", "add", "none"), ("identity", "tanh"), ("same", "causal", "valid")
SPLITS, CONDS, ROWS = ("value_gate", "gate_value"), ("none", "one", "all"), ("all", "mask", "lengths", "packed")


# --- the definition ---


def by_hand(inputs: dict[str, Tensor], case: Case) -> Tensor:
    """The formula of the docstring, one output row after the other."""
    options, x, weight = case.options(), inputs["x"], inputs["weight"]
    zero = torch.zeros(2 * case.C_out, dtype=x.dtype)
    bias = inputs.get("bias", zero)
    if case.two_weights:
        weight = torch.cat([weight, inputs["gate_weight"]])
        bias = torch.cat([bias, inputs["gate_bias"]]) if case.bias else zero
    value_first = case.two_weights or case.split == "value_gate"
    cond = inputs.get("cond")
    left = {"same": case.reach // 2, "causal": case.reach, "valid": 0}[case.padding]
    first = case.reach if case.padding == "valid" else 0

    # (rows of x, which of them exist, its cond) of every sequence
    sequences = []
    bounds = options.get("cu_seqlens")
    for b in range(case.B):
        if bounds is not None:
            rows = slice(int(bounds[b]), int(bounds[b + 1]))
            c = None if cond is None else cond[b] if cond.dim() == 3 else cond[rows]
            sequences.append((x[rows], torch.ones(x[rows].shape[0], dtype=torch.bool), c))
        else:
            live = torch.ones(case.L, dtype=torch.bool)
            live = options["mask"][b] if "mask" in options else live
            live = torch.arange(case.L) < options["lengths"][b] if "lengths" in options else live
            sequences.append((x[b], live, None if cond is None else cond[b]))

    outputs = []
    for rows, live, c in sequences:
        y = []
        for t in range(rows.shape[0] - first):
            if not live[t + first]:
                y.append(torch.zeros(case.C_out, dtype=x.dtype))
                continue
            h = bias
            for k in range(case.K):
                s = t + k * case.dilation - left
                if 0 <= s < rows.shape[0] and live[s]:
                    h = h + weight[:, :, k] @ rows[s]
            halves = h.split(case.C_out)
            value, z = halves if value_first else halves[::-1]
            if c is not None:
                value_cond, z_cond = c[min(t, c.shape[0] - 1)].split(case.C_out)[
                    :: 1 if case.split == "value_gate" else -1
                ]
                value, z = value + value_cond, z + z_cond
            g, v = torch.sigmoid(z), torch.tanh(value) if case.value_act == "tanh" else value
            residual = rows[t + first] if case.residual != "none" else 0
            y.append(residual * (1 - g) + v * g if case.residual == "highway" else residual + v * g)
        outputs.append(torch.stack(y) if y else x.new_zeros(0, case.C_out))
    return torch.cat(outputs) if bounds is not None else torch.stack(outputs)


def legal(**axes: tuple) -> list[Case]:
    cases = [Case(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    return [case for case in cases if case.legal]


FORMS = legal(
    L=(11,), residual=RESIDUALS, value_act=ACTS, padding=PADDINGS, split=SPLITS, two_weights=(False, True), cond=CONDS,
    rows=ROWS,
)  # fmt: skip


def test_reference_is_the_formula() -> None:
    for case in FORMS[::2]:
        case = replace(case, L=7)
        inputs = case.inputs(torch.float64)
        got = gated_conv1d(**inputs, **case.options(), backend="reference")
        assert torch.allclose(got, by_hand(inputs, case), rtol=0, atol=1e-12), case


def test_glu_is_another_name_for_none(backend: str) -> None:
    inputs = Case(residual="none").inputs(torch.float32)
    a, b = (gated_conv1d(**inputs, residual=name, backend=backend) for name in ("none", "glu"))
    assert torch.equal(a, b)


# --- forms ---


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("value_act", ACTS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_form(dtype: str, residual: str, value_act: str, padding: str, kernels: str) -> None:
    """split x one or two weights x cond x mask, lengths, packed rows. C_in differs from C_out where it may."""
    for case in FORMS:
        if (case.residual, case.value_act, case.padding) == (residual, value_act, padding):
            check_case(replace(case, C_out=7) if residual == "none" else case, FLOATS[dtype], kernels)


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_bias(kernels: str, dtype: str) -> None:
    for case in legal(bias=(False,), two_weights=(False, True), cond=CONDS, rows=ROWS):
        check_case(case, FLOATS[dtype], kernels)


def test_gate_bias_alone(backend: str) -> None:
    inputs = Case(two_weights=True).inputs(torch.float64)
    del inputs["bias"]
    full = inputs | {"bias": torch.zeros(5, dtype=torch.float64)}
    a = evaluate(inputs, Case().dy, backend=backend)
    b = evaluate(full, Case().dy, backend=backend)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-12), name


# --- sizes ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", ["C", "L", "C_in", "C_out", "K"])
def test_sizes(axis: str, dtype: str, kernels: str) -> None:
    """#9: sizes that are no multiple of a vector or of a tile, even K, and #34: fewer rows than the taps reach over."""
    for size in SIZES:
        sizes = {"C": {"C_in": size, "C_out": size}}.get(axis, {axis: size})
        residual = "highway" if axis in ("C", "L", "K") else "none"
        other = {"L": 9} if axis in ("C", "C_in", "C_out") else {"L": 40, "C_in": 6, "C_out": 6, "dilation": 1}
        if size == 1000 and axis in ("C", "K"):
            sizes, other = {**sizes, "K": 2} if axis == "C" else {"K": 200}, other | {"B": 1}
        check_case(Case(residual=residual, **{**other, **sizes}), FLOATS[dtype], kernels)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pairs_of_sizes(dtype: str, kernels: str) -> None:
    """#9: row tails together with column tails."""
    for length, channels in itertools.product((1, 7, 33, 65), (1, 17, 31, 33, 65)):
        check_case(Case(B=1, L=length, C_in=channels, C_out=channels, K=2), FLOATS[dtype], kernels)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("padding", ["same", "causal"])
def test_long_reach(dtype: str, padding: str, kernels: str) -> None:
    """#9, #34: dilation >= L, so that outer taps see padding only, and lengths shorter than the reach."""
    for length, k, dilation in [
        (1, 3, 1),
        (2, 5, 1),
        (5, 3, 5),
        (5, 3, 64),
        (5, 2, 5),
        (16, 4, 7),
        (40, 3, 39),
        (3, 1, 9),
    ]:
        for rows in ROWS:
            case = Case(B=3, L=length, K=k, dilation=dilation, padding=padding, rows=rows)
            check_case(case, FLOATS[dtype], kernels)


@pytest.mark.parametrize("dtype", FLOATS)
def test_kernel_sizes_by_channels(dtype: str, kernels: str) -> None:
    """#9: vectors of channels whose taps are interleaved, by shuffles up to 8 taps and one by one beyond."""
    for k, channels in itertools.product((3, 4, 5, 7, 8, 9), (15, 32, 49)):
        check_case(Case(B=1, L=70, C_in=channels, C_out=channels, K=k), FLOATS[dtype], kernels)


def test_gates_of_every_bfloat16_value(kernels: str) -> None:
    """sigmoid and tanh of all 65,536 bf16 numbers: the rounding to bf16 and 1/32 of a unit in its last place."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, -1, 1)
    ones, weight = torch.ones_like(values), torch.zeros(2, 1, 1, dtype=torch.bfloat16)
    for name, cond, exact in [
        ("sigmoid", [ones, values], values.double().sigmoid()),
        ("tanh", [values, 100 * ones], values.double().tanh()),
    ]:
        act = "tanh" if name == "tanh" else "identity"
        options = {"cond": torch.cat(cond, 2), "residual": "none", "value_act": act, "backend": kernels}
        got = gated_conv1d(torch.zeros_like(values), weight, **options).double()
        assert torch.equal(got.isnan(), exact.isnan()), name
        # Below e^-87 the sigmoid is cut off, as e^x is.
        error = (got - exact).abs() - 2.0**-125
        assert (error[~exact.isnan()] <= 2.0**-7 * (1 / 2 + 1 / 32) * exact.abs()[~exact.isnan()]).all(), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows(dtype: str, kernels: str) -> None:
    """Several blocks a sequence, several sequences a block, and sums over both."""
    for case in [
        Case(B=1, L=1500, C_in=33, C_out=33),
        Case(B=40, L=3, C_in=20, C_out=20, rows="lengths"),
        Case(B=70, L=20, C_in=17, C_out=17, rows="packed", cond="one"),
        Case(B=3, L=700, C_in=24, C_out=24, rows="mask", cond="one", K=2, dilation=64),
        Case(B=300, L=1, C_in=8, C_out=8, cond="all"),
        Case(B=2, L=64, C_in=130, C_out=130),
    ]:
        check_case(case, FLOATS[dtype], kernels)


@pytest.mark.parametrize("rows", ROWS)
def test_empty(rows: str, backend: str) -> None:
    """#24: no sequences, no rows, and no output rows. Gradients of weights are zeros, not garbage."""
    for B, L, padding in [(0, 9, "same"), (3, 0, "same"), (0, 0, "causal"), (2, 4, "valid"), (0, 9, "valid")]:
        case = Case(B=B, L=L, padding=padding, rows=rows, cond="one")
        if not case.legal:
            continue
        inputs = case.inputs(torch.float32)
        got = evaluate(inputs, case.dy, **case.options(), backend=backend)
        assert got["y"].shape[-1] == 5 and got["y"].numel() == 0
        for name, t in inputs.items():
            assert torch.equal(got[f"d{name}"], torch.zeros_like(t)), (name, case)


# --- properties ---

cases = st.builds(
    Case,
    B=st.integers(1, 4),
    L=st.integers(1, 70),
    C_in=st.integers(1, 40),
    C_out=st.integers(1, 40),
    K=st.integers(1, 6),
    dilation=st.integers(1, 20),
    padding=st.sampled_from(PADDINGS),
    residual=st.sampled_from(RESIDUALS),
    value_act=st.sampled_from(ACTS),
    split=st.sampled_from(SPLITS),
    two_weights=st.booleans(),
    bias=st.booleans(),
    cond=st.sampled_from(CONDS),
    rows=st.sampled_from(ROWS),
    gate_dropout=st.sampled_from((0.0, 0.0, 0.3)),
    gate_noise=st.just(0.0),
)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_configuration(dtype: str, kernels: str) -> None:
    @settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases, same_channels=st.booleans())
    def check(case: Case, same_channels: bool) -> None:
        if same_channels or case.residual != "none":
            case = replace(case, C_in=case.C_out)
        assume(case.legal)
        check_case(case, FLOATS[dtype], kernels)

    check()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputing_backward_is_the_same(dtype: str, kernels: str) -> None:
    """recompute=True gives the same gradients from the same bits, and keeps nothing but the arguments."""
    for case in legal(residual=RESIDUALS, value_act=ACTS, rows=ROWS, gate_dropout=(0.0, 0.4)):
        p = problem(case, FLOATS[dtype])
        a, b = (evaluate(p.inputs, case.dy, **p.options, recompute=r, backend=kernels) for r in (False, True))
        assert_equal(a, b, case)


@pytest.mark.parametrize(("recompute", "kept"), [(False, 2), (True, 0)])
def test_bytes_kept_for_backward(kernels: str, recompute: bool, kept: int) -> None:
    """The value and the gate in x's dtype, or nothing."""
    case = Case(B=4, L=50, C_in=16, C_out=16)
    leaves = {name: t.requires_grad_() for name, t in case.inputs(torch.bfloat16).items()}
    call = partial(gated_conv1d, **leaves, recompute=recompute, backend=kernels)
    assert bytes_kept_for_backward(call, leaves.values()) == kept * 2 * case.B * case.L * case.C_out


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "cond"])
def test_gradients_that_are_not_needed(kernels: str, needed: str) -> None:
    """One gradient alone is what it is among all of them, and the others are not given."""
    for two_weights in (False, True):
        case = Case(cond="one", two_weights=two_weights)
        p = problem(case, torch.float32)
        full = evaluate(p.inputs, case.dy, **p.options, backend=kernels)
        names = [needed, *([f"gate_{needed}"] if two_weights and needed in ("weight", "bias") else [])]
        for name in names:
            leaves = {n: t.clone().requires_grad_(n == name) for n, t in p.inputs.items()}
            y = gated_conv1d(**leaves, **p.options, backend=kernels)
            y.backward(case.dy(y))
            assert torch.equal(leaves[name].grad, full[f"d{name}"])
            assert all(t.grad is None for n, t in leaves.items() if n != name)


# --- derivatives ---

SMALL = legal(B=(1,), L=(6,), C_in=(2,), C_out=(2,), residual=RESIDUALS, value_act=ACTS, padding=PADDINGS) + legal(
    L=(5,), C_in=(1,), C_out=(1,), dilation=(1,), cond=("one", "all"), two_weights=(False, True), rows=ROWS,
    gate_noise=(0.3,),
)  # fmt: skip


@pytest.mark.parametrize("second", [False, True], ids=["gradcheck", "gradgradcheck"])
def test_numerical_derivatives(second: bool, extension: object) -> None:
    """#30: fp64 through our kernels; the second derivatives are those of the reference expression."""
    for case in SMALL if not second else SMALL[::5]:
        inputs = {name: t.requires_grad_() for name, t in case.inputs(torch.float64).items()}
        options = case.options()

        def call(*tensors: Tensor, names: tuple = tuple(inputs), options: dict = options) -> Tensor:
            return gated_conv1d(**dict(zip(names, tensors, strict=True)), **options, backend="cpu")

        check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
        assert check(call, tuple(inputs.values()), fast_mode=False), case


def test_second_derivative_where_inputs_depend_on_each_other(backend: str) -> None:
    """#30: a penalty on gradients, where x itself comes from the weight."""
    start = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def penalty_gradient(name: str) -> Tensor:
        w = start.clone().requires_grad_()
        x = torch.stack([w.sum(2)] * 3)
        y = gated_conv1d(x, torch.cat([w, w.flip(2)]), backend=name)
        dx, dw = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.sin().sum(), w)[0]

    assert torch.allclose(penalty_gradient(backend), penalty_gradient("reference"), rtol=1e-10, atol=1e-10)


# --- precision of float32 ---


def test_float32_uses_bf16_products_only_where_allowed(kernels: str) -> None:
    """ "high" is treated as "highest"; "medium" may use bf16 products, and obeys the rule with bf16's own rounding."""
    case = Case(B=2, L=100, C_in=64, C_out=64)
    p = problem(case, torch.float32)
    results = by_precision(lambda: evaluate(p.inputs, case.dy, **p.options, backend=kernels))
    assert_equal(results["highest"], results["high"])
    p.check(results["highest"])
    # Each product has two factors rounded to 8 bits; a sum of n of them of order 1/sqrt(n) errs by about their error.
    eps = torch.finfo(torch.bfloat16).eps
    for name, got in results["medium"].items():
        truth = p.truth[name]
        scale = max(1.0, truth.abs().max().item()) * (1 if name in ("y", "dx") else math.sqrt(100))
        assert (got.double() - truth).abs().max().item() <= 4 * eps * scale, name
