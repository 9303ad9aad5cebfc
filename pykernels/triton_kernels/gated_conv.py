"""gated_conv1d forward: value and gate columns of the same outputs in one program, taps as rows loaded with a shift.

A program has BLOCK_M output rows and BLOCK_N outputs, whose values and gates it accumulates side by side. Backward is
in gated_conv_bwd.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import random_bits
from .._checks import check_gated_conv1d
from . import philox, rows
from .activation import sigmoid, tanh
from .launch import on_device, seed_words
from .tuning import autotuned, precision_of, size_key

NONE, DROPOUT, NOISE = (tl.constexpr(i) for i in range(3))  # what gate logits are multiplied with
HIGHWAY, ADD, PLAIN = (tl.constexpr(i) for i in range(3))
RESIDUALS = {"highway": HIGHWAY.value, "add": ADD.value, "none": PLAIN.value, "glu": PLAIN.value}

# --- kernels ---


@triton.jit
def random_factors(seed_low, seed_high, threshold, random_scale, row, column, c_out, RANDOM: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """What the gate logits of ROWS rows and COLUMNS columns from `column` on are multiplied with."""
    draws = philox.activation_draws(seed_low, seed_high, row, column, c_out, ROWS, COLUMNS)
    if RANDOM == DROPOUT:
        return philox.dropout_factors(draws, threshold, random_scale)
    return philox.noise_factors(draws, random_scale)


@autotuned(
    (128, 64, 64, 8, 3), (128, 32, 64, 4, 4), (64, 64, 64, 8, 3), (64, 32, 64, 4, 4), (64, 32, 128, 8, 3),
)  # fmt: skip
@triton.jit(do_not_specialize=[
    "x_rows", "x_length", "out_rows", "out_length", "taps", "dilation", "left", "shift", "seed_low", "seed_high",
    "threshold", "random_scale", "save", "size_key",
])  # fmt: skip
def gated_conv_forward(
    x, x_sequence, x_row, x_column, packed, width,
    value_bias, gate_bias, value_cond, gate_cond, cond_sequence, cond_row, cond_column,
    bounds, mask, sequence_of_row, x_rows, x_length, y, saved, out_rows, out_length,
    c_in, c_out, taps, dilation, left, shift, seed_low, seed_high, threshold, random_scale, save, size_key,
    ROWS: tl.constexpr, RESIDUAL: tl.constexpr, TANH: tl.constexpr, RANDOM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    BLOCK_K: tl.constexpr = BLOCK_BYTES * 8 // x.dtype.element_ty.primitive_bitwidth
    column_tiles = tl.cdiv(c_out, BLOCK_N)
    tile = tl.program_id(0)
    row = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column0 = tile % column_tiles * BLOCK_N
    column = column0 + tl.arange(0, BLOCK_N)
    inside = row < out_rows
    sequence, t, first, live = rows.place_of(
        row, inside, out_length, bounds, sequence_of_row, x_rows, x_length, ROWS
    )
    present = rows.exists(t + shift, inside, sequence, live, mask, x_length, ROWS)
    wide_sequence = sequence.to(tl.int64)

    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(c_in, BLOCK_K)
    steps = tl.where(tl.max(present.to(tl.int32), 0) > 0, taps * blocks, 0)
    for step in range(0, steps):
        tap = step // blocks
        inner = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        read = t + rows.tap_offset(tap, dilation, left, x_rows)
        there = rows.exists(read, present, sequence, live, mask, x_length, ROWS)
        from_x = x + (wide_sequence * x_sequence + (first + read).to(tl.int64) * x_row)
        x_tile = tl.load(
            from_x[:, None] + (inner.to(tl.int64) * x_column)[None, :],
            mask=there[:, None] & (inner < c_in)[None, :],
            other=0.0,
        )
        from_packed = packed + (tap * c_in + inner).to(tl.int64) * (2 * width)
        at = from_packed[:, None] + column[None, :]
        in_packed = (inner < c_in)[:, None] & (column < width)[None, :]
        value = tl.dot(x_tile, tl.load(at, mask=in_packed, other=0.0), value, input_precision=PRECISION)
        gate = tl.dot(x_tile, tl.load(at + width, mask=in_packed, other=0.0), gate, input_precision=PRECISION)

    columns = column < c_out
    keep = present[:, None] & columns[None, :]
    wide_column, line = column.to(tl.int64), (first + t).to(tl.int64)
    if value_bias is not None:
        value += tl.load(value_bias + column, mask=columns, other=0.0).to(tl.float32)[None, :]
    if gate_bias is not None:
        gate += tl.load(gate_bias + column, mask=columns, other=0.0).to(tl.float32)[None, :]
    if value_cond is not None:
        at = (wide_sequence * cond_sequence + line * cond_row)[:, None] + (wide_column * cond_column)[None, :]
        value += tl.load(value_cond + at, mask=keep, other=0.0).to(tl.float32)
        gate += tl.load(gate_cond + at, mask=keep, other=0.0).to(tl.float32)
    if RANDOM != NONE:
        gate *= random_factors(
            seed_low, seed_high, threshold, random_scale, row, column0, c_out, RANDOM, BLOCK_M, BLOCK_N
        )
    g = sigmoid(gate)
    if TANH:
        value = tanh(value)

    out = row.to(tl.int64)[:, None] * c_out + column[None, :]
    stored = inside[:, None] & columns[None, :]
    element = y.dtype.element_ty
    if save:
        tl.store(saved + out, tl.where(keep, value, 0.0).to(element), mask=stored)
        tl.store(saved + out_rows.to(tl.int64) * c_out + out, tl.where(keep, g, 0.0).to(element), mask=stored)
    result = value * g
    if RESIDUAL != PLAIN:
        from_x = x + (wide_sequence * x_sequence + (line + shift) * x_row)
        residual = tl.load(from_x[:, None] + (wide_column * x_column)[None, :], mask=keep, other=0.0).to(tl.float32)
        if RESIDUAL == HIGHWAY:
            result = residual + g * (value - residual)
        else:
            result += residual
    tl.store(y + out, tl.where(keep, result, 0.0).to(element), mask=stored)


# --- launches ---


class Call(NamedTuple):
    """One call of gated_conv1d as the kernels see it, sizes by name as in their arguments."""

    x: Tensor
    batch: rows.Batch
    c_in: int
    c_out: int
    width: int  # of the halves of packed weights: c_out rounded up, so that rows are aligned
    taps: int
    dilation: int
    left: int
    shift: int
    out_shape: tuple[int, ...]
    out_rows: int
    out_length: int  # rows of each sequence of a padded output; 0 for packed rows
    split: str
    residual: int
    tanh: bool
    seed_low: int
    seed_high: int
    random: int
    threshold: int
    random_scale: float

    def halves(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The value's and the gate's columns, of the last dimension or of the only one."""
        a, b = t[..., : self.c_out], t[..., self.c_out :]
        return (a, b) if self.split == "value_gate" else (b, a)

    def lines(self, t: Tensor) -> tuple[int, int, int]:
        """Strides of a tensor like x, or like a cond of one row a sequence: from sequence to sequence, row to row and
        column to column. Packed rows are counted through all sequences."""
        if t.dim() == 2:
            return 0, t.stride(0), t.stride(1)
        return t.stride(0), 0 if t.shape[1] == 1 else t.stride(1), t.stride(2)


def call_of(x, weight, bias, gate_weight, gate_bias, cond, mask, lengths, cu_seqlens, seed, dilation, padding, residual,
            value_act, split, gate_dropout, gate_noise) -> Call:  # fmt: skip
    """Checks the arguments of the raw operators, which are those of pykernels._checks.check_gated_conv1d."""
    told = rows.checkable(mask, lengths, cu_seqlens)
    shape = check_gated_conv1d(
        x, weight, bias, gate_weight, gate_bias, cond, told[0], told[1], told[2], seed, dilation, padding, residual,
        value_act, split, gate_dropout, gate_noise,
    )  # fmt: skip
    c_out, taps = shape[-1], weight.shape[2]
    reach = dilation * (taps - 1)
    bits = 0
    threshold, scale, random = 0, 0.0, NONE.value
    if gate_dropout or gate_noise:
        bits = seed.item()
        if gate_dropout:
            random, threshold = DROPOUT.value, random_bits.keep_threshold(1.0 - gate_dropout)
            scale = 65536 / threshold
        else:
            random, scale = NOISE.value, float(gate_noise)
    seed_low, seed_high = seed_words(bits)
    return Call(
        x=x,
        batch=rows.batch_of(x, mask, lengths, cu_seqlens),
        c_in=x.shape[-1],
        c_out=c_out,
        width=width_of(c_out),
        taps=taps,
        dilation=dilation,
        left={"same": reach // 2, "causal": reach, "valid": 0}[padding],
        shift=reach if padding == "valid" else 0,
        out_shape=shape,
        out_rows=shape[0] if cu_seqlens is not None else shape[0] * shape[1],
        out_length=0 if cu_seqlens is not None else shape[1],
        split=split,
        residual=RESIDUALS[residual],
        tanh=value_act == "tanh",
        seed_low=seed_low,
        seed_high=seed_high,
        random=random,
        threshold=threshold,
        random_scale=scale,
    )


def width_of(c_out: int) -> int:
    """c_out rounded up, so that all rows are aligned to 16 bytes."""
    return triton.cdiv(c_out, 16) * 16


def pack(weight: Tensor, gate_weight: Tensor | None, split: str) -> Tensor:
    """_gated_conv_pack_triton: rows of value outputs and of gate outputs, [taps, c_in, 2, width], as bytes."""
    if weight.dim() != 3:
        raise ValueError(f"weight: expected [2 * C_out, C_in, K], got shape {list(weight.shape)}")
    c_out = weight.shape[0] // (2 if gate_weight is None else 1)
    value, gate = weight[:c_out], weight[c_out:] if gate_weight is None else gate_weight
    if gate_weight is None and split == "gate_value":
        value, gate = gate, value
    packed = weight.new_zeros(weight.shape[2], weight.shape[1], 2, width_of(c_out))
    packed[:, :, 0, :c_out] = value.permute(2, 1, 0)
    packed[:, :, 1, :c_out] = gate.permute(2, 1, 0)
    return packed.flatten().view(torch.uint8)


def packed_of(call: Call, weight: Tensor, gate_weight: Tensor | None, packed: Tensor | None = None) -> Tensor:
    """The weights as kernels read them, packed now unless they are given."""
    if packed is None:
        packed = pack(weight, gate_weight, call.split)
    elements = call.taps * call.c_in * 2 * call.width
    wanted = (torch.uint8, (elements * weight.element_size(),), weight.device)
    if (packed.dtype, tuple(packed.shape), packed.device) != wanted:
        raise RuntimeError("packed: made for other weights, another backend or device: call prepack() again")
    return packed.view(weight.dtype)


def launch_forward(call: Call, weight, bias, gate_weight, gate_bias, cond, packed, saved: Tensor | None) -> Tensor:
    """y; v and g into `saved` [2, ...] where it is given."""
    y = call.x.new_empty(call.out_shape)
    if y.numel() == 0:
        return y
    value_cond = gate_cond = None
    cond_lines = (0, 0, 0)
    if cond is not None:
        value_cond, gate_cond = call.halves(cond)
        cond_lines = call.lines(cond)
    if gate_weight is None:
        value_bias, gate_bias = (None, None) if bias is None else call.halves(bias.contiguous())
    else:
        value_bias = None if bias is None else bias.contiguous()
        gate_bias = None if gate_bias is None else gate_bias.contiguous()

    def grid(config: dict) -> tuple[int]:
        return (triton.cdiv(call.out_rows, config["BLOCK_M"]) * triton.cdiv(call.c_out, config["BLOCK_N"]),)

    gated_conv_forward[grid](
        call.x, *call.lines(call.x), packed_of(call, weight, gate_weight, packed), call.width,
        value_bias, gate_bias, value_cond, gate_cond, *cond_lines,
        *call.batch.arguments(), y, y if saved is None else saved, call.out_rows, call.out_length,
        call.c_in, call.c_out, call.taps, call.dilation, call.left, call.shift,
        call.seed_low, call.seed_high, call.threshold, call.random_scale, int(saved is not None),
        size_key(call.out_rows, call.c_in, call.c_out),
        ROWS=call.batch.kind, RESIDUAL=call.residual, TANH=call.tanh, RANDOM=call.random,
        PRECISION=precision_of(call.x.dtype),
    )  # fmt: skip
    return y


def forward(x, weight, bias, gate_weight, gate_bias, cond, mask, lengths, cu_seqlens, seed, packed, dilation, padding,
            residual, value_act, split, gate_dropout, gate_noise, save) -> tuple[Tensor, Tensor]:  # fmt: skip
    """_gated_conv_fwd_triton: y, and v and g in one tensor (empty unless save)."""
    with on_device(x):
        call = call_of(
            x, weight, bias, gate_weight, gate_bias, cond, mask, lengths, cu_seqlens, seed, dilation, padding,
            residual, value_act, split, gate_dropout, gate_noise,
        )  # fmt: skip
        saved = x.new_empty((2, *call.out_shape) if save else (0,))
        kept = saved if save else None
        return launch_forward(call, weight, bias, gate_weight, gate_bias, cond, packed, kept), saved
