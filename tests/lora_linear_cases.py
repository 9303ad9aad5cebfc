"""Random cases of lora_linear and lora_linear_multi, and the error rule for all that comes out of one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pykernels import lora_linear, lora_linear_multi
from tests.helpers import FORWARD, GRADIENT, Results, assert_close_to_reference, rounding_floor


@dataclass(frozen=True)
class LoraCase:
    """One configuration. leading: x's dimensions before K. E: adapters of lora_linear_multi, 0 for lora_linear.

    indexed: how many leading dimensions adapter_index has, None for all. scales: one for each adapter. float_adapters:
    lora_a and lora_b are float32 whatever x is. transposed: the weight is a view of a [K, N] tensor.
    """

    leading: tuple[int, ...] = (2, 11)
    K: int = 9
    N: int = 7
    R: int = 3
    E: int = 0
    indexed: int | None = None
    bias: bool = True
    scale: float = 0.7
    scales: bool = False
    dropout: float = 0.0
    float_adapters: bool = False
    transposed: bool = False

    @property
    def rows(self) -> int:
        return math.prod(self.leading)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

    def options(self) -> dict[str, Any]:
        """Arguments without gradients. adapter_index has rows of every adapter, in runs and alone, and rows without."""
        options: dict[str, Any] = {"scale": self.scale}
        if self.E or self.indexed is not None:
            shape = self.leading[: self.indexed]
            drawn = torch.randint(-1, self.E, shape, generator=self.generator())
            runs = (torch.arange(drawn.numel()) // 5 % (self.E + 1) - 1).view(shape)
            options["adapter_index"] = torch.where(torch.arange(drawn.numel()).view(shape) % 20 < 10, drawn, runs)
        if self.scales:
            options["scale"] = torch.linspace(0.5, 1.5, self.E)
        if self.dropout:
            options |= {"dropout": self.dropout, "training": True, "seed": 1234}
        return options

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Arguments with gradients, of order one: factors are scaled so that S and both terms of y are."""
        generator = self.generator()
        adapters = [self.E] if self.E or self.indexed is not None else []
        shapes = {
            "x": [*self.leading, self.K],
            "weight": [self.N, self.K],
            "lora_a": [*adapters, self.R, self.K],
            "lora_b": [*adapters, self.N, self.R],
        } | ({"bias": [self.N]} if self.bias else {})
        width, rank = max(1, self.K) ** -0.5, max(1, self.R) ** -0.5
        size = {"weight": width, "lora_a": width, "lora_b": rank}
        tensors = {name: torch.randn(shape, generator=generator) * size.get(name, 1) for name, shape in shapes.items()}
        if self.transposed:
            tensors["weight"] = tensors["weight"].t().contiguous().t()
        kept = ("lora_a", "lora_b") if self.float_adapters and dtype != torch.float64 else ()
        return {name: t if name in kept else t.to(dtype) for name, t in tensors.items()}

    def dy(self, y: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)


def call_of(options: dict[str, Any]) -> Callable[..., Tensor]:
    return lora_linear_multi if "adapter_index" in options else lora_linear


def evaluate(
    inputs: dict[str, Tensor],
    dy: Tensor | Callable[[Tensor], Tensor] | None,
    call: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Results:
    """{"y": y, "dx": dx, "dweight": ...}: the output and, unless dy is None, the gradients of all inputs."""
    call = call or call_of(options)
    if dy is None:
        with torch.no_grad():
            return {"y": call(**inputs, **options)}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = call(**leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy(y) if callable(dy) else dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@dataclass(frozen=True)
class LoraProblem:
    """A case in one dtype, with the result in fp64 and that of the PyTorch expression in this dtype."""

    case: LoraCase
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    truth: Results
    same: Results

    def check(self, actual: Results, same: Results | None = None) -> None:
        """The error rule for every result in `actual`, by the errors of `same`."""
        case, size = self.case, max(1.0, abs(self.case.scale))
        terms = {
            "y": case.K + case.R,
            "dx": case.N + case.R,
            "dlora_a": case.rows + case.N,
            "dlora_b": case.rows + case.K,
        }
        # Sums of so many values of order one. dS is a sum over N.
        summed = {"y": 1, "dx": case.N / max(1, case.K), "dlora_a": case.rows * case.N / max(1, case.R)}
        for name, got in actual.items():
            scale = size * math.sqrt(max(1.0, summed.get(name, case.rows)))
            floor = rounding_floor(self.truth[name], got.dtype, terms.get(name, case.rows), scale)
            if got.dtype == torch.float64:
                floor *= 2  # the truth has no digits more, and the error of `same` cannot show
            assert_close_to_reference(
                got,
                self.truth[name],
                (same or self.same)[name],
                factor=FORWARD if name == "y" else GRADIENT,
                floor=floor,
                what=f"{name} of {case} in {self.inputs['x'].dtype}",
            )
            assert got.is_contiguous(), f"{name} of {case}: strides {got.stride()}"


@lru_cache(maxsize=4096)
def problem(case: LoraCase, dtype: torch.dtype) -> LoraProblem:
    inputs, options = case.inputs(dtype), case.options()
    reference = options | {"backend": "reference"}
    same = evaluate(inputs, case.dy, **reference)
    dy = case.dy(same["y"])
    truth = evaluate({name: t.double() for name, t in inputs.items()}, dy.double(), **reference)
    return LoraProblem(case, inputs, options, truth, same)


def check_case(case: LoraCase, dtype: torch.dtype, backend: str) -> None:
    """Inference, training and their equality, by the error rule."""
    p = problem(case, dtype)
    trained = evaluate(p.inputs, case.dy, **p.options, backend=backend)
    p.check(trained)
    inferred = evaluate(p.inputs, None, **p.options, backend=backend)
    assert torch.equal(inferred["y"], trained["y"]), f"{case}: inference and training differ"
