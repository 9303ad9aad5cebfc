"""The measured choice of a backend: with PYKERNELS_AUTOTUNE=1, read when the package is imported, "auto" takes the
fastest for the sizes of a call instead of the first that can serve it.

The first call of its kind times every backend that can serve it, plain PyTorch included, forward and, where gradients
are wanted, backward; later ones, in later processes too, go by the answer. Sizes within the same powers of two are of
one kind. Answers are kept in $PYKERNELS_AUTOTUNE_CACHE, else ~/.cache/pykernels/autotune.json, for one version of
pykernels and PyTorch, one device and number of threads; delete the file to measure again. Backends round differently,
so that results may differ in their last bits between machines, and between processes that measured at different times.

Nothing is measured while a CUDA graph is captured, where known answers serve, nor inside of torch.compile and exports,
where the first that can serve does.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from . import _backend, _extension
from ._files import write_atomically

Function = TypeVar("Function", bound=Callable[..., Any])
logger = logging.getLogger("pykernels")

ROUNDS = 7
_IGNORED = ("seed",)  # changes no time, and is drawn from the generator where it is missing


def _enabled() -> bool:
    value = os.environ.get("PYKERNELS_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"PYKERNELS_AUTOTUNE: expected 0 or 1, got {value!r}")
    return value == "1"


ENABLED = _enabled()

# --- answers ---


def cache_path() -> Path:
    if path := os.environ.get("PYKERNELS_AUTOTUNE_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pykernels" / "autotune.json"


def _read(path: Path) -> dict[str, str]:
    """The answers on disk; none where the file is missing or is none of ours."""
    try:
        found = json.loads(path.read_text())
        return {str(key): str(name) for key, name in found.items() if name in _backend.BACKENDS}
    except (OSError, ValueError, AttributeError):
        return {}


class Answers:
    """Of this process and those on disk, which are read at the first question."""

    def __init__(self) -> None:
        self._known: dict[str, str] | None = None

    def get(self, key: str) -> str | None:
        if self._known is None:
            self._known = _read(cache_path())
        return self._known.get(key)

    def put(self, key: str, name: str) -> None:
        self._known = {**(self._known or {}), key: name}
        path = cache_path()
        text = json.dumps(_read(path) | {key: name}, indent=1, sort_keys=True) + "\n"  # others' answers stay
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: temporary.write_text(text))
        except OSError as error:
            warnings.warn(f"pykernels: cannot keep measured choices in {path}: {error}", stacklevel=2)


answers = Answers()

# --- what calls have in common ---


@functools.cache
def _machine(device: torch.device) -> str:
    from . import __version__
    from .env import cpu_model

    versions = f"pykernels {__version__}, torch {torch.__version__}"
    if device.type == "cuda":
        return f"{versions}, {torch.cuda.get_device_name(device)}"
    tier = _extension._C.cpu_tier() if _extension._C else "no extension"
    return f"{versions}, {cpu_model()}, {tier}"


def _word(value: Any) -> str:
    """Of one argument: what of it changes the time."""
    if isinstance(value, Tensor):
        sizes = ", ".join(f"<={1 << max(0, n - 1).bit_length()}" if n else "0" for n in value.shape)
        marks = "t" * (not value.is_contiguous()) + "g" * value.requires_grad
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]{marks}"
    if isinstance(value, float):
        return "0.0" if value == 0 else "float"
    return repr(value)


def key_of(function: str, x: Tensor, args: Any, options: dict[str, Any]) -> str:
    """One line for all calls that take about the same time."""
    kept = {name: value for name, value in sorted(options.items()) if name not in _IGNORED and value is not None}
    words = [_word(value) for value in tree_flatten(args)[0]]
    words += [f"{name}={' '.join(map(_word, tree_flatten(value)[0]))}" for name, value in kept.items()]
    if torch.is_grad_enabled():
        words.append("grad")
    if torch.is_autocast_enabled(x.device.type):
        words.append(f"autocast {torch.get_autocast_dtype(x.device.type)}")
    threads = "" if x.is_cuda else f", {torch.get_num_threads()} threads"
    return f"{function}({', '.join(words)}) on {_machine(x.device)}{threads}"


# --- measuring ---


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(function: Callable[..., Any], name: str, args: Any, options: dict[str, Any]) -> None:
    """One call on copies of the arguments' handles, and backward for those that want gradients."""

    def detached(value: Any) -> Any:
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    args, options = tree_map(detached, args), tree_map(detached, options)
    results = tree_flatten(function(*args, **options, backend=name))[0]
    wanted = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
    if wanted:
        leaves = [v for v in tree_flatten((args, options))[0] if isinstance(v, Tensor) and v.requires_grad]
        torch.autograd.grad(wanted, leaves, [torch.ones_like(r) for r in wanted], allow_unused=True)


def fastest(
    function: Callable[..., Any], names: list[str], device: torch.device, args: Any, options: dict[str, Any]
) -> tuple[str, str]:
    """The backend with the smallest median, and a line on all. One that raises is left out.

    RuntimeError where all raise: the call itself then tells what is wrong.
    """
    if "seed" in (function.__kwdefaults__ or {}) and options.get("seed") is None:
        options = {**options, "seed": 0}
    times: dict[str, list[float]] = {}
    for name in names:
        try:
            _run(function, name, args, options)  # compiles, allocates, tunes
            times[name] = []
        except Exception as error:
            logger.info("%s: %s is left out: %s", function.__name__, name, error)
    if not times:
        raise RuntimeError("no backend could be measured")
    for _ in range(ROUNDS):
        for name, found in times.items():
            _synchronize(device)
            start = time.perf_counter()
            _run(function, name, args, options)
            _synchronize(device)
            found.append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return min(medians, key=medians.__getitem__), ", ".join(f"{n} {1e6 * t:.1f} us" for n, t in medians.items())


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def choosing(operator: str, function: Function) -> Function:
    """The function, whose calls go to the backend that was measured to be the fastest."""

    @functools.wraps(function)
    def call(*args: Any, backend: str | None = None, **options: Any) -> Any:
        x = args[0] if args else options.get("x")
        automatic = backend == "auto" or backend is None and _backend.default() == "auto"
        if not automatic or not isinstance(x, Tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return function(*args, backend=backend, **options)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        names = _backend.candidates(operator, x.device.type, dtype)
        if len(names) > 1:
            key = key_of(function.__name__, x, args, options)
            backend = answers.get(key)
            if backend not in names:
                backend = None
                if not _capturing(x):
                    try:
                        backend, line = fastest(function, names, x.device, args, options)
                    except RuntimeError:
                        return function(*args, **options)
                    logger.info("%s: %s", key, line)
                    answers.put(key, backend)
        return function(*args, backend=backend, **options)

    return call  # type: ignore[return-value]


def measured(operator: str) -> Callable[[Function], Function]:
    """Decorates a public function, whose first argument is `x`; without PYKERNELS_AUTOTUNE=1 it stays as it is."""
    return functools.partial(choosing, operator) if ENABLED else lambda function: function
