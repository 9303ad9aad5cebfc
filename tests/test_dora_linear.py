"""dora_linear against its definition with the whole weight V, against PEFT's layer, and over dtypes and options."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels import dora_linear, random_bits
from pykernels.dora_linear import dora_norm
from tests.helpers import FLOATS, FORWARD, GRADIENT, assert_close_to_reference, rounding_floor

SIZES = [(5, 7, 9, 2), (1, 33, 17, 4), (40, 64, 40, 8), (3, 16, 8, 0), (0, 4, 5, 1)]


def tensors(
    size: tuple[int, int, int, int], dtype: torch.dtype, adapter: torch.dtype | None = None
) -> dict[str, Tensor]:
    M, K, N, R = size
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    weight = normal(N, K, scale=K**-0.5)
    return {
        "x": normal(M, K),
        "weight": weight,
        "lora_a": normal(R, K, scale=K**-0.5, dtype=adapter or dtype),
        "lora_b": normal(N, R, scale=0.5, dtype=adapter or dtype),
        "magnitude": (weight.float().norm(dim=1) + 0.3 * normal(N).float().abs()).to(adapter or dtype),
        "bias": normal(N),
    }


def definition(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, bias: Tensor, factors: Tensor | None
) -> Tensor:
    """With the whole weight; factors are those of dropout."""
    m = magnitude / (weight + 1.5 * lora_b @ lora_a).detach().norm(dim=1)
    if factors is None:
        return (F.linear(x, weight) + F.linear(F.linear(x, lora_a), lora_b) * 1.5) * m + bias
    d = x * factors
    change = (m - 1) * F.linear(d, weight) + m * F.linear(F.linear(d, lora_a), lora_b) * 1.5
    return F.linear(x, weight, bias) + change.to(x.dtype)


def evaluate(call: Any, given: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    y = call(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_definition(size: tuple[int, int, int, int], dtype: str, dropout: float, backend: str) -> None:
    """Output and gradients by the error rule; |V| comes without V."""
    given = tensors(size, FLOATS[dtype])
    M, K, N, _ = size
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(4)).to(FLOATS[dtype])
    factors = random_bits.dropout_factors(random_bits.draws16(torch.tensor(11), M, K), dropout) if dropout else None
    cast = None if factors is None else factors.to(FLOATS[dtype])
    same = evaluate(lambda **t: definition(**t, factors=cast), given, dy)
    exact = evaluate(
        lambda **t: definition(**t, factors=factors), {n: t.double() for n, t in given.items()}, dy.double()
    )
    got = evaluate(
        lambda **t: dora_linear(**t, scale=1.5, dropout=dropout, training=True, seed=11, backend=backend), given, dy
    )
    for name, t in got.items():
        floor = rounding_floor(exact[name], t.dtype, K + M + N, scale=(K + M + N) ** 0.5)
        factor = GRADIENT if name.startswith("d") else FORWARD
        # PyTorch rounds the norm of V from a V that is rounded itself, ours from three sums.
        assert_close_to_reference(t, exact[name], same[name], factor=factor, floor=2 * floor, what=f"{name} {size}")


def test_norm_of_rows_that_the_adapter_cancels() -> None:
    """Rounding may leave less than nothing of |V|^2: the norm is then zero, not NaN."""
    a = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    b = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    norm = dora_norm(-b @ a, a, b)
    assert torch.isfinite(norm).all() and norm.max() < 1e-2


def test_norm_of_a_16_bit_weight_is_that_of_float32() -> None:
    weight = torch.randn(1100, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    a, b = torch.randn(3, 48), torch.randn(1100, 3)
    expected = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(dora_norm(weight, a, b, 0.5).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("training", [False, True])
def test_equals_peft(training: bool, backend: str) -> None:
    """PEFT's own layer; where it drops, with the bits that it drew."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    base = torch.nn.Linear(24, 20)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5 if training else 0.0, use_dora=True)
    layer = Linear(base, "default", config=config, r=4, lora_alpha=6, lora_dropout=config.lora_dropout, use_dora=True)
    layer.lora_B["default"].weight.data.normal_()
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data.mul_(1.3)
    x = torch.randn(6, 24)
    parameters = {
        "weight": base.weight,
        "bias": base.bias,
        "lora_a": layer.lora_A["default"].weight,
        "lora_b": layer.lora_B["default"].weight,
        "magnitude": magnitude,
    }
    wanted = [parameters[n] for n in ("lora_a", "lora_b", "magnitude")]
    if training:
        dropped = x * random_bits.dropout_factors(random_bits.draws16(torch.tensor(2), 6, 24), 0.5)
        layer.lora_dropout["default"].forward = lambda _: dropped
    expected = layer.train(training)(x)
    got = dora_linear(x, **parameters, scale=1.5, dropout=0.5, training=training, seed=2, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compiles_as_one_graph(extension: object) -> None:
    given = tensors((5, 8, 6, 2), torch.float32)
    compiled = torch.compile(dora_linear, fullgraph=True, backend="aot_eager")
    for options in ({}, {"dropout": 0.5, "training": True, "seed": 3}):
        torch.testing.assert_close(compiled(**given, **options), dora_linear(**given, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"magnitude": torch.ones(5)}, ValueError, r"^magnitude: expected shape \[6\], got \[5\]"),
        ({"magnitude": 1.0}, TypeError, "^magnitude: expected a tensor, got float"),
        ({"lora_a": torch.ones(2, 7)}, ValueError, "^lora_a: expected"),
        ({"lora_a": torch.ones(2, 7), "dropout": 0.5, "training": True}, ValueError, "^lora_a: expected"),
        ({"dropout": 1.0}, ValueError, "^dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"scale": "2"}, TypeError, "^scale: expected a float, got str"),
    ],
)
def test_errors(changed: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dora_linear(**(tensors((5, 8, 6, 2), torch.float32) | changed))
