"""The cases of attention_pool: ``python -m bench attention_pool`` measures all, ``pytest bench`` the plain shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import pykernels

from . import gate, gpu_model, on_cuda
from .attention_pool_baselines import BareGemm, Problem, Shape, eager_bmm, eager_sum
from .harness import OURS, Bar, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .machine import DTYPES

NAME = "attention_pool"
BMM = "eager, bmm"
KEPT = "ours, recompute=False"
GEMM = "bare GEMM"
LENGTHS = "ours, lengths"
MASK = "ours, mask"
PACKED = "ours, packed rows"

Runner = Callable[[Session, Result], None]
Point = tuple[str, int] | None

MIDDLE = Shape(16, 512, 128, 128)
WIDE = Shape(64, 128, 768, 768)
BAG = Shape(1, 100_000, 512, 128)
LATENCY = Shape(1, 512, 128, 128)
RAGGED = Shape(128, 256, 256, 256)
SHAPES = (
    Shape(128, 30, 128, 128),
    RAGGED,
    MIDDLE,
    WIDE,
    Shape(256, 32, 384, 384),
    LATENCY,
    BAG,
    replace(BAG, gated=True),
)
QUICK_SHAPES = (MIDDLE, WIDE, LATENCY)
CUDA_QUICK_SHAPES = (MIDDLE, WIDE, BAG)
TINY = Shape(1, 2, 4, 4)
EMULATED = gpu_model.Emulated("attention_pool", {"_fwd": "_attention_pool_fwd", "_bwd": "_attention_pool_bwd"})
FILLS = (30, 50, 60, 100)
QUICK_FILLS = (50,)
SWEEP_LENGTHS = tuple(2**n for n in range(7, 18))
QUICK_SWEEP_LENGTHS = (128, 2048, 32768)
# How many times as fast as the better eager form ours should be: forward, and forward + backward, where ours is the
# choice that keeps as much as eager.
SPEEDUPS = {
    (MIDDLE, "fp32"): (1.5, 1.5),
    (MIDDLE, "bf16"): (4.0, 3.0),
    (WIDE, "fp32"): (1.2, 1.2),
    (WIDE, "bf16"): (3.0, 2.0),
}


def ours(x: Tensor, weight: Tensor, query: Tensor, gate_weight: Tensor | None = None, **options) -> Tensor:
    return pykernels.attention_pool(x, weight, query, gate_weight=gate_weight, **options)


def _training(call: Callable[..., Tensor], problem: Problem) -> Call:
    """Forward and backward for all inputs of the problem."""
    leaves = problem.leaves()
    return lambda: torch.autograd.grad(call(**leaves), list(leaves.values()), problem.dy)


def _results(call: Callable[..., Tensor], problem: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    leaves = problem.leaves(dtype)
    return gate.gradients(partial(call, **leaves), problem.dy.to(dtype or problem.dtype), leaves)


def _require(failure: str | None, what: str) -> None:
    if failure:
        raise GateFailure(f"{what}: {failure}")


def check(problem: Problem, training: bool = True) -> None:
    """The correctness gate of a plain shape: inference, and with ``training`` also the gradients."""
    terms = problem.shape.terms
    with torch.no_grad():
        inference = {"y": ours(**problem.inputs)}
    if training:
        exact, same = _results(eager_sum, problem, torch.float64), _results(eager_bmm, problem)
        for name, call in ((OURS, ours), (KEPT, partial(ours, recompute=False))):
            _require(gate.compare(_results(call, problem), same, exact, terms), name)
    else:
        with torch.no_grad():
            exact = {"y": eager_sum(**problem.leaves(torch.float64))}
            same = {"y": eager_bmm(**problem.inputs)}
    _require(gate.compare(inference, same, exact, terms), f"{OURS}, inference")


def bars(shape: Shape, dtype: str, tier: str | None, training: bool) -> list[Bar]:
    """Against both eager forms, and so against the better one. Elsewhere eager is only not to be faster."""
    wanted = None if tier else SPEEDUPS.get((shape, dtype))
    if wanted:
        return [Bar(KEPT if training else OURS, name, 1 / wanted[training]) for name in ("eager", BMM)]
    return [Bar(OURS, name, 1.0) for name in ("eager", BMM)] if dtype == "fp16" or tier == "avx2" else []


def forward_variants(problem: Problem) -> dict[str, Call]:
    calls = {OURS: ours, "eager": eager_sum, BMM: eager_bmm}
    variants: dict[str, Call] = {name: partial(call, **problem.inputs) for name, call in calls.items()}
    return variants | {GEMM: BareGemm(problem.shape, problem.dtype, problem.device).forward}


def training_variants(problem: Problem) -> dict[str, Call]:
    calls = {OURS: ours, KEPT: partial(ours, recompute=False), "eager": eager_sum, BMM: eager_bmm}
    variants = {name: _training(call, problem) for name, call in calls.items()}
    return variants | {GEMM: BareGemm(problem.shape, problem.dtype, problem.device).training}


def run_shape(shape: Shape, session: Session, result: Result) -> None:
    tier, dtype = session.options.tier, result.dtype
    problem = Problem(shape, DTYPES[dtype])
    session.tick("checking")
    check(problem)
    with torch.no_grad():
        compiled = session.compiled(result, "forward", eager_sum, lambda f: partial(f, **problem.inputs))
        variants = forward_variants(problem) | {"torch.compile": compiled}
        session.group(result, "forward", variants, bars(shape, dtype, tier, False), shape.flops)
    compiled = session.compiled(result, "forward + backward", eager_sum, lambda f: _training(f, problem))
    variants = training_variants(problem) | {"torch.compile": compiled}
    session.group(result, "forward + backward", variants, bars(shape, dtype, tier, True), 3 * shape.flops)
    for name, call in ((OURS, ours), (KEPT, partial(ours, recompute=False)), ("eager", eager_sum), (BMM, eager_bmm)):
        leaves = problem.leaves()
        result.saved_bytes[name] = gate.saved_bytes(partial(call, **leaves), list(leaves.values()))


def _lengths(shape: Shape, fill: int) -> Tensor:
    """Lengths [B], at least 1, that add up to that percentage of B * L: random ones, moved towards a common length."""
    wanted = shape.rows * fill // 100
    lengths = torch.randint(1, shape.L + 1, (shape.B,), generator=torch.Generator().manual_seed(32))
    while (missing := wanted - int(lengths.sum())) != 0:
        step = max(1, abs(missing) // shape.B) * (1 if missing > 0 else -1)
        for b in range(shape.B):
            moved = min(shape.L, max(1, int(lengths[b]) + step))
            if abs(wanted - int(lengths.sum()) - moved + int(lengths[b])) < abs(wanted - int(lengths.sum())):
                lengths[b] = moved
    return lengths


def run_ragged(shape: Shape, fill: int, session: Session, result: Result) -> None:
    """The same tensor with that percentage of its rows alive, told by lengths, by a mask, and as packed rows."""
    problem, packed = Problem(shape, DTYPES[result.dtype]), Problem(shape, DTYPES[result.dtype])
    lengths = _lengths(shape, fill)
    mask = torch.arange(shape.L) < lengths[:, None]
    packed.inputs["x"] = problem.inputs["x"][mask]
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    calls = {
        LENGTHS: (partial(ours, lengths=lengths), problem),
        MASK: (partial(ours, mask=mask), problem),
        PACKED: (partial(ours, cu_seqlens=boundaries), packed),
    }

    session.tick("checking")
    exact, same = (_results(partial(call, mask=mask), problem, dtype) for call, dtype in (
        (eager_sum, torch.float64), (eager_bmm, None)
    ))  # fmt: skip
    for name, (call, given) in calls.items():
        if name == PACKED:
            exact, same = ({n: t[mask] if n == "dx" else t for n, t in r.items()} for r in (exact, same))
        _require(gate.compare(_results(call, given), same, exact, shape.terms), name)

    limits = [Bar(name, OURS, 0.6) for name in (LENGTHS, MASK)] if fill == 50 else []
    full = {OURS: (ours, problem), **calls}
    full |= {"eager": (partial(eager_sum, mask=mask), problem), BMM: (partial(eager_bmm, mask=mask), problem)}
    with torch.no_grad():
        forward = {name: partial(call, **given.inputs) for name, (call, given) in full.items()}
        session.group(result, "forward", forward, limits)
    session.group(
        result, "forward + backward", {n: _training(call, given) for n, (call, given) in full.items()}, limits
    )


def run_sweep(shape: Shape, threads: int | None, session: Session, result: Result) -> None:
    """Forward alone, with the few variants a curve needs; threads: of this point, None for those of the run."""
    problem = Problem(shape, DTYPES[result.dtype])
    torch.set_num_threads(threads or session.options.threads)
    try:
        session.tick("checking")
        check(problem, training=False)
        with torch.no_grad():
            session.group(result, "forward", forward_variants(problem), flops=shape.flops, share=0.4)
    finally:
        torch.set_num_threads(session.options.threads)


def run_overhead(session: Session, result: Result) -> None:
    problem = Problem(TINY, DTYPES[result.dtype])
    check(problem)
    limits = [Bar(OURS, None, 10e-6), Bar(OURS, "eager", 1.0)]
    with torch.no_grad():
        variants = forward_variants(problem)
        session.group(result, "forward", {n: variants[n] for n in (OURS, "eager", BMM)}, limits, share=0.4)


def _on_cuda(shape: Shape, dtype: torch.dtype) -> Iterator[on_cuda.Group]:
    problem = Problem(shape, dtype, "cuda")
    check(problem)
    triton = on_cuda.by_triton(lambda: check(problem))
    with torch.no_grad():
        variants: dict[str, Call | None] = dict(forward_variants(problem))
        variants["torch.compile"] = on_cuda.compiled(eager_sum, lambda f: partial(f, **problem.inputs))
        variants[on_cuda.TRITON] = triton(partial(ours, **problem.inputs))
        yield on_cuda.Group("forward", variants, shape.flops)
    variants = dict(training_variants(problem))
    variants["torch.compile"] = on_cuda.compiled(eager_sum, lambda f: _training(f, problem))
    variants[on_cuda.TRITON] = triton(_training(ours, problem))
    yield on_cuda.Group("forward + backward", variants, 3 * shape.flops)
    if shape == RAGGED:
        lengths = _lengths(shape, 50).cuda()
        mask = torch.arange(shape.L, device="cuda") < lengths[:, None]
        calls = {OURS: ours, LENGTHS: partial(ours, lengths=lengths), MASK: partial(ours, mask=mask)}
        forward = {name: torch.no_grad()(partial(call, **problem.inputs)) for name, call in calls.items()}
        yield on_cuda.Group("forward, half of it padding", forward, shape.flops)


def cuda_cases(dtypes: Sequence[str], quick: bool) -> list[on_cuda.Case]:
    shapes = CUDA_QUICK_SHAPES if quick else SHAPES
    return [
        on_cuda.Case(NAME, shape.name, dtype, partial(_on_cuda, shape, on_cuda.DTYPES[dtype]))
        for dtype in dtypes
        for shape in shapes
    ]


def _check_emulated(dtype: str) -> None:
    if dtype != "tf32":  # which PyTorch has not on the CPU
        check(Problem(Shape(2, 20, 16, 16), on_cuda.DTYPES[dtype]))


def model_case(shape: Shape, dtype: str) -> gpu_model.Case:
    """Of B sequences."""

    def problem(n: int, device: str = "cpu") -> Problem:
        return Problem(replace(shape, B=n), on_cuda.DTYPES[dtype], device)

    def bind(call: Callable[..., Tensor], p: Problem) -> Call:
        return torch.no_grad()(partial(call, **p.inputs))

    def compulsory(n: int) -> int:
        p = problem(n, "meta")
        return sum(t.nbytes for t in p.inputs.values()) + p.dy.nbytes

    return gpu_model.Case(
        NAME, shape.name, dtype, "forward", EMULATED, shape.B,
        call=lambda n: bind(ours, problem(n)), check=partial(_check_emulated, dtype),
        eager=lambda n: bind(eager_sum, problem(n, "meta")), compulsory=compulsory,
        products=lambda n: replace(shape, B=n).flops, bar=1.15,
    )  # fmt: skip


def model_cases(dtypes: Sequence[str], quick: bool) -> list[gpu_model.Case]:
    return [model_case(shape, dtype) for dtype in dtypes for shape in ((MIDDLE,) if quick else (MIDDLE, WIDE))]


def jobs(options: Options) -> list[Job]:
    found: list[Job] = []
    seconds = options.effort.seconds

    def add(case: str, dtype: str, groups: float, flops: float, run: Runner, sweep: Point = None) -> None:
        found.append(Job(NAME, case, dtype, groups * seconds, flops, run, sweep))

    for dtype in options.dtypes:
        brief = options.quick and dtype == "fp16" and not options.complete
        shapes = (LATENCY,) if brief else QUICK_SHAPES if options.quick else SHAPES
        for shape in shapes:
            add(shape.name, dtype, 3, 60 * shape.flops, partial(run_shape, shape))
        if brief:
            continue
        for fill in QUICK_FILLS if options.quick else FILLS:
            add(f"{RAGGED.name}, {fill} % of it rows", dtype, 2, 30 * RAGGED.flops, partial(run_ragged, RAGGED, fill))
        add("call overhead, 8 elements", dtype, 0.4, 0, run_overhead)
        for length in QUICK_SWEEP_LENGTHS if options.quick else SWEEP_LENGTHS:
            shape, point = replace(BAG, L=length), ("L", length)
            add(f"sweep over L: {shape.name}", dtype, 0.4, 10 * shape.flops, partial(run_sweep, shape, None), point)
        for threads in sorted({*(2**n for n in range(10) if 2**n < options.threads), options.threads}):
            run, point = partial(run_sweep, MIDDLE, threads), ("threads", threads)
            add(f"sweep over threads: {MIDDLE.name}, {threads}", dtype, 0.4, 10 * MIDDLE.flops, run, point)
    return found


@pytest.mark.parametrize("variant", [OURS, "eager", BMM, GEMM])
@pytest.mark.parametrize("title", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_attention_pool(benchmark, shape: Shape, dtype: str, title: str, variant: str) -> None:
    problem = Problem(shape, DTYPES[dtype])
    training = title != "forward"
    if variant == OURS:
        check(problem, training)
    benchmark.group = f"{shape.name} {dtype} {title}"
    with torch.set_grad_enabled(training):
        call = (training_variants if training else forward_variants)(problem)[variant]
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
