"""The extractor: size, equality with a step-by-step computation and with recorded outputs of the original."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import GatedConv1d
from pykernels.models import DGCNNExtractor, DGCNNExtractorConfig
from pykernels.models.dgcnn_extractor import PRESETS, SelfAttention, Spans, Targets, extractor_loss
from pykernels.models.keras_layouts import gate_first_to_value_first, gru_from_cudnn, gru_from_keras
from tests.recorded import recorded

SMALL = DGCNNExtractorConfig(
    vocabulary_size=30, predicates=3, word_size=6, char_size=8, max_length=40, dilations=(1, 2, 5), heads=2, head_size=3
)
SMALL_KNOWN = DGCNNExtractorConfig(**{**vars(SMALL), "distant_supervision": True})
SMALL_REDUCED = DGCNNExtractorConfig(**{**vars(SMALL), "subject_encoding": "ends", "word_size": 0})


def batch(config: DGCNNExtractorConfig, lengths: tuple[int, ...] = (23, 9, 1)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    B, L = len(lengths), max(lengths)
    live = torch.arange(L) < torch.tensor(lengths).unsqueeze(1)
    inputs = {"characters": torch.randint(1, config.vocabulary_size, (B, L), generator=generator) * live}
    at = (torch.rand(B, 2, generator=generator) * torch.tensor(lengths).unsqueeze(1)).long().sort(1).values
    inputs |= {"start": at[:, 0], "end": at[:, 1]}
    if config.word_size:
        inputs["words"] = torch.randn(B, L, config.word_size, generator=generator)
    if config.distant_supervision:
        for name, width in (("known_subjects", 2), ("known_objects", 2 * config.predicates)):
            inputs[name] = (torch.rand(B, L, width, generator=generator) < 0.2).float() * live.unsqueeze(-1)
    return inputs


def some_targets(config: DGCNNExtractorConfig, B: int, L: int) -> Targets:
    generator = torch.Generator().manual_seed(5)

    def spans(*shape: int) -> Spans:
        return Spans(*(torch.rand(2, *shape, generator=generator) < 0.2).float())

    return Targets(spans(B, L), spans(B, L, config.predicates))


# --- the network, without recorded data ---


@pytest.mark.parametrize(
    "predicates, known, expected",
    [(49, True, 1_980_952), (50, True, 1_982_107), (49, False, 1_941_784), (50, False, 1_942_171)],
)
def test_number_of_parameters(predicates: int, known: bool, expected: int) -> None:
    model = DGCNNExtractor(DGCNNExtractorConfig(10, predicates, distant_supervision=known))
    assert sum(p.numel() for p in model.parameters()) - 10 * 128 == expected


def test_the_reduced_configuration_has_half_the_blocks_and_no_recurrence() -> None:
    model = DGCNNExtractor(DGCNNExtractorConfig(10, 49, **PRESETS["reduced"]))
    assert [block.dilation for block in model.blocks] == [1, 2, 5, 1, 2, 5]
    assert model.subject_gru is None and model.embedding.word is None
    removed = 6 * 98_560 + sum(p.numel() for p in nn.GRU(128, 128, bidirectional=True).parameters()) + 256 * 128
    assert sum(p.numel() for p in model.parameters()) - 10 * 128 == 1_941_784 - removed


def article_block(x: Tensor, mask: Tensor, kernel: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """One block as the article's code has it, in float64, tap by tap: gate half first, x * s + c * (1 - s)."""
    x, kernel, bias = x.double() * mask.unsqueeze(-1), kernel.double(), bias.double()
    out = torch.zeros_like(x)
    L, D = x.shape[1:]
    for position in range(L):
        h = bias.expand(len(x), -1).clone()
        for tap, weight in enumerate(kernel):  # [C, 2C]
            row = position + (tap - 1) * dilation
            if 0 <= row < L:
                h += x[:, row] @ weight
        s, c = 1 / (1 + torch.exp(-h[:, :D])), h[:, D:]
        out[:, position] = (x[:, position] * s + c * (1 - s)) * mask[:, position, None]
    return out


@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_article_block_equals_ours_after_conversion(backend: str, dilation: int) -> None:
    torch.manual_seed(0)
    kernel, bias = torch.randn(3, 6, 12), torch.randn(12)
    x, mask = torch.randn(2, 21, 6), torch.arange(21) < torch.tensor([[21], [13]])
    expected = article_block(x, mask, kernel, bias, dilation)

    def ours(weight: Tensor, bias: Tensor) -> Tensor:
        block = GatedConv1d(6, 6, 3, dilation=dilation, backend=backend)
        block.load_state_dict({"weight": weight, "bias": bias})
        return block(x, mask=mask).double()

    weight, converted_bias = gate_first_to_value_first(kernel, bias)
    assert torch.allclose(ours(weight, converted_bias), expected, atol=5e-6)
    # Neither the order of the halves nor the sign alone makes it.
    unswapped = kernel.permute(2, 1, 0).contiguous()
    assert not torch.allclose(ours(unswapped, bias), expected, atol=0.1)
    value, negated = weight.chunk(2)
    assert not torch.allclose(ours(torch.cat([value, -negated]), converted_bias), expected, atol=0.1)


def test_attention_equals_a_step_by_step_computation() -> None:
    torch.manual_seed(1)
    attention = SelfAttention(8, 2, 3)
    x, mask = torch.randn(2, 7, 8), torch.arange(7) < torch.tensor([[7], [4]])
    q, k, v = (x.double() @ w.double().T for w in attention.weight.detach().chunk(3))
    expected = torch.zeros(2, 7, 6, dtype=torch.double)
    for b in range(2):
        n = int(mask[b].sum())
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            weights = torch.softmax(q[b, :, part] @ k[b, :n, part].T / math.sqrt(3), dim=1)
            expected[b, :, part] = weights @ v[b, :n, part]
    assert torch.allclose(attention(x, mask).double(), expected, atol=1e-6)


@pytest.mark.parametrize("config", [SMALL, SMALL_KNOWN, SMALL_REDUCED], ids=["plain", "known", "reduced"])
def test_network_equals_a_step_by_step_computation(config: DGCNNExtractorConfig) -> None:
    """Against float64, one sentence at a time, each cut to its length: so padding and neighbours change nothing."""
    torch.manual_seed(2)
    model = DGCNNExtractor(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    inputs = batch(config)
    got = model(**inputs)
    for b, length in enumerate((inputs["characters"] > 0).sum(1).tolist()):
        expected = sentence_step_by_step(model, {name: t[b] for name, t in inputs.items()}, length)
        for spans, wanted in zip(got, expected, strict=True):
            for ours, theirs in zip(spans, wanted, strict=True):
                assert torch.allclose(ours[b, :length].double(), theirs, atol=3e-6)


def sentence_step_by_step(
    model: DGCNNExtractor, inputs: dict[str, Tensor], n: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    inputs = {name: t[:n].double() if t.is_floating_point() else t for name, t in inputs.items()}
    start, end = int(inputs["start"]), int(inputs["end"])
    D, C, config = model.config.char_size, model.config.predicates, model.config

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def mlp(name: str, x: Tensor) -> Tensor:
        return torch.sigmoid(dense(f"{name}.2", dense(f"{name}.0", x).relu()))

    def attend(name: str, x: Tensor) -> Tensor:
        q, k, v = (x @ part.T for part in w[f"{name}.weight"].chunk(3))
        heads = [slice(config.head_size * i, config.head_size * (i + 1)) for i in range(config.heads)]
        scale = math.sqrt(config.head_size)
        return torch.cat([torch.softmax(q[:, h] @ k[:, h].T / scale, 1) @ v[:, h] for h in heads], 1)

    def conv3(name: str, x: Tensor) -> Tensor:
        padded = torch.cat([x.new_zeros(1, x.shape[1]), x, x.new_zeros(1, x.shape[1])])
        taps = w[f"{name}.conv.weight"]
        return (sum(padded[i : i + n] @ taps[:, :, i].T for i in range(3)) + w[f"{name}.conv.bias"]).relu()

    def last_state(rows: list[Tensor], suffix: str) -> Tensor:
        names = [f"subject_gru.{part}_l0{suffix}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        w_ih, w_hh, b_ih, b_hh = (w[name] for name in names)
        h = rows[0].new_zeros(D)
        for row in rows:
            (r, z, c), (hr, hz, hc) = (w_ih @ row + b_ih).chunk(3), (w_hh @ h + b_hh).chunk(3)
            update = torch.sigmoid(z + hz)
            h = update * h + (1 - update) * torch.tanh(c + torch.sigmoid(r + hr) * hc)
        return h

    t = w["embedding.character.weight"][inputs["characters"][:n]] + w["position.weight"][:n]
    if config.word_size:
        t = t + inputs["words"] @ w["embedding.word.weight"].T
    for i, dilation in enumerate(config.dilations):
        weight, bias = w[f"blocks.{i}.weight"], w[f"blocks.{i}.bias"]
        value, gate = weight.chunk(2)
        kernel = torch.cat([-gate, value]).permute(2, 1, 0)
        value_bias, gate_bias = bias.chunk(2)
        live = torch.ones(1, n, dtype=torch.bool)
        t = article_block(t[None], live, kernel, torch.cat([-gate_bias, value_bias]), dilation)[0]
    known = [inputs["known_subjects"]] if config.distant_supervision else []
    u = conv3("subject_head", torch.cat([t, attend("subject_attention", t), *known], 1))
    n1, n2 = mlp("starts", t), mlp("ends", t)
    subjects = torch.cat([n1, n2], 1) * torch.sigmoid(dense("subject_pointers", u))

    if config.subject_encoding == "gru":
        rows = [t[round(start * a / 5 + end * (5 - a) / 5)] for a in range(6)]
        k = torch.cat([last_state(rows, ""), last_state(rows[::-1], "_reverse")])
    else:
        k = torch.cat([t[start], t[end]])
    place = torch.arange(n)
    near = torch.cat([w["position.weight"][(place - at).abs()] for at in (start, end)], 1)
    known += [inputs["known_objects"]] if config.distant_supervision else []
    v = conv3("object_head", torch.cat([t, attend("object_attention", t), k + near, *known], 1))
    occurs = mlp("occurs", t.amax(0, keepdim=True))
    objects = torch.sigmoid(dense("object_exists", v)) * torch.sigmoid(dense("object_pointers", v))
    return subjects.unbind(1), (objects[:, :C] * occurs * n1, objects[:, C:] * occurs * n2)


def test_padding_and_its_contents_change_nothing() -> None:
    torch.manual_seed(3)
    model = DGCNNExtractor(SMALL_KNOWN).eval()
    inputs = batch(SMALL_KNOWN)
    live = inputs["characters"] > 0
    more = {name: F.pad(t, (0, 6)) if t.dim() == 2 else t for name, t in inputs.items()}
    for name, t in inputs.items():
        if t.dim() == 3:
            more[name] = F.pad(t.masked_fill(~live.unsqueeze(-1), math.nan), (0, 0, 0, 6), value=math.nan)
    for ours, padded in zip(model(**inputs), model(**more), strict=True):
        for a, b in zip(ours, padded, strict=True):
            assert torch.allclose(a[live], b[:, : a.shape[1]][live], atol=1e-7, rtol=0)


def test_backends_train_alike() -> None:
    inputs, losses, grads = batch(SMALL_KNOWN), [], []
    mask = inputs["characters"] > 0
    for backend in ("auto", "reference"):
        torch.manual_seed(4)
        model = DGCNNExtractor(SMALL_KNOWN, backend=backend)
        loss = extractor_loss(*model(**inputs), some_targets(SMALL_KNOWN, *mask.shape), mask)
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5 * max(1.0, grad.abs().max().item())), name


def test_nothing_but_padding_is_finite() -> None:
    model = DGCNNExtractor(SMALL_KNOWN)
    inputs = batch(SMALL_KNOWN)
    inputs["characters"][1] = 0
    mask = inputs["characters"] > 0
    spans = model(**inputs)
    assert all(torch.isfinite(p).all() for pair in spans for p in pair)
    extractor_loss(*spans, some_targets(SMALL_KNOWN, *mask.shape), mask).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_sentence_and_no_subject() -> None:
    model = DGCNNExtractor(SMALL).eval()
    inputs = batch(SMALL)
    trunk = model.trunk(inputs["characters"], inputs["words"])
    none = torch.empty(0, dtype=torch.long)
    assert model.objects(trunk.at(none), none, none).start.shape == (0, 23, 3)
    empty = model.trunk(inputs["characters"][:, :0], inputs["words"][:, :0])
    assert model.subjects(empty).start.shape == (3, 0)


def test_loss_of_saturated_probabilities_is_finite_and_counts_live_characters() -> None:
    p, y = torch.tensor([[0.0, 1.0, 0.3, math.nan]], requires_grad=True), torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True, False]])
    nothing = torch.zeros(1, 4, 2)
    loss = extractor_loss(Spans(p, p), Spans(nothing, nothing), Targets(Spans(y, y), Spans(nothing, nothing)), mask)
    assert loss.item() == pytest.approx(-2 * (math.log(1e-30) + math.log(0.3)) / 3, rel=1e-5)
    loss.backward()
    assert torch.isfinite(p.grad).all() and p.grad[0, 3] == 0
    # Of three classes that are wrong at one of three characters: their sum, a third of it.
    wrong = torch.zeros(1, 4, 3).index_fill(1, torch.tensor([0]), 0.5)
    zeros = Spans(torch.zeros(1, 4), torch.zeros(1, 4))
    loss = extractor_loss(
        zeros, Spans(wrong, wrong), Targets(zeros, Spans(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))), mask
    )
    assert loss.item() == pytest.approx(2 * 3 * math.log(2) / 3, rel=1e-4)


def test_a_name_that_is_very_improbable_is_still_learnt() -> None:
    """At 1e-12 the logits of all five factors get their gradient, of which a probability held at 1e-7 has none."""
    logits = torch.full((5, 1, 4, 1), math.log(10**-2.4 / (1 - 10**-2.4)), requires_grad=True)
    p, nothing = logits.sigmoid().prod(0), torch.zeros(1, 4)
    assert p.max() < 1.1e-12
    y, zeros = torch.zeros(1, 4, 1).index_fill(1, torch.tensor([2]), 1.0), torch.zeros(1, 4, 1)
    targets = Targets(Spans(nothing, nothing), Spans(y, zeros))
    loss = extractor_loss(Spans(nothing, nothing), Spans(p, zeros), targets, torch.ones(1, 4, dtype=torch.bool))
    loss.backward()
    assert torch.allclose(logits.grad[:, 0, 2], torch.tensor((10**-2.4 - 1) / 4), rtol=1e-4)


def test_errors_name_the_argument() -> None:
    model, known = DGCNNExtractor(SMALL), DGCNNExtractor(SMALL_KNOWN)
    inputs, with_known = batch(SMALL), batch(SMALL_KNOWN)
    with pytest.raises(ValueError, match=r"characters: expected .* max_length = 40, got \[1, 41\]"):
        model.trunk(torch.ones(1, 41, dtype=torch.long), torch.zeros(1, 41, 6))
    with pytest.raises(ValueError, match=r"known_subjects: expected None, since distant_supervision is False"):
        model(**inputs, known_subjects=with_known["known_subjects"])
    with pytest.raises(ValueError, match=r"known_objects: expected \[3, L, 6\].*got None"):
        known(**{**with_known, "known_objects": None})
    with pytest.raises(ValueError, match=r"start: expected \[3\], one subject for each sentence, got \[2\]"):
        model(**{**inputs, "start": inputs["start"][:2]})
    with pytest.raises(ValueError, match="subject_encoding: expected one of .*got 'lstm'"):
        DGCNNExtractorConfig(10, 3, subject_encoding="lstm")
    with pytest.raises(ValueError, match="predicates: expected 1 or more, got 0"):
        DGCNNExtractorConfig(10, 0)


# --- recorded outputs of the original ---


def recorded_arrays(prefix: str) -> dict[str, Tensor]:
    with np.load(recorded("golden", "kg_extractor.npz")) as file:
        return {name[len(prefix) :]: torch.from_numpy(file[name]) for name in file.files if name.startswith(prefix)}


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in arrays.items() if name.startswith(prefix)}


def to_state_dict(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of the original under our names and in our layouts."""
    state = {
        "embedding.character.weight": named["embed/char"],
        "embedding.word.weight": named["embed/word_dense/kernel"].T,
        "position.weight": named["embed/pos"],
    }
    for i in range(12):
        block = gate_first_to_value_first(named[f"conv{i:02}/kernel"], named[f"conv{i:02}/bias"])
        state[f"blocks.{i}.weight"], state[f"blocks.{i}.bias"] = block
    for ours, theirs in (("starts", "pn1"), ("ends", "pn2"), ("occurs", "pc")):
        for layer, name in ((0, "hidden"), (2, "out")):
            state[f"{ours}.{layer}.weight"] = named[f"{theirs}/{name}/kernel"].T
            state[f"{ours}.{layer}.bias"] = named[f"{theirs}/{name}/bias"]
    for ours, theirs in (("subject", "s"), ("object", "o")):
        state[f"{ours}_attention.weight"] = torch.cat([named[f"{theirs}_att/{m}_kernel"].T for m in "qkv"])
        state[f"{ours}_head.conv.weight"] = named[f"{theirs}_conv/kernel"].permute(2, 1, 0)
        state[f"{ours}_head.conv.bias"] = named[f"{theirs}_conv/bias"]
        pointers = [f"p{theirs}{i}" for i in (1, 2)]
        state[f"{ours}_pointers.weight"] = torch.cat([named[f"{name}/kernel"] for name in pointers], 1).T
        state[f"{ours}_pointers.bias"] = torch.cat([named[f"{name}/bias"] for name in pointers])
    state["object_exists.weight"], state["object_exists.bias"] = named["po/kernel"].T, named["po/bias"]
    for direction, suffix in (("fw", "_l0"), ("bw", "_l0_reverse")):
        arrays = (named[f"gru_{direction}/{name}"] for name in ("kernel", "recurrent_kernel", "bias"))
        state |= {f"subject_gru.{name}{suffix}": t for name, t in gru_from_keras(*arrays).items()}
    return state


RECORDED = {
    "ds": DGCNNExtractorConfig(40, 7, 20, 32, 64, heads=4, head_size=8, distant_supervision=True, isolate=False),
    "nods": DGCNNExtractorConfig(40, 5, 16, 20, 64, heads=8, head_size=16, isolate=False),
}


def recorded_model(arrays: dict[str, Tensor], case: str, backend: str) -> DGCNNExtractor:
    model = DGCNNExtractor(RECORDED[case], backend=backend)
    model.load_state_dict(to_state_dict(part(arrays, "w/")))
    return model


def recorded_inputs(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"characters": "t1", "words": "t2", "known_subjects": "pres", "known_objects": "preo"}
    inputs = {ours: arrays[f"in/{theirs}"] for ours, theirs in names.items() if f"in/{theirs}" in arrays}
    return inputs | {"start": arrays["in/k1"].squeeze(1), "end": arrays["in/k2"].squeeze(1)}


def check_outputs_and_losses(model: DGCNNExtractor, arrays: dict[str, Tensor], mode: str) -> Tensor:
    inputs = recorded_inputs(arrays)
    subjects, objects = model(**inputs)
    wanted = arrays[f"{mode}/out/ps1"], arrays[f"{mode}/out/ps2"], arrays[f"{mode}/out/po1"], arrays[f"{mode}/out/po2"]
    for got, expected in zip((*subjects, *objects), wanted, strict=True):
        assert (got - expected.view_as(got)).abs().max() <= 5e-6
    mask = inputs["characters"] > 0
    targets = Targets(*(Spans(arrays[f"in/{x}1"], arrays[f"in/{x}2"]) for x in "so"))
    nothing = Spans(torch.zeros_like(subjects.start), torch.zeros_like(subjects.start))
    no_object = Spans(torch.zeros_like(objects.start), torch.zeros_like(objects.start))
    # Subjects and objects, each on their own: a zero where a zero is wanted costs nothing.
    for x, loss in (
        ("s", extractor_loss(subjects, no_object, Targets(targets.subjects, no_object), mask)),
        ("o", extractor_loss(nothing, objects, Targets(nothing, targets.objects), mask)),
    ):
        expected = arrays[f"{mode}/loss/{x}1"] + arrays[f"{mode}/loss/{x}2"]
        assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    loss = extractor_loss(subjects, objects, targets, mask)
    assert loss.item() == pytest.approx(arrays[f"{mode}/loss/total"].item(), abs=2e-5)
    return loss


@pytest.mark.parametrize("case", ["ds", "nods"])
def test_recorded_evaluation(backend: str, case: str) -> None:
    arrays = recorded_arrays(f"{case}/")
    model = recorded_model(arrays, case, backend).eval()
    taps: dict[str, Tensor] = {}

    def listen(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, __, y: taps.update({name: y}))

    for i in (0, 1, 2, 11):
        listen(model.blocks[i], f"t{i + 1:02}")
    listen(model.subject_attention, "s_att")
    listen(model.object_attention, "o_att")
    listen(model.subject_head, "s_conv")
    listen(model.object_head, "o_conv")
    loss = check_outputs_and_losses(model, arrays, "eval")
    if case == "nods":
        return
    assert len(taps) == 8
    for name, got in taps.items():
        assert torch.allclose(got, arrays[f"eval/tap/{name}"], atol=1e-5), name
    loss.backward()
    expected = to_state_dict(part(arrays, "eval/grad/"))
    for name, p in model.named_parameters():
        error = (p.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= 1e-4, f"gradient of {name}: {error}"


class RecordedDropout(nn.Module):
    """Dropout with the mask that the original drew."""

    def __init__(self, kept: Tensor, rate: float) -> None:
        super().__init__()
        self.factors = kept / (1 - rate)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class RecordedGateDropout(nn.Module):
    """A block in plain PyTorch whose gate logits are dropped by the recorded mask; shares the block's parameters."""

    def __init__(self, block: GatedConv1d, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.dilation, self.kept = block.weight, block.bias, block.dilation, kept

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        h = F.conv1d(x.transpose(1, 2), self.weight, self.bias, padding="same", dilation=self.dilation)
        c, z = h.transpose(1, 2).chunk(2, -1)
        g = torch.sigmoid(z * self.kept / 0.9)
        return (x * (1 - g) + c * g) * mask.unsqueeze(-1)


@pytest.mark.parametrize("case", ["ds", "nods"])
def test_recorded_training_with_its_dropout_masks(case: str) -> None:
    """The kernels draw their own masks, so the blocks here are plain: what is tested is where dropout stands."""
    arrays = recorded_arrays(f"{case}/")
    masks: Iterator[Tensor] = (arrays[f"train/drop/{i:02}"] for i in range(13))
    model = recorded_model(arrays, case, "reference")
    model.dropout = RecordedDropout(next(masks), 0.25)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = RecordedGateDropout(block, next(masks))
    check_outputs_and_losses(model, arrays, "train").backward()


def test_recorded_gru_in_both_layouts() -> None:
    arrays = recorded_arrays("gru/")
    gru = nn.GRU(6, 5, batch_first=True, bidirectional=True)
    for convert, prefix in ((gru_from_keras, ""), (gru_from_cudnn, "cudnn_")):
        state = {}
        for direction, suffix in (("fw", "_l0"), ("bw", "_l0_reverse")):
            stored = (arrays[f"{direction}/{prefix}{name}"] for name in ("kernel", "recurrent_kernel", "bias"))
            state |= {f"{name}{suffix}": t for name, t in convert(*stored).items()}
        gru.load_state_dict(state)
        _, last = gru(arrays["in"])
        assert torch.allclose(last.transpose(0, 1).flatten(1), arrays["out"], atol=1e-6)


def test_recorded_subject_encoding() -> None:
    arrays = recorded_arrays("ds/")
    model = recorded_model(arrays, "ds", "reference").eval()
    k = model.encode_subjects(arrays["eval/tap/t12"], arrays["in/k1"].squeeze(1), arrays["in/k2"].squeeze(1))
    assert torch.allclose(k, arrays["eval/tap/gru"], atol=1e-6)
