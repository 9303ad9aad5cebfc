"""What the models are measured against: their gated convolutions and pooling as they are written in plain PyTorch.

Also the training step that both sides take. All else of a network is plain PyTorch in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import record_function

from pykernels import AttentionPool, GatedConv1d

# The names of a step's parts besides the network and its loss, for the profiler.
OPTIMIZER, AVERAGE = "optimizer", "average of the weights"


class EagerBlock(nn.Module):
    """A block of equal widths as it is written in plain PyTorch, with the weights of a GatedConv1d."""

    def __init__(self, block: GatedConv1d) -> None:
        super().__init__()
        outputs, D, taps = block.weight.shape
        self.conv = nn.Conv1d(D, outputs, taps, padding="same", dilation=block.dilation)
        self.conv.load_state_dict(block.state_dict())
        self.gate_dropout = block.gate_dropout

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        live = None if mask is None else mask.unsqueeze(-1)
        h = self.conv((x if live is None else x * live).transpose(1, 2)).transpose(1, 2)
        c, z = h.chunk(2, -1)
        g = torch.sigmoid(F.dropout(z, self.gate_dropout, self.training))
        y = x * (1 - g) + c * g
        return y if live is None else y * live


class EagerPool(nn.Module):
    """Attention pooling as it is written in plain PyTorch, with the weights of an AttentionPool."""

    def __init__(self, pool: AttentionPool) -> None:
        super().__init__()
        self.weight, self.query = pool.weight, pool.query

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        scores = torch.tanh(F.linear(x, self.weight)) @ self.query
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.bmm(torch.softmax(scores, 1).unsqueeze(1), x).squeeze(1)


def autocast(dtype: str) -> AbstractContextManager[object]:
    """What a model trains under; its weights are float32."""
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()


class Step:
    """Forward, loss, backward, optimizer and average, all in the weights' float32 but what autocast takes."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.model, self.loss = model.train(), loss
        self.optimizer = optimizer(model.parameters())
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.model).backward()
        with record_function(OPTIMIZER):
            self.optimizer.step()
        with record_function(AVERAGE):
            self.ema.update_parameters(self.model)
