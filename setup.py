"""Builds pykernels against the torch that the environment already has.

Environment variables:
    MAX_JOBS             parallel compiler processes (ninja's choice when unset)
    PYKERNELS_BUILD_DIR  where object files are kept between builds (./build)
    PYKERNELS_SANITIZE   sanitizers to compile with, for example address,undefined (tests/run_sanitized.sh)
    USE_CUDA             0: no CUDA kernels; 1: CUDA kernels, or no build; unset: where nvcc and torch have one CUDA
    TORCH_CUDA_ARCH_LIST compute capabilities to compile for, as for PyTorch's own extensions ("8.0 9.0+PTX")
    CUDA_HOME            the CUDA toolkit (/usr/local/cuda, or that of the nvcc on PATH)
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SUPPORTED_TORCH = "torch>=2.13,<2.16"
CUDA_ARCHS = "8.0 9.0a 10.0 12.0+PTX"


class Torch(NamedTuple):
    path: Path
    version: str  # "2.14.1+cu130"
    cuda: str  # "13.0", or "" without CUDA

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


def find_torch() -> "Torch | None":
    """The installed torch, known by its files; it is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        package = Path(spec.origin).parent
    else:
        # pip's isolated build hides the environment that is being installed into behind PYTHONPATH; -E looks past it.
        look = "import importlib.util; spec = importlib.util.find_spec('torch'); print(spec and spec.origin or '')"
        origin = subprocess.run([sys.executable, "-E", "-c", look], capture_output=True, text=True).stdout.strip()
        if not origin:
            return None
        package = Path(origin).parent
    text = (package / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']+)'", text, re.M)
    cuda = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, re.M)
    return Torch(package, version[1], cuda[1] if cuda else "") if version else None


def find_tool(name: str) -> str:
    """Path of cmake or ninja. On PATH in pip's isolated build and in an active environment; else beside this Python."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")]))
    return found or sys.exit(f"pykernels: {name} not found: pip install {name}, or leave out --no-build-isolation")


def find_pybind11() -> str:
    try:
        return importlib.import_module("pybind11").get_include()
    except ModuleNotFoundError:
        sys.exit("pykernels: pybind11 not found: pip install pybind11, or leave out --no-build-isolation")


def require_torch() -> Torch:
    torch = find_torch()
    if torch is None:
        sys.exit(
            "pykernels: no torch found to build against. Run 'pip install torch' first and then "
            "'pip install --no-build-isolation .', or leave out --no-build-isolation and pip fetches a torch."
        )
    return torch


class Cuda(NamedTuple):
    """The CUDA compiler to use; archs empty and the reason where CUDA kernels are not built."""

    compiler: str = ""
    archs: str = ""  # "8.0 9.0a 10.0 12.0+PTX"
    reason: str = ""

    @property
    def cmake_archs(self) -> str:
        """As CMake writes them: 80-real;120-real;120-virtual."""
        numbers = []
        for arch in self.archs.split():
            number = arch.removesuffix("+PTX").replace(".", "")
            numbers += [f"{number}-real", *([f"{number}-virtual"] if arch.endswith("+PTX") else [])]
        return ";".join(numbers)


def find_cuda(torch: Torch) -> Cuda:
    """The nvcc of torch's CUDA. SystemExit where USE_CUDA=1 asks for what is not there, or a capability is wrong."""
    wanted = os.environ.get("USE_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"pykernels: USE_CUDA: expected 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return Cuda(reason="USE_CUDA=0")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ") or CUDA_ARCHS
    for arch in archs.split():
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            sys.exit(f"pykernels: TORCH_CUDA_ARCH_LIST: expected capabilities like '8.0 9.0+PTX', got {arch!r}")
    homes = filter(None, [os.environ.get("CUDA_HOME"), "/usr/local/cuda"])
    # The toolkit's own nvcc before what PATH finds: that may be a wrapper, from which CMake does not find the toolkit.
    found = [Path(home) / "bin" / "nvcc" for home in homes] + [Path(shutil.which("nvcc") or "")]
    compiler = next((str(path) for path in found if path.is_file()), "")
    reason = ""
    if not torch.cuda:
        reason = f"torch {torch.version} is built without CUDA"
    elif not compiler:
        reason = "no nvcc in CUDA_HOME, /usr/local/cuda or on PATH"
    else:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.", told)
        if not release or release[1] != torch.cuda.split(".")[0]:
            other = release[1] if release else "?"
            reason = f"{compiler} is of CUDA {other}, and torch {torch.version} of CUDA {torch.cuda}"
    if reason and wanted == "1":
        sys.exit(f"pykernels: USE_CUDA=1, but {reason}")
    return Cuda(reason=reason) if reason else Cuda(compiler, " ".join(archs.split()))


def build_folder(torch: Torch) -> Path:
    """One folder per torch and Python: neither meets the other's objects, and a second build compiles what changed."""
    sanitize = os.environ.get("PYKERNELS_SANITIZE", "")
    parts = [f"torch-{torch.version}", sysconfig.get_config_var("SOABI"), *filter(None, sanitize.split(","))]
    return Path(os.environ.get("PYKERNELS_BUILD_DIR") or ROOT / "build").resolve() / "-".join(parts)


class CMakeBuild(build_ext):
    """Builds pykernels._C, and the CUDA library beside it, with CMake, and records for which torch."""

    def build_extension(self, ext):
        torch = require_torch()
        cuda = find_cuda(torch)
        what = f"CUDA {cuda.archs} by {cuda.compiler}" if cuda.archs else f"CPU only, since {cuda.reason}"
        print(f"pykernels: {what} (torch {torch.version})", flush=True)

        build, cmake = build_folder(torch), find_tool("cmake")
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "TORCH_DIR": torch.path,
            "TORCH_VERSION": torch.version,
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYBIND11_INCLUDE": find_pybind11(),
            "EXT_SUFFIX": suffix,
            "CUDA_COMPILER": cuda.compiler,
            "CUDA_ARCHS": cuda.cmake_archs,
            "PYKERNELS_SANITIZE": os.environ.get("PYKERNELS_SANITIZE", ""),
        }
        jobs = os.environ.get("MAX_JOBS")
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        subprocess.check_call(configure + [f"-D{name}={value}" for name, value in options.items()])
        subprocess.check_call([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])])

        package = Path(self.get_ext_fullpath(ext.name)).parent
        package.mkdir(parents=True, exist_ok=True)
        # Not self.copy_file: it keeps what is there when that is newer, which may be the library for another torch.
        shutil.copy(build / f"_C{suffix}", self.get_ext_fullpath(ext.name))
        if cuda.archs:
            shutil.copy(build / "_cuda.so", package / "_cuda.so")
        else:
            (package / "_cuda.so").unlink(missing_ok=True)
        (package / "_build.py").write_text(f'TORCH = "{torch.version}"\nCUDA_ARCHS = "{cuda.archs}"\n')

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        source = self.get_finalized_command("build_py").get_package_dir("pykernels")
        for name in ("_build.py", "_cuda.so"):
            built, there = Path(self.build_lib, "pykernels", name), Path(source, name)
            if built.is_file():
                shutil.copy(built, there)
            else:
                there.unlink(missing_ok=True)


installed = find_torch()
setup(
    packages=["pykernels", "pykernels.models", "pykernels.triton_kernels"],
    package_dir={"pykernels.models": "models"},
    package_data={"pykernels": ["py.typed"]},
    ext_modules=[Extension("pykernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Asked for only where there is none: a build requirement would fetch a second torch and build against that one.
    setup_requires=[] if installed else [SUPPORTED_TORCH],
    # The library fits one torch; pip may not replace that torch when it installs what was built for it.
    install_requires=[f"torch=={installed.minor}.*" if installed else SUPPORTED_TORCH, "numpy"],
)
