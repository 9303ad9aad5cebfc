"""What the tests of ChildTuning's optimizers share: parameters, gradients, steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import ChildTuningAdamW, ChildTuningSGD
from pykernels.random_bits import keep_threshold

# Around vectors, bytes of bits, draws at a time, blocks and units of work; none at all.
SIZES = ((1,), (7,), (0, 3), (17,), (8, 64), (3, 171), (4095,), (5, 820), (66, 1000))


def parameters(dtype: torch.dtype = torch.float32, sizes: Any = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def gradients(params: list[Tensor], t: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + t)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def masks_for(params: list[Tensor], p: float = 0.3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(12)
    return [torch.rand(t.shape, generator=generator) < p for t in params]


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], first: int, last: int) -> None:
    for t in range(first, last):
        for p, grad in zip(params, gradients(params, t), strict=True):
            p.grad = grad
        optimizer.step()


def make(kind: str, params: list[Tensor], **options: Any) -> Any:
    """kind: "adamw" or "sgd", with momentum."""
    if kind == "sgd":
        return ChildTuningSGD(params, **{"lr": 0.05, "momentum": 0.9, **options})
    return ChildTuningAdamW(params, **{"lr": 0.01, "weight_decay": 0.1, **options})


def with_masks(params: list[Tensor], masks: list[Tensor]) -> dict[Tensor, Tensor]:
    return dict(zip(params, masks, strict=True))


def drawn_by_a_step(numel: int, p: float, seed: int, stream: int, done: int, runs: Tensor | None = None) -> Tensor:
    """Which elements the compiled step keeps: with gradients 1 and lr 1, SGD's update is the factor of each element."""
    w, grad = torch.zeros(numel), torch.ones(numel)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    torch.ops.pykernels._child_sgd_(
        [w], [grad], [], [torch.tensor(float(done))], [None], [runs], [stream], None, None, None, one, zero,
        0.0, 0.0, False, p, 0.0, seed, "grad", "all", False, False,
    )  # fmt: skip
    scale = torch.tensor(65536 / keep_threshold(p))
    assert ((w == 0) | (w == -scale)).all()
    return w != 0
