"""Weights of the article's Keras code in PyTorch's layouts."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_first_to_value_first(kernel: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A block of https://kexue.fm/archives/6671 for `GatedConv1d`: kernel [K, C, 2C] -> weight [2C, C, K], bias [2C].

    There the gate's half z comes first, and y = x * s + c * (1 - s) with s = sigmoid(z). Ours is the value's half
    first, and y = x * (1 - g) + c * g with g = sigmoid(of our logits). Since 1 - sigmoid(z) = sigmoid(-z), the halves
    are swapped and the gate's is negated. Dropout of the logits commutes with that.
    """
    gate, value = kernel.permute(2, 1, 0).chunk(2)
    gate_bias, value_bias = bias.chunk(2)
    return torch.cat([value, -gate]), torch.cat([value_bias, -gate_bias])


def gru_from_keras(kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """One direction of torch.nn.GRU: {"weight_ih": [3U, N], "weight_hh": [3U, U], "bias_ih": [3U], "bias_hh": [3U]}.

    kernel [N, 3U], recurrent_kernel [U, 3U] and bias [2, 3U] (of the input, of the recurrence) are those of a Keras GRU
    with reset_after=True, whose gates are z, r, n; PyTorch's are r, z, n.
    """

    def reordered(columns: Tensor) -> Tensor:
        z, r, n = columns.t().chunk(3)  # t() leaves vectors alone
        return torch.cat([r, z, n])

    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    return dict(zip(names, map(reordered, (kernel, recurrent_kernel, *bias)), strict=True))


def gru_from_cudnn(kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The same from a Keras CuDNNGRU as it is saved: kernel [N, 3U], recurrent_kernel [U, 3U], bias [6U].

    There each gate's square block is stored as cuDNN wants it: the recurrent one transposed, the input one transposed
    and then read as [N, U] again.
    """
    N = kernel.shape[0]
    inputs = torch.cat([gate.reshape(-1, N).T for gate in kernel.chunk(3, 1)], 1)
    recurrent = torch.cat([gate.T for gate in recurrent_kernel.chunk(3, 1)], 1)
    return gru_from_keras(inputs, recurrent, bias.reshape(2, -1))
