"""The fine-tuning example: what each pair trains and takes, the table, runs that go on, models that are kept."""

from __future__ import annotations

import gc
import itertools
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune
import pytest
import torch
from finetune import FinetuneConfig
from finetune_ways import OPTIMIZERS, WAYS, adapt, optimizer_of
from sentence_classifier import HEAD, Fit, Pretrained, score
from sentence_data import PACKAGE
from torch import nn
from training_memory import allocated

from kit.memory import Peak
from kit.processes import Processes
from pykernels import ChildTuningAdamW, load_lora
from pykernels.child_update import unpack_mask
from tests.finetune_runs import arguments, made, runs_of, seen
from tests.recorded import recorded

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

PAIRS = list(itertools.product(WAYS, OPTIMIZERS))


@pytest.fixture(autouse=True)
def another_accelerator() -> Iterator[None]:
    """Its state is global."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Each run collects garbage, which takes longer than the run where all of transformers is looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# --- what is trained, and with what ---


@pytest.mark.parametrize(("way", "kind"), PAIRS)
def test_each_pair_trains_what_it_should(
    way: str, kind: str, task: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without decay, which acts on all: full, everything; else adapters and head; with D what the masks select."""
    when_masked: dict[str, torch.Tensor] = {}
    set_masks = ChildTuningAdamW.set_masks

    def spied(self: ChildTuningAdamW, masks: Any) -> None:
        for group in self.param_groups:
            pairs = zip(group["param_names"], group["params"], strict=True)
            when_masked.update({name: p.detach().clone() for name, p in pairs})
        set_masks(self, masks)

    monkeypatch.setattr(ChildTuningAdamW, "set_masks", spied)
    runs = runs_of(task, bert, weight_decay=0.0, mask_steps=5, lora_lr=1e-2, loraplus_lr=5e-3)
    with seen(monkeypatch) as models:
        result = made(runs, way, kind)
    (model, fit), before = models[0], runs.pretrained.classifier(1)
    adapt(runs.config, way, before, runs.pretrained.heads)
    begun = dict(before.named_parameters())
    moved = {name: p != begun[name] for name, p in model.named_parameters()}
    trained = {name for name, changed in moved.items() if changed.any()}
    adapters = {name for name in begun if name.endswith(("lora_a", "lora_b")) or name.startswith(f"{HEAD}.")}
    assert {name for name, p in begun.items() if p.requires_grad} == (set(begun) if way == "full" else adapters)
    assert trained <= (set(begun) if way == "full" else adapters)
    missed = {name for name, p in begun.items() if p.requires_grad} - trained
    # D may select nothing of a small tensor.
    assert not missed or (kind == "D" and all(".layer." in name for name in missed))
    assert len(result["losses"]) == 6 and len(set(result["losses"])) == 6
    if kind != "D":
        assert result["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert not when_masked and not result["reserved"]
        return
    raw = fit.optimizer.optimizer
    parameters = dict(model.named_parameters())
    packed = {name: raw.state[p]["mask"] for name, p in parameters.items() if "mask" in raw.state.get(p, ())}
    masks = {name: unpack_mask(mask, parameters[name].shape) for name, mask in packed.items()}
    assert set(masks) == {name for name in when_masked if ".layer." in name}
    reserved, entries = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert reserved == pytest.approx(0.3 * entries, abs=2)
    assert result["trained"] == reserved + sum(p.numel() for name, p in when_masked.items() if name not in masks)
    for name, mask in masks.items():
        assert not (parameters[name] != when_masked[name])[~mask].any(), name
    if way == "full":
        assert all(torch.equal(p, begun[name]) for name, p in when_masked.items()), "before the first step"
    else:
        assert set(result["reserved"]) == {"lora_a", "lora_b"} and min(result["reserved"].values()) > 0
        assert any((when_masked[name] != begun[name]).any() for name in when_masked), "after some steps"


def test_options_reach_the_optimizers(pretrained: Pretrained) -> None:
    options = {"full_lr": 1e-4, "lora_lr": 2e-3, "loraplus_lr": 5e-4, "ratio": 8.0, "weight_decay": 0.1}
    config = FinetuneConfig(data="x", reserve_p=0.25, clip=0.7, **options)
    for way in WAYS:
        model = adapt(config, way, pretrained.classifier(1), pretrained.heads)
        names = {id(p): name for name, p in model.named_parameters()}
        for kind in OPTIMIZERS:
            own = optimizer_of(config, way, kind, model, 5)
            groups = own.param_groups
            rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
            assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
            if way == "loraplus":
                b_side = {name for name in rates if name.endswith(("lora_b", "bias"))}
                assert all(rates[name] == pytest.approx(4e-3 if name in b_side else 5e-4) for name in rates)
            else:
                assert set(rates.values()) == {1e-4 if way == "full" else 2e-3}
            decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
            plain = {name for name, p in model.named_parameters() if p.dim() < 2}
            assert all(decay == (0.0 if name in plain else 0.1) for name, decay in decays.items())
            if kind == "adamw":
                assert type(own) is torch.optim.AdamW
            else:
                wanted = {"mode": kind, "reserve_p": 0.25, "seed": 5, "max_grad_norm": 0.7}
                assert type(own) is ChildTuningAdamW and all(wanted.items() <= group.items() for group in groups)


def test_a_whole_mask_and_a_ratio_of_one_are_plain(task: Path, bert: Path) -> None:
    """With p = 1 F and D are AdamW but for rounding, and with equal rates LoRA+ is LoRA."""
    rates = {"loraplus_lr": 1e-3, "ratio": 1.0, "reserve_p": 1.0}
    runs = runs_of(task, bert, dropout=0.0, **rates)
    pairs = [("full", "adamw"), ("full", "F"), ("full", "D"), ("lora", "adamw"), ("loraplus", "F"), ("loraplus", "D")]
    losses = {pair: made(runs, *pair)["losses"] for pair in pairs}
    for way, kind in pairs:
        plain = losses["full" if way == "full" else "lora", "adamw"]
        assert losses[way, kind] == pytest.approx(plain, rel=1e-4), (way, kind)


@pytest.mark.parametrize(("way", "kind"), [("full", "F"), ("lora", "D"), ("loraplus", "adamw")])
def test_every_way_learns(way: str, kind: str, task: Path, bert: Path) -> None:
    rates = {"full_lr": 5e-3, "lora_lr": 3e-3, "loraplus_lr": 1e-3, "alpha": 32.0, "warmup": 0.0, "mask_steps": 10}
    runs = runs_of(task, bert, limit=32, steps=80, dropout=0.0, reserve_p=0.5, **rates)
    runs.parts["dev"] = runs.parts["train"]
    assert made(runs, way, kind)["dev"]["accuracy"] > 0.85


def test_bfloat16(task: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """full: float32 weights and rounded products; LoRA: bfloat16 frozen weights, all that is trained in float32."""
    runs, half = (runs_of(task, bert, dtype=dtype, dropout=0.0, mask_steps=1) for dtype in ("fp32", "bf16"))
    for way in WAYS:
        exact = made(runs, way, "D")
        with seen(monkeypatch) as models:
            rounded = made(half, way, "D")
        model = models[0][0]
        assert exact["losses"] != rounded["losses"] == pytest.approx(exact["losses"], rel=0.03)
        dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
        assert dtypes == {True: torch.float32} | ({} if way == "full" else {False: torch.bfloat16})
        if way != "full":
            assert rounded["bytes"]["weights"] < 0.75 * exact["bytes"]["weights"]


# --- memory ---


def storages() -> dict[int, int]:
    """Bytes of every tensor's memory that Python can reach, once each."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            tensors = [one] if one.grad is None else [one, one.grad]
            found.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors})
    return found


@pytest.mark.filterwarnings("ignore")  # of attributes that are looked at
@pytest.mark.parametrize(("way", "kind"), PAIRS)
def test_memory_is_what_was_allocated(
    way: str, kind: str, task: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors that are there after a run, and were not before it, are what is counted."""
    runs = runs_of(task, bert)
    made(runs, way, kind)
    before = storages()
    with seen(monkeypatch) as models:
        result = made(runs, way, kind)
    held = {address: size for address, size in storages().items() if address not in before}
    assert sum(held.values()) == sum(result["bytes"].values())
    model, fit = models[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert result["bytes"]["gradients"] == sum(4 * p.numel() for p in trained)
    if kind != "D":
        assert result["bytes"]["state"] == sum(8 * p.numel() + 4 for p in trained)
    assert allocated(model, fit.optimizer) == result["bytes"]


def test_peak_is_that_of_the_time_since() -> None:
    peak = Peak()
    if not peak.known:
        pytest.skip("the system does not count a process's peak anew")
    first = peak.bytes()
    large = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.bytes() - first > 0.9 * large.nbytes
    del large
    assert peak.bytes() - first > 60 << 20 and Peak().bytes() - first < 32 << 20


def test_no_peak_where_the_system_tells_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.memory.PROCESS", tmp_path / "none")
    assert Peak().bytes() is None
    run = {"dev": {}, "bytes": dict.fromkeys(("weights", "gradients", "state"), 1e6), "trained": 5, "peak": None}
    run |= {"seconds": 0.1, "update_seconds": 0.01, "reserved": {}, "mask_seconds": 0.0}
    assert finetune.table({("full", "F"): [run]}, {}).splitlines()[1].split()[-1] == "-"


# --- encoders ---


def test_other_encoders(bert: Path, task: Path, tmp_path: Path) -> None:
    """What the folder lacks is the head, and is trained whatever the way; RoBERTa and DistilBERT have no segments."""
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 32}
    own = {"vocab_size": 16, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32}
    kinds = {
        "distil": (transformers.DistilBertModel, transformers.DistilBertConfig(**own), (HEAD, "pre_classifier")),
        "roberta": (transformers.RobertaModel, transformers.RobertaConfig(**sizes, pad_token_id=1), (HEAD,)),
        "electra": (transformers.ElectraModel, transformers.ElectraConfig(**sizes, embedding_size=16), (HEAD,)),
    }
    for name, (kind, config, heads) in kinds.items():
        folder = tmp_path / name
        kind(config).save_pretrained(folder)
        segments = {} if name == "electra" else {"model_input_names": ["input_ids", "attention_mask"]}
        padding = {"pad_token": "[UNK]"} if name == "roberta" else {}
        vocabulary = str(bert / "vocab.txt")
        transformers.BertTokenizer(vocabulary, **segments, **padding).save_pretrained(folder)
        runs = runs_of(task, folder)
        batch = runs.parts["train"].batch(range(8))
        assert ("token_type_ids" in batch) == (name == "electra")
        assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {1 if name == "roberta" else 0}
        model = runs.pretrained.classifier(1, dropout=0.0)
        assert runs.pretrained.heads == heads
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
        adapted = adapt(runs.config, "lora", model, heads)
        assert all(p.requires_grad for head in heads for p in adapted.get_submodule(head).parameters())
        for pair in (("full", "adamw"), ("lora", "D")):
            assert len(made(runs, *pair)["losses"]) == 6, (name, pair)


# --- the whole ---


def test_the_whole_and_its_resumption(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = arguments(task, bert, tmp_path / "run", "--lora-lr", "1e-2", "--loraplus-lr", "5e-3")
    assert finetune.main([*quick, "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(("full ", "lora ", "loraplus "))]
    assert [tuple(row[:2]) for row in rows] == PAIRS and {len(row) for row in rows} == {18}
    assert len(re.findall("D's masks took", printed)) == 3
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000 and not (tmp_path / "run" / "models").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == [f"seed 1, {way}, {kind}" for way, kind in PAIRS]
    first = {results[f"seed 1, {way}, {kind}"]["losses"][0] for way, kind in PAIRS}
    assert max(first) - min(first) < 1e-5, "the same weights, batch and dropout"
    assert len({str(result["losses"]) for result in results.values()}) == len(results)

    assert finetune.main(quick) == 2
    assert "holds a run already: give --resume auto" in capsys.readouterr().err
    made, step = [], Fit.step
    monkeypatch.setattr(Fit, "step", lambda self: (made.append(self.plan.seed), step(self))[1])
    assert finetune.main([*quick, "--resume", "auto", "--seeds", "1"]) == 0
    assert capsys.readouterr().out == printed and not made
    assert finetune.main([*quick, "--resume", "auto", "--train", "lora", "--optimizers", "F"]) == 0
    out = capsys.readouterr().out
    assert made == [2] * 6 and "dev.tsv: 2 seeds" in out and out.count("\nlora ") == 1 and "\nfull" not in out
    assert finetune.main([*quick, "--resume", "auto", "--lora-lr", "1"]) == 2
    assert "was begun with other options: lora_lr: 0.01, now 1.0" in capsys.readouterr().err


def test_a_signal_keeps_what_is_finished(
    task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run that goes on ends as one that was not stopped; a stop in the masks' pass is one too."""
    step, share = Fit.step, Processes.share
    some = ["--train", "full", "loraplus", "--optimizers", "adamw", "D", "--seeds", "1"]
    assert finetune.main(arguments(task, bert, tmp_path / "whole", *some)) == 0
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())

    def signalled(after: int, name: str, method: Any, owner: type) -> None:
        calls = []

        def counted(self: Any, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == after:
                signal.raise_signal(signal.SIGTERM)
            return method(self, *arguments)

        monkeypatch.setattr(owner, name, counted)

    # In the second run's steps; then between two batches of its masks, which come before its steps.
    argv = arguments(task, bert, tmp_path / "run", *some)
    for after, name, method, owner in ((9, "step", step, Fit), (2, "share", share, Processes)):
        signalled(after, name, method, owner)
        assert finetune.main([*argv, "--resume", "auto"]) == 130
        assert "--resume auto goes on after the runs that are finished" in capsys.readouterr().err
        assert list(json.loads((tmp_path / "run" / "results.json").read_text())) == ["seed 1, full, adamw"]
        monkeypatch.setattr(owner, name, method)
    assert finetune.main([*argv, "--resume", "auto"]) == 0
    other = json.loads((tmp_path / "run" / "results.json").read_text())
    assert whole.keys() == other.keys()
    for name, result in whole.items():
        for key in ("losses", "dev", "trained", "reserved", "bytes"):
            assert result[key] == other[name][key], (name, key)


def test_kept_models_have_the_same_scores(
    task: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by transformers, and by load_lora into the plain classifier."""
    some = ["--seeds", "1", "--optimizers", "D", "--save"]
    with seen(monkeypatch) as models:
        assert finetune.main(arguments(task, bert, tmp_path, *some)) == 0
    pretrained = Pretrained(str(bert), 24)
    parts = pretrained.parts(FinetuneConfig(data=str(task), limit=64))
    results = json.loads((tmp_path / "results.json").read_text())
    for way, (model, _) in zip(WAYS, models, strict=True):
        folder = tmp_path / "models" / f"seed-1-{way}-D"
        if way == "full":
            loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
            assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == pretrained.tokenizer.get_vocab()
        else:
            loaded = load_lora(pretrained.classifier(7), folder)
        batch = parts["dev"].batch(range(16))
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
        assert score(loaded, parts["dev"]) == pytest.approx(results[f"seed 1, {way}, D"]["dev"], rel=1e-5)


def test_real_weights_and_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """all-MiniLM-L6-v2 on RTE: LoRA's gradients and state take a hundredth of what full fine-tuning's take."""
    pytest.importorskip(PACKAGE, reason=f"{PACKAGE} is not installed")
    some = ["--quick", "--seeds", "1", "--steps", "3", "--limit", "16", "--fisher-batches", "1", "--quiet"]
    some += ["--train", "lora", "--optimizers", "D"]
    data = recorded("data", "glue", "RTE")
    assert finetune.main(["--data", str(data), "--out", str(tmp_path), "--threads", "1", *some]) == 0
    result = json.loads((tmp_path / "results.json").read_text())["seed 1, lora, D"]
    whole, adapters, pooler, head = 22_713_986, 337_920, 8 * (384 + 384), 770
    assert result["parameters"] == whole + adapters
    # The pooler is in no numbered layer.
    assert result["trained"] == pytest.approx(0.3 * (adapters - pooler) + pooler + head, abs=2)
    assert result["bytes"]["gradients"] == 4 * (adapters + head) < 0.02 * 4 * whole
    assert result["bytes"]["state"] == pytest.approx(8 * result["trained"] + adapters / 8, rel=0.01)


def test_mistakes_are_told(task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        try:
            assert finetune.main(argv) == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    out = tmp_path / "run"
    assert "data: expected a folder with train.tsv and dev.tsv" in refused()
    assert "reserve_p: expected 0 < reserve_p <= 1, got 0.0" in refused("--data", "x", "--reserve-p", "0")
    assert "dropout: expected less than 1, got 1.0" in refused("--data", "x", "--dropout", "1")
    assert "ratio: expected more than 0, got 0.0" in refused("--data", "x", "--ratio", "0")
    assert "optimizers: expected each once, got F F" in refused("--data", "x", "--optimizers", "F", "F")
    assert "invalid choice: 'half'" in refused("--data", "x", "--train", "half")
    assert "rank: expected 1 or more, got 0" in refused("--data", "x", "--rank", "0")
    assert "there is no such folder" in refused(*arguments(task, tmp_path / "nowhere", out / "a"))
    assert "train.tsv: cannot be read" in refused(*arguments(tmp_path, bert, out / "b"))
    assert "--mask-steps 6: expected fewer than the 6 steps" in refused(
        *arguments(task, bert, out / "c", "--mask-steps", "6")
    )
    lora = ["--train", "lora", "--optimizers", "adamw"]
    assert "--targets quary: target_modules: expected names of linear layers, got 'quary'" in refused(
        *arguments(task, bert, out / "d", *lora, "--targets", "quary")
    )


@pytest.mark.parametrize("kind", ["adamw", "F"])
def test_a_loss_that_is_not_finite(
    kind: str, task: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["--full-lr", "1e30", "--warmup", "0", "--optimizers", kind]
    assert finetune.main(arguments(task, bert, tmp_path, *some)) == 3
    error = capsys.readouterr().err
    assert f"finetune.py: seed 1, full, {kind}: step 2: the loss is nan; a lower rate may help" in error
    assert not (tmp_path / "results.json").exists()
