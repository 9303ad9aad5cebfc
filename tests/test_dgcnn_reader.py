"""The reader of 2019: size, equality with a step-by-step computation and with recorded outputs of the original."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import AttentionPool, GatedConv1d, _extension
from pykernels.models import DGCNNReader, DGCNNReaderConfig
from pykernels.models.dgcnn_reader import reader_loss
from pykernels.models.embedding import MixedEmbedding
from pykernels.models.focal_loss import focal_loss, masked_focal_loss
from pykernels.models.reader_decoding import answer_scores, passage_scores
from tests.recorded import recorded

SMALL = DGCNNReaderConfig(vocabulary_size=30, word_size=6, char_size=12)


def batch(config: DGCNNReaderConfig, B: int = 3, Lq: int = 7, Lp: int = 33) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> Tensor:
        rows = torch.randint(1, config.vocabulary_size, (B, length), generator=generator)
        lengths = torch.randint(1, length + 1, (B, 1), generator=generator)
        return rows * (torch.arange(length) < lengths)

    inputs = {"question": ids(Lq), "passage": ids(Lp)}
    if config.word_size:
        inputs["question_words"] = torch.randn(B, Lq, config.word_size, generator=generator)
        inputs["passage_words"] = torch.randn(B, Lp, config.word_size, generator=generator)
    return inputs


# --- the network, without recorded data ---


@pytest.mark.parametrize("word_size, expected", [(256, 1_035_651), (0, 1_035_651 - 256 * 128)])
def test_number_of_parameters(word_size: int, expected: int) -> None:
    model = DGCNNReader(DGCNNReaderConfig(vocabulary_size=50, word_size=word_size))
    assert sum(p.numel() for p in model.parameters()) - 50 * 128 == expected
    assert sum(p.numel() for p in model.passage_blocks[0].parameters()) == 98_560


def block_step_by_step(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """One block in float64, position by position and tap by tap: value half first, the residual of the unmasked x."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    B, L, D = x.shape
    taps = weight.shape[2]
    out = torch.zeros_like(x)
    for b in range(B):
        for position in range(L):
            if not mask[b, position]:
                continue
            h = bias.clone()
            for tap in range(taps):
                row = position + (tap - (taps - 1) // 2) * dilation
                if 0 <= row < L and mask[b, row]:
                    h += weight[:, :, tap] @ x[b, row]
            g = 1 / (1 + torch.exp(-h[D:]))
            out[b, position] = x[b, position] * (1 - g) + h[:D] * g
    return out


@pytest.mark.parametrize("dilation", [1, 2, 16])
def test_block_equals_a_step_by_step_computation(backend: str, dilation: int) -> None:
    torch.manual_seed(0)
    block = GatedConv1d(6, 6, 3, dilation=dilation, backend=backend)
    x, mask = torch.randn(2, 21, 6), torch.rand(2, 21) < 0.8
    expected = block_step_by_step(x, mask, block.weight.detach(), block.bias.detach(), dilation)
    assert torch.allclose(block(x, mask=mask).double(), expected, atol=2e-6)
    halves_swapped = torch.cat(block.weight.detach().chunk(2)[::-1])
    assert not torch.allclose(block_step_by_step(x, mask, halves_swapped, block.bias.detach(), dilation), expected)


def network_step_by_step(model: DGCNNReader, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The evaluation-mode network in float64 from its published description alone, one sequence after the other."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}

    def embed(side: str, b: int) -> Tensor:
        characters = w["embedding.character.weight"][inputs[side][b]]
        return characters + inputs[f"{side}_words"][b].double() @ w["embedding.word.weight"].T

    def blocks(name: str, dilations: tuple[int, ...], x: Tensor, mask: Tensor) -> Tensor:
        for i, dilation in enumerate(dilations):
            weight, bias = w[f"{name}.{i}.weight"], w[f"{name}.{i}.bias"]
            x = block_step_by_step(x[None], mask[None], weight, bias, dilation)[0]
        return x

    def pool(name: str, x: Tensor, mask: Tensor) -> Tensor:
        s = torch.tanh(x[mask] @ w[f"{name}.weight"].T) @ w[f"{name}.query"]
        return torch.softmax(s, 0) @ x[mask]

    starts, ends = [], []
    for b in range(len(inputs["question"])):
        q_mask, p_mask = inputs["question"][b] > 0, inputs["passage"][b] > 0
        q = blocks("question_blocks", model.config.question_dilations, embed("question", b), q_mask)
        v = pool("question_pool", q, q_mask)
        p = torch.cat([embed("passage", b), v.expand(len(p_mask), -1)], 1) @ w["join.weight"].T
        p = blocks("passage_blocks", model.config.passage_dilations, p, p_mask)
        p = torch.cat([p, v.expand(len(p_mask), -1)], 1)
        pooled = pool("passage_pool", p, p_mask)
        answerable = torch.sigmoid(pooled @ w["answerable.weight"].T + w["answerable.bias"])
        pointers = answerable * torch.sigmoid(p @ w["pointers.weight"].T + w["pointers.bias"])
        starts.append(pointers[:, 0])
        ends.append(pointers[:, 1])
    return torch.stack(starts), torch.stack(ends)


def test_network_equals_a_step_by_step_computation() -> None:
    torch.manual_seed(1)
    model = DGCNNReader(SMALL).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    inputs = batch(SMALL)
    for got, expected in zip(model(**inputs), network_step_by_step(model, inputs), strict=True):
        assert torch.allclose(got.double(), expected, atol=3e-6)


def test_padding_changes_nothing() -> None:
    """More padding, other neighbours in the batch and NaN word vectors in the padding leave all bits of a sequence."""
    torch.manual_seed(2)
    model = DGCNNReader(SMALL).eval()
    inputs = batch(SMALL)
    start, _ = model(**inputs)
    padded = {name: F.pad(t, (0, 5) if t.dim() == 2 else (0, 0, 0, 5)) for name, t in inputs.items()}
    for side in ("question", "passage"):
        padded[f"{side}_words"] = padded[f"{side}_words"].masked_fill((padded[side] == 0)[..., None], math.nan)
    more, _ = model(**padded)
    live = inputs["passage"] > 0
    assert torch.allclose(start[live], more[:, : start.shape[1]][live], atol=1e-7, rtol=0)
    alone, _ = model(**{name: t[1:2] for name, t in inputs.items()})
    assert torch.allclose(alone[0][live[1]], start[1][live[1]], atol=1e-7, rtol=0)


def test_backends_train_alike() -> None:
    """With one seed, the kernels and plain PyTorch drop the same logits, and losses and gradients agree."""
    inputs, losses, grads = batch(SMALL), [], []
    target = (torch.arange(33) % 5 == 0).float().expand(3, 33)
    for backend in ("auto", "reference"):
        torch.manual_seed(4)
        model = DGCNNReader(SMALL, backend=backend)
        loss = reader_loss(*model(**inputs), target, target, inputs["passage"])
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5 * max(1.0, grad.abs().max().item())), name


def test_autocast_keeps_probabilities_in_float32() -> None:
    torch.manual_seed(5)
    model, inputs = DGCNNReader(SMALL).eval(), batch(SMALL)
    exact, _ = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        start, end = model(**inputs)
    assert start.dtype == end.dtype == torch.float32
    assert torch.allclose(start, exact, atol=2e-2)


def test_fully_padded_rows_are_finite() -> None:
    model = DGCNNReader(SMALL)
    inputs = batch(SMALL)
    inputs["question"][0], inputs["passage"][1] = 0, 0
    start, end = model(**inputs)
    assert torch.isfinite(start).all() and torch.isfinite(end).all()
    reader_loss(start, end, torch.zeros(3, 33), torch.zeros(3, 33), inputs["passage"]).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_word_vectors_are_asked_for_and_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"words: expected word vectors \[B, L, 6\], got none"):
        MixedEmbedding(9, 4, 6)(torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"words: expected no word vectors, got \[1, 2, 6\]"):
        MixedEmbedding(9, 4)(torch.ones(1, 2, dtype=torch.long), torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="char_size: expected 1 or more, got 0"):
        DGCNNReaderConfig(vocabulary_size=5, char_size=0)


# --- the loss ---


def test_focal_loss_of_saturated_probabilities_is_finite() -> None:
    p = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)
    y = torch.tensor([0.0, 1.0, 0.0, 1.0])
    loss = focal_loss(p, y)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(p.grad).all()
    assert loss[0] == loss[3] == 0 and loss[1].item() == pytest.approx(0.25 * -math.log(1e-8), rel=1e-5)


def test_masked_loss_averages_over_live_positions_only() -> None:
    p, y = torch.rand(2, 4), torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    expected = (focal_loss(p, y)[0, :2].sum() + focal_loss(p, y)[1, 0]) / 3
    assert masked_focal_loss(p, y, mask).item() == pytest.approx(expected.item())
    assert masked_focal_loss(p, y, torch.zeros_like(mask)) == 0


# --- decoding ---


def test_candidates_are_bounded_and_cut_at_the_end_of_the_passage() -> None:
    text, start, end = "abcdef", torch.zeros(9), torch.zeros(9)
    start[1], start[4], end[2], end[5], end[7] = 0.5, 0.4, 0.5, 0.3, 0.9
    got = passage_scores(text, start, end, max_length=4)
    assert got == pytest.approx({"bc": 0.25, "ef": 0.12})
    assert passage_scores(text, start, end, max_length=5) == pytest.approx({"bc": 0.25, "bcdef": 0.15, "ef": 0.12})


def test_no_candidate_no_answer() -> None:
    assert answer_scores(["ab", ""], torch.zeros(2, 2), torch.ones(2, 2)) == {}


# --- recorded outputs of the original ---


def recorded_arrays() -> dict[str, Tensor]:
    with np.load(recorded("golden", "dgcnn_reader_2019.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if name != "__meta__"}


def to_state_dict(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of the original (dense kernels [in, out], convolutions [k, in, out]) under our names."""
    state = {"embedding.character.weight": named["embed/char"]}
    state["embedding.word.weight"] = named["embed/word_dense/kernel"].T
    for side, count in (("question", 3), ("passage", 6)):
        for i in range(count):
            state[f"{side}_blocks.{i}.weight"] = named[f"{side[0]}_conv{i}/kernel"].permute(2, 1, 0)
            state[f"{side}_blocks.{i}.bias"] = named[f"{side[0]}_conv{i}/bias"]
        state[f"{side}_pool.weight"] = named[f"{side[0]}_pool/k_dense/kernel"].T
        state[f"{side}_pool.query"] = named[f"{side[0]}_pool/o_dense/kernel"].squeeze(1)
    state["join.weight"] = named["p_dense/kernel"].T
    state["answerable.weight"], state["answerable.bias"] = named["pa/kernel"].T, named["pa/bias"]
    state["pointers.weight"] = torch.cat([named["pa1/kernel"], named["pa2/kernel"]], 1).T
    state["pointers.bias"] = torch.cat([named["pa1/bias"], named["pa2/bias"]])
    return state


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in arrays.items() if name.startswith(prefix)}


def recorded_model(arrays: dict[str, Tensor], backend: str) -> DGCNNReader:
    model = DGCNNReader(DGCNNReaderConfig(vocabulary_size=42, word_size=20, char_size=24), backend=backend)
    model.load_state_dict(to_state_dict(part(arrays, "w/")))
    return model


def recorded_inputs(arrays: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    names = {"question": "q1", "passage": "p1", "question_words": "q2", "passage_words": "p2"}
    return {ours: arrays[f"{case}/in/{theirs}"] for ours, theirs in names.items()}


def probability_tolerance(backend: str) -> float:
    """The recorded one; the generic tier, without fused multiply-add, itself lies 2e-6 from float64 (others 1.2e-6)."""
    return 3e-6 if backend == "cpu" and _extension._C.cpu_tier() == "generic" else 2e-6


def check_losses_and_gradients(model: DGCNNReader, arrays: dict[str, Tensor], case: str, tolerance: float) -> None:
    inputs = recorded_inputs(arrays, "eval")
    start, end = model(**inputs)
    for got, name in ((start, "start"), (end, "end")):
        assert (got - arrays[f"{case}/out/{name}"]).abs().max() <= tolerance, name
    a1, a2 = arrays["eval/in/a1"], arrays["eval/in/a2"]
    mask = inputs["passage"] > 0
    assert torch.allclose(focal_loss(start, a1), arrays[f"{case}/loss/elementwise_start"], atol=2e-6)
    assert masked_focal_loss(start, a1, mask).item() == pytest.approx(arrays[f"{case}/loss/start"].item(), abs=2e-6)
    assert masked_focal_loss(end, a2, mask).item() == pytest.approx(arrays[f"{case}/loss/end"].item(), abs=2e-6)
    loss = reader_loss(start, end, a1, a2, inputs["passage"])
    assert loss.item() == pytest.approx(arrays[f"{case}/loss/total"].item(), abs=2e-4)
    loss.backward()
    expected = to_state_dict(part(arrays, f"{case}/grad/"))
    for name, p in model.named_parameters():
        error = (p.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= 1e-4, f"gradient of {name}: {error}"


def test_recorded_evaluation(backend: str) -> None:
    arrays = recorded_arrays()
    model = recorded_model(arrays, backend).eval()
    taps: dict[str, Tensor] = {}
    for side, count in (("question", 3), ("passage", 6)):
        for i in range(count):
            hook = lambda _, __, y, name=f"{side[0]}_conv{i}": taps.update({name: y})  # noqa: E731
            getattr(model, f"{side}_blocks")[i].register_forward_hook(hook)
        hook = lambda _, __, y, name=f"{side[0]}_pool": taps.update({name: y})  # noqa: E731
        getattr(model, f"{side}_pool").register_forward_hook(hook)
    check_losses_and_gradients(model, arrays, "eval", probability_tolerance(backend))
    assert len(taps) == 11
    for name, got in taps.items():
        assert torch.allclose(got, arrays[f"eval/tap/{name}"], atol=3e-5), name


class RecordedDropout(nn.Module):
    """Dropout with the masks that the original drew, question first, then passage."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks: Iterator[Tensor] = iter(masks)

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.masks) / 0.9


class RecordedGateDropout(nn.Module):
    """A block in plain PyTorch whose gate logits are dropped by the recorded mask; shares the block's parameters."""

    def __init__(self, block: GatedConv1d, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.dilation, self.kept = block.weight, block.bias, block.dilation, kept

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        rows = (x * mask.unsqueeze(-1)).transpose(1, 2)
        h = F.conv1d(rows, self.weight, self.bias, padding="same", dilation=self.dilation).transpose(1, 2)
        c, z = h.chunk(2, -1)
        g = torch.sigmoid(z * self.kept / 0.9)
        return (x * (1 - g) + c * g) * mask.unsqueeze(-1)


def test_recorded_training_with_its_dropout_masks() -> None:
    """The kernels draw their own masks, so the blocks here are plain: what is tested is where dropout stands."""
    arrays = recorded_arrays()
    masks = [arrays[f"train/drop/{i:02}"] for i in range(11)]
    model = recorded_model(arrays, "reference")
    model.dropout = RecordedDropout(masks[:2])
    for i, block in enumerate(model.question_blocks):
        model.question_blocks[i] = RecordedGateDropout(block, masks[2 + i])
    for i, block in enumerate(model.passage_blocks):
        model.passage_blocks[i] = RecordedGateDropout(block, masks[5 + i])
    check_losses_and_gradients(model, arrays, "train", 2e-6)


def test_recorded_edge_case(backend: str) -> None:
    """A question, and a passage, of nothing but padding: the original pools uniformly over the padding, ours to zeros.

    So row 0 alone is comparable as a whole; the blocks, and the parts of the others that meet no such pooling, are too.
    """
    arrays = recorded_arrays()
    model = recorded_model(arrays, backend).eval()
    inputs = recorded_inputs(arrays, "edge")
    pools: list[Tensor] = []
    for pool in (model.question_pool, model.passage_pool):
        pool.register_forward_hook(lambda _, __, y: pools.append(y))
    start, end = model(**inputs)
    assert torch.isfinite(start).all() and torch.isfinite(end).all()
    empty_question, empty_passage = (inputs["question"] == 0).all(1), (inputs["passage"] == 0).all(1)
    assert empty_question.tolist() == [False, True, False] and empty_passage.tolist() == [False, False, True]
    for got, name in ((start, "start"), (end, "end")):
        assert (got[0] - arrays[f"edge/out/{name}"][0]).abs().max() <= 2e-6, name

    q_pool, p_pool = pools
    assert torch.allclose(q_pool[~empty_question], arrays["edge/tap/q_pool"][~empty_question], atol=2e-6)
    # Zeros in both: the rows of a padded sequence are zeros after the blocks, whatever their weights.
    assert torch.equal(q_pool[1], torch.zeros(24)) and not arrays["edge/tap/q_pool"][1].any()
    # Here they differ: the second half of a padded passage's rows is the question vector, which a uniform mean keeps.
    assert torch.equal(p_pool[2], torch.zeros(48))
    assert torch.allclose(arrays["edge/tap/p_pool"][2, 24:], q_pool[2], atol=2e-6)
    assert torch.allclose(p_pool[:2], arrays["edge/tap/p_pool"][:2], atol=2e-6)
    for got, name in ((start, "start"), (end, "end")):
        assert (got[1] - arrays[f"edge/out/{name}"][1]).abs().max() <= 2e-6, name


def test_recorded_pooling_with_another_hidden_size(backend: str) -> None:
    arrays = part(recorded_arrays(), "block/")
    pool = AttentionPool(10, 17, backend=backend)
    state = {"weight": arrays["pool/k_dense/kernel"].T, "query": arrays["pool/o_dense/kernel"].squeeze(1)}
    pool.load_state_dict(state)
    assert torch.allclose(pool(arrays["in/x"], mask=arrays["in/mask"].squeeze(-1) > 0), arrays["pool/out"], atol=2e-6)


@pytest.mark.parametrize(
    "name, residual, kernel, dilation",
    [("noskip", "none", 3, 2), ("noskip_k1", "none", 1, 1), ("k5", "highway", 5, 2)],
)
def test_recorded_blocks(backend: str, name: str, residual: str, kernel: int, dilation: int) -> None:
    arrays = part(recorded_arrays(), "block/")
    weight, bias = arrays[f"{name}/conv1d/kernel"].permute(2, 1, 0), arrays[f"{name}/conv1d/bias"]
    block = GatedConv1d(10, weight.shape[0] // 2, kernel, dilation=dilation, residual=residual, backend=backend)
    block.load_state_dict({"weight": weight, "bias": bias})
    y = block(arrays["in/x"], mask=arrays["in/mask"].squeeze(-1) > 0)
    assert torch.allclose(y, arrays[f"{name}/out"], atol=2e-6)


def test_recorded_decoding() -> None:
    cases = json.loads(recorded("golden", "dgcnn_reader_decode.json").read_text())["cases"]
    assert len(cases) == 6
    for case in cases:
        start, end = torch.tensor(case["start"]), torch.tensor(case["end"])
        scores = answer_scores(case["passages"], start, end)
        assert scores == pytest.approx(case["scores"], rel=1e-5)
        assert next(iter(scores), None) == case["best"]
