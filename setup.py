"""Builds pykernels against the torch that the environment already has.

Environment variables:
    MAX_JOBS             parallel compiler processes (ninja's choice when unset)
    PYKERNELS_BUILD_DIR  where object files are kept between builds (./build)
    PYKERNELS_SANITIZE   sanitizers to compile with, for example address,undefined (tests/run_sanitized.sh)
    USE_CUDA             0 and unset build for the CPU; 1 is refused, since this version has no CUDA kernels
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


class Torch(NamedTuple):
    path: Path
    version: str  # "2.14.1+cu130"

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
    version = re.search(r"^__version__ = '([^']+)'", (package / "version.py").read_text(), re.M)
    return Torch(package, version[1]) if version else None


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


def build_folder(torch: Torch) -> Path:
    """One folder per torch and Python: neither meets the other's objects, and a second build compiles what changed."""
    sanitize = os.environ.get("PYKERNELS_SANITIZE", "")
    parts = [f"torch-{torch.version}", sysconfig.get_config_var("SOABI"), *filter(None, sanitize.split(","))]
    return Path(os.environ.get("PYKERNELS_BUILD_DIR") or ROOT / "build").resolve() / "-".join(parts)


class CMakeBuild(build_ext):
    """Builds the one extension, pykernels._C, with CMake, and records which torch it was built for."""

    def build_extension(self, ext):
        torch = require_torch()
        if os.environ.get("USE_CUDA", "0") not in ("", "0"):
            sys.exit("pykernels: USE_CUDA is set, but this version has no CUDA kernels: unset it to build for the CPU")
        print(f"pykernels: CPU only, since this version has no CUDA kernels (torch {torch.version})", flush=True)

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
        (package / "_build.py").write_text(f'TORCH = "{torch.version}"\nCUDA_ARCHS = ""\n')

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        source = self.get_finalized_command("build_py").get_package_dir("pykernels")
        self.copy_file(str(Path(self.build_lib, "pykernels", "_build.py")), str(Path(source, "_build.py")))


installed = find_torch()
setup(
    packages=["pykernels", "pykernels.models"],
    package_dir={"pykernels.models": "models"},
    package_data={"pykernels": ["py.typed"]},
    ext_modules=[Extension("pykernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Asked for only where there is none: a build requirement would fetch a second torch and build against that one.
    setup_requires=[] if installed else [SUPPORTED_TORCH],
    # The library fits one torch; pip may not replace that torch when it installs what was built for it.
    install_requires=[f"torch=={installed.minor}.*" if installed else SUPPORTED_TORCH, "numpy"],
)
