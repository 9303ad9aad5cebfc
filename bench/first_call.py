"""The stages before a warm call, each in a process of its own: imports, first call, later calls one by one."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

WARM_CALLS = 300
TIMEOUT_SECONDS = 300


def measure(operator: str, who: str, dtype: str, threads: int) -> dict[str, float]:
    """Seconds by stage, measured in a fresh process. who: "ours" or "eager"."""
    command = [sys.executable, "-m", __name__, operator, who, dtype, str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if child.returncode:
        raise RuntimeError(f"the process for {who} failed: {child.stderr.strip().splitlines()[-1:]}")
    return json.loads(child.stdout)


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(operator: str, who: str, dtype: str, threads: int) -> None:
    # Imported here, because their time is what is measured.
    import importlib

    stages = {"import torch": _timed(lambda: importlib.import_module("torch"))}
    if who == "ours":
        stages["import pykernels"] = _timed(lambda: importlib.import_module("pykernels"))
    target = importlib.import_module(f"{__package__}.bench_{operator}").first_call_target(who, dtype)
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    with torch.no_grad():
        stages["first call"] = _timed(target)
        stages["second call"] = _timed(target)
        warm = sorted(_timed(target) for _ in range(WARM_CALLS))
    stages["warm p50"] = statistics.median(warm)
    stages["p95"] = warm[int(0.95 * WARM_CALLS)]
    print(json.dumps(stages))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
