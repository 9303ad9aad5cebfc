"""Checks that operators share: TypeError for types and dtypes, ValueError for values, each with the argument's name,
what was expected and what came. The C++ operators make the same checks in the same words; here they serve the reference
backend and shape inference. Checks that must look at data are left out while PyTorch traces without data.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ._backend import FLOATS


def words(choices: Sequence[object]) -> str:
    return ", ".join(map(repr, choices))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_floating(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected {', '.join(map(name_of, FLOATS))}, got {name_of(t.dtype)}")


def check_like(name: str, t: Tensor | None, x: Tensor) -> None:
    """The dtype and device of x."""
    if t is None:
        return
    check_tensor(name, t)
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: expected {name_of(x.dtype)} like x, got {name_of(t.dtype)}")
    check_device(name, t, x)


def check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like x, got {t.device}")


def check_shape(name: str, t: Tensor | None, shape: Sequence[int]) -> None:
    if t is not None and tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {words(choices)}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {words(choices)}, got {value!r}")


def check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int >= {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected >= {least}, got {value}")


def has_data(t: Tensor) -> bool:
    """Whether values may be looked at: not while they are being traced, and not on the meta device."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or t.is_meta or isinstance(t, FakeTensor))


def check_indices(name: str, t: Tensor, count: int | None) -> None:
    """1-D int32 or int64 [count]; None for B + 1 where B is not known otherwise."""
    check_tensor(name, t)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {name_of(t.dtype)}")
    if t.dim() != 1 or (count is not None and t.shape[0] != count):
        raise ValueError(f"{name}: expected shape [{'B + 1' if count is None else count}], got {list(t.shape)}")


def check_live_rows(x: Tensor, mask: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Which rows exist: of x [B, L, ...] by mask [B, L] or lengths [B]; of packed x [T, ...] by cu_seqlens [B + 1]."""
    if (mask is not None) + (lengths is not None) + (cu_seqlens is not None) > 1:
        raise ValueError("mask, lengths, cu_seqlens: expected at most one of them, got several")
    if mask is not None:
        check_tensor("mask", mask)
        if mask.is_floating_point() or mask.is_complex():
            wanted = "bool or 0/1 integers (True = keep; additive masks are not accepted)"
            raise TypeError(f"mask: expected {wanted}, got {name_of(mask.dtype)}")
        check_shape("mask", mask, x.shape[:2])
        if mask.dtype != torch.bool and has_data(mask) and not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask: expected only 0 and 1, got other integers")
    if lengths is not None:
        check_indices("lengths", lengths, x.shape[0])
        if has_data(lengths) and not ((lengths >= 0) & (lengths <= x.shape[1])).all():
            raise ValueError(f"lengths: expected values from 0 to L = {x.shape[1]}, got {lengths.tolist()}")
    if cu_seqlens is not None:
        check_indices("cu_seqlens", cu_seqlens, None)
        if has_data(cu_seqlens):
            bounds = cu_seqlens.tolist()
            if not bounds or bounds[0] != 0 or bounds[-1] != x.shape[0] or bounds != sorted(bounds):
                raise ValueError(
                    f"cu_seqlens: expected non-decreasing row numbers from 0 to T = {x.shape[0]}, got {bounds}"
                )


# --- gated_conv1d ---

PADDINGS = ("same", "causal", "valid")
RESIDUALS = ("highway", "add", "none", "glu")
VALUE_ACTS = ("identity", "tanh")
SPLITS = ("value_gate", "gate_value")


def check_float(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")


def check_dropout(name: str, value: float) -> None:
    check_float(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")
    if value > 0 and math.floor((1 - value) * 65536 + 0.5) == 0:
        raise ValueError(f"{name}: {value} keeps fewer than one element in 65536")


def check_gate_random(gate_dropout: float, gate_noise: float) -> None:
    check_dropout("gate_dropout", gate_dropout)
    check_float("gate_noise", gate_noise)
    if not 0 <= gate_noise < math.inf:
        raise ValueError(f"gate_noise: expected a finite amplitude >= 0, got {gate_noise}")
    if gate_dropout and gate_noise:
        raise ValueError("gate_dropout, gate_noise: expected at most one of them, got both")


def check_form(dilation: int, padding: str, residual: str, value_act: str, split: str) -> None:
    check_choice("residual", residual, RESIDUALS)
    check_choice("value_act", value_act, VALUE_ACTS)
    check_choice("split", split, SPLITS)
    check_choice("padding", padding, PADDINGS)
    check_int("dilation", dilation, 1)


def check_residual(residual: str, c_in: int, c_out: int) -> None:
    if residual in ("highway", "add") and c_in != c_out:
        raise ValueError(
            f"residual: expected 'none' where C_in != C_out, got {residual!r} with C_in = {c_in} and C_out = {c_out}"
        )


def check_gated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    cond: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    dilation: int,
    padding: str,
    residual: str,
    value_act: str,
    split: str,
    gate_dropout: float,
    gate_noise: float,
) -> tuple[int, ...]:
    """Raises what the C++ operator raises for the same arguments. Returns the shape of the output."""
    check_form(dilation, padding, residual, value_act, split)
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_floating("x", x)
    packed_rows = cu_seqlens is not None
    if x.dim() != (2 if packed_rows else 3):
        wanted = "[T, C_in] with cu_seqlens" if packed_rows else "[B, L, C_in]"
        raise ValueError(f"x: expected {wanted}, got shape {list(x.shape)}")
    optional = {"bias": bias, "gate_weight": gate_weight, "gate_bias": gate_bias, "cond": cond}
    for name, t in {"weight": weight, **optional}.items():
        check_like(name, t, x)

    outputs = "2 * C_out" if gate_weight is None else "C_out"
    if weight.dim() != 3 or weight.shape[2] < 1:
        raise ValueError(f"weight: expected [{outputs}, C_in, K] with K >= 1, got shape {list(weight.shape)}")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected C_in = {x.shape[-1]} like x, got shape {list(weight.shape)}")
    if gate_weight is None and weight.shape[0] % 2:
        raise ValueError(
            f"weight: expected an even number of outputs (value and gate half), got shape {list(weight.shape)}"
        )
    c_out = weight.shape[0] // (2 if gate_weight is None else 1)
    check_shape("gate_weight", gate_weight, weight.shape)
    check_shape("bias", bias, weight.shape[:1])
    if gate_weight is None and gate_bias is not None:
        raise ValueError("gate_bias: expected None without gate_weight, got a tensor")
    check_shape("gate_bias", gate_bias, (c_out,))
    check_residual(residual, weight.shape[1], c_out)
    check_live_rows(x, mask, lengths, cu_seqlens)
    reach = dilation * (weight.shape[2] - 1)
    shape = (*x.shape[:-1], c_out)
    if padding == "valid":
        if packed_rows:
            raise ValueError(
                "padding: expected 'same' or 'causal' with cu_seqlens (the output's length would depend on data), "
                "got 'valid'"
            )
        if x.shape[1] < reach:
            raise ValueError(
                f"padding: 'valid' expects at least dilation * (K - 1) = {reach} rows, got L = {x.shape[1]}"
            )
        shape = (x.shape[0], x.shape[1] - reach, c_out)
    if cond is not None:
        width = 2 * c_out
        if cu_seqlens is not None:
            fits = tuple(cond.shape) in ((x.shape[0], width), (cu_seqlens.shape[0] - 1, 1, width))
        else:
            fits = tuple(cond.shape) in ((x.shape[0], 1, width), (*shape[:2], width))
        if not fits:
            wanted = "[T, 2 * C_out] or [B, 1, 2 * C_out]" if packed_rows else "[B, 1 or L', 2 * C_out]"
            raise ValueError(f"cond: expected {wanted} with 2 * C_out = {width}, got shape {list(cond.shape)}")
    check_gate_random(gate_dropout, gate_noise)
    if (gate_dropout or gate_noise) and seed is None:
        raise ValueError("seed: expected a 0-d int64 tensor with gate_dropout or gate_noise, got None")
    return shape


# --- attention_pool ---

ACTIVATIONS = ("tanh", "swish", "relu", "gelu")


def check_attention_pool(
    x: Tensor,
    weight: Tensor,
    query: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    return_scores: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Raises what the C++ operator raises for the same arguments. Returns the shapes of the output and of scores."""
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("return_scores", return_scores, ("none", "raw", "softmax"))
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_tensor("query", query)
    check_floating("x", x)
    packed_rows = cu_seqlens is not None
    if x.dim() != (2 if packed_rows else 3):
        wanted = "[T, D] with cu_seqlens" if packed_rows else "[B, L, D]"
        raise ValueError(f"x: expected {wanted}, got shape {list(x.shape)}")
    optional = {"bias": bias, "gate_weight": gate_weight, "gate_bias": gate_bias}
    for name, t in {"weight": weight, "query": query, **optional}.items():
        check_like(name, t, x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected [H, D] with D = {x.shape[-1]} like x, got shape {list(weight.shape)}")
    hidden = weight.shape[0]
    if query.dim() not in (1, 2) or query.shape[-1] != hidden:
        wanted = f"[H] or [J, H] with H = {hidden} like weight"
        raise ValueError(f"query: expected {wanted}, got shape {list(query.shape)}")
    check_shape("bias", bias, (hidden,))
    check_shape("gate_weight", gate_weight, weight.shape)
    if gate_weight is None and gate_bias is not None:
        raise ValueError("gate_bias: expected None without gate_weight, got a tensor")
    check_shape("gate_bias", gate_bias, (hidden,))
    check_live_rows(x, mask, lengths, cu_seqlens)
    heads = tuple(query.shape[:-1])
    if cu_seqlens is not None:
        return (cu_seqlens.shape[0] - 1, *heads, x.shape[1]), (*heads, x.shape[0])
    return (x.shape[0], *heads, x.shape[2]), (x.shape[0], *heads, x.shape[1])


# --- lora_linear ---


def check_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    adapter_index: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    look: bool = True,
) -> tuple[int, ...]:
    """Raises what the C++ operator raises for the same arguments. Returns the shape of the output.

    look: at the values of scales and adapter_index, for which a GPU is waited for.
    """
    for name, t in (("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        check_tensor(name, t)
    check_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected [..., K], got a 0-d tensor")
    check_like("weight", weight, x)
    check_like("bias", bias, x)
    width = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight: expected [N, K] with K = {width} like x, got shape {list(weight.shape)}")
    check_shape("bias", bias, weight.shape[:1])
    allowed = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if t.dtype not in allowed:
            wanted = f"{name_of(x.dtype)} like x" + ("" if x.dtype == torch.float64 else " or float32")
            raise TypeError(f"{name}: expected {wanted}, got {name_of(t.dtype)}")
        check_device(name, t, x)
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b: expected {name_of(lora_a.dtype)} like lora_a, got {name_of(lora_b.dtype)}")
    several = adapter_index is not None
    if lora_a.dim() != (3 if several else 2) or lora_a.shape[-1] != width:
        wanted = "[E, R, K]" if several else "[R, K]"
        raise ValueError(f"lora_a: expected {wanted} with K = {width} like x, got shape {list(lora_a.shape)}")
    outputs, rank = weight.shape[0], lora_a.shape[-2]
    if tuple(lora_b.shape) != (*lora_a.shape[:-2], outputs, rank):
        wanted = "[E, N, R]" if several else "[N, R]"
        like = "R = {} (and E) like lora_a" if several else "R = {} like lora_a"
        raise ValueError(
            f"lora_b: expected {wanted} with N = {outputs} like weight and {like.format(rank)}, "
            f"got shape {list(lora_b.shape)}"
        )
    check_float("scale", scale)
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if scales is not None:
        if not scales.is_floating_point():
            raise TypeError(f"scale: expected a floating dtype, got {name_of(scales.dtype)}")
        check_device("scale", scales, x)
        check_shape("scale", scales, lora_a.shape[:1] if several else (1,))
        if look and has_data(scales) and not bool(scales.isfinite().all()):
            raise ValueError(f"scale: expected finite numbers, got {scales.tolist()}")
    if adapter_index is not None:
        check_adapter_index(adapter_index, x, lora_a.shape[0], look)
    check_dropout("dropout", dropout)
    if dropout and seed is None:
        raise ValueError("seed: expected a 0-d int64 tensor with dropout, got None")
    return (*x.shape[:-1], outputs)


def check_adapter_index(index: Tensor, x: Tensor, adapters: int, look: bool) -> None:
    check_tensor("adapter_index", index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter_index: expected int32 or int64, got {name_of(index.dtype)}")
    check_device("adapter_index", index, x)
    leading = x.shape[:-1]
    if tuple(index.shape) != tuple(leading[: index.dim()]):
        raise ValueError(
            f"adapter_index: expected a leading part of x's leading shape {list(leading)}, "
            f"got shape {list(index.shape)}"
        )
    if look and has_data(index) and bool(((index < -1) | (index >= adapters)).any()):
        wrong = index[(index < -1) | (index >= adapters)][0].item()
        raise ValueError(f"adapter_index: expected values from -1 to E - 1 = {adapters - 1}, got {wrong}")


def check_lora_linear_stacked(weights: Any, lora_a: Any, lora_b: Any, bias: Any, scale: Any) -> list[Any]:
    """As many of each; returns the four groups of tensors as lists, and the scales."""
    for name, group in (("weights", weights), ("lora_a", lora_a), ("lora_b", lora_b)):
        if isinstance(group, Tensor) or not isinstance(group, Sequence):
            raise TypeError(f"{name}: expected a sequence of tensors, got {type(group).__name__}")
        for i, t in enumerate(group):
            check_tensor(f"{name}[{i}]", t)
    count = len(weights)
    biases = [None] * count if bias is None else list(bias)
    for i, t in enumerate(biases):
        if t is not None:
            check_tensor(f"bias[{i}]", t)
    scales = [scale] * count if isinstance(scale, int | float) else list(scale)
    for name, group in (("lora_a", lora_a), ("lora_b", lora_b), ("bias", biases), ("scale", scales)):
        if len(group) != count:
            raise ValueError(f"{name}: expected {count} of them like weights, got {len(group)}")
    for factor in scales:
        check_float("scale", factor)
    return [list(weights), list(lora_a), list(lora_b), biases, [float(factor) for factor in scales]]
