"""The reader of 2019: a training step, and inference of its passage trunk. ``python -m bench dgcnn_reader``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pykernels import AttentionPool
from pykernels.models import DGCNNReader, DGCNNReaderConfig
from pykernels.models.dgcnn_reader import reader_loss
from pykernels.models.radam import RAdam

from . import gate, peers
from .harness import OURS, Bar, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .machine import DTYPES
from .model_baselines import EagerBlock, EagerPool, Step, autocast

NAME = "DGCNN reader"
REFERENCE = "ours, reference backend"
B, L, QUESTION, D = 128, 256, 30, 128
CONFIG = DGCNNReaderConfig(vocabulary_size=5000)
Optimizer = partial(RAdam, lr=1e-4)
TRUNK_BATCHES = (128, 10, 1)
STEP_LIMIT = 0.2
TRUNK_LIMITS = {128: 0.35, 10: 0.30, 1: 0.45}  # of OpenVINO's time in bf16
GEMMS = "six bare GEMMs"
# Of a block, and of one pass of the whole network without its embeddings and heads.
BLOCK_FLOPS = 2 * 3 * D * 2 * D
FORWARD_FLOPS = B * (L * (6 * BLOCK_FLOPS + 2 * (2 * D) ** 2) + QUESTION * (3 * BLOCK_FLOPS + 2 * D * D))


def eager_copy(model: DGCNNReader) -> DGCNNReader:
    """The same network and weights with EagerBlocks and EagerPools; all else is plain PyTorch in both."""
    other = copy.deepcopy(model)
    for blocks in (other.question_blocks, other.passage_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = EagerBlock(block)
    other.question_pool, other.passage_pool = EagerPool(other.question_pool), EagerPool(other.passage_pool)
    return other


def batch(rows: int, length: int, question: int) -> tuple[Tensor, ...]:
    """Question, passage, their word vectors and targets, without padding."""
    generator = torch.Generator().manual_seed(30)
    ids = [torch.randint(1, CONFIG.vocabulary_size, (rows, n), generator=generator) for n in (question, length)]
    vectors = [torch.randn(rows, n, CONFIG.word_size, generator=generator) for n in (question, length)]
    target = (torch.rand(rows, length, generator=generator) < 0.01).float()
    return (*ids, *vectors, target)


def loss_of(model: nn.Module, inputs: tuple[Tensor, ...], dtype: str) -> Tensor:
    question, passage, question_words, passage_words, target = inputs
    with autocast(dtype):
        start, end = model(question, passage, question_words, passage_words)
    return reader_loss(start, end, target, target, passage)


def check_network(dtype: str) -> None:
    """Loss and gradients without dropout against fp64, on a batch small enough for it."""
    torch.manual_seed(31)
    model = DGCNNReader(CONFIG).eval()
    inputs = batch(4, 64, 10)

    def results(network: nn.Module, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
        wanted = {"passage": network.passage_blocks[3], "question": network.question_blocks[1]}
        weights = {n: b.conv.weight if isinstance(b, EagerBlock) else b.weight for n, b in wanted.items()}
        loss = loss_of(network, given, dtype if given is inputs else "")
        grads = torch.autograd.grad(loss, list(weights.values()))
        return {"y": loss.detach()} | {f"d{name}": g for name, g in zip(weights, grads, strict=True)}

    eager = eager_copy(model)
    doubles = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    exact = results(copy.deepcopy(eager).double(), doubles)
    # The loss is a sum over positions; its gradients pass six blocks of 3 * D * 2 * D products.
    terms = dict.fromkeys(exact, 6 * 3 * D * 2 * D)
    if failure := gate.compare(results(model, inputs), results(eager, inputs), exact, terms):
        raise GateFailure(failure)


def run_step(session: Session, result: Result) -> None:
    dtype = result.dtype
    session.tick("checking")
    check_network(dtype)
    torch.manual_seed(32)
    model, inputs = DGCNNReader(CONFIG), batch(B, L, QUESTION)
    eager = eager_copy(model)
    reference = DGCNNReader(CONFIG, backend="reference")
    reference.load_state_dict(model.state_dict())

    def loss(network: nn.Module) -> Tensor:
        return loss_of(network, inputs, dtype)

    compiled = session.compiled(result, "training step", loss, lambda f: Step(eager_copy(model), f, Optimizer))
    variants: dict[str, Call | None] = {
        OURS: Step(model, loss, Optimizer),
        "eager": Step(eager, loss, Optimizer),
        REFERENCE: Step(reference, loss, Optimizer),
        "torch.compile": compiled,
    }
    bars = [Bar(OURS, "eager", STEP_LIMIT)] if dtype == "bf16" and session.options.tier is None else []
    session.group(result, "training step", variants, bars, 3 * FORWARD_FLOPS)
    for name, network in ((OURS, model), ("eager", eager)):
        given = [*network.parameters(), *inputs]
        result.saved_bytes[name] = gate.saved_bytes(partial(loss, network), given)


class Trunk(nn.Module):
    """The six passage blocks and attention pooling: x [B, L, D] -> [B, D]."""

    def __init__(self, blocks: nn.ModuleList, pool: nn.Module) -> None:
        super().__init__()
        self.blocks, self.pool = blocks, pool

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.pool(x)


def open_peers(
    trunk: Trunk, x: Tensor, exact: Tensor, session: Session, result: Result, opened: ExitStack
) -> dict[str, Call]:
    """The other runtimes that are installed, in the precision of this case; each must come near the exact result."""
    bf16, threads = result.dtype == "bf16", session.options.threads
    makers: dict[str, Callable[[bytes], peers.Peer]] = {
        peers.OPENVINO: lambda model: peers.openvino(model, x, threads, "bf16" if bf16 else "f32")
    }
    if not bf16:  # it computes in the model's own type, and the export is float32
        makers[peers.ONNX_RUNTIME] = lambda model: peers.onnx_runtime(model, x, threads)
    missing = [name for name in makers if not peers.installed(name)]
    if missing:
        result.notes.append(f"not measured, not installed (pip install '.[peers]'): {', '.join(missing)}")
    found: dict[str, Call] = {}
    for name in (name for name in makers if name not in missing):
        session.tick(f"exporting for {name}")
        try:
            peer = opened.enter_context(makers[name](peers.export(trunk, x)))
        except peers.PeerError as failure:
            result.notes.append(f"not measured: {failure}")
            continue
        found[name] = peer
        error, largest = (peer().double() - exact).abs().max().item(), exact.abs().max().item()
        if error > (0.1 if bf16 else 1e-3) * largest:
            raise GateFailure(f"{name}: error {error:.3g} of values up to {largest:.3g}")
    return found


def run_trunk(rows: int, session: Session, result: Result) -> None:
    torch.manual_seed(33)
    model = DGCNNReader(CONFIG)
    pool = AttentionPool(D, D)
    eager, ours = Trunk(eager_copy(model).passage_blocks, EagerPool(pool)), Trunk(model.passage_blocks, pool)
    x = torch.randn(rows, L, D, generator=torch.Generator().manual_seed(34))
    factors = torch.randn(rows * L, 3 * D), torch.randn(3 * D, 2 * D)
    dtype = DTYPES[result.dtype]
    with torch.no_grad(), ExitStack() as opened:
        exact = {"y": copy.deepcopy(eager).double().eval()(x.double())}
        others = open_peers(copy.deepcopy(eager).eval(), x, exact["y"], session, result, opened)
        ours, eager, x = ours.to(dtype).eval(), copy.deepcopy(eager).to(dtype).eval(), x.to(dtype)
        if failure := gate.compare({"y": ours(x)}, {"y": eager(x)}, exact, {"y": 6 * 3 * D}):
            raise GateFailure(failure)
        a, b = (t.to(dtype) for t in factors)
        variants: dict[str, Call | None] = {
            OURS: partial(ours, x),
            "eager": partial(eager, x),
            "torch.compile": session.compiled(result, "forward", eager, lambda f: partial(f, x)),
            **others,
            GEMMS: lambda: [a @ b for _ in range(6)],
        }
        limited = result.dtype == "bf16" and not session.options.tier
        bars = [Bar(OURS, peers.OPENVINO, TRUNK_LIMITS[rows])] if limited else []
        session.group(result, "forward", variants, bars, rows * L * (6 * BLOCK_FLOPS + 2 * D * D))


def jobs(options: Options) -> list[Job]:
    found = []
    for dtype in (name for name in options.dtypes if name != "fp16"):
        seconds = options.effort.seconds
        if not options.quick:  # bench_models.py has a smaller one
            found.append(Job(NAME, f"training step B{B} L{L}", dtype, 4 * seconds, 60 * FORWARD_FLOPS, run_step))
        for rows in TRUNK_BATCHES[1:] if options.quick else TRUNK_BATCHES:
            flops = 40 * rows * L * 6 * BLOCK_FLOPS
            found.append(Job(NAME, f"passage trunk B{rows} L{L}", dtype, seconds, flops, partial(run_trunk, rows)))
    return found


@pytest.mark.parametrize("variant", [OURS, "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dgcnn_reader_step(benchmark, dtype: str, variant: str) -> None:
    check_network(dtype)
    torch.manual_seed(32)
    model, inputs = DGCNNReader(CONFIG), batch(B, L, QUESTION)
    loss = partial(loss_of, inputs=inputs, dtype=dtype)
    step = Step(model if variant == OURS else eager_copy(model), loss, Optimizer)
    benchmark.group = f"DGCNN reader {dtype} training step"
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
