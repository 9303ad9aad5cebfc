"""The fine-tuning example in several processes: shares of a batch, the results of one process, signals, messages."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import finetune
import pytest
import torch
import torch.multiprocessing as mp
from finetune import shared_loss
from sentence_classifier import HEAD, Fit, Pretrained, Sentences, loss_of

import kit.processes
from kit.processes import Processes
from kit.run import Refused
from tests.finetune_runs import arguments

pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def another_accelerator() -> Iterator[None]:
    """Its state is global."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_shares_make_up_the_batch(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    """The mean over processes of losses and gradients is the batch's, also where shares are unequal or empty."""
    model, train = pretrained.classifier(1, dropout=0.0), parts["train"]

    class One(Processes):
        def __init__(self, rank: int, count: int) -> None:
            self.rank, self.count = rank, count

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, model.get_submodule(HEAD).weight)[0]

    for chosen, count in (([1, 2, 3, 4, 5, 6, 7], 3), ([5], 2), ([3, 4], 1)):
        whole = loss_of(model, train, chosen)
        losses = [shared_loss(One(rank, count), model, train, chosen, False) for rank in range(count)]
        assert sum(losses).item() / count == pytest.approx(whole.item(), rel=1e-5)
        torch.testing.assert_close(sum(map(gradient, losses)) / count, gradient(whole), rtol=1e-4, atol=1e-6)


def test_one_process_is_alone() -> None:
    alone = Processes()
    assert (alone.rank, alone.count, alone.main) == (0, 1, True) and alone.share([3, 4]) == [3, 4]
    t = torch.tensor([2.0])
    assert alone.sum(t) is t and alone.mean(t) is t and alone.from_main(lambda: 5) == 5
    with pytest.raises(Refused, match="why"):
        alone.from_main(lambda: (_ for _ in ()).throw(Refused("why")))


SHARED = ["--dropout", "0", "--limit", "31", "--seeds", "1"]  # a batch of an epoch has 7 sentences, the others 8


def assert_alike(task: Path, bert: Path, folder: Path, some: list[str]) -> None:
    """The results of two processes and those of one, but for what rounding does."""
    assert finetune.main(arguments(task, bert, folder / "alone", *some)) == 0
    one, other = (json.loads((folder / name / "results.json").read_text()) for name in ("alone", "run"))
    assert list(one) == list(other)
    for name, result in one.items():
        assert result["losses"] == pytest.approx(other[name]["losses"], rel=1e-4), name
        assert result["dev"] == pytest.approx(other[name]["dev"], rel=1e-3), name
        assert result["trained"] == pytest.approx(other[name]["trained"], abs=2), name
        assert (result["processes"], other[name]["processes"]) == (1, 2)


def test_two_processes_of_torchrun(task: Path, bert: Path, tmp_path: Path) -> None:
    """The losses, masks and scores of one, printed and written by the first alone."""
    some = [*SHARED, "--train", "loraplus", "--optimizers", "F", "D", "--loraplus-lr", "5e-3"]
    argv = arguments(task, bert, tmp_path / "run", *some, "--save")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(ROOT / "examples" / "finetune.py"), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_alike(task, bert, tmp_path, some)
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("loraplus ")]
    assert rows == [["loraplus", "F"], ["loraplus", "D"]] and "processes: 2, 1 threads" in done.stdout
    assert len(list((tmp_path / "run" / "models").iterdir())) == 2


def process(rank: int, port: int, argv: list[str]) -> None:
    """A signal to the second one; then both go on, and both are refused."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    calls, step = [], Fit.step

    def counted(self: Fit) -> float:
        calls.append(1)
        if rank == 1 and len(calls) == 9:  # a run takes 6
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    finetune.Fit.step = counted  # type: ignore[method-assign]
    gc.freeze()
    kit.processes.PATIENCE = 0.0
    assert finetune.main(argv) == 130 and len(calls) == 9, "the step is finished, in both"
    assert finetune.main([*argv, "--resume", "auto"]) == 0 and len(calls) == 9 + 6
    assert finetune.main(argv) == 2, "the run is there"
    assert finetune.main([*argv, "--resume", "auto", "--seeds", "2", "--out", f"{argv[5]}-2", "--full-lr", "1e30"]) == 3
    torch.distributed.destroy_process_group()


def test_a_signal_to_one_of_two(task: Path, bert: Path, tmp_path: Path) -> None:
    """Stops both after the same step; the run that goes on ends as one that was not stopped."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    some = [*SHARED, "--train", "full", "--optimizers", "adamw", "D"]
    argv = arguments(task, bert, tmp_path / "run", *some)
    assert argv[4] == "--out"
    mp.spawn(process, (port, argv), nprocs=2)
    assert_alike(task, bert, tmp_path, some)


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit.processes, "PATIENCE", 0.0)
    monkeypatch.setenv("RANK", "1")
    assert finetune.main(["--data", "x", "--rank", "0"]) == 2
    assert kit.processes.told_by_first(lambda: print("here") or 0) == 0
    assert capsys.readouterr() == ("", "")
