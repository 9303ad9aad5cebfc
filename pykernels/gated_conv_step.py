"""gated_conv1d_step: gated_conv1d of a causal sequence that arrives in chunks.

A state is the S = dilation * (K - 1) rows before the next chunk. Where no gradients are recorded it is a view of a
longer buffer, and a step writes its rows behind the view instead of copying the state:

    buffer [B, capacity, C_in]:   ... | state: S rows | x: T rows | free
    the next state:                            | ...  S rows      |

A step writes no row of a state. Only one step may append to a state: the right to do so is taken once, and a second
step from the same state copies it. So does a step that finds too few free rows, into a buffer with S free ones: so T
rows a step are copied on average, however long the state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._checks import check_int, check_like, check_shape, check_tensor
from .gated_conv import gated_conv1d

# state -> [(buffer, row behind the state)], empty once a step has appended.
_rights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _take_right(state: Tensor, new: int) -> tuple[Tensor, int] | None:
    """The buffer of the state and the row behind it, if `new` rows may be written there."""
    try:
        buffer, end = _rights[state].pop()  # one bytecode, so that of two threads one gets it
    except (KeyError, IndexError):
        return None
    fits = end + new <= buffer.shape[1]
    writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
    return (buffer, end) if fits and writable else None


def _append(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of state and x one after the other, and their last S rows as the next state."""
    kept, new = state.shape[1], x.shape[1]
    right = _take_right(state, new)
    if right is None:
        end = kept
        buffer = x.new_empty(x.shape[0], 2 * kept + new, x.shape[2])
        buffer[:, :end] = state
    else:
        buffer, end = right
    # .data: rows that nobody has seen are no change of the states that share the buffer, which autograd may have saved.
    buffer.data[:, end : end + new] = x
    rows = buffer[:, end - kept : end + new]
    following = rows[:, new:]
    _rights[following] = [(buffer, end + new)]
    return rows, following


def gated_conv1d_step(
    x: Tensor,
    state: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dilation: int = 1,
    residual: str = "highway",
    value_act: str = "identity",
    split: str = "value_gate",
    cond: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The next chunk of a causal gated_conv1d: the chunks' outputs together are those of the whole sequence.

    Args:
        x: [B, T, C_in], the next T >= 0 rows.
        state: [B, dilation * (K - 1), C_in], the rows of x before these, as returned by the last step. None: zeros.
        cond: [B, 1 or T, 2 * C_out]. Everything else as in `gated_conv1d`.

    Returns (y [B, T, C_out], the next state). Equal bit for bit to the whole pass on the CPU kernels. The given state
    is not changed and may be used again. Where no gradients are recorded, steps do not copy the state: the next one is
    a view of a buffer of 2 * S + T rows, S those of a state, and shares rows with the given one. Clone it before
    changing it in place if the given one is still needed.

    Raises as `gated_conv1d` does.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    if x.dim() != 3 or weight.dim() != 3:
        name, t, wanted = ("x", x, "[B, T, C_in]") if x.dim() != 3 else ("weight", weight, "[2 * C_out, C_in, K]")
        raise ValueError(f"{name}: expected {wanted}, got shape {list(t.shape)}")
    check_int("dilation", dilation, 1)
    before = (x.shape[0], dilation * (weight.shape[2] - 1), x.shape[2])
    if state is None:
        state = x.new_zeros(before)
    check_like("state", state, x)
    check_shape("state", state, before)

    tensors = (x, state, weight, bias, gate_weight, gate_bias, cond)
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # Tracers and subclasses of tensors get what they can follow: operators without effects.
    if records or torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        rows = torch.cat([state, x], 1)
        following = rows[:, x.shape[1] :]
    else:
        rows, following = _append(state, x)
    y = gated_conv1d(
        rows, weight, bias, gate_weight=gate_weight, gate_bias=gate_bias, dilation=dilation, padding="valid",
        residual=residual, value_act=value_act, split=split, cond=cond, backend=backend,
    )  # fmt: skip
    return y, following
