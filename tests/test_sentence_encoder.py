"""The sentence encoder example: its pooling begins as the encoder's mean, learns, and it says what is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import sentence_encoder
import torch
from sentence_data import PACKAGE, Encoder, Tokens, load, load_task
from sentence_encoder import Classifier, MeanPool, mean_attention_pool, pooling_times, score, weighted_tokens

from kit import log
from kit.progress import Progress
from kit.run import Refused
from kit.timing import interleaved
from tests.runs import assert_same_run

transformers = pytest.importorskip("transformers")


def encoded(encoder: Encoder, texts: list[tuple[str, ...]]) -> list[torch.Tensor]:
    return encoder.encode(texts, Progress(1, quiet=True))


def arguments(task: Path, bert: Path, out: Path, *more: str) -> list[str]:
    small = (
        "--seeds 2 --epochs 25 --switch-epoch 20 --switch-patience 25 --batch-size 16 --hidden 8 --lr 0.03 --threads 1"
    )
    return ["--data", str(task), "--encoder", str(bert), "--out", str(out), *small.split(), "--quiet", *more]


# --- tokens ---


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_tokens_are_the_layers_output_whatever_the_batch(bert: Path, layer: int) -> None:
    texts = [("the cat sat .",), ("a dog",), ("the dog ran under the mat",), ("not a cat", "the dog sat")]
    encoder = Encoder(str(bert), layer, 24)
    model = transformers.AutoModel.from_pretrained(bert).eval()
    for text, rows in zip(texts[:3], encoded(encoder, texts[:3]), strict=True):
        with torch.no_grad():
            inputs = encoder.tokenizer(*text, return_tensors="pt")
            expected = model(**inputs, output_hidden_states=True).hidden_states[layer or 2][0]
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    pair = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenize(texts[3:])["input_ids"][0].tolist())
    assert pair == "[CLS] not a cat [SEP] the dog sat [SEP]".split()
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert [len(rows) for rows in encoded(Encoder(str(bert), layer, 5), texts[:3])] == [5, 4, 5], "cut to 5 tokens"


@pytest.mark.parametrize("form", ["lengths", "mask", "cu_seqlens"])
def test_pooling_begins_as_the_mean(backend: str, form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sentences = [torch.randn(n, 16, generator=generator) for n in (3, 11, 1, 7)]
    tokens = Tokens(sentences, torch.tensor([0, 1, 0, 1]))
    pool, everything = mean_attention_pool(16, 8, backend), range(4)
    x, cu_seqlens = tokens.packed(everything)
    if form == "cu_seqlens":
        pooled = pool(x, cu_seqlens=cu_seqlens)
    else:
        padded, lengths = tokens.padded(everything)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        pooled = pool(padded, **{form: lengths if form == "lengths" else mask})
    expected = torch.stack([rows.mean(0) for rows in sentences])
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(MeanPool()(x, cu_seqlens=cu_seqlens), expected, rtol=1e-5, atol=1e-6)
    pooled.square().sum().backward()
    assert pool.query.grad is not None and pool.query.grad.any(), "it can leave the mean"


def test_pooling_begins_as_the_real_encoders_own_embeddings() -> None:
    """all-MiniLM-L6-v2: what sentence-transformers makes of it, the normalized mean, from an AttentionPool instead."""
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    package = importlib.import_module(PACKAGE)
    own = pytest.importorskip("sentence_transformers").SentenceTransformer(str(package.get_model_path()), device="cpu")
    sentences = ["The sailors rode the breeze clear of the rocks.", "Yes.", "Whom he had seen, nobody could say."]
    tokens = Tokens(encoded(Encoder("", 0, 256), [(s,) for s in sentences]), torch.zeros(3))
    expected = own.encode(sentences, convert_to_tensor=True, show_progress_bar=False)
    pool = mean_attention_pool(384, 128)
    x, lengths = tokens.padded(range(3))
    with torch.no_grad():
        padded, packed = (
            pool(x, lengths=lengths),
            pool(tokens.packed(range(3))[0], cu_seqlens=tokens.packed(range(3))[1]),
        )
    for pooled in (padded, packed):
        torch.testing.assert_close(torch.nn.functional.normalize(pooled), expected, rtol=1e-4, atol=1e-5)


# --- the whole ---


def test_attention_learns_what_the_mean_does_not_show_and_runs_resume(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence_encoder.main(arguments(task, bert, tmp_path / "whole", "--layer", "1")) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "whole" / "scores.json").read_text())
    found = {name: [s["matthews"] for s in values] for name, values in scores["scores"].items()}
    assert max(found["mean"]) < 0.5 < 0.75 < min(found["attention"]), found
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 1000
    assert "dev.tsv, attention pooling: accuracy" in printed and "eager, sum" in printed
    assert all(seconds > 0 for seconds in scores["pooling_seconds"].values())

    halves = arguments(task, bert, tmp_path / "halves", "--layer", "1", "--resume", "auto")
    assert sentence_encoder.main([*halves, "--max-steps", "41"]) == 0
    assert sentence_encoder.main(halves) == 0
    for name in ("mean-1", "mean-2", "attention-1", "attention-2"):
        assert_same_run(tmp_path / "whole" / name, tmp_path / "halves" / name)


def test_a_correlation_below_zero_does_not_end_the_first_stage(
    task: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentence_encoder, "score", lambda model, tokens: {"accuracy": 0.2, "matthews": -0.5})
    schedule = ["--seeds", "1", "--epochs", "3", "--switch-epoch", "2"]
    assert sentence_encoder.main(arguments(task, bert, tmp_path, *schedule)) == 0
    rows = log.read(tmp_path / "attention-1" / "log.csv")
    assert [row["stage"] for row in rows if row["score"]] == ["1", "1", "2"]


def test_weights_are_those_of_the_tokens_and_every_form_gives_the_same(bert: Path) -> None:
    """pooling_times compares the results of all forms before it times them."""
    encoder, pool = Encoder(str(bert), 0, 24), mean_attention_pool(16, 8)
    texts = [("the cat sat .",), ("a",), ("the dog ran under the mat not",)] * 3
    rows = encoded(encoder, texts)
    torch.nn.init.normal_(pool.query)
    pairs = weighted_tokens(encoder, pool, texts[0], rows[0])
    assert [token for token, _ in pairs] == "[CLS] the cat sat . [SEP]".split()
    weights = torch.tensor([weight for _, weight in pairs])
    expected = torch.softmax(torch.tanh(rows[0] @ pool.weight.T) @ pool.query, 0)
    torch.testing.assert_close(weights, expected.detach(), rtol=1e-4, atol=1e-6)
    times = pooling_times(pool, Tokens(rows, torch.zeros(9)), 4)
    assert list(times) == ["cu_seqlens", "lengths", "lengths, again", "eager, product", "eager, sum"]


def test_scores() -> None:
    model, rows = Classifier("mean", 1, 1), [torch.tensor([[v]]) for v in (-1.0, 1.0, 1.0, 1.0)]
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.linear.bias.zero_()
    # One true negative, two true positives, one false positive: (2 * 1 - 0 * 1) / sqrt(3 * 2 * 2 * 1).
    got = score(model, Tokens(rows, torch.tensor([0, 0, 1, 1])))
    assert got == pytest.approx({"accuracy": 0.75, "matthews": 2 / 12**0.5})
    assert score(model, Tokens(rows[1:], torch.tensor([0, 1, 1])))["matthews"] == 0, "one answer to everything"


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)
    assert order == list("abc" + "abc" + "bca" + "cab") and times.keys() == set("abc")


# --- mistakes ---


def test_files_of_both_forms(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text('index\tsentence1\tsentence2\tlabel\n0\tA "b\tC.\tyes\n', encoding="utf-8")
    assert load(file) == ([('A "b', "C.")], ["yes"])
    file.write_text("sentence\tlabel\nA b\t1\nC\t0\n", encoding="utf-8")
    assert load(file) == ([("A b",), ("C",)], ["1", "0"])
    for text, message in {
        "sentence\tlabel\nA b\n": "a.tsv: line 2: expected 2 columns, got 1",
        "sentence\tlabel\n": "expected rows, got none",
        "A b\n": "line 1: expected a header with 'label', or CoLA's 4 columns, got 'A b'",
        "a\tb\tc\tlabel\n1\t2\t3\t4\n": "expected one column of text or two",
    }.items():
        file.write_text(text, encoding="utf-8")
        with pytest.raises(Refused, match=message):
            load(file)


def test_a_share_is_held_out_where_there_is_no_val(task: Path, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_bytes((task / f"{name}.tsv").read_bytes())
    whole, split = load_task(task, 0.25, 1), load_task(tmp_path, 0.25, 1)
    assert len(whole["val"][0]) == 64 and len(whole["train"][0]) == 192
    assert [len(split[name][0]) for name in ("train", "val", "dev")] == [144, 48, 64]
    pairs = [pair for name in ("train", "val") for pair in zip(split[name][0], split[name][1].tolist(), strict=True)]
    assert sorted(pairs) == sorted(zip(whole["train"][0], whole["train"][1].tolist(), strict=True))
    assert load_task(tmp_path, 0.25, 1)["val"][0] == split["val"][0] != load_task(tmp_path, 0.25, 2)["val"][0]


def test_mistakes_are_told(task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        try:
            assert sentence_encoder.main(argv) == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    out = tmp_path / "run"
    assert "data: expected a folder with train.tsv and dev.tsv" in refused()
    assert "hidden: expected 1 or more, got 0" in refused("--data", "x", "--hidden", "0")
    assert "holdout: expected 0 < holdout < 1, got 0.0" in refused("--data", "x", "--holdout", "0")
    assert "there is no such folder" in refused(*arguments(task, tmp_path / "nowhere", out))
    assert "transformers cannot load it" in refused(*arguments(task, task, out))
    assert "--layer: expected at most the encoder's 2, got 3" in refused(*arguments(task, bert, out, "--layer", "3"))
    assert "train.tsv: cannot be read" in refused(*arguments(tmp_path, bert, out))
    three = tmp_path / "three"
    three.mkdir()
    for name, labels in (("train", "012"), ("dev", "01")):
        (three / f"{name}.tsv").write_text("".join(f"s\t{label}\t\ta cat\n" for label in labels), encoding="utf-8")
    assert "train.tsv: expected two labels, got 3: 0, 1, 2" in refused(*arguments(three, bert, out))
    (three / "train.tsv").write_text("".join(f"s\t{label}\t\ta cat\n" for label in "12"), encoding="utf-8")
    assert "dev.tsv: expected the labels 1 and 2, got '0'" in refused(*arguments(three, bert, out))
