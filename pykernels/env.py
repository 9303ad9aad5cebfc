"""What this installation can do here: versions, instruction set, threads, and which operator has which backend.

python -m pykernels.env           a page to read, or to paste into a bug report
python -m pykernels.env --json    the same as JSON
"""

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import pykernels
from pykernels import _backend, _extension


def version(package: str) -> str:
    """The version of an importable package, else why it cannot be imported."""
    try:
        return str(importlib.import_module(package).__version__)
    except Exception as error:  # a broken triton raises more than ImportError, and here the reason is the answer
        return f"not available ({type(error).__name__}: {error})"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_quota(cgroup: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that the control groups of this process allow (the least of all levels), or None without a limit."""
    limits = []
    for line in _read(cgroup).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, files = mount, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, files = mount / controllers, ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            root = root if root.is_dir() else mount / "cpu"
        else:
            continue
        # In a container the path may be the host's and not exist here; the root of the mount is then its own group.
        group = root / path.lstrip("/")
        for level in (group, *group.parents):
            if not level.is_relative_to(root):
                break
            words = " ".join(_read(level / file) for file in files).split()
            if len(words) == 2 and words[0] not in ("max", "-1"):
                limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def thread_hint(threads: int, affinity: int, quota: float | None) -> str:
    """What to change when torch uses more threads than this process may run at a time; empty if nothing."""
    allowed = affinity if quota is None else min(affinity, max(1, int(quota)))
    if threads <= allowed:
        return ""
    return (
        f"torch uses {threads} threads, but this process may use {allowed} CPUs and is throttled above that: "
        f"torch.set_num_threads({allowed}) or OMP_NUM_THREADS={allowed}"
    )


def collect() -> dict[str, Any]:
    """Everything that the page shows, as plain values for JSON."""
    extension = _extension._C
    threads, quota = torch.get_num_threads(), cpu_quota()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tiers = extension.cpu_tiers() if extension else []
    return {
        "versions": {
            "pykernels": pykernels.__version__,
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "triton": version("triton"),
            "numpy": version("numpy"),
        },
        "extension": {"reason": _extension.reason, **(extension.build_info() if extension else {})},
        "cuda_archs": cuda_archs(),
        "cpu": {
            "model": cpu_model(),
            "tier": extension.cpu_tier() if extension else None,
            "tiers": [{"name": name, "usable": usable, "why_not": why_not} for name, usable, why_not in tiers],
        },
        "threads": {
            "torch": threads,
            "torch_interop": torch.get_num_interop_threads(),
            "cpus": os.cpu_count(),
            "affinity": affinity,
            "cgroup_quota": quota,
            "hint": thread_hint(threads, affinity, quota),
        },
        "operators": [
            {"operator": name, "backend": backend, "devices": _words(devices), "dtypes": _words(dtypes), "why_not": why}
            for name, backend, devices, dtypes, why in _backend.table()
        ],
    }


def cuda_archs() -> str:
    try:
        return importlib.import_module("pykernels._build").CUDA_ARCHS
    except ModuleNotFoundError:
        return ""


def _words(values: str | Iterable[object]) -> str:
    return values if isinstance(values, str) else ", ".join(str(v).removeprefix("torch.") for v in values)


def render(info: dict[str, Any]) -> str:
    """The page for people."""
    extension, cpu, threads = info["extension"], info["cpu"], info["threads"]
    rows = list(info["versions"].items())
    if extension["reason"]:
        rows.append(("extension", f"none: {extension['reason']}"))
    else:
        rows.append(("extension", f"built for torch {extension['torch']} with {extension['compiler']}"))
    rows.append(("CUDA archs built", info["cuda_archs"] or "none"))
    rows.append(("CPU", cpu["model"]))
    rows.append(("CPU tier", cpu["tier"] or "none"))
    rows += [(f"  {t['name']}", "usable" if t["usable"] else f"not usable: {t['why_not']}") for t in cpu["tiers"]]
    quota = threads["cgroup_quota"]
    rows.append(("torch threads", f"{threads['torch']} (between operators: {threads['torch_interop']})"))
    rows.append(("CPUs", f"{threads['cpus']}, affinity {threads['affinity']}, cgroup limit {quota or 'none'}"))
    if threads["hint"]:
        rows.append(("hint", threads["hint"]))
    lines = [f"{name:<18}{value}" for name, value in rows]
    lines += ["", f"{'operator':<18}{'backend':<11}available"]
    for row in info["operators"]:
        state = f"no: {row['why_not']}" if row["why_not"] else f"on {row['devices']}: {row['dtypes']}"
        lines.append(f"{row['operator']:<18}{row['backend']:<11}{state}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pykernels.env",
        description="Show what this installation of pykernels can do on this machine.",
        epilog="examples:\n  python -m pykernels.env\n  PYKERNELS_CPU_TIER=avx2 python -m pykernels.env\n"
        "  python -m pykernels.env --json > env.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the page")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else render(info))


if __name__ == "__main__":
    main()
