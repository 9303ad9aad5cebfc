"""ChildTuning's optimizers under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.child_update_cases import gradients, make, masks_for, parameters, with_masks

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}),
    ("adamw", {"mode": "D", "max_grad_norm": 1.0}),
    ("adamw", {"lr": torch.tensor(0.01), "order": "hf"}),
    ("sgd", {"nesterov": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_compiled_steps_are_the_eager_ones(
    kind: str, options: dict[str, Any], extension: object, forget_compiled: None
) -> None:
    """Bit for bit, as one graph that is compiled once: the count of steps is no constant of it."""
    results = []
    for compiled in (False, True):
        params = parameters(sizes=((7,), (3, 171), (5, 820)))
        given = with_masks(params, masks_for(params)) if options.get("mode") == "D" else None
        own = make(kind, params, masks=given, **options)
        step = torch.compile(own.step, fullgraph=True, backend="aot_eager") if compiled else own.step
        counters.clear()
        for t in range(4):
            for p, grad in zip(params, gradients(params, t), strict=True):
                p.grad = grad
            step()
        assert not compiled or counters["stats"]["unique_graphs"] == 1
        results.append((params, own))
    (params, own), (others, again) = results
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        assert again.state[b]["step"] == 4
        assert all(torch.equal(own.state[a][name], again.state[b][name]) for name in own.moments)


@pytest.mark.parametrize("operator", ["_child_adamw_", "_child_sgd_", "_child_square_sum"])
def test_opcheck(operator: str, extension: object) -> None:
    tensors = [torch.randn(9), torch.randn(3, 5)]
    grads, steps, lr = [torch.randn_like(p) for p in tensors], [torch.tensor(1.0) for _ in tensors], torch.tensor(0.1)
    moments = [[torch.rand_like(p) for p in tensors] for _ in range(2)]
    shared = (steps, [None, None], [None, None], [0, 1], None, None, None, lr, lr)
    arguments: dict[str, tuple[Any, ...]] = {
        "_child_adamw_": (tensors, grads, *moments, *shared, 0.9, 0.9, 1e-8, 0.5, 0.0, 3, "grad", "all", "torch", True,
                          False, False),
        "_child_sgd_": (tensors, grads, moments[0], *shared, 0.9, 0.0, False, 0.5, 0.0, 3, "grad", "all", False, False),
        "_child_square_sum": (grads,),
    }  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.pykernels, operator).default, arguments[operator])
