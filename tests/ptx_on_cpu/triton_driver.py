"""Runs what Triton compiles for NVIDIA GPUs on CPU tensors: its PTX is translated and executed, no source is changed.

with active(80):
    kernel[grid](x, y, n, BLOCK=128)

Written for the driver interface of Triton 3.8, of which launchers, targets and benchmarkers are not public API.
"""

import contextlib
import ctypes
import struct

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from . import KernelError, Runtime, build_ptx, runtime

FORMATS = {
    "i1": "?",
    "u1": "?",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
}
FORMATS |= {"fp32": "f", "f32": "f", "fp64": "d", "f64": "d"}
SHARED = {80: 163 << 10, 90: 227 << 10}


def _flatten(signature, arguments) -> list[tuple[str, object]]:
    """Type and value of each kernel parameter, in the order of the PTX; constants are no parameters."""
    out: list[tuple[str, object]] = []
    for type_, value in zip(signature, arguments, strict=True):
        if isinstance(type_, tuple):
            out += _flatten(type_, value)
        elif type_.startswith("tensordesc"):
            # A descriptor that is not one of the hardware's comes apart; sizes and strides are passed twice.
            sizes, strides = list(value.shape), list(value.strides)
            out.append(("*", value.base))
            out += [("i64", n) for n in (*sizes, *strides)]
            out += [("i1", value.padding == "nan"), ("i1", value.round_f32_to_tf32)]
            out += [*(("i32", n) for n in sizes), *(("i64", n) for n in strides)]
        elif type_ != "constexpr":
            out.append((type_, value))
    return out


def _pack(type_: str, value) -> bytes:
    if type_.startswith("*"):
        return struct.pack("Q", value.data_ptr() if hasattr(value, "data_ptr") else value or 0)
    if type_ in ("fp16", "bf16"):
        dtype = torch.float16 if type_ == "fp16" else torch.bfloat16
        return struct.pack("h", torch.tensor(value, dtype=dtype).view(torch.int16).item())
    return struct.pack(FORMATS[type_], value)


class Launcher:
    """What Triton calls for each launch of one compiled kernel."""

    def __init__(self, source, metadata):
        driver = triton.runtime.driver.active
        if getattr(metadata, "tensordesc_meta", None):
            raise NotImplementedError(
                "tensor descriptors of sm_90 (TMA) are not modelled: run this kernel with active(80)"
            )
        self.metadata, self.signature = metadata, list(source.signature.values())
        self.runtime: Runtime = driver.runtime
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        self.library = ctypes.CDLL(str(build_ptx(open(path).read(), metadata.name, count=driver.count)))
        module = ctypes.c_void_p.in_dll(self.library, "ptx_exported_module")
        self.kernel = ctypes.c_void_p(self.runtime.library.ptx_find(module, metadata.name.encode()))
        count, size = ctypes.c_uint(), ctypes.c_uint()
        layout = self.runtime.library.ptx_layout(self.kernel, ctypes.byref(count), ctypes.byref(size))
        numbers = (ctypes.c_uint * (2 * count.value)).from_address(layout)
        self.layout, self.bytes = list(zip(numbers[::2], numbers[1::2], strict=True)), size.value

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        parameters = _flatten(self.signature, arguments)
        memory = [value for _, value in parameters if isinstance(value, torch.Tensor)]
        scratch = torch.empty(self.metadata.global_scratch_size * x * y * z + 256, dtype=torch.uint8)
        memory.append(scratch)
        # Triton's kernels end with two parameters of its own: memory for the kernel and for the profiler.
        values = [_pack(*p) for p in parameters] + [
            struct.pack("Q", -(-scratch.data_ptr() // 128) * 128),
            struct.pack("Q", 0),
        ]
        buffer = bytearray(self.bytes)
        for (offset, size), value in zip(self.layout, values, strict=True):
            if len(value) != size:
                raise TypeError(f"{self.metadata.name}: a parameter of {size} bytes got {len(value)}")
            buffer[offset : offset + size] = value
        shape = (ctypes.c_uint * 6)(x, y, z, self.metadata.num_warps * 32, 1, 1)
        with self.runtime.bounds(*memory):
            code = self.runtime.library.ptx_run(self.kernel, shape, self.metadata.shared, bytes(buffer))
        if code:
            raise KernelError(code, self.runtime.message())


class _Utils:
    def __init__(self, capability: int):
        self.capability = capability

    def get_device_properties(self, device):
        names = ("multiprocessor_count", "mem_clock_rate", "mem_bus_width", "sm_clock_rate")
        shared = SHARED.get(self.capability, 99 << 10)
        return dict.fromkeys(names, 4) | {"max_shared_mem": shared, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name, binary, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads of a block

    def unload_module(self, module):
        pass


class Driver:
    """A Triton driver whose device is the CPU under the emulator."""

    def __init__(self, capability: int, count: bool):
        self.capability, self.count = capability, count
        self.runtime = runtime(count=count)
        self.utils, self.launcher_cls = _Utils(capability), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        # Triton keeps compiled kernels by device.
        return self.capability * 2 + self.count

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.capability, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        """The autotuner runs every configuration once, and so executes it; the times mean nothing."""

        def benchmark(call, quantiles=None, **_):
            call()
            return [1.0] * len(quantiles or [0.5])

        return benchmark

    def get_empty_cache_for_benchmark(self):
        return torch.empty(1)

    def clear_cache(self, cache):
        pass

    @staticmethod
    def is_active():
        return True


@contextlib.contextmanager
def active(capability: int = 80, count: bool = False, **options: int):
    """Inside, Triton kernels compile for this compute capability and run on CPU tensors; yields the Runtime.

    options: as of Runtime.options. Each launch may touch the storages of its tensor arguments only.
    """
    driver, config = Driver(capability, count), triton.runtime.driver
    before = config._active
    config.set_active(driver)
    try:
        with driver.runtime.options(capability=capability, **options):
            yield driver.runtime
    finally:
        config._active = before
