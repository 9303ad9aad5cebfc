"""From .cu files to a library that runs on the CPU: nvcc for PTX and host code, the translation, g++.

Results are cached by content.
"""

import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .ptx_parser import parse
from .translate import translate

HERE = Path(__file__).parent
RUNTIME = HERE / "runtime"
# Sources that touch no memory of the kernel stay uninstrumented, see README.md.
PLAIN = ("simt", "counters", "numbers", "warp", "mma", "system")
INSTRUMENTED = ("memory", "wgmma")
COMMON = "-std=c++20 -march=native -ffp-contract=off -fno-strict-aliasing -fPIC -w".split()
SANITIZERS = {
    None: [],
    "thread": ["-g", "-fsanitize=thread"],
    "address": ["-g", "-fsanitize=address", "-fno-omit-frame-pointer"],
}


def nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH; None without one."""
    if home := os.environ.get("CUDA_HOME"):
        path = Path(home) / "bin" / "nvcc"
        if path.exists():
            return str(path)
    return shutil.which("nvcc")


def cxx() -> list[str] | None:
    """The C++ compiler as the start of a command: $CXX, else g++."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    return ["g++"] if shutil.which("g++") else None


def unavailable(cuda: bool = True) -> str | None:
    """Why kernels cannot be built here, None when they can. cuda=False: for PTX that is there already, as Triton's."""
    if not cxx():
        return "needs g++"
    if cuda and not nvcc():
        return "needs nvcc, in CUDA_HOME or PATH"
    return None


def cache_folder() -> Path:
    """Where translated libraries are kept: $PYKERNELS_PTX_CACHE, else a folder of the user in the temporary one."""
    folder = os.environ.get("PYKERNELS_PTX_CACHE")
    return Path(folder) if folder else Path(tempfile.gettempdir()) / f"pykernels-ptx-{os.getuid()}"


_slots = threading.BoundedSemaphore(os.cpu_count() or 1)


def run(command: list[str]) -> str:
    """Output of a command, of which at most one per CPU runs at a time."""
    with _slots:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _parallel(commands: list[list[str]]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(run, commands))


@functools.cache
def _machine() -> str:
    """-march=native and the compiler's version are part of every key."""
    target = run([*(cxx() or []), "-march=native", "-Q", "--help=target"])
    return run([*(cxx() or []), "--version"]) + target


@functools.cache
def _own_sources() -> str:
    translation = [
        "ptx_parser",
        "instruction_table",
        "translate",
        "translate_function",
        "build",
        *sorted(f.stem for f in HERE.glob("ops_*.py")),
    ]
    files = [*sorted(f for f in RUNTIME.iterdir() if f.is_file()), *(HERE / f"{name}.py" for name in translation)]
    return "".join(f.read_text() for f in files)


def key(*parts: str) -> str:
    """A name for what comes of these texts with this code and this compiler."""
    text = "\0".join([_machine(), _own_sources(), *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


_building: dict[str, threading.Lock] = {}


def _cached(name: str, make) -> Path:
    """The file `name` of the cache. `make(folder, path)` builds it in a folder of its own when it is not there."""
    path = cache_folder() / name
    with _building.setdefault(name, threading.Lock()):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / f"{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait instead of building the same
                if not path.exists():
                    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                        built = Path(scratch) / path.name
                        make(Path(scratch), built)
                        built.replace(path)  # whole, or not there
    return path


def _flags(sanitizer: str | None, count: bool) -> list[str]:
    return [*COMMON, *SANITIZERS[sanitizer], *(["-DPTX_COUNT"] if count else [])]


def _marker(sanitizer: str | None) -> list[str]:
    """Uninstrumented sources still announce the fibers to ThreadSanitizer."""
    return {"thread": ["-g", "-DPTX_TSAN"], "address": SANITIZERS["address"], None: []}[sanitizer]


def runtime_library(sanitizer: str | None = None, count: bool = False) -> Path:
    """The SIMT runtime, one for each way of building."""

    def make(folder: Path, path: Path) -> None:
        compiler, commands, objects = cxx() or [], [], []
        for name in (*PLAIN, *INSTRUMENTED):
            extra = _marker(sanitizer) if name in PLAIN else SANITIZERS[sanitizer]
            flags = [
                *COMMON,
                *extra,
                *(["-DPTX_COUNT"] if count else []),
                *(["-frounding-math"] if name == "numbers" else []),
            ]
            objects.append(str(folder / f"{name}.o"))
            optimise = "-O3" if name in ("mma", "wgmma") else "-O2"
            commands.append([*compiler, *flags, optimise, "-c", str(RUNTIME / f"{name}.cpp"), "-o", objects[-1]])
        _parallel(commands)
        run(
            [
                *compiler,
                "-shared",
                *SANITIZERS[sanitizer],
                f"-Wl,-soname,{path.name}",
                *objects,
                "-o",
                str(path),
                "-lpthread",
            ]
        )

    return _cached(f"libptx_runtime-{key(str(sanitizer), str(count))}.so", make)


def _link(objects: list[Path], path: Path, sanitizer: str | None, runtime: Path, extra: list[str]) -> None:
    # Only C names leave the library: a template instantiated in two of them must not be shared, and a real libcudart
    # not be shadowed.
    script = path.with_suffix(".map")
    script.write_text("{ local: _Z*; cuda*; __cuda*; };\n")
    command = [*(cxx() or []), "-shared", *SANITIZERS[sanitizer], *map(str, objects), *extra, str(runtime)]
    names = [f"-Wl,-rpath,{runtime.parent}", f"-Wl,-soname,{path.name}", f"-Wl,--version-script={script}"]
    run([*command, *names, "-o", str(path)])


def _compile_ptx(ptx: str, name: str, folder: Path, flags: list[str]) -> list[Path]:
    commands, objects = [], []
    for i, text in enumerate(translate(parse(ptx), name)):
        source = folder / f"kernels{i}.cpp"
        source.write_text(text)
        objects.append(source.with_suffix(".o"))
        commands.append([*(cxx() or []), *flags, "-O1", f"-I{RUNTIME}", "-c", str(source), "-o", str(objects[-1])])
    _parallel(commands)
    return objects


def build_ptx(ptx: str, name: str, sanitizer: str | None = None, count: bool = False) -> Path:
    """A library of the kernels of a PTX text, without host code."""

    def make(folder: Path, path: Path) -> None:
        runtime = runtime_library(sanitizer, count)
        objects = _compile_ptx(ptx, "ptx_module", folder, [*_flags(sanitizer, count), "-DPTX_EXPORT"])
        _link(objects, path, sanitizer, runtime, [])

    return _cached(f"{name[:60]}-{key(ptx, str(sanitizer), str(count))}.so", make)


def _included(source: Path, folders: list[Path]) -> str:
    """The text of a source and of the headers it includes from its own folder and from `folders`."""
    seen: dict[Path, str] = {}

    def visit(path: Path) -> None:
        path = path.resolve()
        if path in seen:
            return
        seen[path] = path.read_text()
        for included in re.findall(r'^\s*#\s*include\s*"([^"]+)"', seen[path], flags=re.M):
            for folder in (path.parent, *folders):
                if (folder / included).exists():
                    visit(folder / included)
                    break

    visit(source)
    return "\0".join(text for _, text in sorted(seen.items()))


@functools.cache
def _cuda_include() -> str:
    """The folder of cuda_runtime_api.h; nvcc itself knows best where it is."""
    done = subprocess.run([nvcc() or "nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    for folder in re.findall(r'-I\s*"?([^"\s]+)"?', done.stderr):
        if (Path(folder) / "cuda_runtime_api.h").exists():
            return folder
    raise RuntimeError("ptx_on_cpu: nvcc does not say where cuda_runtime_api.h is")


def _cuda_object(source: Path, arch: str, flags: tuple[str, ...], sanitizer: str | None, count: bool) -> Path:
    """One object file of a .cu file's host code and its translated kernels."""
    # wgmma and its kin exist for the architecture with its letter only.
    target = "90a" if arch == "90" else arch
    folders = [Path(f[2:]) for f in flags if f.startswith("-I")]
    # Where headers lie is no part of it: another copy of the same sources has the same kernels.
    options = [f for f in flags if not f.startswith("-I")]
    name = key(_included(source, folders), nvcc() or "", target, *options, str(sanitizer), str(count))

    def make(folder: Path, path: Path) -> None:
        host, keep = folder / "host.o", folder / "keep"
        keep.mkdir()
        command = [nvcc() or "nvcc", "-std=c++17", "-O3", "-lineinfo", *flags, "-cudart", "none", "-Xcompiler", "-fPIC"]
        command += ["-gencode", f"arch=compute_{target},code=compute_{target}", "-c", str(source), "-o", str(host)]
        run([*command, "--keep", "--keep-dir", str(keep)])
        ptx = (keep / f"{source.stem}.ptx").read_text()
        objects = _compile_ptx(ptx, f"ptx_{name}", folder, _flags(sanitizer, count))
        run([*(cxx() or []), "-r", "-nostdlib", *map(str, objects), str(host), "-o", str(path)])

    return _cached(f"{source.stem}-{name}.o", make)


def _stand_in() -> Path:
    def make(folder: Path, path: Path) -> None:
        command = [*(cxx() or []), *COMMON, "-O1", "-fvisibility=hidden", f"-I{_cuda_include()}"]
        run([*command, "-c", str(RUNTIME / "cudart.cpp"), "-o", str(path)])

    return _cached(f"cudart-{key(_cuda_include())}.o", make)


def build_cuda(
    sources: tuple[Path, ...],
    arch: str = "80",
    flags: tuple[str, ...] = (),
    sanitizer: str | None = None,
    count: bool = False,
) -> Path:
    """One library of .cu files: their extern "C" functions run kernels on the CPU. Files are compiled side by side."""
    with ThreadPoolExecutor() as pool:
        stand_in, runtime = pool.submit(_stand_in), pool.submit(runtime_library, sanitizer, count)
        objects = list(pool.map(lambda s: _cuda_object(s, arch, flags, sanitizer, count), sources))

    def make(folder: Path, path: Path) -> None:
        _link([*objects, stand_in.result()], path, sanitizer, runtime.result(), [])

    return _cached(f"{sources[0].stem}-{key(*(o.name for o in objects))}.so", make)


def build_glue(
    sources: list[Path],
    libraries: list[Path],
    flags: tuple[str, ...] = (),
    sanitizer: str | None = None,
    link: tuple[str, ...] = (),
    replace: dict[str, Path] | None = None,
) -> Path:
    """A library of C++ sources that call the functions of built ones, such as the operators of a GPU's library.

    `replace` puts other files in the place of headers that lie beside a source.
    """
    replacements = replace or {}
    folders = [Path(f[2:]) for f in flags if f.startswith("-I")]

    def make(folder: Path, path: Path) -> None:
        commands, objects = [], [_stand_in()]
        for i, source in enumerate(sources):
            # A copy with its folder's headers: the compiler looks beside the source first.
            copy = folder / str(i)
            copy.mkdir()
            for file in [source, *source.parent.glob("*.h")]:
                shutil.copy(replacements.get(file.name, file), copy / file.name)
            objects.append(copy / f"{source.stem}.o")
            command = [*(cxx() or []), *COMMON, "-O1", f"-I{_cuda_include()}", *flags, *SANITIZERS[sanitizer]]
            commands.append([*command, "-c", str(copy / source.name), "-o", str(objects[-1])])
        _parallel(commands)
        runtime = runtime_library(sanitizer)
        _link(objects, path, sanitizer, runtime, [*map(str, libraries), f"-Wl,-rpath,{cache_folder()}", *link])

    texts = [_included(s, folders) for s in [*sources, *replacements.values()]]
    return _cached(f"{sources[0].stem}-{key(*texts, *map(str, libraries), *flags, *link, str(sanitizer))}.so", make)
