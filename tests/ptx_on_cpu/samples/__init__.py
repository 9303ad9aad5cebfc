"""The .cu files that the tests of the emulator compile."""

from pathlib import Path

FOLDER = Path(__file__).parent


def source(name: str) -> Path:
    return FOLDER / f"{name}.cu"
