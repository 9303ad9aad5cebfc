"""Other runtimes in processes of their own: they compute the same network, and fail by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import harness, peers
from pykernels import AttentionPool, GatedConv1d

THREADS = 1


class Trunk(nn.Module):
    """Two blocks and attention pooling, of odd sizes; plain PyTorch, which is what an export holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GatedConv1d(12, 12, 3, dilation=d, backend="reference") for d in (1, 2))
        self.pool = AttentionPool(12, 12, backend="reference")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.pool(x)


def need(name: str) -> None:
    if not peers.installed(name):
        pytest.skip(f"{name} is not installed: pip install '.[peers]'")


@pytest.mark.parametrize(
    ("name", "precision", "eps"),
    [
        (peers.ONNX_RUNTIME, "f32", torch.finfo(torch.float32).eps),
        (peers.OPENVINO, "f32", torch.finfo(torch.float32).eps),
        (peers.OPENVINO, "bf16", torch.finfo(torch.bfloat16).eps),
    ],
)
def test_computes_the_exported_network(name: str, precision: str, eps: float) -> None:
    need(name)
    torch.manual_seed(1)
    trunk, x = Trunk().eval(), torch.randn(3, 17, 12)
    with torch.no_grad():
        exact = trunk.double()(x.double())
        trunk.float()
        model = peers.export(trunk, x)
    make = partial(peers.openvino, precision=precision) if name == peers.OPENVINO else peers.onnx_runtime
    with make(model, x, THREADS) as peer:
        y = peer()
        assert y.dtype == torch.float32 and y.shape == (3, 12)
        # Sums of 36 products, rounded after each of nine steps: two blocks of four, and the pooling.
        allowed = 9 * 36**0.5 * eps * exact.abs().max().item()
        assert (y.double() - exact).abs().max().item() <= allowed
        assert torch.equal(y, peer())


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_what_a_runtime_cannot_read_is_an_error_that_names_it(name: str) -> None:
    need(name)
    make = partial(peers.openvino, precision="f32") if name == peers.OPENVINO else peers.onnx_runtime
    with pytest.raises(peers.PeerError, match=f"^{name}: .+"):
        make(b"no model", torch.ones(1, 2), THREADS)


# --- the process, with a sum of numpy in place of a runtime ---


@pytest.fixture
def peer() -> Iterator[peers.Peer]:
    ones = np.ones((2, 3), dtype=np.float32)
    with peers.Peer("stand-in", partial(partial, np.add, ones, ones)) as started:
        yield started
    assert not started.process.is_alive()


def test_answers_with_outputs_and_samples(peer: peers.Peer) -> None:
    assert torch.equal(peer(), torch.full((2, 3), 2.0))
    begun = time.perf_counter()
    taken = peer.sample(1000, True)
    assert 0 < taken.elapsed < time.perf_counter() - begun and taken.lost >= 0


def test_measured_among_other_variants(peer: peers.Peer) -> None:
    effort = harness.Effort(seconds=0.1, min_rounds=4, max_rounds=4, sample_seconds=0.001)
    timings = harness.measure({harness.OURS: lambda: sum(range(100)), "peer": peer}, effort).timings
    assert set(timings) == {harness.OURS, harness.AGAIN, "peer"}
    assert all(len(t.seconds) == 4 and min(t.seconds) > 0 for t in timings.values())
    # A call is shorter than a sample should be, so that many are timed together, over there.
    assert timings["peer"].inner > 1 and timings["peer"].median < 0.001


def test_a_process_that_died_is_reported_by_name(peer: peers.Peer) -> None:
    os.kill(peer.process.pid, signal.SIGKILL)
    peer.process.join()
    for call in (peer, partial(peer.sample, 1, False)):
        with pytest.raises(peers.PeerError, match="stand-in: its process ended with SIGKILL"):
            call()


def test_a_process_that_dies_while_it_measures_is_no_hang(peer: peers.Peer) -> None:
    killer = threading.Timer(0.2, os.kill, (peer.process.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(peers.PeerError, match="stand-in: its process ended with SIGKILL"):
        peer.sample(10**12, False)
    killer.join()


def test_a_process_that_exits_while_it_builds_is_reported_by_name() -> None:
    with pytest.raises(peers.PeerError, match="stand-in: its process ended with status 3"):
        peers.Peer("stand-in", partial(os._exit, 3))


def test_a_process_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.2)
    with pytest.raises(peers.PeerError, match=r"stand-in: no answer from its process in 0\.2 s"):
        peers.Peer("stand-in", partial(time.sleep, 600))


def test_an_error_over_there_is_an_error_here(peer: peers.Peer) -> None:
    with pytest.raises(peers.PeerError, match="stand-in: TypeError: .*str"):
        peer.sample("many", False)


def test_busy_threads_are_waited_for() -> None:
    until = time.perf_counter() + 0.1

    def spin() -> None:
        while time.perf_counter() < until:
            pass

    spinning = threading.Thread(target=spin)
    spinning.start()
    harness.fall_asleep()
    assert time.perf_counter() >= until
    spinning.join()
