"""Rectified Adam (Liu et al. 2020, arXiv 1908.03265) in the form that the article's models were trained with.

    m_hat = m / (1 - b1^t)     v_hat = v / (1 - b2^t)
    rho_inf = 2 / (1 - b2) - 1     rho = rho_inf - 2 t b2^t / (1 - b2^t)
    p -= lr m_hat                                     while rho <= 4
    p -= lr r m_hat / (sqrt(v_hat) + eps)             after,  r^2 = (rho - 4) (rho - 2) rho_inf
                                                                    / ((rho_inf - 4) (rho_inf - 2) rho)

torch.optim.RAdam differs: it stays with the plain step while rho <= 5, and adds eps before the bias correction.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RAdam(Optimizer):
    """Rectified Adam as above. All tensors of a step are updated together, by PyTorch's foreach kernels.

    lr, betas, eps (Keras' 1e-7) may differ between parameter groups. State: `step`, `exp_avg` and `exp_avg_sq` of each
    parameter; `optimizer.state.clear()` starts the moments and the step count anew. Sparse and complex gradients are
    refused, before any parameter has changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr: expected 0 or more, got {lr}")
        if not eps > 0:
            raise ValueError(f"eps: expected more than 0, got {eps}")
        # With beta2 below 0.6 rho_inf is below 4, and no step would ever be rectified.
        if not (0 <= betas[0] < 1 and 0.6 < betas[1] < 1):
            raise ValueError(f"betas: expected 0 <= beta1 < 1 and 0.6 < beta2 < 1, got {tuple(betas)}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients of all parameters that have one. Returns what closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Parameters that have taken as many steps, and lie together, share the foreach calls.
        batches: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse or p.grad.is_complex():
                    raise TypeError(f"params: expected dense real gradients, got {p.grad.layout} {p.grad.dtype}")
                count = int(self.state[p]["step"]) if p in self.state else 0
                batches[index, count + 1, p.device, p.dtype].append(p)
        for (index, t, _, _), params in batches.items():
            self._update(params, self.param_groups[index], t)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any], t: int) -> None:
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        for p in params:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] = torch.tensor(float(t))
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)

        correction1, correction2 = 1 - beta1**t, 1 - beta2**t
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / correction2
        if rho <= 4:
            torch._foreach_add_(params, first, alpha=-lr / correction1)
            return
        r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, math.sqrt(correction2))
        torch._foreach_add_(denominator, eps)
        torch._foreach_addcdiv_(params, first, denominator, value=-lr * r / correction1)
