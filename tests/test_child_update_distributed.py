"""ChildTuning's optimizers on sharded parameters, in real processes: the bits of one process, and distributed
checkpoints that load into other numbers of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import pykernels
from pykernels import ChildTuningAdamW, ChildTuningSGD

if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

STEPS = 3
BACKENDS = ("reference",) if pykernels._extension._C is None else ("cpu", "reference")
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW F": {"lr": 0.01, "weight_decay": 0.1, "seed": 7, "reserve_p": 0.4},
    "AdamW D": {"lr": 0.01, "weight_decay": 0.1, "mode": "D"},
    "AdamW F clipped": {"lr": 0.01, "seed": 7, "max_grad_norm": 0.5, "where": "update"},
    "SGD F": {"lr": 0.1, "momentum": 0.9, "seed": 8},
    "SGD D": {"lr": 0.1, "momentum": 0.9, "mode": "D"},
}


class Model(nn.Module):
    """Sizes that four processes do not share equally: 7 rows leave the last with one, 1 leaves three with none."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in {"a": (7, 33), "b": (16, 24), "c": (1,), "d": (13,), "e": (6, 10, 9)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in model.named_parameters() if name != "d"}


def optimizer(model: nn.Module, kind: str, masks: dict[str, Tensor] | None) -> torch.optim.Optimizer:
    cls = ChildTuningAdamW if kind.startswith("AdamW") else ChildTuningSGD
    return cls(model.named_parameters(), masks=masks if OPTIONS[kind].get("mode") == "D" else None, **OPTIONS[kind])


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """With the same global gradients on any number of processes."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(100 + t)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()


def whole(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


def expected(kind: str, count: int) -> dict[str, Tensor]:
    model = Model()
    steps(model, optimizer(model, kind, masks_of(model)), 0, count)
    return values(model)


def shard(model: nn.Module, layout: str) -> nn.Module:
    """As FSDP2, its hybrid form, tensor parallelism, or both."""
    world = torch.distributed.get_world_size()
    if layout == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    if layout == "hybrid":
        names = ("replicate", "shard")
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names))
    mesh = init_device_mesh("cpu", (2, world // 2) if layout == "box" else (world,))
    for name, p in list(model.named_parameters()):
        placements: list[Any] = [Shard(p.dim() - 1)]
        if layout == "box":
            placements = [Shard(1), Shard(p.dim() - 1)] if p.dim() == 3 else [Replicate(), Shard(0)]
        setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))
    return model


def process(rank: int, world: int, folder: str, layouts: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        for layout, kind, backend in itertools.product(layouts, OPTIONS, BACKENDS):
            pykernels.set_backend(backend)
            model = shard(Model(), layout)
            own = optimizer(model, kind, masks_of(Model()))
            steps(model, own, 0, STEPS)
            result = values(model)
            if rank == 0:
                torch.save(result, f"{folder}/{layout} {kind} {backend}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "layouts"), [(1, ["fsdp"]), (2, ["fsdp", "columns"]), (4, ["fsdp", "hybrid", "box"])]
)
def test_the_parameters_of_one_process(world: int, layouts: list[str], tmp_path: Path) -> None:
    """Bit for bit: uneven and empty shards, rows, columns, and boxes of three-dimensional parameters."""
    mp.spawn(process, (world, str(tmp_path), layouts), nprocs=world)
    for kind, backend in itertools.product(OPTIONS, BACKENDS):
        pykernels.set_backend(backend)
        try:
            right = expected(kind, STEPS)
        finally:
            pykernels.set_backend(None)
        for layout in layouts:
            got = torch.load(tmp_path / f"{layout} {kind} {backend}.pt")
            for name, p in right.items():
                assert torch.equal(got[name], p), f"{layout} {kind} {backend} {name}"


# --- GradScaler ---


BAD = 1  # the step whose gradient is not finite, in one element of one process


def scaled_steps(model: nn.Module, own: torch.optim.Optimizer, name: str) -> float:
    """Steps with scaled gradients, of which one has an infinity in the last element of a parameter; the last scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    for t in range(STEPS + 1):
        generator = torch.Generator().manual_seed(100 + t)
        for key, p in model.named_parameters():
            grad = torch.randn(p.shape, generator=generator) * scaler.get_scale()
            if t == BAD and key == name:
                grad.view(-1)[-1] = float("inf")
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        scaler.step(own)
        scaler.update()
    return scaler.get_scale()


def placed(order: str) -> nn.Module:
    """Two parameters, one of which all processes have whole: a layout by which GradScaler may not reduce."""
    model, mesh = nn.Module(), init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    placements = {"whole": Replicate(), "rows": Shard(0)}
    for name in order.split():
        tensor = distribute_tensor(torch.ones(4, 3), mesh, [placements[name]])
        model.register_parameter(name, nn.Parameter(tensor))
    return model


def scaled(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        for backend in BACKENDS:
            pykernels.set_backend(backend)
            for layout, kind in itertools.product(("fsdp", "columns"), ("AdamW F", "AdamW D", "AdamW F clipped")):
                model = shard(Model(), layout)
                own = optimizer(model, kind, masks_of(Model()))
                scale = scaled_steps(model, own, "a")
                counts = {int(own.state[p]["step"]) for p in model.parameters()}
                torch.save((values(model), scale, counts), f"{folder}/{layout} {kind} {backend} {rank}.pt")
            for order in ("rows whole", "whole rows"):
                model, said = placed(order), ""
                before = {name: p.clone() for name, p in values(model).items()}
                try:
                    scaled_steps(model, ChildTuningAdamW(model.parameters(), lr=0.1), "rows")
                except RuntimeError as error:
                    said = str(error)
                moved = {name: not torch.equal(p, before[name]) for name, p in values(model).items()}
                torch.save((said, moved), f"{folder}/{order} {backend} {rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_an_infinity_on_one_process_leaves_the_step_out_on_all(tmp_path: Path) -> None:
    """As in one process, bit for bit, and the next scale too; where GradScaler cannot know of it, all refuse."""
    mp.spawn(scaled, (2, str(tmp_path)), nprocs=2)
    for backend in BACKENDS:
        for kind in ("AdamW F", "AdamW D", "AdamW F clipped"):
            pykernels.set_backend(backend)
            try:
                model = Model()
                assert scaled_steps(model, optimizer(model, kind, masks_of(model)), "a") == 8.0
            finally:
                pykernels.set_backend(None)
            for layout, rank in itertools.product(("fsdp", "columns"), range(2)):
                got, scale, counts = torch.load(tmp_path / f"{layout} {kind} {backend} {rank}.pt")
                assert scale == 8.0 and counts == {STEPS}, f"{layout} {kind} {rank}"
                for name, p in values(model).items():
                    assert torch.equal(got[name], p), f"{layout} {kind} {backend} {rank} {name}"
        for rank in range(2):
            assert torch.load(tmp_path / f"rows whole {backend} {rank}.pt") == ("", {"rows": True, "whole": True})
            said, moved = torch.load(tmp_path / f"whole rows {backend} {rank}.pt")
            assert said.startswith("found_inf: expected the same on all processes (GradScaler: with a first parameter")
            assert said.endswith("got gradients that are not finite on 1 of 2 processes")
            assert moved == {"rows": True, "whole": True}, "by the steps before"


# --- checkpoints ---


SAVED = ("AdamW F", "AdamW D", "SGD D")


def checkpoint(rank: int, world: int, folder: str, variants: list[tuple[bool, bool]] | None) -> None:
    """Saves, or loads with (sharded, whether the masks are known) and goes on."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/s{world}", rank=rank, world_size=world)
    try:
        for (sharded, with_masks), kind in itertools.product(variants or [(True, True)], SAVED):
            model = shard(Model(), "fsdp") if sharded else Model()
            own: Any = optimizer(model, kind, masks_of(Model()) if with_masks else None)
            own.dense_state_dict = not sharded
            if variants is None:
                steps(model, own, 0, STEPS)
            state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, own)}
            if variants is None:
                dcp.save(state, checkpoint_id=f"{folder}/{kind}")
                continue
            dcp.load(state, checkpoint_id=f"{folder}/{kind}")
            model.load_state_dict(state["model"])
            set_optimizer_state_dict(model, own, state["optimizer"])
            moment = own.state[model.a]["exp_avg" if "AdamW" in kind else "momentum_buffer"]
            kept = (moment.dtype, moment.dim(), own.state[model.a].get("mask") is not None)
            steps(model, own, STEPS, 2 * STEPS)
            result = values(model)
            if rank == 0:
                torch.save((result, kept), f"{folder}/{kind} {world} {sharded} {with_masks}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_checkpoints_load_into_other_numbers_of_processes(tmp_path: Path) -> None:
    """Saved at 2, loaded at 1 and 4, also by optimizers that know no masks, and continued as if never interrupted."""
    loads = {1: [(True, True), (False, False)], 4: [(True, False)]}
    mp.spawn(checkpoint, (2, str(tmp_path), None), nprocs=2)
    for world, variants in loads.items():
        mp.spawn(checkpoint, (world, str(tmp_path), variants), nprocs=world)
        for (sharded, with_masks), kind in itertools.product(variants, SAVED):
            got, kept = torch.load(tmp_path / f"{kind} {world} {sharded} {with_masks}.pt")
            for name, p in expected(kind, 2 * STEPS).items():
                assert torch.equal(got[name], p), f"{kind} {world} {name}"
            assert kept == (torch.float32, 1 if kind.endswith("D") else 2, kind.endswith("D"))
