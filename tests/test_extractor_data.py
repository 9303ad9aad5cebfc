"""Annotated sentences: what is read, mended, left out and refused, and how they are varied."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from extractor_data import DataError, Sentence, load, repaired, sample, swapped

from pykernels.models.extractor_decoding import Triple


def write(path: Path, *entries: object) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def entry(text: str, *triples: tuple[str, str, str]) -> dict:
    return {"text": text, "spo_list": [dict(zip(Triple._fields, t, strict=True)) for t in triples], "postag": []}


def test_sentences_are_read_in_lower_case_and_counted_when_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json",
        entry("《ABC之歌》是李四写的", ("《ABC之歌》", "作者", " 李四"), ("ABC之歌", "作者", "李四")),
        "",
        entry("没有人", ("张三", "丈夫", "没有")),
        entry("一" * 30, ("一", "作者", "一")),
        entry("甲乙", ("甲", "妻子", "乙"), ("甲", "妻子", "丙"), ("《》", "妻子", "乙")),
    )
    sentences, skipped = load(path, 20)
    assert sentences == [
        Sentence("《abc之歌》是李四写的", (Triple("abc之歌", "作者", "李四"),)),
        Sentence("甲乙", (Triple("甲", "妻子", "乙"),)),
    ]
    assert skipped == {
        "triples with a name that is not in the text": 3,
        "sentences without a usable triple": 1,
        "sentences of more than 20 characters": 1,
    }


def test_three_faults_are_mended() -> None:
    # Part of a title, once in the text: the whole title. Twice: as annotated.
    part = [Triple("红楼", "作者", "曹雪芹")]
    assert repaired("《红楼梦》，曹雪芹著", part) == [Triple("红楼梦", "作者", "曹雪芹")]
    assert repaired("红楼即《红楼梦》，曹雪芹著", part) == part
    assert repaired("<红楼梦>", [Triple("《红楼梦》", "作者", "《曹雪芹》")]) == [Triple("红楼梦", "作者", "曹雪芹")]
    song, album = Triple("歌", "所属专辑", "辑"), Triple("辑", "歌手", "人")
    assert repaired("歌 辑 人", [album, song]) == [song]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: no JSON: column 2"),
        ("[]", "line 2: expected an object, got list"),
        ({"spo_list": []}, "line 2: text: expected str, got nothing"),
        ({"text": "x", "spo_list": {}}, "line 2: spo_list: expected list, got dict"),
        ({"text": "x", "spo_list": [3]}, r"line 2: spo_list\[0\]: expected an object, got int"),
        ({"text": "x", "spo_list": [{"subject": "x"}]}, r"line 2: spo_list\[0\]: predicate: expected str, got nothing"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "b.json", entry("甲乙", ("甲", "妻子", "乙")), line)
    with pytest.raises(DataError, match=f"b.json: {message}"):
        load(path, 20)


def test_files_without_sentences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="c.json: there is no such file"):
        load(tmp_path / "c.json", 20)
    with pytest.raises(DataError, match="d.json: no usable sentence: 1 sentences without a usable triple"):
        load(write(tmp_path / "d.json", entry("甲")), 20)
    with pytest.raises(DataError, match="no usable sentence: it holds none"):
        load(write(tmp_path / "e.json"), 20)


def test_a_triple_is_swapped_everywhere_it_stands() -> None:
    sentence = Sentence("甲娶乙，甲写书", (Triple("甲", "妻子", "乙"), Triple("书", "作者", "甲")))
    pool = {"妻子": [Triple("丙丁", "妻子", "戊")], "作者": [Triple("诗", "作者", "己")]}
    seen = {swapped(sentence, pool, np.random.default_rng(seed)) for seed in range(20)}
    assert seen == {
        Sentence("丙丁娶戊，丙丁写书", (Triple("丙丁", "妻子", "戊"), Triple("书", "作者", "丙丁"))),
        Sentence("己娶乙，己写诗", (Triple("己", "妻子", "乙"), Triple("诗", "作者", "己"))),
    }


def test_sample_needs_no_file_and_its_names_are_in_its_texts() -> None:
    sentences = sample(300)
    assert len(sentences) == 300 and len({s.text for s in sentences}) > 290
    for sentence in sentences:
        assert all(t.subject in sentence.text and t.object in sentence.text for t in sentence.triples)
    assert {t.predicate for s in sentences for t in s.triples} == {"职务", "所属"}
