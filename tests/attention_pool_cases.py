"""Random cases of attention_pool, and the error rule for all that comes out of one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pykernels import attention_pool
from tests.helpers import FORWARD, GRADIENT, assert_close_to_reference, rounding_floor


@dataclass(frozen=True)
class PoolCase:
    """One configuration. J: pooling heads, 0 for a query [H]. rows: "all", "mask", "lengths" or "packed"."""

    B: int = 3
    L: int = 19
    D: int = 5
    H: int = 7
    J: int = 0
    activation: str = "tanh"
    gated: bool = False
    bias: bool = True
    rows: str = "all"
    returned: str | None = None

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

    def options(self) -> dict[str, Any]:
        """Arguments without gradients. Lengths reach from 0 to L; the mask has holes and a row that is all False."""
        generator = self.generator()
        options: dict[str, Any] = {"activation": self.activation, "return_scores": self.returned}
        lengths = torch.randint(0, self.L + 1, (self.B,), generator=generator)
        lengths[:1], lengths[1:2] = self.L, 0
        if self.rows == "mask":
            options["mask"] = torch.rand(self.B, self.L, generator=generator) < 0.6
            options["mask"][1:2] = False
        elif self.rows == "lengths":
            options["lengths"] = lengths
        elif self.rows == "packed":
            options["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        return options

    def live(self) -> Tensor:
        """Which rows of x exist, [B, L] or [T]."""
        options = self.options()
        if "lengths" in options:
            return torch.arange(self.L) < options["lengths"].unsqueeze(-1)
        if "cu_seqlens" in options:
            return torch.ones(int(options["cu_seqlens"][-1]), dtype=torch.bool)
        return options.get("mask", torch.ones(self.B, self.L, dtype=torch.bool))

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Arguments with gradients, of order one: weights are scaled so that u and the scores are."""
        generator = self.generator()
        leading = [int(self.options()["cu_seqlens"][-1])] if self.rows == "packed" else [self.B, self.L]
        shapes = {"x": [*leading, self.D], "weight": [self.H, self.D], "query": [self.J, self.H][not self.J :]}
        if self.bias:
            shapes["bias"] = [self.H]
        if self.gated:
            shapes["gate_weight"] = [self.H, self.D]
            if self.bias:
                shapes["gate_bias"] = [self.H]
        width, hidden = max(1, self.D) ** -0.5, 2 * max(1, self.H) ** -0.5
        scale = {"weight": width, "gate_weight": width, "query": hidden}
        return {
            name: (torch.randn(shape, generator=generator) * scale.get(name, 1.0)).to(dtype)
            for name, shape in shapes.items()
        }

    def gradients(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Incoming gradients of the results."""
        generator = torch.Generator().manual_seed(7)
        return {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in results.items()}


Incoming = Callable[[dict[str, Tensor]], dict[str, Tensor]] | None


def evaluate(
    inputs: dict[str, Tensor], incoming: Incoming, call: Callable[..., Any] = attention_pool, **options: Any
) -> dict[str, Tensor]:
    """{"out": ..., "scores": ... where returned, "dx": ..., "dweight": ...}; gradients unless incoming is None."""

    def results(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        got = call(**tensors, **options)
        return {"out": got} if isinstance(got, Tensor) else {"out": got[0], "scores": got[1]}

    if incoming is None:
        with torch.no_grad():
            return results(inputs)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    given = results(leaves)
    wanted = incoming(given)
    grads = torch.autograd.grad([given[name] for name in wanted], list(leaves.values()), list(wanted.values()))
    kept = {name: t.detach() for name, t in given.items()}
    return kept | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@dataclass(frozen=True)
class PoolProblem:
    """A case in one dtype, with the result in fp64 and that of the PyTorch expression in this dtype."""

    case: PoolCase
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    truth: dict[str, Tensor]
    same: dict[str, Tensor]

    def check(self, actual: dict[str, Tensor]) -> None:
        """The error rule for every result in `actual`."""
        case = self.case
        rows = max(1, self.truth["dx"].numel() // max(1, case.D))
        dtype = self.inputs["x"].dtype
        # A score sums H terms that each have the rounding of D products in them.
        terms = {"out": case.D + case.H + case.L, "scores": case.D + case.H, "dx": case.D + 2 * case.H}
        for name, got in actual.items():
            # Gradients are sums over heads and over D, which da is; those of parameters also over rows, or over
            # sequences where the weights of the rows add up to one.
            scale = 1.0 if name in ("out", "scores") else math.sqrt(max(1, case.D) * max(1, case.J))
            scale *= 1.0 if name in terms else math.sqrt(rows if self.case.returned else case.B)
            count = terms.get(name, case.D + case.H + rows)
            floor = rounding_floor(self.truth[name], got.dtype, count, scale)
            if dtype == torch.float64:
                floor *= 2  # the truth has no digits more, and the error of `same` cannot show
            assert_close_to_reference(
                got,
                self.truth[name],
                self.same[name],
                factor=GRADIENT if name.startswith("d") else FORWARD,
                floor=floor,
                what=f"{name} of {case} in {dtype}",
            )
            assert got.is_contiguous(), f"{name} of {case}: strides {got.stride()}"


@lru_cache(maxsize=4096)
def problem(case: PoolCase, dtype: torch.dtype) -> PoolProblem:
    inputs, options = case.inputs(dtype), case.options()
    reference = options | {"backend": "reference"}
    same = evaluate(inputs, case.gradients, **reference)
    grads = case.gradients({name: t for name, t in same.items() if not name.startswith("d")})
    truth = evaluate(
        {name: t.double() for name, t in inputs.items()},
        lambda _: {n: t.double() for n, t in grads.items()},
        **reference,
    )
    return PoolProblem(case, inputs, options, truth, same)


def check_case(case: PoolCase, dtype: torch.dtype, backend: str, **options: Any) -> None:
    """Inference, and training with both ways of backward, by the error rule; all with the same results."""
    p = problem(case, dtype)
    trained = evaluate(p.inputs, case.gradients, **p.options, **options, backend=backend)
    p.check(trained)
    kept = evaluate(p.inputs, case.gradients, **p.options, **options, backend=backend, recompute=False)
    p.check(kept)
    inferred = evaluate(p.inputs, None, **p.options, **options, backend=backend)
    for name, t in inferred.items():
        assert torch.equal(t, trained[name]), f"{name} of {case}: inference and training differ"
        assert torch.equal(t, kept[name]), f"{name} of {case}: differs with recompute=False"
