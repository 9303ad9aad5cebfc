"""How far a run is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Counts steps of a total, with elapsed and remaining time, on stderr.

    A terminal gets one bar; files and pipes a line every `every` seconds, without carriage returns; `quiet` nothing.
    """

    def __init__(
        self, total: int, done: int = 0, *, every: float = 10.0, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self.stream = stream or sys.stderr
        self.total, self.first, self.done, self.every, self.quiet = total, done, done, max(every, 1.0), quiet
        self.begun = self.shown = time.monotonic()
        self.bar = None
        if self.stream.isatty() and not quiet:
            self.bar = tqdm(total=total, initial=done, file=self.stream, unit="step", dynamic_ncols=True)

    def step(self, text: str) -> None:
        """One step more; text tells of it, for example "epoch 2/30, loss 1.23"."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        else:
            self.at(text)

    def skip(self, steps: int) -> None:
        """Steps that an earlier run made: they say nothing about the time that is left."""
        self.done += steps
        self.first += steps
        if self.bar is not None:
            self.bar.initial += steps
            self.bar.update(steps)

    def extend(self, steps: int) -> None:
        """Steps that turned out to be needed beyond the total."""
        self.total += steps
        if self.bar is not None:
            self.bar.total += steps

    def at(self, text: str) -> None:
        """What goes on between two steps; also keeps a long unit of work from looking dead."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif not self.quiet and time.monotonic() - self.shown >= self.every:
            self.shown = time.monotonic()
            elapsed = self.shown - self.begun
            counted = self.done - self.first
            left = tqdm.format_interval(elapsed / counted * (self.total - self.done)) if counted else "?"
            clocks = f"{tqdm.format_interval(elapsed)} elapsed, {left} left"
            print(f"step {self.done}/{self.total} [{clocks}] {text}", file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        elif not self.quiet:
            print(text, file=self.stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
