"""ChildTuning's optimizers: the bits of the drawn masks, and stochastic rounding."""

from __future__ import annotations

import math

import pytest
import torch

from pykernels import ChildTuningAdamW, ChildTuningSGD, child_update
from pykernels.random_bits import draws16_at, keep_threshold
from tests.child_update_cases import drawn_by_a_step


@pytest.mark.parametrize("p", [2**-16, 0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("seed", "stream", "done"), [(0, 0, 0), (-1, 3, 16), (2**62 + 5, 2**31 - 1, 2**24 - 2)])
def test_the_bits_are_those_of_the_definition(p: float, seed: int, stream: int, done: int, kernels: str) -> None:
    for numel in (1, 7, 8, 511, 513, 70001):
        draws = draws16_at(torch.tensor(seed), torch.arange(numel), stream, done + 1)
        assert torch.equal(drawn_by_a_step(numel, p, seed, stream, done), draws < keep_threshold(p)), numel


RUNS = [
    [[0, 6000, 6000]],
    [[8, 6000, 6000]],
    [[3, 5, 11]],
    [[1, 1, 3]],
    [[16, 8, 64]],
    [[2**35 + 3, 500, 2**33]],
    [[5, 3, 11], [100003, 7, 9]],
    [[5, 3, 11], [7, 100, 1000], [100003, 5000, 9]],
]


@pytest.mark.parametrize("runs", RUNS, ids=str)
def test_shards_draw_the_bits_of_the_whole(runs: list[list[int]], kernels: str) -> None:
    numel = 6000
    part = numel // len(runs)
    element = [start + j // length * stride + j % length for start, length, stride in runs for j in range(part)]
    draws = draws16_at(torch.tensor(21), torch.tensor(element), 4, 1)
    assert torch.equal(drawn_by_a_step(numel, 0.3, 21, 4, 0, torch.tensor(runs)), draws < keep_threshold(0.3))
    index = child_update.elements(numel, torch.tensor(runs), 0, numel, torch.device("cpu"))
    assert torch.equal(index, torch.tensor(element))


def test_steps_and_parameters_draw_their_own_bits(backend: str) -> None:
    """The optimizer counts streams over all groups and steps from 1; parameters without a gradient keep their place."""
    params = [torch.zeros(1000, requires_grad=True) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    own = ChildTuningSGD(groups, lr=1.0, seed=6, reserve_p=0.5, backend=backend)
    counts = [0, 0, 0, 0]
    for t in range(3):
        for i, p in enumerate(params):
            p.data.zero_()
            p.grad = None if (i + t) % 3 == 0 else torch.ones(1000)
        own.step()
        for i, p in enumerate(params):
            if p.grad is None:
                assert (p == 0).all()
                continue
            counts[i] += 1
            kept = draws16_at(torch.tensor(6), torch.arange(1000), i, counts[i]) < keep_threshold(0.5)
            assert torch.equal(p != 0, kept), (t, i)
    own.add_param_group({"params": [torch.zeros(9, requires_grad=True)]})
    own.param_groups[2]["params"][0].grad = torch.ones(9)
    own.step()
    assert own.state[own.param_groups[2]["params"][0]]["stream"] == 4


def test_stochastic_rounding(backend: str) -> None:
    """Bit for bit by the definition, right in the mean, and special values stay."""
    w = torch.full((40000,), 1.0).bfloat16().requires_grad_()
    w.grad = torch.full_like(w, 2**-10)  # a quarter of the distance between numbers below 1
    ChildTuningSGD([w], lr=1.0, mode="none", seed=3, stochastic_rounding=True, backend=backend).step()
    draws = draws16_at(torch.tensor(3), torch.arange(40000), 1 << 31, 1)
    expected = child_update.round_stochastically(torch.full((40000,), 1.0 - 2**-10), draws)
    assert torch.equal(w.detach(), expected) and set(w.tolist()) == {1.0, 1.0 - 2**-8}
    assert w.double().mean().item() == pytest.approx(1.0 - 2**-10, abs=5 * 2**-8 * math.sqrt(0.19 / 40000))

    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0]).bfloat16()
    special = values.clone().requires_grad_()
    special.grad = torch.zeros_like(special)
    ChildTuningSGD([special], lr=1.0, mode="none", stochastic_rounding=True, backend=backend).step()
    torch.testing.assert_close(special.detach(), values, equal_nan=True)


def test_rounding_by_bits_lets_small_steps_add_up(backend: str) -> None:
    """Steps of a sixteenth of the distance between numbers: rounding to the nearest loses them all."""
    moved = []
    for stochastic in (False, True):
        w = torch.ones(2000).bfloat16().requires_grad_()
        own = ChildTuningAdamW(
            [w], lr=2**-12, weight_decay=0.0, mode="none", stochastic_rounding=stochastic, backend=backend
        )
        for _ in range(32):
            w.grad = torch.ones_like(w)
            own.step()
        moved.append(1 - w.double().mean().item())
    assert moved[0] == 0 and moved[1] == pytest.approx(32 * 2**-12, rel=0.1)
