"""Data of the reader: files, cutting, targets, word vectors, vocabulary, and the reader from text to answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reader_batches import crop, draw, encode, make_batch, occurrences, split
from reader_data import DataError, Passage, Record, cut, load, sample

from pykernels.models import DGCNNReader, DGCNNReaderConfig
from pykernels.models import reader as reader_module
from pykernels.models.reader import Reader
from pykernels.models.vocabulary import Vocabulary
from pykernels.models.word_vectors import WordVectors

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "北京是中国的首都。上海是港口。",
                    "qas": [
                        {
                            "question": "首都是哪里？",
                            "answers": [{"text": "北京"}, {"text": "北京市"}, {"text": "北京"}],
                        },
                        {"question": "谁写的？", "answers": [{"text": "曹雪芹"}]},
                    ],
                }
            ]
        }
    ]
}
WEBQA = [
    {
        "question": "首都是哪里？",
        "answers": ["北京"],
        "passages": [
            {"passage": "北京是首都，北京很大。", "answer": "北京"},
            {"passage": "上海是港口。", "answer": ""},
            {"passage": "没有它。", "answer": "北京"},
        ],
    }
]
WEBQA_ORIGINAL = {
    "Q1": {
        "question": "首都是哪里？",
        "evidences": {
            "Q1#1": {"evidence": "北京是首都。", "answer": ["北京"]},
            "Q1#2": {"evidence": "上海是港口。", "answer": ["no_answer"]},
        },
    }
}


def written(folder: Path, value: Any) -> Path:
    path = folder / "data.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


# --- files ---


def test_squad_form(tmp_path: Path) -> None:
    records, skipped = load(written(tmp_path, SQUAD), 10)
    assert skipped == {"questions whose answer is in none of their passages": 1}
    assert [p.text for p in records[0].passages] == ["北京是中国的首都。", "上海是港口。"]
    assert [p.answer for p in records[0].passages] == ["北京", ""]
    assert set(records[0].accepted) == {"北京", "北京市"}


@pytest.mark.parametrize("form, left_out", [(WEBQA, 1), (WEBQA_ORIGINAL, 0)], ids=["list", "object"])
def test_webqa_forms(tmp_path: Path, form: Any, left_out: int) -> None:
    records, skipped = load(written(tmp_path, form), 10)
    assert sum(skipped.values()) == left_out
    assert [p.answer for p in records[0].passages] == ["北京", ""] and records[0].accepted == ("北京",)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"data": [', r"data.json: no JSON: line 1, column 11"),
        ("3", "expected SQuAD .* or WebQA .*, got 3"),
        ('{"data": 3}', "data: expected a list, got int"),
        (
            '{"data": [{"paragraphs": [{"qas": []}]}]}',
            r"data\[0\].paragraphs\[0\].context: expected a string, got nothing",
        ),
        (
            '[{"question": "q", "passages": [{"passage": 5}]}]',
            r"\[0\].passages\[0\].passage: expected a string, got int",
        ),
        ('{"a": {"question": "q"}}', r"\['a'\].evidences: expected an object, got nothing"),
        ("[]", "no usable question: it holds no question"),
        ('[{"question": "q", "passages": []}]', "no usable question: 1 questions without an answer"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(written(tmp_path, content), 10)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.json: there is no such file"):
        load(tmp_path / "nowhere.json", 10)


@given(st.text(alphabet="甲乙。！；a\n”", max_size=60), st.integers(1, 20))
def test_cutting_loses_nothing_but_blanks(text: str, size: int) -> None:
    passages = cut(text, size)
    assert all(0 < len(p) <= size for p in passages)
    assert "".join("".join(passages).split()) == "".join(text.split())


def test_sample_needs_no_file_and_its_answers_are_in_its_passages() -> None:
    records = sample(200)
    assert len(records) == 200
    for record in records:
        holding = [p for p in record.passages if p.answer]
        assert len(holding) == 1 and holding[0].answer in holding[0].text and record.accepted[0] not in record.question


def test_one_source_is_on_one_side_of_the_split() -> None:
    records = [Record(f"q{i}", (Passage("a", "a"),), ("a",), f"source {i % 10}") for i in range(50)]
    train, held = split(records, 0.2, seed=1)
    assert len(train) == 40 and len(held) == 10
    assert not {r.source for r in train} & {r.source for r in held}
    assert split(records, 0.2, seed=1) == (train, held) != split(records, 0.2, seed=2)


# --- batches ---


def small_reader(texts: list[str], **options: Any) -> Reader:
    vocabulary = Vocabulary.of(texts, 1)
    torch.manual_seed(0)
    model = DGCNNReader(DGCNNReaderConfig(vocabulary_size=len(vocabulary), word_size=0, char_size=8))
    return Reader(model, vocabulary, **options)


def test_every_occurrence_is_a_target() -> None:
    assert occurrences("aaa", "aa") == [0, 1] and occurrences("abc", "") == [] and occurrences("", "a") == []
    records = [
        Record("哪里？", (Passage("北京是首都，北京很大。", "北京"),), ("北京",), "1"),
        Record("谁？", (Passage("没有。", ""),), ("他",), "2"),
    ]
    reader = small_reader([p.text for r in records for p in r.passages])
    batch = make_batch(reader, encode(reader, records), [1, 0], seed=1, epoch=0)
    assert batch.start[1].nonzero().flatten().tolist() == [0, 6] and batch.end[1].nonzero().flatten().tolist() == [1, 7]
    assert not batch.start[0].any() and (batch.passage[0] > 0).sum() == 3
    assert (batch.question[1] == 1).sum() == 3, "characters that are in no passage are unknown"


@given(st.integers(0, 600), st.integers(0, 2**32))
def test_crops_are_spans_of_the_allowed_lengths(length: int, seed: int) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(length))
    part = crop(small_reader([]).encode(text), np.random.default_rng(seed))
    assert part.text in text and len(part.text) == len(part.characters)
    assert min(length, 128) <= len(part.text) <= 256


def test_share_of_passages_with_the_answer() -> None:
    record = Record("q", tuple(Passage("x", "x" if i == 3 else "") for i in range(8)), ("x",), "s")
    drawn = [draw(record, 0.5, np.random.default_rng(i)) for i in range(400)]
    assert 0.5 < drawn.count(3) / 400 < 0.63, "0.5 + 0.5 / 8 expected"
    assert set(drawn) == set(range(8))


def test_batches_depend_on_seed_epoch_and_item_alone() -> None:
    records = [Record("q", tuple(Passage(f"{i}甲{j}", "甲") for j in range(5)), ("甲",), "s") for i in range(6)]
    reader = small_reader([p.text for r in records for p in r.passages])
    items = encode(reader, records)
    together = make_batch(reader, items, [0, 1, 2, 3], 7, 3)
    apart = make_batch(reader, items, [2], 7, 3)
    assert torch.equal(together.passage[2], apart.passage[0])
    others = [make_batch(reader, items, [0, 1, 2, 3], seed, epoch).passage for seed, epoch in ((8, 3), (7, 4))]
    assert not any(torch.equal(together.passage, other) for other in others)


# --- vocabulary and word vectors ---


def test_vocabulary() -> None:
    vocabulary = Vocabulary.of(["aab", "abc"], min_count=2)
    assert vocabulary.characters == ["a", "b"] and len(vocabulary) == 4
    assert vocabulary.encode("abcz") == [2, 3, 1, 1] and vocabulary.encode("") == []


def test_words_have_their_vector_at_every_character_and_unknown_words_their_characters() -> None:
    vectors = WordVectors(["中国", "人", "首"], torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    assert vectors.rows("中国人") == [1, 1, 2]
    assert vectors.rows("首都zz") == [3, 0, 0, 0] and vectors.rows("") == []
    assert torch.equal(vectors.table[torch.tensor(vectors.rows("都人"))], torch.tensor([[0.0, 0], [3, 4]]))
    with pytest.raises(ValueError, match=r"vectors: expected \[2, W\], one for each word, got \[3, 2\]"):
        WordVectors(["a", "b"], torch.zeros(3, 2))


def test_vectors_of_jieba() -> None:
    vectors = WordVectors.from_jieba()
    assert vectors.size == 128 and len(vectors.words) > 20_000
    table = torch.nn.functional.normalize(vectors.table[1:], dim=1)
    near = (table @ table[vectors.words.index("三")]).topk(4).indices.tolist()
    assert {"三", "二", "四"} <= {vectors.words[i] for i in near}


def test_skip_gram_is_the_same_for_a_seed(tmp_path: Path) -> None:
    texts = ["北京是中国的首都", "上海是中国的港口"] * 5
    first, second = (WordVectors.skip_gram(texts, 6, seed=3, epochs=2) for _ in range(2))
    assert first.words == second.words and torch.equal(first.table, second.table) and first.size == 6
    path = tmp_path / "vectors.txt"
    path.write_text("2 3\n中国 1 2 3\n人 4 5 6\n", encoding="utf-8")
    loaded = WordVectors.from_word2vec(path)
    assert loaded.words == ["中国", "人"] and loaded.table.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]


# --- from text to answer ---


def confident(reader: Reader) -> Reader:
    """Probabilities well above the threshold, so that there are candidates."""
    with torch.no_grad():
        reader.model.pointers.bias.fill_(1.0)
        reader.model.answerable.bias.fill_(2.0)
    return reader


PASSAGES = ["北京是首都，北京很大。", "", "上海是港口。"]


def test_answers_of_many_questions_are_those_of_each_alone() -> None:
    reader = confident(small_reader(PASSAGES))
    questions = [("首都是哪里？", PASSAGES), ("港口", PASSAGES[2:]), ("空", [""]), ("无", [])]
    coded = [(reader.encode(q), [reader.encode(p) for p in passages]) for q, passages in questions]
    together = reader.predict_encoded(coded, passages_a_batch=2)
    for answer, (question, passages) in zip(together, questions, strict=True):
        alone = reader.predict(question, passages)
        assert alone.text == answer.text and alone.candidates == pytest.approx(answer.candidates, rel=1e-4)
    assert together[0].text is not None and together[2].text is together[3].text is None
    assert reader.model.training, "the mode is put back"


@pytest.mark.parametrize("vectors", [False, True], ids=["characters", "words"])
def test_saved_and_loaded(tmp_path: Path, vectors: bool) -> None:
    words = WordVectors(["北京", "首"], torch.randn(2, 5)) if vectors else None
    vocabulary = Vocabulary.of(PASSAGES, 1)
    model = DGCNNReader(DGCNNReaderConfig(vocabulary_size=len(vocabulary), word_size=5 if vectors else 0, char_size=8))
    reader = confident(Reader(model, vocabulary, words, threshold=0.2, max_length=3))
    reader.save(tmp_path)
    loaded = Reader.load(tmp_path)
    assert loaded.predict("首都？", PASSAGES) == reader.predict("首都？", PASSAGES)
    assert (loaded.threshold, loaded.max_length) == (0.2, 3)
    if vectors:
        (tmp_path / "words.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="words.safetensors does not exist, and the reader in .* needs it"):
            Reader.load(tmp_path)
        with pytest.raises(ValueError, match=r"words: expected vectors of width 5 \(0: none\), .* got 0"):
            Reader(model, vocabulary)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = confident(small_reader(PASSAGES))
    reader.save(tmp_path)
    file = tmp_path / "passages.txt"
    file.write_text("\n".join(PASSAGES), encoding="utf-8")
    assert reader_module.main([str(tmp_path), "首都？", "--passages-file", str(file), "--candidates", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["answer"] == reader.predict("首都？", PASSAGES).text == shown["candidates"][0]["answer"]
    assert shown["question"] == "首都？" and len(shown["candidates"]) == 2

    assert reader_module.main([str(tmp_path), "首都？", "--passage", "。", "--backend", "reference"]) in (0, 1)
    reader.threshold = 1.0
    reader.save(tmp_path)
    capsys.readouterr()
    assert reader_module.main([str(tmp_path), "首都？", "--passage", PASSAGES[0]]) == 1
    assert json.loads(capsys.readouterr().out)["answer"] is None

    for arguments, message in (
        ([str(tmp_path), "q"], "no passage: expected --passage TEXT or --passages-file FILE"),
        ([str(tmp_path / "none"), "q", "--passage", "p"], "reader.safetensors does not exist"),
        ([str(tmp_path), "q", "--passages-file", str(tmp_path / "none")], "No such file"),
    ):
        assert reader_module.main(arguments) == 2
        assert message in capsys.readouterr().err
