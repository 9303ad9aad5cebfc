"""attention_pool: outputs, scores and gradients by the error rule, for every form, size and dtype. `#n` names a line of
the project's failure checklist."""

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykernels import attention_pool
from tests.attention_pool_cases import PoolCase, check_case, evaluate, problem
from tests.helpers import FLOATS, SIZES, assert_equal, by_precision, bytes_kept_for_backward

ACTIVATIONS, ROWS, RETURNED = (
    ("tanh", "swish", "relu", "gelu"),
    ("all", "mask", "lengths", "packed"),
    (None, "raw", "softmax"),
)


# --- the definition ---


def by_hand(inputs: dict[str, Tensor], case: PoolCase) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of the docstring, one sequence after the other: out, raw and softmax scores."""
    act = {
        "tanh": torch.tanh,
        "swish": lambda h: h / (1 + torch.exp(-h)),
        "relu": lambda h: h.clamp(min=0),
        "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
    }[case.activation]
    x, live = inputs["x"], case.live()
    zero = torch.zeros(case.H, dtype=x.dtype)
    queries = inputs["query"].view(-1, case.H)
    sequences = [(x[b], live[b]) for b in range(case.B)] if x.dim() == 3 else []
    if x.dim() == 2:
        bounds = case.options()["cu_seqlens"].tolist()
        sequences = [(x[a:b], live[a:b]) for a, b in itertools.pairwise(bounds)]
    outs, raws, weights = [], [], []
    for rows, keep in sequences:
        u = act(rows @ inputs["weight"].T + inputs.get("bias", zero))
        if case.gated:
            u = u / (1 + torch.exp(-(rows @ inputs["gate_weight"].T + inputs.get("gate_bias", zero))))
        s, a = queries @ u.T, torch.zeros(len(queries), len(rows), dtype=x.dtype)
        if keep.any():
            a[:, keep] = torch.exp(s[:, keep]) / torch.exp(s[:, keep]).sum(1, keepdim=True)
        outs.append(a[:, keep] @ rows[keep])
        raws.append(torch.where(keep, s, 0))
        weights.append(a)
    join = torch.stack if x.dim() == 3 else lambda parts: torch.cat(parts, -1)
    out, raw, weight = torch.stack(outs), join(raws), join(weights)
    return (out, raw, weight) if case.J else (out.squeeze(1), raw.squeeze(-2), weight.squeeze(-2))


def combinations(**axes: tuple) -> list[PoolCase]:
    return [PoolCase(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


FORMS = combinations(
    activation=ACTIVATIONS, gated=(False, True), J=(0, 1, 3), bias=(True, False), rows=ROWS, returned=RETURNED
)


def test_reference_is_the_formula() -> None:
    for case in FORMS:
        inputs = case.inputs(torch.float64)
        got = evaluate(inputs, None, **case.options(), backend="reference")
        out, raw, weights = by_hand(inputs, case)
        expected = {"out": out, "scores": raw if case.returned == "raw" else weights}
        assert got.keys() == {"out"} | ({"scores"} if case.returned else set())
        for name, t in got.items():
            assert t.shape == expected[name].shape and torch.allclose(t, expected[name], rtol=0, atol=1e-12), case


# --- forms ---


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_form(dtype: str, activation: str, gated: bool, kernels: str) -> None:
    """Heads x bias x mask, lengths, packed rows x returned scores."""
    for case in FORMS:
        if (case.activation, case.gated) == (activation, gated):
            check_case(case, FLOATS[dtype], kernels)


def test_gate_without_one_of_the_biases(backend: str) -> None:
    full = PoolCase(gated=True).inputs(torch.float64)
    for name in ("bias", "gate_bias"):
        zero = full | {name: torch.zeros(7, dtype=torch.float64)}
        without = {n: t for n, t in full.items() if n != name}
        a = evaluate(without, PoolCase().gradients, backend=backend)
        b = evaluate(zero, PoolCase().gradients, backend=backend)
        for key in a:
            assert torch.allclose(a[key], b[key], rtol=0, atol=1e-12), key


# --- sizes ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", ["D", "L", "H", "J", "B"])
def test_sizes(axis: str, dtype: str, kernels: str) -> None:
    """#9: sizes that are no multiple of a vector, of a tile or of a chunk of rows."""
    for size in SIZES:
        if axis == "J" and size > 65:
            continue
        other = {"L": 40, "D": 6, "H": 6, "B": 2} | ({"L": 3} if axis == "B" else {})
        check_case(PoolCase(**{**other, axis: size}, gated=size % 4 == 1, returned="raw"), FLOATS[dtype], kernels)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pairs_of_sizes(dtype: str, kernels: str) -> None:
    """#9: row tails together with column tails."""
    for length, width, hidden in itertools.product((1, 7, 33, 65), (1, 17, 32, 65), (1, 31, 33, 64)):
        check_case(PoolCase(B=1, L=length, D=width, H=hidden), FLOATS[dtype], kernels)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows(dtype: str, kernels: str) -> None:
    """Several chunks a sequence, several sequences a unit of work, and sums over both."""
    for case in [
        PoolCase(B=1, L=1500, D=33, H=33, returned="softmax"),
        PoolCase(B=40, L=3, D=20, H=20, rows="lengths"),
        PoolCase(B=70, L=20, D=17, H=17, rows="packed", J=2, gated=True),
        PoolCase(B=3, L=700, D=24, H=24, rows="mask", J=2, returned="raw"),
        PoolCase(B=300, L=1, D=8, H=8),
        PoolCase(B=2, L=300, D=512, H=65, gated=True, rows="lengths"),
        PoolCase(B=2, L=64, D=130, H=130, activation="gelu"),
        PoolCase(B=1, L=80, D=2100, H=16),
    ]:
        check_case(case, FLOATS[dtype], kernels)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("J", [0, 2])
def test_empty(J: int, rows: str, backend: str) -> None:
    """#24: no sequences, no rows, no columns, no hidden units. Gradients of weights are zeros, not garbage."""
    for case in [
        PoolCase(B=0),
        PoolCase(L=0),
        PoolCase(B=0, L=0),
        PoolCase(D=0),
        PoolCase(H=0),
    ]:
        for returned in RETURNED:
            case = replace(case, J=J, rows=rows, returned=returned)
            inputs = case.inputs(torch.float32)
            got = evaluate(inputs, case.gradients, **case.options(), backend=backend)
            want = evaluate(inputs, case.gradients, **case.options(), backend="reference")
            for name, t in want.items():
                assert got[name].shape == t.shape and torch.allclose(got[name], t, atol=1e-6), (name, case)


# --- activations ---


def activations(values: Tensor, activation: str, backend: str) -> Tensor:
    """act(values) in the type of the scores, through raw scores of a network of one unit."""
    one = torch.ones(1, 1, dtype=values.dtype)
    options: dict[str, Any] = {"activation": activation, "return_scores": "raw", "backend": backend}
    return attention_pool(values.view(1, -1, 1), one, one[0], **options)[1].view(-1)


def exact_activation(values: Tensor, activation: str) -> Tensor:
    x = values.double()
    if activation == "tanh":
        return x.tanh()
    if activation == "relu":
        return torch.where(x < 0, 0, x)
    return x * (torch.sigmoid(x) if activation == "swish" else 0.5 * torch.erfc(-x / math.sqrt(2)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_every_bfloat16_value(activation: str, kernels: str) -> None:
    """All 65,536 bf16 numbers. The short forms keep 10 bits (GELU: 1.2e-5 of x), more than the 8 of bf16."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    got, exact = activations(values, activation, kernels).double(), exact_activation(values, activation)
    assert torch.equal(got.isnan() & ~values.isinf(), values.isnan())
    finite = values.isfinite()
    allowed = 2.0**-10 * exact.abs() + (1.2e-5 * values.double().abs() if activation == "gelu" else 0)
    # Below e^-87 the exponential is cut off.
    error = (got - exact).abs() - 2.0**-119
    worst = (error[finite] - allowed[finite]).argmax()
    assert (error[finite] <= allowed[finite]).all(), (values[finite][worst], got[finite][worst], exact[finite][worst])
    at_infinity = got[values == math.inf].item()
    assert abs(at_infinity - 1) <= 2.0**-10 if activation == "tanh" else at_infinity == math.inf


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_float32(activation: str, kernels: str) -> None:
    """A dense grid: tanh to 3.5 * 2^-23, swish to 4 * 2^-23, GELU to 3e-7 of x (its Gaussian tail)."""
    values = torch.cat(
        [torch.linspace(-12, 12, 600_001), torch.logspace(-30, 2, 20_001), -torch.logspace(-30, 2, 20_001)]
    )
    got, exact = activations(values, activation, kernels).double(), exact_activation(values, activation)
    ulp = 2.0**-23 * exact.abs()
    limit = {"tanh": 3.5 * ulp, "swish": 4 * ulp, "relu": 0 * ulp, "gelu": 3e-7 * values.double().abs()}[activation]
    error = (got - exact).abs() - 2.0**-119
    worst = (error - limit).argmax()
    assert (error <= limit).all(), (values[worst], got[worst], exact[worst])
    assert activation != "tanh" or got.abs().max() == 1


# --- properties ---

cases = st.builds(
    PoolCase,
    B=st.integers(1, 6),
    L=st.integers(1, 150),
    D=st.integers(1, 70),
    H=st.integers(1, 70),
    J=st.integers(0, 3),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    bias=st.booleans(),
    rows=st.sampled_from(ROWS),
    returned=st.sampled_from(RETURNED),
)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_configuration(dtype: str, kernels: str) -> None:
    @settings(max_examples=50, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def check(case: PoolCase) -> None:
        check_case(case, FLOATS[dtype], kernels)

    check()


def test_scores_far_apart(backend: str) -> None:
    """Scores that differ by more than the exponential's range, and large ones: their differences count."""
    x = torch.eye(3, dtype=torch.float32).repeat(1, 70, 1)
    weight = torch.diag(torch.tensor([1.0, 1.0, 1.0]))
    for query in ([1e4, -1e4, 0.0], [-1e30, 1e30, 3.0], [88.0, 89.0, -200.0], [0.0, 0.0, 0.0]):
        out = attention_pool(x, weight, torch.tensor(query), activation="relu", backend=backend)
        exact = torch.softmax(torch.tensor(query, dtype=torch.float64), 0)
        assert torch.allclose(out[0].double(), exact, rtol=1e-5, atol=1e-30), query


def test_nan_and_infinity_in_rows_that_count(kernels: str) -> None:
    """What is not a number in a live row comes out, and does not stay inside one chunk."""
    for length in (5, 400):
        x = torch.randn(2, length, 8)
        x[0, length // 2, 3] = math.nan
        out = attention_pool(x, torch.randn(9, 8), torch.randn(9), backend=kernels)
        assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_kept_for_backward(dtype: str, recompute: bool, kernels: str) -> None:
    """4 bytes a score, 8 for a sequence's head; 16-bit dtypes also the output before it was rounded. Nothing of H,
    unless it is asked for: then the preactivations in x's dtype."""
    case = PoolCase(B=4, L=50, D=16, H=96, J=2)
    leaves = {name: t.requires_grad_() for name, t in case.inputs(FLOATS[dtype]).items()}
    call = partial(attention_pool, **leaves, recompute=recompute, backend=kernels)
    kept = bytes_kept_for_backward(call, leaves.values(), with_result=False)
    preactivations = 0 if recompute else 4 * 50 * 96 * FLOATS[dtype].itemsize
    unrounded = 4 * 4 * 2 * 16 if dtype == "bf16" else 0
    assert kept == 4 * (2 * 4 * 50 + 2 * 2 * 4) + unrounded + preactivations


@pytest.mark.parametrize("needed", ["x", "weight", "query", "bias", "gate_weight", "gate_bias"])
def test_gradients_that_are_not_needed(kernels: str, needed: str) -> None:
    """One gradient alone is what it is among all of them, and the others are not given."""
    case = PoolCase(gated=True, J=2, rows="lengths")
    p = problem(case, torch.float32)
    full = evaluate(p.inputs, case.gradients, **p.options, backend=kernels)
    leaves = {n: t.clone().requires_grad_(n == needed) for n, t in p.inputs.items()}
    out = attention_pool(**leaves, **p.options, backend=kernels)
    out.backward(case.gradients({"out": out})["out"])
    assert torch.equal(leaves[needed].grad, full[f"d{needed}"])
    assert all(t.grad is None for n, t in leaves.items() if n != needed)


@pytest.mark.parametrize("returned", ["raw", "softmax"])
def test_gradients_of_one_result_alone(returned: str, backend: str) -> None:
    """The loss may use the scores and not the output, or the output and not the scores."""
    case = PoolCase(J=2, rows="mask", returned=returned, gated=True)
    p = problem(case, torch.float64)
    parts = []
    for name in ("out", "scores"):
        alone = evaluate(p.inputs, lambda r, name=name: {name: case.gradients(r)[name]}, **p.options, backend=backend)
        parts.append(alone)
    both = evaluate(p.inputs, case.gradients, **p.options, backend=backend)
    for name in p.inputs:
        total = parts[0][f"d{name}"] + parts[1][f"d{name}"]
        assert torch.allclose(total, both[f"d{name}"], rtol=1e-10, atol=1e-12), name


# --- derivatives ---

SMALL = combinations(
    B=(3,), L=(4,), D=(2,), H=(3,), J=(0, 2), activation=ACTIVATIONS, gated=(False, True), rows=ROWS, returned=RETURNED
)


@pytest.mark.parametrize("second", [False, True], ids=["gradcheck", "gradgradcheck"])
def test_numerical_derivatives(second: bool, extension: object) -> None:
    """#30: fp64 through our kernels; the second derivatives are those of the reference expression."""
    for case in SMALL[::2] if not second else SMALL[::11]:
        if second and case.activation == "relu":
            continue
        inputs = {name: t.requires_grad_() for name, t in case.inputs(torch.float64).items()}
        options = case.options()

        def call(*tensors: Tensor, names: tuple = tuple(inputs), options: dict = options) -> Any:
            return attention_pool(**dict(zip(names, tensors, strict=True)), **options, backend="cpu")

        check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
        assert check(call, tuple(inputs.values()), fast_mode=second), case


def test_second_derivative_where_inputs_depend_on_each_other(backend: str) -> None:
    """#30: a penalty on gradients, where x itself comes from the weight."""
    start = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def penalty_gradient(name: str) -> Tensor:
        w = start.clone().requires_grad_()
        out = attention_pool(torch.stack([w, w.flip(0)]), w, w.sum(1), backend=name)
        (dw,) = torch.autograd.grad(out.square().sum(), w, create_graph=True)
        return torch.autograd.grad(dw.sin().sum(), w)[0]

    assert torch.allclose(penalty_gradient(backend), penalty_gradient("reference"), rtol=1e-10, atol=1e-10)


# --- precision of float32 ---


def test_float32_uses_bf16_products_only_where_allowed(kernels: str) -> None:
    """ "high" is treated as "highest"; "medium" may use bf16 products, and obeys the rule with bf16's own rounding."""
    case = PoolCase(B=2, L=100, D=64, H=64)
    p = problem(case, torch.float32)
    results = by_precision(lambda: evaluate(p.inputs, case.gradients, **p.options, backend=kernels))
    assert_equal(results["highest"], results["high"])
    p.check(results["highest"])
    eps = torch.finfo(torch.bfloat16).eps
    for name, got in results["medium"].items():
        truth = p.truth[name]
        # Each product has two factors rounded to 8 bits; da, a sum of D products, is of order sqrt(D).
        scale = max(1.0, truth.abs().max().item()) * (1 if name == "out" else math.sqrt(64))
        assert (got.double() - truth).abs().max().item() <= 4 * eps * scale, name
