"""Random cases of gated_conv1d, and the error rule for all that comes out of one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pykernels import gated_conv1d
from tests.helpers import FORWARD, GRADIENT, assert_close_to_reference, rounding_floor


@dataclass(frozen=True)
class Case:
    """One configuration. cond: "none", "one" row a sequence, "all" rows. rows: "all", "mask", "lengths" or "packed"."""

    B: int = 2
    L: int = 19
    C_in: int = 5
    C_out: int = 5
    K: int = 3
    dilation: int = 2
    padding: str = "same"
    residual: str = "highway"
    value_act: str = "identity"
    split: str = "value_gate"
    two_weights: bool = False
    bias: bool = True
    cond: str = "none"
    rows: str = "all"
    gate_dropout: float = 0.0
    gate_noise: float = 0.0

    @property
    def reach(self) -> int:
        return self.dilation * (self.K - 1)

    @property
    def L_out(self) -> int:
        return self.L - self.reach if self.padding == "valid" else self.L

    @property
    def legal(self) -> bool:
        return (
            self.L_out >= 0
            and (self.residual == "none" or self.C_in == self.C_out)
            and not (self.padding == "valid" and self.rows == "packed")
        )

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

    def options(self) -> dict[str, Any]:
        """Arguments without gradients. Lengths reach from 0 to L; the mask has holes and a row that is all False."""
        generator = self.generator()
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("dilation", "padding", "residual", "value_act", "split")
        }
        lengths = torch.randint(0, self.L + 1, (self.B,), generator=generator)
        lengths[:1], lengths[1:2] = self.L, 0
        if self.rows == "mask":
            options["mask"] = torch.rand(self.B, self.L, generator=generator) < 0.6
            options["mask"][1:2] = False
        elif self.rows == "lengths":
            options["lengths"] = lengths
        elif self.rows == "packed":
            options["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        if self.gate_dropout or self.gate_noise:
            options |= {
                "gate_dropout": self.gate_dropout,
                "gate_noise": self.gate_noise,
                "training": True,
                "seed": 1234,
            }
        return options

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Arguments with gradients, of order one: weights are scaled so that h is."""
        generator = self.generator()
        leading = [self.B, self.L]
        conditioned = [self.B, self.L_out]
        if self.rows == "packed":
            conditioned = leading = [int(self.options()["cu_seqlens"][-1])]
        outputs = self.C_out if self.two_weights else 2 * self.C_out
        shapes = {"x": [*leading, self.C_in], "weight": [outputs, self.C_in, self.K]}
        if self.bias:
            shapes["bias"] = [outputs]
        if self.two_weights:
            shapes["gate_weight"] = shapes["weight"]
            if self.bias:
                shapes["gate_bias"] = [outputs]
        if self.cond != "none":
            shapes["cond"] = [*(conditioned if self.cond == "all" else [self.B, 1]), 2 * self.C_out]
        scale = {"weight": (self.K * self.C_in) ** -0.5, "gate_weight": (self.K * self.C_in) ** -0.5}
        return {
            name: (torch.randn(shape, generator=generator) * scale.get(name, 1.0)).to(dtype)
            for name, shape in shapes.items()
        }

    def dy(self, y: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)


def evaluate(
    inputs: dict[str, Tensor],
    dy: Tensor | Callable[[Tensor], Tensor] | None,
    call: Callable[..., Tensor] = gated_conv1d,
    **options: Any,
) -> dict[str, Tensor]:
    """{"y": y, "dx": dx, "dweight": ...}: the output and, unless dy is None, the gradients of all inputs."""
    if dy is None:
        with torch.no_grad():
            return {"y": call(**inputs, **options)}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = call(**leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy(y) if callable(dy) else dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@dataclass(frozen=True)
class Problem:
    """A case in one dtype, with the result in fp64 and that of the PyTorch expression in this dtype."""

    case: Case
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    truth: dict[str, Tensor]
    same: dict[str, Tensor]

    def check(self, actual: dict[str, Tensor]) -> None:
        """The error rule for every result in `actual`."""
        rows = max(1, self.truth["y"].numel() // max(1, self.case.C_out))
        # Every result has the rounding of h in it; gradients are then sums over outputs, or over rows.
        h = self.case.K * self.case.C_in
        terms = {"y": h, "dx": h + 2 * self.case.K * self.case.C_out}
        for name, got in actual.items():
            truth, dtype = self.truth[name], got.dtype
            count = terms.get(name, h + rows)
            # Gradients of parameters are sums over rows of values of order one.
            scale = 1.0 if name in ("y", "dx") else math.sqrt(rows)
            assert_close_to_reference(
                got,
                truth,
                self.same[name],
                factor=FORWARD if name == "y" else GRADIENT,
                floor=rounding_floor(truth, dtype, count, scale),
                what=f"{name} of {self.case} in {dtype}",
            )
            assert got.is_contiguous(), f"{name} of {self.case}: strides {got.stride()}"


@lru_cache(maxsize=4096)
def problem(case: Case, dtype: torch.dtype) -> Problem:
    inputs, options = case.inputs(dtype), case.options()
    reference = options | {"backend": "reference"}
    same = evaluate(inputs, case.dy, **reference)
    dy = case.dy(same["y"])
    truth = evaluate({name: t.double() for name, t in inputs.items()}, dy.double(), **reference)
    return Problem(case, inputs, options, truth, same)


def check_case(case: Case, dtype: torch.dtype, backend: str, **options: Any) -> None:
    """Inference, training and their equality, by the error rule."""
    p = problem(case, dtype)
    trained = evaluate(p.inputs, case.dy, **p.options, **options, backend=backend)
    p.check(trained)
    inferred = evaluate(p.inputs, None, **p.options, **options, backend=backend)
    assert torch.equal(inferred["y"], trained["y"]), f"{case}: inference and training differ"
