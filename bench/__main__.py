"""``python -m bench``: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

DTYPES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}

# What holds torch, MKL and oneDNN to the instructions of a tier; they read it when they are loaded.
BASELINE_CAPS = {
    "generic": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"MKL_ENABLE_INSTRUCTIONS": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}

EXAMPLES = """\
examples:
  python -m bench --quick                            the telling cases, about 12 minutes on two cores
  python -m bench                                    everything, half an hour and more
  python -m bench gated_conv --dtype bf16            one operator, one dtype
  python -m bench dgcnn_extractor --quick --list     which cases these are
  python -m bench --threads 1 --case "B1 L512"       the cases with this text in their name, one thread
  python -m bench --json now.json --plot now.png     all numbers, and a picture
  python -m bench --tier avx2                        our AVX2 kernels, torch held to AVX2 as well
  python -m bench gated_conv --device cuda --quick   the GPU: CUDA kernels against eager, compiled and bare GEMMs
  python -m bench gated_conv --model gpu --quick     no GPU needed: bytes that the CUDA kernels move, counted on
                                                     the CPU, and the least time that A100, H100 and H200 take
  python -m bench lora_linear --model gpu-triton     the same of Triton's kernels

exit codes:
  0    every case passed its correctness gate (a missed bar is reported, and changes nothing here)
  1    a case FAILED: its outputs or gradients violate the error rule, or it raised
  2    wrong arguments, or pykernels cannot be imported
  130  interrupted; what was finished is reported
"""


def operators() -> dict[str, str]:
    """Operator name -> module name, from the bench_<operator>.py files beside this one."""
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    return {file.stem.removeprefix("bench_"): f"{__package__}.{file.stem}" for file in files}


def _dtypes(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in DTYPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"want fp32, bf16 or fp16, got {unknown[0]!r}")
    return [DTYPES[name] for name in text.split(",")]


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want a whole number from 1, got {text!r}")
    return int(text)


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"want a file in a folder that can be written to, got {text!r}")
    return path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Checks, then times the operators against eager PyTorch, torch.compile and bare GEMMs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("operator", nargs="*", help=f"what to measure, default all: {', '.join(operators())}")
    p.add_argument("--dtype", type=_dtypes, action="extend", metavar="D", help="fp32, bf16, fp16; several with commas")
    p.add_argument("--threads", type=_threads, metavar="N", help="default: torch's choice, within the cgroup's quota")
    p.add_argument("--case", metavar="TEXT", help="only cases whose name contains this")
    p.add_argument("--list", action="store_true", help="print the cases that would be measured, and end")
    p.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    p.add_argument("--tier", choices=BASELINE_CAPS, help="our kernels of this tier, torch held to its instructions")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure (default cpu)")
    counted = "count the traffic of the CUDA or Triton kernels and measure nothing"
    p.add_argument("--model", choices=("gpu", "gpu-triton"), help=counted)
    p.add_argument("--json", type=_writable, metavar="F", help="write all numbers to this file")
    p.add_argument("--plot", type=_writable, metavar="F.png", help="write a picture to this file (needs matplotlib)")
    return p


def settings(tier: str) -> dict[str, str]:
    """The environment in which a tier is measured."""
    # torch.compile's cache does not tell instruction sets apart: code for AVX2, built for AVX-512, writes past tensors.
    cache = Path(tempfile.gettempdir()) / f"pykernels_bench_{os.getuid()}" / tier
    return {"PYKERNELS_CPU_TIER": tier, "TORCHINDUCTOR_CACHE_DIR": str(cache), **BASELINE_CAPS[tier]}


def _on_cuda(
    p: argparse.ArgumentParser, args: argparse.Namespace, modules: list[str], argv: Sequence[str]
) -> int:
    """The cases of those bench files that have some for a GPU."""
    if args.tier or args.plot or args.threads:
        p.error("--device cuda: goes with --dtype, --case, --list, --quick and --json alone")
    import torch

    from . import on_cuda

    if torch.version.cuda is None or not torch.cuda.is_available():
        p.error("--device cuda: needs a GPU and a torch that is built for it")
    dtypes = [name for name in on_cuda.DTYPES if args.dtype is None or name.replace("tf32", "fp32") in args.dtype]
    found = [importlib.import_module(name) for name in modules]
    able = [module for module in found if hasattr(module, "cuda_cases")]
    cases = [case for module in able for case in module.cuda_cases(dtypes, args.quick)]
    todo = [case for case in cases if args.case is None or args.case in case.name]
    if not todo:
        p.error("--device cuda: no case of these operators and this text")
    if args.list:
        print("\n".join(f"{case.operator}  {case.dtype}  {case.name}" for case in todo))
        return 0
    return on_cuda.run(todo, args.json, argv)


def _model(p: argparse.ArgumentParser, args: argparse.Namespace, modules: list[str], argv: Sequence[str]) -> int:
    """The cases of those bench files that have some for the model of a GPU."""
    if args.device != "cpu" or args.tier or args.plot or args.threads:
        p.error(f"--model {args.model}: goes with --dtype, --case, --list, --quick and --json alone")
    from . import gpu_model, gpu_model_triton, on_cuda

    of_triton = args.model == "gpu-triton"
    if reason := (gpu_model_triton if of_triton else gpu_model).unavailable():
        p.error(f"--model {args.model}: {reason}")
    dtypes = [name for name in on_cuda.DTYPES if args.dtype is None or name.replace("tf32", "fp32") in args.dtype]
    found = [importlib.import_module(name) for name in modules]
    able = [module for module in found if hasattr(module, "model_cases")]
    cases = [case for module in able for case in module.model_cases(dtypes, args.quick)]
    todo = [case for case in cases if args.case is None or args.case in case.name]
    if not todo:
        p.error(f"--model {args.model}: no case of these operators and this text")
    if args.list:
        print("\n".join(f"{case.operator}  {case.dtype}  {case.name}  {case.title}" for case in todo))
        return 0
    if of_triton:
        return gpu_model.run(todo, args.json, argv, gpu_model_triton.count, "Triton", "the largest tiles")
    return gpu_model.run(todo, args.json, argv)


def main(argv: Sequence[str]) -> int:
    p = parser()
    args = p.parse_args(argv)
    known = operators()
    unknown = [name for name in args.operator if name not in known]
    if unknown:
        p.error(f"operator: want one of {', '.join(known)}, got {unknown[0]!r}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        p.error("--plot needs matplotlib: pip install matplotlib")
    if args.tier and any(os.environ.get(name) != value for name, value in settings(args.tier).items()):
        os.execve(sys.executable, [sys.executable, "-m", "bench", *argv], os.environ | settings(args.tier))

    if args.model:
        return _model(p, args, [known[name] for name in args.operator or known], argv)
    if args.device == "cuda":
        return _on_cuda(p, args, [known[name] for name in args.operator or known], argv)

    try:
        # Not above: it loads torch, which reads the settings of --tier.
        import torch

        from . import harness, jobs, machine, report
    except (ImportError, RuntimeError) as error:
        print(f"python -m bench: pykernels cannot be imported: {error}", file=sys.stderr)
        return 2

    torch.set_num_threads(args.threads or machine.default_threads())
    here = machine.describe(sorted({name for caps in BASELINE_CAPS.values() for name in caps}))
    if args.tier and here.environment["cpu"]["tier"] != args.tier:
        p.error(f"--tier needs the compiled kernels: {here.environment['extension']['reason']}")
    options = jobs.Options(
        dtypes=list(dict.fromkeys(args.dtype or machine.DTYPES)),
        complete=args.dtype is not None,
        quick=args.quick,
        threads=here.threads,
        tier=args.tier,
        effort=harness.QUICK if args.quick else harness.FULL,
    )
    modules = [known[name] for name in args.operator or known]
    todo = [job for job in jobs.collect(modules, options) if args.case is None or args.case in job.case]
    if not todo:
        p.error(f"--case: no case contains {args.case!r}")
    if args.list:
        print("\n".join(f"{job.operator}  {job.dtype}  {job.case}" for job in todo))
        return 0
    for name in dict.fromkeys(job.dtype for job in todo):
        print(f"measuring the GEMM peak of {name}", file=sys.stderr, flush=True)
        here.peaks[name] = machine.gemm_peak(machine.DTYPES[name])
    print("\n".join(here.lines()) + "\n", flush=True)
    results = jobs.run(
        todo, options, here.peaks, lambda result: print(report.case_text(result, here.peaks), flush=True)
    )
    complete = len(results) == len(todo)

    print(report.summary_text(results))
    print(report.bars_text(results))
    if args.json:
        head = {"machine": here.as_dict(), "arguments": list(argv), "complete": complete}
        report.write_json(args.json, head, results)
    if args.plot:
        report.write_plot(args.plot, here, results)
    if not complete:
        return 130
    return 1 if any(result.failure for result in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
