"""lora_linear_stacked: what its projections give one by one, and one gradient of x for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import lora_linear, lora_linear_stacked
from tests.helpers import FLOATS, assert_equal

OUTPUTS, RANKS = (40, 70, 33), (4, 0, 3)
SCALES = [1.0, 2.0, 0.5]


def problem(rows: int, inputs: int, dtype: torch.dtype) -> dict[str, Any]:
    """x, and three projections of it; the second has no bias and rank 0."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()

    return {
        "x": normal(rows, inputs),
        "weights": [normal(n, inputs, scale=inputs**-0.5) for n in OUTPUTS],
        "lora_a": [normal(r, inputs, scale=inputs**-0.5) for r in RANKS],
        "lora_b": [normal(n, r) for n, r in zip(OUTPUTS, RANKS, strict=True)],
        "bias": [normal(OUTPUTS[0]), None, normal(OUTPUTS[2])],
    }


def leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    named = {"x": given["x"]}
    for name in ("weights", "lora_a", "lora_b", "bias"):
        named |= {f"{name}{i}": t for i, t in enumerate(given[name]) if t is not None}
    return named


def gradients(ys: Any, given: dict[str, Any], used: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(8)
    incoming = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
    named = leaves(given)
    grads = torch.autograd.grad(
        [ys[i] for i in used], list(named.values()), [incoming[i] for i in used], allow_unused=True
    )
    return dict(zip(named, grads, strict=True))


def one_by_one(given: dict[str, Any], **options: Any) -> list[Tensor]:
    x, *groups = given.values()
    return [
        lora_linear(x, w, a, b, bias=c, scale=scale, **options)
        for w, a, b, c, scale in zip(*groups, SCALES, strict=True)
    ]


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 65, 200])
@pytest.mark.parametrize("dtype", FLOATS)
def test_equals_its_projections(dtype: str, rows: int, kernels: str) -> None:
    """The same bits in outputs and gradients of parameters; dx is the sum, rounded at each projection."""
    given = problem(rows, 96, FLOATS[dtype])
    ys, expected = lora_linear_stacked(**given, scale=SCALES, backend=kernels), one_by_one(given, backend=kernels)
    for y, other in zip(ys, expected, strict=True):
        assert torch.equal(y, other)
    got, wanted = gradients(ys, given), gradients(expected, given)
    eps = torch.finfo(FLOATS[dtype]).eps
    torch.testing.assert_close(got.pop("x"), wanted.pop("x"), rtol=4 * eps, atol=16 * eps)
    assert_equal(got, wanted)


def test_more_weights_than_rows(kernels: str) -> None:
    """Column blocks of several projections in one share of work, rows a power of two apart."""
    given = problem(100, 1024, torch.float32)
    expected = one_by_one(given, backend=kernels)
    for y, other in zip(lora_linear_stacked(**given, scale=SCALES, backend=kernels), expected, strict=True):
        assert torch.equal(y, other)


@pytest.mark.parametrize("rows", [7, 90])
def test_dropout_of_each_projection_is_its_own(rows: int, backend: str) -> None:
    """Stream i of the seed's bits for number i: the definition's outputs and gradients, the first as lora_linear's."""
    options = {"scale": SCALES, "dropout": 0.4, "training": True, "seed": 5}
    given = problem(rows, 40, torch.float32)
    ys = lora_linear_stacked(**given, **options, backend=backend)
    expected = lora_linear_stacked(**given, **options, backend="reference")
    for y, other in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)
    got, wanted = gradients(ys, given), gradients(expected, given)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    first = lora_linear(
        given["x"], given["weights"][0], given["lora_a"][0], given["lora_b"][0],
        bias=given["bias"][0], scale=1.0, dropout=0.4, training=True, seed=5, backend=backend,
    )  # fmt: skip
    assert torch.equal(ys[0], first)
    third = one_by_one(given, dropout=0.4, training=True, seed=5, backend=backend)[2]
    assert not torch.equal(ys[2], third)


@pytest.mark.parametrize("used", [(0,), (2,), (0, 2)])
def test_results_that_are_not_used(used: tuple[int, ...], backend: str) -> None:
    """No gradient for parameters of projections that nobody used; dx of the others alone."""
    given = problem(20, 24, torch.float32)
    got = gradients(lora_linear_stacked(**given, scale=SCALES, backend=backend), given, used)
    wanted = gradients(one_by_one(given, backend=backend), given, used)
    assert {n for n, g in got.items() if g is None} == {n for n, g in wanted.items() if g is None}
    for name, g in got.items():
        if g is not None:
            torch.testing.assert_close(g, wanted[name], rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_threads(kernels: str) -> None:
    given = problem(300, 64, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ys = lora_linear_stacked(**given, scale=SCALES, dropout=0.1, training=True, seed=1, backend=kernels)
        results.append({f"y{i}": y for i, y in enumerate(ys)} | gradients(ys, given))
    for result in results[1:]:
        assert_equal(results[0], result)


def test_numerical_derivatives(extension: object) -> None:
    given = problem(4, 5, torch.float64)
    names = list(leaves(given))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        of = dict(zip(names, tensors, strict=True))
        groups = {g: [of.get(f"{g}{i}") for i in range(3)] for g in ("weights", "lora_a", "lora_b", "bias")}
        return lora_linear_stacked(of["x"], **groups, scale=SCALES, dropout=0.3, training=True, seed=2, backend="cpu")

    assert torch.autograd.gradcheck(call, tuple(leaves(given).values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves(given).values()))


def test_raw_operators(extension: object) -> None:
    x, *groups = problem(6, 8, torch.float32).values()
    x = x.detach()
    groups = [[t if t is None else t.detach() for t in group] for group in groups]
    forward = (x, *groups, torch.tensor(3), SCALES, 0.25)
    torch.library.opcheck(torch.ops.pykernels._lora_linear_stacked_fwd.default, forward)
    results = torch.ops.pykernels._lora_linear_stacked_fwd(*forward)
    dys = [torch.randn_like(results[0]), None, torch.randn_like(results[6])]
    saved = [t for i, t in enumerate(results) if i % 3]
    backward = (dys, x, *groups, torch.tensor(3), saved, SCALES, 0.25, [True] * 13)
    torch.library.opcheck(torch.ops.pykernels._lora_linear_stacked_bwd.default, backward)


def test_compiles_as_one_graph(backend: str) -> None:
    given = problem(21, 16, torch.float32)
    compiled = torch.compile(lora_linear_stacked, fullgraph=True, backend="aot_eager")
    options = {"scale": SCALES, "dropout": 0.5, "training": True, "seed": 3, "backend": backend}
    for y, other in zip(compiled(**given, **options), lora_linear_stacked(**given, **options), strict=True):
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weights": torch.ones(3, 40, 16)}, TypeError, "^weights: expected a sequence of tensors, got Tensor"),
        ({"lora_a": []}, ValueError, "^lora_a: expected 3 of them like weights, got 0"),
        ({"scale": [1.0]}, ValueError, "^scale: expected 3 of them like weights, got 1"),
        ({"bias": [None, None, 3]}, TypeError, r"^bias\[2\]: expected a tensor, got int"),
        ({"lora_b": [torch.ones(40, 4), torch.ones(70, 0), torch.ones(33, 9)]}, ValueError, "^projection 2: lora_b: "),
        ({"dropout": -0.1}, ValueError, "^dropout: expected 0 <= dropout < 1, got -0.1"),
    ],
)
def test_errors(changed: dict[str, Any], error: type, message: str, extension: object) -> None:
    with pytest.raises(error, match=message):
        lora_linear_stacked(**({**problem(5, 16, torch.float32), "scale": SCALES} | changed), backend="cpu")


def test_no_projection_at_all(backend: str) -> None:
    assert lora_linear_stacked(torch.ones(2, 3), [], [], [], backend=backend) == ()
