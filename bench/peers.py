"""Other runtimes of the same network, for inference: ONNX Runtime and OpenVINO, where they are installed.

The network is exported once (an export holds PyTorch's plain operators, whatever the backend) and compiled for one
shape. Threads are bound to those of the run, one inference at a time, since each runtime has a pool of its own.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

Network = Callable[[], Tensor]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


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


def onnx_runtime(model: bytes, x: Tensor, threads: int) -> Network:
    """One inference of the exported model by ONNX Runtime.

    Its threads sleep between inferences: by default they spin for a while, on the processors of whoever is next.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(model: bytes, x: Tensor, threads: int, precision: str) -> Network:
    """One inference by OpenVINO. precision: "f32" or "bf16", what it may compute in; x and the result are float32."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(
        core.read_model(model),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy()))

    def run() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return run
