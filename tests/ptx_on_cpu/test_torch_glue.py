"""An operator for CUDA tensors, compiled against emulated launchers."""

import pytest
import torch

from . import KernelError, build, unavailable
from .samples import FOLDER, source
from .torch_glue import load_operators, record_allocations

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "")


def test_operator_with_bounds_of_its_own_tensors():
    library = build(source("basics"))
    operators = load_operators((FOLDER / "glue" / "axpy.cpp",), library, namespace="ptx_sample")
    record_allocations(operators)
    x, y = torch.ones(100), torch.full((100,), 2.0)
    with library.runtime.bounds():
        assert torch.equal(torch.ops.ptx_sample.add_scaled(y, x, 3.0, 0), torch.full((100,), 5.0))
        with pytest.raises(RuntimeError, match="of 4 bytes at .* outside of the allowed memory"):
            torch.ops.ptx_sample.add_scaled(y, x, 3.0, 1)
    # cudaGetLastError has taken the error away.
    torch.ops.ptx_sample.add_scaled(y, x, 3.0, 0)


def test_read_only_tensor_stays_so_though_pytorch_allocated_it():
    library = build(source("basics"))
    record_allocations(load_operators((FOLDER / "glue" / "axpy.cpp",), library, namespace="ptx_sample"))
    x, y = torch.ones(64), torch.zeros(64)
    bugs = build(source("bugs"))
    with bugs.runtime.bounds(y, read_only=[x]):
        bugs.call("launch_write_input", y)
        with pytest.raises(KernelError) as caught:
            bugs.call("launch_write_input", x)
    assert caught.value.code == 700
