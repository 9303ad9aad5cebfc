"""TensorFlow checkpoints without TensorFlow: the format, what does not fit, and the command."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pykernels.models import tf_checkpoint
from pykernels.models.tf_checkpoint import CheckpointError, TensorFlowCheckpoint
from tests.recorded import recorded

pytest.importorskip("transformers", reason="transformers is not installed")

from pykernels.models import GPT2ML, GPT2MLConfig, NezhaConfig, NezhaDialog  # noqa: E402
from pykernels.models import convert as converter  # noqa: E402

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}

# --- a writer of the format, after the same descriptions ---


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def block(entries: list[tuple[bytes, bytes]], snappy: bool = False) -> bytes:
    """With keys that share prefixes."""
    out, last = b"", b""
    for key, value in entries:
        shared = next((i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last)))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    out += struct.pack("<II", 0, 1)
    if snappy:  # literals of up to 60 bytes; copies are in the recorded file
        parts = [out[i : i + 60] for i in range(0, len(out), 60)]
        out = varint(len(out)) + b"".join(bytes([len(part) - 1 << 2]) + part for part in parts)
    return sealed(out + bytes([snappy]))


def sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", tf_checkpoint._masked_crc(data))


def write_checkpoint(prefix: Path, tensors: Mapping[str, Tensor], *, snappy: bool = False, per_block: int = 7) -> None:
    numbers = {dtype: number for number, dtype in tf_checkpoint.DTYPES.items()}
    data, entries = b"", [(b"", field(1, 1))]
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        raw = t.reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = b"".join(field(2, field(1, size)) for size in t.shape)
        entry = field(1, numbers[t.dtype]) + field(2, shape) + field(4, len(data)) + field(5, len(raw))
        entries.append((name.encode(), entry))
        data += raw
    index, places = b"", []
    for i in range(0, len(entries), per_block):
        part = block(entries[i : i + per_block], snappy)
        places.append((entries[min(i + per_block, len(entries)) - 1][0], varint(len(index)) + varint(len(part) - 5)))
        index += part
    handles = b""
    for part in (block([]), block(places)):  # of metadata, of places
        handles += varint(len(index)) + varint(len(part) - 5)
        index += part
    index += handles.ljust(40, b"\0") + struct.pack("<Q", tf_checkpoint.MAGIC)
    Path(f"{prefix}.index").write_bytes(index)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)


def gpt2_ml_variables() -> dict[str, Tensor]:
    """Variables of a small GPT2_ML in TensorFlow's names, and of its optimizer."""
    generator, V, D, F, P = torch.Generator().manual_seed(1), 20, 8, 12, 16
    shapes: dict[str, tuple[int, ...]] = {
        "newslm/embeddings/word_embed": (V, D),
        "newslm/embeddings/pos_embed": (P, D),
        "newslm/embeddings/LayerNorm_embed_norm/gamma": (D,),
        "newslm/embeddings/LayerNorm_embed_norm/beta": (D,),
    }
    for i in range(2):
        layer = f"newslm/layer{i:02d}"
        for name in ("query_layer", "key_layer", "value_layer", "context_projection_layer"):
            shapes |= {f"{layer}/{name}/kernel": (D, D), f"{layer}/{name}/bias": (D,)}
        shapes |= {f"{layer}/intermediate/kernel": (D, F), f"{layer}/intermediate/bias": (F,)}
        shapes |= {f"{layer}/output/kernel": (F, D), f"{layer}/output/bias": (D,)}
        for name in ("ln0", "ln1"):
            shapes |= {f"{layer}/LayerNorm_mlp_{name}/{part}": (D,) for part in ("gamma", "beta")}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    slots = {f"newslm/layer00/output/kernel/adafactor_{slot}": torch.ones(8) for slot in ("vr", "vc")}
    return tensors | slots | {"global_step": torch.tensor(7)}


# --- the format ---


@pytest.mark.parametrize("snappy", [False, True])
@pytest.mark.parametrize("per_block", [1, 7, 1000])
def test_reads_what_was_written(tmp_path: Path, snappy: bool, per_block: int) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {f"a/{i}/b": torch.randn(i, 3, generator=generator) for i in range(20)}
    tensors |= {"step": torch.tensor(2**40), "half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16()}
    write_checkpoint(tmp_path / "m.ckpt", tensors, snappy=snappy, per_block=per_block)
    checkpoint = TensorFlowCheckpoint(tmp_path / "m.ckpt")
    assert checkpoint.variables.keys() == tensors.keys()
    for name, expected in tensors.items():
        got = checkpoint.read(name)
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert TensorFlowCheckpoint(tmp_path / "m.ckpt.index").variables == checkpoint.variables


def test_copies_in_compressed_data() -> None:
    # abcd, then 9 bytes from 4 back (which reach into themselves), then 3 from 13 back with an offset of two bytes.
    data = varint(16) + b"\x0cabcd" + bytes([(9 - 4) << 2 | 1, 4]) + bytes([(3 - 1) << 2 | 2, 13, 0])
    assert tf_checkpoint._unsnappy(data) == b"abcdabcdabcdaabc"
    literal = bytes(range(200))
    assert tf_checkpoint._unsnappy(varint(200) + bytes([60 << 2, 199]) + literal) == literal


def test_checksum() -> None:
    """The example of RFC 3720, masked."""
    crc = 0x8A9136AA
    assert tf_checkpoint._masked_crc(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_damage_is_told(tmp_path: Path) -> None:
    prefix = tmp_path / "m.ckpt"
    write_checkpoint(prefix, {"a": torch.ones(3)})
    index = Path(f"{prefix}.index")
    whole = index.read_bytes()
    for damaged, why in (
        (whole[:-1], "its last eight bytes are not those of a string table"),
        (b"", "its last eight bytes"),
        (bytes([whole[0] ^ 1]) + whole[1:], "a checksum is wrong"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"m.ckpt.index: no index of a TensorFlow checkpoint: {why}"):
            TensorFlowCheckpoint(prefix)
    with pytest.raises(CheckpointError, match="none.index does not exist: expected the path of a checkpoint up to"):
        TensorFlowCheckpoint(tmp_path / "none")
    index.write_bytes(whole)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(bytes(11))
    with pytest.raises(CheckpointError, match="a: .*of-00001 has 11 bytes, expected 12 or more"):
        TensorFlowCheckpoint(prefix).read("a")


@pytest.mark.parametrize(
    ("folder", "name", "weights", "count"),
    [
        ("gpt2_ml_ckpt", "model.ckpt-3", "gpt2_ml.npz", 125),
        ("gpt2_ml_ckpt_snappy", "model.ckpt-3", "gpt2_ml.npz", 125),
        ("nezha_ckpt", "model.ckpt", "nezha.npz", 41),
        ("nezha_ckpt_pretrain", "model.ckpt-900000", "nezha.npz", None),
        ("bert_ckpt", "model.ckpt", "bert.npz", None),
    ],
)
def test_recorded_checkpoints(folder: str, name: str, weights: str, count: int | None) -> None:
    checkpoint = TensorFlowCheckpoint(recorded("golden", folder) / name)
    assert count is None or len(checkpoint.variables) == count
    with np.load(recorded("golden", weights)) as file:
        names = [n.removeprefix("w/") for n in file.files if n.startswith("w/")]
        assert names and checkpoint.variables.keys() >= set(names)
        for n in names:
            assert np.array_equal(checkpoint.read(n).numpy(), file[f"w/{n}"]), n


# --- models ---


def test_both_forms_of_the_recorded_index_load_alike() -> None:
    states = []
    for folder in ("gpt2_ml_ckpt", "gpt2_ml_ckpt_snappy"):
        prefix = recorded("golden", folder) / "model.ckpt-3"
        states.append(converter.load("gpt2-ml", prefix, converter.find_config(prefix, None)).state_dict())
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_what_a_pretrained_nezha_has_besides_is_passed_over() -> None:
    models = []
    for path in ("nezha_ckpt/model.ckpt", "nezha_ckpt_pretrain/model.ckpt-900000"):
        prefix = recorded("golden") / path
        models.append(converter.load("nezha", prefix, converter.find_config(prefix, None)))
    assert all(torch.equal(t, models[1].state_dict()[name]) for name, t in models[0].state_dict().items())


def test_bert_equals_the_original() -> None:
    prefix = recorded("golden", "bert_ckpt") / "model.ckpt"
    model = converter.load("bert", prefix, converter.find_config(prefix, None))
    with np.load(recorded("golden", "bert.npz")) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}
    ids = golden["in/token_ids"]
    inputs = {"input_ids": ids, "token_type_ids": golden["in/segment_ids"], "attention_mask": (ids > 0).long()}
    output = model(**inputs, output_hidden_states=True)
    assert torch.allclose(output.hidden_states[-1], golden["hidden"], atol=2e-5, rtol=0)
    assert torch.allclose(output.prediction_logits, golden["mlm_logits"], atol=5e-5, rtol=0)
    assert torch.allclose(output.seq_relationship_logits.softmax(-1), golden["nsp_probs"], atol=5e-6, rtol=0)
    pooled = model.bert(**inputs).pooler_output
    assert torch.allclose(pooled, golden["pooled"], atol=2e-5, rtol=0)


def test_values_are_where_they_belong(tmp_path: Path) -> None:
    variables = gpt2_ml_variables()
    write_checkpoint(tmp_path / "m", variables, snappy=True)
    w = converter.load("gpt2-ml", tmp_path / "m", SMALL).state_dict()
    joined = [variables[f"newslm/layer01/{part}_layer/kernel"] for part in ("query", "key", "value")]
    assert torch.equal(w["transformer.h.1.attn.c_attn.weight"], torch.cat(joined, 1))
    assert torch.equal(w["transformer.h.0.mlp.c_proj.bias"], variables["newslm/layer00/output/bias"])
    assert torch.equal(w["transformer.h.1.ln_0.weight"], variables["newslm/layer01/LayerNorm_mlp_ln0/gamma"])
    assert w["lm_head.weight"].data_ptr() == w["transformer.wte.weight"].data_ptr()


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    variables = gpt2_ml_variables()
    del variables["newslm/layer00/output/bias"], variables["newslm/embeddings/pos_embed"]
    variables["newslm/layer01/query_layer/kernel"] = torch.ones(8, 9)
    variables["newslm/layer01/key_layer/bias"] = torch.ones(8, dtype=torch.int32)
    variables["newslm/layer02/output/bias"] = torch.ones(8)
    write_checkpoint(tmp_path / "m", variables)
    with pytest.raises(CheckpointError) as caught:
        converter.load("gpt2-ml", tmp_path / "m", SMALL)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'm'}:",
        "  missing: newslm/embeddings/pos_embed [16, 8]",
        "  missing: newslm/layer00/output/bias [8]",
        "  not known: newslm/layer02/output/bias [8]",
        "  type: newslm/layer01/key_layer/bias: expected floating-point values, got torch.int32",
        "  shape: newslm/layer01/query_layer/kernel: expected [8, 8], got [8, 9]",
    ]
    with pytest.raises(CheckpointError, match="config: expected max_position_embeddings, got only vocab_size"):
        converter.load("gpt2-ml", tmp_path / "m", {"vocab_size": 20})
    with pytest.raises(ValueError, match="kind: expected one of gpt2-ml, nezha, bert, got gpt"):
        converter.load("gpt", tmp_path / "m", SMALL)


# --- the command ---


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, out = tmp_path / "m.ckpt-7", tmp_path / "runs" / "gpt"
    write_checkpoint(prefix, gpt2_ml_variables(), snappy=True)
    (tmp_path / "mega.json").write_text(json.dumps(SMALL))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"春眠不觉晓"]))
    options = ["--config", str(tmp_path / "mega.json"), "--vocab", str(tmp_path / "vocab.txt")]
    assert converter.main(["gpt2-ml", str(prefix), str(out), *options]) == 0
    assert f"gpt2-ml is in {out}" in capsys.readouterr().out
    from transformers import AutoTokenizer

    model = GPT2ML.from_pretrained(out)
    assert isinstance(model.config, GPT2MLConfig)
    ids = [(c.eos_token_id, c.bos_token_id) for c in (model.config, model.generation_config)]
    assert ids == [(3, None), (3, None)]  # [SEP] of this vocabulary; the article's model has no first token
    expected = converter.load("gpt2-ml", prefix, SMALL).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("春眠", add_special_tokens=False).input_ids == [5, 6]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["gpt"]
    assert converter.main(["gpt2-ml", str(prefix), str(out), *options]) == 2
    assert "exists already: expected the name of a new folder" in capsys.readouterr().err
    assert converter.main(["gpt2-ml", str(prefix), "x", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "global_step int64 []" in listed and "newslm/layer00/output/kernel float32 [12, 8]" in listed
    with pytest.raises(SystemExit) as end:
        converter.main(["--help"])
    assert end.value.code == 0 and "exit status: 0 written" in capsys.readouterr().out


def test_special_tokens_are_those_of_the_vocabulary(tmp_path: Path) -> None:
    """A NEZHA keeps those of the article's vocabulary where none is given; BERT's has others."""
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join([*"春眠", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    config = NezhaConfig(vocab_size=7)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, 3)
    converter._take_ids(config, BertTokenizer(str(tmp_path / "vocab.txt")))
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (2, 4, 5)


def test_command_writes_nothing_that_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, out = tmp_path / "m", tmp_path / "out"
    write_checkpoint(prefix, gpt2_ml_variables())

    def refused(*more: str) -> str:
        assert converter.main(["gpt2-ml", str(prefix), str(out), *more]) == 2
        assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []
        return capsys.readouterr().err

    assert "config.json and " in refused() and "give the published one by --config FILE" in refused()
    (tmp_path / "config.json").write_text("{")
    assert "config.json: no JSON: line 1" in refused()
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"vocab_size": 21}))
    assert "shape: newslm/embeddings/word_embed: expected [21, 8], got [20, 8]" in refused()
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "vocab.txt").write_text("\n".join(map(str, range(25))))
    assert "expected at most 20 tokens, as the model has, got" in refused("--vocab", str(tmp_path / "vocab.txt"))
    with pytest.raises(SystemExit) as end:
        converter.main(["rnn", str(prefix), str(out)])
    assert end.value.code == 2


def test_command_converts_the_recorded_nezha(tmp_path: Path) -> None:
    for name in ("config.json", "model.ckpt-900000.index", "model.ckpt-900000.data-00000-of-00001"):
        shutil.copy(recorded("golden", "nezha_ckpt_pretrain", name), tmp_path)
    assert converter.main(["nezha", str(tmp_path / "model.ckpt-900000"), str(tmp_path / "out")]) == 0
    model, about = NezhaDialog.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(about.values())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
