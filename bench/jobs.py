"""What a bench file hands to the runner: jobs, one per case and dtype, that fill in results.

A bench file ``bench_<operator>.py`` defines ``jobs(options) -> list[Job]``. The runner calls each job with a Session,
which measures groups of variants and keeps their bars. A job raises GateFailure where an output or gradient is wrong;
that case is then reported as FAILED and not timed.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

import torch

from .harness import Bar, Call, Effort, Measurement, Outcome, measure
from .machine import Peak


class GateFailure(Exception):
    """An output or gradient violates the error rule."""


@dataclass(frozen=True)
class Options:
    """What the user asked for. dtypes: names; complete: all cases for each of them."""

    dtypes: Sequence[str]
    complete: bool
    quick: bool
    threads: int
    tier: str | None
    effort: Effort


@dataclass
class Group:
    """Variants measured together. flops: of one call, where a rate makes sense."""

    title: str
    measurement: Measurement
    flops: float | None
    outcomes: list[Outcome]


@dataclass
class Result:
    """All about one case and dtype. stages: seconds by variant and stage; sweep: (name of the axis, position)."""

    operator: str
    case: str
    dtype: str
    sweep: tuple[str, int] | None = None
    groups: list[Group] = field(default_factory=list)
    saved_bytes: dict[str, int] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Job:
    """One case and dtype. seconds, and flops of products beside them: what it may take, to estimate the time left."""

    operator: str
    case: str
    dtype: str
    seconds: float
    flops: float
    run: Callable[[Session, Result], None]
    sweep: tuple[str, int] | None = None


class Progress:
    """A line per job on stderr with elapsed and remaining time, rewritten in place where stderr is a terminal."""

    def __init__(self, jobs: Sequence[Job], peaks: Mapping[str, Peak], stream: TextIO) -> None:
        self.jobs = jobs
        self.weights = [job.seconds + job.flops / (peaks[job.dtype].gflops * 1e9) for job in jobs]
        self.stream = stream
        self.live = stream.isatty()
        self.start = time.monotonic()
        self.index = -1
        self.begun = self.painted = 0.0
        self.width = 0

    def _line(self, what: str) -> str:
        job, now = self.jobs[self.index], time.monotonic()
        # The weights are seconds, so the time spent is a fair guess at the share done, and moves within every stage.
        done = sum(self.weights[: self.index]) + min(now - self.begun, self.weights[self.index])
        total = sum(self.weights)
        pace = (now - self.start) / done if done > 0.02 * total else 1.0
        clocks = f"{_clock(now - self.start)} elapsed, about {_clock(pace * (total - done))} left"
        return f"[{self.index + 1}/{len(self.jobs)}  {clocks}] {job.operator} {job.dtype} {job.case}{what}"

    def next(self) -> None:
        """The next job begins."""
        self.index += 1
        self.begun = time.monotonic()
        if self.live:
            self.show("")
        else:
            print(self._line(""), file=self.stream, flush=True)

    def show(self, what: str) -> None:
        """What the current job does; at most five times a second, and only on a terminal."""
        if self.live and time.monotonic() - self.painted >= 0.2:
            self.painted = time.monotonic()
            line = self._line(what and f": {what}")[: shutil.get_terminal_size().columns - 1]
            print("\r" + line.ljust(self.width), end="", file=self.stream, flush=True)
            self.width = len(line)

    def clear(self) -> None:
        """Take the live line away, before a table is printed in its place."""
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=self.stream, flush=True)
            self.width = 0


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass
class Session:
    """What a running job may use."""

    options: Options
    tick: Callable[[str], None]

    def group(
        self,
        result: Result,
        title: str,
        variants: Mapping[str, Call | None],
        bars: Sequence[Bar] = (),
        flops: float | None = None,
        share: float = 1.0,
    ) -> Group:
        """Measure the variants that are not None, judge the bars among them, and add both to the result."""
        present = {name: call for name, call in variants.items() if call is not None}
        self.tick(title)
        effort = replace(self.options.effort, seconds=self.options.effort.seconds * share)
        measurement = measure(present, effort, lambda: self.tick(title))
        judged = [bar for bar in bars if {bar.variant, bar.against or bar.variant} <= present.keys()]
        group = Group(title, measurement, flops, [measurement.judge(bar) for bar in judged])
        result.groups.append(group)
        return group

    def compiled(self, result: Result, title: str, function: Callable, bind: Callable[[Callable], Call]) -> Call | None:
        """bind(torch.compile(function)), compiled now so that no timing contains it; a failure becomes a note."""
        self.tick(f"{title}, compiling the baseline")
        # It warns of a missing CUDA runtime while it builds C++ code.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        torch._dynamo.reset()
        try:
            call = bind(torch.compile(function, dynamic=False))
            call()
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            result.notes.append(f"torch.compile ({title}) failed: {reason}")
            return None
        return call


def collect(modules: Iterable[str], options: Options) -> list[Job]:
    """The jobs of these bench files."""
    return [job for name in modules for job in importlib.import_module(name).jobs(options)]


def run(
    jobs: Sequence[Job], options: Options, peaks: Mapping[str, Peak], report: Callable[[Result], None]
) -> list[Result]:
    """Run all jobs. One that fails leaves a result with its failure, and the others go on; Ctrl-C ends the run."""
    progress = Progress(jobs, peaks, sys.stderr)
    session = Session(options, progress.show)
    results: list[Result] = []
    for job in jobs:
        progress.next()
        result = Result(job.operator, job.case, job.dtype, job.sweep)
        try:
            job.run(session, result)
        except GateFailure as failure:
            result.failure = str(failure)
        except KeyboardInterrupt:
            progress.clear()
            print("interrupted: the report covers the cases that were finished", file=sys.stderr)
            break
        except Exception as error:
            result.failure = f"{type(error).__name__}: {error}"
        progress.clear()
        results.append(result)
        report(result)
    return results
