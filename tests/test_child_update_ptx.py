"""ChildTuning's CUDA kernels without a GPU: nvcc's PTX, its launchers and the glue to PyTorch, executed on CPU tensors
by tests/ptx_on_cpu. The tests are those of the CPU kernels; accesses are held to the exact bytes of every tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pykernels import child_update
from tests import ptx_on_cpu
from tests import test_child_update_compact as compact
from tests import test_child_update_random as drawn
from tests import test_child_update_state as state
from tests import test_child_update_values as values
from tests.child_update_cases import gradients, make, masks_for, parameters, steps, with_masks
from tests.child_update_kernels import (  # noqa: F401
    DTYPES,
    test_any_strides,
    test_clipping_is_that_of_torch,
    test_every_form_is_that_of_the_definition,
    test_masks,
    test_norms_that_are_not_finite,
    test_shards_draw_the_bits_of_the_whole,
    test_stochastic_rounding,
)
from tests.emulated_cuda import SCHEDULES, build_operator, emulating

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx_on_cpu.unavailable() is not None, reason=f"{ptx_on_cpu.unavailable()}"),
]


@pytest.fixture(scope="module")
def library() -> ptx_on_cpu.Library:
    """No instruction differs between capabilities: one stands for all."""
    return build_operator("child_update", "80")


@pytest.fixture(params=SCHEDULES)
def emulated(
    request: pytest.FixtureRequest, library: ptx_on_cpu.Library, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """backend="cpu" calls the emulated CUDA kernels, and so do tests that call raw operators."""
    names = {name: f"_child{name}" for name in ("_adamw_", "_sgd_", "_square_sum")}
    monkeypatch.setattr(torch.ops, "pykernels", getattr(torch.ops, library.namespace))
    with emulating(library, request.param, "pykernels.child_update", **names) as backend:
        yield backend


# --- what the CPU kernels are held to ---


def test_without_masks_it_is_adamw(emulated: str) -> None:
    values.test_without_masks_it_is_adamw(emulated, False)


def test_sgd_is_that_of_torch_on_the_masked_gradient(emulated: str) -> None:
    for options in values.SGD:
        values.test_sgd_is_that_of_torch_on_the_masked_gradient(emulated, options)


@pytest.mark.parametrize("run", ["none", "D", "F", "F_wd0_eps8", "D_nobias"])
def test_recorded_steps_of_the_original(run: str, emulated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).clone())  # memory that is known
    values.test_recorded_steps_of_the_original(run, emulated, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_moments_change_nothing(dtype: str, emulated: str) -> None:
    for kind, options in compact.FORMS:
        compact.test_compact_moments_change_nothing(kind, options, dtype, emulated)


@pytest.mark.parametrize("p", [2**-16, 0.3, 1.0])
def test_the_bits_are_those_of_the_definition(p: float, emulated: str) -> None:
    drawn.test_the_bits_are_those_of_the_definition(p, 2**62 + 5, 2**31 - 1, 2**24 - 2, emulated)


def test_grad_scale_and_found_inf(emulated: str) -> None:
    for kind in ("adamw", "sgd"):
        state.test_grad_scale_and_found_inf(kind, emulated)


# --- what is their own ---


def raw(**changed: Any) -> None:
    arguments: dict[str, Any] = {
        "params": [torch.ones(40)], "grads": [torch.ones(40)], "exp_avgs": [torch.zeros(40)],
        "exp_avg_sqs": [torch.zeros(40)], "steps": [torch.tensor(0.0)], "masks": [None], "runs": [None], "streams": [0],
        "grad_scale": None, "found_inf": None, "square_sum": None, "lr": torch.tensor(0.1),
        "weight_decay": torch.tensor(0.0), "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "reserve_p": None,
        "max_grad_norm": 0.0, "seed": 0, "where": "grad", "decay": "all", "order": "torch", "correct_bias": True,
        "maximize": False, "stochastic_rounding": False,
    }  # fmt: skip
    child_update._adamw_(**{**arguments, **changed})


def test_more_tensors_than_a_launch_has_room_for(library: ptx_on_cpu.Library, emulated: str) -> None:
    """Each as if it were alone: chunks, selected elements and sums of squares are counted through all launches."""
    sizes = [(1 + 7 * i % 40,) for i in range(300)] + [(70000,), (0,)]
    together, alone = parameters(sizes=sizes), parameters(sizes=sizes)
    masks = masks_for(together)
    optimizers = [
        make("adamw", params, mode="D", masks=with_masks(params, masks), max_grad_norm=0.5, backend=backend)
        for params, backend in ((together, emulated), (alone, "reference"))
    ]
    for optimizer, params in zip(optimizers, (together, alone), strict=True):
        steps(optimizer, params, 0, 2)
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_tensors_that_are_not_aligned(emulated: str) -> None:
    """Contiguous, but not at a multiple of 16 bytes: elements are accessed one by one, with the same results."""
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16, torch.float16), ("F", "D")):
        results = []
        for skip in (0, 1):
            params, memory = parameters(dtype), []
            for i, p in enumerate(params):
                memory.append(torch.zeros(p.numel() + skip, dtype=dtype))
                memory[i][skip:] = p.detach().reshape(-1)
                params[i] = memory[i][skip:].view(p.shape).requires_grad_()
            masks = with_masks(params, masks_for(params)) if mode == "D" else None
            steps(make("adamw", params, mode=mode, masks=masks, max_grad_norm=1.0, backend=emulated), params, 0, 2)
            results.append([p.detach() for p in params])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_sums_of_squares(emulated: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grads = gradients(parameters(dtype), 1)
        expected = sum(g.double().square().sum().item() for g in grads)
        got = child_update._square_sum(grads)
        assert got.dtype == torch.float64 and got.shape == ()
        assert got.item() == pytest.approx(expected, rel=1e-12)
        assert child_update._square_sum(grads).item() == got.item()


def test_moments_that_are_too_few_are_not_overrun(emulated: str) -> None:
    """How many a mask selects is not known before the launch: the kernel stops where the moments end."""
    mask = torch.full((5,), 255, dtype=torch.uint8)
    mask[4] = 15
    first, second = torch.zeros(20), torch.zeros(20)
    raw(exp_avgs=[first], exp_avg_sqs=[second], masks=[mask])
    assert (first > 0).all() and (second > 0).all()


def test_errors_name_the_argument(emulated: str) -> None:
    with pytest.raises(TypeError, match="^params: expected float32, bfloat16 or float16 on CUDA"):
        child_update._square_sum([torch.ones(3, dtype=torch.float64)])
    for error, message, changed in [
        (ValueError, r"^grads\[0\]: expected shape \[40\]", {"grads": [torch.ones(39)]}),
        (TypeError, r"^exp_avgs\[0\]: expected Float", {"exp_avgs": [torch.zeros(40).half()]}),
        (ValueError, r"^exp_avgs\[0\]: expected 40 elements like .*, got 7", {"exp_avgs": [torch.zeros(7)]}),
        (ValueError, r"^exp_avg_sqs\[0\]: expected 40 elements", {"exp_avg_sqs": [torch.zeros(41)]}),
        (TypeError, r"^masks\[0\]: expected uint8", {"masks": [torch.ones(5)]}),
    ]:
        p = torch.ones(40)
        with pytest.raises(error, match=message):
            raw(params=[p], **changed)
        assert (p == 1).all()
