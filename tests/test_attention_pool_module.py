"""AttentionPool: parameters, state dicts, and the public pooling layers that it replaces. The layers are written from
their formulas. `#n` names a line of the project's failure checklist."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from pykernels import AttentionPool, attention_pool
from tests.helpers import FLOATS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_parameters(heads: int | None, gated: bool, bias: bool) -> None:
    pool = AttentionPool(6, 4, heads, bias=bias, gated=gated)
    shapes = {"weight": (4, 6), "query": (4,) if heads is None else (heads, 4)}
    if bias:
        shapes["bias"] = (4,)
    if gated:
        shapes["gate_weight"] = (4, 6)
        if bias:
            shapes["gate_bias"] = (4,)
    assert {name: tuple(t.shape) for name, t in pool.state_dict().items()} == shapes
    other = AttentionPool(6, 4, heads, bias=bias, gated=gated)
    other.load_state_dict(pool.state_dict())
    x = torch.randn(2, 5, 6)
    assert torch.equal(other(x), pool(x)) and pool(x).shape == ((2, 6) if heads is None else (2, heads, 6))


def test_parameters_begin_as_those_of_linear_layers() -> None:
    torch.manual_seed(3)
    linear, gate = nn.Linear(64, 32), nn.Linear(64, 32)
    last = nn.Linear(32, 5, bias=False)
    torch.manual_seed(3)
    pool = AttentionPool(64, 32, 5, bias=True, gated=True)
    assert torch.equal(pool.weight, linear.weight) and torch.equal(pool.bias, linear.bias)
    assert torch.equal(pool.gate_weight, gate.weight) and torch.equal(pool.gate_bias, gate.bias)
    assert torch.equal(pool.query, last.weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_is_the_function(dtype: str, backend: str) -> None:
    pool = AttentionPool(4, 6, 2, bias=True, gated=True, activation="gelu", dtype=FLOATS[dtype], backend=backend)
    x, lengths = torch.randn(2, 9, 4).to(FLOATS[dtype]), torch.tensor([4, 9])
    parameters = {"bias": pool.bias, "gate_weight": pool.gate_weight, "gate_bias": pool.gate_bias, "activation": "gelu"}
    function = [x, pool.weight, pool.query]
    expected = attention_pool(*function, **parameters, lengths=lengths, return_scores="raw", backend=backend)
    mask = torch.arange(9) < lengths.unsqueeze(-1)
    for rows in ({"lengths": lengths}, {"mask": mask}):
        got = pool(x, **rows, return_scores="raw")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    packed = pool(x[mask], cu_seqlens=torch.tensor([0, 4, 13]))
    assert torch.allclose(packed, expected[0], rtol=0, atol=8 * torch.finfo(x.dtype).eps)


def test_repr_tells_what_differs_from_the_defaults() -> None:
    assert repr(AttentionPool(4, 8)) == "AttentionPool(4, 8)"
    pool = AttentionPool(4, 8, 2, bias=True, gated=True, activation="relu", backend="reference")
    assert repr(pool) == "AttentionPool(4, 8, heads=2, bias=True, gated=True, activation='relu', backend='reference')"


def test_copies_pickles_devices_and_dtypes() -> None:
    pool, x = AttentionPool(4, 8, gated=True), torch.randn(1, 5, 4)
    file = io.BytesIO()
    torch.save(pool, file)
    file.seek(0)
    for other in (copy.deepcopy(pool), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), pool(x))
    meta = AttentionPool(4, 8, device="meta", dtype=torch.bfloat16)
    assert meta(torch.zeros(2, 9, 4, device="meta", dtype=torch.bfloat16)).shape == (2, 4)
    meta = meta.to_empty(device="cpu").float()
    meta.reset_parameters()
    assert meta(x).dtype == torch.float32


def test_module_arguments() -> None:
    for arguments, error, name in [
        ((0, 4), ValueError, "dim"),
        ((4, 4.0), TypeError, "hidden"),
        ((4, 4, 0), ValueError, "heads"),
    ]:
        with pytest.raises(error, match=f"^{name}"):
            AttentionPool(*arguments)
    with pytest.raises(ValueError, match="^activation: expected one of 'tanh', 'swish'"):
        AttentionPool(4, 4, activation="sigmoid")


def test_weights_are_read_at_every_call(kernels: str) -> None:
    """Acceptance 9: no cache of packed weights, so changes that no version counter shows are seen."""
    pool, x = AttentionPool(8, 8, backend=kernels), torch.randn(2, 9, 8)
    with torch.no_grad():
        before = pool(x)
        pool.weight.data = pool.weight.data.flip(0).contiguous() * 3
        assert not torch.equal(before, pool(x))
        pool.weight.data.mul_(0)
        assert torch.allclose(pool(x), x.mean(1), atol=1e-6)


# --- public layers ---


class InstancePooling(nn.Module):
    """Attention pooling of multiple-instance learning: linear layers V, U and w, softmax over the instances."""

    def __init__(self, gated: bool, activation: type[nn.Module], outputs: int, bias: bool) -> None:
        super().__init__()
        self.V, self.act = nn.Linear(12, 7, bias=bias), activation()
        self.U = nn.Linear(12, 7, bias=bias) if gated else None
        self.w = nn.Linear(7, outputs, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.V(x))
        if self.U is not None:
            h = h * torch.sigmoid(self.U(x))
        s = self.w(h).transpose(1, 2)
        return torch.softmax(s.masked_fill(~mask[:, None], -torch.inf), -1) @ x, s


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
@pytest.mark.parametrize("gated", [False, True])
def test_instance_pooling_replaced(gated: bool, activation: type, outputs: int, bias: bool, backend: str) -> None:
    """Acceptance 2: the layer in plain PyTorch and ours, from the same weights, agree in outputs and all gradients; and
    the weights go back."""
    torch.manual_seed(1)
    layer = InstancePooling(gated, activation, outputs, bias).double()
    name = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.GELU: "gelu"}[activation]
    ours = AttentionPool(12, 7, outputs, bias=bias, gated=gated, activation=name, backend=backend).double()
    names = {
        "weight": "V.weight",
        "bias": "V.bias",
        "gate_weight": "U.weight",
        "gate_bias": "U.bias",
        "query": "w.weight",
    }
    ours.load_state_dict({n: layer.state_dict()[names[n]] for n in ours.state_dict()})
    x, mask = torch.randn(3, 20, 12, dtype=torch.float64), torch.rand(3, 20) < 0.7
    results = []
    for call in (lambda t: layer(t, mask), lambda t: ours(t, mask=mask, return_scores="raw")):
        leaf = x.clone().requires_grad_()
        out, s = call(leaf)
        s = torch.where(mask[:, None], s, 0)
        (out.square().sum() + s.sin().sum()).backward()
        results.append([out, s, leaf.grad])
    results[0] += [layer.get_parameter(names[n]).grad for n in ours.state_dict()]
    results[1] += [p.grad for p in ours.parameters()]
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    back = InstancePooling(gated, activation, outputs, bias).double()
    back.load_state_dict({names[n]: t for n, t in ours.state_dict().items()})
    assert torch.equal(back(x, mask)[0], layer(x, mask)[0])
