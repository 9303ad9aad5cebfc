"""lora_linear and lora_linear_multi: outputs and gradients by the error rule, for every form, size and dtype. `#n`
names a line of the project's failure checklist."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykernels import lora_linear, lora_linear_multi
from pykernels.random_bits import draws16, dropout_factors
from tests.helpers import FLOATS, SIZES, assert_equal, by_precision, bytes_kept_for_backward
from tests.lora_linear_cases import LoraCase, check_case, evaluate, problem

ROWS = (15, 16, 32, 64, *SIZES)  # where products without packing end, by dtype and tier
HALVES = ("bf16", "fp16")


# --- the definition ---


def by_hand(inputs: dict[str, Tensor], case: LoraCase) -> Tensor:
    """The formula of the docstring, one row after the other."""
    options, x = case.options(), inputs["x"].reshape(case.rows, case.K)
    d = x
    if case.dropout:
        d = x * dropout_factors(draws16(torch.tensor(options["seed"]), case.rows, case.K), case.dropout)
    index = options.get("adapter_index", torch.zeros((), dtype=torch.int64))
    adapter = index.reshape(*index.shape, *[1] * (len(case.leading) - index.dim())).expand(case.leading).reshape(-1)
    outputs = []
    for i, e in enumerate(adapter.tolist()):
        y = inputs["weight"] @ x[i] + inputs.get("bias", 0)
        if e >= 0:
            a, b = (inputs[name][e] if case.E else inputs[name] for name in ("lora_a", "lora_b"))
            y = y + (options["scale"][e] if case.scales else case.scale) * (b @ (a @ d[i]))
        outputs.append(y)
    return torch.stack(outputs).view(*case.leading, case.N)


def combinations(**axes: tuple) -> list[LoraCase]:
    return [LoraCase(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


SINGLE = combinations(
    leading=((2, 11), (9,)), R=(0, 1, 3, 8), bias=(True, False), dropout=(0.0, 0.3), transposed=(False, True),
    float_adapters=(False, True),
)  # fmt: skip
MULTI = combinations(
    leading=((4, 6), (13,), (2, 3, 5)), E=(1, 3), R=(1, 4), indexed=(1, None), scales=(False, True),
    dropout=(0.0, 0.3), float_adapters=(False, True),
)  # fmt: skip


def test_reference_is_the_formula() -> None:
    for case in [*SINGLE, *MULTI]:
        inputs = case.inputs(torch.float64)
        y = evaluate(inputs, None, **case.options(), backend="reference")["y"]
        assert torch.allclose(y, by_hand(inputs, case), rtol=0, atol=1e-12), case


# --- forms ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cases", [SINGLE, MULTI], ids=["one adapter", "several"])
def test_every_form(cases: list[LoraCase], dtype: str, kernels: str) -> None:
    """#17: rank 0 and odd ranks, bias, dropout, adapters in float32 or in x's dtype, one or several, index shapes."""
    for case in cases:
        check_case(case, FLOATS[dtype], kernels)


@pytest.mark.parametrize("dtype", FLOATS)
def test_leading_shapes(dtype: str, kernels: str) -> None:
    """[K], [B, K], [B, L, K] and more, with an index of each number of dimensions, none included."""
    for leading in ((), (1,), (40,), (2, 3), (5, 6), (2, 3, 4, 2)):
        check_case(LoraCase(leading=leading), FLOATS[dtype], kernels)
        for indexed in range(len(leading) + 1):
            check_case(LoraCase(leading=leading, E=2, indexed=indexed), FLOATS[dtype], kernels)


def test_scales(backend: str) -> None:
    """#17: zero and negative scales; a tensor of any floating dtype; equal scales are one scale."""
    for scale in (0.0, -1.5, 1, 1e-3):
        check_case(LoraCase(scale=scale), torch.float32, backend)
        check_case(LoraCase(scale=scale, E=2), torch.float32, backend)
    p = problem(LoraCase(E=3), torch.float32)
    index = p.options["adapter_index"]
    plain = evaluate(p.inputs, p.case.dy, adapter_index=index, scale=0.75, backend=backend)
    for dtype in FLOATS.values():
        scales = torch.full((3,), 0.75, dtype=dtype, requires_grad=True)
        got = evaluate(p.inputs, p.case.dy, adapter_index=index, scale=scales, backend=backend)
        assert_equal(got, plain, dtype)
        assert scales.grad is None


# --- sizes ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", ["rows", "K", "N", "R"])
def test_sizes(axis: str, dtype: str, kernels: str) -> None:
    """#9: sizes that are no multiple of a vector or of a tile, with few rows and with many, both weight layouts."""
    for size in ROWS if axis == "rows" else SIZES:
        for rows in (size,) if axis == "rows" else (5, 40):
            sizes = {"K": 20, "N": 6, "R": 5} | ({} if axis == "rows" else {axis: size})
            case = LoraCase(leading=(rows,), **sizes, transposed=size % 4 == 1, dropout=0.2 * (size % 2))
            check_case(case, FLOATS[dtype], kernels)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pairs_of_sizes(dtype: str, kernels: str) -> None:
    """#9: row tails together with column tails, inner tails and tails of the rank."""
    for rows, k, n in itertools.product((1, 2, 16, 17, 33, 65), (1, 31, 32, 65), (1, 17, 32, 63)):
        case = LoraCase(leading=(rows,), K=k, N=n, R=1 + rows % 9, transposed=rows % 2 == 0)
        check_case(case, FLOATS[dtype], kernels)


# Rows by inputs by outputs. With one thread, products go by columns of the weights up to 1 MiB of activations, up to
# 8 MiB where the weights are heavier, and else by rows. Rows of 1,024 elements lie a multiple of 2,048 bytes apart.
LARGE = {
    "by rows": (1100, 600, 40),
    "by rows, rows that collide": (1100, 1024, 40),
    "by columns": (300, 100, 200),
    "by columns, rows that collide": (60, 1024, 130),
    "by columns, heavy weights": (530, 1024, 540),
    "few rows": (9, 1024, 700),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", LARGE)
def test_products_by_rows_and_by_columns(name: str, dtype: str, kernels: str) -> None:
    """Forward by one and, with the roles of K and N exchanged, backward; a rank beyond a vector."""
    rows, k, n = LARGE[name]
    check_case(LoraCase(leading=(rows,), K=k, N=n, R=20), FLOATS[dtype], kernels)
    check_case(LoraCase(leading=(rows,), K=n, N=k, R=2, transposed=True, dropout=0.1), FLOATS[dtype], kernels)


@pytest.mark.parametrize("E", [0, 2])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_empty(transposed: bool, E: int, backend: str) -> None:
    """#24: no rows, inputs, outputs or rank, alone and together. Gradients of weights are zeros, not garbage."""
    for rows, k, n, rank in itertools.product((0, 3, 20), (0, 5), (0, 4), (0, 2)):
        for leading in ((rows,), (rows, 2), (2, rows)) if rows in (0, 3) else ((rows,),):
            for dropout in (0.0, 0.5):
                case = LoraCase(leading, k, n, rank, E, transposed=transposed, dropout=dropout)
                got = evaluate(case.inputs(torch.float32), case.dy, **case.options(), backend=backend)
                want = evaluate(case.inputs(torch.float32), case.dy, **case.options(), backend="reference")
                for name, t in want.items():
                    assert got[name].shape == t.shape and torch.allclose(got[name], t, atol=1e-5), (name, case)


def test_no_adapters(backend: str) -> None:
    """#24: E = 0 and all rows without one, also when gradients are differentiated again."""
    inputs, index = LoraCase(leading=(20,), E=0, indexed=1).inputs(torch.float64), torch.full((20,), -1)
    assert inputs["lora_a"].shape[0] == 0
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = lora_linear_multi(**leaves, adapter_index=index, backend=backend)
    assert torch.allclose(y, torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"]))
    first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True, materialize_grads=True)
    assert [t.shape for t in first] == [t.shape for t in leaves.values()]
    (second,) = torch.autograd.grad(first[0].square().sum(), inputs["weight"])
    assert second.isfinite().all() and second.ne(0).any()


# --- adapters in float32 ---


@pytest.mark.parametrize("dtype", HALVES)
def test_float_adapters_keep_the_accuracy_of_float32(dtype: str, kernels: str) -> None:
    """#16: their gradients and S have the error of a calculation in float32, not of x's dtype, dropout included."""
    for case in [
        LoraCase(leading=(200,), K=300, N=70, R=5, float_adapters=True),
        LoraCase(leading=(200,), K=70, N=300, R=16, float_adapters=True, dropout=0.1),
        LoraCase(leading=(12,), K=65, N=33, R=3, float_adapters=True, transposed=True),
        LoraCase(leading=(30, 4), K=65, N=33, R=3, float_adapters=True, E=3, scales=True, dropout=0.3),
    ]:
        p = problem(case, FLOATS[dtype])
        dy = case.dy(p.same["y"])
        single = {name: t.float() for name, t in p.inputs.items()}
        same = evaluate(single, dy.float(), **p.options, backend="reference")
        got = evaluate(p.inputs, dy, **p.options, backend=kernels)
        p.check({name: got[name] for name in ("dlora_a", "dlora_b")}, same)
        if case.E or case.dropout:
            continue
        _, s, _ = torch.ops.pykernels._lora_linear_fwd(
            *(p.inputs[name] for name in ("x", "weight", "lora_a", "lora_b", "bias")), None, None, None, 1.0, 0.0
        )
        truth = p.inputs["x"].double() @ p.inputs["lora_a"].double().T
        error = (single["x"] @ single["lora_a"].T - truth).abs().max()
        assert s.dtype == torch.float32 and (s - truth).abs().max() <= 2 * error + 1e-6


# --- several adapters ---


@pytest.mark.parametrize("dtype", FLOATS)
def test_several_adapters_are_a_loop_over_each(dtype: str, kernels: str) -> None:
    """Rows of one adapter alone give their rows of y and dx bit for bit, and its gradients up to the order of sums."""
    case = LoraCase(leading=(600,), K=33, N=40, R=5, E=3, scales=True)
    p = problem(case, FLOATS[dtype])
    index, scale = p.options["adapter_index"], p.options["scale"]
    dy = case.dy(p.same["y"])
    got = evaluate(p.inputs, dy, **p.options, backend=kernels)
    for e in range(-1, 3):
        rows = index == e
        assert rows.sum() > 64  # few rows are multiplied otherwise
        one = p.inputs | {"x": p.inputs["x"][rows]}
        for name in ("lora_a", "lora_b"):
            one[name] = p.inputs[name][max(e, 0)] * (e >= 0)
        alone = evaluate(one, dy[rows], scale=scale[max(e, 0)].item(), backend=kernels)
        assert torch.equal(alone["y"], got["y"][rows]) and torch.equal(alone["dx"], got["dx"][rows])
        for name in ("dlora_a", "dlora_b"):
            if e >= 0:
                # Elements that cancel keep the rounding of the largest ones.
                tolerance = rows.sum().item() ** 0.5 * torch.finfo(FLOATS[dtype]).eps * got[name][e].abs().max().item()
                assert torch.allclose(alone[name], got[name][e], rtol=0, atol=tolerance), name


def test_index_types(backend: str) -> None:
    """int32 and int64, contiguous or not."""
    p = problem(LoraCase(leading=(5, 6), E=2), torch.float32)
    index = p.options["adapter_index"]
    expected = evaluate(p.inputs, p.case.dy, **p.options, backend=backend)
    for other in (index.int(), index.t().contiguous().t(), index.int().repeat_interleave(2, 1)[:, ::2]):
        options = p.options | {"adapter_index": other}
        assert_equal(evaluate(p.inputs, p.case.dy, **options, backend=backend), expected)


def test_adapters_that_are_not_used_do_not_leak(kernels: str) -> None:
    """NaN in an adapter without rows, and in rows of another, stays there; gradients of unused adapters are zero."""
    p = problem(LoraCase(leading=(40,), E=3), torch.float32)
    inputs = {name: t.clone() for name, t in p.inputs.items()}
    inputs["lora_a"][1], inputs["lora_b"][1] = math.nan, math.inf
    index = torch.arange(40) % 3
    index[index == 1] = -1
    got = evaluate(inputs, p.case.dy, adapter_index=index, backend=kernels)
    assert all(t.isfinite().all() for t in got.values())
    assert got["dlora_a"][1].eq(0).all() and got["dlora_b"][1].eq(0).all()
    index[7] = 1
    got = evaluate(inputs, p.case.dy, adapter_index=index, backend=kernels)
    assert got["y"].isfinite().all(1).tolist() == [i != 7 for i in range(40)]


# --- properties ---

cases = st.builds(
    LoraCase,
    leading=st.lists(st.integers(1, 40), max_size=2).map(tuple),
    K=st.integers(1, 70),
    N=st.integers(1, 70),
    R=st.integers(0, 20),
    E=st.integers(0, 3),
    bias=st.booleans(),
    scale=st.sampled_from((0.0, 0.5, -2.0)),
    dropout=st.sampled_from((0.0, 0.0, 0.3)),
    float_adapters=st.booleans(),
    transposed=st.booleans(),
)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_configuration(dtype: str, kernels: str) -> None:
    @settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def check(case: LoraCase) -> None:
        check_case(case, FLOATS[dtype], kernels)

    check()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_bytes_kept_for_backward(dtype: str, kernels: str) -> None:
    """Besides the arguments, S in the type of the sums, and with dropout one bit an element of x and a byte."""
    for dropout, bits in [(0.0, 0), (0.1, 200 * 10 + 1)]:
        case, seed = LoraCase(leading=(4, 50), K=75, R=6), torch.tensor(3)
        leaves = {name: t.requires_grad_() for name, t in case.inputs(FLOATS[dtype]).items()}
        call = partial(lora_linear, **leaves, dropout=dropout, training=True, seed=seed, backend=kernels)
        kept = bytes_kept_for_backward(call, [*leaves.values(), seed])
        assert kept == (8 if dtype == "fp64" else 4) * 200 * 6 + bits


@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize("needed", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_gradients_that_are_not_needed(kernels: str, needed: str, rows: int) -> None:
    """One gradient alone is what it is among all of them, and the others - a frozen weight's - are not given."""
    for case in (LoraCase(leading=(rows,), dropout=0.3), LoraCase(leading=(rows,), E=2)):
        p = problem(case, torch.float32)
        full = evaluate(p.inputs, case.dy, **p.options, backend=kernels)
        leaves = {n: t.clone().requires_grad_(n == needed) for n, t in p.inputs.items()}
        y = (lora_linear_multi if case.E else lora_linear)(**leaves, **p.options, backend=kernels)
        y.backward(case.dy(y))
        assert torch.equal(leaves[needed].grad, full[f"d{needed}"])
        assert all(t.grad is None for n, t in leaves.items() if n != needed)


# --- derivatives ---

SMALL = combinations(leading=((3,), (18,)), K=(2,), N=(3,), R=(0, 2), bias=(True, False), dropout=(0.0, 0.4)) + (
    combinations(leading=((3, 2), (18,)), K=(2,), N=(2,), R=(2,), E=(2,), scales=(False, True), dropout=(0.0, 0.4))
)


@pytest.mark.parametrize("second", [False, True], ids=["gradcheck", "gradgradcheck"])
def test_numerical_derivatives(second: bool, extension: object) -> None:
    """#30: fp64 through our kernels; the second derivatives are those of the reference expression."""
    for case in SMALL[::2] if second else SMALL:
        case = replace(case, transposed=second)
        inputs = {name: t.requires_grad_() for name, t in case.inputs(torch.float64).items()}

        def call(*tensors: Tensor, names: tuple = tuple(inputs), case: LoraCase = case) -> Tensor:
            function = lora_linear_multi if case.E else lora_linear
            return function(**dict(zip(names, tensors, strict=True)), **case.options(), backend="cpu")

        check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
        assert check(call, tuple(inputs.values()), fast_mode=second), case


def test_second_derivative_where_inputs_depend_on_each_other(backend: str) -> None:
    """#30: a penalty on gradients, where x and the adapters come from the weight."""
    start = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def penalty_gradient(name: str) -> Tensor:
        w = start.clone().requires_grad_()
        y = lora_linear(w.flip(0), w, w[:2], w.square()[:, :2], dropout=0.3, training=True, seed=2, backend=name)
        (dw,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        return torch.autograd.grad(dw.sin().sum(), w)[0]

    assert torch.allclose(penalty_gradient(backend), penalty_gradient("reference"), rtol=1e-10, atol=1e-10)


# --- precision of float32 ---


def test_float32_uses_bf16_products_only_where_allowed(kernels: str) -> None:
    """ "high" is treated as "highest"; "medium" may use bf16 base products. S and the adapters stay in float32."""
    case = LoraCase(leading=(100,), K=64, N=64)
    p = problem(case, torch.float32)
    results = by_precision(lambda: evaluate(p.inputs, case.dy, **p.options, backend=kernels))
    assert_equal(results["highest"], results["high"])
    p.check(results["highest"])
    medium = results["medium"]
    p.check({name: medium[name] for name in ("dlora_a", "dlora_b", "dbias")})
    for name in ("y", "dx", "dweight"):
        truth = p.truth[name]
        # Each product has two factors rounded to 8 bits; dweight is a sum over 100 rows.
        scale = max(1.0, truth.abs().max().item()) * (10 if name == "dweight" else 1)
        assert (medium[name].double() - truth).abs().max().item() <= 4 * torch.finfo(torch.bfloat16).eps * scale, name
