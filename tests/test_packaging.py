"""Build, installation and import. `#n` names the line of the project's failure checklist that a test stands for."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import pykernels
from pykernels import _extension

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(pykernels.__file__).parent
SUFFIX, SOABI = sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_config_var("SOABI")
TIERS = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]

needs_extension = pytest.mark.skipif(_extension._C is None, reason="there is no compiled extension to examine")
needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86-64 builds several tiers")


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a fresh Python that imports from cwd first."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


# --- import ---


# An editable installation would lend the copy the files that it lacks.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A copy of the package's Python files alone: no library, no record of a build."""
    target = tmp_path / "pykernels"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("_build.py", "*.so", "__pycache__", "models"))
    return target


def test_other_torch_is_refused_before_the_library_is_opened(package_copy: Path) -> None:
    """#2, #6: a library built for another torch is refused by its recorded version, with the fix in the message."""
    (package_copy / f"_C{SUFFIX}").write_text("no library: opening it fails in another way")
    record = package_copy / "_build.py"

    record.write_text('TORCH = "1.2.3+cpu"\nCUDA_ARCHS = ""\n')
    refused = python(ALONE + "import pykernels", package_copy.parent)
    last = refused.stderr.strip().splitlines()[-1]
    assert refused.returncode != 0 and last.startswith("ImportError: pykernels was built for torch 1.2.3+cpu")
    assert str(torch.__version__) in last and "pip install" in last

    # The same files with the right record do get opened: so it was the record that stopped the import above.
    record.write_text(f'TORCH = "{torch.__version__}"\nCUDA_ARCHS = ""\n')
    opened = python(ALONE + "import pykernels", package_copy.parent)
    assert opened.returncode != 0 and "built for torch" not in opened.stderr


USE_WITHOUT = """
import sys, warnings
for name in {missing!r}:
    sys.modules[name] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pykernels
assert sum("no compiled extension" in str(w.message) for w in caught) == {warnings}, caught
import torch
x = torch.randn(2, 5, 4, requires_grad=True)
y = pykernels.gated_conv1d(x, torch.randn(8, 4, 3))
y.sum().backward()
assert y.shape == x.grad.shape == (2, 5, 4)
"""


@pytest.mark.parametrize("missing", [[], ["triton"]], ids=["with-triton", "without-triton"])
def test_works_without_extension(package_copy: Path, missing: list[str]) -> None:
    """#20, #21: no compiled extension (and no triton): one warning, and the reference serves every call."""
    done = python(ALONE + USE_WITHOUT.format(missing=missing, warnings=1), package_copy.parent)
    assert done.returncode == 0, done.stderr


@needs_extension
def test_works_without_triton_and_without_gpu(tmp_path: Path) -> None:
    """#21: neither triton nor a driver is needed, and nothing is said about it."""
    done = python(USE_WITHOUT.format(missing=["triton"], warnings=0), tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr


def test_library_for_another_python_is_told_apart(package_copy: Path) -> None:
    """#20: an editable installation used from a second Python warns and works."""
    (package_copy / "_build.py").write_text(f'TORCH = "{torch.__version__}"\nCUDA_ARCHS = ""\n')
    done = python(ALONE + USE_WITHOUT.format(missing=[], warnings=1), package_copy.parent)
    assert done.returncode == 0, done.stderr


def test_models_has_one_name() -> None:
    """`import models` in the repository root would be a second copy of pykernels.models."""
    done = python("import models", ROOT)
    assert done.returncode != 0 and "ImportError: import pykernels.models" in done.stderr
    assert python("import pykernels.models", ROOT.parent).returncode == 0


# --- CPU tiers ---


@needs_extension
def test_tiers_can_be_chosen() -> None:
    """#26: every tier that the processor has can be chosen; the others are refused with the reason."""
    extension, before = _extension._C, _extension._C.cpu_tier()
    assert [name for name, _, _ in extension.cpu_tiers()] == TIERS
    try:
        for name, usable, why_not in extension.cpu_tiers():
            assert usable == (why_not == "")
            if usable:
                extension.set_cpu_tier(name)
                assert extension.cpu_tier() == name
            else:
                with pytest.raises(RuntimeError, match=f"'{name}' cannot be used here: .*choose one of generic"):
                    extension.set_cpu_tier(name)
    finally:
        extension.set_cpu_tier(before)


@needs_extension
def test_tier_from_the_environment(tmp_path: Path) -> None:
    """#26: PYKERNELS_CPU_TIER is obeyed, and a wrong name stops the import."""
    show = "import pykernels._extension as e; print(e._C.cpu_tier())"
    assert python(show, tmp_path, PYKERNELS_CPU_TIER="generic").stdout == "generic\n"
    wrong = python(show, tmp_path, PYKERNELS_CPU_TIER="sse9")
    assert "RuntimeError: PYKERNELS_CPU_TIER: CPU tier 'sse9' does not exist; choose one of generic" in wrong.stderr


# --- what is in the library ---

# Registers and instructions that a tier may not use, and everything outside the tiers even less.
AVX512 = r"%zmm|%k[0-7]\b|%[xy]mm(?:1[6-9]|2\d|3[01])\b"
FORBIDDEN = {
    "": rf"%ymm|%tmm|{AVX512}",
    "generic": rf"%ymm|%tmm|{AVX512}",
    "avx2": rf"%tmm|{AVX512}",
    "avx512": r"%tmm|vdpbf16ps|vcvtne2?ps2?bf16",
    "avx512_bf16": r"%tmm",
    "amx": r"$^",
}


def tier_of(symbol: str) -> str:
    """The tier whose namespace a mangled name belongs to; empty for everything else."""
    names = "|".join(f"{len(t)}{t}" for t in TIERS)
    match = re.match(rf"_Z[A-Z]*9pykernels({names})", symbol)
    return match[1].lstrip("0123456789") if match else ""


@needs_extension
@needs_x86
def test_vector_instructions_stay_in_their_tier() -> None:
    """#26: the dispatcher, everything else outside the tiers, and each lower tier are free of higher instructions."""
    function, found, seen = "", [], set()
    for line in output("objdump", "-d", "--no-show-raw-insn", _extension._C.__file__).splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
            seen.add(tier_of(function))
        elif "\t" in line and re.search(FORBIDDEN[tier_of(function)], line):
            found.append((function, line.strip()))
    assert not found, found[:5]
    assert seen == {"", *TIERS}


@needs_extension
@needs_x86
def test_tier_objects_share_no_symbol() -> None:
    """#26: what a tier defines outside its namespace could be the copy that the linker keeps for all tiers."""
    build = Path(os.environ.get("PYKERNELS_BUILD_DIR") or ROOT / "build") / f"torch-{torch.__version__}-{SOABI}"
    if not build.is_dir():
        pytest.skip("object files are examined where the library was built; this one was installed from a wheel")
    for tier in TIERS:
        objects = list(build.glob(f"CMakeFiles/tier_{tier}.dir/**/*.o"))
        assert objects, f"no object files of tier {tier} under {build}"
        for line in output("nm", "--format=posix", *objects).splitlines():
            if line.endswith(":"):
                continue
            symbol, kind = line.split()[:2]
            if kind == "U":
                assert not re.match(r"_ZN?K?(St|Sa|Ss|2at|3c10|5torch)", symbol), f"tier {tier} uses {symbol}"
            elif kind.isupper() or kind == "u":
                assert tier_of(symbol) == tier, f"tier {tier} defines {symbol} ({kind})"


@needs_extension
def test_no_openmp_runtime_of_its_own() -> None:
    """#27: parallel regions exist, and run in the OpenMP runtime that torch brings, whatever its name."""
    library = _extension._C.__file__
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", library))
    assert needed and not [n for n in needed if re.match(r"lib(gomp|i?omp)", n)]
    assert re.search(r"\bU (GOMP_parallel|__kmpc_fork_call)", output("nm", "-D", library))


THREADS = """
import os, re, torch
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(gomp|i?omp)[^/]*$", line.strip())}
torch.set_num_threads(1)
x, weight = torch.zeros(8, 512, 64), torch.zeros(128, 64, 3)
torch.set_num_threads(2)
before = runtimes()
import pykernels
threads = len(os.listdir("/proc/self/task"))
pykernels.gated_conv1d(x, weight, backend="cpu")
assert runtimes() == before and len(before) == 1, (before, runtimes())
assert len(os.listdir("/proc/self/task")) > threads, "the operator ran on one thread"
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_runs_on_the_threads_of_torch(tmp_path: Path) -> None:
    """#27: a call starts worker threads and brings no second OpenMP runtime into the process."""
    done = python(THREADS, tmp_path)
    assert done.returncode == 0, done.stderr


# --- building, with a stand-in for cmake so that it takes seconds ---


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources to build from, among them what an earlier build left behind."""
    target = tmp_path / "sources"
    ignore = shutil.ignore_patterns("build", "dist", ".*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, target, ignore=ignore)
    (target / "pykernels" / "_build.py").write_text('TORCH = "0.0"\n')
    (target / "pykernels" / f"_C{SUFFIX}").write_text("left behind")
    return target


def backend(call: str, sources: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Calls the build backend as pip does."""
    return python(f"from setuptools import build_meta; print(build_meta.{call})", sources, **env)


@pytest.fixture
def fake_tools(tmp_path: Path) -> Path:
    """A folder with a cmake that writes down its arguments and 'builds' a library once: a text, its folder's name."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "ninja").write_text("#!/bin/sh\n")
    (folder / "cmake").write_text(f"""#!/bin/sh
echo "$*" >> {folder}/log
[ "$1" = --build ] || exit 0
mkdir -p "$2"
for library in _C{SUFFIX} _cuda.so; do [ -e "$2/$library" ] || echo "$2" > "$2/$library"; done
""")
    for tool in folder.iterdir():
        tool.chmod(0o755)
    return folder


def build_variables(fake_tools: Path, objects: Path) -> dict[str, str]:
    return {
        "PATH": f"{fake_tools}{os.pathsep}{os.environ['PATH']}",
        "MAX_JOBS": "3",
        "PYKERNELS_BUILD_DIR": str(objects),
        "PYKERNELS_SANITIZE": "",
        "USE_CUDA": "0",
    }


def test_wheel(sources: Path, fake_tools: Path, tmp_path: Path) -> None:
    """#1, #5: builds for the torch that is here and asks for no other; MAX_JOBS and PYKERNELS_BUILD_DIR are obeyed."""
    env = build_variables(fake_tools, tmp_path / "objects")
    assert "torch" not in backend("get_requires_for_build_wheel()", sources, **env).stdout
    built = backend("build_wheel('dist')", sources, **env)
    assert built.returncode == 0, built.stderr
    assert f"pykernels: CPU only, since USE_CUDA=0 (torch {torch.__version__})" in built.stdout

    configure, build = (fake_tools / "log").read_text().splitlines()
    folder = tmp_path / "objects" / f"torch-{torch.__version__}-{SOABI}"
    assert f"-B {folder}" in configure and f"-DTORCH_DIR={Path(torch.__file__).parent}" in configure
    assert build == f"--build {folder} -j 3"

    with zipfile.ZipFile(next((sources / "dist").glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
        record = wheel.read("pykernels/_build.py").decode()
    assert record == f'TORCH = "{torch.__version__}"\nCUDA_ARCHS = ""\n'
    assert {f"pykernels/_C{SUFFIX}", "pykernels/models/__init__.py", "pykernels/py.typed"} <= set(names)
    assert not [n for n in names if n.split("/")[0] in ("models", "bench", "tests", "csrc", "kernels")]
    assert "Requires-Dist: torch=={}.{}.*".format(*torch.__version__.split(".")) in metadata


@pytest.mark.parametrize("command", ["build_wheel", "build_editable"])
def test_build_after_a_build_for_another_torch(command: str, sources: Path, fake_tools: Path, tmp_path: Path) -> None:
    """#6: going back to a torch whose library is older than the one installed since takes the older library."""
    first, second = tmp_path / "first", tmp_path / "second"
    for objects in (first, second, first):
        built = backend(f"{command}('dist')", sources, **build_variables(fake_tools, objects))
        assert built.returncode == 0, built.stderr
    if command == "build_wheel":
        with zipfile.ZipFile(next((sources / "dist").glob("*.whl"))) as wheel:
            library = wheel.read(f"pykernels/_C{SUFFIX}").decode()
    else:
        library = (sources / "pykernels" / f"_C{SUFFIX}").read_text()
    assert library.startswith(str(first))


WITHOUT_TORCH = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find_spec(name, package)
sys.executable = "true"  # looks for torch in the environment behind pip's isolation, and finds none
from setuptools import build_meta
print(build_meta.{call})
"""


def test_without_torch(sources: Path) -> None:
    """#1: where there is no torch, pip is asked for one; where pip may not fetch it, the message says what to do."""
    asked = python(WITHOUT_TORCH.format(call="get_requires_for_build_wheel()"), sources)
    assert "torch>=" in asked.stdout, asked.stderr
    built = python(WITHOUT_TORCH.format(call="build_wheel('dist')"), sources)
    last = built.stderr.strip().splitlines()[-1]
    assert built.returncode != 0 and last.startswith("pykernels: no torch found")
    assert "pip install torch" in last and "--no-build-isolation" in last


def fake_nvcc(home: Path, release: str) -> str:
    """CUDA_HOME with a compiler of that release."""
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    return str(home)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_cuda_is_built_for_the_capabilities_asked_for(sources: Path, fake_tools: Path, tmp_path: Path) -> None:
    """#3, #4: where nvcc has torch's CUDA; TORCH_CUDA_ARCH_LIST is obeyed, recorded, and checked."""
    env = build_variables(fake_tools, tmp_path / "objects") | {
        "USE_CUDA": "1",
        "CUDA_HOME": fake_nvcc(tmp_path / "cuda", torch.version.cuda),
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0a 12.0+PTX",
    }
    built = backend("build_wheel('dist')", sources, **env)
    assert built.returncode == 0, built.stderr
    configure = (fake_tools / "log").read_text().splitlines()[0]
    assert "-DCUDA_ARCHS=80-real;90a-real;120-real;120-virtual" in configure
    assert f"-DCUDA_COMPILER={env['CUDA_HOME']}/bin/nvcc" in configure
    with zipfile.ZipFile(next((sources / "dist").glob("*.whl"))) as wheel:
        assert "pykernels/_cuda.so" in wheel.namelist()
        assert 'CUDA_ARCHS = "8.0 9.0a 12.0+PTX"' in wheel.read("pykernels/_build.py").decode()
    wrong = backend("build_wheel('dist')", sources, **env | {"TORCH_CUDA_ARCH_LIST": "hopper"})
    assert "TORCH_CUDA_ARCH_LIST: expected capabilities like '8.0 9.0+PTX', got 'hopper'" in wrong.stderr


@pytest.mark.parametrize("asked", ["1", ""])
def test_cuda_of_another_release(asked: str, sources: Path, fake_tools: Path, tmp_path: Path) -> None:
    """#3: an nvcc that does not fit torch is an error where CUDA was asked for, and else a build for the CPU."""
    env = build_variables(fake_tools, tmp_path / "objects")
    env |= {"USE_CUDA": asked, "CUDA_HOME": fake_nvcc(tmp_path / "cuda", "1.0")}
    built = backend("build_wheel('dist')", sources, **env)
    if asked:
        assert built.returncode != 0 and "pykernels: USE_CUDA=1, but" in built.stderr.strip().splitlines()[-1]
    else:
        assert built.returncode == 0 and "pykernels: CPU only, since" in built.stdout


def test_values_of_use_cuda(sources: Path) -> None:
    built = backend("build_wheel('dist')", sources, USE_CUDA="yes")
    assert built.returncode != 0 and "USE_CUDA: expected 0, 1 or unset, got 'yes'" in built.stderr


def test_sdist(sources: Path) -> None:
    """The source distribution has all that a build needs, and nothing that an earlier build left behind."""
    built = backend("build_sdist('dist')", sources)
    assert built.returncode == 0, built.stderr
    with tarfile.open(next((sources / "dist").glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "models/__init__.py"}
    for folder in ("csrc", "kernels", "pykernels"):
        files = (f for f in (sources / folder).rglob("*") if f.suffix in (".cpp", ".h", ".cu", ".cuh", ".py", ".typed"))
        wanted |= {str(f.relative_to(sources)) for f in files}
    wanted.remove("pykernels/_build.py")
    assert wanted <= names
    assert not [n for n in names if n.endswith((".so", "_build.py")) or n.startswith("build/")]
