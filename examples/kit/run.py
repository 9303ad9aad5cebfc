"""The folder of a run: config.json, versions.json, log.csv, last.safetensors, and whatever the example adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pykernels import env
from pykernels.models.files import write_atomically

from . import config as kit_config
from .log import Log

RESUME = ("no", "auto")


class Refused(Exception):
    """What the user asked for cannot be done; the message says why, and what to do. Ends an example with status 2."""


class Run:
    """Opens, or makes, the folder of a run.

    resume "no": the folder may hold no checkpoint. "auto": go on from the last one, or begin where there is none; then
    every option must have the value it had, except those that may change. resumed: whether there is a checkpoint.
    checkpoint: the name of the file that a run goes on from.
    """

    def __init__(
        self, folder: Path, config: Any, resume: str, columns: list[str], checkpoint: str = "last.safetensors"
    ) -> None:
        self.folder, self.checkpoint = folder, folder / checkpoint
        self.resumed = self.checkpoint.exists()
        if self.resumed and resume == "no":
            raise Refused(f"{folder} holds a run already: give --resume auto to go on with it, or another --out")
        if self.resumed:
            stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if changed := kit_config.differences(config, stored):
                raise Refused(f"{folder} was begun with other options: " + "; ".join(changed))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # What a killed process was writing when it ended.
            for unfinished in folder.glob(f".{self.checkpoint.name}.*"):
                unfinished.unlink()
            self._write("config.json", kit_config.to_json(config))
            self._write("versions.json", json.dumps(env.collect(), indent=1) + "\n")
        except OSError as error:
            raise Refused(f"--out {folder}: cannot be written to: {error}") from None
        self.log = Log(folder / "log.csv", columns)

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, lambda path: path.write_text(text, encoding="utf-8"))
