"""A chat in the terminal with a model that train_dialog.py trained or pykernels.models.convert wrote.

python examples/chat.py runs/dialog
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from language_data import Tokens, WordPieces

from kit.run import Refused

EXAMPLES = """examples:
  python examples/chat.py runs/dialog
  echo 你好 | python examples/chat.py runs/dialog --seed 2
  python examples/chat.py runs/nezha  # of pykernels.models.convert nezha ... runs/nezha --vocab vocab.txt

An empty line begins anew; the end of the input (Ctrl-D) ends.
exit status: 0, 2 for wrong arguments or a folder without a model
"""

MODELS = {"nezha_dialog": "NezhaDialog", "cdial_gpt": "CDialGPT"}
TOKENIZER = "tokenizer_config.json"
LONGEST = 512  # the longest dialogue that NEZHA was trained on


class Chat:
    """A dialogue. history: utterances so far as ids, the oldest first."""

    def __init__(self, model: Any, tokens: Tokens | WordPieces) -> None:
        self.model, self.tokens = model.eval(), tokens
        self.history: list[list[int]] = []

    @classmethod
    def load(cls, folder: Path) -> Chat:
        """From a folder with config.json, model.safetensors and either vocab.txt or the files of BERT's tokenizer, or
        the run that has one in "model"."""
        from pykernels import models

        folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
        path = folder / "config.json"
        if not path.is_file():
            raise Refused(f"{path} does not exist: expected the folder of a trained model")
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        if kind not in MODELS:
            raise Refused(f"{path}: model_type: expected {' or '.join(MODELS)}, got {kind}")
        is_bert = (folder / TOKENIZER).is_file()
        tokens = WordPieces(folder) if is_bert else Tokens.load(folder / "vocab.txt")
        model = getattr(models, MODELS[kind]).from_pretrained(folder)
        if len(tokens) > model.config.vocab_size:
            path = folder / (TOKENIZER if is_bert else "vocab.txt")
            raise Refused(f"{path}: expected {model.config.vocab_size} tokens, got {len(tokens)}")
        return cls(model, tokens)

    def reply(self, said: str | Sequence[str]) -> str:
        """To what is said, a text or tokens. Both join the history.

        The oldest utterances are left out where they do not fit, and the end of what is said.
        """
        from pykernels.models import sampling
        from pykernels.models.cdial_gpt import encode_history
        from pykernels.models.nezha import cut_history, encode_dialog

        config = self.model.config
        is_nezha = config.model_type == "nezha_dialog"
        if is_nezha:
            longest, options = LONGEST, sampling.nezha_dialog()
        else:
            special = [config.bos_token_id, config.eos_token_id, config.pad_token_id, *config.speakers]
            longest, options = config.n_positions, sampling.cdial_gpt(special)
            options["max_new_tokens"] = min(options["max_new_tokens"], longest // 2)
        room = longest - options["max_new_tokens"]
        utterance = self.tokens.read(said) if isinstance(said, str) else self.tokens.encode(said)
        self.history.append(utterance[: room - 3])  # [CLS] and [SEP], or [CLS] and the two speakers
        if is_nezha:
            # Whoever speaks first has segment 0, also when what was said before is cut.
            kept = cut_history(self.history, room)
            ids, _ = encode_dialog(kept, cls=config.bos_token_id, sep=config.eos_token_id)
        else:
            kept = list(self.history)
            while len(ids := encode_history(kept, config)) > room:
                kept.pop(0)
        got = self.model.generate(torch.tensor([ids]), suppress_tokens=[self.tokens["[UNK]"]], **options)
        reply = [i for i in got[0, len(ids) :].tolist() if i not in (config.eos_token_id, config.pad_token_id)]
        self.history.append(reply)
        return self.tokens.decode(reply)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="A chat with a trained dialogue model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of the run or of the model")
    parser.add_argument("--seed", type=int, default=1, help="of the drawn replies (1)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    try:
        chat = Chat.load(args.folder)
    except (Refused, ModuleNotFoundError, OSError, ValueError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if said:
            print(chat.reply(said), flush=True)
        else:
            chat.history.clear()


if __name__ == "__main__":
    sys.exit(main())
