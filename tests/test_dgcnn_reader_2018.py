"""The reader of 2018: features, network, decoding, texts, files and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels.models import DGCNNReader2018, DGCNNReader2018Config, reader
from pykernels.models.dgcnn_reader_2018 import reader_2018_loss, sinusoidal_positions
from pykernels.models.focal_loss import focal_loss
from pykernels.models.reader_2018 import Reader2018, span_scores, tokenize
from pykernels.models.reader_features import passage_features, window_features
from pykernels.models.word_vectors import WordVectors

# The two examples of the article.
QUESTION = "白云山 的 海拔 是 多少 ？".split()
PASSAGE = "白云山 坐落 在 广州 ， 主峰 海拔 3 8 2 米".split()
SMALL = DGCNNReader2018Config(word_size=6, channels=6, position_size=4, tagger_size=5)
WIDER = DGCNNReader2018Config(word_size=4, channels=6, position_size=4, tagger_size=5)


# --- features ---


def test_article_example_of_jaccard_similarities() -> None:
    got = [jaccard for jaccard, _ in window_features(QUESTION, PASSAGE)]
    assert got == pytest.approx([0.13, 0.11, 0.1, 0.09, 0.09, 0.09, 0.09, 0.09, 0.09, 0.1, 0], abs=0.0051)
    assert got[0] == 1 / 8  # printed as 0.13


def test_article_example_of_edit_distances() -> None:
    got = [distance for _, distance in window_features(QUESTION, PASSAGE)]
    assert got == pytest.approx([0.83, 0.83, 0.83, 0.83, 1, 1, 1, 0.83, 1, 1, 1], abs=0.005)
    assert got[0] == 5 / 6  # of the question's length, not of the truncated window's


def test_article_example_of_matching_characters() -> None:
    (features,) = passage_features(["演"], [["合演", "演"]])
    assert features[:, 0].tolist() == [0, 1] and features[:, 4].tolist() == [0.5, 1]


def test_article_example_of_co_occurrence() -> None:
    """In 4 of the other 9 of 10 passages is 4/10."""
    others = [["甲", "乙"]] * 4 + [["乙"]] * 5
    features = passage_features(["问"], [["甲", "甲"], *others])
    assert features[0][:, 1].tolist() == pytest.approx([0.4, 0.4])
    assert features[1][:, 1].tolist() == pytest.approx([0.4, 0.8])
    assert features[9][:, 1].tolist() == pytest.approx([0.8])


def test_features_of_characters_are_means_over_the_word() -> None:
    question, passages = ["ab", "c"], [["bd", "c", "aba"], ["d"]]
    first, second = passage_features(question, passages)
    near = window_features("abc", "bdcaba")
    assert first[2, 6].item() == pytest.approx(sum(j for j, _ in near[3:]) / 3)
    assert first[2, 7].item() == pytest.approx(sum(d for _, d in near[3:]) / 3)
    assert first[:, 5].tolist() == pytest.approx([0.25, 0, 0])  # d, one of "bd", is in the other of two passages
    assert second.tolist()[0][:2] == [0, 0] and second[0, 5].item() == 0.5


def test_window_of_an_odd_question_is_centred() -> None:
    # Windows of 3 around a, b, c, d, e: (ab) (abc) (bcd) (cde) (de).
    assert [j for j, _ in window_features("bcx", "abcde")] == pytest.approx([1 / 4, 2 / 4, 2 / 4, 1 / 5, 0])


def test_features_of_nothing() -> None:
    assert passage_features(["q"], []) == []
    empty, one = passage_features([], [[], ["a"]])
    assert empty.shape == (0, 8) and one.tolist() == [[0, 0, 0, 1, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match="passages: expected tokens of one character or more, got an empty one"):
        passage_features(["q"], [["a", ""]])


# --- the network ---


def batch(config: DGCNNReader2018Config) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def mask(lengths: tuple[int, ...]) -> Tensor:
        return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)

    q_mask, p_mask = mask((5, 2)), mask((21, 9))
    return {
        "question": torch.randn(*q_mask.shape, config.word_size, generator=generator),
        "passage": torch.randn(*p_mask.shape, config.word_size, generator=generator),
        "features": torch.rand(*p_mask.shape, config.features, generator=generator),
        "question_mask": q_mask,
        "passage_mask": p_mask,
    }


def test_sizes_of_the_article() -> None:
    model = DGCNNReader2018()
    assert list(model.fusion.weight.shape) == [256, 392, 1] and model.fusion.residual == "none"
    assert [block.dilation for block in model.passage_blocks] == [1, 2, 4]
    assert [block.residual for block in (*model.question_blocks, *model.passage_blocks)] == ["highway"] * 4
    assert all(block.gate_noise == 0.1 for block in (*model.question_blocks, model.fusion, *model.passage_blocks))
    convolutions = sum(p.numel() for b in (*model.question_blocks, *model.passage_blocks) for p in b.parameters())
    assert convolutions == 4 * 98_560
    assert DGCNNReader2018(WIDER).question_blocks[0].residual == "none"


def test_positions() -> None:
    table = sinusoidal_positions(50, 6)
    assert table.shape == (50, 6) and table[0].tolist() == [0, 1] * 3
    for p, i in ((7, 0), (49, 1), (30, 2)):
        angle = p / 10000 ** (2 * i / 6)
        assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def step_by_step(model: DGCNNReader2018, inputs: dict[str, Tensor], b: int) -> tuple[Tensor, Tensor]:
    """One pair in float64, cut to its lengths, from the published description."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    q = inputs["question"][b][inputs["question_mask"][b]].double()
    p = inputs["passage"][b][inputs["passage_mask"][b]].double()

    def conv(name: str, x: Tensor, dilation: int) -> Tensor:
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        reach = (weight.shape[2] - 1) // 2 * dilation
        padded = F.pad(x, (0, 0, reach, reach))
        h = bias + sum(padded[t * dilation : t * dilation + len(x)] @ weight[:, :, t].T for t in range(weight.shape[2]))
        c, g = h[:, : h.shape[1] // 2], torch.sigmoid(h[:, h.shape[1] // 2 :])
        return x * (1 - g) + c * g if c.shape == x.shape and weight.shape[2] > 1 else c * g

    def pool(name: str, x: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(x @ w[f"{name}.weight"].T) @ w[f"{name}.query"], 0) @ x

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    v = pool("question_pool", conv("question_blocks.0", q, 1))
    positions = sinusoidal_positions(len(p), model.config.position_size).double()
    features = inputs["features"][b, : len(p)].double()
    x = conv("fusion", torch.cat([p, v.expand(len(p), -1), positions, features], 1), 1)
    for i, dilation in enumerate((1, 2, 4)):
        x = conv(f"passage_blocks.{i}", x, dilation)
    answerable = torch.sigmoid(dense("answerable", pool("passage_pool", x)))
    taggers = (torch.sigmoid(dense(f"{name}.2", torch.tanh(dense(f"{name}.0", x)))) for name in ("start", "end"))
    start, end = (answerable * t.squeeze(1) for t in taggers)
    return start, end


@pytest.mark.parametrize("config", [SMALL, WIDER], ids=["highway", "wider"])
def test_network_equals_a_step_by_step_computation(backend: str, config: DGCNNReader2018Config) -> None:
    torch.manual_seed(1)
    model = DGCNNReader2018(config, backend=backend).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    inputs = batch(config)
    start, end = model(**inputs)
    for b in range(2):
        n = int(inputs["passage_mask"][b].sum())
        for got, expected in zip((start[b, :n], end[b, :n]), step_by_step(model, inputs, b), strict=True):
            assert torch.allclose(got.double(), expected, atol=3e-6)


def test_noise_acts_in_training_only_and_backends_draw_the_same() -> None:
    inputs, losses = batch(SMALL), []
    target = (torch.arange(21) % 4 == 0).float().expand(2, 21)
    for backend in ("auto", "reference"):
        torch.manual_seed(4)
        model = DGCNNReader2018(SMALL, backend=backend)
        loss = reader_2018_loss(*model(**inputs), target, target, inputs["passage_mask"])
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        losses.append(loss.item())
        assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
        model.eval()
        assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_padding_changes_nothing_and_nothing_but_padding_is_finite() -> None:
    torch.manual_seed(2)
    model, inputs = DGCNNReader2018(SMALL).eval(), batch(SMALL)
    more = {name: F.pad(t, (0, 3) if t.dtype == torch.bool else (0, 0, 0, 3)) for name, t in inputs.items()}
    for name, of in (("question", "question_mask"), ("passage", "passage_mask"), ("features", "passage_mask")):
        more[name] = more[name].masked_fill(~more[of].unsqueeze(-1), math.nan)
    live = inputs["passage_mask"]
    for a, b in zip(model(**inputs), model(**more), strict=True):
        assert torch.allclose(a[live], b[:, :21][live], atol=1e-7, rtol=0)
    inputs["question_mask"][0] = inputs["passage_mask"][1] = False
    start, end = model(**inputs)
    assert torch.isfinite(start).all() and torch.isfinite(end).all()


def test_loss_is_the_focal_loss_of_both_ends() -> None:
    start, end, target = torch.rand(2, 4), torch.rand(2, 4), torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]])
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    expected = (focal_loss(start, target) + focal_loss(end, target))[mask].sum() / 5
    assert reader_2018_loss(start, end, target, target, mask).item() == pytest.approx(expected.item())


def test_errors_name_the_argument() -> None:
    model, inputs = DGCNNReader2018(SMALL), batch(SMALL)
    with pytest.raises(ValueError, match=r"features: expected \[2, 21, 8\], got \[2, 21, 7\]"):
        model(**{**inputs, "features": inputs["features"][..., :7]})
    with pytest.raises(ValueError, match=r"passage: expected \[2, 21, 6\], got \[2, 20, 6\]"):
        model(**{**inputs, "passage": inputs["passage"][:, :20]})
    with pytest.raises(ValueError, match="position_size: expected an even number, got 3"):
        DGCNNReader2018Config(position_size=3)
    with pytest.raises(ValueError, match="word_size: expected 1 or more, got 0"):
        DGCNNReader2018Config(word_size=0)


# --- texts ---


def vectors(*words: str, size: int = 6) -> WordVectors:
    return WordVectors(list(words), torch.randn(len(words), size, generator=torch.Generator().manual_seed(1)))


def test_letters_and_digits_are_words_of_their_own() -> None:
    words = vectors("海拔", "白云山")
    assert tokenize("白云山海拔３８２米，Apple", words) == ["白云山", "海拔", *"382", "米", ",", *"Apple"]
    assert "".join(tokenize("ＧＤＰ增长 3%。", words)) == "GDP增长 3%。"
    assert tokenize("", words) == []


def test_spans_are_bounded_by_words_of_which_letters_are_halves() -> None:
    tokens = ["白云山", "3", "8", "2", "米"]
    start, end = torch.tensor([0.5, 0.4, 0, 0, 0, 0.9]), torch.tensor([0.1, 0, 0, 0.5, 0.2, 0.9])
    scores = span_scores(tokens, start, end, max_words=4.5)
    # 3 + 3 halves is 4.5, with the last character 5.5.
    assert scores["白云山382"] == pytest.approx(0.25) and "白云山382米" not in scores
    assert scores["382"] == pytest.approx(0.2) and scores["382米"] == pytest.approx(0.08)
    assert max(span_scores(["a"] * 30, torch.ones(30), torch.ones(30)), key=len) == "a" * 20
    # A string that occurs twice has its larger score; one token longer than all is no candidate.
    assert span_scores(["甲", "甲"], torch.tensor([0.2, 0.9]), torch.tensor([0.5, 0.3]))["甲"] == pytest.approx(0.27)
    assert span_scores(["十一个字的词十一个字的"], torch.ones(1), torch.ones(1)) == {}


def small() -> Reader2018:
    torch.manual_seed(0)
    return Reader2018(DGCNNReader2018(SMALL).eval(), vectors("海拔", "白云山", "米", "广州"))


def test_answers_are_the_votes_of_the_passages() -> None:
    r = small()
    passages = ["白云山海拔382米。", "", "  ", "海拔382米", "米"]
    answer = r.predict("白云山的海拔？", passages)
    assert answer.text == next(iter(answer.candidates)) and answer.score == max(answer.candidates.values())
    encoded = [r.encode(p) for p in passages if p.strip()]
    pairs = r.pairs(r.encode("白云山的海拔？"), encoded)
    scores = []
    for words, pair in zip(encoded, pairs, strict=True):
        start, end = r.model(**r.batch([pair]))
        scores.append(span_scores(words.tokens, start[0], end[0]))
    given = [s["米"] for s in scores]
    assert len(given) == 3
    assert answer.candidates["米"] == pytest.approx(sum(s * s for s in given) / (1 + sum(given)), rel=1e-4)
    assert r.predict("？", []).text is None and r.predict("？", ["", " "]).candidates == {}
    r.model.train()
    assert r.predict("白云山的海拔？", passages).text == answer.text and r.model.training


def test_a_saved_reader_answers_alike_and_the_command_knows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    r = small()
    r.max_words = 3.0
    r.save(tmp_path)
    question, passage = "白云山的海拔？", "白云山海拔382米。"
    answer = r.predict(question, [passage])
    loaded = Reader2018.load(tmp_path)
    assert loaded.predict(question, [passage]).text == answer.text and loaded.max_words == 3.0
    assert reader.main([str(tmp_path), question, "--passage", passage]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == answer.text
    (tmp_path / "words.safetensors").unlink()
    assert reader.main([str(tmp_path), question, "--passage", passage]) == 2
    assert "words.safetensors does not exist" in capsys.readouterr().err


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="words: expected width 6, as the network has, got 3"):
        Reader2018(DGCNNReader2018(SMALL), vectors("甲", size=3))
