"""`python -m bench --model gpu`: its arithmetic, and the whole of it on the smallest operator."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import __main__ as command
from bench import bench_child_update, bench_gated_conv, bench_lora_linear, gpu_model, gpu_model_triton
from bench.gated_conv_baselines import Shape
from bench.gpu_model import GPUS, Gpu, Work, extrapolate, operations
from bench.jobs import GateFailure
from tests import ptx_on_cpu
from tests.emulated_cuda import build_operator

needs_nvcc = pytest.mark.skipif(ptx_on_cpu.unavailable() is not None, reason=f"{ptx_on_cpu.unavailable()}")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def moved(call) -> dict[str, float]:
    return {name: work.moved for name, work in operations(call)}


def test_what_operations_move() -> None:
    x, y = meta(10, 6), meta(10, 6)
    assert moved(lambda: x + y) == {"add": 3 * 240}
    assert moved(lambda: x * x) == {"mul": 2 * 240}  # read once
    assert moved(lambda: x.add_(y)) == {"add_": 3 * 240}
    assert moved(lambda: x.t().reshape(6, 10)[:3].unsqueeze(0)) == {}  # views
    assert moved(lambda: x.t().contiguous()) == {"clone": 2 * 240}
    assert moved(lambda: x + meta(1, 6).expand(10, 6)) == {"add": 2 * 240 + 24}
    assert moved(lambda: x.bfloat16()) == {"_to_copy": 240 + 120}
    assert moved(lambda: torch.empty_like(x)) == {}


def test_products_of_operations() -> None:
    ((name, work),) = operations(lambda: F.linear(meta(8, 4), meta(5, 4)).detach())[-1:]
    assert (name, work.products) == ("mm", 2 * 8 * 4 * 5)
    ((name, work),) = operations(lambda: F.conv1d(meta(2, 4, 9), meta(6, 4, 3), padding=1))
    assert (name, work.products) == ("convolution", 2 * 2 * 9 * 6 * 4 * 3)


def test_rooflines() -> None:
    gpu = Gpu("g", 100.0, {"bf16": 1000.0, "fp32": 100.0})
    assert Work(moved=200, products=1000).seconds(gpu, "bf16") == 2.0
    assert Work(moved=200, products=5000).seconds(gpu, "bf16") == 5.0
    assert Work(moved=200, products=1000, fp32=600).seconds(gpu, "bf16") == 6.0  # on units of their own
    for known in GPUS:
        assert set(known.peaks) == {"fp32", "tf32", "bf16", "fp16"}
        assert known.peaks["bf16"] == known.peaks["fp16"] == 2 * known.peaks["tf32"]


def test_extrapolation_says_how_straight_the_counts_are() -> None:
    found = [{"pack": Work(7, 5, 0), "run": Work(10 * n, 4 + 3 * n, 100 * n)} for n in (1, 2, 3)]
    launchers, deviation = extrapolate(found, (1, 2, 3), 64)
    assert launchers == {"pack": Work(7, 5, 0), "run": Work(640, 4 + 3 * 64, 6400)} and deviation == 0
    found[2]["run"] = Work(30, 14, 300)
    assert extrapolate(found, (1, 2, 3), 64)[1] == pytest.approx(1 / 13)


def test_what_gated_conv_has_to_move() -> None:
    case = bench_gated_conv.model_case(Shape(8, 16, 4, 4, 3, 1), "bf16", training=False)
    x, weight, bias = 16 * 4, 8 * 4 * 3, 8
    assert case.compulsory(5) == 2 * (5 * x + weight + bias + 5 * x)
    assert case.products(5) == 2 * 5 * 16 * 3 * 4 * 8 and case.reported == 8
    eager = moved(case.eager(5))
    # The convolution and its bias, sigmoid(z), 1 - g, and two products and a sum.
    assert eager["convolution"] == 2 * (5 * x + weight + bias + 2 * 5 * x)
    assert eager["sigmoid"] == eager["rsub"] == 2 * 2 * 5 * x and eager["add"] == 2 * 3 * 5 * x
    assert len(operations(case.eager(5))) == 6


def test_what_lora_linear_has_to_move() -> None:
    shape = bench_lora_linear.Shape(1000, 64, 96, 4)
    x, y, weight, adapter = 64, 96, 64 * 96, 4 * (64 + 96)
    forward, exact = (bench_lora_linear.model_case(shape, "bf16", exact) for exact in (False, True))
    assert forward.reported == 1 and forward.compulsory(1) == 2 * (1000 * (x + y) + weight + adapter)
    assert exact.compulsory(1) - forward.compulsory(1) == 2 * adapter
    training = bench_lora_linear.model_case(shape, "bf16", training=True)
    kept = 1000 * (4 * 4 + 64 // 8)
    assert training.compulsory(1) == 2 * (1000 * (3 * x + 2 * y) + 2 * weight + 3 * adapter) + 2 * kept
    assert forward.products(1) == 2 * 1000 * 64 * 96 and training.products(1) == 2 * forward.products(1)


@pytest.mark.slow
@needs_nvcc
def test_lora_linear_without_dropout_keeps_no_partial_sums_of_many_rows() -> None:
    shape = bench_lora_linear.Shape(4096, 256, 64, 4)
    case = bench_lora_linear.model_case(shape, "bf16", dropout=0.0)
    found = gpu_model.estimate(case, check=False)
    x, s, expanded = 4096 * 256 * 2, 4096 * 4 * 4, 4096 * 8 * 2
    factors = 2 * 4 * 256 * 2  # arranged for a tile of 32 columns, of which 4 exist
    assert x + s + expanded < found.launchers["lora_linear_shrink"].moved < x + s + expanded + factors
    assert found.kept == found.ours.moved - x, "the product reads x again"


def arguments(path: Path) -> list[str]:
    return ["child_update", "--model", "gpu", "--dtype", "bf16", "--case", "parameters", "--json", str(path)]


@pytest.mark.slow
@needs_nvcc
def test_the_whole_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments(tmp_path / "now.json")) == 0
    printed = capsys.readouterr().out
    assert "A MODEL, NOT A MEASUREMENT" in printed and "exactly linear" in printed and "PASS" in printed
    written = json.loads((tmp_path / "now.json").read_text())
    assert written["complete"] and [r["title"] for r in written["results"]] == ["step, F", "step, D"]
    drawn, stored = written["results"]
    elements = 2**24
    assert drawn["compulsory"]["moved"] == elements * (3 * 2 + 16) and drawn["deviation"] == 0
    assert set(drawn["launchers"]) == {"child_update"}
    assert 1 <= drawn["ratio"] < 1.01 and 1 <= stored["ratio"] < 1.15
    assert stored["counted"] == [1, 2, 3] and stored["reported"] == 512 and stored["deviation"] < 0.01
    seconds = drawn["model_seconds"]["H100"]
    assert seconds["ours"] == pytest.approx(drawn["launchers"]["child_update"]["moved"] / 3.35e12)
    assert seconds["compulsory"] <= seconds["ours"] < seconds["eager"]


@pytest.mark.slow
@needs_nvcc
def test_builds_that_count_and_that_do_not_live_in_one_process() -> None:
    found = [build_operator("child_update", "80", count=count) for count in (False, True)]
    operators = [getattr(torch.ops, library.namespace)._child_square_sum.default for library in found]
    assert operators[0] is not operators[1]


@pytest.mark.slow
@needs_nvcc
def test_wrong_kernels_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(dtype: torch.dtype) -> None:
        raise GateFailure("p: not finite")

    monkeypatch.setattr(bench_child_update, "check", check)
    assert command.main(arguments(tmp_path / "now.json")) == 1
    written = json.loads((tmp_path / "now.json").read_text())
    assert [r["failure"] for r in written["results"]] == ["GateFailure: p: not finite"] * 2


@needs_nvcc
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gated_conv", "--model", "gpu", "--quick", "--list", "--dtype", "bf16"]) == 0
    assert "gated_conv1d  bf16  B128 L256 C128 K3 d4  forward" in capsys.readouterr().out.splitlines()
    for wrong, message in [(["--device", "cuda"], "goes with"), (["--case", "nothing"], "no case")]:
        with pytest.raises(SystemExit) as error:
            command.main(["--model", "gpu", *wrong])
        assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(bool(ptx_on_cpu.unavailable(cuda=False)), reason=f"{ptx_on_cpu.unavailable(cuda=False)}")
def test_kernels_of_triton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "now.json"
    given = ["child_update", "--model", "gpu-triton", "--dtype", "bf16", "--case", "parameters", "--json", str(path)]
    assert command.main(given) == 0
    assert "PTX of the Triton kernels" in capsys.readouterr().out
    written = json.loads(path.read_text())
    drawn, stored = written["results"]
    assert written["kernels"] == "Triton" and set(drawn["launchers"]) == {"child_update"} and drawn["deviation"] == 0
    assert 1 <= drawn["ratio"] < 1.01 and 1 <= stored["ratio"] < 1.15


def test_tiles_that_are_never_tried_are_not_counted() -> None:
    """Where a call has several adapters the largest tile of the product is left out."""
    pytest.importorskip("triton")
    from pykernels.triton_kernels.lora_linear import lora_product

    every = max(lora_product.configs, key=gpu_model_triton._tile)
    lora_product.nargs = {"index": torch.zeros(1)}
    with gpu_model_triton._largest_tiles():
        (several,), (one,) = lora_product.prune_configs({}), lora_product.prune_configs({"index": None})
    lora_product.nargs = None
    assert one is every and several.kwargs["BLOCK_M"] == 64


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_model, "unavailable", lambda: "needs nvcc, in CUDA_HOME or PATH")
    with pytest.raises(SystemExit) as error:
        command.main(["--model", "gpu"])
    assert error.value.code == 2 and "needs nvcc" in capsys.readouterr().err


def test_kernels_of_triton_need_no_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    build = importlib.import_module("tests.ptx_on_cpu.build")  # the package has a function of that name
    monkeypatch.setattr(build, "nvcc", lambda: None)
    monkeypatch.setattr(build, "cxx", lambda: "g++")
    assert gpu_model_triton.unavailable() is None
    monkeypatch.setattr(build, "cxx", lambda: None)
    with pytest.raises(SystemExit) as error:
        command.main(["--model", "gpu-triton"])
    assert error.value.code == 2 and "--model gpu-triton: needs g++" in capsys.readouterr().err
