"""lora_linear's Triton kernels without a GPU: what Triton compiles for sm_80 and sm_90 (warpgroup instructions),
executed on CPU tensors by tests/ptx_on_cpu. A second judge is Triton's interpreter, in a process of its own."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pykernels import _backend, _extension, lora_linear, lora_linear_multi, lora_linear_stacked
from tests import test_dora_linear as dora
from tests import test_lora_linear_layouts as layouts
from tests import test_lora_linear_stacked as stacked
from tests.helpers import FLOATS, LAYOUTS, Results, assert_equal
from tests.lora_linear_cases import LoraCase, check_case, evaluate, problem
from tests.ptx_on_cpu import REVERSE

pytest.importorskip("triton")

from pykernels.triton_kernels.lora_linear import lora_product, lora_shrink  # noqa: E402
from pykernels.triton_kernels.lora_linear_bwd import lora_adapter_sums, lora_weight_sums  # noqa: E402
from pykernels.triton_kernels.lora_linear_few import lora_few_product  # noqa: E402
from tests import triton_cases  # noqa: E402
from tests.ptx_on_cpu.triton_driver import active  # noqa: E402
from tests.triton_cases import python  # noqa: E402

pytestmark = triton_cases.MARKS
TUNED = (lora_shrink, lora_product, lora_few_product, lora_adapter_sums, lora_weight_sums)
DTYPES, BF16 = ["fp32", "bf16", "fp16"], torch.bfloat16
OPERATORS = torch.ops.pykernels
smallest_tiles = triton_cases.smallest_tiles(*TUNED)
capability, ampere = triton_cases.capability, triton_cases.ampere


def trained(case: LoraCase, dtype: str) -> Results:
    p = problem(case, FLOATS[dtype])
    return evaluate(p.inputs, case.dy, **p.options, backend="triton")


# --- values and gradients ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str, capability: int) -> None:
    """A sample of all combinations of options, another one for each dtype and capability."""
    axes = {
        "bias": (False, True), "E": (0, 3), "scales": (False, True), "dropout": (0.0, 0.4),
        "float_adapters": (False, True), "transposed": (False, True), "R": (1, 3), "leading": ((2, 11), (5,)),
    }  # fmt: skip
    forms = [LoraCase(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    forms = random.Random(1).sample([form for form in forms if form.E or not form.scales], 12)
    for case in forms[DTYPES.index(dtype) * 2 + (capability == 90) :: 6]:
        check_case(case, FLOATS[dtype], "triton")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sizes(dtype: str, ampere: None) -> None:
    """Odd sizes, several tiles in each direction, ranks beyond a tile, empties."""
    for case in (
        LoraCase(leading=(33,), K=33, N=65, R=5), LoraCase(leading=(3, 47), K=136, N=72, R=40), LoraCase(()),
        LoraCase(R=0, dropout=0.5), LoraCase((), E=2), LoraCase(leading=(0,)), LoraCase(leading=(4, 0), E=2),
        LoraCase(K=0), LoraCase(K=0, E=2, scales=True, dropout=0.1), LoraCase(N=0), LoraCase(leading=(20,), R=0, E=2),
    ):  # fmt: skip
        check_case(case, FLOATS[dtype], "triton")
    adapters = {"lora_a": torch.zeros(0, 2, 9), "lora_b": torch.zeros(0, 7, 2)}
    given = {n: t for n, t in problem(LoraCase(E=1), torch.float32).inputs.items() if n not in adapters}
    index = torch.full((2, 11), -1)
    y = lora_linear_multi(**given, **adapters, adapter_index=index, backend="triton")
    torch.testing.assert_close(y, torch.nn.functional.linear(given["x"], given["weight"], given["bias"]))


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_few_rows(rows: int, ampere: None) -> None:
    """Up to eight rows read the weight in parts; one row more takes tiles."""
    for dtype, form in (
        ("bf16", LoraCase(K=700, N=33, R=20, float_adapters=True, dropout=0.3)),
        ("fp16", LoraCase(K=61, N=17, E=3, scales=True, bias=False)),
    ):
        check_case(replace(form, leading=(rows,)), FLOATS[dtype], "triton")


def test_long_sums_are_cut_into_parts(ampere: None) -> None:
    """Several parts of S, of dS and of the sums over rows."""
    check_case(LoraCase(leading=(600,), K=300, N=270, R=3, E=2), torch.bfloat16, "triton")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_rank_terms_keep_float32(dtype: str, capability: int) -> None:
    """float32 adapters of a 16-bit layer: S and the adapters' gradients are as exact as in float32."""
    case = LoraCase(leading=(70,), K=72, N=88, R=4, float_adapters=True, dropout=0.25)
    p, got = problem(case, FLOATS[dtype]), trained(case, dtype)
    for name in ("dlora_a", "dlora_b"):
        error = ((got[name].double() - p.truth[name]).norm() / p.truth[name].norm()).item()
        assert error < 2e-6, (name, error)
    x, weight, lora_a, lora_b, bias = (p.inputs[n] for n in ("x", "weight", "lora_a", "lora_b", "bias"))
    _, s, keep = OPERATORS._lora_linear_fwd_triton(
        x, weight, lora_a, lora_b, bias, None, None, torch.tensor(1234), case.scale, case.dropout
    )
    exact = lora_linear(
        x.double(), torch.zeros(4, 72).double(), lora_a.double(), torch.eye(4).double(), dropout=case.dropout,
        training=True, seed=1234, backend="reference",
    )  # fmt: skip
    assert ((s.double() - exact).norm() / exact.norm()).item() < 1e-6 and keep.numel() == 0


def test_float16_adapters_of_any_size(ampere: None) -> None:
    """S beyond float16's range and factors below it, where y is in it."""
    case = LoraCase(leading=(20,), K=24, N=16, R=3, float_adapters=True, bias=False)
    p = problem(case, torch.float16)
    inputs = p.inputs | {"lora_a": p.inputs["lora_a"] * 4e4, "lora_b": p.inputs["lora_b"] / 4e4}
    with torch.no_grad():
        y = lora_linear(**inputs, backend="triton", scale=case.scale)
    assert (y.double() - p.truth["y"]).abs().max() < 2e-3 * p.truth["y"].abs().max()


def test_tf32_where_the_setting_allows_it(capability: int) -> None:
    """PyTorch's setting for CUDA's matrix products; tf32 keeps ten bits of mantissa."""
    case = LoraCase(leading=(70,), K=40, N=72, R=4, dropout=0.2)
    p = problem(case, torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        got = trained(case, "fp32")
    finally:
        torch.set_float32_matmul_precision("highest")
    errors = {n: ((t.double() - p.truth[n]).norm() / p.truth[n].norm()).item() for n, t in got.items()}
    names = ("y", "dx", "dweight", "dlora_a", "dlora_b")
    assert all(1e-5 < errors[name] < 2**-9 for name in names), errors


def test_seeds_of_any_size(ampere: None) -> None:
    """Numbers whose halves Triton would else treat in another way; S shows what dropout keeps."""
    x, eye = torch.ones(9, 16), torch.eye(16)
    for seed in (1, 16, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1):
        d = [
            lora_linear(x, torch.zeros(16, 16), eye, eye, dropout=0.5, training=True, seed=seed, backend=backend)
            for backend in ("triton", "reference")
        ]
        assert torch.equal(*d) and 0 < (d[0] == 0).sum() < d[0].numel(), seed


# --- tuning ---


def test_every_configuration_gives_the_same_bits(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which configuration is the fastest may differ from run to run; results may not."""
    monkeypatch.undo()
    case, few = LoraCase(leading=(67,), K=144, N=80, R=20), problem(LoraCase(leading=(5,), K=144, N=80, R=20), BF16)
    every = {kernel: kernel.configs for kernel in TUNED}
    assert all(1 < len(configs) <= 6 for configs in every.values())
    results = []
    for i in range(max(len(configs) for configs in every.values())):
        for kernel, configs in every.items():
            monkeypatch.setattr(kernel, "configs", [configs[i % len(configs)]])
        y = evaluate(few.inputs, None, **few.options, backend="triton")["y"]
        results.append(trained(case, "bf16") | {"few": y})
    problem(case, BF16).check({n: t for n, t in results[0].items() if n != "few"})
    for i, result in enumerate(results):
        assert_equal(result, results[0], f"configuration {i}")


def test_schedules_give_the_same_bits() -> None:
    case = LoraCase(leading=(150,), E=3, dropout=0.3)
    with active(80):
        expected = trained(case, "bf16")
    for schedule in (REVERSE, 5):
        with active(80, schedule=schedule):
            assert_equal(trained(case, "bf16"), expected, schedule)


# --- layouts, rows, adapters ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, ampere: None) -> None:
    """Results depend on values, not on strides, bit for bit."""
    case = LoraCase(leading=(3, 13), K=16, N=16)
    p = problem(case, torch.bfloat16)
    laid_out = {name: LAYOUTS[layout](t) for name, t in p.inputs.items()}
    dy = LAYOUTS[layout](case.dy(p.same["y"]))
    plain = {name: t.contiguous().clone() for name, t in laid_out.items()}
    got = evaluate(laid_out, dy, **p.options, backend="triton")
    assert_equal(got, evaluate(plain, dy.contiguous().clone(), **p.options, backend="triton"), layout)


def test_gradients_of_some_arguments(ampere: None) -> None:
    """As in fine-tuning: the weight frozen, or x alone, or the bias alone."""
    case = LoraCase(dropout=0.3)
    p, whole = problem(case, torch.float32), trained(case, "fp32")
    for wanted in (("x", "lora_a", "lora_b"), ("x",), ("lora_a",), ("lora_b",), ("bias",), ("weight",)):
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in p.inputs.items()}
        y = lora_linear(**leaves, **p.options, backend="triton")
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], case.dy(y))
        for name, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, whole[f"d{name}"]), name


def test_what_is_not_finite_stays_in_its_rows(ampere: None) -> None:
    """Also where rows of several adapters lie in one tile."""
    layouts.test_rows_do_not_leak_into_each_other("bf16", "triton")
    layouts.test_dropped_elements_are_no_factor("triton")
    for rows, name in itertools.product((40, 6), ("lora_a", "lora_b")):
        index = torch.arange(rows) % 3 - 1
        p = problem(LoraCase(leading=(rows,), E=2), torch.bfloat16)
        bad = p.inputs[name].clone()
        bad[1, 2, 1] = float("inf")
        got = evaluate(p.inputs | {name: bad}, p.case.dy, adapter_index=index, backend="triton")
        for of_rows in ("y", "dx"):
            assert torch.equal(got[of_rows].isfinite().all(1), index != 1), of_rows
        assert all(got[n][0].isfinite().all() for n in ("dlora_a", "dlora_b"))


def test_stacked(ampere: None) -> None:
    for dtype, rows in (("bf16", 7), ("fp32", 33)):
        stacked.test_equals_its_projections(dtype, rows, "triton")
    stacked.test_dropout_of_each_projection_is_its_own(90, "triton")
    for used in ((2,), (0, 2)):
        stacked.test_results_that_are_not_used(used, "triton")
    stacked.test_no_projection_at_all("triton")


def test_dora(ampere: None) -> None:
    for size, dropout in itertools.product(dora.SIZES[1:3], (0.0, 0.4)):
        dora.test_definition(size, "fp32", dropout, "triton")


# --- PyTorch ---


def test_compiled_and_raw_operators(ampere: None) -> None:
    """torch.compile without graph breaks, symbolic sizes too, and opcheck."""
    case = LoraCase(dropout=0.3)
    p, expected = problem(case, torch.float32), trained(case, "fp32")
    for dynamic in (False, True):
        compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert_equal(evaluate(p.inputs, case.dy, compiled, backend="triton", **p.options), expected)
    stacked.test_compiles_as_one_graph("triton")
    tensors = [p.inputs[n] for n in ("x", "weight", "lora_a", "lora_b", "bias")] + [None, None, torch.tensor(1234)]
    form = (case.scale, case.dropout)
    torch.library.opcheck(OPERATORS._lora_linear_fwd_triton.default, (*tensors, *form))
    y, s, keep = OPERATORS._lora_linear_fwd_triton(*tensors, *form)
    arguments = (case.dy(y), *tensors, s, keep, *form, [True] * 5)
    torch.library.opcheck(OPERATORS._lora_linear_bwd_triton.default, arguments)


def test_raw_stacked_operators(ampere: None) -> None:
    x, *groups = stacked.problem(6, 8, torch.float32).values()
    x, groups = x.detach(), [[t if t is None else t.detach() for t in group] for group in groups]
    forward = (x, *groups, torch.tensor(3), stacked.SCALES, 0.25)
    torch.library.opcheck(OPERATORS._lora_linear_stacked_fwd_triton.default, forward)
    results = OPERATORS._lora_linear_stacked_fwd_triton(*forward)
    dys = [torch.randn_like(results[0]), None, torch.randn_like(results[6])]
    saved = [t for i, t in enumerate(results) if i % 3]
    backward = (dys, x, *groups, torch.tensor(3), saved, stacked.SCALES, 0.25, [True] * 13)
    torch.library.opcheck(OPERATORS._lora_linear_stacked_bwd_triton.default, backward)


def test_export_has_no_raw_operator(ampere: None) -> None:
    class Layer(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return lora_linear(*tensors, backend="triton")

    inputs = LoraCase(bias=False).inputs(torch.float32)
    program = torch.export.export(Layer(), tuple(inputs.values()))
    assert not any("pykernels" in str(node.target) for node in program.graph.nodes)


def test_double_backward_and_autocast(ampere: None) -> None:
    p = problem(LoraCase(K=16, N=16), torch.float32)
    leaves = {n: t.clone().requires_grad_() for n, t in p.inputs.items()}
    first = torch.autograd.grad(lora_linear(**leaves, backend="triton").square().sum(), leaves["x"], create_graph=True)
    again = torch.autograd.grad(first[0].square().sum(), leaves["lora_b"])[0]
    assert again.isfinite().all() and again.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(p.inputs, p.case.dy, backend="triton", **p.options)
    half = {name: t.bfloat16() for name, t in p.inputs.items()}
    expected = evaluate(half, p.case.dy, backend="triton", **p.options)
    assert got["y"].dtype == torch.bfloat16 and got["dlora_a"].dtype == torch.float32
    assert_equal({name: t.to(torch.bfloat16) for name, t in got.items()}, expected)


def test_errors_name_the_argument(ampere: None) -> None:
    shapes = {"x": (9, 4), "weight": (5, 4), "lora_a": (2, 4), "lora_b": (5, 2)}
    good = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for error, message, changed in [
        (TypeError, "^weight: expected .*like x", {"weight": good["weight"].half()}),
        (ValueError, r"^lora_a: expected \[R, K\] with K = 4 like x", {"lora_a": torch.zeros(2, 5)}),
        (RuntimeError, "^backend: 'triton' cannot .*float64", {n: t.double() for n, t in good.items()}),
    ]:
        with pytest.raises(error, match=message):
            lora_linear(**good | changed, backend="triton")
    several = {"lora_a": torch.zeros(1, 2, 4), "lora_b": torch.zeros(1, 5, 2)}
    with pytest.raises(ValueError, match="^adapter_index: expected values from -1 to E - 1 = 0, got 1"):
        lora_linear_multi(**good | several, adapter_index=torch.ones(9, dtype=torch.int64), backend="triton")
    with pytest.raises(ValueError, match="^projection 1: lora_b: "):
        lora_linear_stacked(good["x"], [good["weight"]] * 2, [good["lora_a"]] * 2,
                            [good["lora_b"], torch.zeros(5, 3)], backend="triton")  # fmt: skip
    tensors = (*good.values(), None, None, None, None)
    with pytest.raises(ValueError, match=r"^dy: expected shape \[9, 5\], got \[9, 4\]"):
        OPERATORS._lora_linear_bwd_triton(good["x"], *tensors, torch.zeros(9, 2), torch.zeros(0), 1.0, 0.0, [True] * 5)
    with pytest.raises(NotImplementedError, match="^lora_linear: torch.vmap"):
        torch.vmap(lambda t: lora_linear(t, *tensors[1:4], backend="triton"))(good["x"].unsqueeze(0))


def test_auto_takes_cuda_first() -> None:
    choose = lambda device, dtype: _backend.choose("lora_linear", "auto", device, dtype)  # noqa: E731
    first = "cuda" if _extension.cuda_reason is None else "triton"
    assert choose("cuda", torch.bfloat16) == first and choose("cuda", torch.float64) == "reference"
    with active(80):
        assert choose("cpu", torch.float32) != "triton"


# --- the interpreter, and installations without an extension ---

INTERPRETED = """
import sys, warnings
if {hidden}:
    sys.modules["pykernels._build"] = None
    warnings.simplefilter("ignore")
import torch
from pykernels import _extension
from tests.lora_linear_cases import LoraCase, check_case
torch.set_num_threads(1)
assert (_extension._C is None) >= {hidden}
for case, dtype in {cases}:
    check_case(case, getattr(torch, dtype), "triton")
print("done")
"""
CASES = [
    (LoraCase(E=3, scales=True), "float32"),
    (LoraCase(dropout=0.4, float_adapters=True, transposed=True), "float16"),
    (LoraCase(leading=(5,), E=2), "float16"),
]


@pytest.mark.parametrize("hidden", [False, True], ids=["extension", "no extension"])
def test_the_interpreter_agrees(hidden: bool, tmp_path: Path) -> None:
    """It takes kernels as Python and NumPy, without Triton's compiler. It has no arithmetic of bfloat16."""
    code = INTERPRETED.format(hidden=hidden, cases=CASES[2:] if hidden else CASES[:2])
    done = python(code, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
