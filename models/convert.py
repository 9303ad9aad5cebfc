"""TensorFlow checkpoints as folders that from_pretrained reads; and the command for it.

python -m pykernels.models.convert gpt2-ml model.ckpt-220000 runs/gpt2-ml --config mega.json --vocab clue-vocab.txt
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tf_checkpoint import CheckpointError, TensorFlowCheckpoint

# Of optimizers, and the step that training was at.
SKIPPED = re.compile(r".*/adafactor_v[rc]?|.*/adam_[mv]|(.*/)?(global_step|beta[12]_power)")
CONFIG_FILES = ("config.json", "bert_config.json")


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: variables that are joined along their last axis, then transposed or not."""

    variables: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """The variables of a kind of checkpoint.

    model: a model without weights, of the configuration that was published. sources: for each parameter of that model.
    optional: what a checkpoint may have besides.
    """

    model: Callable[[Mapping[str, Any]], Any]
    sources: Callable[[Any], dict[str, Source]]
    optional: re.Pattern[str] = re.compile("(?!)")


def _size(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        raise CheckpointError(f"config: expected {name}, got only {', '.join(sorted(config)) or 'nothing'}")
    return config[name]


# --- GPT2_ML ---


def _gpt2_ml(config: Mapping[str, Any]) -> Any:
    from . import GPT2ML, GPT2MLConfig

    # The published attention_probs_dropout_prob is not used by the original code.
    return GPT2ML(
        GPT2MLConfig(
            vocab_size=_size(config, "vocab_size"),
            n_positions=_size(config, "max_position_embeddings"),
            n_embd=_size(config, "hidden_size"),
            n_layer=_size(config, "num_hidden_layers"),
            n_head=_size(config, "num_attention_heads"),
            n_inner=_size(config, "intermediate_size"),
            resid_pdrop=config.get("hidden_dropout_prob", 0.1),
            initializer_range=config.get("initializer_range", GPT2MLConfig.initializer_range),
        )
    )


def _norm(name: str, variable: str) -> dict[str, Source]:
    return {f"{name}.weight": Source((f"{variable}/gamma",)), f"{name}.bias": Source((f"{variable}/beta",))}


def _dense(name: str, variables: Sequence[str], *, transposed: bool) -> dict[str, Source]:
    return {
        f"{name}.weight": Source(tuple(f"{v}/kernel" for v in variables), transposed),
        f"{name}.bias": Source(tuple(f"{v}/bias" for v in variables)),
    }


def _gpt2_ml_sources(model: Any) -> dict[str, Source]:
    sources = {
        "transformer.wte.weight": Source(("newslm/embeddings/word_embed",)),
        "transformer.wpe.weight": Source(("newslm/embeddings/pos_embed",)),
        **_norm("transformer.emb_norm", "newslm/embeddings/LayerNorm_embed_norm"),
    }
    for i in range(model.config.n_layer):
        ours, theirs = f"transformer.h.{i}", f"newslm/layer{i:02d}"
        qkv = [f"{theirs}/{name}_layer" for name in ("query", "key", "value")]
        # transformers' Conv1D has [in, out], as TensorFlow.
        sources |= _dense(f"{ours}.attn.c_attn", qkv, transposed=False)
        sources |= _dense(f"{ours}.attn.c_proj", [f"{theirs}/context_projection_layer"], transposed=False)
        sources |= _norm(f"{ours}.ln_0", f"{theirs}/LayerNorm_mlp_ln0")
        sources |= _dense(f"{ours}.mlp.c_fc", [f"{theirs}/intermediate"], transposed=False)
        sources |= _dense(f"{ours}.mlp.c_proj", [f"{theirs}/output"], transposed=False)
        sources |= _norm(f"{ours}.ln_1", f"{theirs}/LayerNorm_mlp_ln1")
    return sources


# --- BERT and NEZHA ---

BERT_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "type_vocab_size",
)
BERT_OPTIONS = ("hidden_act", "hidden_dropout_prob", "initializer_range", "layer_norm_eps")


def _bert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: config[name] for name in BERT_OPTIONS if name in config}
    return {name: _size(config, name) for name in BERT_SIZES} | options


def _nezha(config: Mapping[str, Any]) -> Any:
    from . import NezhaConfig, NezhaDialog

    if not config.get("use_relative_position", True):
        raise CheckpointError("config: expected use_relative_position true, got false")
    return NezhaDialog(NezhaConfig(**_bert_config(config)))


def _bert(config: Mapping[str, Any]) -> Any:
    from transformers import BertConfig, BertForPreTraining

    more = {"max_position_embeddings": _size(config, "max_position_embeddings")}
    if "attention_probs_dropout_prob" in config:
        more["attention_probs_dropout_prob"] = config["attention_probs_dropout_prob"]
    return BertForPreTraining(BertConfig(**_bert_config(config), **more))


def _nezha_sources(model: Any) -> dict[str, Source]:
    """TensorFlow's names are transformers' with slashes."""
    sources = {"cls.predictions.bias": Source(("cls/predictions/output_bias",))}
    for name in ("word_embeddings", "token_type_embeddings"):
        sources[f"bert.embeddings.{name}.weight"] = Source((f"bert/embeddings/{name}",))
    dense = ["cls.predictions.transform.dense"]
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for i in range(model.config.num_hidden_layers):
        layer = f"bert.encoder.layer_{i}"
        dense += [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
        dense += [f"{layer}.{name}.dense" for name in ("attention.output", "intermediate", "output")]
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name in dense:
        sources |= _dense(name.replace("layer_", "layer."), [name.replace(".", "/")], transposed=True)
    for name in norms:
        sources |= _norm(name.replace("layer_", "layer."), name.replace(".", "/"))
    return sources


def _bert_sources(model: Any) -> dict[str, Source]:
    return {
        **_nezha_sources(model),
        "bert.embeddings.position_embeddings.weight": Source(("bert/embeddings/position_embeddings",)),
        **_dense("bert.pooler.dense", ["bert/pooler/dense"], transposed=True),
        # Stored as PyTorch has it, unlike the others.
        "cls.seq_relationship.weight": Source(("cls/seq_relationship/output_weights",)),
        "cls.seq_relationship.bias": Source(("cls/seq_relationship/output_bias",)),
    }


LAYOUTS = {
    "gpt2-ml": Layout(_gpt2_ml, _gpt2_ml_sources),
    "nezha": Layout(_nezha, _nezha_sources, re.compile(r"bert/pooler/.*|cls/seq_relationship/.*")),
    "bert": Layout(_bert, _bert_sources),
}


# --- reading ---


def load(kind: str, checkpoint: str | Path, config: Mapping[str, Any]) -> Any:
    """A model with the weights of a TensorFlow checkpoint, ready for inference.

    Args:
        kind: "gpt2-ml" (GPT2ML), "nezha" (NezhaDialog) or "bert" (transformers' BertForPreTraining).
        checkpoint: its path up to ".index".
        config: as published beside the checkpoint.

    Raises CheckpointError that names all variables that are missing, of another shape or type, or not known; those of
    optimizers are passed over, and for "nezha" those of BERT's pooler and of its next-sentence head.
    """
    if kind not in LAYOUTS:
        raise ValueError(f"kind: expected one of {', '.join(LAYOUTS)}, got {kind}")
    layout, source = LAYOUTS[kind], TensorFlowCheckpoint(checkpoint)
    with torch.device("meta"):
        shell = layout.model(config)
    sources = layout.sources(shell)
    parameters = dict(shell.named_parameters())
    if differing := sources.keys() ^ parameters.keys():
        raise AssertionError(f"no source, or no parameter: {', '.join(sorted(differing))}")
    _check(source, sources, {name: tuple(p.shape) for name, p in parameters.items()}, layout.optional)
    weights = {name: _read(source, s) for name, s in sources.items()}
    model = layout.model(config)
    model.load_state_dict(weights, strict=False)  # tied weights are under one name; the names are checked above
    return model.eval()


def _read(checkpoint: TensorFlowCheckpoint, source: Source) -> Tensor:
    parts = [checkpoint.read(name).float() for name in source.variables]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return joined.T if source.transposed else joined


def _check(
    checkpoint: TensorFlowCheckpoint,
    sources: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    optional: re.Pattern[str],
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for name, source in sources.items():
        shape = shapes[name][::-1] if source.transposed else shapes[name]
        for variable in source.variables:
            wanted[variable] = (*shape[:-1], shape[-1] // len(source.variables))
    there = {name for name in checkpoint.variables if not SKIPPED.fullmatch(name) and not optional.fullmatch(name)}
    problems = [f"missing: {name} {list(wanted[name])}" for name in sorted(wanted.keys() - there)]
    unknown = sorted(there - wanted.keys())
    problems += [f"not known: {name} {list(checkpoint.variables[name].shape)}" for name in unknown]
    for name in sorted(wanted.keys() & there):
        got = checkpoint.variables[name]
        if got.shape != wanted[name]:
            problems.append(f"shape: {name}: expected {list(wanted[name])}, got {list(got.shape)}")
        elif isinstance(got.dtype, torch.dtype) and not got.dtype.is_floating_point:
            problems.append(f"type: {name}: expected floating-point values, got {got.dtype}")
        elif problem := checkpoint.problem(name):
            problems.append(f"data: {problem}")
    if problems:
        raise CheckpointError(f"{checkpoint.prefix}:\n  " + "\n  ".join(problems))


# --- command ---


def find_config(checkpoint: str | Path, given: Path | None) -> Mapping[str, Any]:
    """The given JSON file or the one beside the checkpoint."""
    folder = Path(checkpoint).parent
    candidates = [given] if given else [folder / name for name in CONFIG_FILES]
    for path in candidates:
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise CheckpointError(f"{path}: no JSON: line {error.lineno}: {error.msg}") from None
            if not isinstance(config, dict):
                raise CheckpointError(f"{path}: expected an object, got {type(config).__name__}")
            return config
    raise CheckpointError(f"{' and '.join(map(str, candidates))} do not exist: give the published one by --config FILE")


def _take_ids(settings: Any, tokenizer: Any) -> None:
    """The special tokens that a model's settings name, as the vocabulary has them."""
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    for name, value in (ids | {"pad_token_id": tokenizer.pad_token_id}).items():
        if getattr(settings, name, None) is not None:
            setattr(settings, name, value)


def convert(kind: str, checkpoint: str | Path, out: Path, config: Mapping[str, Any], vocab: Path | None = None) -> None:
    """Writes the folder `out`, whole or not at all, which must not exist: config.json, model.safetensors and, with a
    vocabulary (BERT's vocab.txt), its tokenizer."""
    if out.exists():
        raise CheckpointError(f"{out} exists already: expected the name of a new folder")
    model = load(kind, checkpoint, config)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        if vocab is not None:
            from transformers import BertTokenizer

            tokenizer = BertTokenizer(str(vocab))
            most, got = model.config.vocab_size, len(tokenizer)
            if got > most:
                raise CheckpointError(f"{vocab}: expected at most {most} tokens, as the model has, got {got}")
            for settings in (model.config, model.generation_config):
                if settings is not None:
                    _take_ids(settings, tokenizer)
            tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


EXAMPLES = """examples:
  python -m pykernels.models.convert gpt2-ml model.ckpt-220000 runs/gpt2-ml --config mega.json --vocab clue-vocab.txt
  python -m pykernels.models.convert nezha nezha/model.ckpt-900000 runs/nezha
  python -m pykernels.models.convert bert bert/bert_model.ckpt runs/bert --list

exit status: 0 written (or listed), 2 for wrong arguments or a checkpoint that does not fit
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pykernels.models.convert",
        description="Converts a TensorFlow checkpoint to a folder that from_pretrained reads. Needs no TensorFlow.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=LAYOUTS, help="of the model")
    parser.add_argument("checkpoint", help="its path up to .index")
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the published JSON (default: the one beside it)")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="vocab.txt, to save its tokenizer too")
    parser.add_argument("--list", action="store_true", help="print the variables and write nothing")
    args = parser.parse_args(argv)
    try:
        if args.list:
            for name, variable in sorted(TensorFlowCheckpoint(args.checkpoint).variables.items()):
                print(name, str(variable.dtype).removeprefix("torch."), list(variable.shape))
            return 0
        convert(args.kind, args.checkpoint, args.out, find_config(args.checkpoint, args.config), args.vocab)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{args.kind} is in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
