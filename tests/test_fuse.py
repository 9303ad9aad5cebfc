"""fuse: layers of other packages before and after, on one small layer of each kind. PEFT's are in test_peft.py."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pykernels import fuse, fused_glu, fused_pooling, fused_wavenet, gated_conv1d, register_fusion, unfuse
from tests.fuse_blocks import NORMS, ConvTBC, DiffWaveBlock, VitsBlock
from tests.fuse_cases import (
    CASES,
    allennlp_block,
    fairseq_decoder,
    fairseq_encoder,
    inputs,
    is_floating,
    make,
    parallel_wavegan_block,
    results,
    transformers_vits,
)
from tests.helpers import (
    FLOATS,
    FORWARD,
    GRADIENT,
    assert_close_to_reference,
    is_standard,
    rounding_floor,
    through_onnx,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the operator's name with each call by a fused layer."""
    made: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        return call

    fused = (fused_wavenet, "gated_conv1d"), (fused_glu, "gated_conv1d"), (fused_pooling, "attention_pool")
    for module, name in fused:
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return made


def fused(name: str, calls: list[str], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fused layer; the calls of the comparison are forgotten."""
    layer = fuse(make(name, dtype))
    calls.clear()
    return layer


# --- the same results ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str, dtype: str, calls: list[str], extension: object) -> None:
    own = results(make(name, FLOATS[dtype]), inputs(name, FLOATS[dtype]))
    truth = results(make(name, torch.float64), inputs(name, torch.float64))
    ours = results(fused(name, calls, FLOATS[dtype]), inputs(name, FLOATS[dtype]))
    assert calls == [CASES[name].operator] * CASES[name].calls
    assert ours.keys() == own.keys() and len(ours) > 2
    for what, t in ours.items():
        floor = rounding_floor(truth[what], FLOATS[dtype], 24 * 5 * 23)
        factor = FORWARD if what.startswith("output") else GRADIENT
        assert_close_to_reference(t, truth[what], own[what], factor=factor, floor=floor, what=what)


@pytest.mark.parametrize("name", CASES)
def test_sizes(name: str, calls: list[str]) -> None:
    """One row, one sequence, and fewer rows than the taps reach over."""
    own, layer = make(name), fused(name, calls)
    for batch, length in ((1, 1), (1, 7), (2, 3), (3, 64), (0, 9)):
        args = inputs(name, torch.float32, batch, length)
        try:
            with torch.no_grad():
                expected = own(*args)
        except RuntimeError as error:
            with pytest.raises(RuntimeError) as raised:
                layer(*args)
            assert str(raised.value) == str(error)
            continue
        with torch.no_grad():
            torch.testing.assert_close(layer(*args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_autocast(name: str, calls: list[str]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        own = results(make(name), inputs(name, torch.float32))
        ours = results(fused(name, calls), inputs(name, torch.float32))
    assert len(calls) == CASES[name].calls
    truth = results(make(name, torch.float64), inputs(name, torch.float64))
    for what, t in ours.items():
        assert t.dtype == own[what].dtype
        floor = rounding_floor(truth[what], torch.bfloat16, 24 * 5 * 23)
        assert_close_to_reference(t, truth[what], own[what], factor=GRADIENT, floor=floor, what=what)


# --- states ---


@pytest.mark.parametrize("name", CASES)
def test_state_and_undoing(name: str, calls: list[str]) -> None:
    """Names and parameters are the layer's own; a fused state loads into one that is not, and back; undone exactly."""
    own, layer = make(name), make(name)
    assert not calls
    cls, parameters = type(layer), dict(layer.named_parameters())
    random = torch.get_rng_state()
    assert fuse(layer) is layer and isinstance(layer, cls) and type(layer) is not cls
    assert torch.equal(torch.get_rng_state(), random) and layer.training
    assert all(p is parameters[n] for n, p in layer.named_parameters()) and len(parameters) > 2
    assert list(layer.state_dict()) == list(own.state_dict())

    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.01)
    own.load_state_dict(layer.state_dict())
    args = inputs(name, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(layer(*args), own(*args), rtol=1e-4, atol=1e-5)
    fresh = fuse(make(name))
    fresh.load_state_dict(own.state_dict())
    calls.clear()
    assert fuse(fuse(fresh)) is fresh, "twice is once"
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(fresh(*args), layer(*args), rtol=0, atol=0)
    assert len(calls) == 2 * CASES[name].calls

    assert unfuse(unfuse(layer)) is layer and type(layer) is cls
    calls.clear()
    expected = results(own, args)
    for what, t in results(layer, args).items():
        assert torch.equal(t, expected[what]), what
    assert not calls


@pytest.mark.parametrize("name", ["transformers, parametrized", "torchmil, gated"])
def test_copies_and_pickles_stay_fused(name: str, calls: list[str]) -> None:
    layer = nn.ModuleDict({"a": fused(name, calls)})
    args = inputs(name, torch.float32)
    expected = layer["a"](*args)
    others = [copy.deepcopy(layer)["a"]]
    if name.startswith("torchmil"):  # PyTorch refuses to pickle what is parametrized
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        others.append(torch.load(file, weights_only=False)["a"])
    calls.clear()
    for other in others:
        torch.testing.assert_close(other(*args), expected, rtol=0, atol=0)
        assert type(other) is type(layer["a"])
    assert len(calls) == len(others) * CASES[name].calls


# --- compiled and exported ---


@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, calls: list[str], extension: object) -> None:
    torch._dynamo.reset()
    layer, args = fused(name, calls), inputs(name, torch.float32)
    expected = results(layer, args)
    for what, t in results(torch.compile(layer, backend="aot_eager", fullgraph=True), args).items():
        torch.testing.assert_close(t, expected[what.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-4)


def dynamic(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Batch and lengths of arguments of 3 sequences of 23, and of 27 of the source, by their sizes."""
    batch, length, source = (torch.export.Dim(name, min=n) for name, n in (("batch", 1), ("length", 8), ("source", 8)))
    named = {3: batch, 23: length, 27: source}
    return tree_map(lambda t: None if t is None else {i: named[n] for i, n in enumerate(t.shape) if n in named}, args)


@pytest.mark.parametrize("name", CASES)
def test_exported(name: str, calls: list[str]) -> None:
    layer, args = fused(name, calls).eval(), inputs(name, torch.float32)
    program = torch.export.export(layer, args, dynamic_shapes=dynamic(args))
    assert len(calls) == CASES[name].calls
    assert is_standard(program.graph)
    for batch, length in ((3, 23), (5, 40)):
        given = inputs(name, torch.float32, batch, length)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*given), layer(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "transformers, plain", "GluonTS", "DiffSinger", "Parallel WaveGAN", "fairseq, encoder",
        "fairseq, decoder, plain, no attention", "AllenNLP, backward", "torchmil, gated",
    ],
)  # fmt: skip
def test_onnx(name: str, calls: list[str], tmp_path: Path) -> None:
    layer, args = fused(name, calls).eval(), inputs(name, torch.float32)
    run = through_onnx(layer, args, dynamic(args), tmp_path)
    for batch, length in ((3, 23), (2, 40)):
        given = inputs(name, torch.float32, batch, length)
        with torch.no_grad():
            expected = layer(*given)
        tensors, wanted = ([t for t in tree_leaves(ts) if t is not None] for ts in (given, expected))
        torch.testing.assert_close(run(*tensors), wanted, rtol=1e-4, atol=1e-5)


# --- what runs in the layer's own forward, and what is refused ---


def inner(layer: nn.Module) -> list[nn.Module]:
    """Its convolutions and linear layers."""
    return [m for m in layer.modules() if isinstance(m, nn.Conv1d | nn.Linear | ConvTBC)]


def replaced(name: str, layer: nn.Module) -> list[nn.Module]:
    """Those that our forward computes without calling them."""
    called = {m for n, m in layer.named_modules() if n.startswith(CASES[name].called or "-")}
    return [m for m in inner(layer) if m not in called]


def passed(module: nn.Module) -> bool:
    """Lists, which nobody calls, and what makes the weight of a convolution."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.utils.parametrizations._WeightNorm)


@pytest.mark.parametrize("name", CASES)
def test_hooks_and_transforms_run_in_the_own_forward(name: str, calls: list[str]) -> None:
    own, layer, args = make(name), fused(name, calls), inputs(name, torch.float32)
    seen: list[int] = []
    for i, (inside, module) in enumerate((n, m) for n, m in layer.named_modules() if n and not passed(m)):
        called = inside.startswith(CASES[name].called or "-")
        handle = module.register_forward_hook(lambda *_, i=i: seen.append(i))
        with torch.no_grad():
            error = 1e-5 if called else 0.0
            torch.testing.assert_close(layer(*args), own(*args), rtol=10 * error, atol=error)
        assert set(seen) == {i} and len(calls) == called * CASES[name].calls
        seen.clear()
        calls.clear()
        handle.remove()
    if is_floating(x := args[0]):
        got, expected = (torch.func.jvp(lambda x, f=f: f(x, *args[1:]), (x,), (x,)) for f in (layer, own))
        torch.testing.assert_close(got, expected)
    assert not calls
    outer = layer.register_forward_hook(lambda *_: seen.append(-1))
    layer(*args)
    assert seen == [-1] and len(calls) == CASES[name].calls
    outer.remove()


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused(name: str) -> None:
    """Nothing is changed then, and the layer is named."""

    def refused(layer: nn.Module, what: str) -> None:
        model = nn.Sequential(make(name), layer)
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=f"^1: expected .*{what}"):
            fuse(model)
        assert [type(m) for m in model.modules()] == kinds

    for i in range(len(replaced(name, make(name)))):
        layer = make(name)
        replaced(name, layer)[i].register_forward_hook(lambda *_: None)
        refused(layer, "hooks, which would not be called")
        layer = make(name)
        replaced(name, layer)[i].forward = lambda x: x
        refused(layer, "or another forward, where")
    layer = make(name)
    layer.forward = lambda *args: args
    refused(layer, "the forward of .*, got one that was put in its place")


@pytest.mark.parametrize("change", ["stride", "groups", "padding", "padding_mode"])
def test_other_convolutions_are_refused(change: str) -> None:
    layer = VitsBlock(8, 3, 1, 2, 0, 0.0, NORMS["plain"])
    values = {"stride": {"stride": 2}, "groups": {"groups": 2}, "padding": {"padding": 2}}
    options = {"padding": 1} | values.get(change, {"padding_mode": "circular"})
    layer.in_layers[1] = nn.Conv1d(8, 16, 3, **options)
    with pytest.raises(ValueError, match=r"^model: expected a WN that can be fused, got in_layers.1: .*"):
        fuse(layer)


def test_a_class_of_a_known_name_that_computes_something_else_is_refused() -> None:
    """Its attributes fit, so that only the comparison shows it: here the halves of the gate are swapped."""

    class WN(VitsBlock):
        def forward(self, x: Tensor, x_mask: Tensor, g: Tensor | None = None, **_: Any) -> Tensor:
            gate, value = self.in_layers[0](x).chunk(2, 1)
            return self.res_skip_layers[0](torch.tanh(value) * torch.sigmoid(gate)) * x_mask

    WN.__module__, WN.__qualname__ = "vits.modules", "WN"
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"^model: expected a WN that can be fused, got results that are .* off, of"):
        fuse(WN(8, 3, 1, 1, 0, 0.0, NORMS["plain"]))

    class Other(nn.Module):
        pass

    Other.__module__, Other.__qualname__ = "vits.modules", "WN"
    with pytest.raises(ValueError, match="^model: .* got another class of this name: .*in_layers|hidden_channels"):
        fuse(Other())
    fuse(VitsBlock(8, 3, 1, 1, 0, 0.0, NORMS["plain"]))


def test_both_gate_orders_are_distinct(calls: list[str]) -> None:
    """DiffWave's weights under VITS' order give something else: the order is not lost in the error bounds."""
    layer, args = make("DiffWave"), inputs("DiffWave", torch.float32)
    own = layer(*args)[1]
    ours = fuse(layer)(*args)[1]
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for p in (layer.dilated_conv.weight, layer.dilated_conv.bias):
            p.copy_(torch.cat([*reversed(p.chunk(2))]))
        for p in (layer.conditioner_projection.weight, layer.conditioner_projection.bias):
            p.copy_(torch.cat([*reversed(p.chunk(2))]))
    assert (layer(*args)[1] - own).abs().max() > 0.1 * own.abs().max()


DROPPING = {
    "transformers, plain": lambda: transformers_vits(0.4),
    "VITS, plain": lambda: VitsBlock(24, 5, 1, 3, 6, 0.4, NORMS["parametrized"]),
    "Parallel WaveGAN": lambda: parallel_wavegan_block(dropout=0.4),
    "fairseq, encoder": lambda: fairseq_encoder(0.4),
    "fairseq, encoder, no padding": lambda: fairseq_encoder(0.4),
    "fairseq, decoder": lambda: fairseq_decoder(0.4),
    "fairseq, decoder, plain, no attention": lambda: fairseq_decoder(0.4, attention=False),
    "AllenNLP": lambda: nn.Sequential(allennlp_block(0.4), allennlp_block(0.4, "backward")),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_drops_the_same_elements(name: str, calls: list[str]) -> None:
    torch.manual_seed(3)
    layer, args = DROPPING[name](), inputs(name.removesuffix(", no padding"), torch.float32)
    if name.endswith("no padding"):
        args = (args[0].clamp(min=2), None)
    torch.manual_seed(4)
    own = results(layer, args)
    fuse(layer)
    calls.clear()
    torch.manual_seed(4)
    for what, t in results(layer, args).items():
        torch.testing.assert_close(t, own[what], rtol=1e-4, atol=1e-5 * own[what].abs().max().clamp(min=10).item())
    assert calls
    layer.eval()
    assert not torch.allclose(results(layer, args)["output 0"], own["output 0"])


def test_weight_norm_may_be_removed_from_a_fused_layer(calls: list[str]) -> None:
    for name, remove in (
        ("transformers, weight_norm", nn.utils.remove_weight_norm),
        ("transformers, parametrized", lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
    ):
        layer, args = fused(name, calls), inputs(name, torch.float32)
        before = layer(*args)
        for module in inner(layer):
            remove(module)
        torch.testing.assert_close(layer(*args), before, rtol=1e-5, atol=1e-6)
        assert len(calls) == 2 * CASES[name].calls


# --- torchmil ---


@pytest.mark.parametrize("gated", [False, True])
def test_attention_values(gated: bool, calls: list[str]) -> None:
    name = "torchmil, gated" if gated else "torchmil"
    for masked in (False, True):
        args = inputs(name, torch.float32)[: 1 + masked]
        own = results(make(name), args, return_att=True)
        ours = results(fused(name, calls), args, return_att=True)
        assert len(calls) == 1 and ours["output 1"].shape == (3, 23)
        for what, t in ours.items():
            torch.testing.assert_close(t, own[what], rtol=1e-4, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("return_att", [False, True])
def test_a_bag_without_instances_gives_zeros(return_att: bool, calls: list[str]) -> None:
    layer = fused("torchmil, gated", calls)
    x, mask = inputs("torchmil, gated", torch.float32)
    mask[1] = 0
    found = results(layer, (x, mask), return_att=return_att)
    assert all(t.isfinite().all() for t in found.values())
    assert not found["output 0"][1].any() and (return_att or not found["gradient of argument 0"][1].any())
    own = unfuse(layer)(x, mask)
    assert own[1].isnan().all()
    torch.testing.assert_close(found["output 0"][[0, 2]], own[[0, 2]].detach(), rtol=1e-4, atol=1e-5)


# --- classes of one's own ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x.transpose(1, 2)).transpose(1, 2).chunk(2, -1)
        return x + value * torch.sigmoid(gate)


def block_forward(layer: Any, own: Any, x: Tensor) -> Tensor:
    if x.dim() != 3 or x.shape[0] > 4:
        return own(x)
    return gated_conv1d(x, layer.conv.weight, layer.conv.bias, residual="add") + layer.extra


def test_a_class_of_ones_own() -> None:
    torch.manual_seed(0)
    Block.extra = 0.0
    model = nn.Sequential(Block(), nn.Linear(6, 6), Block())
    x = torch.randn(2, 9, 6)
    with pytest.raises(ValueError, match=r"^model: expected a model with PEFT's .* or a class of register_fusion's"):
        fuse(model)
    own = model(x)
    register_fusion(Block, block_forward, check=lambda layer: "no bias" if layer.conv.bias is None else "")
    fuse(model)
    torch.testing.assert_close(model(x), own, rtol=1e-4, atol=1e-5)
    Block.extra = 1.0
    assert not torch.allclose(model(x), own), "ours is called"
    wide = torch.randn(5, 9, 6)
    assert torch.equal(model(wide), unfuse(copy.deepcopy(model))(wide)), "what it gives back runs as before"
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))
    assert torch.equal(unfuse(model)(x), own)

    model[2].conv.bias = None
    with pytest.raises(ValueError, match=r"^2: expected a Block that can be fused, got no bias"):
        fuse(model)
    assert type(model[0]) is Block

    for args, match in (
        ((3, block_forward), r"^cls: expected a subclass of nn.Module that is not fused, got 3"),
        ((type(fuse(Block())), block_forward), r"^cls: expected a subclass of nn.Module that is not fused, got <class"),
        ((Block, "forward"), r"^forward: expected a function, got str"),
    ):
        with pytest.raises(TypeError, match=match):
            register_fusion(*args)
    with pytest.raises(TypeError, match=r"^check: expected a function, got int"):
        register_fusion(Block, block_forward, check=1)


def test_subclasses_and_other_models_are_left() -> None:
    class Mine(DiffWaveBlock):
        pass

    Mine.__module__ = "tests"
    model = nn.Sequential(Mine(16, 2, 8, 5, NORMS["plain"]), make("DiffWave"))
    other = make("DiffWave")
    fuse(model)
    assert type(model[0]) is Mine and type(other) is DiffWaveBlock and type(model[1]).__name__ == "FusedResidualBlock"
