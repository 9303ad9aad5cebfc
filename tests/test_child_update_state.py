"""ChildTuning's optimizers: state that is saved and loaded, copies, closures, hooks, GradScaler."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from pykernels import ChildTuningAdamW, ChildTuningSGD
from pykernels.child_update import expand
from tests.child_update_cases import gradients, make, masks_for, parameters, steps, with_masks

SMALL = ((7,), (3, 171), (5, 820))


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Through a file, read without pickled objects."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def clones(params: list[Any]) -> list[Any]:
    return [p.detach().clone().requires_grad_() for p in params]


@pytest.mark.parametrize("dense", [False, True], ids=["compact", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["F", "D", "none"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_resumed_runs_are_the_uninterrupted_ones(
    kind: str, mode: str, dtype: torch.dtype, dense: bool, backend: str
) -> None:
    """Bit for bit, into an optimizer that knows neither masks nor options; moments keep float32."""
    params = parameters(dtype, SMALL)
    options: dict[str, Any] = {"mode": mode, "stochastic_rounding": dtype == torch.bfloat16, "seed": 5}
    given = with_masks(params, masks_for(params)) if mode == "D" else None
    own = make(kind, params, masks=given, backend=backend, **options)
    own.dense_state_dict = dense
    steps(own, params, 0, 3)
    state, others = saved(own), clones(params)
    steps(own, params, 3, 6)
    again = make(kind, others, mode=mode, backend=backend)
    again.load_state_dict(state)
    assert all(t.dtype == torch.float32 for p in others for n, t in again.state[p].items() if n in own.moments)
    steps(again, others, 3, 6)
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        if mode == "D":
            assert torch.equal(own.state[a]["mask"], again.state[b]["mask"])


@pytest.mark.parametrize("mode", ["F", "D"])
def test_state_of_a_plain_fine_tune(mode: str, backend: str) -> None:
    """torch.optim's AdamW and SGD hand over moments and steps, and what they saved goes back to them."""
    params = parameters(sizes=SMALL)
    plain = torch.optim.AdamW(params, lr=0.01, fused=True)
    steps(plain, params, 0, 3)
    masks = masks_for(params)
    own = make("adamw", params, mode=mode, masks=with_masks(params, masks) if mode == "D" else None, backend=backend)
    own.load_state_dict(saved(plain))
    assert own.param_groups[0]["mode"] == mode and own.param_groups[0]["weight_decay"] == 0.01
    assert "fused" not in own.param_groups[0]
    for p, mask in zip(params, masks, strict=True):
        state = own.state[p]
        m = expand(state["exp_avg"], state["mask"], p.shape) if mode == "D" else state["exp_avg"]
        assert torch.equal(m, plain.state[p]["exp_avg"] * (mask if mode == "D" else 1)) and state["step"] == 3
    steps(own, params, 3, 5)

    params = parameters(sizes=SMALL)
    plain_sgd = torch.optim.SGD(params, lr=0.01, momentum=0.9)
    steps(plain_sgd, params, 0, 1)
    sgd = make("sgd", params, mode=mode, backend=backend)
    sgd.load_state_dict(saved(plain_sgd))
    assert sgd.state[params[0]]["step"] == 1
    assert torch.equal(sgd.state[params[0]]["momentum_buffer"], plain_sgd.state[params[0]]["momentum_buffer"])


def test_back_to_plain_adamw() -> None:
    params = parameters(sizes=SMALL)
    own = make("adamw", params, mode="none")
    steps(own, params, 0, 3)
    others = clones(params)
    plain = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1)
    plain.load_state_dict(saved(own))
    steps(own, params, 3, 4)
    steps(plain, others, 3, 4)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def corrupt(state: dict[str, Any], how: str) -> None:
    entry = state["state"][1]
    changes: dict[str, Any] = {
        "shape": ("exp_avg", torch.zeros(4, 5)),
        "integers": ("exp_avg", torch.zeros(3, 171, dtype=torch.int64)),
        "steps": ("step", torch.tensor(-1.0)),
        "steps nan": ("step", torch.tensor(float("nan"))),
        "steps half": ("step", torch.tensor(2.5)),
        "stream": ("stream", -3),
        "mask": ("mask", torch.zeros(3, dtype=torch.uint8)),
        "mask dtype": ("mask", torch.zeros(3, 171)),
        "mask of others": ("mask", torch.zeros(65, dtype=torch.uint8)),
        "unknown": ("max_exp_avg_sq", torch.zeros(3, 171)),
    }
    if how == "missing":
        del entry["exp_avg_sq"]
    elif how == "groups":
        state["param_groups"].append(state["param_groups"][0])
    elif how == "size":
        state["param_groups"][0]["params"].pop()
    elif how == "no parameter":
        state["state"][7] = entry
    elif how == "amsgrad":
        state["param_groups"][0]["amsgrad"] = True
    elif how == "option":
        state["param_groups"][0]["reserve_p"] = 2.0
    elif how == "nothing":
        del state["param_groups"]
    else:
        name, value = changes[how]
        entry[name] = value


@pytest.mark.parametrize(
    "how",
    ["shape", "integers", "steps", "steps nan", "steps half", "stream", "mask", "mask dtype", "mask of others",
     "unknown", "missing", "groups", "size", "no parameter", "amsgrad", "option", "nothing"],
)  # fmt: skip
def test_states_that_do_not_fit_change_nothing(how: str, backend: str) -> None:
    params = parameters(sizes=SMALL)
    own = make("adamw", params, mode="D", masks=with_masks(params, masks_for(params)), backend=backend)
    steps(own, params, 0, 2)
    state = saved(own)
    corrupt(state, how)
    others = clones(params)
    again = make("adamw", others, lr=0.5, mode="D", masks=with_masks(others, masks_for(params, 0.6)), backend=backend)
    steps(again, others, 0, 1)
    before = copy.deepcopy(again.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"^(state|state_dict|param_groups|amsgrad|reserve_p)[^:]*: "):
        again.load_state_dict(state)
    after = again.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(after["state"][i][name]), torch.as_tensor(value)), name


def test_copies_and_pickles_go_on(backend: str) -> None:
    params = parameters(sizes=SMALL)
    own = make("adamw", params, seed=4, backend=backend)
    steps(own, params, 0, 2)
    others, again = pickle.loads(pickle.dumps((params, own)))
    again.backend = backend
    steps(own, params, 2, 4)
    steps(again, others, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_a_first_step_with_nothing_in_it_changes_nothing(backend: str) -> None:
    """Zero gradients and lr 0: how distributed checkpoints make the state that they load into."""
    for kind, mode in (("adamw", "F"), ("adamw", "none"), ("sgd", "F")):
        params = parameters(sizes=SMALL)
        before = clones(params)
        own = make(kind, params, mode=mode, lr=0.0, backend=backend)
        for p in params:
            p.grad = torch.zeros_like(p)
        own.step()
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        assert all(set(own.moments) < own.state[p].keys() for p in params)


def test_closures_hooks_and_schedulers(backend: str) -> None:
    p = torch.ones(3, requires_grad=True)
    own = ChildTuningAdamW([p], lr=torch.tensor(0.1), weight_decay=torch.tensor(0.0), mode="none", backend=backend)
    seen: list[str] = []
    own.register_step_pre_hook(lambda *_: seen.append("before"))
    own.register_step_post_hook(lambda *_: seen.append("after"))
    schedule = torch.optim.lr_scheduler.LinearLR(own, 1.0, 0.0, 2)

    def closure() -> torch.Tensor:
        own.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert own.step(closure).item() == 3 and seen == ["before", "after"]
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
    schedule.step()
    schedule.step()
    before = p.detach().clone()
    own.step(closure)
    assert torch.equal(p, before)


# --- GradScaler ---


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_grad_scale_and_found_inf(kind: str, backend: str) -> None:
    """The step divides by the scale; where a gradient was not finite it counts for nothing."""
    params, others = parameters(sizes=SMALL), parameters(sizes=SMALL)
    own, plain = (make(kind, ps, seed=2, max_grad_norm=0.5, backend=backend) for ps in (params, others))
    for t in range(3):
        own.grad_scale, own.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
        for p, q, grad in zip(params, others, gradients(params, t), strict=True):
            p.grad, q.grad = torch.full_like(grad, float("inf")), grad
        own.step()
        own.found_inf = torch.tensor(0.0)
        for p, grad in zip(params, gradients(params, t), strict=True):
            p.grad = grad * 1024
        own.step()
        plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert own.state[p]["step"] == 3


def test_with_a_grad_scaler(backend: str) -> None:
    for cls in (ChildTuningAdamW, ChildTuningSGD):
        p = torch.ones(64, requires_grad=True)
        own = cls([p], lr=0.1, mode="none", backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale((p * 2).sum()).backward()
        scaler.step(own)
        scaler.update()
        moved = p.detach().clone()
        assert (moved < 1).all()
        own.zero_grad()
        scaler.scale((p * float("inf")).sum()).backward()
        scaler.step(own)
        scaler.update()
        assert torch.equal(p, moved) and scaler.get_scale() == 128.0
