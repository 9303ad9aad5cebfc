"""Fine-tunes an encoder on a task in all ways that this package has: full, LoRA, LoRA+ x AdamW, ChildTuning-F, -D.

    python examples/finetune.py --data glue/CoLA
    torchrun --nproc_per_node 2 examples/finetune.py --data glue/CoLA

All pairs of --train and --optimizers run, one after the other, over the same seeds, and one table has their scores,
times and memory. For a seed all begin with the same weights and see the same batches. dev.tsv is scored at the end and
chooses nothing. Several processes, of accelerate, share each batch, and make the steps that one process makes; with
dropout they drop other elements. LoRA's adapters and the new head are float32 whatever --dtype says.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetune_ways import WayOptions, adapt, draw, optimizer_of, steps_of_run, table, train_run
from sentence_classifier import DTYPES, Fit, Plan, Pretrained, Sentences, TaskOptions, loss_of, score
from torch import Tensor, nn

from kit.config import option
from kit.example import run_example
from kit.memory import Peak
from kit.processes import Processes, SharedStop, told_by_first
from kit.progress import Progress
from kit.results import Results
from kit.stop import Stop
from kit.training import Diverged
from pykernels import save_lora, set_backend

EXAMPLES = """examples:
  python examples/finetune.py --quick --data glue/CoLA --out runs/quick  # a few steps of each pair
  python examples/finetune.py --data glue/CoLA --dtype bf16 --seeds 2  # all nine pairs, three epochs each
  python examples/finetune.py --data glue/CoLA --train lora --optimizers adamw --save --out runs/adapter
  python examples/finetune.py --data glue/RTE --max-length 128 --train full lora --optimizers adamw D --out runs/rte
  python examples/finetune.py --data glue/CoLA --dtype bf16 --seeds 3 --resume auto  # a seed more
  torchrun --nproc_per_node 2 examples/finetune.py --data glue/CoLA --out runs/two  # each has half of every batch
  accelerate launch --cpu examples/finetune.py --data glue/CoLA  # one process

--data: a folder with train.tsv, dev.tsv and perhaps val.tsv, which is not used, in the form of CoLA or RTE
several processes: of torchrun; `accelerate launch --cpu` starts more than one by MPI only. A signal to one of them
stops all after the same step. Only the first prints and writes, and times and memory are its own.
exit status of each process: 0 finished, 2 wrong arguments or data, 3 a loss not finite, 130 stopped by a signal (what
is finished is kept); torchrun itself ends with 1 where one of them is not 0
"""

QUICK = {"seeds": 2, "steps": 6, "batch_size": 8, "limit": 64, "fisher_batches": 4, "mask_steps": 2}
SCORES = {"accuracy": "accuracy", "Matthews": "matthews", "dev loss": "loss"}


@dataclass(frozen=True)
class FinetuneConfig(WayOptions, TaskOptions):
    out: str = option("runs/finetune", "folder of the run", may_change=True)
    dtype: str = option("fp32", "bf16: full under autocast, LoRA on frozen weights in bfloat16", choices=tuple(DTYPES))
    save: bool = option(False, "keep each model that was trained, LoRA's as an adapter folder of PEFT's form")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data: expected a folder with train.tsv and dev.tsv")

    def autocast(self, way: str) -> bool:
        return way == "full" and self.dtype == "bf16"


class SharedFit(Fit):
    """A Fit of which each process computes its share of every batch."""

    def __init__(self, processes: Processes, *args: Any) -> None:
        super().__init__(*args, stream=processes.rank)
        self.processes = processes

    def loss(self, chosen: list[int]) -> tuple[Tensor, float]:
        loss = shared_loss(self.processes, self.model, self.train, chosen, self.plan.autocast)
        return loss, self.processes.mean(loss.detach()).item()


def shared_loss(
    processes: Processes, model: nn.Module, train: Sentences, chosen: list[int], autocast: bool
) -> Tensor:
    """Of this process's share, scaled so that the mean over the processes is the mean over the batch."""
    own = processes.share(chosen)
    # Without a sentence of its own a process still takes part in the gradients' average.
    loss = loss_of(model, train, own or chosen[:1], autocast)
    return loss * (len(own) * processes.count / len(chosen))


class Runs:
    """The runs on a task; each is made once."""

    def __init__(self, config: FinetuneConfig, processes: Processes, results: Results | dict[str, Any]) -> None:
        self.config, self.processes, self.results = config, processes, results
        self.pretrained = Pretrained(config.encoder, config.max_length)
        self.parts = self.pretrained.parts(config)
        self.steps = config.steps_of(len(self.parts["train"]))
        config.check_mask_steps(self.steps)

    def all(self, progress: Progress, stop: Stop) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """The results of each way and optimizer, a seed each."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in self.config.pairs}
        for seed in self.config.run_seeds:  # the outer loop, so that drift of the machine hits all pairs
            for way, kind in found:
                name = f"seed {seed}, {way}, {kind}"
                if name in self.results:
                    progress.skip(self.length(way, kind))
                else:
                    self.results[name] = self.made(way, kind, seed, progress, stop, name)
                found[way, kind].append(self.results[name])
        return found

    def length(self, way: str, kind: str) -> int:
        return steps_of_run(self.config, way, kind, self.parts["train"], self.steps)

    def made(self, way: str, kind: str, seed: int, progress: Progress, stop: Stop, name: str) -> dict[str, Any]:
        """Of `train_run`, with the peak of memory and the scores on "dev". The model is kept where that is wanted."""
        config, processes, train = self.config, self.processes, self.parts["train"]
        autocast = config.autocast(way)
        dtype = torch.float32 if way == "full" else DTYPES[config.dtype]
        model = self.pretrained.classifier(seed, dropout=config.dropout, dtype=dtype)
        adapt(config, way, model, self.pretrained.heads)
        # Ours clips in its step.
        plan = Plan(
            self.steps, config.batch_size, seed, config.warmup, config.clip if kind == "adamw" else 0.0, autocast
        )
        optimizer = lambda _: processes.prepare(optimizer_of(config, way, kind, model, seed))  # noqa: E731
        fit = SharedFit(processes, processes.prepare(model), optimizer, train, plan)
        loss = lambda wrapped, chosen: shared_loss(processes, wrapped, train, chosen, autocast)  # noqa: E731
        peak = Peak()
        try:
            result = train_run(config, way, kind, fit, model, loss, progress, stop, name)
        except Diverged as error:
            raise Diverged(f"{name}: {error}") from None
        result |= {"peak": peak.bytes(), "processes": processes.count}
        progress.at(f"{name}: scoring dev.tsv")
        result["dev"] = score(model, self.parts["dev"], autocast, processes)
        if config.save and processes.main:
            self.save(way, model, Path(config.out) / "models" / name.replace(", ", "-").replace(" ", "-"))
        processes.release()
        return result

    def save(self, way: str, model: Any, folder: Path) -> None:
        """As transformers reads it with the tokenizer, or `load_lora` and PEFT."""
        if way == "full":
            model.save_pretrained(folder)
            self.pretrained.tokenizer.save_pretrained(folder)
        else:
            save_lora(model, folder, base_model=str(self.pretrained.folder), task_type="SEQ_CLS")


def opened(config: FinetuneConfig, processes: Processes) -> Results | dict[str, Any]:
    """The results so far: on the disk in the first process, a copy in the others."""
    own: list[Results] = []

    def stored() -> dict[str, Any]:
        own.append(Results(Path(config.out), config, config.resume))
        return own[0].copy()

    copied = processes.from_main(stored)
    return own[0] if own else copied


def work(config: FinetuneConfig) -> int:
    set_backend(config.backend)
    processes = Processes()
    runs = Runs(config, processes, opened(config, processes))
    total = config.seeds * sum(runs.length(way, kind) for way, kind in config.pairs)
    counts = f"{len(runs.parts['train'])} to train on, {len(runs.parts['dev'])} in dev.tsv"
    with SharedStop(processes) as stop, Progress(total, every=config.log_seconds, quiet=config.quiet) as progress:
        progress.say(f"{config.data}: {counts}; {len(config.pairs)} pairs, {runs.steps} steps each")
        found = runs.all(progress, stop)
    if not processes.main:
        return 0
    counts = " and ".join(map(str, sorted({run["processes"] for pair in found.values() for run in pair})))
    print(
        f"{config.data}, dev.tsv: {config.seeds} seeds; {runs.steps} steps of {config.batch_size}, {config.dtype}, p "
        f"{config.reserve_p:g}, r {config.rank}, LoRA+ ratio {config.ratio:g}; processes: {counts}, "
        f"{torch.get_num_threads()} threads"
    )
    print(table(found, {title: lambda run, name=name: run["dev"][name] for title, name in SCORES.items()}))
    out = Path(config.out)
    draw(found, lambda run: run["dev"]["matthews"], "Matthews' correlation, dev.tsv", out / "curves.png")
    print(f"\nresults.json and curves.png are in {out}" + (", the models in models" if config.save else ""))
    return 0


def run(argv: Sequence[str] | None) -> int:
    return run_example(
        FinetuneConfig,
        work,
        argv,
        script=__file__,
        description="Fine-tunes a classifier in full, with LoRA and with LoRA+, by AdamW and ChildTuning.",
        epilog=EXAMPLES,
        presets={"quick": QUICK},
    )


def main(argv: Sequence[str] | None = None) -> int:
    return told_by_first(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
