"""GatedConv1d: parameters, state dicts, prepacked weights. `#n` names a line of the project's failure checklist."""

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

from pykernels import GatedConv1d, gated_conv1d
from tests.helpers import FLOATS


def weight_normed(conv: nn.Module, old: bool, dim: int | None = 0) -> nn.Module:
    """A weight-normed copy, in the older (weight_g, weight_v) or the newer spelling."""
    conv = copy.deepcopy(conv)
    if old:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.utils.weight_norm(conv, dim=dim)
    return parametrizations.weight_norm(conv, dim=dim)


# --- parameters and state dicts ---


@pytest.mark.parametrize("bias", [True, False])
def test_same_parameters_and_random_draws_as_conv1d(bias: bool) -> None:
    torch.manual_seed(3)
    conv = nn.Conv1d(6, 8, 5, bias=bias)
    after = torch.randn(3)
    torch.manual_seed(3)
    module = GatedConv1d(6, 4, 5, residual="none", bias=bias)
    assert torch.equal(torch.randn(3), after)
    assert module.state_dict().keys() == conv.state_dict().keys()
    for name, t in conv.state_dict().items():
        assert torch.equal(module.state_dict()[name], t)


def test_state_dicts_of_conv1d_load_and_go_back() -> None:
    conv, module = nn.Conv1d(4, 8, 3), GatedConv1d(4, 4, 3)
    module.load_state_dict(conv.state_dict())
    other = nn.Conv1d(4, 8, 3)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, conv.weight) and torch.equal(other.bias, conv.bias)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("old", [True, False], ids=["weight_g", "parametrizations"])
@pytest.mark.parametrize("prefix", ["", "layers.0.conv."])
def test_weight_normed_state_dicts_load(prefix: str, old: bool, dim: int | None) -> None:
    conv = weight_normed(nn.Conv1d(4, 8, 3), old, dim)
    with torch.no_grad():
        conv(torch.randn(1, 4, 5))  # the older one computes its weight when it is called
    state = {prefix + name: t for name, t in conv.state_dict().items()}
    before = {name: t.clone() for name, t in state.items()}
    module: nn.Module = GatedConv1d(4, 4, 3)
    inner = module
    if prefix:
        holder = nn.Module()
        holder.conv = module
        module = nn.Module()
        module.layers = nn.ModuleList([holder])
    module.load_state_dict(state)
    assert torch.allclose(inner.weight, conv.weight, rtol=1e-6, atol=0) and torch.equal(inner.bias, conv.bias)
    assert state.keys() == before.keys() and all(torch.equal(state[n], before[n]) for n in state)


def test_half_of_a_weight_normed_state_dict_is_refused() -> None:
    state = weight_normed(nn.Conv1d(4, 8, 3), old=True).state_dict()
    del state["weight_v"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*weight.*Unexpected key.*weight_g"):
        GatedConv1d(4, 4, 3).load_state_dict(state)


@pytest.mark.parametrize("old", [True, False], ids=["weight_g", "parametrizations"])
def test_a_weight_normed_module_keeps_its_own_keys(old: bool, backend: str) -> None:
    """Our module under weight norm is what nn.Conv1d is under it: the same keys, and gradients reach g and v."""
    normed = weight_normed(nn.Conv1d(4, 8, 3), old)
    ours = weight_normed(GatedConv1d(4, 4, 3, backend=backend), old)
    assert ours.state_dict().keys() == normed.state_dict().keys()
    ours.load_state_dict(normed.state_dict())
    x = torch.randn(2, 9, 4)
    y = ours(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())
    normed(x.transpose(1, 2))
    assert torch.allclose(y, gated_conv1d(x, normed.weight, normed.bias, backend=backend), atol=1e-6)
    normed.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_is_the_function(dtype: str, backend: str) -> None:
    options = {"dilation": 2, "padding": "causal", "residual": "none", "value_act": "tanh", "split": "gate_value"}
    module = GatedConv1d(4, 6, 3, **options, dtype=FLOATS[dtype], backend=backend)
    x, cond = torch.randn(2, 9, 4).to(FLOATS[dtype]), torch.randn(2, 1, 12).to(FLOATS[dtype])
    lengths = torch.tensor([4, 9])
    expected = gated_conv1d(x, module.weight, module.bias, cond=cond, lengths=lengths, **options, backend=backend)
    assert torch.equal(module(x, cond=cond, lengths=lengths), expected)
    mask = torch.arange(9) < lengths.unsqueeze(-1)
    assert torch.equal(module(x, cond=cond, mask=mask), expected)
    packed = module(x[mask], cond=cond, cu_seqlens=torch.tensor([0, 4, 13]))
    assert torch.allclose(packed, expected[mask], rtol=0, atol=8 * torch.finfo(x.dtype).eps)


def test_repr_tells_what_differs_from_the_defaults() -> None:
    assert repr(GatedConv1d(4, 4, 3)) == "GatedConv1d(4, 4, kernel_size=3)"
    module = GatedConv1d(4, 6, 2, dilation=8, padding="causal", residual="none", gate_dropout=0.1, bias=False)
    shown = (
        "GatedConv1d(4, 6, kernel_size=2, dilation=8, padding='causal', residual='none', gate_dropout=0.1, bias=False)"
    )
    assert repr(module) == shown


def test_copies_and_pickles() -> None:
    module = GatedConv1d(4, 4, 3, padding="causal").eval().prepack()
    x = torch.randn(1, 5, 4)
    with torch.no_grad():
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), module(x))


def test_devices_and_dtypes() -> None:
    module = GatedConv1d(4, 4, 3, device="meta", dtype=torch.bfloat16)
    assert module.weight.is_meta and module(torch.zeros(2, 9, 4, device="meta", dtype=torch.bfloat16)).shape == (
        2,
        9,
        4,
    )
    module = module.to_empty(device="cpu").float()
    module.reset_parameters()
    assert module(torch.zeros(2, 9, 4)).dtype == torch.float32


# --- prepacked weights ---


def ready(kernels: str = "cpu", **options: object) -> GatedConv1d:
    return GatedConv1d(6, 6, 3, backend=kernels, **options).eval()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("split", ["value_gate", "gate_value"])
def test_prepacked_is_bitwise_the_same(split: str, dtype: str, kernels: str) -> None:
    for channels, k in [(6, 3), (33, 1), (64, 4), (130, 2)]:
        module = GatedConv1d(channels, channels, k, split=split, dtype=FLOATS[dtype], backend=kernels).eval()
        x = torch.randn(2, 9, channels).to(FLOATS[dtype])
        with torch.no_grad():
            expected = module(x)
            assert torch.equal(module.prepack()(x), expected) and module._packed is not None
            assert torch.equal(
                module(x[:, :2]), gated_conv1d(x[:, :2], module.weight, module.bias, split=split, backend=kernels)
            )


def test_prepacked_weights_are_not_in_the_state_dict(kernels: str) -> None:
    module = ready(kernels)
    keys = module.state_dict().keys()
    assert module.prepack().state_dict().keys() == keys == {"weight", "bias"}


def test_prepack_needs_evaluation_mode(kernels: str) -> None:
    with pytest.raises(RuntimeError, match="^prepack: .*eval"):
        GatedConv1d(6, 6, 3, backend=kernels).prepack()


def test_prepack_on_the_reference_keeps_nothing() -> None:
    module = ready("reference").prepack()
    assert module._packed is None and module(torch.zeros(1, 2, 6)).shape == (1, 2, 6)


@pytest.mark.parametrize("what", ["train", "load", "to", "half", "gradients", "parent"])
def test_what_drops_prepacked_weights(what: str, kernels: str) -> None:
    module = ready(kernels).prepack()
    parent = nn.Sequential(module)
    x = torch.randn(1, 5, 6)
    with torch.no_grad():
        module(x)
        assert module._packed is not None
        module.eval()
        assert module._packed is not None
    if what == "train":
        module.train()
    elif what == "load":
        module.load_state_dict(module.state_dict())
    elif what == "to":
        module.to(torch.float32)
    elif what == "half":
        parent.half()
    elif what == "gradients":
        module(x).sum().backward()
    else:
        parent.train()
    assert module._packed is None


def test_optimizer_step_after_evaluation(kernels: str) -> None:
    """Fine-tuning in evaluation mode: the call that records gradients drops the copy, so the step is seen."""
    module, x = ready(kernels).prepack(), torch.randn(1, 5, 6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(module(x), gated_conv1d(x, module.weight, module.bias, backend=kernels))


def change_by_data(module: GatedConv1d) -> None:
    module.weight.data = module.weight.data * 2


def change_by_merge(module: GatedConv1d) -> None:
    """What merging an adapter of low rank does."""
    delta = (torch.randn(12, 2) @ torch.randn(2, 18)).view(12, 6, 3)
    module.weight.data += delta


def change_by_vector(module: GatedConv1d) -> None:
    vector_to_parameters(parameters_to_vector(module.parameters()) * 0.5, module.parameters())


@pytest.mark.parametrize("change", [change_by_data, change_by_merge, change_by_vector])
def test_weights_changed_behind_the_module(change: object, kernels: str) -> None:
    """Without prepack() the result is always right. With it the old weights serve, as documented, until they are
    packed again or dropped."""
    x = torch.randn(2, 9, 6)

    def right(module: GatedConv1d) -> Tensor:
        return gated_conv1d(x, module.weight, module.bias, backend=kernels)

    with torch.no_grad():
        module = ready(kernels)
        before = module(x)
        change(module)
        assert torch.equal(module(x), right(module)) and not torch.equal(module(x), before)

        module = ready(kernels).prepack()
        change(module)
        assert not torch.allclose(module(x), right(module), atol=1e-3)
        assert torch.equal(module.prepack()(x), right(module))
        change(module)
        assert torch.equal(module.train().eval()(x), right(module))


def test_prepacked_under_another_tier_is_refused(extension: object) -> None:
    """The copy is of one tier's layout: it is refused and never misread."""
    usable = [name for name, can, _ in extension.cpu_tiers() if can]
    if len(usable) < 2:
        pytest.skip("this machine has one CPU tier")
    module, before = ready(), extension.cpu_tier()
    try:
        extension.set_cpu_tier(usable[0])
        module.prepack()
        extension.set_cpu_tier(usable[1])
        with torch.no_grad(), pytest.raises(RuntimeError, match="^packed.*call prepack"):
            module(torch.randn(1, 5, 6))
    finally:
        extension.set_cpu_tier(before)
