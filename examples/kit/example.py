"""What the examples do before and after training: options, exit statuses, the scores of what was kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from pykernels.models.files import write_atomically

from .config import parse
from .options import Options
from .run import Refused
from .stop import Stopped
from .training import Diverged, Trainer

C = TypeVar("C", bound=Options)


def run_example(
    cls: type[C],
    work: Callable[[C], int],
    argv: Sequence[str] | None,
    *,
    script: str,
    description: str,
    epilog: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Calls work(configuration of the command line), on as many threads as that says, and returns the exit status.

    That is what `work` returns, 2 for what is refused or not installed, 3 for a loss that is not finite, 130 where it
    was stopped, with a message that begins with the file name of `script`. Wrong arguments end the process with status
    2, as in `parse`.
    """
    config = parse(cls, argv, description=description, epilog=epilog, presets=presets)
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        return work(config)
    except (Refused, ModuleNotFoundError, Diverged) as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        return 3 if isinstance(error, Diverged) else 2
    except Stopped:
        again = "--resume auto goes on after the runs that are finished"
        print(f"{Path(script).name}: stopped in {config.out}; {again}", file=sys.stderr)
        return 130


def finish(
    trainer: Trainer, about: str, results: Callable[[], tuple[Mapping[str, str], Mapping[str, Any] | None]], kept: str
) -> int:
    """Trains to the end, prints the results and what was kept where, and writes scores.json. Returns the exit status.

    about: see `Trainer.train`. results: texts to print, by name, and what goes into scores.json; None writes no file.
    """
    if not trainer.train(about):
        print(f"stopped after step {trainer.state.step}; --resume auto goes on", file=sys.stderr)
        return 130
    texts, scores = results()
    for name, text in texts.items():
        print(f"{name}: {text}")
    if scores is not None:
        write_json(trainer.run.folder / "scores.json", scores)
    print(kept)
    return 0


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
