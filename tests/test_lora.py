"""LoRALinear: values, parameters, merging, dtypes, copies. Whole models are in test_lora_model.py."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pykernels import LoRALinear, lora_linear
from tests.helpers import FLOATS


def filled(layer: LoRALinear) -> LoRALinear:
    """With a low-rank term that is not zero, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (layer.lora_a, layer.lora_b):
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    return layer


def expected(layer: LoRALinear, x: Tensor) -> Tensor:
    """The formula without dropout, in float64."""
    weight, lora_a, lora_b = layer.original_weight.double(), layer.lora_a.double(), layer.lora_b.double()
    if layer.fan_in_fan_out:
        weight = weight.t()
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), weight, bias) + layer.scale * (x.double() @ lora_a.t() @ lora_b.t())


def conv1d(inputs: int, outputs: int) -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    return pytorch_utils.Conv1D(outputs, inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [1, 3, 8, 17])
def test_parameters(r: int, bias: bool) -> None:
    layer = LoRALinear(6, 5, r, bias=bias)
    shapes = {"weight": (5, 6), "lora_a": (r, 6), "lora_b": (5, r)} | ({"bias": (5,)} if bias else {})
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == shapes
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    other = filled(LoRALinear(6, 5, r, bias=bias))
    other.load_state_dict(filled(layer).state_dict())
    x = torch.randn(2, 3, 6)
    assert torch.equal(other(x), layer(x)) and layer(x).shape == (2, 3, 5)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


def test_a_linear_layers_state_dict_loads_but_for_the_adapter() -> None:
    linear = nn.Linear(6, 5)
    layer = LoRALinear(6, 5)
    assert layer.load_state_dict(linear.state_dict(), strict=False).missing_keys == ["lora_a", "lora_b"]
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), linear(x))


def test_weight_and_bias_begin_as_those_of_linear() -> None:
    torch.manual_seed(3)
    linear = nn.Linear(64, 32)
    torch.manual_seed(3)
    layer = LoRALinear(64, 32, 8)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("init", ["b_zero", "a_zero"])
def test_initial_term_is_zero_and_its_random_factor_uniform(init: str) -> None:
    layer = LoRALinear(512, 256, 16, init=init)
    random, zero = (layer.lora_a, layer.lora_b) if init == "b_zero" else (layer.lora_b, layer.lora_a)
    assert not zero.any()
    bound = 1 / math.sqrt(random.shape[1])
    assert random.abs().max() <= bound and abs(random.std().item() * math.sqrt(3) / bound - 1) < 0.05
    x = torch.randn(3, 512)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("rslora, scale", [(False, 6 / 4), (True, 6 / 2)])
def test_scale(rslora: bool, scale: float) -> None:
    layer = filled(LoRALinear(5, 7, 4, 6.0, rslora=rslora))
    assert layer.scale == scale
    x = torch.randn(2, 5)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    layer.scale = 0.0
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_is_the_function(dtype: str, backend: str) -> None:
    layer = filled(LoRALinear(9, 6, 3, dropout=0.4, dtype=FLOATS[dtype], backend=backend))
    exact = torch.float64 if dtype == "fp64" else torch.float32
    assert layer.weight.dtype == FLOATS[dtype] and layer.lora_a.dtype == layer.lora_b.dtype == exact
    x = torch.randn(2, 4, 9).to(FLOATS[dtype])
    arguments = {"bias": layer.bias, "scale": layer.scale, "backend": backend}
    factors = x, layer.weight, layer.lora_a, layer.lora_b
    dropped = lora_linear(*factors, **arguments, dropout=0.4, training=True, seed=11)
    assert torch.equal(layer(x, seed=11), dropped)
    assert torch.equal(layer.eval()(x, seed=11), lora_linear(*factors, **arguments))
    assert not torch.equal(layer(x), dropped)


def test_only_the_adapter_gets_gradients() -> None:
    layer, x = filled(LoRALinear(9, 6, 3)), torch.randn(4, 9, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    parameters = [x.detach().double().requires_grad_(), *(p.detach().double() for p in layer.parameters())]
    twin = copy.deepcopy(layer).double()
    expected(twin, parameters[0]).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), parameters[0].grad, rtol=1e-4, atol=1e-4)
    for name in ("lora_a", "lora_b"):
        torch.testing.assert_close(
            getattr(layer, name).grad.double(), getattr(twin, name).grad, rtol=1e-4, atol=1e-4, msg=name
        )


# --- merging ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("made_from", ["scratch", "linear", "conv1d"])
def test_merge_and_exact_unmerge(made_from: str, dtype: str) -> None:
    if made_from == "scratch":
        layer = LoRALinear(40, 24, 5, dtype=FLOATS[dtype])
    else:
        base = nn.Linear(40, 24) if made_from == "linear" else conv1d(40, 24)
        layer = LoRALinear.from_layer(base.to(FLOATS[dtype]), 5)
    layer = filled(layer).eval()
    x, before = torch.randn(7, 40).to(FLOATS[dtype]), layer.weight
    bits, state = before.clone(), {name: t.clone() for name, t in layer.state_dict().items()}
    separate = layer(x)
    assert layer.merge() is layer and layer.merged and layer.weight.dtype == FLOATS[dtype]
    assert torch.equal(layer.merge().weight, layer.weight), "merged twice"
    exact = before.double() + layer.delta_weight().double()
    # Rounded once: half a unit of the dtype, and the rounding of a sum in float32.
    unit = torch.finfo(FLOATS[dtype]).eps / 2 + 2 * torch.finfo(torch.promote_types(FLOATS[dtype], torch.float32)).eps
    assert ((layer.weight.double() - exact).abs() <= unit * exact.abs() + 1e-7 * (dtype != "fp64")).all()
    tolerance = 24 * torch.finfo(FLOATS[dtype]).eps
    torch.testing.assert_close(layer(x), separate, rtol=tolerance, atol=tolerance * 4)
    merged_state = layer.state_dict()
    assert merged_state.keys() == state.keys() and all(torch.equal(merged_state[n], t) for n, t in state.items())
    assert layer.unmerge() is layer and layer.weight is before and torch.equal(before, bits)
    assert torch.equal(layer(x), separate) and not layer.unmerge().merged


def test_merging_leaves_other_owners_of_the_weight_alone() -> None:
    linear = nn.Linear(6, 4)
    layer, bits = filled(LoRALinear.from_layer(linear, 2)), linear.weight.clone()
    assert layer.weight is linear.weight and layer.bias is linear.bias
    layer.merge()
    assert torch.equal(linear.weight, bits) and not torch.equal(layer.weight, bits)
    assert layer.unmerge().weight is linear.weight


def test_merged_layer_follows_load_state_dict_and_to() -> None:
    layer, other = filled(LoRALinear(6, 4, 2)).merge(), LoRALinear(6, 4, 2)
    with torch.no_grad():
        other.lora_b.copy_(torch.randn(4, 2))
    layer.load_state_dict(other.state_dict())
    assert layer.merged and torch.equal(layer.weight, copy.deepcopy(other).merge().weight)
    x = torch.randn(3, 6)
    layer.double()
    assert layer.merged and layer.weight.dtype == torch.float64
    torch.testing.assert_close(layer.eval()(x.double()), other.double()(x.double()), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.unmerge().weight, other.weight)


def test_a_merged_layer_is_not_trained() -> None:
    layer, x = filled(LoRALinear(6, 4, 2)).merge(), torch.randn(3, 6)
    with pytest.raises(RuntimeError, match=r"^LoRALinear: expected an unmerged layer in training, call unmerge\(\)"):
        layer(x)
    with torch.no_grad():
        layer(x)
    assert layer.eval()(x).shape == (3, 4)


def test_disabled() -> None:
    layer, x = filled(LoRALinear(6, 4, 2)).eval(), torch.randn(3, 6)
    plain = F.linear(x, layer.weight, layer.bias)
    layer.enabled = False
    assert torch.equal(layer(x), plain)
    layer.merge()
    assert torch.equal(layer(x), plain), "merged"
    layer.enabled = True
    assert not torch.allclose(layer(x), plain)


# --- layers that it replaces ---


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_and_back(bias: bool) -> None:
    linear, x = nn.Linear(6, 4, bias=bias).eval(), torch.randn(3, 6)
    layer = LoRALinear.from_layer(linear, 2, 4.0, 0.1, init="a_zero")
    assert not layer.training and not layer.weight.requires_grad and layer.init == "a_zero" and layer.dropout == 0.1
    torch.testing.assert_close(layer(x), linear(x))
    back = layer.to_layer()
    assert type(back) is nn.Linear and back.weight is linear.weight and back.bias is linear.bias
    assert not back.training and torch.equal(back(x), linear(x)) and repr(back) == repr(linear)


def test_from_conv1d_and_back(backend: str) -> None:
    base, x = conv1d(6, 4), torch.randn(2, 3, 6)
    with torch.no_grad():
        base.bias.normal_()
    layer = filled(LoRALinear.from_layer(base, 2, backend=backend))
    assert layer.fan_in_fan_out and layer.weight is base.weight and layer.weight.shape == (6, 4)
    assert layer.lora_a.shape == (2, 6) and layer.lora_b.shape == (4, 2)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    back = layer.to_layer()
    assert type(back) is type(base) and back.weight is base.weight and torch.equal(back(x), base(x))


def test_layers_that_are_refused() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked, replaced, parametrized, besides = (nn.Linear(4, 4) for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    nn.utils.parametrizations.weight_norm(parametrized)
    besides.register_buffer("mean", torch.zeros(4))
    for layer, error, message in [
        (nn.Embedding(4, 4), TypeError, "expected nn.Linear or transformers' Conv1D, got Embedding"),
        (Own(4, 4), TypeError, "expected the forward of Linear, got one of Own's own"),
        (replaced, TypeError, "expected the forward of Linear"),
        (hooked, ValueError, "expected a layer without hooks"),
        (parametrized, ValueError, "expected the parameters weight and bias alone, got parametrizations"),
        (besides, ValueError, "expected the parameters weight and bias alone, got mean"),
        (nn.LazyLinear(4), ValueError, "expected a layer without hooks"),
    ]:
        with pytest.raises(error, match=f"^layer: {message}"):
            LoRALinear.from_layer(layer)
    integers = nn.Linear(4, 4)
    integers.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"^layer.weight: expected float32, .* got int8"):
        LoRALinear.from_layer(integers)


def test_arguments() -> None:
    for arguments, options, error, name in [
        ((-1, 4), {}, ValueError, "in_features: expected >= 0, got -1"),
        ((4, 4.0), {}, TypeError, "out_features"),
        ((4, 4, 0), {}, ValueError, "r: expected >= 1, got 0"),
        ((4, 4, 2, "a"), {}, TypeError, "alpha: expected a float, got str"),
        ((4, 4, 2, math.inf), {}, ValueError, "alpha: expected a finite number"),
        ((4, 4, 2, 1.0, 1.0), {}, ValueError, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ((4, 4), {"init": "gaussian"}, ValueError, "init: expected one of 'b_zero', 'a_zero', got 'gaussian'"),
        ((4, 4), {"dtype": torch.int8}, TypeError, "dtype: expected float32"),
        ((4, 4), {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: expected float32"),
    ]:
        with pytest.raises(error, match=f"^{name}"):
            LoRALinear(*arguments, **options)
    with pytest.raises(TypeError, match=r"(?i)^weight: expected bfloat16 like x, got float"):
        LoRALinear(4, 4)(torch.zeros(2, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,)])
def test_empty_and_single_rows(shape: tuple[int, ...]) -> None:
    layer = filled(LoRALinear(6, 4, 3))
    y = layer(torch.randn(shape))
    y.sum().backward()
    assert y.shape == (*shape[:-1], 4) and torch.isfinite(layer.lora_a.grad).all()
    assert LoRALinear(0, 4)(torch.zeros(2, 0)).shape == (2, 4) and LoRALinear(4, 0)(torch.zeros(2, 4)).shape == (2, 0)


# --- what PyTorch does with modules ---


def test_repr_tells_what_differs_from_the_defaults() -> None:
    assert repr(LoRALinear(6, 4)) == "LoRALinear(6, 4, r=8, alpha=16)"
    layer = LoRALinear(6, 4, 2, 3.5, 0.1, rslora=True, bias=False, init="a_zero", backend="reference").merge()
    layer.enabled = False
    assert repr(layer) == (
        "LoRALinear(6, 4, r=2, alpha=3.5, dropout=0.1, rslora=True, bias=False, init='a_zero', "
        "backend='reference', merged, disabled)"
    )


@pytest.mark.parametrize("merged", [False, True])
def test_copies_pickles_devices_and_dtypes(merged: bool) -> None:
    layer, x = filled(LoRALinear(6, 4, 2)).eval(), torch.randn(3, 6)
    if merged:
        layer.merge()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x)) and other.merged == merged
        assert torch.equal(other.unmerge().weight, layer.original_weight)
    meta = LoRALinear(6, 4, 2, device="meta", dtype=torch.bfloat16)
    assert meta(torch.zeros(2, 6, device="meta", dtype=torch.bfloat16)).shape == (2, 4)
    meta = meta.to_empty(device="cpu").float()
    meta.reset_parameters()
    assert meta(x).dtype == torch.float32


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base: torch.dtype, adapter: torch.dtype) -> None:
    """#16: every mixture of dtypes under autocast, forward and backward."""
    layer = filled(LoRALinear(32, 16, 4, dtype=base, adapter_dtype=adapter))
    x = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_a.grad.dtype == layer.lora_b.grad.dtype == adapter
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_dropout(use_reentrant: bool) -> None:
    layer, x = filled(LoRALinear(32, 16, 4, dropout=0.5)), torch.randn(5, 32, requires_grad=True)
    results = []
    for call in (layer, lambda t: checkpoint(layer, t, use_reentrant=use_reentrant)):
        torch.manual_seed(9)
        layer.zero_grad()
        x.grad = None
        y = call(x)
        y.sin().sum().backward()
        results.append([y, x.grad, layer.lora_a.grad, layer.lora_b.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_no_float32_copy_of_x(kernels: str) -> None:
    """Acceptance 6: float32 adapters on a bfloat16 layer make nothing of the size of x in float32."""
    rows, inputs = 512, 1024
    layer = filled(LoRALinear(inputs, 8, 4, dtype=torch.bfloat16, backend=kernels)).eval()
    x = torch.randn(rows, inputs).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < rows * inputs * 4


def test_compiled_whole(extension: object) -> None:
    layers = nn.Sequential(filled(LoRALinear(8, 12, 3, dropout=0.3)), nn.GELU(), filled(LoRALinear(12, 4, 2)))
    x = torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layers, compiled):
        torch.manual_seed(2)
        y = call(x)
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in layers.parameters() if p.requires_grad)])]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    layers.eval()
    for change in (lambda: [m.merge() for m in layers[::2]], lambda: [m.unmerge() for m in layers[::2]]):
        change()
        assert torch.equal(compiled(x), layers(x))
