"""The machine under the measurement: what pykernels.env tells of it, and what torch's GEMM reaches on it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pykernels import env

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# (M, K, N). Small before large, so that a dtype the processor only emulates is recognised before it costs minutes.
PEAK_SHAPES = (
    (512, 512, 512),
    (1024, 1024, 1024),
    (8192, 384, 256),
    (8192, 768, 512),
    (8192, 1536, 1024),
    (2048, 2048, 2048),
    (4096, 4096, 2048),
)
PEAK_SECONDS_A_SHAPE = 0.2
PEAK_CALL_LIMIT = 0.5


@dataclass(frozen=True)
class Peak:
    """Best measured rate of torch's GEMM for a dtype, and the (M, K, N) that reached it."""

    gflops: float
    shape: tuple[int, int, int]


@dataclass
class Machine:
    """What a reader needs to compare reports. environment: as pykernels.env; caps: settings that hold torch back."""

    environment: dict[str, Any]
    float32_precision: str
    caps: dict[str, str]
    peaks: dict[str, Peak] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return self.environment["threads"]["torch"]

    @property
    def title(self) -> str:
        versions = self.environment["versions"]
        return f"{self.environment['cpu']['model']}, {self.threads} threads, torch {versions['torch']}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The head of the report."""
        threads, tier = self.environment["threads"], self.environment["cpu"]["tier"]
        kernels = f"tier {tier}"
        if tier is None:
            kernels = f"NO COMPILED KERNELS, so 'ours' is the reference: {self.environment['extension']['reason']}"
        quota = threads["cgroup_quota"]
        lines = [
            self.title,
            f"{threads['cpus']} CPUs, affinity {threads['affinity']}, cgroup limit {quota or 'none'}",
            f"pykernels {self.environment['versions']['pykernels']}, {kernels}",
            f"Python {self.environment['versions']['python']}, float32 matmul precision {self.float32_precision}",
        ]
        if threads["hint"]:
            lines.append(threads["hint"])
        if self.caps:
            lines.append("torch held back by " + " ".join(f"{name}={value}" for name, value in self.caps.items()))
        for name, peak in self.peaks.items():
            shape = ", ".join(map(str, peak.shape))
            lines.append(f"GEMM peak of torch, {name}: {peak.gflops:.0f} GFLOP/s at M, K, N = {shape}")
        return lines


def default_threads() -> int:
    """torch's own choice, but no more than the cgroup allows: threads beyond a quota are throttled, not run."""
    quota = env.cpu_quota()
    return torch.get_num_threads() if quota is None else max(1, min(torch.get_num_threads(), math.floor(quota)))


def describe(settings: Iterable[str]) -> Machine:
    """The machine as it is now, without peaks. settings: environment variables to report where they are set."""
    caps = {name: os.environ[name] for name in settings if name in os.environ}
    return Machine(env.collect(), torch.get_float32_matmul_precision(), caps)


def gemm_peak(dtype: torch.dtype) -> Peak:
    """Best rate of torch.mm over PEAK_SHAPES and both layouts of the second factor, on random normal data.

    Shapes whose call would take too long are left out.
    """
    best = Peak(0.0, PEAK_SHAPES[0])
    for m, k, n in PEAK_SHAPES:
        flops = 2 * m * k * n
        if best.gflops and flops / (best.gflops * 1e9) > PEAK_CALL_LIMIT:
            continue
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        for second in (b, b.t().contiguous().t()):
            fastest, spent = math.inf, 0.0
            while spent < PEAK_SECONDS_A_SHAPE:
                start = time.perf_counter()
                torch.mm(a, second)
                elapsed = time.perf_counter() - start
                fastest, spent = min(fastest, elapsed), spent + elapsed
            if flops / fastest / 1e9 > best.gflops:
                best = Peak(flops / fastest / 1e9, (m, k, n))
    return best
