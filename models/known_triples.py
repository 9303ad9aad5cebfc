"""Distant supervision: which triples of the training data a sentence may hold, since it holds both of their names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .extractor_decoding import Triple


class KnownTriples:
    """Triples with the number of sentences that each was annotated in.

    counts: {triple: sentences}. Names are found in a text by one pass of the Aho-Corasick algorithm (pyahocorasick).
    """

    def __init__(self, counts: Mapping[Triple, int]) -> None:
        self.counts = dict(counts)
        for triple in self.counts:
            if not triple.subject or not triple.object:
                raise ValueError(f"counts: expected names of one character or more, got {tuple(triple)}")
        self._of_subject: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for subject, predicate, object in self.counts:
            self._of_subject[subject][object].append(predicate)
        self._automaton: Any = None

    @classmethod
    def of(cls, sentences: Iterable[Collection[Triple]]) -> KnownTriples:
        """The triples of annotated sentences."""
        return cls(Counter(triple for triples in sentences for triple in set(triples)))

    def names_in(self, text: str) -> set[str]:
        """The subjects and objects that occur in the text, overlapping ones too."""
        if not self.counts:
            return set()
        if self._automaton is None:
            import ahocorasick

            self._automaton = ahocorasick.Automaton()
            for triple in self.counts:
                for name in (triple.subject, triple.object):
                    self._automaton.add_word(name, name)
            self._automaton.make_automaton()
        return {name for _, name in self._automaton.iter(text)}

    def search(self, text: str, annotated: Collection[Triple] = ()) -> list[Triple]:
        """The triples whose subject and object both occur in the text, in the order of their strings.

        annotated: the triples of this text, where it is one of the sentences counted: what no other sentence was
        annotated with is then left out, since it would tell the model its own answer.
        """
        names, own = self.names_in(text), set(annotated)
        found = [
            Triple(subject, predicate, object)
            for subject in names & self._of_subject.keys()
            for object in names & self._of_subject[subject].keys()
            for predicate in self._of_subject[subject][object]
        ]
        return sorted(t for t in found if self.counts[t] > (t in own))

    # --- files ---

    def to_json(self) -> list[list[Any]]:
        return [[*triple, count] for triple, count in self.counts.items()]

    @classmethod
    def from_json(cls, rows: Iterable[list[Any]]) -> KnownTriples:
        return cls({Triple(subject, predicate, object): int(count) for subject, predicate, object, count in rows})
