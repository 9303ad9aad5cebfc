"""Layers of other packages before and after `fuse`: ``python -m bench fuse``. Cases of packages that are not installed
are left out. The layers come as their packages make them, with one random draw of weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pykernels import fuse

from . import gate
from .harness import OURS, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .machine import DTYPES

NAME = "fuse"


@dataclass(frozen=True)
class Case:
    """make(the package's class); shapes of the arguments; terms: products in the longest sum; flops of a forward."""

    name: str
    cls: str
    make: Callable[[Any], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    terms: int
    flops: float


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
)
QUICK_CASES = (CASES[1], CASES[4], CASES[7])


def _class(case: Case) -> Any:
    """None where the package is not installed."""
    module, name = case.cls.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


class Problem:
    """The same layer as it was and fused, and its arguments; masks are of ones."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(41)
        self.own = case.make(_class(case)).to(dtype)
        self.fused = case.make(_class(case)).to(dtype)
        self.fused.load_state_dict(self.own.state_dict())
        fuse(self.fused)
        x, *masks = case.shapes
        self.x = torch.randn(x).to(dtype)
        self.others = [torch.ones(shape, dtype=dtype) for shape in masks]

    def forward(self, layer: nn.Module) -> Tensor:
        """The first output: the skip connection where there are several."""
        out = layer(self.x, *self.others)
        return out[0] if isinstance(out, tuple) else out

    def gradients(self, layer: nn.Module) -> dict[str, Tensor]:
        wanted = {n: p for n, p in layer.named_parameters() if "residual" not in n}
        y = self.forward(layer)
        grads = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y))
        return {"y": y.detach()} | {f"d{n}": t for n, t in zip(wanted, grads, strict=True)}


def run_case(case: Case, session: Session, result: Result) -> None:
    session.tick("checking")
    problem, exact = Problem(case, DTYPES[result.dtype]), Problem(case, torch.float64)
    exact.own.load_state_dict(problem.own.state_dict())
    exact.x = problem.x.double()
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
        for case in (QUICK_CASES if options.quick else CASES)
        if _class(case) is not None
    ]
