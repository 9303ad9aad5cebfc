"""fisher_masks against the recorded output of the paper's code and against sorted values."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import pykernels
from pykernels.child_update import unpack_mask
from pykernels.fisher_masks import kth_largest


def fisher_masks(model: nn.Module, *arguments: Any, **options: Any) -> dict[str, Tensor]:
    """pykernels.fisher_masks, unpacked."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    masks = pykernels.fisher_masks(model, *arguments, **options)
    assert all(mask.dtype == torch.uint8 and mask.shape == (-(-shapes[n].numel() // 8),) for n, mask in masks.items())
    return {name: unpack_mask(mask, shapes[name]) for name, mask in masks.items()}


def in_one_process(counts: Tensor) -> Tensor:
    return counts


# --- the k-th largest ---


@pytest.mark.parametrize("n", [1, 2, 17, 1000, 100_003])
@pytest.mark.parametrize("values", ["small", "wide", "equal", "few", "subnormal"])
def test_the_kth_largest_is_exact(n: int, values: str):
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, generator=generator)
    x = {
        "small": x**8,
        "wide": torch.exp(100 * x - 60).clamp(max=3e38),
        "equal": torch.full_like(x, 0.25),
        "few": (x * 3).floor(),
        "subnormal": x * 1e-39,
    }[values]
    tensors = [x[: n // 3].clone(), x[n // 3 :].clone(), torch.zeros(0)]
    ordered = x.sort(descending=True).values
    for k in {1, n, (n + 1) // 2, max(1, n // 7)}:
        assert kth_largest(tensors, k, in_one_process) == ordered[k - 1].item()


def test_the_kth_largest_looks_at_long_tensors_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.import_module("pykernels.fisher_masks"), "_CHUNK", 64)
    x = torch.rand(30, 40, generator=torch.Generator().manual_seed(1)).square()
    assert kth_largest([x.T], 100, in_one_process) == x.flatten().sort(descending=True).values[99].item()


# --- masks ---


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(torch.tanh(self.dense(x)) + x)


class Classifier(nn.Module):
    """Names as BERT's."""

    def __init__(self, words: int = 13, width: int = 6, classes: int = 2):
        super().__init__()
        self.embeddings = nn.Embedding(words, width)
        self.LayerNorm = nn.LayerNorm(width)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([Block(width) for _ in range(2)])
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.LayerNorm(self.embeddings(ids))
        for layer in self.encoder.layer:
            x = layer(x)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch["ids"]), batch["labels"])


def classifier(seed: int = 1) -> Classifier:
    torch.manual_seed(seed)
    return Classifier()


def batches(count: int = 3, rows: int = 4) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        ids = torch.randint(0, 13, (rows, 5), generator=generator)
        yield {"ids": ids, "labels": ids[:, 0] % 2}


def squares(model: nn.Module, parts: Iterator[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    for part in parts:
        grads = torch.autograd.grad(loss_of(model, part), [parameters[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            total[name] += grad**2
    return total


def expected(fisher: dict[str, Tensor], p: float) -> dict[str, Tensor]:
    every = torch.cat([f.flatten() for f in fisher.values()]).double()
    threshold = torch.quantile(every, 1 - p)
    return {name: f.double() >= threshold for name, f in fisher.items()}


BLOCK_NAMES = [name for name, _ in Classifier().named_parameters() if "layer" in name]


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("include", ["layer", None])
def test_masks_hold_the_largest_squares_of_all_tensors_together(p: float, include: str | None):
    model = classifier()
    masks = fisher_masks(model, loss_of, batches(), p, **({"include": include} if include else {}))
    want = expected(squares(model, batches(), BLOCK_NAMES), p)
    assert list(masks) == BLOCK_NAMES
    for name, mask in masks.items():
        assert torch.equal(mask, want[name]), name


def test_samples_are_squared_one_by_one():
    model = classifier()
    masks = fisher_masks(model, loss_of, batches(), 0.3, accumulate="sample")
    rows = ({key: t[i : i + 1] for key, t in batch.items()} for batch in batches() for i in range(4))
    want = expected(squares(model, rows, BLOCK_NAMES), 0.3)
    assert all(torch.equal(mask, want[name]) for name, mask in masks.items())
    batch_wise = fisher_masks(model, loss_of, batches(), 0.3)
    assert any(not torch.equal(mask, batch_wise[name]) for name, mask in masks.items())


Pair = namedtuple("Pair", ["x", "rest"])


def test_samples_of_nested_batches():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 2))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    seen = []

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        seen.append((batch.x.shape, batch.rest[1], batch.rest[2].shape))
        return mse_loss(model(batch.x), batch.rest[0])

    fisher_masks(model, loss, [Pair(x, (y, "kept as it is", torch.tensor(1.0)))], 0.5, accumulate="sample")
    assert seen == [((1, 3), "kept as it is", ())] * 5


def test_everything_is_reserved_at_one_and_where_entries_tie():
    model = classifier()
    assert all(mask.all() for mask in fisher_masks(model, loss_of, batches(), 1.0).values())
    for layer in model.encoder.layer:  # no gradient reaches the first block's dense layer
        layer.dense.weight.data.zero_()
        layer.forward = layer.LayerNorm.forward
    with pytest.warns(UserWarning, match="all entries are reserved"):
        masks = fisher_masks(model, loss_of, batches(), 0.9)
    assert all(mask.all() for mask in masks.values())


def test_nothing_else_is_changed():
    model = classifier()
    model.pooler.weight.requires_grad_(False)
    held = torch.randn(6)
    model.pooler.bias.grad = held
    model.encoder.layer[0].dense.bias.grad = held.clone()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    masks = fisher_masks(model, loss_of, batches(), 0.3, include=lambda name, p: p.dim() == 2)
    assert "pooler.weight" not in masks and "classifier.weight" in masks and "pooler.bias" not in masks
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.pooler.bias.grad is held and torch.equal(model.encoder.layer[0].dense.bias.grad, held)
    assert model.classifier.weight.grad is None

    def fails(model: nn.Module, batch: Any) -> Tensor:
        loss_of(model, batch).backward()
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        fisher_masks(model, fails, batches())
    assert model.pooler.bias.grad is held and model.classifier.weight.grad is None


def test_a_bar_counts_the_batches(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    fisher_masks(classifier(), loss_of, list(batches(3)), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_bfloat16_parameters_are_squared_in_float32():
    model = classifier().bfloat16()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros(parameters[name].shape) for name in BLOCK_NAMES}
    for batch in batches():
        for name, grad in zip(
            BLOCK_NAMES,
            torch.autograd.grad(loss_of(model, batch), [parameters[name] for name in BLOCK_NAMES]),
            strict=True,
        ):
            total[name] += grad.float() ** 2
    want = expected(total, 0.3)
    assert all(torch.equal(m, want[name]) for name, m in fisher_masks(model, loss_of, batches(), 0.3).items())


def recorded() -> tuple[Any, dict[str, Any]]:
    import numpy

    folder = os.environ.get("PYKERNELS_DATA")
    path = Path(folder or "", "golden", "child_tuning.npz")
    if not folder or not path.exists():
        pytest.skip("PYKERNELS_DATA has no golden/child_tuning.npz")
    data = numpy.load(path)
    return data, json.loads(str(data["__meta__"]))["fisher"]


def test_masks_equal_those_of_the_papers_code():
    """Its squares are made the squared gradients of as many parameters."""
    data, meta = recorded()
    squares = {name: torch.from_numpy(data["fisher/fisher_concat"][a:b]) for name, a, b in meta["concat_order"]}
    model = nn.Module()
    for name, f in squares.items():
        model.register_parameter(name.replace(".", "/"), nn.Parameter(torch.zeros_like(f)))

    def loss(model: nn.Module, roots: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * roots[name.replace("/", ".")]).sum() for name, p in model.named_parameters()]).sum()

    roots = {name: f.double().sqrt().float() for name, f in squares.items()}
    masks = fisher_masks(model, loss, [roots], meta["reserve_p"], include="layer")
    assert len(masks) == len(squares)
    for name in squares:
        want = torch.from_numpy(data[f"fisher/mask/{name}"])
        assert torch.equal(masks[name.replace(".", "/")].view(want.shape), want), name


def test_each_gradient_is_clipped_alone():
    model, limit = classifier(), 0.1
    total: dict[str, Tensor] = {}
    norms = []
    for batch in batches():
        model.zero_grad()
        loss_of(model, batch).backward()
        for name, p in model.named_parameters():
            norms.append(torch.nn.utils.clip_grad_norm_([p], limit))
            total[name] = total.get(name, 0.0) + p.grad**2
    assert min(norms) < limit < max(norms)
    model.zero_grad()
    masks = fisher_masks(model, loss_of, batches(), 0.3, include="", max_grad_norm=limit)
    want = expected(total, 0.3)
    assert list(masks) == list(want)
    assert all(torch.equal(mask, want[name]) for name, mask in masks.items())


def test_the_optimizer_takes_the_masks():
    model = classifier()
    masks = fisher_masks(model, loss_of, batches(), 0.3)
    packed = pykernels.fisher_masks(model, loss_of, batches(), 0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = pykernels.ChildTuningAdamW(model.named_parameters(), lr=0.1, weight_decay=0.0, mode="D", masks=packed)
    loss_of(model, next(batches())).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        moved = p != before[name]
        assert not moved[~masks[name]].any() if name in masks else True
        assert moved.any() or not masks.get(name, torch.ones(1)).any(), name


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reserve_p": 0.0}, ValueError, "reserve_p: expected 0 < reserve_p <= 1, got 0.0"),
        ({"reserve_p": math.nan}, ValueError, "reserve_p: expected 0 < reserve_p <= 1, got nan"),
        ({"reserve_p": "0.3"}, TypeError, "reserve_p: expected a float, got str"),
        ({"accumulate": "mean"}, ValueError, "accumulate: expected one of 'batch', 'sample', got 'mean'"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm: expected > 0, got 0.0"),
        ({"include": "no such name"}, ValueError, "include: expected to choose some of the 15 trained parameters"),
        ({"include": "("}, ValueError, "include: expected a regular expression"),
        ({"include": 3}, TypeError, "include: expected a regular expression or a function, got int"),
        ({"batches": []}, ValueError, "batches: expected at least one batch, got none"),
        ({"loss_fn": lambda m, b: m(b["ids"])}, TypeError, r"loss_fn: expected to return a 0-d tensor .*\[4, 2\]"),
        ({"loss_fn": lambda m, b: 1.0}, TypeError, "loss_fn: expected to return a 0-d tensor .* got float"),
        ({"loss_fn": lambda m, b: loss_of(m, b).detach()}, TypeError, "loss_fn: .* requires a gradient"),
        ({"loss_fn": lambda m, b: loss_of(m, b) * math.nan}, ValueError, "loss_fn: expected finite gradients"),
        (
            {"batches": [{"ids": torch.zeros(2, 5).long(), "labels": torch.zeros(3).long()}], "accumulate": "sample"},
            ValueError,
            r"batches: expected tensors of equal first dimension for the samples, got \[2, 3\]",
        ),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str):
    given = {"loss_fn": loss_of, "batches": list(batches()), **arguments}
    with pytest.raises(error, match=message):
        fisher_masks(classifier(), **given)


# --- shards ---


def _masks_of_shards(rank: int, world: int, file: str, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        sizes, names = ((world,), ("shard",)) if world < 4 else ((2, 2), ("copy", "shard"))
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        model = classifier()
        for layer in model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        masks = fisher_masks(model, loss_of, batches(), 0.3)
        torch.save(masks, f"{out}.{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_shards_have_the_masks_of_the_whole(world: int, tmp_path: Path):
    """fully_shard over 2 processes, and over 2 x 2 with copies."""
    mp.spawn(_masks_of_shards, (world, str(tmp_path / "meet"), str(tmp_path / "masks")), nprocs=world)
    want = fisher_masks(classifier(), loss_of, batches(), 0.3)
    for rank in range(world):
        masks = torch.load(tmp_path / f"masks.{rank}", weights_only=True)
        assert list(masks) == list(want)
        for name, mask in masks.items():
            assert torch.equal(mask, want[name]), name
