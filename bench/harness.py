"""Paired, interleaved timing, and what may be concluded from it.

All variants of a group take turns within each round, and the order rotates from round to round, so drift of the machine
(clock, neighbours, temperature) hits every variant alike. Ratios are ratios of medians. One variant, "ours", is entered
twice: the ratio of its two entries is the A/A noise, and nothing smaller than that noise is called a difference.

A sample is disturbed when the time it lost to others exceeds LOSS_ALLOWED of its length: what its threads waited for a
processor after involuntary context switches, and the steal time of the virtual machine. Disturbed samples are dropped
and counted; a timing with more than MAX_DISTURBED of them supports no verdict.

A variant with threads of its own, another runtime, is Remote: they live in another process, which takes the samples,
and no sample begins before the threads of the other process sleep.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import repeat

OURS = "ours"
AGAIN = "ours, again"
LOSS_ALLOWED = 0.02
MAX_DISTURBED = 0.25
# What one involuntary switch is taken to cost where Linux does not tell how long threads waited.
SLICE_SECONDS = 0.003
# A call shorter than this is repeated once untimed, so that reading the counters does not leave it with cold caches.
WARM_BELOW_SECONDS = 0.005
SLOW_SAMPLES = 3
# Threads that take less of a nap's length than the share are asleep; they are waited for no longer than the limit.
NAP_SECONDS, NAP_SHARE, NAP_LIMIT = 0.002, 0.05, 1.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Seconds that some calls took together, and what their threads lost to others meanwhile."""

    elapsed: float
    lost: float


class Remote(ABC):
    """A variant that runs in a process of its own, whose threads sleep when a call returns."""

    @abstractmethod
    def __call__(self) -> object:
        """One call, for its result."""

    @abstractmethod
    def sample(self, inner: int, warm: bool) -> Sample:
        """What `sample` returns, taken in that process."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds aimed at for a group of variants, limits of the rounds, shortest sample."""

    seconds: float
    min_rounds: int
    max_rounds: int
    sample_seconds: float


FULL = Effort(seconds=4.0, min_rounds=7, max_rounds=60, sample_seconds=0.002)
QUICK = Effort(seconds=1.2, min_rounds=7, max_rounds=25, sample_seconds=0.001)


@dataclass
class Timing:
    """Samples of one variant, in seconds per call; ``rounds[i]`` is the round that sample i belongs to."""

    inner: int = 1
    rounds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)

    def add(self, index: int, taken: Sample) -> None:
        self.rounds.append(index)
        self.seconds.append(taken.elapsed / self.inner)
        self.disturbed.append(taken.lost > LOSS_ALLOWED * taken.elapsed)

    @property
    def kept(self) -> dict[int, float]:
        """Undisturbed samples by round."""
        return {r: s for r, s, bad in zip(self.rounds, self.seconds, self.disturbed, strict=True) if not bad}

    @property
    def dropped(self) -> int:
        return sum(self.disturbed)

    @property
    def trusted(self) -> bool:
        return len(self.kept) >= SLOW_SAMPLES and self.dropped <= MAX_DISTURBED * len(self.seconds)

    def quantile(self, q: float) -> float:
        """Quantile of the kept samples, linearly interpolated; of all samples where none was kept."""
        values = sorted(self.kept.values() or self.seconds)
        position = q * (len(values) - 1)
        low = math.floor(position)
        high = min(low + 1, len(values) - 1)
        return values[low] + (position - low) * (values[high] - values[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians, the relative noise below which it says nothing, and whether enough samples were kept."""

    value: float
    noise: float
    trusted: bool

    def differs_from(self, limit: float) -> bool:
        return self.trusted and abs(math.log(self.value / limit)) > math.log1p(self.noise)


@dataclass(frozen=True)
class Bar:
    """A limit that ``variant`` should hold: a multiple of the time of ``against``, or seconds where that is None."""

    variant: str
    against: str | None
    limit: float


@dataclass(frozen=True)
class Outcome:
    """A bar with what was measured. verdict: "held", "missed" or "no verdict"; reason says why there is none."""

    bar: Bar
    value: float
    noise: float
    verdict: str
    reason: str = ""


def _two_standard_errors(logs: list[float]) -> float:
    # Of a median: 1.253 sigma / sqrt(n), with sigma taken from the quartiles, which single outliers do not move.
    if len(logs) < SLOW_SAMPLES:
        return math.inf
    q1, _, q3 = statistics.quantiles(logs, n=4, method="inclusive")
    return 2 * 1.253 * (q3 - q1) / 1.349 / math.sqrt(len(logs))


@dataclass
class Measurement:
    """Timings of a group of variants that were measured together."""

    timings: dict[str, Timing]

    def _paired_logs(self, a: str, b: str) -> list[float]:
        first, second = self.timings[a].kept, self.timings[b].kept
        return [math.log(first[r] / second[r]) for r in first.keys() & second.keys()]

    @property
    def noise(self) -> float:
        """A/A noise, relative: how far two entries of the same variant lie apart, plus two standard errors."""
        if AGAIN not in self.timings:
            return 0.0
        apart = abs(math.log(self.timings[OURS].median / self.timings[AGAIN].median))
        return math.expm1(apart + _two_standard_errors(self._paired_logs(OURS, AGAIN)))

    def ratio(self, a: str, b: str) -> Ratio:
        """Time of a over time of b; the noise is the larger of the A/A noise and two standard errors of this pair."""
        first, second = self.timings[a], self.timings[b]
        noise = max(self.noise, math.expm1(_two_standard_errors(self._paired_logs(a, b))))
        return Ratio(first.median / second.median, noise, first.trusted and second.trusted)

    def judge(self, bar: Bar) -> Outcome:
        if bar.against is None:
            timing = self.timings[bar.variant]
            ratio = Ratio(timing.median, self.noise, timing.trusted)
        else:
            ratio = self.ratio(bar.variant, bar.against)
        if not ratio.trusted:
            names = [bar.variant] if bar.against is None else [bar.variant, bar.against]
            worst = max((self.timings[name] for name in names), key=lambda t: t.dropped / len(t.seconds))
            reason = f"{worst.dropped} of {len(worst.seconds)} samples disturbed"
            return Outcome(bar, ratio.value, ratio.noise, "no verdict", reason)
        if not ratio.differs_from(bar.limit):
            return Outcome(bar, ratio.value, ratio.noise, "no verdict", "inside the noise")
        return Outcome(bar, ratio.value, ratio.noise, "held" if ratio.value < bar.limit else "missed")


def _waited_seconds() -> float:
    """What the threads of this process have waited for a processor, so far and in all."""
    if not os.path.exists("/proc/self/schedstat"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw * SLICE_SECONDS
    waited = 0
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/schedstat") as schedstat:
                waited += int(schedstat.read().split()[1])
        except OSError:
            continue  # the thread has ended
    return waited * 1e-9


def _stolen_seconds() -> float:
    """Steal time of all processors since boot; 0 where the kernel does not tell."""
    try:
        with open("/proc/stat") as stat:
            return int(stat.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def _elapsed(call: Call, inner: int) -> float:
    start = time.perf_counter()
    for _ in repeat(None, inner):
        call()
    return time.perf_counter() - start


def sample(call: Call, inner: int, warm: bool) -> Sample:
    """Time ``inner`` calls, with ``warm`` after an untimed one."""
    lost = _waited_seconds() + _stolen_seconds()
    if warm:
        call()
    elapsed = _elapsed(call, inner)
    return Sample(elapsed, _waited_seconds() + _stolen_seconds() - lost)


def fall_asleep() -> None:
    """Wait until no thread of this process runs: those of a pool spin for a while after their work."""
    limit = time.perf_counter() + NAP_LIMIT
    spent = math.inf
    while spent > NAP_SHARE * NAP_SECONDS and time.perf_counter() < limit:
        before = time.process_time()
        time.sleep(NAP_SECONDS)
        spent = time.process_time() - before


def _sample(call: Call, inner: int, warm: bool) -> Sample:
    if not isinstance(call, Remote):
        return sample(call, inner, warm)
    fall_asleep()
    return call.sample(inner, warm)


def _estimate(call: Call) -> float:
    """Seconds of one warm call. Long calls are not repeated: their first call is near enough to plan with."""
    first = _sample(call, 1, False).elapsed
    return first if first > 0.5 else min(first, *(_sample(call, 1, False).elapsed for _ in range(2)))


def measure(variants: Mapping[str, Call], effort: Effort, tick: Callable[[], None] = lambda: None) -> Measurement:
    """Time all variants, interleaved; "ours" where present is entered twice. ``tick`` is called after each round.

    A variant that is both four times slower than the fastest and too slow for the time aimed at is sampled in three
    rounds only, spread over the run: its ratio needs no finer measurement.
    """
    calls = dict(variants)
    estimates = {name: _estimate(call) for name, call in calls.items()}
    if OURS in calls:
        calls[AGAIN], estimates[AGAIN] = calls[OURS], estimates[OURS]
    inner = {name: max(1, math.ceil(effort.sample_seconds / estimates[name])) for name in calls}
    cost = {name: estimates[name] * inner[name] for name in calls}
    bearable = max(effort.seconds / effort.min_rounds, 4 * min(cost.values()))
    slow = {name for name in calls if cost[name] > bearable}
    round_seconds = sum(cost[name] for name in calls if name not in slow)
    affordable = int(effort.seconds / round_seconds) if round_seconds else 0
    rounds = max(effort.min_rounds, min(effort.max_rounds, affordable))
    slow_rounds = {round(i * (rounds - 1) / (SLOW_SAMPLES - 1)) for i in range(SLOW_SAMPLES)}

    timings = {name: Timing(inner[name]) for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                if name in slow and index not in slow_rounds:
                    continue
                taken = _sample(calls[name], inner[name], estimates[name] < WARM_BELOW_SECONDS)
                timings[name].add(index, taken)
            tick()
    finally:
        if collecting:
            gc.enable()
    return Measurement(timings)
