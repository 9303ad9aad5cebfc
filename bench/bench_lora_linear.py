"""The cases of lora_linear: ``python -m bench lora_linear`` measures all, ``pytest bench`` the plain shapes.

The adapter beside a frozen layer is what is added: the bars are multiples of the frozen layer's own time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

import pykernels

from . import gate, gpu_model, on_cuda
from .harness import OURS, Bar, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .lora_linear_baselines import SCALE, Problem, Shape, eager, frozen, peft_layer
from .machine import DTYPES

NAME = "lora_linear"
DROPOUT = 0.1
WITHOUT = "ours, dropout 0"
EXACT = "ours, fp32 adapter"
FROZEN = "frozen linear"
EAGER = "eager"
PEFT = "PEFT"
LOOP = "ours, one adapter at a time"
MULTI_EAGER = "eager, one adapter at a time"

Runner = Callable[[Session, Result], None]

SQUARE = Shape(4096, 768, 768, 8)
WIDE = Shape(4096, 768, 3072, 8)
DECODE = Shape(1, 4096, 4096, 16)
SHAPES = (SQUARE, WIDE, Shape(2048, 1024, 4096, 16), Shape(512, 4096, 4096, 16), Shape(1024, 1536, 6144, 8), DECODE)
QUICK_SHAPES = (SQUARE, WIDE, DECODE)
# What fills a large GPU: a layer of a model of billions of parameters, at two ranks.
CUDA_QUICK_SHAPES = (WIDE, Shape(4096, 4096, 4096, 16), DECODE)
CUDA_SHAPES = (*CUDA_QUICK_SHAPES, SQUARE, Shape(8192, 4096, 14336, 64), Shape(8, 4096, 4096, 16))
EMULATED = gpu_model.Emulated("lora_linear", {"_fwd": "_lora_linear_fwd", "_bwd": "_lora_linear_bwd"})
FEW = tuple(Shape(m, 1024, 1024, 8) for m in (1, 2, 4, 8, 16, 32, 64, 128))
TINY = Shape(2, 4, 4, 2)
MULTI = Shape(2048, 768, 3072, 8)
ADAPTERS = 8


def ours(weight: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, dropout: float = DROPOUT, **options) -> Tensor:
    return pykernels.lora_linear(x, weight, lora_a, lora_b, scale=SCALE, dropout=dropout, training=True, **options)


def _training(call: Callable[..., Tensor], problem: Problem) -> Call:
    """Forward, and backward for x and the adapter."""
    leaves = problem.leaves()
    return lambda: torch.autograd.grad(call(**leaves), list(leaves.values()), problem.dy)


def _frozen_training(problem: Problem) -> Call:
    """Forward, and backward for x alone."""
    x = problem.leaves()["x"]
    return lambda: torch.autograd.grad(frozen(x, problem.weight), x, problem.dy)


def _results(call: Callable[..., Tensor], problem: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    leaves = problem.leaves(dtype)
    return gate.gradients(partial(call, **leaves), problem.dy.to(dtype or problem.dtype), leaves)


def _require(failure: str | None, what: str) -> None:
    if failure:
        raise GateFailure(f"{what}: {failure}")


def check(problem: Problem) -> None:
    """The correctness gate: without dropout against eager, and with it against the definition with the same bits."""
    weight = problem.weight
    for name, dropout in ((WITHOUT, 0.0), (OURS, DROPOUT)):
        reference = partial(ours, dropout=dropout, seed=41, backend="reference")
        exact = _results(partial(reference, weight.double()), problem, torch.float64)
        same = _results(partial(reference, weight), problem)
        got = _results(partial(ours, weight, dropout=dropout, seed=41), problem)
        _require(gate.compare(got, same, exact, problem.shape.terms), name)


def bars(shape: Shape, dtype: str, tier: str | None, training: bool) -> list[Bar]:
    """Multiples of the frozen layer; where eager is the measure, never slower than it."""
    if dtype == "fp16" or tier == "avx2":
        return [Bar(OURS, EAGER, 1.0)]
    if tier:
        return []
    if shape.M == 1:
        return [] if training else [Bar(OURS, FROZEN, 1.1)]
    if shape.N >= 3072:
        return [Bar(OURS, FROZEN, 1.2 if training else 1.1)]
    return [Bar(OURS, FROZEN, 1.45 if training else 1.3)] if shape == SQUARE else []


def _variants(problem: Problem, wrap: Callable[[Callable[..., Tensor], Problem], Call]) -> dict[str, Call | None]:
    weight = problem.weight
    variants: dict[str, Call | None] = {
        OURS: wrap(partial(ours, weight), problem),
        WITHOUT: wrap(partial(ours, weight, dropout=0.0), problem),
        EAGER: wrap(partial(eager, weight, DROPOUT), problem),
    }
    if problem.dtype != torch.float32:
        variants[EXACT] = wrap(partial(ours, weight), Problem(problem.shape, problem.dtype, True, problem.device))
    return variants


def _forward(call: Callable[..., Tensor], problem: Problem) -> Call:
    return partial(call, **problem.inputs)


def forward_variants(problem: Problem) -> dict[str, Call | None]:
    layer = peft_layer(problem, DROPOUT)
    others = {
        PEFT: partial(layer, problem.inputs["x"]) if layer else None,
        FROZEN: partial(frozen, problem.inputs["x"], problem.weight),
    }
    return _variants(problem, _forward) | others


def training_variants(problem: Problem) -> dict[str, Call | None]:
    layer = peft_layer(problem, DROPOUT)
    others: dict[str, Call | None] = {PEFT: None, FROZEN: _frozen_training(problem)}
    if layer:
        x = problem.leaves()["x"]
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        others[PEFT] = lambda: torch.autograd.grad(layer(x), wanted, problem.dy)
    return _variants(problem, _training) | others


def run_shape(shape: Shape, session: Session, result: Result) -> None:
    tier, dtype = session.options.tier, result.dtype
    problem = Problem(shape, DTYPES[dtype])
    session.tick("checking")
    check(problem)
    expression = partial(eager, problem.weight, DROPOUT)
    with torch.no_grad():
        compiled = session.compiled(result, "forward", expression, lambda f: partial(f, **problem.inputs))
        variants = forward_variants(problem) | {"torch.compile": compiled}
        session.group(result, "forward", variants, bars(shape, dtype, tier, False), shape.flops)
    compiled = session.compiled(result, "forward + backward", expression, lambda f: _training(f, problem))
    variants = training_variants(problem) | {"torch.compile": compiled}
    session.group(result, "forward + backward", variants, bars(shape, dtype, tier, True), 2 * shape.flops)
    layer = peft_layer(problem, DROPOUT)
    leaves = problem.leaves()
    given = [problem.weight, *leaves.values()]
    result.saved_bytes[OURS] = gate.saved_bytes(partial(ours, problem.weight, **leaves), given)
    result.saved_bytes[EAGER] = gate.saved_bytes(partial(eager, problem.weight, DROPOUT, **leaves), given)
    if layer:
        kept = gate.saved_bytes(partial(layer, leaves["x"]), [leaves["x"], *layer.parameters()])
        result.saved_bytes[PEFT] = kept


def run_few(shape: Shape, session: Session, result: Result) -> None:
    """Forward of few rows, where a weight is read for little."""
    problem = Problem(shape, DTYPES[result.dtype])
    session.tick("checking")
    check(problem)
    with torch.no_grad():
        variants = forward_variants(problem)
        wanted = {name: variants[name] for name in (OURS, EAGER, PEFT, FROZEN)}
        session.group(result, "forward", wanted, flops=shape.flops, share=0.4)


def run_multi(shape: Shape, session: Session, result: Result) -> None:
    """A batch of 64 sequences of 32 rows, each with one of 8 adapters, against the same adapter by adapter."""
    problem = Problem(shape, DTYPES[result.dtype])
    generator = torch.Generator().manual_seed(42)
    x = problem.inputs["x"].view(64, -1, shape.K)
    index = torch.randint(ADAPTERS, (64,), generator=generator)
    lora_a, lora_b = (
        torch.stack([t + torch.randn(t.shape, generator=generator).to(t.dtype) * 0.1 for _ in range(ADAPTERS)])
        for t in (problem.inputs["lora_a"], problem.inputs["lora_b"])
    )

    def together() -> Tensor:
        return pykernels.lora_linear_multi(x, problem.weight, lora_a, lora_b, index, scale=SCALE)

    def apart(call: Callable[..., Tensor]) -> Tensor:
        y = x.new_empty(*x.shape[:-1], shape.N)
        for e in range(ADAPTERS):
            rows = (index == e).nonzero().squeeze(-1)
            y[rows] = call(problem.weight, x=x[rows], lora_a=lora_a[e], lora_b=lora_b[e])
        return y

    with torch.no_grad():
        exact = {"y": pykernels.lora_linear_multi(*(t.double() for t in (x, problem.weight, lora_a, lora_b)), index,
                                                  scale=SCALE, backend="reference")}  # fmt: skip
        same = {"y": apart(lambda w, **t: eager(w, 0.0, **t))}
        _require(gate.compare({"y": together()}, same, exact, shape.terms), OURS)
        variants = {
            OURS: together,
            LOOP: partial(apart, partial(ours, dropout=0.0)),
            MULTI_EAGER: partial(apart, lambda w, **t: eager(w, 0.0, **t)),
            FROZEN: partial(frozen, x, problem.weight),
        }
        limits = [Bar(OURS, LOOP, 1.0), Bar(OURS, MULTI_EAGER, 1.0)]
        session.group(result, "forward", variants, limits, shape.flops)


def run_stacked(shape: Shape, session: Session, result: Result) -> None:
    """Three projections of one x, as q, k and v of attention, forward and backward, against one after the other."""
    problem = Problem(shape, DTYPES[result.dtype])
    leaves = problem.leaves()
    x, weights = leaves["x"], [problem.weight * (1 + 0.1 * i) for i in range(3)]
    lora_a, lora_b = ([leaves[n].detach().clone().requires_grad_() for _ in range(3)] for n in ("lora_a", "lora_b"))
    wanted, incoming = [x, *lora_a, *lora_b], [problem.dy] * 3
    options = {"scale": SCALE, "dropout": DROPOUT, "training": True}

    def together() -> object:
        ys = pykernels.lora_linear_stacked(x, weights, lora_a, lora_b, **options)
        return torch.autograd.grad(ys, wanted, incoming)

    def apart(call: Callable[..., Tensor]) -> Call:
        def run() -> object:
            ys = [call(w, x=x, lora_a=a, lora_b=b) for w, a, b in zip(weights, lora_a, lora_b, strict=True)]
            return torch.autograd.grad(ys, wanted, incoming)

        return run

    check(problem)
    variants = {
        OURS: together,
        "ours, one by one": apart(ours),
        EAGER: apart(lambda w, **t: eager(w, DROPOUT, **t)),
        FROZEN: lambda: torch.autograd.grad([frozen(x, w) for w in weights], x, incoming),
    }
    session.group(result, "forward + backward", variants, [Bar(OURS, EAGER, 1.0)], 6 * shape.flops)


def run_dora(shape: Shape, session: Session, result: Result) -> None:
    """DoRA without dropout, forward and backward, against PEFT's layer."""
    problem = Problem(shape, DTYPES[result.dtype])
    leaves = problem.leaves()
    layer = peft_layer(problem, 0.0, dora=True)
    if layer is None:
        result.notes.append("PEFT is not installed: no baseline for DoRA")
        return
    magnitude = layer.lora_magnitude_vector["default"].weight
    x, wanted = leaves["x"], [*leaves.values(), magnitude]
    theirs = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def dora() -> Tensor:
        return pykernels.dora_linear(weight=problem.weight, magnitude=magnitude, scale=SCALE, **leaves)

    with torch.no_grad():
        y, expected = dora().double(), layer(x).double()
        error = ((y - expected).abs().max() / expected.abs().max()).item()
        _require(None if error < 8 * torch.finfo(problem.dtype).eps else f"differs from PEFT by {error:.3g}", OURS)
    variants = {
        OURS: lambda: torch.autograd.grad(dora(), wanted, problem.dy),
        PEFT: lambda: torch.autograd.grad(layer(x), theirs, problem.dy),
        FROZEN: _frozen_training(problem),
    }
    session.group(result, "forward + backward", variants, [Bar(OURS, PEFT, 1.0)], 2 * shape.flops)


def run_overhead(session: Session, result: Result) -> None:
    problem = Problem(TINY, DTYPES[result.dtype])
    check(problem)
    limits = [Bar(OURS, None, 10e-6), Bar(OURS, EAGER, 1.0)]
    with torch.no_grad():
        variants = {
            OURS: partial(ours, problem.weight, dropout=0.0, **problem.inputs),
            EAGER: partial(eager, problem.weight, 0.0, **problem.inputs),
            FROZEN: partial(frozen, problem.inputs["x"], problem.weight),
        }
        session.group(result, "forward", variants, limits, share=0.4)


def _on_cuda(shape: Shape, dtype: torch.dtype) -> Iterator[on_cuda.Group]:
    problem = Problem(shape, dtype, device="cuda")
    check(problem)
    triton = on_cuda.by_triton(lambda: check(problem))
    call = partial(ours, problem.weight)
    expression = partial(eager, problem.weight, DROPOUT)
    with torch.no_grad():
        compiled = on_cuda.compiled(expression, lambda f: partial(f, **problem.inputs))
        more = {"torch.compile": compiled, on_cuda.TRITON: triton(_forward(call, problem))}
        yield on_cuda.Group("forward", forward_variants(problem) | more, shape.flops)
    compiled = on_cuda.compiled(expression, lambda f: _training(f, problem))
    more = {"torch.compile": compiled, on_cuda.TRITON: triton(_training(call, problem))}
    yield on_cuda.Group("forward + backward", training_variants(problem) | more, 2 * shape.flops)


def cuda_cases(dtypes: Sequence[str], quick: bool) -> list[on_cuda.Case]:
    return [
        on_cuda.Case(NAME, shape.name, dtype, partial(_on_cuda, shape, on_cuda.DTYPES[dtype]))
        for dtype in dtypes
        for shape in (CUDA_QUICK_SHAPES if quick else CUDA_SHAPES)
    ]


def _check_emulated(dtype: str) -> None:
    problem = Problem(Shape(40, 48, 72, 4), on_cuda.DTYPES[dtype])
    if dtype != "tf32":
        return check(problem)
    # PyTorch has no tf32 on the CPU: its bfloat16, which has fewer bits, is what it must not be worse than.
    call = partial(ours, dropout=DROPOUT, seed=41)
    exact, coarse = (
        _results(partial(call, problem.weight.to(d), backend="reference"), problem, d)
        for d in (torch.float64, torch.bfloat16)
    )
    got = _results(partial(call, problem.weight), problem)
    _require(gate.compare(got, {n: t.float() for n, t in coarse.items()}, exact, problem.shape.terms), OURS)


def model_case(
    shape: Shape, dtype: str, exact: bool = False, training: bool = False, dropout: float = DROPOUT
) -> gpu_model.Case:
    """Executed whole: how the narrow product is cut depends on the number of rows. exact: adapters of float32."""

    def problem(device: str = "cpu") -> Problem:
        return Problem(shape, on_cuda.DTYPES[dtype], exact, device)

    def bind(call: Callable[..., Tensor], p: Problem) -> Call:
        call = partial(call, p.weight)
        return _training(call, p) if training else torch.no_grad()(partial(call, **p.inputs))

    def compulsory(n: int) -> int:
        p = problem("meta")
        x, y, adapter = p.inputs["x"].nbytes, p.dy.nbytes, p.inputs["lora_a"].nbytes + p.inputs["lora_b"].nbytes
        forward = x + p.weight.nbytes + adapter + y
        if not training:
            return forward
        kept = shape.M * (4 * shape.R + shape.K // 8)  # S and a bit of dropout an element of x, written and read
        return 2 * forward + x + adapter + 2 * kept  # backward reads x too, and writes the adapter's gradients

    title = "forward + backward" if training else "forward"
    title += ", fp32 adapter" * exact + ", no dropout" * (not dropout)
    return gpu_model.Case(
        NAME, shape.name, dtype, title, EMULATED, 1,
        call=lambda n: bind(partial(ours, dropout=dropout, seed=41), problem()), check=partial(_check_emulated, dtype),
        eager=lambda n: bind(lambda w, **t: eager(w, dropout, **t), problem("meta")), compulsory=compulsory,
        products=lambda n: shape.flops * (2 if training else 1), counted=(1,), whole=not training,
        bar=None if training or shape.M == 1 else 1.5,
    )  # fmt: skip


def model_cases(dtypes: Sequence[str], quick: bool) -> list[gpu_model.Case]:
    found = []
    for dtype in dtypes:
        for shape in (SQUARE,) if quick else (SQUARE, WIDE, Shape(1, 1024, 1024, 8)):
            exact = (False, True) if dtype in ("bf16", "fp16") and shape != WIDE else (False,)
            found += [model_case(shape, dtype, e) for e in exact]
        found.append(model_case(SQUARE, dtype, dropout=0.0))
        found.append(model_case(SQUARE, dtype, training=True))
    return found


def jobs(options: Options) -> list[Job]:
    found: list[Job] = []
    seconds = options.effort.seconds

    def add(
        case: str, dtype: str, groups: float, flops: float, run: Runner, sweep: tuple[str, int] | None = None
    ) -> None:
        found.append(Job(NAME, case, dtype, groups * seconds, flops, run, sweep))

    for dtype in options.dtypes:
        brief = options.quick and dtype == "fp16" and not options.complete
        for shape in (SQUARE,) if brief else QUICK_SHAPES if options.quick else SHAPES:
            add(shape.name, dtype, 3, 60 * shape.flops, partial(run_shape, shape))
        if brief:
            continue
        add(f"{MULTI.name}, {ADAPTERS} adapters", dtype, 1.5, 30 * MULTI.flops, partial(run_multi, MULTI))
        add(f"{SQUARE.name}, three projections", dtype, 1.5, 200 * SQUARE.flops, partial(run_stacked, SQUARE))
        add(f"{WIDE.name}, DoRA", dtype, 1.5, 60 * WIDE.flops, partial(run_dora, WIDE))
        add("call overhead, 8 elements", dtype, 0.4, 0, run_overhead)
        for shape in FEW[::3] if options.quick else FEW:
            case = f"sweep over rows: K{shape.K} N{shape.N} R{shape.R}, {shape.M}"
            add(case, dtype, 0.4, 10 * shape.flops, partial(run_few, shape), ("rows", shape.M))
    return found


@pytest.mark.parametrize("variant", [OURS, EAGER, FROZEN])
@pytest.mark.parametrize("title", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_lora_linear(benchmark, shape: Shape, dtype: str, title: str, variant: str) -> None:
    problem = Problem(shape, DTYPES[dtype])
    training = title != "forward"
    if variant == OURS:
        check(problem)
    benchmark.group = f"{shape.name} {dtype} {title}"
    with torch.set_grad_enabled(training):
        call = (training_variants if training else forward_variants)(problem)[variant]
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
