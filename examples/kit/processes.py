"""One run in several processes, started by torchrun or `accelerate launch`, each of which trains on a share of a batch.

    processes = Processes()
    model = processes.prepare(model)  # backward now averages gradients over the processes
    stop = SharedStop(processes)

and all of it inside of `told_by_first`. One process alone is no other case: its share is the whole.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .stop import Stop

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds that a process which failed lives on: the launcher ends all others with it, and the first is to say why."""


def told_by_first(call: Callable[[], int]) -> int:
    """The exit status that `call` returns, or ends the process with. What it prints appears in the first alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        return call()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            status = call()
        except SystemExit as end:
            status = int(end.code or 0)
    if status:
        time.sleep(PATIENCE)
    return status


class Processes:
    """Those that train together, on CPUs. All of them call each method, in the same order."""

    def __init__(self) -> None:
        import accelerate

        threads = torch.get_num_threads()
        self.accelerator = accelerate.Accelerator(cpu=True)
        torch.set_num_threads(threads)  # several processes without OMP_NUM_THREADS get a number from accelerate
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process

    def prepare(self, *objects: Any) -> Any:
        """Models and optimizers as accelerate wraps them."""
        return self.accelerator.prepare(*objects)

    def release(self) -> None:
        """What was prepared; accelerate holds it else."""
        self.accelerator.free_memory()

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's, every count-th."""
        return list(items[self.rank :: self.count])

    def sum(self, t: Tensor) -> Tensor:
        """Over the processes; the same in all."""
        return self.accelerator.reduce(t, "sum") if self.count > 1 else t

    def mean(self, t: Tensor) -> Tensor:
        return self.accelerator.reduce(t, "mean") if self.count > 1 else t

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, where alone it is called. What it raises is raised in all."""
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None]
        if self.main:
            try:
                told[0] = make()
            except Exception as error:
                told[1] = error
        if self.count > 1:
            broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]


class SharedStop(Stop):
    """A signal to one process stops all at the same `check`, which all of them call."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    def check(self) -> None:
        self.requested = bool(self.processes.sum(torch.tensor(float(self.requested))))
        super().check()
