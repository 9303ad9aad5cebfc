"""The extractor of 2019: inference of its trunk, a training step, and its smaller preset beside the full one.

Batches are like those of SKE's training sentences, whose lengths are drawn here: 56 characters in the mean, padded to
128. ``python -m bench dgcnn_extractor``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pykernels import GatedConv1d
from pykernels.models import DGCNNExtractor, DGCNNExtractorConfig
from pykernels.models.dgcnn_extractor import PRESETS, Spans, Targets, extractor_loss

from . import gate
from .breakdown import breakdown
from .harness import OURS, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .machine import DTYPES
from .model_baselines import AVERAGE, OPTIMIZER, EagerBlock, Step, autocast

NAME = "DGCNN extractor"
REFERENCE = "ours, reference backend"
REDUCED, EAGER_REDUCED = "ours, reduced", "eager, reduced"
GEMMS = "bare GEMMs of the blocks"
BATCHES = (16, 64)
L, D, PREDICATES, VOCABULARY, WORD_SIZE = 128, 128, 48, 2800, 128
# The lengths of SKE's training sentences: so many characters at most have so large a share. The longest 4 % are cut.
SHARES = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.96, 1)
CHARACTERS = (8, 22, 26, 33, 46, 70, 100, 121, L, L)
CONFIGS = {
    name: DGCNNExtractorConfig(VOCABULARY, PREDICATES, **{"word_size": WORD_SIZE, **preset})
    for name, preset in PRESETS.items()
}
BLOCK_FLOPS = 2 * 3 * D * 2 * D
Optimizer = partial(torch.optim.Adam, lr=1e-3, eps=1e-7)


class Batch(NamedTuple):
    """Arguments of the network, its targets and the live characters [B, L]."""

    characters: Tensor
    words: Tensor | None
    start: Tensor
    end: Tensor
    targets: Targets
    mask: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return self if self.words is None else self._replace(words=self.words.to(dtype))

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.characters, self.start, self.end, self.words


def make_batch(config: DGCNNExtractorConfig, rows: int, longest: int = L) -> Batch:
    """Random sentences with the lengths of SKE's, each with a subject of up to four characters."""
    generator = torch.Generator().manual_seed(40)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=generator)

    spread = np.interp(np.linspace(0, 1, rows), SHARES, CHARACTERS) * longest / L
    lengths = torch.from_numpy(spread.round()).long()[torch.randperm(rows, generator=generator)]
    mask = torch.arange(longest) < lengths[:, None]
    characters = torch.randint(1, VOCABULARY, (rows, longest), generator=generator) * mask
    words = torch.randn(rows, longest, config.word_size, generator=generator) * mask[..., None]
    start = (uniform(rows) * lengths).long()
    end = torch.minimum(start + (4 * uniform(rows)).long(), lengths - 1)
    subjects = Spans(*((uniform(rows, longest) < 0.03).float() for _ in range(2)))
    objects = Spans(*((uniform(rows, longest, PREDICATES) < 0.001).float() for _ in range(2)))
    return Batch(characters, words if config.word_size else None, start, end, Targets(subjects, objects), mask)


def eager_copy(model: DGCNNExtractor) -> DGCNNExtractor:
    """The same network and weights with EagerBlocks; all else is plain PyTorch in both."""
    other = copy.deepcopy(model)
    for i, block in enumerate(other.blocks):
        assert isinstance(block, GatedConv1d)
        other.blocks[i] = EagerBlock(block)
    return other


def reference_copy(model: DGCNNExtractor) -> DGCNNExtractor:
    other = DGCNNExtractor(model.config, backend="reference")
    other.load_state_dict(model.state_dict())
    return other


class Criterion(nn.Module):
    """The loss as a module, so that a breakdown can name it."""

    def forward(self, subjects: Spans, objects: Spans, batch: Batch) -> Tensor:
        return extractor_loss(subjects, objects, batch.targets, batch.mask)


CRITERION = Criterion()


def loss_of(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    with autocast(dtype):
        subjects, objects = model(*batch.inputs)
    return CRITERION(subjects, objects, batch)


def parts(model: DGCNNExtractor) -> dict[str, Sequence[nn.Module]]:
    found: dict[str, Sequence[nn.Module]] = {
        "embedding": [model.embedding],
        "gated convolutions": list(model.blocks),
        "self-attention": [model.subject_attention, model.object_attention],
        "convolutions of the heads": [model.subject_head, model.object_head],
        "other layers of the heads": [
            *(model.starts, model.ends, model.occurs),
            *(model.subject_pointers, model.object_exists, model.object_pointers),
        ],
        "loss": [CRITERION],
    }
    return found if model.subject_gru is None else found | {"BiGRU": [model.subject_gru]}


def flops(config: DGCNNExtractorConfig, live: int, heads: bool) -> int:
    """Of the convolutions and the projections of self-attention for so many characters, with or without the heads."""
    attended = config.heads * config.head_size
    trunk = len(config.dilations) * BLOCK_FLOPS + 2 * D * 3 * attended
    return live * (trunk + heads * (2 * D * 3 * attended + 2 * 3 * D * (2 * (D + attended) + 2 * D)))


def check_network(preset: str, dtype: str) -> None:
    """Loss and gradients without dropout against fp64, on a batch small enough for it."""
    torch.manual_seed(41)
    model = DGCNNExtractor(CONFIGS[preset]).eval()
    batch = make_batch(model.config, 4, 64)

    def results(network: DGCNNExtractor, given: Batch, dtype: str) -> dict[str, Tensor]:
        first, last = (network.blocks[i] for i in (0, -1))
        weights = [b.conv.weight if isinstance(b, EagerBlock) else b.weight for b in (first, last)]
        loss = loss_of(network, given, dtype)
        grads = torch.autograd.grad(loss, weights)
        return {"y": loss.detach(), "dfirst": grads[0], "dlast": grads[1]}

    eager = eager_copy(model)
    exact = results(copy.deepcopy(eager).double(), batch.to(torch.float64), "fp32")
    terms = dict.fromkeys(exact, len(model.blocks) * 3 * D * 2 * D)
    if failure := gate.compare(results(model, batch, dtype), results(eager, batch, dtype), exact, terms):
        raise GateFailure(failure)


def run_trunk(preset: str, rows: int, session: Session, result: Result) -> None:
    torch.manual_seed(42)
    model = DGCNNExtractor(CONFIGS[preset]).eval()
    dtype, batch = DTYPES[result.dtype], make_batch(model.config, rows)
    live, blocks = int(batch.mask.sum()), len(model.blocks)
    a, b = torch.randn(live, 3 * D).to(dtype), torch.randn(3 * D, 2 * D).to(dtype)

    def rows_of(network: DGCNNExtractor, words: Tensor | None) -> dict[str, Tensor]:
        trunk = network.trunk(batch.characters, words)
        return {"y": trunk.t * trunk.mask[..., None], "attended": trunk.attended * trunk.mask[..., None]}

    with torch.no_grad():
        exact = rows_of(eager_copy(model).double(), batch.to(torch.float64).words)
        eager, reference = eager_copy(model).to(dtype), reference_copy(model).eval().to(dtype)
        model.to(dtype)
        for block in model.blocks:
            block.prepack()  # as Extractor.load does
        words = batch.to(dtype).words
        terms = dict.fromkeys(exact, blocks * 3 * D)
        if failure := gate.compare(rows_of(model, words), rows_of(eager, words), exact, terms):
            raise GateFailure(failure)
        given = batch.characters, words
        variants: dict[str, Call | None] = {
            OURS: partial(model.trunk, *given),
            "eager": partial(eager.trunk, *given),
            REFERENCE: partial(reference.trunk, *given),
            "torch.compile": session.compiled(result, "forward", eager.trunk, lambda f: partial(f, *given)),
            GEMMS: lambda: [a @ b for _ in range(blocks)],
        }
        session.group(result, "forward", variants, flops=flops(model.config, live, heads=False))


def run_step(preset: str, rows: int, session: Session, result: Result) -> None:
    session.tick("checking")
    check_network(preset, result.dtype)
    torch.manual_seed(43)
    model = DGCNNExtractor(CONFIGS[preset])
    batch = make_batch(model.config, rows)
    eager = eager_copy(model)
    loss = partial(loss_of, batch=batch, dtype=result.dtype)

    def compiled_step(compiled: Callable[..., Tensor]) -> Step:
        return Step(eager_copy(model), compiled, Optimizer)

    steps = {OURS: Step(model, loss, Optimizer), "eager": Step(eager, loss, Optimizer)}
    variants: dict[str, Call | None] = {
        **steps,
        REFERENCE: Step(reference_copy(model), loss, Optimizer),
        "torch.compile": session.compiled(result, "training step", loss, compiled_step),
    }
    live = int(batch.mask.sum())
    session.group(result, "training step", variants, flops=3 * flops(model.config, live, heads=True))
    for name, network in ((OURS, model), ("eager", eager)):
        session.tick(f"profiling {name}")
        result.stages[name] = breakdown(steps[name], parts(network), (OPTIMIZER, AVERAGE))
        tensors = [t for t in (*batch.inputs, *batch.targets.subjects, *batch.targets.objects) if t is not None]
        result.saved_bytes[name] = gate.saved_bytes(partial(loss, network), [*network.parameters(), *tensors])


def run_presets(rows: int, session: Session, result: Result) -> None:
    """Both presets in one run, so that what the smaller one saves is a ratio of the same minutes."""
    names = {"full": (OURS, "eager"), "reduced": (REDUCED, EAGER_REDUCED)}
    inference: dict[str, Call | None] = {}
    training: dict[str, Call | None] = {}
    for preset, (ours, eager) in names.items():
        session.tick(f"checking {preset}")
        check_network(preset, result.dtype)
        torch.manual_seed(44)
        model = DGCNNExtractor(CONFIGS[preset])
        batch = make_batch(model.config, rows)
        loss = partial(loss_of, batch=batch, dtype=result.dtype)
        training |= {name: Step(m, loss, Optimizer) for name, m in ((ours, model), (eager, eager_copy(model)))}
        dtype = DTYPES[result.dtype]
        for name, network in ((ours, copy.deepcopy(model)), (eager, eager_copy(model))):
            inference[name] = partial(network.to(dtype).eval(), *batch.to(dtype).inputs)
    with torch.no_grad():
        session.group(result, "forward", inference)
    session.group(result, "training step", training)


def jobs(options: Options) -> list[Job]:
    found = []
    seconds = options.effort.seconds
    presets, batches = (["full"], BATCHES[:1]) if options.quick else (list(PRESETS), BATCHES)
    for dtype in (name for name in options.dtypes if name != "fp16"):
        for preset in presets:
            for rows in batches:
                work = 60 * flops(CONFIGS[preset], rows * L, heads=False)
                run = partial(run_trunk, preset, rows)
                found.append(Job(NAME, f"{preset} trunk B{rows} L{L}", dtype, seconds, work, run))
                if options.quick:  # bench_models.py has a smaller step
                    continue
                work = 60 * flops(CONFIGS[preset], rows * L, heads=True)
                run = partial(run_step, preset, rows)
                found.append(Job(NAME, f"{preset} training step B{rows} L{L}", dtype, 4 * seconds, work, run))
        rows = batches[-1]
        work = 60 * flops(CONFIGS["full"], rows * L, heads=True)
        found.append(Job(NAME, f"both presets B{rows} L{L}", dtype, 2 * seconds, work, partial(run_presets, rows)))
    return found


@pytest.mark.parametrize("variant", [OURS, "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_dgcnn_extractor_step(benchmark, preset: str, dtype: str, variant: str) -> None:
    check_network(preset, dtype)
    torch.manual_seed(43)
    model = DGCNNExtractor(CONFIGS[preset])
    loss = partial(loss_of, batch=make_batch(model.config, BATCHES[-1]), dtype=dtype)
    step = Step(model if variant == OURS else eager_copy(model), loss, Optimizer)
    benchmark.group = f"DGCNN extractor {preset} {dtype} training step"
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
