"""What `python -m bench --device cuda` writes, with times that are given: no GPU is there to measure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import bench_gated_conv, on_cuda
from bench.jobs import GateFailure
from bench.on_cuda import Case, Group
from pykernels import _backend


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """What measure() finds from now on."""
    found = {"ours": (1e-4, 2e-4), "eager": (3e-4, 4e-4), "late": (float("nan"), 5e-4)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="a GPU"))
    monkeypatch.setattr(on_cuda, "measure", lambda group: found)
    return found


def groups() -> Iterator[Group]:
    yield Group("forward", {}, 2e9)


def bad_groups() -> Iterator[Group]:
    yield Group("forward", {}, 2e9)
    raise ValueError("dx: not finite")


def interrupted_groups() -> Iterator[Group]:
    raise KeyboardInterrupt
    yield


def test_json_has_every_number(times: dict[str, tuple[float, float]], tmp_path: Path) -> None:
    path = tmp_path / "now.json"
    cases = [Case("gated_conv1d", "B1 L8", "bf16", groups), Case("gated_conv1d", "B2 L8", "tf32", bad_groups)]
    assert on_cuda.run(cases, path, ["--device", "cuda"]) == 1
    written = json.loads(path.read_text())
    assert (written["device"], written["complete"], written["arguments"]) == ("a GPU", True, ["--device", "cuda"])
    assert written["versions"]["torch"] == torch.__version__
    first, second = written["results"]
    assert (first["operator"], first["case"], first["dtype"]) == ("gated_conv1d", "B1 L8", "bf16")
    (group,) = first["groups"]
    assert (group["title"], group["flops"]) == ("forward", 2e9)
    assert group["variants"]["eager"] == {"device_seconds": 3e-4, "called_seconds": 4e-4}
    assert group["variants"]["late"] == {"device_seconds": None, "called_seconds": 5e-4}
    assert first["failure"] is None and second["failure"] == "ValueError: dx: not finite"
    assert len(second["groups"]) == 1


def test_an_interrupted_run_keeps_what_was_finished(times: dict[str, tuple[float, float]], tmp_path: Path) -> None:
    path = tmp_path / "now.json"
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyboardInterrupt):
        on_cuda.run([Case("a", "b", "tf32", groups), Case("a", "c", "tf32", interrupted_groups)], path)
    written = json.loads(path.read_text())
    assert not written["complete"] and [result["case"] for result in written["results"]] == ["b"]
    assert torch.get_float32_matmul_precision() == before


def test_the_command_line_passes_the_file_on(
    times: dict[str, tuple[float, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_gated_conv, "_on_cuda", lambda shape, dtype: groups())
    arguments = ["gated_conv", "--device", "cuda", "--quick", "--dtype", "bf16", "--json", str(tmp_path / "now.json")]
    assert command.main(arguments) == 0
    written = json.loads((tmp_path / "now.json").read_text())
    assert written["arguments"] == arguments and len(written["results"]) == len(bench_gated_conv.CUDA_QUICK_SHAPES)


def test_the_same_call_by_triton(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    look = lambda: seen.append(_backend.default())  # noqa: E731
    before = _backend.default()
    call = on_cuda.by_triton(look)(look)
    assert call is not None and seen == ["triton"]
    call()
    call()
    assert seen == ["triton"] * 3 and _backend.default() == before != "triton"

    def wrong() -> None:
        raise GateFailure("dx: not finite\nand more")

    assert on_cuda.by_triton(wrong)(look) is None and _backend.default() == before
    assert capsys.readouterr().out == "  triton failed: dx: not finite\n"


def test_options_that_do_not_go_with_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["--device", "cuda", "--threads", "2"])
    assert error.value.code == 2 and "goes with" in capsys.readouterr().err
