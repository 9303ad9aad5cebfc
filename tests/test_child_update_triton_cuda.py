"""ChildTuning's Triton kernels on a GPU, by the rules and cases of test_child_update_cuda.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from pykernels import child_update
from tests.child_update_cases import gradients, make, parameters
from tests.child_update_kernels import (  # noqa: F401
    test_compact_moments_change_nothing,
    test_nothing_waits_for_the_device,
    test_stochastic_rounding_draws_the_bits_of_the_definition,
    trained,
)
from tests.helpers import FLOATS, assert_close_to_reference, rounding_floor
from tests.on_gpu import DTYPES, GPU_MARKS

pytest.importorskip("triton")
pytestmark = GPU_MARKS


@pytest.fixture
def on_gpu() -> str:
    return "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_form_is_that_of_the_definition(kind: str, dtype: str) -> None:
    for mode, where, clipped in itertools.product(("F", "D", "none"), ("grad", "update"), (False, True)):
        options: dict[str, Any] = {"mode": mode, "where": where, "seed": 2**63 + 7}
        if kind == "adamw":
            options |= {"order": "hf" if clipped else "torch", "decay": "reserved" if clipped else "all"}
        if clipped:
            options["max_grad_norm"] = 0.5
        got = trained(kind, FLOATS[dtype], "cuda", "triton", **options)
        same = trained(kind, FLOATS[dtype], "cpu", "reference", **options)
        truth = trained(kind, FLOATS[dtype], "cpu", "reference", exact=True, **options)
        for a, t, s in zip(got, truth, same, strict=True):
            if a.numel():
                assert_close_to_reference(a, t, s, factor=2, floor=rounding_floor(t, a.dtype, 4), what=f"{options}")


def test_sums_of_squares() -> None:
    grads = gradients(parameters(torch.bfloat16), 1)
    expected = sum(g.double().square().sum().item() for g in grads)
    got = child_update._triton_square_sum([g.cuda() for g in grads])
    assert got.is_cuda and got.item() == pytest.approx(expected, rel=1e-12)


def test_tables_in_flight_are_not_overwritten() -> None:
    """Steps follow each other faster than the device makes them: each table lives until its launch has read it."""
    params = [torch.zeros(1 << 22, device="cuda", requires_grad=True) for _ in range(2)]
    optimizer = make("sgd", params, mode="none", momentum=0.0, lr=1.0, weight_decay=0.0, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(50):
        optimizer.step()
    assert all((p == -50).all() for p in params)
