"""The cases of the ChildTuning step: ``python -m bench child_update`` measures all.

The bars are multiples of PyTorch's fused AdamW, which masks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from . import gate, gpu_model, on_cuda
from .child_update_baselines import Problem, Shape, bernoulli_then, original_step, sharing, state_bytes
from .harness import OURS, Bar, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .machine import DTYPES

NAME = "child_update"
FUSED = "AdamW fused"
FOREACH = "AdamW foreach"
USUAL = "bernoulli + AdamW fused"
ORIGINAL = "original, eager"
COMPILED = "original, torch.compile"
DENSE = "ours D, dense moments"
NONE = "ours, unmasked"

TINY = Shape(8, 1)
SHAPES = tuple(Shape(n * 1_000_000, tensors) for n in (10, 100) for tensors in (1, 100, 1000))
QUICK_SHAPES = (Shape(10_000_000, 100), Shape(100_000_000, 100))


def check(dtype: torch.dtype, device: str = "cpu", backend: str | None = None) -> None:
    """The correctness gate: three steps of each mode against the definition, with the same random bits, in fp64.

    backend: that of the device's own kernels if None.
    """
    for mode in ("F", "D", "none"):
        results: list[list[Tensor]] = []
        for name, exact in ((backend or device, False), ("reference", False), ("reference", True)):
            problem = Problem(Shape(70_000, 2), dtype, device)
            if exact:
                grads = [p.grad.double() for p in problem.params]
                problem.params = [p.detach().double().requires_grad_() for p in problem.params]
                for p, grad in zip(problem.params, grads, strict=True):
                    p.grad = grad
            optimizer = problem.ours(mode, backend=name)
            for _ in range(3):
                optimizer.step()
            results.append([p.detach() for p in problem.params])
        for got, same, truth in zip(*results, strict=True):
            failure = gate.judge("p", got, same, truth, 3)
            if failure:
                raise GateFailure(f"mode {mode}: {failure}")


def bars(mode: str, dtype: str, tier: str | None) -> list[Bar]:
    """For moments of the same type: those of torch are bfloat16 where parameters are."""
    if dtype != "fp32":
        return []
    if tier:
        return [Bar(OURS, FUSED, 1.0)] if tier == "avx2" and mode == "D" else []
    return [Bar(OURS, FUSED, 1.05 if mode == "F" else 0.75)]


def run_shape(shape: Shape, session: Session, result: Result) -> None:
    session.tick("checking")
    check(DTYPES[result.dtype])
    session.tick("allocating")
    problem = Problem(shape, DTYPES[result.dtype])
    fused, foreach = problem.torch_adamw(fused=True), problem.torch_adamw(foreach=True)
    ours, unmasked = problem.ours("F"), problem.ours("none")
    sharing([fused, foreach])
    sharing([ours, unmasked])
    moments = [[fused.state[p][name] for p in problem.params] for name in ("exp_avg", "exp_avg_sq")]
    grads = [p.grad for p in problem.params]
    with torch.no_grad():
        eager: Call = partial(original_step, [p.detach() for p in problem.params], grads, *moments)
        compiled = None
        if shape.tensors == 1:  # the graph has as many steps as there are tensors
            compiled = session.compiled(result, "step", original_step, lambda f: partial(f, *eager.args))
        variants: dict[str, Call | None] = {
            OURS: ours.step, NONE: unmasked.step, FUSED: fused.step, FOREACH: foreach.step,
            USUAL: bernoulli_then(fused.step, problem.params), ORIGINAL: eager, COMPILED: compiled,
        }  # fmt: skip
        session.group(result, "F", variants, bars("F", result.dtype, session.options.tier))
        compact = problem.ours("D")
        dense = problem.ours("D", compact=False)
        sharing([unmasked, dense])
        variants = {OURS: compact.step, DENSE: dense.step, FUSED: fused.step}
        session.group(result, "D", variants, bars("D", result.dtype, session.options.tier))
    held, plain = state_bytes(compact), state_bytes(fused)
    result.notes.append(f"optimizer state: D {held:,} bytes, AdamW {plain:,} bytes, {held / plain:.3f}x")


def run_overhead(session: Session, result: Result) -> None:
    check(DTYPES[result.dtype])
    problem = Problem(TINY, DTYPES[result.dtype])
    variants: dict[str, Call | None] = {
        OURS: problem.ours("F").step, FUSED: problem.torch_adamw(fused=True).step,
        FOREACH: problem.torch_adamw(foreach=True).step,
    }  # fmt: skip
    session.group(result, "F", variants, [Bar(OURS, FUSED, 1.0)], share=0.4)


def jobs(options: Options) -> list[Job]:
    found: list[Job] = []
    for dtype in options.dtypes:
        if dtype == "fp16" and not options.complete:
            continue
        for shape in QUICK_SHAPES if options.quick else SHAPES:
            seconds = 2 * options.effort.seconds + 60 * shape.parameters / 1e8
            found.append(Job(NAME, shape.name, dtype, seconds, 0, partial(run_shape, shape)))
        found.append(Job(NAME, "step overhead, 8 elements", dtype, 0.4 * options.effort.seconds, 0, run_overhead))
    return found


def _on_cuda(shape: Shape, dtype: torch.dtype) -> Iterator[on_cuda.Group]:
    """As called: our steps refuse to be captured. In place of flops, the bytes that an AdamW without masks moves."""
    check(dtype, "cuda")
    triton = on_cuda.by_triton(lambda: check(dtype, "cuda", "triton"))
    problem = Problem(shape, dtype, "cuda")
    size, moments = problem.params[0].element_size(), 16 * shape.parameters
    fused, foreach = (problem.torch_adamw(capturable=True, **{name: True}) for name in ("fused", "foreach"))
    ours, unmasked = problem.ours("F"), problem.ours("none")
    sharing([fused, foreach])
    sharing([ours, unmasked])
    usual = bernoulli_then(fused.step, problem.params)
    variants: dict[str, Call | None] = {
        OURS: ours.step, NONE: unmasked.step, FUSED: fused.step, FOREACH: foreach.step, USUAL: usual,
        on_cuda.TRITON: triton(ours.step),
    }  # fmt: skip
    bytes_moved = 3 * size * shape.parameters + moments
    yield on_cuda.Group("F", variants, bytes_moved)
    compact, dense = problem.ours("D"), problem.ours("D", compact=False)
    sharing([unmasked, dense])
    compact.step()
    yield on_cuda.Group("D", {OURS: compact.step, DENSE: dense.step, FUSED: fused.step}, bytes_moved)


UNIT = 2**15  # parameters
EMULATED = gpu_model.Emulated("child_update", {"_adamw_": "_child_adamw_"})


def model_case(units: int, dtype: str, mode: str) -> gpu_model.Case:
    """Of units * UNIT parameters in one tensor, whose mask repeats that of the first, which keeps counts linear.

    Eager is the optimizer of the original.
    """
    mask = Problem(Shape(UNIT, 1), DTYPES[dtype]).masks[0]

    def call(n: int) -> Call:
        problem = Problem(Shape(n * UNIT, 1), DTYPES[dtype])
        problem.masks = [mask.repeat(n)]
        optimizer = problem.ours(mode)
        optimizer.step()  # makes the state
        return optimizer.step

    def eager(n: int) -> Call:
        p, g = (torch.empty(n * UNIT, dtype=DTYPES[dtype], device="meta") for _ in range(2))
        m, v = (torch.empty_like(p) for _ in range(2))
        return partial(original_step, [p], [g], [m], [v])

    def compulsory(n: int) -> int:
        # Parameter, gradient and the parameter's new value; two float32 moments read and written; a mask of bits.
        moments = n * (int(mask.sum()) if mode == "D" else UNIT)
        return 3 * n * UNIT * DTYPES[dtype].itemsize + 4 * 4 * moments + (n * UNIT // 8 if mode == "D" else 0)

    return gpu_model.Case(
        NAME, f"{units * UNIT:,} parameters", dtype, f"step, {mode}", EMULATED, units,
        call=call, check=partial(check, DTYPES[dtype]), eager=eager, compulsory=compulsory, products=lambda n: 0,
        bar=1.15, unit=f"slices of {UNIT:,} parameters",
    )  # fmt: skip


def model_cases(dtypes: Sequence[str], quick: bool) -> list[gpu_model.Case]:
    return [model_case(512, dtype, mode) for dtype in dtypes if dtype != "tf32" for mode in ("F", "D")]


def cuda_cases(dtypes: Sequence[str], quick: bool) -> list[on_cuda.Case]:
    return [
        on_cuda.Case(NAME, shape.name, dtype, partial(_on_cuda, shape, on_cuda.DTYPES[dtype]))
        for dtype in dtypes
        if dtype != "tf32"
        for shape in (QUICK_SHAPES if quick else SHAPES)
    ]


@pytest.mark.parametrize("variant", [OURS, FUSED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda shape: shape.name)
def test_child_update(benchmark, shape: Shape, dtype: str, variant: str) -> None:
    if variant == OURS:
        check(DTYPES[dtype])
    problem = Problem(shape, DTYPES[dtype])
    optimizer = problem.ours("F") if variant == OURS else problem.torch_adamw(fused=True)
    benchmark.group = f"{shape.name} {dtype}"
    benchmark.pedantic(optimizer.step, rounds=5, warmup_rounds=1)
