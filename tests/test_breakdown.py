"""The parts of a step in bench/breakdown.py, with layers that take known times."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from bench.breakdown import REST, breakdown

FORWARD, BACKWARD, MARKED = 0.02, 0.05, 0.03


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        time.sleep(BACKWARD)
        return dy


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x * 2) + 1


@pytest.fixture
def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(4, 4), Slow(), nn.Linear(4, 4), nn.Linear(4, 4)]


def test_a_part_has_its_forward_and_its_backward(layers: list[nn.Module]) -> None:
    network = nn.Sequential(*layers)

    def step() -> None:
        network(torch.ones(3, 4)).sum().backward()
        with record_function("marked"):
            time.sleep(MARKED)

    first, slow, *others = layers
    spent = breakdown(step, {"slow": [slow], "linear": others, "first": [first]}, ["marked"])
    assert set(spent) == {"slow", "marked", "linear", "first", REST} and min(spent.values()) >= 0
    assert spent["slow"] >= FORWARD + BACKWARD and spent["marked"] >= MARKED
    assert list(spent.values()) == sorted(spent.values(), reverse=True)


def test_what_is_in_no_part_is_the_rest(layers: list[nn.Module]) -> None:
    network = nn.Sequential(*layers)
    spent = breakdown(lambda: network(torch.ones(3, 4)).sum().backward(), {"linear": [layers[0]]})
    assert set(spent) == {"linear", REST} and spent[REST] >= FORWARD + BACKWARD


def test_the_hooks_are_gone_afterwards(layers: list[nn.Module]) -> None:
    network = nn.Sequential(*layers)
    breakdown(lambda: network(torch.ones(3, 4)).sum().backward(), {"all": layers})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layers)
