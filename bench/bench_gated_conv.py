"""The cases of gated_conv1d: ``python -m bench gated_conv`` measures them all, ``pytest bench`` the plain shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import _extension

from . import first_call, gate, gpu_model, on_cuda
from .gated_conv_baselines import BareGemm, Problem, Shape, eager, eager_masked, eager_step, shifted_matmul
from .harness import OURS, Bar, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .machine import DTYPES

NAME = "gated_conv1d"
LENGTHS = "ours, lengths"
MASK = "ours, mask"
PACKED = "ours, packed rows"
RANDOM = "ours, random lengths"
PREPACKED = "ours, prepacked"
PACKING = "ours, packing alone"
RECOMPUTE = "ours, recompute"
DROPOUT = "ours, gate dropout 0.1"
GEMM = "bare GEMM"
GEMM_T = "bare GEMM, weight [2C, K*C]"

Runner = Callable[[Session, Result], None]
Point = tuple[str, int] | None

HEAD = Shape(128, 256, 128, 128, 3, 1)
MIDDLE = Shape(16, 512, 128, 128, 3, 1)
LATENCY = Shape(1, 512, 128, 128, 3, 2)
VOICE = Shape(1, 600, 192, 192, 5, 1, residual="none", value_act="tanh", cond="one")
SHAPES = (
    *(replace(HEAD, dilation=d) for d in (1, 2, 4, 8, 16)),
    Shape(64, 300, 128, 128, 3, 5),
    MIDDLE,
    Shape(32, 256, 256, 256, 3, 2),
    Shape(64, 128, 512, 512, 3, 4),
    LATENCY,
    Shape(1, 100_000, 64, 64, 3, 8, residual="none", value_act="tanh", cond="all"),
    VOICE,
    Shape(8, 100, 392, 128, 1, 1, residual="none"),
)
QUICK_SHAPES = (replace(HEAD, dilation=4), MIDDLE, LATENCY, VOICE)
STEP = Shape(3200, 1, 24, 24, 2, 64, residual="none", value_act="tanh")
# What fills a large GPU, a wide one, and what is over before one is awake.
CUDA_QUICK_SHAPES = (replace(HEAD, dilation=4), Shape(64, 512, 512, 512, 3, 2), MIDDLE, LATENCY)
QUICK_BATCH = Shape(32, 256, 128, 128, 3, 1)
TINY = Shape(1, 2, 4, 4, 3, 1)
MODEL_QUICK_SHAPES = (replace(HEAD, dilation=4), LATENCY)
MODEL_SHAPES = (*MODEL_QUICK_SHAPES, MIDDLE, Shape(64, 128, 512, 512, 3, 4))
EMULATED = gpu_model.Emulated(
    "gated_conv", {"_fwd": "_gated_conv_fwd", "_bwd": "_gated_conv_bwd", "_pack": "_gated_conv_pack"}
)
VARYING = Shape(4, 256, 128, 128, 3, 2)
SWEEP_LENGTHS = tuple(2**n for n in range(7, 18))
QUICK_SWEEP_LENGTHS = (128, 2048, 32768)


def ours(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, cond: Tensor | None = None, **options) -> Tensor:
    return pykernels.gated_conv1d(x, weight, bias, cond=cond, **shape.form, **options)


def _prepacked(problem: Problem) -> Callable[[], Tensor]:
    s = problem.shape
    module = pykernels.GatedConv1d(s.C_in, s.C_out, s.K, **s.form).to(problem.device, problem.dtype)
    module.load_state_dict({"weight": problem.weight, "bias": problem.bias})
    module.eval().prepack()
    return partial(module, problem.x, cond=problem.cond)


def _packing(problem: Problem) -> Call | None:
    if _extension._C is None:
        return None
    return partial(torch.ops.pykernels._gated_conv_pack, problem.weight, None, "value_gate")


def _training(call: Callable[..., Tensor], problem: Problem) -> Call:
    """Forward and backward for all inputs of the problem."""
    leaves = problem.leaves()
    return lambda: torch.autograd.grad(call(**leaves), list(leaves.values()), problem.dy)


def _reference(problem: Problem, expression: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = problem.leaves(dtype)
    return gate.gradients(partial(expression, **leaves), problem.dy.to(dtype), leaves)


def _require(failure: str | None, what: str) -> None:
    if failure:
        raise GateFailure(f"{what}: {failure}")


def check(problem: Problem, training: bool = True) -> None:
    """The correctness gate of a plain shape: inference, and with ``training`` also both backward variants."""
    s = problem.shape
    with torch.no_grad():
        inference = {OURS: ours(s, **problem.inputs), PREPACKED: _prepacked(problem)()}
    if training:
        exact = _reference(problem, partial(eager, s), torch.float64)
        same = _reference(problem, partial(eager, s), problem.dtype)
        for name, recompute in ((OURS, False), (RECOMPUTE, True)):
            leaves = problem.leaves()
            got = gate.gradients(partial(ours, s, **leaves, recompute=recompute), problem.dy, leaves)
            _require(gate.compare(got, same, exact, s.terms), name)
    else:
        with torch.no_grad():
            exact = {"y": eager(s, **problem.leaves(torch.float64))}
            same = {"y": eager(s, **problem.inputs)}
    for name, y in inference.items():
        _require(gate.compare({"y": y}, same, exact, s.terms), f"{name}, inference")


def _eager_bars(dtype: str, tier: str | None) -> list[Bar]:
    """Where eager PyTorch is the measure: fp16, and the AVX2 tier with torch held to AVX2. Never slower."""
    return [Bar(OURS, "eager", 1.0)] if dtype == "fp16" or tier == "avx2" else []


def forward_limit(shape: Shape, dtype: str) -> float | None:
    """Limit of the forward pass as a multiple of one bare GEMM, None where no bar is set."""
    if dtype == "fp32":
        return 1.0
    if dtype != "bf16":
        return None
    widest = max(shape.C_in, shape.C_out)
    if shape.B == 1 and shape.L <= 512:
        return 0.5
    if widest == 512:
        return 1.1
    return 1.0 if shape.rows >= 2560 and widest <= 256 else None


def forward_bars(shape: Shape, dtype: str, tier: str | None) -> list[Bar]:
    limit = None if tier else forward_limit(shape, dtype)
    return ([Bar(OURS, GEMM, limit)] if limit else []) + _eager_bars(dtype, tier)


def training_bars(dtype: str, tier: str | None) -> list[Bar]:
    limit = None if tier else {"fp32": 1.1, "bf16": 1.2}.get(dtype)
    return ([Bar(OURS, GEMM, limit)] if limit else []) + _eager_bars(dtype, tier)


def forward_variants(problem: Problem) -> dict[str, Call | None]:
    s, inputs = problem.shape, problem.inputs
    gemm = BareGemm(s, problem.dtype, problem.device)
    return {
        OURS: partial(ours, s, **inputs),
        PREPACKED: _prepacked(problem),
        PACKING: _packing(problem),
        "eager": partial(eager, s, **inputs),
        "shifted matmul": partial(shifted_matmul, s, **inputs),
        GEMM: gemm.forward,
        GEMM_T: gemm.forward_transposed,
    }


def training_variants(problem: Problem) -> dict[str, Call | None]:
    s = problem.shape
    return {
        OURS: _training(partial(ours, s), problem),
        RECOMPUTE: _training(partial(ours, s, recompute=True), problem),
        DROPOUT: _training(partial(ours, s, gate_dropout=0.1, training=True), problem),
        "eager": _training(partial(eager, s), problem),
        "shifted matmul": _training(partial(shifted_matmul, s), problem),
        GEMM: BareGemm(s, problem.dtype, problem.device).training,
    }


def run_shape(shape: Shape, session: Session, result: Result) -> None:
    tier, dtype = session.options.tier, result.dtype
    problem = Problem(shape, DTYPES[dtype])
    session.tick("checking")
    check(problem)

    def expression(x: Tensor, weight: Tensor, bias: Tensor, cond: Tensor | None = None) -> Tensor:
        return eager(shape, x, weight, bias, cond)

    with torch.no_grad():
        compiled = session.compiled(result, "forward", expression, lambda f: partial(f, **problem.inputs))
        variants = forward_variants(problem) | {"torch.compile": compiled}
        session.group(result, "forward", variants, forward_bars(shape, dtype, tier), shape.flops)
    compiled = session.compiled(result, "forward + backward", expression, lambda f: _training(f, problem))
    variants = training_variants(problem) | {"torch.compile": compiled}
    session.group(result, "forward + backward", variants, training_bars(dtype, tier), 3 * shape.flops)
    kept = {OURS: partial(ours, shape), RECOMPUTE: partial(ours, shape, recompute=True), "eager": partial(eager, shape)}
    for name, call in kept.items():
        leaves = problem.leaves()
        result.saved_bytes[name] = gate.saved_bytes(partial(call, **leaves), list(leaves.values()))


def run_sweep(shape: Shape, threads: int | None, session: Session, result: Result) -> None:
    """Forward alone, with the few variants a curve needs; threads: of this point, None for those of the run."""
    problem = Problem(shape, DTYPES[result.dtype])
    torch.set_num_threads(threads or session.options.threads)
    try:
        session.tick("checking")
        check(problem, training=False)
        with torch.no_grad():
            variants = forward_variants(problem)
            chosen = {name: variants[name] for name in (OURS, "eager", GEMM)}
            session.group(result, "forward", chosen, flops=shape.flops, share=0.4)
    finally:
        torch.set_num_threads(session.options.threads)


def run_overhead(session: Session, result: Result) -> None:
    problem = Problem(TINY, DTYPES[result.dtype])
    check(problem)
    bars = [Bar(OURS, None, 10e-6), Bar(OURS, "eager", 1.0)]
    with torch.no_grad():
        variants = forward_variants(problem)
        session.group(result, "forward", {n: variants[n] for n in (OURS, PREPACKED, "eager")}, bars, share=0.4)


def run_step(session: Session, result: Result) -> None:
    """As many steps as a state has rows, one after the other: whatever a step leaves to later ones is in the time."""
    problem = Problem(STEP, DTYPES[result.dtype])
    weight, bias = problem.weight, problem.bias
    steps = STEP.dilation * (STEP.K - 1)
    state = torch.randn(STEP.B, steps, STEP.C_in, generator=torch.Generator().manual_seed(22)).to(problem.dtype)
    tensors = (problem.x, state, weight, bias)

    def chain(step: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        current = state

        def run() -> None:
            nonlocal current
            for _ in repeat(None, steps):
                _, current = step(problem.x, current, weight, bias)

        return run

    with torch.no_grad():
        step = partial(pykernels.gated_conv1d_step, **STEP.form)
        names = ("y", "state")
        exact = dict(zip(names, eager_step(STEP, *(t.double() for t in tensors)), strict=True))
        same = dict(zip(names, eager_step(STEP, *tensors), strict=True))
        got = dict(zip(names, step(*tensors), strict=True))
        _require(gate.compare(got, same, exact, STEP.terms | {"state": 1}), "step")
        gemm = BareGemm(STEP, problem.dtype).forward
        variants: dict[str, Call] = {
            OURS: chain(step),
            "eager": chain(partial(eager_step, STEP)),
            GEMM: lambda: [gemm() for _ in repeat(None, steps)],
        }
        bars = _eager_bars(result.dtype, session.options.tier)
        session.group(result, f"{steps} steps", variants, bars, steps * STEP.flops)


def _half_lengths(shape: Shape) -> Tensor:
    """Lengths [B], random, that add up to half of B * L: every length has its complement."""
    half = torch.randint(0, shape.L + 1, (shape.B // 2,), generator=torch.Generator().manual_seed(23))
    return torch.cat([half, shape.L - half])


def run_padded(shape: Shape, session: Session, result: Result) -> None:
    problem = Problem(shape, DTYPES[result.dtype])
    lengths = _half_lengths(shape)
    mask = torch.arange(shape.L) < lengths[:, None]
    packed = Problem(shape, problem.dtype)
    packed.x, packed.dy = problem.x[mask], problem.dy[mask]
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    calls = {
        LENGTHS: (partial(ours, shape, lengths=lengths), problem),
        MASK: (partial(ours, shape, mask=mask), problem),
        PACKED: (partial(ours, shape, cu_seqlens=boundaries), packed),
    }

    session.tick("checking")
    expression = partial(eager_masked, shape, mask[..., None])
    exact = _reference(problem, expression, torch.float64)
    same = _reference(problem, expression, problem.dtype)
    for name, (call, given) in calls.items():
        if name == PACKED:
            exact, same = ({n: t[mask] if n in ("y", "dx") else t for n, t in r.items()} for r in (exact, same))
        leaves = given.leaves()
        got = gate.gradients(partial(call, **leaves), given.dy, leaves)
        _require(gate.compare(got, same, exact, shape.terms), name)

    bars = [Bar(name, OURS, 0.6) for name in (LENGTHS, MASK)]
    full = {OURS: (partial(ours, shape), problem), **calls}
    full |= {"eager": (partial(eager, shape), problem), "eager, masked": (expression, problem)}
    with torch.no_grad():
        forward = {name: partial(call, **given.inputs) for name, (call, given) in full.items()}
        session.group(result, "forward", forward, bars)
    session.group(result, "forward + backward", {n: _training(call, given) for n, (call, given) in full.items()}, bars)


def run_varying(session: Session, result: Result) -> None:
    """The same number of rows in calls of one length and in calls of random lengths."""
    calls = 16
    spread = torch.randint(64, 2 * VARYING.L - 63, (calls // 2,), generator=torch.Generator().manual_seed(24)).tolist()
    problem = Problem(VARYING, DTYPES[result.dtype])
    weight, bias = problem.weight, problem.bias
    generator = torch.Generator().manual_seed(25)

    def batches(lengths: list[int]) -> list[Tensor]:
        sizes = [(VARYING.B, length, VARYING.C_in) for length in lengths]
        return [torch.randn(*size, generator=generator).to(problem.dtype) for size in sizes]

    varying, fixed = batches(spread + [2 * VARYING.L - n for n in spread]), batches([VARYING.L] * calls)

    def loop(call: Callable[..., Tensor], xs: list[Tensor]) -> Call:
        return lambda: [call(x, weight, bias) for x in xs]

    with torch.no_grad():
        for x in varying:
            shape = Shape(VARYING.B, x.shape[1], VARYING.C_in, VARYING.C_out, VARYING.K, VARYING.dilation)
            exact, same = eager(shape, x.double(), weight.double(), bias.double()), eager(shape, x, weight, bias)
            _require(gate.judge("y", ours(shape, x, weight, bias), same, exact, shape.terms["y"]), f"L {shape.L}")
        variants = {
            OURS: loop(partial(ours, VARYING), fixed),
            RANDOM: loop(partial(ours, VARYING), varying),
            "eager": loop(partial(eager, VARYING), fixed),
            "eager, random lengths": loop(partial(eager, VARYING), varying),
        }
        bars = [Bar(RANDOM, OURS, 1.2)]
        session.group(result, f"{calls} calls", variants, bars, calls * VARYING.flops)


def first_call_target(who: str, dtype: str) -> Call:
    """What a fresh process calls first; used by first_call.py."""
    problem = Problem(LATENCY, DTYPES[dtype])
    return partial(ours if who == OURS else eager, LATENCY, **problem.inputs)


def run_first_call(session: Session, result: Result) -> None:
    check(Problem(LATENCY, DTYPES[result.dtype]))
    for who in (OURS, "eager"):
        session.tick(f"a fresh process for {who}")
        result.stages[who] = first_call.measure("gated_conv", who, result.dtype, session.options.threads)


def _on_cuda(shape: Shape, dtype: torch.dtype) -> Iterator[on_cuda.Group]:
    problem = Problem(shape, dtype, "cuda")
    check(problem)
    triton = on_cuda.by_triton(lambda: check(problem))
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        wanted = (OURS, "eager", "shifted matmul", GEMM)
    else:
        wanted = (OURS, PREPACKED, "eager", "shifted matmul", GEMM, GEMM_T)
    expression = partial(eager, shape)
    with torch.no_grad():
        variants = {name: call for name, call in forward_variants(problem).items() if name in wanted}
        variants["torch.compile"] = on_cuda.compiled(expression, lambda f: partial(f, **problem.inputs))
        variants[on_cuda.TRITON] = triton(partial(ours, shape, **problem.inputs))
        yield on_cuda.Group("forward", variants, shape.flops)
    variants = {name: call for name, call in training_variants(problem).items() if name != DROPOUT}
    variants["torch.compile"] = on_cuda.compiled(expression, lambda f: _training(f, problem))
    variants[on_cuda.TRITON] = triton(_training(partial(ours, shape), problem))
    yield on_cuda.Group("forward + backward", variants, 3 * shape.flops)
    if shape in QUICK_SHAPES and shape.B > 1:
        yield on_cuda.Group("forward, half of it padding", _padded_on_cuda(problem), shape.flops)


def _padded_on_cuda(problem: Problem) -> dict[str, Call]:
    shape, lengths = problem.shape, _half_lengths(problem.shape).cuda()
    call = partial(ours, shape, **problem.inputs)

    def without_gradients(**options: Tensor) -> Call:
        return torch.no_grad()(partial(call, **options))

    mask = torch.arange(shape.L, device="cuda") < lengths[:, None]
    return {OURS: without_gradients(), LENGTHS: without_gradients(lengths=lengths), MASK: without_gradients(mask=mask)}


def cuda_cases(dtypes: Sequence[str], quick: bool) -> list[on_cuda.Case]:
    shapes = CUDA_QUICK_SHAPES if quick else (*CUDA_QUICK_SHAPES, *SHAPES)
    return [
        on_cuda.Case(NAME, shape.name, dtype, partial(_on_cuda, shape, on_cuda.DTYPES[dtype]))
        for dtype in dtypes
        for shape in dict.fromkeys(shapes)
    ]


def _check_emulated(dtype: str) -> None:
    problem = Problem(Shape(2, 20, 16, 16, 3, 2), on_cuda.DTYPES[dtype])
    s = problem.shape
    if dtype != "tf32":
        return check(problem)
    # PyTorch has no tf32 on the CPU: its bfloat16, which has fewer bits, is what it must not be worse than.
    exact, coarse = (_reference(problem, partial(eager, s), d) for d in (torch.float64, torch.bfloat16))
    leaves = problem.leaves()
    got = gate.gradients(partial(ours, s, **leaves), problem.dy, leaves)
    _require(gate.compare(got, {n: t.float() for n, t in coarse.items()}, exact, s.terms), OURS)


def model_case(shape: Shape, dtype: str, training: bool) -> gpu_model.Case:
    """Of B sequences; training is counted for 2, as partial sums of the weight's gradient are not linear in them."""

    def problem(n: int, device: str = "cpu") -> Problem:
        return Problem(replace(shape, B=n), on_cuda.DTYPES[dtype], device)

    def bind(call: Callable[..., Tensor], p: Problem) -> Call:
        return _training(partial(call, p.shape), p) if training else torch.no_grad()(partial(call, p.shape, **p.inputs))

    def compulsory(n: int) -> int:
        p = problem(n, "meta")
        inputs, y = sum(t.nbytes for t in p.inputs.values()), p.dy.nbytes
        # Backward reads dy, the value and gate that forward kept, x and the weight, and writes as much as the inputs.
        return inputs + (6 * y + p.x.nbytes + p.weight.nbytes + inputs if training else y)

    return gpu_model.Case(
        NAME, shape.name, dtype, "forward + backward" if training else "forward", EMULATED, shape.B,
        call=lambda n: bind(ours, problem(n)), check=partial(_check_emulated, dtype),
        eager=lambda n: bind(eager, problem(n, "meta")), compulsory=compulsory,
        products=lambda n: replace(shape, B=n).flops * (3 if training else 1),
        counted=(min(2, shape.B),) if training or shape.B < 3 else gpu_model.COUNTED,
        bar=None if training or shape.B == 1 else 1.5,
    )  # fmt: skip


def model_cases(dtypes: Sequence[str], quick: bool) -> list[gpu_model.Case]:
    return [
        model_case(shape, dtype, training)
        for dtype in dtypes
        for shape in (MODEL_QUICK_SHAPES if quick else MODEL_SHAPES)
        for training in (False, True)
        if not (training and shape.C_in == 512)  # minutes
    ]


def jobs(options: Options) -> list[Job]:
    found: list[Job] = []
    seconds = options.effort.seconds

    def add(
        case: str, dtype: str, groups: float, flops: float, run: Runner, sweep: tuple[str, int] | None = None
    ) -> None:
        found.append(Job(NAME, case, dtype, groups * seconds, flops, run, sweep))

    for dtype in options.dtypes:
        brief = options.quick and dtype == "fp16" and not options.complete
        shapes = (LATENCY,) if brief else QUICK_SHAPES if options.quick else SHAPES
        for shape in shapes:
            add(shape.name, dtype, 3, 60 * shape.flops, partial(run_shape, shape))
        if brief:
            continue
        batch = QUICK_BATCH if options.quick else HEAD
        add(f"{STEP.name} step", dtype, 1, 0, run_step)
        add(f"{batch.name}, half of it padding", dtype, 2, 30 * batch.flops, partial(run_padded, batch))
        add(f"{VARYING.name}, random lengths", dtype, 1, 0, run_varying)
        add("call overhead, 8 elements", dtype, 0.4, 0, run_overhead)
        for length in QUICK_SWEEP_LENGTHS if options.quick else SWEEP_LENGTHS:
            shape, point = replace(LATENCY, L=length), ("L", length)
            add(f"sweep over L: {shape.name}", dtype, 0.4, 10 * shape.flops, partial(run_sweep, shape, None), point)
        for threads in sorted({*(2**n for n in range(10) if 2**n < options.threads), options.threads}):
            run, point = partial(run_sweep, MIDDLE, threads), ("threads", threads)
            add(f"sweep over threads: {MIDDLE.name}, {threads}", dtype, 0.4, 10 * MIDDLE.flops, run, point)
    if "fp32" in options.dtypes:
        add(f"{LATENCY.name}, first call of a process", "fp32", 6, 0, run_first_call)
    return found


@pytest.mark.parametrize("variant", [OURS, "eager", GEMM])
@pytest.mark.parametrize("title", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_gated_conv(benchmark, shape: Shape, dtype: str, title: str, variant: str) -> None:
    problem = Problem(shape, DTYPES[dtype])
    training = title != "forward"
    if variant == OURS:
        check(problem, training)
    benchmark.group = f"{shape.name} {dtype} {title}"
    with torch.set_grad_enabled(training):
        call = (training_variants if training else forward_variants)(problem)[variant]
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
