"""lora_linear's CUDA kernels without a GPU: nvcc's PTX, its launchers and the glue to PyTorch, executed on CPU tensors
by tests/ptx_on_cpu. Only csrc/cuda/device.h is another one. Accesses are held to the exact bytes of every tensor."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from pykernels import lora_linear, lora_linear_multi
from tests import ptx_on_cpu
from tests import test_dora_linear as dora
from tests import test_lora_linear_layouts as layouts
from tests import test_lora_linear_stacked as stacked
from tests import test_lora_linear_values as values
from tests.emulated_cuda import SCHEDULES, build_operator, emulating
from tests.helpers import FLOATS, LAYOUTS, assert_equal
from tests.lora_linear_cases import LoraCase, check_case, evaluate, problem

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx_on_cpu.unavailable() is not None, reason=f"{ptx_on_cpu.unavailable()}"),
]
DTYPES = ["fp32", "bf16", "fp16"]


@pytest.fixture(scope="module", params=["80", "90"])
def library(request: pytest.FixtureRequest) -> ptx_on_cpu.Library:
    return build_operator("lora_linear", request.param)


@pytest.fixture(params=SCHEDULES)
def emulated(request: pytest.FixtureRequest, library: ptx_on_cpu.Library) -> Iterator[str]:
    """backend="cpu" calls the emulated CUDA kernels."""
    with ExitStack() as stack:
        for name in ("lora_linear", "lora_linear_stacked"):
            names = {"_fwd": f"_{name}_fwd", "_bwd": f"_{name}_bwd"}
            stack.enter_context(emulating(library, request.param, f"pykernels.{name}", **names))
        yield "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(dtype: str, emulated: str) -> None:
    """A sample of all combinations of options."""
    axes = {
        "bias": (False, True), "E": (0, 3), "scales": (False, True), "dropout": (0.0, 0.4),
        "float_adapters": (False, True), "transposed": (False, True), "R": (1, 3, 8), "K": (9, 40),
    }  # fmt: skip
    forms = [LoraCase(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    legal = [form for form in forms if form.E or not form.scales]
    for case in random.Random(1).sample(legal, 12):
        check_case(case, FLOATS[dtype], emulated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: str, emulated: str) -> None:
    """Odd sizes, rows that are read as they are and that are copied first, ranks beyond a tile, empties."""
    for case in (
        LoraCase(leading=(1,), K=1, N=1, R=1), LoraCase(leading=(33,), K=33, N=65, R=5),
        LoraCase(leading=(65,), K=64, N=40, R=16), LoraCase(leading=(3, 7), K=136, N=72, R=40),
        LoraCase(leading=(20,), K=40, N=33, R=70, dropout=0.2, float_adapters=True), LoraCase(R=0, dropout=0.5),
        LoraCase(()), LoraCase((), E=2), LoraCase(leading=(0,)), LoraCase(leading=(4, 0), E=2), LoraCase(K=0),
        LoraCase(K=0, E=2, scales=True, dropout=0.1), LoraCase(N=0), LoraCase(leading=(20,), R=0, E=2),
        LoraCase(leading=(40,), K=520, N=264, R=5), LoraCase(leading=(20,), K=264, N=33, R=24, float_adapters=True),
    ):  # fmt: skip
        check_case(case, FLOATS[dtype], emulated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(dtype: str, emulated: str) -> None:
    """Up to eight rows read the weight once; one row more takes tiles."""
    for rows, form in itertools.product(
        (1, 3, 8, 9),
        (
            LoraCase(K=61, N=33, R=3),
            LoraCase(K=264, N=24, R=40, float_adapters=True, dropout=0.3),
            LoraCase(K=64, N=17, E=3, scales=True, bias=False),
        ),
    ):
        check_case(replace(form, leading=(rows,)), FLOATS[dtype], emulated)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tiles(dtype: str, transposed: bool, emulated: str) -> None:
    """What a long input uses, on Hopper by warpgroup instructions; rows of several adapters in a tile, and dropout."""
    for case in (
        LoraCase(leading=(300,), K=136, N=136, R=8, dropout=0.2, transposed=transposed),
        LoraCase(leading=(260,), K=144, N=136, R=3, E=3, float_adapters=True, transposed=transposed),
    ):
        check_case(case, FLOATS[dtype], emulated)


def test_low_rank_terms_keep_float32(emulated: str) -> None:
    """float32 adapters of a 16-bit layer: S and the adapters' gradients are as exact as in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        for dropout in (0.0, 0.25):
            case = LoraCase(leading=(70,), K=72, N=88, R=4, float_adapters=True, dropout=dropout)
            p = problem(case, dtype)
            got = evaluate(p.inputs, case.dy, **p.options, backend=emulated)
            for name in ("dlora_a", "dlora_b"):
                error = ((got[name].double() - p.truth[name]).norm() / p.truth[name].norm()).item()
                assert error < 2e-6, (name, dtype, error)
            module = importlib.import_module("pykernels.lora_linear")
            arguments = [p.inputs[n].detach() for n in ("x", "weight", "lora_a", "lora_b", "bias")]
            seed = torch.tensor(1234) if dropout else None
            _, s, keep = module._fwd(*arguments, None, None, seed, case.scale, dropout)
            exact = lora_linear(
                arguments[0].double(), torch.eye(4, 72).double(), arguments[2].double(), torch.eye(4).double(),
                dropout=dropout, training=True, seed=seed, backend="reference",
            ) - arguments[0][:, :4].double()  # fmt: skip
            assert ((s.double() - exact).norm() / exact.norm()).item() < 1e-6 and keep.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, emulated: str) -> None:
    for case in (LoraCase(leading=(3, 13), K=16, N=16), LoraCase(leading=(2, 5), K=31, N=24, E=2)):
        p = problem(case, torch.bfloat16)
        laid_out = {name: LAYOUTS[layout](t) for name, t in p.inputs.items()}
        dy = LAYOUTS[layout](case.dy(p.same["y"]))
        plain = {name: t.contiguous().clone() for name, t in laid_out.items()}
        got = evaluate(laid_out, dy, **p.options, backend=emulated)
        assert_equal(got, evaluate(plain, dy.contiguous().clone(), **p.options, backend=emulated), layout)


def test_gradients_of_some_arguments(emulated: str) -> None:
    """As in fine-tuning: the weight frozen, or x alone, or the bias alone."""
    case = LoraCase(leading=(30,), K=24, N=40, dropout=0.3)
    p = problem(case, torch.float32)
    whole = evaluate(p.inputs, case.dy, **p.options, backend=emulated)
    for wanted in (("x", "lora_a", "lora_b"), ("x",), ("lora_a",), ("lora_b",), ("bias",), ("weight",)):
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in p.inputs.items()}
        y = lora_linear(**leaves, **p.options, backend=emulated)
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], case.dy(y))
        for name, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, whole[f"d{name}"]), name


def test_indices_out_of_range_are_no_adapter(emulated: str) -> None:
    """Nobody waits for the device to look at them."""
    case = LoraCase(leading=(40,), K=24, N=16, E=2)
    p = problem(case, torch.float32)
    index = torch.tensor([0, 1, -1, 1] * 10)
    wrong = torch.tensor([0, 1, 2, 1, 0, 1, -5, 1] * 5)
    for kind in (torch.int32, torch.int64):
        got, expected = (
            evaluate(p.inputs, case.dy, adapter_index=i.to(kind), backend=emulated) for i in (wrong, index)
        )
        assert_equal(got, expected)


def test_what_is_not_finite_stays_in_its_rows(emulated: str) -> None:
    """Also where rows of several adapters lie in one tile, which multiplies those of others by zero."""
    values.test_adapters_that_are_not_used_do_not_leak(emulated)
    layouts.test_rows_do_not_leak_into_each_other("bf16", emulated)
    layouts.test_dropped_elements_are_no_factor(emulated)
    index = torch.arange(40) % 3 - 1
    for dtype, name in itertools.product((torch.float32, torch.bfloat16), ("lora_a", "lora_b")):
        p = problem(LoraCase(leading=(40,), E=2), dtype)
        bad = p.inputs[name].clone()
        bad[1, 2, 1] = float("inf")
        got = evaluate(p.inputs | {name: bad}, p.case.dy, adapter_index=index, backend=emulated)
        for of_rows in ("y", "dx"):
            assert torch.equal(got[of_rows].isfinite().all(1), index != 1), of_rows
        assert all(got[n][0].isfinite().all() for n in ("dlora_a", "dlora_b"))


def test_stacked(emulated: str) -> None:
    for dtype, rows in (("bf16", 7), ("fp32", 33), ("bf16", 65)):
        stacked.test_equals_its_projections(dtype, rows, emulated)
    stacked.test_dropout_of_each_projection_is_its_own(90, emulated)
    for used in ((2,), (0, 2)):
        stacked.test_results_that_are_not_used(used, emulated)


def test_dora(emulated: str) -> None:
    for size, dtype, dropout in itertools.product(dora.SIZES[:4], ("fp32", "bf16"), (0.0, 0.4)):
        dora.test_definition(size, dtype, dropout, emulated)


def test_tf32_where_the_setting_allows_it(emulated: str) -> None:
    """PyTorch's setting for CUDA's matrix products; tf32 keeps ten bits of mantissa."""
    for transposed in (False, True):
        case = LoraCase(leading=(70,), K=40, N=72, R=4, transposed=transposed, dropout=0.2)
        p = problem(case, torch.float32)
        torch.set_float32_matmul_precision("high")
        try:
            got = evaluate(p.inputs, case.dy, **p.options, backend=emulated)
        finally:
            torch.set_float32_matmul_precision("highest")
        errors = {n: ((t.double() - p.truth[n]).norm() / p.truth[n].norm()).item() for n, t in got.items()}
        names = ("y", "dx", "dweight", "dlora_a", "dlora_b")
        assert all(1e-5 < errors[name] < 2**-9 for name in names), errors


def test_errors_name_the_argument(emulated: str) -> None:
    shapes = {"x": (9, 4), "weight": (5, 4), "lora_a": (2, 4), "lora_b": (5, 2)}
    good = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for error, message, changed in [
        (ValueError, "^weight: expected a tensor on cpu like x, got meta", {"weight": good["weight"].to("meta")}),
        (TypeError, "^weight: expected .*like x", {"weight": good["weight"].half()}),
        (ValueError, r"^lora_a: expected \[R, K\] with K = 4 like x", {"lora_a": torch.zeros(2, 5)}),
        (TypeError, "^lora_b: expected .* like lora_a", {"x": good["x"].half(), "weight": good["weight"].half(),
                                                         "lora_a": good["lora_a"].half()}),
        (TypeError, "^x: expected float32, bfloat16 or float16", {n: t.double() for n, t in good.items()}),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            lora_linear(**good | changed, backend=emulated)
    with pytest.raises(ValueError, match="^adapter_index: expected a leading part of x's leading shape"):
        adapters = {"lora_a": torch.zeros(1, 2, 4), "lora_b": torch.zeros(1, 5, 2)}
        lora_linear_multi(**good | adapters, adapter_index=torch.zeros(3, dtype=torch.int64), backend=emulated)


def test_a_launch_that_the_device_refuses(library: ptx_on_cpu.Library, emulated: str) -> None:
    """Tiles that need more shared memory than there is: one error, and the next call is a new one."""
    inputs = LoraCase(leading=(300,), K=136, N=272).inputs(torch.bfloat16)
    with torch.no_grad():
        expected = lora_linear(**inputs, backend=emulated)
        with library.runtime.options(capability=70), pytest.raises(RuntimeError, match="^pykernels: lora_linear_prod"):
            lora_linear(**inputs, backend=emulated)
        assert torch.equal(lora_linear(**inputs, backend=emulated), expected)
