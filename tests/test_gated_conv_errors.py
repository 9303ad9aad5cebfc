"""gated_conv1d: wrong arguments. Both backends raise the same type, and a message that begins with the argument's name.
Also the choice of the backend. `#n` names a line of the project's failure checklist."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import GatedConv1d, _backend, _extension, gated_conv1d

HAS_KERNELS = _extension._C is not None


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


DOUBLE, INT, LONG = torch.float64, torch.int32, torch.int64
# x [2, 9, 4], weight [8, 4, 3] and what is wrong with them; the error; what the message begins with.
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x list": ({"x": [1.0]}, TypeError, "x"),
    "x int": ({"x": t(2, 9, 4, dtype=LONG)}, TypeError, "x"),
    "x complex": ({"x": t(2, 9, 4, dtype=torch.complex64)}, TypeError, "x"),
    "x 2-d": ({"x": t(9, 4)}, ValueError, "x"),
    "x 4-d": ({"x": t(1, 2, 9, 4)}, ValueError, "x"),
    "x 3-d packed": ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "x"),
    "weight none": ({"weight": None}, TypeError, "weight"),
    "weight dtype": ({"weight": t(8, 4, 3, dtype=DOUBLE)}, TypeError, "weight"),
    "weight 2-d": ({"weight": t(8, 4)}, ValueError, "weight"),
    "weight k = 0": ({"weight": t(8, 4, 0)}, ValueError, "weight"),
    "weight c_in": ({"weight": t(8, 5, 3)}, ValueError, "weight"),
    "weight odd": ({"weight": t(7, 4, 3)}, ValueError, "weight"),
    "bias float": ({"bias": 1.0}, TypeError, "bias"),
    "bias dtype": ({"bias": t(8, dtype=torch.bfloat16)}, TypeError, "bias"),
    "bias shape": ({"bias": t(4)}, ValueError, "bias"),
    "gate_weight dtype": ({"weight": t(4, 4, 3), "gate_weight": t(4, 4, 3, dtype=DOUBLE)}, TypeError, "gate_weight"),
    "gate_weight shape": ({"weight": t(4, 4, 3), "gate_weight": t(4, 4, 2)}, ValueError, "gate_weight"),
    "gate_bias shape": ({"weight": t(4, 4, 3), "gate_weight": t(4, 4, 3), "gate_bias": t(8)}, ValueError, "gate_bias"),
    "gate_bias alone": ({"gate_bias": t(4)}, ValueError, "gate_bias"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation"),
    "dilation float": ({"dilation": 1.5}, TypeError, "dilation"),
    "dilation none": ({"dilation": None}, TypeError, "dilation"),
    "padding word": ({"padding": "full"}, ValueError, "padding"),
    "padding int": ({"padding": 1}, TypeError, "padding"),
    "padding valid too short": ({"padding": "valid", "dilation": 5}, ValueError, "padding"),
    "padding valid packed": (
        {"x": t(9, 4), "cu_seqlens": torch.tensor([0, 9]), "padding": "valid"}, ValueError, "padding"
    ),
    "residual word": ({"residual": "gate"}, ValueError, "residual"),
    "residual none": ({"residual": None}, TypeError, "residual"),
    "residual channels": ({"weight": t(6, 4, 3)}, ValueError, "residual"),
    "residual channels add": ({"weight": t(6, 4, 3), "residual": "add"}, ValueError, "residual"),
    "value_act word": ({"value_act": "relu"}, ValueError, "value_act"),
    "split word": ({"split": "both"}, ValueError, "split"),
    "cond dtype": ({"cond": t(2, 1, 8, dtype=DOUBLE)}, TypeError, "cond"),
    "cond rows": ({"cond": t(2, 5, 8)}, ValueError, "cond"),
    "cond width": ({"cond": t(2, 9, 4)}, ValueError, "cond"),
    "cond 2-d": ({"cond": t(2, 8)}, ValueError, "cond"),
    "cond packed": ({"x": t(9, 4), "cu_seqlens": torch.tensor([0, 9]), "cond": t(2, 1, 8)}, ValueError, "cond"),
    "mask additive": ({"mask": t(2, 9)}, TypeError, "mask"),
    "mask list": ({"mask": [[1]]}, TypeError, "mask"),
    "mask shape": ({"mask": t(2, 8, dtype=torch.bool)}, ValueError, "mask"),
    "mask 3-d": ({"mask": t(2, 9, 1, dtype=torch.bool)}, ValueError, "mask"),
    "mask other integers": ({"mask": t(2, 9, dtype=LONG) - 1}, ValueError, "mask"),
    "lengths float": ({"lengths": t(2)}, TypeError, "lengths"),
    "lengths shape": ({"lengths": t(3, dtype=LONG)}, ValueError, "lengths"),
    "lengths above": ({"lengths": torch.tensor([1, 10])}, ValueError, "lengths"),
    "lengths below": ({"lengths": torch.tensor([-1, 9])}, ValueError, "lengths"),
    "mask and lengths": ({"mask": t(2, 9, dtype=torch.bool), "lengths": t(2, dtype=LONG)}, ValueError, "mask, lengths"),
    "cu_seqlens float": ({"x": t(9, 4), "cu_seqlens": torch.tensor([0.0, 9.0])}, TypeError, "cu_seqlens"),
    "cu_seqlens 2-d": ({"x": t(9, 4), "cu_seqlens": torch.tensor([[0, 9]])}, ValueError, "cu_seqlens"),
    "cu_seqlens empty": ({"x": t(9, 4), "cu_seqlens": t(0, dtype=INT)}, ValueError, "cu_seqlens"),
    "cu_seqlens start": ({"x": t(9, 4), "cu_seqlens": torch.tensor([1, 9])}, ValueError, "cu_seqlens"),
    "cu_seqlens end": ({"x": t(9, 4), "cu_seqlens": torch.tensor([0, 8])}, ValueError, "cu_seqlens"),
    "cu_seqlens order": ({"x": t(9, 4), "cu_seqlens": torch.tensor([0, 7, 3, 9])}, ValueError, "cu_seqlens"),
    "gate_dropout 1": ({"gate_dropout": 1.0, "training": True}, ValueError, "gate_dropout"),
    "gate_dropout below": ({"gate_dropout": -0.1, "training": True}, ValueError, "gate_dropout"),
    "gate_dropout nan": ({"gate_dropout": float("nan"), "training": True}, ValueError, "gate_dropout"),
    "gate_dropout almost 1": ({"gate_dropout": 1 - 2**-20, "training": True}, ValueError, "gate_dropout"),
    "gate_dropout word": ({"gate_dropout": "half", "training": True}, TypeError, "gate_dropout"),
    "gate_dropout none": ({"gate_dropout": None}, TypeError, "gate_dropout"),
    "gate_noise below": ({"gate_noise": -1.0, "training": True}, ValueError, "gate_noise"),
    "gate_noise inf": ({"gate_noise": float("inf"), "training": True}, ValueError, "gate_noise"),
    "both": ({"gate_noise": 0.1, "gate_dropout": 0.1, "training": True}, ValueError, "gate_dropout, gate_noise"),
    "both, not training": ({"gate_noise": 0.1, "gate_dropout": 0.1}, ValueError, "gate_dropout, gate_noise"),
    "seed float": ({"gate_dropout": 0.5, "training": True, "seed": 1.0}, TypeError, "seed"),
    "seed dtype": ({"gate_dropout": 0.5, "training": True, "seed": t()}, TypeError, "seed"),
    "seed 1-d": ({"gate_dropout": 0.5, "training": True, "seed": t(1, dtype=LONG)}, TypeError, "seed"),
    "seed 65 bits": ({"gate_dropout": 0.5, "training": True, "seed": 2**64}, ValueError, "seed"),
    "backend word": ({"backend": "gpu"}, ValueError, "backend"),
}  # fmt: skip


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, gradients: bool) -> None:
    changed, error, begins = WRONG[name]
    arguments = {"x": t(2, 9, 4), "weight": t(8, 4, 3), **changed}
    if gradients:
        arguments = {
            k: v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
    messages = []
    for backend in ("reference", "cpu") if HAS_KERNELS else ("reference",):
        with pytest.raises(error, match=f"^{begins}:|^{begins},") as raised:
            gated_conv1d(**{"backend": backend, **arguments})
        messages.append(str(raised.value).split(":")[0])
    assert len(set(messages)) == 1


# Not what PyTorch's parser refuses, nor what only the public function has.
RAW = [
    name
    for name, (changed, *_) in WRONG.items()
    if not changed.keys() & {"training", "backend"}
    and not any(isinstance(v, list | float) or v is None or name == "padding int" for v in changed.values())
    and name != "both, not training"
]


@pytest.mark.parametrize("name", RAW)
def test_raw_operators_check_for_themselves(name: str, extension: object) -> None:
    """No crash when the raw operator is called with tensors that no public function has seen."""
    changed, error, _ = WRONG[name]
    arguments = {"x": t(2, 9, 4), "weight": t(8, 4, 3), **changed}
    names = ["x", "weight", "bias", "gate_weight", "gate_bias", "cond", "mask", "lengths", "cu_seqlens"]
    tensors = [arguments.get(n) for n in names]
    defaults = {"dilation": 1, "padding": "same", "residual": "highway", "value_act": "identity", "split": "value_gate"}
    form = [arguments.get(n, default) for n, default in defaults.items()]
    with pytest.raises(error):
        torch.ops.pykernels._gated_conv_fwd(*tensors, None, None, *form, 0.0, 0.0, True)
    with pytest.raises(error):
        torch.ops.pykernels._gated_conv_bwd(t(2, 9, 4), *tensors, None, None, *form, 0.0, 0.0, [True] * 6)


def test_raw_operators_check_what_backward_gets(extension: object) -> None:
    x, weight, form = t(2, 9, 4), t(8, 4, 3), (1, "same", "highway", "identity", "value_gate")
    rest = (None,) * 7

    def backward(dy: Tensor, saved: Tensor | None = None, seed: Tensor | None = None, dropout: float = 0.0) -> None:
        torch.ops.pykernels._gated_conv_bwd(dy, x, weight, *rest, seed, saved, *form, dropout, 0.0, [True] * 6)

    for wrong, error, name in [
        ({"dy": t(2, 8, 4)}, ValueError, "dy"),
        ({"dy": t(2, 9, 4, dtype=DOUBLE)}, TypeError, "dy"),
        ({"dy": x, "saved": t(2, 2, 9, 3)}, ValueError, "saved"),
        ({"dy": x, "saved": t(0)}, ValueError, "saved"),
        ({"dy": x, "dropout": 0.5}, ValueError, "seed"),
    ]:
        with pytest.raises(error, match=f"^{name}"):
            backward(**wrong)


def test_packed_weights_of_another_shape_are_refused(extension: Any) -> None:
    x, form = t(2, 9, 4), (1, "same", "highway", "identity", "value_gate", 0.0, 0.0)
    weight = torch.randn(8, 4, 3)
    packed = torch.ops.pykernels._gated_conv_pack(weight, None, "value_gate")
    rest = (None,) * 8

    def forward(weight: Tensor, packed: Tensor) -> None:
        torch.ops.pykernels._gated_conv_fwd(x, weight, *rest, packed, *form, False)

    forward(weight, packed)
    for wrong in (packed[:-1], packed[:8], packed.int(), t(0, dtype=torch.uint8), torch.zeros_like(packed)):
        with pytest.raises(RuntimeError, match="prepack"):
            forward(weight, wrong)
    with pytest.raises(RuntimeError, match="prepack"):
        forward(torch.randn(8, 4, 2), packed)
    tier = extension.cpu_tier()
    others = [name for name, usable, _ in extension.cpu_tiers() if usable and name != tier]
    for other in others:
        extension.set_cpu_tier(other)
        try:
            with pytest.raises(RuntimeError, match="prepack"):
                forward(weight, packed)
        finally:
            extension.set_cpu_tier(tier)


def test_module_arguments() -> None:
    for arguments, error, name in [
        ((0, 4, 3), ValueError, "in_channels"),
        ((4, 4.0, 3), TypeError, "out_channels"),
        ((4, 4, 0), ValueError, "kernel_size"),
        ((4, 5, 3), ValueError, "residual"),
    ]:
        with pytest.raises(error, match=f"^{name}"):
            GatedConv1d(*arguments)
    for options, name in [
        ({"padding": "full"}, "padding"),
        ({"gate_dropout": 2.0}, "gate_dropout"),
        ({"dilation": 0}, "dilation"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            GatedConv1d(4, 4, 3, **options)


# --- choice of the backend ---


@pytest.fixture
def automatic() -> Iterator[None]:
    yield
    pykernels.set_backend(None)


def test_set_backend(automatic: None, extension: object) -> None:
    """The argument goes before set_backend(); "auto" chooses by itself again."""
    x = t(1, 2, 4, dtype=DOUBLE)
    choose = lambda name: _backend.choose("gated_conv1d", name, "cpu", x.dtype)  # noqa: E731
    assert choose(None) == "cpu" and choose("reference") == "reference"
    pykernels.set_backend("reference")
    assert choose(None) == "reference" and choose("cpu") == "cpu" and choose("auto") == "cpu"
    pykernels.set_backend("auto")
    assert choose(None) == "cpu"
    with pytest.raises(ValueError, match="^name: expected one of 'auto', 'reference'"):
        pykernels.set_backend("gpu")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_named_backend_that_cannot_serve_raises_with_the_reason(name: str, automatic: None) -> None:
    built = name == "triton" or not _extension.cuda_reason
    why = "it runs on cuda, and the tensors are on cpu" if built else "not built"
    message = f"^backend: '{name}' cannot serve gated_conv1d here: {why}"
    with pytest.raises(RuntimeError, match=message):
        gated_conv1d(t(1, 2, 4), t(8, 4, 1), backend=name)
    pykernels.set_backend(name)
    with pytest.raises(RuntimeError, match=message):
        gated_conv1d(t(1, 2, 4), t(8, 4, 1))
    assert gated_conv1d(t(1, 2, 4), t(8, 4, 1), backend="auto").shape == (1, 2, 4)


def test_other_devices_get_the_reference(extension: object) -> None:
    """#20: the meta device stands for any that has no kernels; a named backend says why it does not serve it."""
    x, weight = torch.zeros(2, 9, 4, device="meta"), torch.zeros(8, 4, 3, device="meta")
    assert gated_conv1d(x, weight, lengths=torch.zeros(2, device="meta", dtype=INT)).shape == (2, 9, 4)
    with pytest.raises(RuntimeError, match="^backend: 'cpu'.* on meta"):
        gated_conv1d(x, weight, backend="cpu")


@pytest.mark.parametrize(
    ("name", "served"), [("reference", "reference"), ("auto", None), ("", None), ("gpu", "ValueError")]
)
def test_environment_variable(name: str, served: str | None) -> None:
    code = "import torch, pykernels; print(pykernels._backend.choose('gated_conv1d', None, 'cpu', torch.float32))"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYKERNELS_BACKEND": name},
        capture_output=True,
        text=True,
    )
    if served == "ValueError":
        assert run.returncode and "ValueError: PYKERNELS_BACKEND: expected one of" in run.stderr
    else:
        assert run.stdout.strip() == (served or ("cpu" if HAS_KERNELS else "reference")), run.stderr


def test_table_has_every_backend_of_every_operator() -> None:
    rows = _backend.table()
    assert {name for operator, name, *_ in rows if operator == "gated_conv1d"} == set(_backend.BACKENDS)
    for _, name, devices, _, why_not in rows:
        assert devices and (name != "reference" or not why_not)
