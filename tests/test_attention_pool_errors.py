"""attention_pool: wrong arguments. Both backends raise the same type, and a message that begins with the argument's
name. `#n` names a line of the project's failure checklist."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels import _backend, _extension, attention_pool

HAS_KERNELS = _extension._C is not None


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


DOUBLE, INT, LONG = torch.float64, torch.int32, torch.int64
# x [2, 9, 4], weight [8, 4], query [8] and what is wrong with them; the error; what the message begins with.
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x list": ({"x": [1.0]}, TypeError, "x"),
    "x int": ({"x": t(2, 9, 4, dtype=LONG)}, TypeError, "x"),
    "x complex": ({"x": t(2, 9, 4, dtype=torch.complex64)}, TypeError, "x"),
    "x 2-d": ({"x": t(9, 4)}, ValueError, "x"),
    "x 4-d": ({"x": t(1, 2, 9, 4)}, ValueError, "x"),
    "x 3-d packed": ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "x"),
    "weight none": ({"weight": None}, TypeError, "weight"),
    "weight dtype": ({"weight": t(8, 4, dtype=DOUBLE)}, TypeError, "weight"),
    "weight 3-d": ({"weight": t(8, 4, 1)}, ValueError, "weight"),
    "weight width": ({"weight": t(8, 5)}, ValueError, "weight"),
    "query none": ({"query": None}, TypeError, "query"),
    "query dtype": ({"query": t(8, dtype=DOUBLE)}, TypeError, "query"),
    "query 0-d": ({"query": t()}, ValueError, "query"),
    "query 3-d": ({"query": t(1, 2, 8)}, ValueError, "query"),
    "query hidden": ({"query": t(7)}, ValueError, "query"),
    "query hidden of heads": ({"query": t(8, 2)}, ValueError, "query"),
    "bias float": ({"bias": 1.0}, TypeError, "bias"),
    "bias dtype": ({"bias": t(8, dtype=torch.bfloat16)}, TypeError, "bias"),
    "bias shape": ({"bias": t(4)}, ValueError, "bias"),
    "gate_weight dtype": ({"gate_weight": t(8, 4, dtype=DOUBLE)}, TypeError, "gate_weight"),
    "gate_weight shape": ({"gate_weight": t(8, 5)}, ValueError, "gate_weight"),
    "gate_bias shape": ({"gate_weight": t(8, 4), "gate_bias": t(4)}, ValueError, "gate_bias"),
    "gate_bias dtype": ({"gate_weight": t(8, 4), "gate_bias": t(8, dtype=DOUBLE)}, TypeError, "gate_bias"),
    "gate_bias alone": ({"gate_bias": t(8)}, ValueError, "gate_bias"),
    "activation word": ({"activation": "sigmoid"}, ValueError, "activation"),
    "activation none": ({"activation": None}, TypeError, "activation"),
    "return_scores word": ({"return_scores": "all"}, ValueError, "return_scores"),
    "return_scores bool": ({"return_scores": True}, TypeError, "return_scores"),
    "return_scores none as a word": ({"return_scores": "none"}, ValueError, "return_scores"),
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
    "backend word": ({"backend": "gpu"}, ValueError, "backend"),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, gradients: bool) -> None:
    changed, error, begins = WRONG[name]
    arguments = {"x": t(2, 9, 4), "weight": t(8, 4), "query": t(8), **changed}
    if gradients:
        arguments = {
            k: v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
    messages = []
    for backend in ("reference", "cpu") if HAS_KERNELS else ("reference",):
        with pytest.raises(error, match=f"^{begins}:|^{begins},") as raised:
            attention_pool(**{"backend": backend, **arguments})
        messages.append(str(raised.value).split(":")[0])
    assert len(set(messages)) == 1


# Not what PyTorch's parser refuses, nor what only the public function has.
RAW = [
    name
    for name, (changed, *_) in WRONG.items()
    if not changed.keys() & {"backend"}
    and not any(isinstance(v, list | float | bool) or v is None for v in changed.values())
    and name != "return_scores none as a word"
]


@pytest.mark.parametrize("name", RAW)
def test_raw_operators_check_for_themselves(name: str, extension: object) -> None:
    """No crash when the raw operator is called with tensors that no public function has seen."""
    changed, error, _ = WRONG[name]
    arguments = {"x": t(2, 9, 4), "weight": t(8, 4), "query": t(8), **changed}
    names = ["x", "weight", "query", "bias", "gate_weight", "gate_bias", "mask", "lengths", "cu_seqlens"]
    tensors = [arguments.get(n) for n in names]
    form = [arguments.get("activation", "tanh"), arguments.get("return_scores", "raw")]
    saved = (t(2, 9), t(2, 1, 2), t(2, 4), None)
    with pytest.raises(error):
        torch.ops.pykernels._attention_pool_fwd(*tensors, *form, True, False)
    with pytest.raises(error):
        torch.ops.pykernels._attention_pool_bwd(t(2, 4), None, *tensors, *saved, *form, [True] * 6)


def test_raw_operators_check_what_backward_gets(extension: object) -> None:
    tensors = (t(2, 9, 4), t(8, 4), t(8), *(None,) * 6)
    right = {
        "dout": t(2, 4),
        "dscores": t(2, 9),
        "scores": t(2, 9),
        "max_sum": t(2, 1, 2),
        "pooled": t(2, 4),
        "kept": t(18, 8),
    }

    def backward(returned: str = "raw", **changed: Tensor) -> None:
        dout, dscores, *saved = (right | changed).values()
        torch.ops.pykernels._attention_pool_bwd(dout, dscores, *tensors, *saved, "tanh", returned, [True] * 6)

    backward()
    for wrong, error in [
        ({"dout": t(2, 5)}, ValueError),
        ({"dout": t(2, 4, dtype=DOUBLE)}, TypeError),
        ({"dscores": t(2, 8)}, ValueError),
        ({"dscores": t(2, 9, dtype=DOUBLE)}, TypeError),
        ({"scores": t(0)}, ValueError),
        ({"max_sum": t(2, 2)}, ValueError),
        ({"pooled": t(2, 4, dtype=DOUBLE)}, ValueError),
        ({"kept": t(18, 16)}, ValueError),
    ]:
        with pytest.raises(error, match=f"^{next(iter(wrong))}"):
            backward(**wrong)
    with pytest.raises(ValueError, match="^dscores: expected None"):
        backward("none")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_named_backend_that_cannot_serve_raises_with_the_reason(name: str) -> None:
    built = name == "triton" or not _extension.cuda_reason
    why = "it runs on cuda, and the tensors are on cpu" if built else "not built"
    with pytest.raises(RuntimeError, match=f"^backend: '{name}' cannot serve attention_pool here: {why}"):
        attention_pool(t(1, 2, 4), t(8, 4), t(8), backend=name)


def test_other_devices_get_the_reference(extension: object) -> None:
    """#20: the meta device stands for any that has no kernels; a named backend says why it does not serve it."""
    x, weight, query = (torch.zeros(*shape, device="meta") for shape in ((2, 9, 4), (8, 4), (8,)))
    assert attention_pool(x, weight, query, lengths=torch.zeros(2, device="meta", dtype=INT)).shape == (2, 4)
    with pytest.raises(RuntimeError, match="^backend: 'cpu'.* on meta"):
        attention_pool(x, weight, query, backend="cpu")


def test_table_has_every_backend() -> None:
    rows = [name for operator, name, *_ in _backend.table() if operator == "attention_pool"]
    assert set(rows) == set(_backend.BACKENDS)
