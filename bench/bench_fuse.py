"""Layers of other packages before and after `fuse`: ``python -m bench fuse``. Cases of packages that are not installed
are left out; of packages that cannot be, the layers are those written anew for the tests (tests/fuse_blocks.py). All
come as they are made, with one random draw of weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pykernels import fuse

from . import gate
from .harness import OURS, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .machine import DTYPES

NAME = "fuse"


@dataclass(frozen=True)
class Case:
    """make(the package's class); shapes of the arguments; terms: products in the longest sum; flops of a forward.

    drawn: so many of the arguments are, the others are masks of ones. tokens: the first is, below that number.
    """

    name: str
    cls: str
    make: Callable[[Any], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    terms: int
    flops: float
    drawn: int = 1
    tokens: int = 0


def _vits(layers: int, length: int) -> Case:
    def make(cls: Any) -> nn.Module:
        config = importlib.import_module("transformers").VitsConfig(hidden_size=192)
        return cls(config, layers)

    products = layers * length * (192 * 5 * 384 + 192 * 384)
    name = f"VitsWaveNet C192 K5, {layers} layers, L{length}"
    shapes = ((1, 192, length), (1, 1, length))
    return Case(name, "transformers.models.vits.modeling_vits.VitsWaveNet", make, shapes, 960, 2.0 * products)


def _gluonts(batch: int, length: int, dilation: int) -> Case:
    def make(cls: Any) -> nn.Module:
        sizes = {"num_residual_channels": 24, "num_skip_channels": 32, "kernel_size": 2, "dilation": dilation}
        return cls(**sizes, return_dense_output=True)

    products = batch * length * (24 * 2 * 48 + 24 * 56)
    name = f"CausalDilatedResidualLayer C24 K2 d{dilation}, B{batch} T{length}"
    shapes = ((batch, 24, length + dilation),)
    return Case(
        name, "gluonts.torch.model.wavenet.module.CausalDilatedResidualLayer", make, shapes, 48, 2.0 * products
    )


def _torchmil(rows: int, width: int, hidden: int, gated: bool) -> Case:
    def make(cls: Any) -> nn.Module:
        return cls(in_dim=width, att_dim=hidden, gated=gated)

    products = rows * width * hidden * (1 + gated) + rows * width
    name = f"AttentionPool N{rows} D{width} A{hidden}{', gated' if gated else ''}"
    cls = "torchmil.nn.attention.attention_pool.AttentionPool"
    return Case(name, cls, make, ((1, rows, width),), max(rows, width), 2.0 * products)


def _block(
    title: str, cls: str, make: Callable[[Any], nn.Module], shapes: tuple[tuple[int, ...], ...], products: int
) -> Case:
    """A block of tests/fuse_blocks.py, with `products` for each position of the first argument [B, C, T]."""
    batch, _, length = shapes[0]
    flops = 2.0 * batch * length * products
    return Case(title, f"tests.fuse_blocks.{cls}", make, shapes, 1536, flops, len(shapes))


def _parallel_wavegan(length: int) -> Case:
    products = 64 * 3 * 128 + 80 * 128 + 64 * 128
    shapes = ((1, 64, length), (1, 80, length))
    name = f"Parallel WaveGAN's block C64 K3 d16, T{length}"
    return _block(name, "ParallelWaveGANBlock", lambda cls: cls(dilation=16), shapes, products)


def _diffusion(name: str, cls: str, width: int, dilation: int, cond: int, length: int) -> Case:
    """The arguments after x in the order of the class."""
    products = width * 3 * 2 * width + cond * 2 * width + width * 2 * width
    others = ((1, 512), (1, cond, length))
    shapes = ((1, width, length), *(others if cls == "DiffWaveBlock" else reversed(others)))
    title = f"{name}'s block C{width} K3 d{dilation}, T{length}"
    return _block(title, cls, lambda c: c(width, dilation, 512, cond, lambda m, **_: m), shapes, products)


def _fairseq(layers: int, batch: int, length: int) -> Case:
    def make(cls: Any) -> nn.Module:
        norm = torch.nn.utils.parametrizations.weight_norm
        return cls(((512, 3, 1),) * layers, 512, 0.0, norm)

    products = batch * length * (layers * 512 * 3 * 1024 + 2 * 512 * 512)
    name = f"fairseq's FConvEncoder C512 K3, {layers} layers, B{batch} T{length}"
    encoder = "tests.fuse_blocks.FConvEncoder"
    return Case(name, encoder, make, ((batch, length), (1,)), 1536, 2.0 * products, tokens=38)


def _allennlp(batch: int, length: int) -> Case:
    name = f"AllenNLP's block C512 K3 d2, B{batch} T{length}"
    norm = torch.nn.utils.parametrizations.weight_norm
    shapes = ((batch, 512, length),)
    return _block(
        name, "AllenNLPBlock", lambda cls: cls(512, ((3, 512, 2),), "forward", 0.0, norm), shapes, 512 * 3 * 1024
    )


CASES = (
    _vits(4, 100),
    _vits(4, 1000),
    _vits(16, 400),
    _gluonts(100, 1, 1),
    _gluonts(3200, 1, 64),
    _gluonts(32, 200, 16),
    _torchmil(1_000, 512, 128, True),
    _torchmil(10_000, 1024, 256, True),
    _torchmil(100_000, 512, 128, False),
    _parallel_wavegan(22_050),
    _diffusion("DiffWave", "DiffWaveBlock", 64, 16, 80, 22_050),
    _diffusion("DiffSinger", "DiffSingerBlock", 256, 4, 256, 1000),
    _fairseq(4, 8, 100),
    _allennlp(8, 100),
)
QUICK_CASES = (CASES[1], CASES[4], CASES[7], CASES[9], CASES[12])


def _class(case: Case) -> Any:
    """None where the package is not installed."""
    module, name = case.cls.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


class Problem:
    """The same layer as it was and fused, and its arguments."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(41)
        self.own = case.make(_class(case)).to(dtype)
        self.fused = case.make(_class(case)).to(dtype)
        self.fused.load_state_dict(self.own.state_dict())
        fuse(self.fused)
        drawn, masks = case.shapes[: case.drawn], case.shapes[case.drawn :]
        self.arguments = [torch.randn(shape).to(dtype) for shape in drawn]
        self.arguments += [torch.ones(shape, dtype=dtype) for shape in masks]
        if case.tokens:
            self.arguments[0] = torch.randint(2, case.tokens, case.shapes[0])

    def forward(self, layer: nn.Module) -> Tensor:
        """The first output of several."""
        return tree_leaves(layer(*self.arguments))[0]

    def gradients(self, layer: nn.Module) -> dict[str, Tensor]:
        wanted = dict(layer.named_parameters())
        y = self.forward(layer)
        grads = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y), allow_unused=True)
        found = {f"d{n}": t for n, t in zip(wanted, grads, strict=True) if t is not None}
        return {"y": y.detach()} | found


def run_case(case: Case, session: Session, result: Result) -> None:
    session.tick("checking")
    problem, exact = Problem(case, DTYPES[result.dtype]), Problem(case, torch.float64)
    exact.own.load_state_dict(problem.own.state_dict())
    exact.arguments = [t.double() if t.is_floating_point() else t for t in problem.arguments]
    terms = dict.fromkeys(problem.gradients(problem.own), case.terms)
    found = (problem.gradients(problem.fused), problem.gradients(problem.own), exact.gradients(exact.own))
    if failure := gate.compare(*found, terms):
        raise GateFailure(f"{OURS}: {failure}")
    layers = {OURS: problem.fused, "eager": problem.own}
    with torch.no_grad():
        forward: dict[str, Call] = {name: partial(problem.forward, layer) for name, layer in layers.items()}
        session.group(result, "forward", forward, flops=case.flops)
    training: dict[str, Call] = {name: partial(problem.gradients, layer) for name, layer in layers.items()}
    session.group(result, "forward + backward", training, flops=3 * case.flops)


def jobs(options: Options) -> list[Job]:
    seconds = options.effort.seconds
    return [
        Job(NAME, case.name, dtype, 2 * seconds, 60 * case.flops, partial(run_case, case))
        for dtype in options.dtypes
        if dtype != "fp16" or options.complete or not options.quick
        for case in (QUICK_CASES if options.quick else CASES)
        if _class(case) is not None
    ]
