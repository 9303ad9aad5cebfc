"""The article models against backend="reference": a training step and inference of each. ``python -m bench models``.

Both sides are the same network with the same weights; what differs is which code computes the package's operators. The
language models have the sizes that the examples train (4 layers, 256 wide), and LoRA on all linear layers. Training in
bf16 is autocast over float32 weights, inference has weights in bf16; the ChildTuning step has parameters of that type.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pykernels import AttentionPool, ChildTuningAdamW, GatedConv1d, LoRALinear, apply_lora, fisher_masks
from pykernels.models import (
    DGCNNExtractor,
    DGCNNReader,
    DGCNNReader2018,
    GenerativeConfig,
    generative_model,
)
from pykernels.models.dgcnn_reader_2018 import reader_2018_loss

from . import bench_child_update, gate
from . import bench_dgcnn_extractor as extractor
from . import bench_dgcnn_reader as reader
from .harness import OURS, Call
from .jobs import GateFailure, Job, Options, Result, Session
from .machine import DTYPES
from .model_baselines import Step, autocast

NAME = "models"
REFERENCE = "reference"
FUSED = "AdamW fused"
SIDES = {OURS: None, REFERENCE: "reference"}
LAYERS, WIDTH, VOCABULARY, CONTEXT = 4, 256, 4000, 128
NEW_TOKENS = 16
SEED = 50

Make = Callable[[str | None], Any]
Answer = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """make(backend): a model. answer(model): what inference computes, of inputs of the model's dtype; differentiable.

    step(model, dtype): a training step. terms: products in the longest sum, for the error rule. generates: whether
    inference also continues a text.
    """

    name: str
    make: Make
    answer: Answer
    step: Callable[[Any, str], Call]
    terms: int
    generates: bool = False


def of_dtype(model: nn.Module, *given: Tensor | None) -> list[Tensor | None]:
    dtype = next(model.parameters()).dtype
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in given]


# --- readers and extractor ---


def reader_case(rows: int) -> Case:
    inputs = reader.batch(rows, reader.L, reader.QUESTION)

    def answer(model: DGCNNReader) -> Tensor:
        return torch.stack(model(*of_dtype(model, *inputs[:4])))

    def step(model: DGCNNReader, dtype: str) -> Call:
        return Step(model, partial(reader.loss_of, inputs=inputs, dtype=dtype), reader.Optimizer)

    make = partial(DGCNNReader, reader.CONFIG)
    return Case(f"DGCNNReader B{rows} L{reader.L}", lambda b: make(backend=b), answer, step, 6 * 3 * 128 * 256)


def reader_2018_case(rows: int, length: int = 100, question: int = 15) -> Case:
    generator = torch.Generator().manual_seed(SEED)
    config = DGCNNReader2018().config
    sizes = ((question, config.word_size), (length, config.word_size), (length, config.features))
    given = [torch.randn(rows, *size, generator=generator) for size in sizes]
    masks = [torch.ones(rows, n, dtype=torch.bool) for n in (question, length)]
    target = (torch.rand(rows, length, generator=generator) < 0.02).float()

    def loss(model: DGCNNReader2018, dtype: str) -> Tensor:
        with autocast(dtype):
            start, end = model(*given, *masks)
        return reader_2018_loss(start, end, target, target, masks[1])

    def answer(model: DGCNNReader2018) -> Tensor:
        return torch.stack(model(*of_dtype(model, *given), *masks))

    def step(model: DGCNNReader2018, dtype: str) -> Call:
        return Step(model, partial(loss, dtype=dtype), partial(torch.optim.Adam, lr=1e-3))

    name = f"DGCNNReader2018 B{rows} L{length}"
    return Case(name, lambda b: DGCNNReader2018(config, backend=b), answer, step, 4 * 3 * 128 * 256)


def extractor_case(rows: int) -> Case:
    config = extractor.CONFIGS["full"]
    batch = extractor.make_batch(config, rows)

    def answer(model: DGCNNExtractor) -> Tensor:
        subjects, objects = model(*batch.to(next(model.parameters()).dtype).inputs)
        live = batch.mask.float()
        return torch.cat([(p * live if p.dim() == 2 else p * live[..., None]).flatten() for p in (*subjects, *objects)])

    def step(model: DGCNNExtractor, dtype: str) -> Call:
        return Step(model, partial(extractor.loss_of, batch=batch, dtype=dtype), extractor.Optimizer)

    def make(backend: str | None) -> DGCNNExtractor:
        return DGCNNExtractor(config, backend=backend)

    return Case(f"DGCNNExtractor B{rows} L{extractor.L}", make, answer, step, 12 * 3 * 128 * 256)


# --- language models ---


class TrainingStep:
    """Forward, loss, backward and optimizer, of the parameters that are trained."""

    def __init__(
        self, model: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.model, self.loss = model.train(), loss
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.model).backward()
        self.optimizer.step()


def tokens(rows: int) -> Tensor:
    return torch.randint(4, VOCABULARY - 2, (rows, CONTEXT), generator=torch.Generator().manual_seed(SEED))


def gpt2_ml() -> Any:
    from pykernels.models import GPT2ML, GPT2MLConfig

    sizes = {"n_positions": CONTEXT + NEW_TOKENS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    return GPT2ML(GPT2MLConfig(vocab_size=VOCABULARY, resid_pdrop=0.1, eos_token_id=3, **sizes))


def nezha() -> Any:
    from pykernels.models import NezhaConfig, NezhaDialog

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return NezhaDialog(NezhaConfig(vocab_size=VOCABULARY, intermediate_size=4 * WIDTH, **sizes))


def cdial_gpt() -> Any:
    from pykernels.models import CDialGPT, CDialGPTConfig

    sizes = {"n_positions": CONTEXT + NEW_TOKENS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    return CDialGPT(CDialGPTConfig(vocab_size=VOCABULARY, **sizes))


LANGUAGE_MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "GPT2ML": (gpt2_ml, ["c_attn", "c_proj", "c_fc"]),
    "NezhaDialog": (nezha, ["query", "key", "value", "dense"]),
    "CDialGPT": (cdial_gpt, ["c_attn", "c_proj", "c_fc"]),
}


def language_case(name: str, rows: int) -> Case:
    network, targets = LANGUAGE_MODELS[name]
    ids = tokens(rows)

    def make(backend: str | None) -> Any:
        model = apply_lora(network(), targets, r=8, alpha=16, dropout=0.1, backend=backend)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_b, std=0.02)  # zeros would leave lora_a without a gradient to check
        return model

    def answer(model: Any) -> Tensor:
        return model(input_ids=ids).logits

    def loss(model: Any, dtype: str) -> Tensor:
        with autocast(dtype):
            return model(input_ids=ids, labels=ids).loss

    def step(model: Any, dtype: str) -> Call:
        return TrainingStep(model, partial(loss, dtype=dtype))

    about = f"{name} {LAYERS}x{WIDTH} LoRA r8 B{rows} L{CONTEXT}"
    return Case(about, make, answer, step, LAYERS * 4 * WIDTH * WIDTH, generates=True)


def generate(model: Any) -> Tensor:
    """One text, greedy: as many tokens whatever the weights say."""
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    return model.generate(tokens(1), do_sample=False, pad_token_id=0, **length)


# --- generative models of sequences ---


def generative_case(kind: str, rows: int = 64, shape: tuple[int, int] = (28, 28), width: int = 64) -> Case:
    config = GenerativeConfig(model=kind, networks="sequence", shape=shape, width=width, layers=4, latent=32)
    generator = torch.Generator().manual_seed(SEED)
    x, z = torch.rand(rows, *shape, generator=generator), torch.randn(rows, config.latent, generator=generator)

    def answer(model: Any) -> Tensor:
        """Samples of given z with what the critic says of them, or reconstructions."""
        given, noise = of_dtype(model, x, z)
        return model.critic(model(noise)) if kind == "gan" else model.reconstruct(given)

    def step(model: Any, dtype: str) -> Call:
        optimizer = torch.optim.Adam(model.train().parameters(), lr=2e-4, betas=(0.5, 0.999))

        def call() -> None:
            with autocast(dtype):
                model.train_step(optimizer, x)

        return call

    name = f"{kind.upper()} sequence B{rows} L{shape[0]} C{width}"
    return Case(name, lambda b: generative_model(config, backend=b), answer, step, 8 * 3 * width * 2 * width)


# --- what is measured ---


def twins(case: Case) -> dict[str, Any]:
    """The same model on both backends."""
    torch.manual_seed(SEED)
    models = {name: case.make(backend) for name, backend in SIDES.items()}
    models[REFERENCE].load_state_dict(models[OURS].state_dict())
    return models


def operator_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters of the package's operators."""
    return {
        f"{name}.{parameter}": p
        for name, module in model.named_modules()
        if isinstance(module, GatedConv1d | AttentionPool | LoRALinear)
        for parameter, p in module.named_parameters(recurse=False)
        if p.requires_grad
    }


def results_of(case: Case, model: nn.Module, dtype: str | None) -> dict[str, Tensor]:
    """The answer, and the gradients of the operators' weights that it depends on. dtype: None computes as it is."""
    with autocast(dtype) if dtype else nullcontext():
        y = case.answer(model.eval())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED + 1)).to(y.dtype)
    wanted = operator_weights(model)
    grads = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    found = {f"d{n}": g for n, g in zip(wanted, grads, strict=True) if g is not None}
    return {"y": y.detach()} | found


def check(case: Case, dtype: str) -> None:
    """Answer and gradients of both against fp64, without dropout."""
    models = twins(case)
    got, same = (results_of(case, models[name], dtype) for name in (OURS, REFERENCE))
    exact = results_of(case, models[REFERENCE].double(), None)
    if failure := gate.compare(got, same, exact, dict.fromkeys(exact, case.terms)):
        raise GateFailure(failure)


def run_case(case: Case, session: Session, result: Result) -> None:
    session.tick("checking")
    check(case, result.dtype)
    steps: dict[str, Call | None] = {name: case.step(m, result.dtype) for name, m in twins(case).items()}
    session.group(result, "training step", steps)
    models = {name: model.to(DTYPES[result.dtype]).eval() for name, model in twins(case).items()}
    for module in models[OURS].modules():
        if isinstance(module, GatedConv1d):
            module.prepack()  # as the loaded readers and extractors do
    with torch.no_grad():
        answers = {name: partial(case.answer, m) for name, m in models.items()}
        session.group(result, "inference", answers)
        if case.generates:
            texts = {name: partial(generate, m) for name, m in models.items()}
            session.group(result, f"{NEW_TOKENS} tokens of one text", texts)


def run_child_tuning(rows: int, session: Session, result: Result) -> None:
    """GPT2ML without LoRA: the steps of ChildTuningAdamW F and D alone, and a whole training step of F."""
    session.tick("checking")
    dtype = DTYPES[result.dtype]
    bench_child_update.check(dtype)
    torch.manual_seed(SEED)
    first = gpt2_ml().to(dtype)
    batch = {"input_ids": tokens(rows), "labels": tokens(rows)}
    masks = fisher_masks(first, lambda m, b: m(**b).loss, [batch], 0.3)

    def copies() -> Iterable[tuple[str, str | None, Any]]:
        for name, backend in (*SIDES.items(), (FUSED, None)):
            model = gpt2_ml().to(dtype)
            model.load_state_dict(first.state_dict())
            yield name, backend, model

    def optimizer(name: str, backend: str | None, model: Any, mode: str) -> torch.optim.Optimizer:
        if name == FUSED:
            return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        given = masks if mode == "D" else None
        return ChildTuningAdamW(model.named_parameters(), lr=1e-5, mode=mode, masks=given, backend=backend)

    for mode in ("F", "D"):
        steps: dict[str, Call | None] = {}
        for name, backend, model in copies():
            model(**batch).loss.backward()
            steps[name] = optimizer(name, backend, model, mode).step
        session.group(result, f"optimizer, {mode}", steps)
    training: dict[str, Call | None] = {
        name: TrainingStep(model, lambda m: m(**batch).loss, optimizer(name, backend, model, "F"))
        for name, backend, model in copies()
    }
    session.group(result, "training step, F", training)


def language_rows(quick: bool) -> int:
    return 2 if quick else 8


def cases(quick: bool) -> list[Case]:
    found = [reader_case(16 if quick else 128), reader_2018_case(16 if quick else 128)]
    found.append(extractor_case(16 if quick else 64))
    if importlib.util.find_spec("transformers") is not None:
        names = list(LANGUAGE_MODELS)
        found += [language_case(name, language_rows(quick)) for name in (names[:2] if quick else names)]
    return found + [generative_case(kind) for kind in ("vae", "gan", "aae", "ali")[: 2 if quick else None]]


def jobs(options: Options) -> list[Job]:
    """Models of transformers are left out where that is not installed."""
    seconds, found = 3 * options.effort.seconds, []
    rows = language_rows(options.quick)
    for dtype in (name for name in options.dtypes if name != "fp16"):
        found += [Job(NAME, c.name, dtype, seconds, 0, partial(run_case, c)) for c in cases(options.quick)]
        if importlib.util.find_spec("transformers") is not None:
            name = f"ChildTuningAdamW, GPT2ML {LAYERS}x{WIDTH} B{rows} L{CONTEXT}"
            found.append(Job(NAME, name, dtype, seconds, 0, partial(run_child_tuning, rows)))
    return found
