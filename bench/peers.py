"""Other runtimes of the same network, for inference: ONNX Runtime and OpenVINO, where they are installed.

The network is exported once (an export holds PyTorch's plain operators, whatever the backend) and compiled for one
shape. Each runtime has a thread pool of its own, as wide as the run's threads, in a process of its own: its threads
spin after an inference, as they do in use, and sleep before anything else is timed.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import multiprocessing
import signal
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import peer_process
from .harness import Remote, Sample

ONNX_RUNTIME, OPENVINO = "ONNX Runtime", "OpenVINO"
PACKAGES = {ONNX_RUNTIME: ("onnxscript", "onnxruntime"), OPENVINO: ("onnxscript", "openvino")}
ANSWER_SECONDS = 300


class PeerError(Exception):
    """A peer failed or died; the message names it."""


def installed(name: str) -> bool:
    """Whether this peer has what it needs, the export to it included."""
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES[name])


def export(module: nn.Module, x: Tensor) -> bytes:
    """The network of one input as an ONNX model of fixed shape, in x's dtype."""
    written = io.BytesIO()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that torchvision is not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
        program.save(written)
    finally:
        logger.setLevel(level)
    return written.getvalue()


class Peer(Remote):
    """A network in a process of its own; close it, or use it as a context manager.

    build: makes the network there, and can be pickled; see peer_process.py. Raises PeerError, here and in every call,
    for what goes wrong in that process, for its end, and when it does not answer within ANSWER_SECONDS.
    """

    def __init__(self, name: str, build: Callable[[], Callable[[], Any]]) -> None:
        self.name = name
        # Spawned, since a fork would copy locks that torch's threads may hold.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=peer_process.serve, args=(theirs, build), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self._answer()

    def _ask(self, request: tuple[int, bool] | None) -> Any:
        try:
            self._pipe.send(request)
        except OSError:
            raise PeerError(self._ended()) from None
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(ANSWER_SECONDS):
            self.close()
            raise PeerError(f"{self.name}: no answer from its process in {ANSWER_SECONDS} s")
        try:
            value, error = self._pipe.recv()
        except (EOFError, OSError):
            raise PeerError(self._ended()) from None
        if error is not None:
            self.close()
            raise PeerError(f"{self.name}: {error}")
        return value

    def _ended(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        return f"{self.name}: its process ended with {signal.Signals(-code).name if code < 0 else f'status {code}'}"

    def __call__(self) -> Tensor:
        return torch.from_numpy(self._ask(None))

    def sample(self, inner: int, warm: bool) -> Sample:
        return self._ask((inner, warm))

    def close(self) -> None:
        self._pipe.close()
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def onnx_runtime(model: bytes, x: Tensor, threads: int) -> Peer:
    """The exported model in ONNX Runtime, which computes in the model's own dtype."""
    return Peer(ONNX_RUNTIME, partial(peer_process.onnx_runtime, model, x.numpy(), threads))


def openvino(model: bytes, x: Tensor, threads: int, precision: str) -> Peer:
    """The exported model in OpenVINO. precision: "f32" or "bf16", what it may compute in; x, result are float32."""
    return Peer(OPENVINO, partial(peer_process.openvino, model, x.numpy(), threads, precision))
