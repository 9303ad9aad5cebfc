"""Texts to triples: decoding, rules, scores, distant supervision, averaging, files and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pykernels.models import DGCNNExtractor, DGCNNExtractorConfig, extractor
from pykernels.models.dgcnn_extractor import Spans, Trunk
from pykernels.models.extractor import Extractor, extract, locate, lower
from pykernels.models.extractor_decoding import Triple, complete, evaluate, object_spans, subject_spans
from pykernels.models.known_triples import KnownTriples
from pykernels.models.vocabulary import Vocabulary
from pykernels.models.word_vectors import WordVectors
from tests.recorded import recorded

PREDICATES = ["作者", "丈夫", "出生地"]
NOVEL, BORN = Triple("红楼梦", "作者", "曹雪芹"), Triple("鲁迅", "出生地", "绍兴")
KNOWN = KnownTriples.of([{NOVEL}, {NOVEL, BORN}])


# --- decoding ---


def test_a_start_takes_the_nearest_end_from_there_on() -> None:
    start = torch.tensor([0.0, 0.6, 0.5, 0.7, 0.9])
    end = torch.tensor([0.9, 0.1, 0.45, 0.41, 0.4])
    # 0.5 is not above 0.5, nor 0.4 above 0.4: the last start finds no end.
    assert subject_spans(start, end) == [(1, 2), (3, 3)]
    assert subject_spans(start, end, (0.4, 0.3)) == [(1, 2), (2, 2), (3, 3), (4, 4)]
    assert subject_spans(torch.empty(0), torch.empty(0)) == []


def test_objects_start_and_end_under_one_predicate() -> None:
    start, end = torch.zeros(5, 3), torch.zeros(5, 3)
    start[1, 2] = start[3, 0] = 0.9
    end[2, 0] = end[4, 2] = end[4, 0] = 0.9
    assert object_spans(start, end) == [(0, 3, 4), (2, 1, 4)]


def test_marriages_go_both_ways_and_albums_have_no_singer() -> None:
    given = [Triple("甲", "丈夫", "乙"), Triple("丙", "妻子", "丁"), Triple("甲", "作者", "乙")]
    assert complete(given) == {*given, Triple("乙", "妻子", "甲"), Triple("丁", "丈夫", "丙")}
    song = [Triple("歌", "所属专辑", "辑"), Triple("歌", "歌手", "人")]
    song += [Triple("辑", "歌手", "人"), Triple("辑", "作曲", "人")]
    assert complete(song) == set(song[:2])
    # An album that is a song of another one keeps its credits.
    title_song = [*song, Triple("辑", "所属专辑", "集")]
    assert complete(title_song) == set(title_song)


def test_scores_count_whole_triples_of_all_sentences_together() -> None:
    a, b, c = (Triple("s", "p", x) for x in "abc")
    assert evaluate([{a, b}, set(), {c}], [{a}, {b}, {c}]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert evaluate([{a}], [{a, b, c}]) == pytest.approx((1, 1 / 3, 0.5))
    assert evaluate([set()], [set()]) == (0, 0, 0)
    with pytest.raises(ValueError, match="predicted: expected triples of 2 sentences, one at least, got 1"):
        evaluate([{a}], [{a}, {b}])


# --- distant supervision ---


def test_known_triples_are_found_where_both_names_occur() -> None:
    assert KNOWN.search("红楼梦是曹雪芹写的") == [NOVEL]
    assert KNOWN.search("红楼梦") == KNOWN.search("") == KnownTriples({}).search("红楼梦") == []
    overlapping = KnownTriples.of([{Triple("中国", "a", "国人"), Triple("中国人", "b", "国")}])
    assert overlapping.search("中国人") == [Triple("中国", "a", "国人"), Triple("中国人", "b", "国")]


def test_a_training_sentence_does_not_tell_itself_its_triples() -> None:
    text = "鲁迅生于绍兴，没有写红楼梦，那是曹雪芹"
    assert KNOWN.search(text) == sorted([NOVEL, BORN])
    assert KNOWN.search(text, annotated=[NOVEL, BORN]) == [NOVEL]
    assert KnownTriples.from_json(json.loads(json.dumps(KNOWN.to_json()))).counts == KNOWN.counts


def test_known_triples_mark_the_first_occurrences() -> None:
    e = small(known=True)
    encoded = e.encode("曹雪芹，曹雪芹的红楼梦")
    assert encoded.known == {(8, 10): [(0, 0, 2)]}
    subjects = e.known_subjects([encoded], 13)
    assert subjects.nonzero().tolist() == [[0, 8, 0], [0, 10, 1]]
    objects = e.known_objects([encoded, encoded], [(8, 10), (8, 9)], 13)
    assert objects.nonzero().tolist() == [[0, 0, 0], [0, 2, 3]]


# --- texts to triples ---


def small(known: bool = False, words: WordVectors | None = None) -> Extractor:
    characters = "红楼梦曹雪芹"
    torch.manual_seed(0)
    config = DGCNNExtractorConfig(
        vocabulary_size=len(characters) + 2,
        predicates=3,
        word_size=0 if words is None else words.size,
        char_size=8,
        max_length=20,
        dilations=(1, 2),
        heads=2,
        head_size=4,
        distant_supervision=known,
    )
    model = DGCNNExtractor(config).eval()
    return Extractor(model, Vocabulary(list(characters)), PREDICATES, words, KNOWN if known else None)


class Told(DGCNNExtractor):
    """Says what it is told: {place in the batch of characters: probabilities} of subjects and objects."""

    def __init__(self, config: DGCNNExtractorConfig, subjects: Spans, objects: Spans) -> None:
        super().__init__(config)
        self.told = subjects, objects

    def subjects(self, trunk: Trunk, known_subjects: Tensor | None = None) -> Spans:
        return self.told[0]

    def objects(self, trunk: Trunk, start: Tensor, end: Tensor, *known: Tensor | None) -> Spans:
        return Spans(*(p.expand(len(start), -1, -1) for p in self.told[1]))


def told(start: list[float], end: list[float], objects: dict[tuple[int, int, int], float]) -> Extractor:
    """An extractor of four characters whose object probabilities are {(predicate, first, last): probability}."""
    e = small()
    o = Spans(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))
    for (c, first, last), p in objects.items():
        o.start[0, first, c], o.end[0, last, c] = p, p
    e.model = Told(e.model.config, Spans(torch.tensor([start]), torch.tensor([end])), o).eval()
    return e


def test_probabilities_of_several_models_are_averaged() -> None:
    a = told([0.9, 0, 0, 0], [0.9, 0, 0, 0], {(0, 1, 2): 0.9, (2, 3, 3): 0.6})
    b = told([0.2, 0.8, 0, 0], [0, 0.5, 0, 0], {(0, 1, 2): 0.2, (2, 3, 3): 0.3})
    assert a.predict("ABcd") == [Triple("A", "作者", "Bc"), Triple("A", "出生地", "d")]
    assert b.predict("ABcd") == []
    # Subjects: start 0.55, 0.4, end 0.45, 0.25; of the objects 0.55 is above both thresholds and 0.45 is not.
    assert extract([a, b], ["ABcd"]) == [{Triple("A", "作者", "Bc")}]


def test_models_with_and_without_distant_supervision_are_united() -> None:
    a, b = told([0.9, 0, 0, 0], [0.9, 0, 0, 0], {(0, 1, 1): 0.9}), small(known=True)
    c = told([0, 0.9, 0, 0], [0, 0.9, 0, 0], {(2, 3, 3): 0.9})
    b.model = c.model
    assert extract([a, b], ["ABcd"]) == [{Triple("A", "作者", "B"), Triple("B", "出生地", "d")}]


def open_mouthed(e: Extractor) -> Extractor:
    """With thresholds so low that an untrained network finds something."""
    e.thresholds = (0.05, 0.05)
    for name, p in e.model.named_parameters():
        if "pointers.bias" in name or "exists.bias" in name or name.endswith("2.bias"):
            torch.nn.init.constant_(p, 1.0)
    return e


@pytest.mark.parametrize("known", [False, True])
def test_texts_of_any_length_in_any_company(known: bool) -> None:
    e = open_mouthed(small(known))
    texts = ["红楼梦的作者是曹雪芹", "", "曹", "鲁迅是绍兴人", "x" * 20]
    together = extract([e], texts, sentences_a_batch=2)
    assert together == [extract([e], [text])[0] for text in texts]
    assert together[0] and not together[1]
    assert extract([e], [e.encode(text) for text in texts]) == together
    assert not e.model.training and extract([e], []) == []
    e.model.train()
    assert extract([e], texts) == together and e.model.training


def test_case_is_that_of_the_text() -> None:
    assert lower("AbİC") == "abİc"
    e = open_mouthed(small())
    upper = extract([e], ["ABCD"])[0]
    assert upper and {Triple(*(lower(x) for x in t)) for t in upper} == extract([e], ["abcd"])[0]


def test_names_are_located_where_they_occur_first() -> None:
    triples = [Triple("乙", "b", "甲"), Triple("乙", "a", "甲乙"), Triple("丙", "a", "甲")]
    assert locate("甲甲乙甲乙", triples, {"a": 0, "b": 1}) == {(2, 2): [(1, 0, 0), (0, 1, 2)]}


def test_what_does_not_fit_together_is_refused_by_name() -> None:
    e, known = small(), small(known=True)
    with pytest.raises(ValueError, match="predicates: expected 3, as the network has, got 2"):
        Extractor(e.model, e.vocabulary, PREDICATES[:2])
    with pytest.raises(ValueError, match="vocabulary: expected 8, as the network has, got 2"):
        Extractor(e.model, Vocabulary([]), PREDICATES)
    with pytest.raises(ValueError, match="known: expected none, as distant_supervision is False, got some"):
        Extractor(e.model, e.vocabulary, PREDICATES, known=KNOWN)
    with pytest.raises(ValueError, match="known: expected known triples, as distant_supervision is True, got none"):
        Extractor(known.model, e.vocabulary, PREDICATES)
    with pytest.raises(ValueError, match="text: expected at most 20 characters, got 21"):
        e.predict("x" * 21)
    with pytest.raises(ValueError, match="extractors: expected one or more, got none"):
        extract([], ["x"])
    other = Extractor(e.model, e.vocabulary, PREDICATES[::-1])
    with pytest.raises(ValueError, match="extractors: expected the same predicates"):
        extract([e, other], ["x"])


# --- files and the command ---


@pytest.mark.parametrize("known", [False, True])
def test_a_saved_extractor_says_the_same(tmp_path: Path, known: bool) -> None:
    words = WordVectors(list("红楼梦"), torch.randn(3, 4))
    e = open_mouthed(small(known, words))
    e.save(tmp_path)
    loaded = Extractor.load(tmp_path)
    text = "红楼梦的作者是曹雪芹"
    assert e.predict(text) and loaded.predict(text) == e.predict(text)
    assert loaded.thresholds == e.thresholds and loaded.model.config == e.model.config
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["extractor.safetensors", "words.safetensors"] + ["known.json"] * known
    )
    (tmp_path / "words.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="words.safetensors does not exist, and the extractor in"):
        Extractor.load(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    e = open_mouthed(small())
    e.save(tmp_path)
    text = "红楼梦的作者是曹雪芹"
    triples = e.predict(text)
    assert extractor.main([str(tmp_path), text]) == 0
    assert capsys.readouterr().out.splitlines() == ["\t".join(triple) for triple in triples]
    monkeypatch.setattr("sys.stdin", open(_file(tmp_path / "in.txt", f"{text}\n\n曹\n"), encoding="utf-8"))
    extractor.main([str(tmp_path), "--json", "--also", str(tmp_path)])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"sentence": text, "triples": [t._asdict() for t in triples]} and second["sentence"] == "曹"
    assert extractor.main([str(tmp_path / "nothing"), text]) == 2
    assert "extractor.safetensors does not exist" in capsys.readouterr().err
    assert extractor.main([str(tmp_path), " "]) == 2
    e.thresholds = (1.0, 1.0)
    e.save(tmp_path)
    assert extractor.main([str(tmp_path), text]) == 1
    assert capsys.readouterr().out == "no triple\n"


def _file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- recorded outputs of the original ---


def test_recorded_decoding() -> None:
    stored = json.loads(recorded("golden", "kg_decode.json").read_text(encoding="utf-8"))
    assert len(stored["cases"]) == 8
    for case in stored["cases"]:
        text, triples = case["text"], []
        for first, last in subject_spans(torch.tensor(case["ps1"]), torch.tensor(case["ps2"])):
            start, end = map(torch.tensor, case["objects"][f"{first},{last}"])
            for c, i, j in object_spans(start, end):
                triples.append(Triple(text[first : last + 1], stored["predicates"][c], text[i : j + 1]))
        assert sorted(complete(triples)) == [Triple(*t) for t in case["spo"]]
