"""ChildTuning's optimizers: the drawn masks, and stochastic rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pykernels import ChildTuningAdamW, ChildTuningSGD, child_update
from pykernels.random_bits import draws16_at, keep_threshold


def drawn_by_a_step(numel: int, p: float, seed: int, stream: int, done: int, runs: Tensor | None = None) -> Tensor:
    """Which elements the compiled step keeps: with gradients 1 and lr 1, SGD's update is the factor of each element."""
    w, grad = torch.zeros(numel), torch.ones(numel)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    torch.ops.pykernels._child_sgd_(
        [w], [grad], [], [torch.tensor(float(done))], [None], [runs], [stream], None, None, None, one, zero,
        0.0, 0.0, False, p, 0.0, seed, "grad", "all", False, False,
    )  # fmt: skip
    scale = torch.tensor(65536 / keep_threshold(p))
    assert ((w == 0) | (w == -scale)).all()
    return w != 0


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


@pytest.mark.no_poison
@pytest.mark.parametrize("p", [0.2, 0.3])
def test_statistics_of_many_draws(p: float, extension: object) -> None:
    """10^8 draws over 100 steps: mean, variance and chi-square of bytes of mask bits, and of neighbouring steps."""
    numel, rounds = 1_000_000, 100
    q = keep_threshold(p) / 65536
    counts, kept, both, before = torch.zeros(256), 0, 0, None
    for t in range(rounds):
        mask = drawn_by_a_step(numel, p, 99, 2, t)
        kept += int(mask.sum())
        counts += torch.bincount(child_update.pack_mask(mask).long(), minlength=256)
        if before is not None:
            both += int((mask & before).sum())
        before = mask
    n = numel * rounds
    assert abs(kept - n * q) < 4.5 * math.sqrt(n * q * (1 - q))
    pairs = n - numel
    assert abs(both - pairs * q * q) < 4.5 * math.sqrt(pairs * q * q * (1 - q * q))
    ones = torch.tensor([bin(i).count("1") for i in range(256)]).double()
    wanted = (n // 8) * q**ones * (1 - q) ** (8 - ones)
    chi_square = ((counts.double() - wanted) ** 2 / wanted).sum().item()
    assert abs(chi_square - 255) < 4.5 * math.sqrt(2 * 255)


def test_variance_of_the_masked_gradient(extension: object) -> None:
    """E[g m / p] = E[g], and its variance is s^2 + (1 - p) / p (mu^2 + s^2), with mean mu and variance s^2 of g."""
    p, mu, s, n = 0.3, 0.7, 1.3, 4_000_000
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0)) * s + mu
    w = torch.zeros(n, requires_grad=True)
    w.grad = grad
    ChildTuningSGD([w], lr=1.0, reserve_p=p, seed=1).step()
    masked = -w.detach().double()
    expected = s**2 + (1 - p) / p * (mu**2 + s**2)
    assert abs(masked.mean().item() - mu) < 5 * math.sqrt(expected / n)
    assert masked.var().item() == pytest.approx(expected, rel=0.02)


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
