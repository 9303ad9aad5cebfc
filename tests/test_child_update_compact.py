"""ChildTuning's optimizers: fixed masks, and moments for the selected elements alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pykernels import ChildTuningAdamW, ChildTuningSGD
from pykernels.child_update import compress, expand, pack_mask, unpack_mask
from tests.child_update_cases import SIZES, gradients, make, masks_for, parameters, steps, with_masks
from tests.helpers import FLOATS


def test_masks_packed_and_unpacked() -> None:
    for size in SIZES:
        mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.5
        packed = pack_mask(mask)
        assert packed.dtype == torch.uint8 and packed.shape == (-(-mask.numel() // 8),)
        assert torch.equal(unpack_mask(packed, size), mask)
        values = torch.randn(size)
        assert torch.equal(expand(compress(values, packed), packed, size), values * mask)
    assert pack_mask(torch.tensor([True] + [False] * 8 + [True])).tolist() == [1, 2]


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}),
    ("adamw", {"order": "hf", "decay": "reserved", "maximize": True}),
    ("adamw", {"eps": 0.0, "where": "update"}),
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.1, "decay": "reserved", "nesterov": True}),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "options"), FORMS, ids=str)
def test_compact_moments_change_nothing(kind: str, options: dict[str, Any], dtype: str, backend: str) -> None:
    """Bit for bit, for any density; and the moments are those of the dense update."""
    for density in (0.0, 0.02, 0.3, 0.9, 1.0):
        results = []
        for compact in (True, False):
            params = parameters(FLOATS[dtype], sizes=((1,), (0, 3), (7,), (17,), (3, 171), (5, 820), (33, 250)))
            masks = masks_for(params, density)
            given = with_masks(params, masks)
            own = make(kind, params, mode="D", masks=given, compact=compact, backend=backend, **options)
            steps(own, params, 0, 4)
            results.append((own, params, masks))
        (own, params, masks), (dense, others, _) = results
        for p, other, mask in zip(params, others, masks, strict=True):
            assert torch.equal(p, other), density
            for name in own.moments:
                packed, kept = own.state[p]["mask"], own.state[p][name]
                assert kept.numel() == int(mask.sum()) and kept.dtype in (torch.float32, torch.float64)
                assert torch.equal(expand(kept, packed, p.shape), dense.state[other][name])


def test_masked_gradients_count_for_nothing(backend: str) -> None:
    """Selected, not multiplied: NaN and infinity where the mask has no bit change nothing, and nothing moves there."""
    for compact in (True, False):
        params = parameters(sizes=((3, 171), (5, 820)))
        before, masks = [p.detach().clone() for p in params], masks_for(params)
        options = {"mode": "D", "masks": with_masks(params, masks), "weight_decay": 0.0, "compact": compact}
        own = make("adamw", params, backend=backend, **options)
        for p, grad, mask in zip(params, gradients(params, 0), masks, strict=True):
            p.grad = torch.where(mask, grad, torch.tensor(float("nan")))
        own.step()
        for p, old, mask in zip(params, before, masks, strict=True):
            assert p.isfinite().all() and torch.equal(p == old, ~mask)


def test_decay_of_masked_elements(backend: str) -> None:
    """All elements decay as in the original; decay="reserved" leaves masked ones as they are."""
    for decay in ("all", "reserved"):
        params = parameters(sizes=((5, 820),))
        old, masks = params[0].detach().clone(), masks_for(params)
        own = make("adamw", params, mode="D", masks=with_masks(params, masks), decay=decay, backend=backend)
        steps(own, params, 0, 1)
        factor = 1 - 0.01 * 0.1 if decay == "all" else 1.0
        torch.testing.assert_close(params[0].detach()[~masks[0]], old[~masks[0]] * factor, rtol=1e-6, atol=0)


def test_bytes_of_state() -> None:
    """At 30 %: 0.3 of two float32 an element, and a bit."""
    p = torch.zeros(1_000_000, requires_grad=True)
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    own = ChildTuningAdamW([p], mode="D", masks={p: mask})
    held = sum(t.untyped_storage().nbytes() for t in own.state[p].values() if isinstance(t, torch.Tensor))
    assert held == 2 * 4 * int(mask.sum()) + 125_000 + 4 and held < 0.35 * 8 * p.numel()


def test_parameters_without_a_mask_train_normally(backend: str) -> None:
    params, plain = parameters(sizes=((3, 171), (5, 820))), parameters(sizes=((3, 171), (5, 820)))
    own = make("adamw", params, mode="D", masks={params[0]: masks_for(params)[0]}, backend=backend)
    steps(own, params, 0, 3)
    steps(make("adamw", plain, mode="none", backend=backend), plain, 0, 3)
    assert torch.equal(params[1], plain[1]) and not torch.equal(params[0], plain[0])


def test_masks_by_name_packed_and_exchanged(backend: str) -> None:
    """Names of named_parameters(), bits in bytes; new masks keep the moments of what stays selected."""
    model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Linear(65, 7))
    params = list(model.parameters())
    first, second = masks_for(params), [~m for m in masks_for(params, 0.5)]
    names = [name for name, _ in model.named_parameters()]
    own = ChildTuningAdamW(
        model.named_parameters(), mode="ChildTuning-D", masks=dict(zip(names, first, strict=True)), backend=backend
    )
    steps(own, params, 0, 2)
    dense = {n: expand(own.state[p]["exp_avg"], own.state[p]["mask"], p.shape) for n, p in model.named_parameters()}
    own.set_gradient_mask({name: pack_mask(mask) for name, mask in zip(names, second, strict=True)})
    for name, p, mask in zip(names, params, second, strict=True):
        assert torch.equal(expand(own.state[p]["exp_avg"], own.state[p]["mask"], p.shape), dense[name] * mask)
    steps(own, params, 2, 4)
    assert all(p.isfinite().all() for p in params)


def test_sgd_keeps_all_momentum_where_all_decay(backend: str) -> None:
    """Decay is a part of SGD's gradient, so that masked elements have momentum too."""
    params = parameters(sizes=((3, 171),))
    given = with_masks(params, masks_for(params))
    own = ChildTuningSGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, mode="D", masks=given, backend=backend)
    steps(own, params, 0, 2)
    assert own.state[params[0]]["momentum_buffer"].shape == params[0].shape
    own = ChildTuningSGD(params, lr=0.1, momentum=0.9, mode="D", masks=given, backend=backend)
    own.param_groups[0]["weight_decay"] = 0.1
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="^weight_decay: expected 0"):
        steps(own, params, 0, 1)
    assert torch.equal(params[0], before)
