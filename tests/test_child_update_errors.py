"""ChildTuning's optimizers: wrong arguments are refused by name, before anything changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pykernels import ChildTuningAdamW, ChildTuningSGD
from pykernels.child_optimizer import check_not_captured

NAN = float("nan")
# Options; the error; what the message begins with.
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr"),
    ({"lr": NAN}, ValueError, "lr"),
    ({"lr": "fast"}, TypeError, "lr"),
    ({"lr": torch.zeros(2)}, ValueError, "lr"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay"),
    ({"mode": "G"}, ValueError, "mode"),
    ({"mode": 3}, TypeError, "mode"),
    ({"reserve_p": 0.0}, ValueError, "reserve_p"),
    ({"reserve_p": 1.5}, ValueError, "reserve_p"),
    ({"reserve_p": 2**-20}, ValueError, "keep_p"),
    ({"seed": 0.5}, TypeError, "seed"),
    ({"seed": 2**64}, ValueError, "seed"),
    ({"where": "loss"}, ValueError, "where"),
    ({"decay": "none"}, ValueError, "decay"),
    ({"compact": 1}, TypeError, "compact"),
    ({"maximize": None}, TypeError, "maximize"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
    ({"stochastic_rounding": True}, TypeError, "stochastic_rounding"),
    ({"masks": {"w": torch.ones(3, dtype=torch.bool)}}, ValueError, "masks"),
    ({"masks": [1]}, TypeError, "masks"),
    ({"backend": "gpu"}, ValueError, "backend"),
]
WRONG_ADAMW: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"amsgrad": True}, ValueError, "amsgrad"),
    ({"betas": 0.9}, TypeError, "betas"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"order": "keras"}, ValueError, "order"),
    ({"correct_bias": "yes"}, TypeError, "correct_bias"),
]
WRONG_SGD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"momentum": -0.9}, ValueError, "momentum"),
    ({"dampening": "much"}, TypeError, "dampening"),
    ({"nesterov": True}, ValueError, "nesterov"),
]
ALL = [(ChildTuningAdamW, *row) for row in WRONG + WRONG_ADAMW] + [(ChildTuningSGD, *row) for row in WRONG + WRONG_SGD]


@pytest.mark.parametrize(("cls", "options", "error", "begins"), ALL)
def test_wrong_options(cls: type, options: dict[str, Any], error: type[Exception], begins: str) -> None:
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(error, match=f"^{begins}: "):
        own = cls([p], **options)
        p.grad = torch.ones(3)
        own.step()
    assert (p == 1).all()


def test_wrong_parameters_and_groups() -> None:
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match=r"^params\[0\]: expected a floating dtype, got complex64"):
        ChildTuningAdamW([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="^params: .* twice"):
        ChildTuningAdamW([p, p])
    own = ChildTuningAdamW([p], max_grad_norm=1.0)
    for name, value in {"lr": -1.0, "max_grad_norm": 2.0, "betas": (2, 2)}.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            own.add_param_group({"params": [torch.ones(2, requires_grad=True)], name: value})
        assert len(own.param_groups) == 1


def test_wrong_masks() -> None:
    model = torch.nn.Linear(4, 3)

    def given(masks: Any, **options: Any) -> None:
        ChildTuningAdamW(model.named_parameters(), **{"mode": "D", **options}, masks=masks)

    right = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^masks: expected one of weight, bias, \.\.\., got 'wieght'"):
        given({"wieght": right})
    with pytest.raises(ValueError, match=r"^masks\['weight'\]: .* \[3, 4\] or uint8 \[2\], got bool \[4, 3\]"):
        given({"weight": right.t()})
    with pytest.raises(TypeError, match=r"^masks\['weight'\]: .* got float32"):
        given({"weight": right.float()})
    with pytest.raises(TypeError, match=r"^masks\['weight'\]: expected a tensor"):
        given({"weight": [1]})
    with pytest.raises(ValueError, match="^masks: expected mode 'D' with masks, got 'F'"):
        given({"weight": right}, mode="F")
    with pytest.raises(ValueError, match=r"^masks: expected named_parameters\(\) as params"):
        ChildTuningAdamW(model.parameters(), mode="D", masks={"weight": right})


def test_steps_that_cannot_be_made_change_nothing() -> None:
    """Sparse gradients, and rates that went wrong in the second group."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    own = ChildTuningAdamW([{"params": [a]}, {"params": [b]}], lr=0.1)
    a.grad, b.grad = torch.ones(3), torch.ones(4, 2)
    own.param_groups[1]["lr"] = NAN
    with pytest.raises(ValueError, match="^lr: "):
        own.step()
    own.param_groups[1]["lr"] = 0.1
    b.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(TypeError, match="^params: expected dense gradients"):
        own.step()
    assert (a == 1).all() and (b == 1).all()


@pytest.mark.parametrize(("name", "why"), [("cuda", ""), ("triton", "it runs on cuda, and the tensors are on cpu")])
def test_named_backend_that_cannot_serve_raises_with_the_reason(name: str, why: str) -> None:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=f"^backend: '{name}' cannot serve child_update here: {why}"):
        ChildTuningAdamW([p], backend=name).step()


def test_a_captured_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would repeat its masks. Without a GPU: what step() asks first."""
    on_cuda, on_cpu = SimpleNamespace(is_cuda=True), torch.ones(3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_not_captured([on_cpu])
    with pytest.raises(RuntimeError, match="^step: expected to be called outside of a CUDA graph's capture"):
        check_not_captured([on_cpu, on_cuda])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check_not_captured([on_cuda])


# --- the raw operator checks for itself ---


def raw(**changed: Any) -> None:
    one = torch.tensor(0.1)
    arguments: dict[str, Any] = {
        "params": [torch.ones(9)], "grads": [torch.ones(9)], "exp_avgs": [torch.zeros(9)],
        "exp_avg_sqs": [torch.zeros(9)], "steps": [torch.tensor(0.0)], "masks": [None], "runs": [None], "streams": [0],
        "grad_scale": None, "found_inf": None, "square_sum": None, "lr": one, "weight_decay": one, "beta1": 0.9,
        "beta2": 0.9, "eps": 1e-8, "reserve_p": None, "max_grad_norm": 0.0, "seed": 0, "where": "grad", "decay": "all",
        "order": "torch", "correct_bias": True, "maximize": False, "stochastic_rounding": False,
    }  # fmt: skip
    torch.ops.pykernels._child_adamw_(**(arguments | changed))


BYTE = torch.uint8
RAW: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"params": [], "grads": []}, ValueError, "params"),
    ({"params": [torch.ones(9).int()]}, TypeError, "params"),
    ({"params": [torch.ones(1).expand(9)]}, ValueError, "params"),
    ({"grads": [torch.ones(8)]}, ValueError, "grads"),
    ({"grads": [torch.ones(9).double()]}, TypeError, "grads"),
    ({"exp_avgs": [torch.zeros(8)]}, ValueError, "exp_avgs"),
    ({"exp_avgs": [torch.zeros(9).bfloat16()]}, TypeError, "exp_avgs"),
    ({"exp_avg_sqs": [torch.zeros(18)[::2]]}, ValueError, "exp_avg_sqs"),
    ({"steps": [torch.tensor(-1.0)]}, ValueError, "steps"),
    ({"steps": [torch.tensor(2.0**24)]}, ValueError, "steps"),
    ({"steps": [torch.tensor(0)]}, TypeError, "steps"),
    ({"masks": [torch.zeros(1, dtype=BYTE)]}, ValueError, "masks"),
    ({"masks": [torch.zeros(2)]}, TypeError, "masks"),
    ({"masks": [torch.full((2,), 1, dtype=BYTE)], "exp_avgs": [torch.zeros(3)]}, ValueError, "exp_avgs"),
    ({"masks": [torch.zeros(2, dtype=BYTE)], "reserve_p": 0.5}, ValueError, "masks"),
    ({"runs": [torch.zeros(3)]}, TypeError, "runs"),
    ({"runs": [torch.tensor([[0, 0, 1]])]}, ValueError, "runs"),
    ({"runs": [torch.tensor([[0, 1, 1], [0, 1, 1]])]}, ValueError, "runs"),
    ({"streams": [-1]}, ValueError, "streams"),
    ({"streams": [2**31]}, ValueError, "streams"),
    ({"lr": torch.tensor(NAN)}, ValueError, "lr"),
    ({"beta1": 1.0}, ValueError, "beta1"),
    ({"eps": NAN}, ValueError, "eps"),
    ({"reserve_p": 0.0}, ValueError, "reserve_p"),
    ({"grad_scale": torch.tensor(0.0)}, ValueError, "grad_scale"),
    ({"square_sum": torch.tensor(1.0)}, ValueError, "max_grad_norm"),
    ({"where": "loss"}, ValueError, "where"),
    ({"order": "keras"}, ValueError, "order"),
    ({"stochastic_rounding": True}, TypeError, "stochastic_rounding"),
]


@pytest.mark.parametrize(("changed", "error", "begins"), RAW)
def test_raw_operator_checks_for_itself(
    changed: dict[str, Any], error: type[Exception], begins: str, extension: object
) -> None:
    raw()
    with pytest.raises(error, match=rf"^{begins}(\[0\])?[:, ]"):
        raw(**changed)
