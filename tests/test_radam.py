"""RAdam against its recorded original, a plain loop in float64, and what an optimizer must keep."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pykernels.models.radam import RAdam
from tests.recorded import recorded


def one_by_one(p: Tensor, grads: list[Tensor], lr: float, beta1: float = 0.9, beta2: float = 0.999) -> Tensor:
    """The update of one tensor in float64, written from the formula."""
    p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    rho_inf = 2 / (1 - beta2) - 1
    for t, g in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * g.double(), beta2 * v + (1 - beta2) * g.double() ** 2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho <= 4:
            p = p - lr * m_hat
        else:
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            p = p - lr * r * m_hat / (v_hat.sqrt() + 1e-7)
    return p


def test_recorded_steps() -> None:
    with np.load(recorded("golden", "radam.npz")) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "__meta__"}
    params = [torch.nn.Parameter(arrays[f"p{i}/step00"].clone()) for i in range(3)]
    optimizer = RAdam(params, lr=0.02)
    for step in range(1, 13):
        for i, p in enumerate(params):
            p.grad = arrays[f"g{i}/step{step:02}"]
        optimizer.step()
        for i, p in enumerate(params):
            assert (p - arrays[f"p{i}/step{step:02}"]).abs().max() <= 1e-5, f"p{i} after step {step}"


def run(params: list[Tensor], optimizer: torch.optim.Optimizer, grads: list[list[Tensor | None]]) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()


def random_problem(steps: int) -> tuple[list[torch.nn.Parameter], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (7,), (0, 3), ()]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    return params, [[torch.randn(s, generator=generator) for s in shapes] for _ in range(steps)]


def test_equals_the_formula_also_where_gradients_are_missing_at_times() -> None:
    params, grads = random_problem(12)
    grads[3][1] = grads[7][1] = None  # type: ignore[call-overload]
    start = [p.detach().clone() for p in params]
    run(params, RAdam(params, lr=0.01), grads)  # type: ignore[arg-type]
    for i, p in enumerate(params):
        expected = one_by_one(start[i], [g[i] for g in grads if g[i] is not None], 0.01)
        assert torch.allclose(p.double(), expected, atol=1e-6), i


def test_differs_from_the_one_of_pytorch() -> None:
    params, grads = random_problem(6)
    other = [torch.nn.Parameter(p.detach().clone()) for p in params]
    run(params, RAdam(params, lr=0.01), grads)
    run(other, torch.optim.RAdam(other, lr=0.01, eps=1e-7), grads)
    assert (params[0] - other[0]).abs().max() > 1e-4


def test_state_dict_continues_bitwise_and_cleared_state_starts_anew() -> None:
    params, grads = random_problem(10)
    whole = RAdam(params, lr=0.01)
    run(params, whole, grads[:5])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = RAdam(copies, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    run(params, whole, grads[5:])
    run(copies, resumed, grads[5:])
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))

    before = [p.detach().clone() for p in params]
    whole.state.clear()
    run(params, whole, grads[:1])
    # The first step is plain again: lr times the gradient.
    assert torch.allclose(params[0], before[0] - 0.01 * grads[0][0], atol=1e-7)


def test_refuses_before_anything_has_changed() -> None:
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = RAdam([a, b], lr=0.1)
    a.grad, b.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="expected dense real gradients, got torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(a, torch.ones(3)) and not optimizer.state
    for options, message in (
        ({"lr": -1.0}, "lr: expected 0 or more, got -1.0"),
        ({"eps": 0.0}, "eps: expected more than 0, got 0.0"),
        ({"betas": (0.9, 0.5)}, r"betas: expected .* got \(0.9, 0.5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            RAdam([a], **options)
