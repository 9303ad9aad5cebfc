"""The ChildTuning example: methods that see the same, masks of the task, what is reported, and runs that go on."""

from __future__ import annotations

import copy
import json
import math
import signal
from pathlib import Path
from typing import Any

import finetune_childtuning
import pytest
import torch
from child_training import masks_for, parameter_groups, state_bytes, trained_share
from finetune_childtuning import METHODS, ChildConfig, draw, optimizer_of, table, train_seed
from sentence_classifier import Fit, Plan, Pretrained, Sentences, loss_of
from sentence_data import PACKAGE

from kit.progress import Progress
from kit.stop import Stop, Stopped
from pykernels import ChildTuningAdamW, fisher_masks
from pykernels.child_update import unpack_mask
from tests.recorded import recorded

pytest.importorskip("transformers", reason="transformers is not installed")


def trained(
    pretrained: Pretrained, parts: dict[str, Sentences], *, stop: Stop | None = None, **options: Any
) -> dict[str, Any]:
    config = ChildConfig(**{"data": "x", "steps": 8, "batch_size": 16, "block": 3, "lr": 5e-3, **options})
    with Progress(1, quiet=True) as progress:
        return train_seed(config, pretrained, parts, 1, progress, stop or Stop())


# --- optimizers and masks ---


def test_biases_and_layer_norms_do_not_decay_and_names_stay(pretrained: Pretrained) -> None:
    model = pretrained.classifier(1)
    groups = parameter_groups(model, 0.01)
    names = [{name for name, _ in group["params"]} for group in groups]
    assert names[0] | names[1] == set(dict(model.named_parameters())) and not names[0] & names[1]
    assert names[1] == {n for n in names[0] | names[1] if n.endswith("bias") or "LayerNorm" in n}
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


def test_options_reach_the_optimizers(pretrained: Pretrained) -> None:
    model = pretrained.classifier(1)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if ".layer." in name}
    config = ChildConfig(data="x", lr=1e-3, reserve_p=0.25, weight_decay=0.1, clip=0.7)
    made = {method: optimizer_of(config, method, model, masks, 5) for method in METHODS}
    groups = {method: own.param_groups for method, own in made.items()}
    assert type(made["plain"]) is torch.optim.AdamW and groups["plain"][0]["fused"]
    assert {method: group[0]["lr"] for method, group in groups.items()} == {
        "plain": 1e-3, "F": 1e-3, "F-scaled": 2e-3, "D": 1e-3,
    }  # fmt: skip
    for method in ("F", "F-scaled", "D"):
        assert isinstance(made[method], ChildTuningAdamW)
        wanted = {"mode": method[0], "reserve_p": 0.25, "seed": 5, "max_grad_norm": 0.7, "weight_decay": 0.1}
        assert wanted.items() <= groups[method][0].items() and groups[method][1]["weight_decay"] == 0
    assert sum("mask" in state for state in made["D"].state.values()) == len(masks)
    assert optimizer_of(ChildConfig(data="x", clip=0.0), "F", model, None, 5).param_groups[0]["max_grad_norm"] is None


def test_masks_are_those_of_fisher_masks_on_the_task(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    """Of the first batches in the seed's order, one step of the progress each; weights and gradients stay."""
    model, train = pretrained.classifier(1, dropout=0.0), parts["train"]
    before = copy.deepcopy(model.state_dict())
    config = ChildConfig(data="x", batch_size=16, fisher_batches=3, reserve_p=0.2)
    loss = lambda model, chosen: loss_of(model, train, chosen)  # noqa: E731
    with Progress(3, quiet=True) as progress:
        masks = masks_for(config, model, loss, train, 7, progress, Stop())
        assert progress.done == 3
    batches = train.batches(16, 7, 0)[:3]
    wanted = fisher_masks(model, loss, batches, 0.2, max_grad_norm=1.0)
    assert masks.keys() == wanted.keys() and all(torch.equal(masks[name], wanted[name]) for name in wanted)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    blocks = sum(p.numel() for name, p in model.named_parameters() if name in masks)
    whole = sum(p.numel() for p in model.parameters())
    selected = sum(int(unpack_mask(masks[n], p.shape).sum()) for n, p in model.named_parameters() if n in masks)
    assert selected == pytest.approx(0.2 * blocks, abs=2)
    assert trained_share(model, masks) == pytest.approx((whole - blocks + selected) / whole)
    # Moments, bits and the number of steps.
    own = optimizer_of(config, "D", model, masks, 1)
    bits = sum(mask.numel() for mask in masks.values())
    assert state_bytes(own) == 8 * (whole - blocks + selected) + bits + 4 * len(list(model.parameters()))


def test_three_epochs_where_no_steps_are_given() -> None:
    assert ChildConfig(data="x", batch_size=100).steps_of(192) == 6
    assert ChildConfig(data="x", batch_size=64).steps_of(192) == 9
    assert ChildConfig(data="x", steps=4).steps_of(192) == 4


# --- training ---


def test_whole_masks_are_plain_adamw(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    """With p = 1 all methods are one, but for rounding: clipping in the step or before it, dropout, the masks' pass."""
    result = trained(pretrained, parts, methods=METHODS, reserve_p=1.0, clip=0.5, fisher_batches=2)
    plain = result["plain"]["losses"]
    assert len(plain) == 8 and plain[-1] < plain[0] and result["masks"]["trained"] == 1.0
    for method in METHODS:
        assert result[method]["losses"] == pytest.approx(plain, rel=1e-3), method
        assert [step for step, _ in result[method]["dev"]] == [3, 5, 8]


def test_methods_differ_and_take_turns(
    pretrained: Pretrained, parts: dict[str, Sentences], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, step = [], Fit.step
    monkeypatch.setattr(Fit, "step", lambda self: (made.append(type(self.optimizer).__name__), step(self))[1])
    result = trained(pretrained, parts, methods=("plain", "F", "D"), fisher_batches=2)
    first = {method: result[method]["losses"][0] for method in ("plain", "F", "D")}
    assert len(set(first.values())) == 1, "the same weights, batch and dropout"
    assert len({result[method]["losses"][-1] for method in first}) == 3
    plain = [i for i, name in enumerate(made) if name == "AdamW"]
    assert plain == [0, 1, 2, 15, 16, 17, 18, 19], "the order turns round"
    assert result["F"]["state_bytes"] == result["plain"]["state_bytes"] > result["D"]["state_bytes"]
    for method in first:
        assert 0 < result[method]["update_seconds"] < result[method]["seconds"]


def test_every_method_learns(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    train = parts["train"].first(32)
    options = {"steps": 70, "methods": METHODS, "reserve_p": 0.5, "dropout": 0.0}
    result = trained(pretrained, {"train": train, "dev": train}, **options)
    for method in METHODS:
        assert result[method]["dev"][-1][1]["accuracy"] > 0.9, method


def test_bfloat16_products_keep_float32_weights(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    model = pretrained.classifier(1, dropout=0.0)
    fit = Fit(copy.deepcopy(model), lambda m: torch.optim.SGD(m.parameters(), 0.0), parts["train"], Plan(1, 16))
    half = Fit(model, lambda m: torch.optim.SGD(m.parameters(), 0.0), parts["train"], Plan(1, 16, autocast=True))
    exact, rounded = fit.step(), half.step()
    assert exact != rounded == pytest.approx(exact, rel=0.02)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_stop_between_two_batches_of_the_masks(pretrained: Pretrained, parts: dict[str, Sentences]) -> None:
    stop = Stop()
    stop.requested = True
    with pytest.raises(Stopped):
        trained(pretrained, parts, stop=stop, methods=("D",))


# --- what is reported ---


def made_up(accuracy: float, matthews: float, end: float) -> dict[str, Any]:
    losses = [1.0] * 50 + [end] * 50
    scores = [[50, {"accuracy": 0.1, "matthews": 0.0, "loss": 1.0}]]
    scores.append([100, {"accuracy": accuracy, "matthews": matthews, "loss": 2 * end}])
    return {"losses": losses, "seconds": 0.2, "update_seconds": 0.05, "state_bytes": 1_500_000, "dev": scores}


def test_table_and_picture(tmp_path: Path) -> None:
    config = ChildConfig(data="x", methods=("plain", "D"))
    found = [
        {"masks": {"seconds": 1.0, "trained": 0.68}, "plain": made_up(0.7, 0.2, 0.5), "D": made_up(0.8, 0.3, 0.4)},
        {"masks": {"seconds": 2.0, "trained": 0.68}, "plain": made_up(0.7, 0.4, 0.5), "D": made_up(0.8, 0.3, 0.4)},
    ]
    lines = table(config, found).splitlines()
    deviation = f"{0.2 / math.sqrt(2):.4f}"
    assert lines[2].split() == ["plain", *"0.7000 +- 0.0000".split(), "0.3000", "+-", deviation] + (
        "1.0000 +- 0.0000 0.5000 +- 0.0000 200.0 50.0 1.5".split()
    )
    assert lines[3].split()[:7] == "D 0.8000 +- 0.0000 0.3000 +- 0.0000".split()
    assert lines[4] == "D trains 68.0 % of the parameters; its masks took 1.5 s"
    draw(config, found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


# --- the whole ---


def arguments(task: Path, bert: Path, out: Path, *more: str) -> list[str]:
    known = ["--data", str(task), "--encoder", str(bert), "--out", str(out), "--max-length", "24", "--threads", "1"]
    return [*known, "--quiet", "--quick", *more]


def test_the_whole_and_its_resumption(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = arguments(task, bert, tmp_path / "run")
    assert finetune_childtuning.main(quick) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[3:6]] == ["plain", "F", "D"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["seed 1", "seed 2"] and results["seed 1"]["F"] != results["seed 2"]["F"]

    assert finetune_childtuning.main(quick) == 2
    assert "holds a run already: give --resume auto" in capsys.readouterr().err
    made, step = [], Fit.step
    monkeypatch.setattr(Fit, "step", lambda self: (made.append(self.plan.seed), step(self))[1])
    assert finetune_childtuning.main([*quick, "--resume", "auto"]) == 0
    assert capsys.readouterr().out == printed and not made
    assert finetune_childtuning.main([*quick, "--resume", "auto", "--seeds", "3"]) == 0
    assert made == [3] * 18 and "dev.tsv: 3 seeds" in capsys.readouterr().out, "the third alone was trained"
    assert finetune_childtuning.main([*quick, "--resume", "auto", "--lr", "1"]) == 2
    assert "was begun with other options: lr: 0.0001, now 1.0" in capsys.readouterr().err


def test_a_signal_keeps_what_is_finished(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run that goes on ends as one that was not stopped."""
    made, step = [], Fit.step

    def signalled(self: Fit) -> float:
        made.append(1)
        if len(made) == 18 + 7:  # a seed takes 18
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    assert finetune_childtuning.main(arguments(task, bert, tmp_path / "whole")) == 0
    monkeypatch.setattr(Fit, "step", signalled)
    argv = arguments(task, bert, tmp_path / "run")
    assert finetune_childtuning.main(argv) == 130
    assert "--resume auto goes on after the runs that are finished" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())) == ["seed 1"]
    assert finetune_childtuning.main([*argv, "--resume", "auto"]) == 0
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "run"))
    for seed in ("seed 1", "seed 2"):
        for method in ("plain", "F", "D"):
            assert one[seed][method]["losses"] == other[seed][method]["losses"]
            assert one[seed][method]["dev"] == other[seed][method]["dev"]


def test_sentence_pairs(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RTE's form."""
    rows = [f"{i}\tthe cat sat on a mat\tthe {('cat', 'dog')[i % 2]} sat\t{('no', 'yes')[i % 2]}" for i in range(24)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    assert finetune_childtuning.main(arguments(tmp_path, bert, tmp_path / "run", "--methods", "F")) == 0
    assert capsys.readouterr().out.count("\nF  ") == 1


def test_real_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """all-MiniLM-L6-v2 on RTE: D's state is smaller by what the numbered layers do not train."""
    pytest.importorskip(PACKAGE, reason=f"{PACKAGE} is not installed")
    data = recorded("data", "glue", "RTE")
    some = ["--quick", "--seeds", "1", "--steps", "2", "--methods", "plain", "D", "--quiet"]
    assert finetune_childtuning.main(["--data", str(data), "--out", str(tmp_path), *some]) == 0
    result = json.loads((tmp_path / "results.json").read_text())["seed 1"]
    blocks, whole = 10_646_784, 22_713_986
    assert result["plain"]["state_bytes"] == pytest.approx(8 * whole, rel=1e-4)
    assert result["D"]["state_bytes"] == pytest.approx(8 * (whole - 0.7 * blocks) + blocks / 8, rel=1e-3)
    assert result["masks"]["trained"] == pytest.approx(1 - 0.7 * blocks / whole, abs=1e-3)


def test_mistakes_are_told(task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        try:
            assert finetune_childtuning.main(argv) == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    out = tmp_path / "run"
    assert "data: expected a folder with train.tsv and dev.tsv" in refused()
    assert "reserve_p: expected 0 < reserve_p <= 1, got 0.0" in refused("--data", "x", "--reserve-p", "0")
    assert "warmup: expected less than 1, got 1.0" in refused("--data", "x", "--warmup", "1")
    assert "methods: expected each once, got F F" in refused("--data", "x", "--methods", "F", "F")
    assert "invalid choice: 'G'" in refused("--data", "x", "--methods", "G")
    assert "evaluations: expected 1 or more, got 0" in refused("--data", "x", "--evaluations", "0")
    assert "there is no such folder" in refused(*arguments(task, tmp_path / "nowhere", out))
    assert "train.tsv: cannot be read" in refused(*arguments(tmp_path, bert, tmp_path / "other"))
    assert finetune_childtuning.main(arguments(task, bert, tmp_path / "lr", "--lr", "1e30", "--warmup", "0")) == 3
    assert "a lower rate may help" in capsys.readouterr().err
    assert not (tmp_path / "lr" / "results.json").exists()
