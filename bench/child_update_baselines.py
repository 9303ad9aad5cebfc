"""What the ChildTuning step is measured against: PyTorch's AdamW, the usual ways to mask its gradient, the original."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pykernels import ChildTuningAdamW

RESERVE_P = 0.3
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}


@dataclass(frozen=True)
class Shape:
    """How many parameters, in how many tensors of one size."""

    parameters: int
    tensors: int

    @property
    def name(self) -> str:
        return f"{self.parameters // 1_000_000} M in {self.tensors}"


@dataclass
class Problem:
    """Parameters with gradients, random masks, and dense moments that all dense variants share, which saves memory."""

    shape: Shape
    dtype: torch.dtype
    device: str = "cpu"
    params: list[Tensor] = field(init=False)
    masks: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(42)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        size = self.shape.parameters // self.shape.tensors
        self.params, self.masks = [], []
        for _ in range(self.shape.tensors):
            p = torch.randn(size, **options).to(self.dtype).requires_grad_()
            p.grad = torch.randn(size, **options).to(self.dtype)
            self.params.append(p)
            self.masks.append(torch.rand(size, **options) < RESERVE_P)

    def ours(self, mode: str, **options: Any) -> ChildTuningAdamW:
        masks = dict(zip(self.params, self.masks, strict=True)) if mode == "D" else None
        return ChildTuningAdamW(self.params, mode=mode, reserve_p=RESERVE_P, masks=masks, **OPTIONS, **options)

    def torch_adamw(self, **options: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.params, **OPTIONS, **options)


def sharing(optimizers: list[Any]) -> None:
    """One step each, then the moments of the first for all: sizes are the same, and values do not matter."""
    for optimizer in optimizers:
        optimizer.step()
        for p, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].dtype == optimizers[0].state[p][name].dtype:
                    state[name] = optimizers[0].state[p][name]


def bernoulli_then(step: Callable[[], Any], params: list[Tensor]) -> Callable[[], None]:
    """The usual way: mask every gradient, then the plain step. The gradient is put back, as each step has a new one."""

    def run() -> None:
        grads = [p.grad for p in params]
        for p in params:
            p.grad = p.grad * torch.bernoulli(torch.full_like(p, RESERVE_P)) / RESERVE_P
        step()
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad

    return run


def original_step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], t: int = 10
) -> None:
    """The formula of the original's optimizer, mode F, in the operations that it uses."""
    lr, decay, beta1, beta2, eps = OPTIONS["lr"], OPTIONS["weight_decay"], 0.9, 0.999, 1e-6
    size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = g * (torch.bernoulli(torch.full_like(g, RESERVE_P)) / RESERVE_P)
        m.mul_(beta1).add_(g, alpha=1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        p.addcdiv_(m, v.sqrt().add_(eps), value=-size)
        p.add_(p, alpha=-lr * decay)


def state_bytes(optimizer: Any) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
