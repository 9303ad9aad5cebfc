"""The process of a peer: it builds a network, then answers requests over a pipe. No torch is loaded in it.

A request is None for the output of one inference, or (inner, warm) for a sample; the answer is (value, None), or
(None, what went wrong). In between it waits for the pipe, and no answer is sent before the runtime's threads sleep.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from . import harness

Network = Callable[[], np.ndarray]


def onnx_runtime(model: bytes, x: np.ndarray, threads: int) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, inputs)[0]


def openvino(model: bytes, x: np.ndarray, threads: int, precision: str) -> Network:
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x))

    def run() -> np.ndarray:
        request.infer()
        return request.get_output_tensor().data

    return run


def serve(pipe: Connection, build: Callable[[], Network]) -> None:
    """Answer until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which then closes the pipe
    try:
        network = build()
        value: object = None
        while True:
            harness.fall_asleep()
            pipe.send((value, None))
            request = pipe.recv()
            value = network() if request is None else harness.sample(network, *request)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))
