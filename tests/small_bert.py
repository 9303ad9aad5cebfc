"""A random BERT with its tokenizer, and a task that it can learn, for the examples on sentences."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = "the cat dog sat ran on under a mat not".split()


def make_bert(folder: Path) -> Path:
    """Two layers, 16 wide."""
    import transformers

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "."]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(3)
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=24, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def make_task(folder: Path) -> Path:
    """CoLA's form. The label is whether "not" is there: 1 of up to 14 words, the rest of which are random."""
    generator = torch.Generator().manual_seed(5)
    for name, count in (("train", 192), ("val", 64), ("dev", 64)):
        lines = []
        for i in range(count):
            length = int(torch.randint(2, 14, (), generator=generator))
            words = [WORDS[j] for j in torch.randint(len(WORDS) - 1, (length,), generator=generator)]
            if i % 2:
                words[int(torch.randint(length, (), generator=generator))] = "not"
            lines.append(f"src\t{i % 2}\t\t{' '.join(words)}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
