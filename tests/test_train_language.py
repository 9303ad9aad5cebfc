"""The examples of the language models: training, resuming, chatting, and what they say of mistakes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import chat  # noqa: E402
import train_dialog  # noqa: E402
import train_lm  # noqa: E402
from language_data import DataError, Tokens, read_dialogs, read_texts, sample_dialogs  # noqa: E402
from language_training import split_items  # noqa: E402

from kit import log  # noqa: E402
from kit.run import Refused  # noqa: E402
from pykernels.models import CDialGPT, NezhaConfig, NezhaDialog  # noqa: E402
from tests.runs import assert_same_run, contents  # noqa: E402

SMALL = "--layers 1 --width 16 --heads 2 --context 24 --batch-size 8 --dropout 0.1 --threads 1 --quiet --min-count 1"


@pytest.fixture(scope="module")
def dialogs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 dialogues of three utterances; the second repeats the first's last token."""
    rng, rows = random.Random(1), []
    for _ in range(72):
        said = [rng.choice("甲乙丙丁") for _ in range(3)]
        rows.append("\t".join((" ".join(said), f"{said[-1]} 吗", "是 的")))
    path = tmp_path_factory.mktemp("data") / "dialogs.txt"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), *SMALL.split(), *more]


@pytest.mark.parametrize(
    ("main", "more"),
    [(train_lm.main, []), (train_dialog.main, []), (train_dialog.main, ["--model", "cdial-gpt"])],
    ids=["lm", "nezha", "cdial-gpt"],
)
def test_learns_and_resumes_bitwise(
    main: Callable[[list[str]], int],
    more: list[str],
    poems: Path,
    dialogs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """6 epochs, and the same stopped in the middle of the third; the second stage begins after four."""
    data = poems if main is train_lm.main else dialogs
    schedule = ["--epochs", "6", "--switch-epoch", "4", "--lr", "0.01", "--holdout", "0.2", "--samples", "2", *more]
    assert main(arguments(data, tmp_path / "whole", *schedule)) == 0
    printed = capsys.readouterr().out
    assert "held-out loss: " in printed and printed.count("1: ") == 1
    scores = json.loads((tmp_path / "whole" / "scores.json").read_text())
    assert scores["held_loss"] < 0.8 * scores["held_loss_before"]

    halves = arguments(data, tmp_path / "halves", *schedule)
    assert main([*halves, "--max-steps", "19"]) == 0
    assert contents(tmp_path / "halves" / "last.safetensors")[1]["step"] == 19
    torch.manual_seed(12345)  # the state of the generator comes from the checkpoint
    capsys.readouterr()
    assert main([*halves, "--resume", "auto"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert json.loads((tmp_path / "halves" / "scores.json").read_text()) == scores
    same = capsys.readouterr().out.splitlines()[:-1]  # the last line names the folder
    assert same == printed.splitlines()[:-1]
    rows = log.read(tmp_path / "whole" / "log.csv")
    assert {row["stage"] for row in rows} == {"1", "2"} and any(row["perplexity"] for row in rows)


def test_poems_continue_the_prompt(poems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(poems, tmp_path, "--epochs", "1", "--holdout", "0", "--prompt", "春春", "--dtype", "bf16")
    assert train_lm.main(argv) == 0
    written = [line for line in capsys.readouterr().out.splitlines() if line.startswith("text ")]
    assert len(written) == 4 and all(line.split(": ")[1].startswith("春春") for line in written)


@pytest.mark.parametrize(("kind", "model"), [("nezha", NezhaDialog), ("cdial-gpt", CDialGPT)])
def test_chat(
    kind: str,
    model: type,
    dialogs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = arguments(dialogs, tmp_path, "--epochs", "1", "--max-steps", "2", "--samples", "0", "--model", kind)
    assert train_dialog.main(argv) == 0
    talk = chat.Chat.load(tmp_path)
    assert type(talk.model) is model and len(talk.tokens) == talk.model.config.vocab_size
    torch.manual_seed(1)
    first = talk.reply("甲乙")
    assert [len(u) for u in talk.history][0] == 2 and talk.tokens.decode(talk.history[1]) == first
    assert talk.reply(["丙", "是", "的"]) is not None and len(talk.history) == 4
    talk.reply("甲" * 2000)  # longer than what the model can read
    assert len(talk.history) == 6 and 8 < len(talk.history[4]) < 2000

    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("甲乙\n\n甲乙\n"))
    assert chat.main([str(tmp_path), "--seed", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == first


def test_chat_by_word_pieces(tmp_path: Path) -> None:
    """A converted model brings BERT's tokenizer, not the characters of a training."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, "你", "好", "play", "##ing", "ok"]), encoding="utf-8")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    sizes = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    NezhaDialog(NezhaConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path / "model")
    talk = chat.Chat.load(tmp_path)
    torch.manual_seed(1)
    reply = talk.reply("你好playing OK")
    assert talk.history[0] == [5, 6, 7, 8, 9] and talk.tokens.decode(talk.history[0]) == "你好playing ok"
    assert talk.tokens.decode(talk.history[1]) == reply and not set(talk.history[1]) & {0, 1, 3}
    assert talk.tokens.encode(["好", "ok", "x"]) == [6, 9, 1] and talk.tokens["[SEP]"] == 3
    config = NezhaConfig(**sizes | {"vocab_size": 9}, intermediate_size=8)
    NezhaDialog(config).save_pretrained(tmp_path / "model")
    with pytest.raises(Refused, match="tokenizer_config.json: expected 9 tokens, got 10"):
        chat.Chat.load(tmp_path)


def test_data(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a b\tc\n你好\t在吗\n", encoding="utf-8")
    assert read_dialogs([str(tmp_path / "d.txt")]) == [[["a", "b"], ["c"]], [["你", "好"], ["在", "吗"]]]
    (tmp_path / "d.json").write_text(json.dumps({"train": [["a b", "c", "d"]], "valid": []}))
    assert read_dialogs([str(tmp_path / "d.json")]) == [[["a", "b"], ["c"], ["d"]]]
    (tmp_path / "d.txt").write_text("a\tb\nalone\n")
    with pytest.raises(DataError, match="d.txt: line 2: expected two utterances or more, none empty, got"):
        read_dialogs([str(tmp_path / "d.txt")])
    (tmp_path / "p.json").write_text('[{"paragraphs": ["a", "b"]}, {"title": "x"}]')
    with pytest.raises(DataError, match=r"p.json: \[1\].paragraphs: expected a list of strings, got null"):
        read_texts([str(tmp_path / "p.json")])
    (tmp_path / "d.json").write_text('{"train": 5}')
    with pytest.raises(DataError, match="d.json: train: expected a list of dialogues, got int"):
        read_dialogs([str(tmp_path / "d.json")])
    (tmp_path / "d.txt").write_bytes("你好".encode("gbk"))
    with pytest.raises(DataError, match="d.txt: no UTF-8: "):
        read_texts([str(tmp_path / "d.txt")])
    with pytest.raises(DataError, match="none: there is no such file"):
        read_texts([str(tmp_path / "none")])
    with pytest.raises(DataError, match=r"vocabulary: expected \[SEP\] among 3 tokens"):
        Tokens(["[PAD]", "[UNK]", "[CLS]"])
    tokens = Tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "你", "hello", "world", "["])
    assert tokens.encode(["你", "x"]) == [4, 1] and tokens.decode([2, 4, 5, 6, 7, 3]) == "你hello world["
    train, held = split_items(list(range(10)), 0.3, 1)
    assert len(held) == 3 and sorted(train + held) == list(range(10))
    assert split_items(list(range(10)), 0.3, 2)[1] != held
    with pytest.raises(Refused, match="nothing is left to train on of 1 texts"):
        split_items([1], 0.9, 1)


def test_sample_dialogs() -> None:
    pytest.importorskip("chatterbot_corpus", reason="chatterbot-corpus is not installed")
    pytest.importorskip("yaml", reason="pyyaml is not installed")
    dialogs = sample_dialogs()
    assert len(dialogs) > 400 and all(len(dialog) > 1 and all(dialog) for dialog in dialogs)


def test_mistakes_are_told(poems: Path, dialogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(main: Callable[[list[str]], int], *argv: str) -> str:
        try:
            assert main(list(argv)) == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err

    for main in (train_lm.main, train_dialog.main):
        assert "data: expected either --data FILE or --sample" in refused(main)
        assert "width: expected a multiple of 2 * heads = 8, got 20" in refused(main, "--sample", "--width", "20")
        assert "holdout: expected 0 <= holdout < 1, got 1.0" in refused(main, "--sample", "--holdout", "1")
        assert "there is no such file" in refused(main, *arguments(tmp_path / "none", tmp_path / "run"))
    assert "invalid choice: 'rnn'" in refused(train_dialog.main, "--sample", "--model", "rnn")
    told = refused(train_dialog.main, *arguments(poems, tmp_path / "run"))
    assert "poems.json: [0]: expected two utterances or more, none empty, got" in told
    assert "config.json does not exist: expected the folder of a trained model" in refused(chat.main, str(tmp_path))
    assert train_lm.main(arguments(poems, tmp_path / "lm", "--max-steps", "1")) == 0
    assert "expected nezha_dialog or cdial_gpt, got gpt2_ml" in refused(chat.main, str(tmp_path / "lm"))
    for main in (train_lm.main, train_dialog.main, chat.main):
        with pytest.raises(SystemExit) as end:
            main(["--help"])
        assert end.value.code == 0 and "exit status: 0" in capsys.readouterr().out
