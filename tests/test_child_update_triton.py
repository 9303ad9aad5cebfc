"""ChildTuning's Triton kernels without a GPU: what Triton compiles for sm_80 and sm_90, executed on CPU tensors by
tests/ptx_on_cpu. The tests are those of the other kernels. A second judge is Triton's interpreter, in a process of its
own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import _backend, child_update
from tests import ptx_on_cpu
from tests import test_child_update_compact as compact
from tests import test_child_update_compile as compiled
from tests import test_child_update_errors as errors
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
from tests.ptx_on_cpu import REVERSE

pytest.importorskip("triton")

from pykernels.triton_kernels import child_update as kernels  # noqa: E402
from tests import triton_cases  # noqa: E402
from tests.ptx_on_cpu.triton_driver import active  # noqa: E402
from tests.triton_cases import python  # noqa: E402

pytestmark = triton_cases.MARKS
SIZES = ((7,), (0, 3), (17,), (8, 64), (3, 171), (5, 820))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that kernels find by the addresses in a table are allowed memory too, and nothing beside them."""
    runtime, told = ptx_on_cpu.runtime(count=False), kernels.Table  # the one of `active`
    memory: dict[str, list[Tensor]] = {"writable": [], "read_only": []}

    def table(slices: Any, *rest: Any) -> kernels.Table:
        tensors = [[t for s in slices for t in group(s) if t is not None] for group in (_changed, _read)]
        memory.update(writable=tensors[0], read_only=tensors[1])
        return told(slices, *rest)

    bounds = runtime.bounds
    monkeypatch.setattr(kernels, "Table", table)
    monkeypatch.setattr(
        runtime, "bounds", lambda *own: bounds(*own, *memory["writable"], read_only=memory["read_only"])
    )


def _changed(s: kernels.Slice) -> tuple[Tensor | None, ...]:
    return (None if s.p is s.g else s.p), s.first, s.second


def _read(s: kernels.Slice) -> tuple[Tensor | None, ...]:
    return s.g, s.mask


@pytest.fixture
def emulated(told: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ "triton", on sm_80; calls of raw operators are Triton's too."""
    operators = torch.ops.pykernels
    for name in ("adamw", "sgd"):
        monkeypatch.setattr(operators, f"_child_{name}_", getattr(operators, f"_child_{name}_triton_"))
    with active(80):
        yield "triton"


# --- what the other kernels are held to ---


def test_on_sm_90(told: None) -> None:
    with active(90):
        values.test_every_form_is_that_of_the_definition("adamw", "bf16", "triton")


def test_without_masks_it_is_adamw(emulated: str) -> None:
    values.test_without_masks_it_is_adamw(emulated, True)


@pytest.mark.parametrize("run", ["none", "D", "F"])
def test_recorded_steps_of_the_original(run: str, emulated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values.test_recorded_steps_of_the_original(run, emulated, monkeypatch)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compact_moments_change_nothing(dtype: str, emulated: str) -> None:
    for kind, options in compact.FORMS:
        compact.test_compact_moments_change_nothing(kind, options, dtype, emulated)


@pytest.mark.parametrize("p", [2**-16, 0.3, 1.0])
def test_the_bits_are_those_of_the_definition(p: float, emulated: str) -> None:
    for seed, stream, done in ((-1, 3, 16), (2**62 + 5, 2**31 - 1, 2**24 - 2)):
        drawn.test_the_bits_are_those_of_the_definition(p, seed, stream, done, emulated)


def test_grad_scale_and_found_inf(emulated: str) -> None:
    state.test_grad_scale_and_found_inf("adamw", emulated)


# --- what is their own ---


def trained(kind: str, dtype: torch.dtype = torch.float32, skip: int = 0, **options: Any) -> list[Tensor]:
    """Parameters after two steps, that many elements behind the beginning of their memory."""
    params = parameters(dtype, SIZES)
    for i, p in enumerate(params):
        memory = torch.zeros(p.numel() + skip, dtype=dtype)
        memory[skip:] = p.detach().reshape(-1)
        params[i] = memory[skip:].view(p.shape).requires_grad_()
    if options.get("mode") == "D":
        options["masks"] = with_masks(params, masks_for(params))
    steps(make(kind, params, backend="triton", **options), params, 0, 2)
    return [p.detach() for p in params]


def test_tensors_that_are_not_aligned(emulated: str) -> None:
    """Contiguous, but not at a multiple of 16 bytes, with the same results."""
    for options in ({"mode": "F", "max_grad_norm": 1.0}, {"mode": "D"}):
        for a, b in zip(trained("adamw", **options), trained("adamw", skip=1, **options), strict=True):
            assert torch.equal(a, b)


def test_schedules_and_runs_give_the_same_bits(told: None) -> None:
    results = []
    for schedule in (0, REVERSE, 5):
        with active(80, schedule=schedule):
            results.append(trained("adamw", mode="D", max_grad_norm=0.5))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_tensors(emulated: str) -> None:
    """Each as if it were alone: chunks and selected elements are counted for each, and some have several chunks."""
    sizes = [(1 + 7 * i % 40,) for i in range(60)] + [(70000,), (0,), (8193,)]
    together, alone = parameters(sizes=sizes), parameters(sizes=sizes)
    masks = masks_for(together)
    for params, backend in ((together, emulated), (alone, "reference")):
        given = with_masks(params, masks)
        steps(make("adamw", params, mode="D", masks=given, max_grad_norm=0.5, backend=backend), params, 0, 2)
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_squares(dtype: torch.dtype, emulated: str) -> None:
    grads = gradients(parameters(dtype, SIZES), 1)
    expected = sum(g.double().square().sum().item() for g in grads)
    got = child_update._triton_square_sum(grads)
    assert got.dtype == torch.float64 and got.shape == ()
    assert got.item() == pytest.approx(expected, rel=1e-12)
    assert child_update._triton_square_sum([g[:0] for g in grads]).item() == 0


def test_moments_that_are_too_few_are_not_overrun(emulated: str) -> None:
    """How many a mask selects is not known before the launch: the kernel stops where the moments end."""
    mask = torch.tensor([255, 15], dtype=torch.uint8)
    first, second = torch.zeros(5), torch.zeros(5)
    errors.raw(params=[torch.ones(12)], grads=[torch.ones(12)], masks=[mask], exp_avgs=[first], exp_avg_sqs=[second])
    assert (first > 0).all() and (second > 0).all()


def test_raw_operator_checks_for_itself(emulated: str) -> None:
    """All arguments that the C++ operator refuses, but that a wrong number of moments is known to the device alone."""
    errors.raw()
    for changed, error, begins in errors.RAW:
        if "masks" in changed and "exp_avgs" in changed:
            continue
        with pytest.raises(error, match=rf"^{begins}(\[0\])?[:, ]"):
            errors.raw(**changed)
    double = torch.ones(9, dtype=torch.float64)
    with pytest.raises(TypeError, match="^params: expected float32, bfloat16 or float16 on Triton, got float64"):
        errors.raw(params=[double], grads=[double])


def test_wrong_arguments_change_nothing(emulated: str) -> None:
    params, done = [torch.ones(9), torch.ones(5)], [torch.tensor(0.0), torch.tensor(0.0)]
    moments = [[torch.zeros(9), torch.zeros(5)], [torch.zeros(9), torch.zeros(4)]]
    with pytest.raises(ValueError, match=r"^exp_avg_sqs\[1\]: expected 5 elements like the parameter, got 4"):
        errors.raw(
            params=params, grads=params, exp_avgs=moments[0], exp_avg_sqs=moments[1], steps=done, masks=[None, None],
            runs=[None, None], streams=[0, 1],
        )  # fmt: skip
    assert all((p == 1).all() for p in params) and all((m == 0).all() for m in moments[0]) and done[0] == 0


@pytest.mark.parametrize(("kind", "options"), compiled.OPTIONS[1:], ids=str)
def test_compiled_steps_are_the_eager_ones(kind: str, options: dict[str, Any], emulated: str) -> None:
    compiled.test_compiled_steps_are_the_eager_ones(kind, options | {"backend": emulated}, None, None)


@pytest.mark.parametrize("operator", ["_child_adamw_triton_", "_child_sgd_triton_", "_child_square_sum_triton"])
def test_opcheck(operator: str, emulated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = operator.replace("_triton", "")
    monkeypatch.setattr(torch.ops.pykernels, name, getattr(torch.ops.pykernels, operator))
    compiled.test_opcheck(name, None)


def test_choice_of_the_backend() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="^backend: 'triton'.* it runs on cuda, and the tensors are on cpu"):
            _backend.choose("child_update", "triton", "cpu", torch.float32)
    with active(80):
        assert _backend.choose("child_update", "triton", "cpu", torch.bfloat16) == "triton"
        assert _backend.choose("child_update", "auto", "cpu", torch.bfloat16) != "triton"
    assert _backend.choose("child_update", "auto", "cuda", torch.float32) in ("cuda", "triton")
    assert _backend.choose("child_update", "auto", "cuda", torch.float64) == "reference"


INTERPRETED = """
import torch
torch.set_num_threads(1)
from tests import test_child_update_random as drawn
from tests.child_update_cases import make, masks_for, parameters, steps, with_masks
for kind, dtype, options in (
    ("adamw", torch.float32, {"mode": "F", "where": "update", "max_grad_norm": 0.5}),
    ("adamw", torch.float32, {"mode": "D", "order": "hf", "decay": "reserved"}),
    ("sgd", torch.float16, {"mode": "D", "weight_decay": 0.1, "nesterov": True}),
):
    results = []
    for backend in ("triton", "reference"):
        params = parameters(dtype, ((7,), (3, 171), (8, 64)))
        given = with_masks(params, masks_for(params)) if options["mode"] == "D" else None
        steps(make(kind, params, masks=given, backend=backend, **options), params, 0, 2)
        results.append(params)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype == torch.float32 else 2e-3, atol=1e-6)
torch.ops.pykernels._child_sgd_ = torch.ops.pykernels._child_sgd_triton_
drawn.test_shards_draw_the_bits_of_the_whole([[5, 3, 11], [100003, 7, 9]], "triton")
print("done")
"""


def test_the_interpreter_agrees(tmp_path: Path) -> None:
    """It takes kernels as Python and NumPy, without Triton's compiler."""
    done = python(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
