"""lora_linear and lora_linear_multi: wrong arguments. Both backends raise the same type, and a message that begins with
the argument's name. `#n` names a line of the project's failure checklist."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import _backend, _extension, lora_linear, lora_linear_multi

HAS_KERNELS = _extension._C is not None


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


DOUBLE, HALF, INT, LONG = torch.float64, torch.bfloat16, torch.int32, torch.int64
SINGLE = {"x": t(2, 9, 4), "weight": t(6, 4), "lora_a": t(3, 4), "lora_b": t(6, 3)}
SEVERAL = SINGLE | {"lora_a": t(2, 3, 4), "lora_b": t(2, 6, 3), "adapter_index": t(2, 9, dtype=LONG)}
# What is wrong with the arguments above; the error; what the message begins with.
Wrong = dict[str, tuple[dict[str, Any], type[Exception], str]]
WRONG: Wrong = {
    "x list": ({"x": [1.0]}, TypeError, "x"),
    "x int": ({"x": t(2, 9, 4, dtype=LONG)}, TypeError, "x"),
    "x complex": ({"x": t(2, 9, 4, dtype=torch.complex64)}, TypeError, "x"),
    "x 0-d": ({"x": t()}, ValueError, "x"),
    "weight none": ({"weight": None}, TypeError, "weight"),
    "weight dtype": ({"weight": t(6, 4, dtype=DOUBLE)}, TypeError, "weight"),
    "weight 1-d": ({"weight": t(4)}, ValueError, "weight"),
    "weight 3-d": ({"weight": t(6, 4, 1)}, ValueError, "weight"),
    "weight width": ({"weight": t(6, 5)}, ValueError, "weight"),
    "weight not transposed": ({"weight": t(4, 6)}, ValueError, "weight"),
    "lora_a none": ({"lora_a": None}, TypeError, "lora_a"),
    "lora_a int": ({"lora_a": t(3, 4, dtype=LONG)}, TypeError, "lora_a"),
    "lora_a double": ({"lora_a": t(3, 4, dtype=DOUBLE)}, TypeError, "lora_a"),
    "lora_a half": ({"lora_a": t(3, 4, dtype=HALF)}, TypeError, "lora_a"),
    "lora_a of another 16-bit type": (
        {
            "x": t(2, 9, 4, dtype=HALF),
            "weight": t(6, 4, dtype=HALF),
            "lora_a": t(3, 4, dtype=torch.float16),
            "lora_b": t(6, 3, dtype=torch.float16),
        },
        TypeError,
        "lora_a",
    ),
    "lora_a float of a float64 layer": (
        {"x": t(2, 9, 4, dtype=DOUBLE), "weight": t(6, 4, dtype=DOUBLE)}, TypeError, "lora_a"
    ),
    "lora_a 1-d": ({"lora_a": t(4)}, ValueError, "lora_a"),
    "lora_a 3-d": ({"lora_a": t(2, 3, 4)}, ValueError, "lora_a"),
    "lora_a 0-d": ({"lora_a": t()}, ValueError, "lora_a"),
    "lora_a width": ({"lora_a": t(3, 5)}, ValueError, "lora_a"),
    "lora_a transposed": ({"lora_a": t(4, 3)}, ValueError, "lora_a"),
    "lora_b none": ({"lora_b": None}, TypeError, "lora_b"),
    "lora_b dtype": ({"lora_b": t(6, 3, dtype=DOUBLE)}, TypeError, "lora_b"),
    "lora_b half, lora_a float": (
        {"x": t(2, 9, 4, dtype=HALF), "weight": t(6, 4, dtype=HALF), "lora_b": t(6, 3, dtype=HALF)}, TypeError, "lora_b"
    ),
    "lora_b 1-d": ({"lora_b": t(6)}, ValueError, "lora_b"),
    "lora_b 0-d": ({"lora_b": t()}, ValueError, "lora_b"),
    "lora_b 3-d": ({"lora_b": t(2, 6, 3)}, ValueError, "lora_b"),
    "lora_b rank": ({"lora_b": t(6, 2)}, ValueError, "lora_b"),
    "lora_b outputs": ({"lora_b": t(5, 3)}, ValueError, "lora_b"),
    "lora_b transposed": ({"lora_b": t(3, 6)}, ValueError, "lora_b"),
    "bias float": ({"bias": 1.0}, TypeError, "bias"),
    "bias dtype": ({"bias": t(6, dtype=HALF)}, TypeError, "bias"),
    "bias shape": ({"bias": t(4)}, ValueError, "bias"),
    "bias 2-d": ({"bias": t(1, 6)}, ValueError, "bias"),
    "scale word": ({"scale": "half"}, TypeError, "scale"),
    "scale none": ({"scale": None}, TypeError, "scale"),
    "scale bool": ({"scale": True}, TypeError, "scale"),
    "scale tensor": ({"scale": t()}, TypeError, "scale"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale"),
    "scale inf": ({"scale": float("-inf")}, ValueError, "scale"),
    "dropout 1": ({"dropout": 1.0, "training": True}, ValueError, "dropout"),
    "dropout below": ({"dropout": -0.1, "training": True}, ValueError, "dropout"),
    "dropout nan": ({"dropout": float("nan"), "training": True}, ValueError, "dropout"),
    "dropout almost 1": ({"dropout": 1 - 2**-20, "training": True}, ValueError, "dropout"),
    "dropout almost 1, not training": ({"dropout": 1 - 2**-20}, ValueError, "dropout"),
    "dropout word": ({"dropout": "half", "training": True}, TypeError, "dropout"),
    "dropout none": ({"dropout": None}, TypeError, "dropout"),
    "seed float": ({"dropout": 0.5, "training": True, "seed": 1.0}, TypeError, "seed"),
    "seed bool": ({"dropout": 0.5, "training": True, "seed": True}, TypeError, "seed"),
    "seed dtype": ({"dropout": 0.5, "training": True, "seed": t()}, TypeError, "seed"),
    "seed 1-d": ({"dropout": 0.5, "training": True, "seed": t(1, dtype=LONG)}, TypeError, "seed"),
    "seed 65 bits": ({"dropout": 0.5, "training": True, "seed": 2**64}, ValueError, "seed"),
    "backend word": ({"backend": "gpu"}, ValueError, "backend"),
}  # fmt: skip
WRONG_MULTI: Wrong = {
    "x int": ({"x": t(2, 9, 4, dtype=LONG)}, TypeError, "x"),
    "adapter_index none": ({"adapter_index": None}, TypeError, "adapter_index"),
    "adapter_index list": ({"adapter_index": [0, 1]}, TypeError, "adapter_index"),
    "adapter_index float": ({"adapter_index": t(2, 9)}, TypeError, "adapter_index"),
    "adapter_index bool": ({"adapter_index": t(2, 9, dtype=torch.bool)}, TypeError, "adapter_index"),
    "adapter_index shape": ({"adapter_index": t(3, dtype=LONG)}, ValueError, "adapter_index"),
    "adapter_index of the last dimension": ({"adapter_index": t(9, dtype=LONG)}, ValueError, "adapter_index"),
    "adapter_index of x's shape": ({"adapter_index": t(2, 9, 4, dtype=LONG)}, ValueError, "adapter_index"),
    "adapter_index to be broadcast": ({"adapter_index": t(2, 1, dtype=LONG)}, ValueError, "adapter_index"),
    "adapter_index above": ({"adapter_index": torch.tensor([0, 2])}, ValueError, "adapter_index"),
    "adapter_index below": ({"adapter_index": torch.tensor([-2, 0])}, ValueError, "adapter_index"),
    "adapter_index int32 above": ({"adapter_index": torch.tensor([0, 2**31 - 1]).int()}, ValueError, "adapter_index"),
    "lora_a 2-d": ({"lora_a": t(3, 4)}, ValueError, "lora_a"),
    "lora_a width": ({"lora_a": t(2, 3, 5)}, ValueError, "lora_a"),
    "lora_b 2-d": ({"lora_b": t(6, 3)}, ValueError, "lora_b"),
    "lora_b adapters": ({"lora_b": t(3, 6, 3)}, ValueError, "lora_b"),
    "lora_b rank": ({"lora_b": t(2, 6, 2)}, ValueError, "lora_b"),
    "scale 0-d": ({"scale": t()}, ValueError, "scale"),
    "scale shape": ({"scale": t(3)}, ValueError, "scale"),
    "scale 2-d": ({"scale": t(2, 1)}, ValueError, "scale"),
    "scale integers": ({"scale": t(2, dtype=LONG)}, TypeError, "scale"),
    "scale complex": ({"scale": t(2, dtype=torch.complex64)}, TypeError, "scale"),
    "scale of several, nan": ({"scale": torch.tensor([1.0, float("nan")])}, ValueError, "scale"),
    "scale of several, inf": ({"scale": torch.tensor([float("inf"), 1.0])}, ValueError, "scale"),
    "scale list": ({"scale": [1.0, 1.0]}, TypeError, "scale"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale"),
    "dropout 1": ({"dropout": 1.0, "training": True}, ValueError, "dropout"),
}
ALL = [(multi, name) for multi, table in ((False, WRONG), (True, WRONG_MULTI)) for name in table]


def wrong(multi: bool, name: str) -> tuple[dict[str, Any], type[Exception], str]:
    changed, error, begins = (WRONG_MULTI if multi else WRONG)[name]
    return (SEVERAL if multi else SINGLE) | changed, error, begins


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("multi", "name"), ALL)
def test_wrong_arguments(multi: bool, name: str, gradients: bool) -> None:
    arguments, error, begins = wrong(multi, name)
    if gradients:
        arguments = {
            k: v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
    for backend in ("reference", "cpu") if HAS_KERNELS else ("reference",):
        with pytest.raises(error, match=f"^{begins}: "):
            (lora_linear_multi if multi else lora_linear)(**{"backend": backend, **arguments})


# Not what PyTorch's parser refuses, nor what only the public function has.
RAW = [
    (multi, name)
    for multi, name in ALL
    if not any(v is None or isinstance(v, list | str | bool) for v in wrong(multi, name)[0].values())
    and name not in ("bias float", "scale tensor", "dropout almost 1, not training")
]


def raw_arguments(arguments: dict[str, Any]) -> tuple[list[Any], tuple[float, float]]:
    names = ("x", "weight", "lora_a", "lora_b", "bias")
    scale = arguments.get("scale", 1.0)
    scales = scale if isinstance(scale, Tensor) else None
    tensors = [arguments.get(n) for n in names] + [scales, arguments.get("adapter_index"), arguments.get("seed")]
    return tensors, (1.0 if scales is not None else scale, arguments.get("dropout", 0.0))


@pytest.mark.parametrize(("multi", "name"), RAW)
def test_raw_operators_check_for_themselves(multi: bool, name: str, extension: object) -> None:
    """No crash when the raw operator is called with tensors that no public function has seen, and the same name."""
    arguments, error, begins = wrong(multi, name)
    tensors, form = raw_arguments(arguments)
    with pytest.raises(error, match=f"^{begins}: "):
        torch.ops.pykernels._lora_linear_fwd(*tensors, *form)
    with pytest.raises(error, match=f"^{begins}: "):
        torch.ops.pykernels._lora_linear_bwd(t(2, 9, 6), *tensors, t(18, 3), t(0), *form, [True] * 5)


RAW_ONLY: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scales without an index": (SINGLE | {"scale": t(2)}, ValueError, "scale"),
    "scale nan as a tensor": (SINGLE | {"scale": torch.tensor([float("nan")])}, ValueError, "scale"),
    "dropout without a seed": (SINGLE | {"dropout": 0.5}, ValueError, "seed"),
    "dropout 1": (SINGLE | {"dropout": 1.0, "seed": t(dtype=LONG)}, ValueError, "dropout"),
    "dropout almost 1": (SINGLE | {"dropout": 1 - 2**-20, "seed": t(dtype=LONG)}, ValueError, "dropout"),
    "dropout nan": (SINGLE | {"dropout": float("nan"), "seed": t(dtype=LONG)}, ValueError, "dropout"),
    "seed float": (SINGLE | {"dropout": 0.5, "seed": t()}, TypeError, "seed"),
    "seed 1-d": (SINGLE | {"dropout": 0.5, "seed": t(2, dtype=LONG)}, TypeError, "seed"),
}


@pytest.mark.parametrize("name", RAW_ONLY)
def test_what_only_raw_operators_can_be_given(name: str, extension: object) -> None:
    arguments, error, begins = RAW_ONLY[name]
    tensors, form = raw_arguments(arguments)
    with pytest.raises(error, match=f"^{begins}: "):
        torch.ops.pykernels._lora_linear_fwd(*tensors, *form)


def test_raw_operators_check_what_backward_gets(extension: object) -> None:
    tensors, _ = raw_arguments(SINGLE | {"seed": t(dtype=LONG)})
    byte = torch.uint8
    right = {"dy": t(2, 9, 6), "s": t(18, 3), "keep": t(18 + 1, dtype=byte)}

    def backward(dropout: float = 0.5, **changed: Tensor) -> None:
        dy, s, keep = (right | changed).values()
        torch.ops.pykernels._lora_linear_bwd(dy, *tensors, s, keep, 1.0, dropout, [True] * 5)

    backward()
    for changed, error in [
        ({"dy": t(2, 9, 5)}, ValueError),
        ({"dy": t(18, 6)}, ValueError),
        ({"dy": t(2, 9, 6, dtype=DOUBLE)}, TypeError),
        ({"s": t(18, 2)}, ValueError),
        ({"s": t(18, 3, dtype=DOUBLE)}, ValueError),
        ({"s": t(3, 18).t()}, ValueError),
        ({"keep": t(18, dtype=byte)}, ValueError),
        ({"keep": t(19)}, ValueError),
        ({"keep": t(38, dtype=byte)[::2]}, ValueError),
    ]:
        with pytest.raises(error, match=f"^{next(iter(changed))}: "):
            backward(**changed)
    with pytest.raises(ValueError, match="^keep: "):
        backward(dropout=0.0)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_named_backend_that_cannot_serve_raises_with_the_reason(name: str) -> None:
    why = "not built" if name == "cuda" and _extension.cuda_reason else "it runs on cuda, and the tensors are on cpu"
    with pytest.raises(RuntimeError, match=f"^backend: '{name}' cannot serve lora_linear here: {why}"):
        lora_linear(**SINGLE, backend=name)


def test_other_devices_get_the_reference(extension: object) -> None:
    """#20: the meta device stands for any that has no kernels; a named backend says why it does not serve it."""
    single, several = ({name: v.to("meta") for name, v in a.items()} for a in (SINGLE, SEVERAL))
    for options in ({}, {"dropout": 0.5, "training": True}):
        assert lora_linear(**single, **options).shape == (2, 9, 6)
        assert lora_linear_multi(**several, **options).shape == (2, 9, 6)
    with pytest.raises(RuntimeError, match="^backend: 'cpu'.* on meta"):
        lora_linear(**single, backend="cpu")
    scaled = SEVERAL | {"scale": torch.ones(2), "bias": t(6)}
    for name in scaled.keys() - {"x"}:
        for backend in (None, "reference"):
            with pytest.raises(ValueError, match=f"^{name}: expected a tensor on cpu like x, got meta"):
                lora_linear_multi(**(scaled | {name: scaled[name].to("meta")}), backend=backend)


def test_table_has_every_backend() -> None:
    rows = [name for operator, name, *_ in _backend.table() if operator == "lora_linear"]
    assert set(rows) == set(_backend.BACKENDS)
