"""`python -m pykernels.env`: what it says, and how it finds the limits of threads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pykernels import _extension, env


def run(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "pykernels.env", *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_json_is_what_is_installed(tmp_path: Path) -> None:
    info = json.loads(run("--json", cwd=tmp_path))
    assert info["versions"]["torch"] == str(torch.__version__)
    assert info["versions"]["triton"] and info["versions"]["numpy"]
    assert info["threads"]["torch"] >= 1 and info["threads"]["affinity"] >= 1
    assert info["cuda_archs"] == env.cuda_archs()
    assert info["extension"]["reason"] == _extension.reason
    if _extension._C is not None:
        assert info["cpu"]["tier"] in [tier["name"] for tier in info["cpu"]["tiers"] if tier["usable"]]
        assert info["extension"]["torch"] == str(torch.__version__)
        assert "-mavx2" not in info["extension"]["tiers"]["generic"]


def test_every_operator_has_a_reference_and_every_refusal_a_reason(tmp_path: Path) -> None:
    rows = json.loads(run("--json", cwd=tmp_path))["operators"]
    operators = {row["operator"] for row in rows}
    assert {"attention_pool", "gated_conv1d"} <= operators
    for operator in operators:
        served = {row["backend"]: row for row in rows if row["operator"] == operator}
        assert {"reference", "cpu", "cuda", "triton"} <= set(served)
        assert not served["reference"]["why_not"]
    for row in rows:
        assert row["why_not"] or (row["devices"] and "float32" in row["dtypes"])


def test_page_names_tiers_and_operators(capsys: pytest.CaptureFixture[str]) -> None:
    env.main([])
    page = capsys.readouterr().out
    assert str(torch.__version__) in page and "gated_conv1d" in page
    assert f"CUDA archs built  {env.cuda_archs() or 'none'}" in page
    if _extension._C is not None:
        for name, _, why_not in _extension._C.cpu_tiers():
            assert f"  {name}" in page and why_not in page


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        env.main(["--help"])
    assert leave.value.code == 0
    assert "python -m pykernels.env --json" in capsys.readouterr().out


def test_what_cannot_be_imported_is_explained() -> None:
    """#21: a triton that breaks at import is a line on the page, not the end of it."""
    assert env.version("torch") == str(torch.__version__)
    assert "not available (ModuleNotFoundError" in env.version("no_such_package")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_control_groups_2(tmp_path: Path) -> None:
    """The least limit of all levels counts; a path that does not exist (a container's view) leaves the root."""
    cgroup, mount = tmp_path / "cgroup", tmp_path / "mount"
    write(cgroup, "0::/pod/box\n")
    assert env.cpu_quota(cgroup, mount) is None
    write(mount / "cpu.max", "max 100000\n")
    assert env.cpu_quota(cgroup, mount) is None
    write(mount / "pod" / "cpu.max", "800000 100000\n")
    write(mount / "pod" / "box" / "cpu.max", "max 100000\n")
    assert env.cpu_quota(cgroup, mount) == 8
    write(mount / "pod" / "box" / "cpu.max", "150000 100000\n")
    assert env.cpu_quota(cgroup, mount) == 1.5


@pytest.mark.parametrize(
    "controllers, folder", [("cpu", "cpu"), ("cpu,cpuacct", "cpu,cpuacct"), ("cpuacct,cpu", "cpu")]
)
def test_quota_of_control_groups_1(tmp_path: Path, controllers: str, folder: str) -> None:
    cgroup, mount = tmp_path / "cgroup", tmp_path / "mount"
    write(cgroup, f"9:cpuset:/box\n4:{controllers}:/box\n0::/\n")
    write(mount / folder / "cpu.cfs_quota_us", "-1\n")
    write(mount / folder / "cpu.cfs_period_us", "100000\n")
    assert env.cpu_quota(cgroup, mount) is None
    write(mount / folder / "box" / "cpu.cfs_quota_us", "250000\n")
    write(mount / folder / "box" / "cpu.cfs_period_us", "100000\n")
    assert env.cpu_quota(cgroup, mount) == 2.5


def test_no_control_groups(tmp_path: Path) -> None:
    assert env.cpu_quota(tmp_path / "absent", tmp_path) is None


def test_hint_where_torch_has_more_threads_than_cpus() -> None:
    """A 384-core host with an 8-CPU container: the default number of threads is throttled."""
    assert env.thread_hint(8, affinity=384, quota=8.0) == ""
    assert env.thread_hint(4, affinity=4, quota=None) == ""
    assert "torch.set_num_threads(8)" in env.thread_hint(192, affinity=384, quota=8.5)
    assert "torch.set_num_threads(1)" in env.thread_hint(2, affinity=2, quota=0.5)
    assert "torch.set_num_threads(2)" in env.thread_hint(4, affinity=2, quota=None)
