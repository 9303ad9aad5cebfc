"""MNIST, from the files in which it is passed around, and as the variational models take it."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kit.run import Refused

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
SIDE = 28


class Digits(NamedTuple):
    """Images [N, 28, 28] uint8 and labels [N] int64, to train on and to test."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in MNIST's own format: two zeros, the type 8, the number of dimensions, their sizes."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        head = file.read(4)
        if head[:3] != b"\0\0\x08":
            raise Refused(f"{path}: expected an idx file of bytes, got one that begins with {head.hex()}")
        shape = np.frombuffer(file.read(4 * head[3]), ">i4")
        values = np.frombuffer(file.read(), np.uint8)
    if values.size != shape.prod():
        raise Refused(f"{path}: expected {shape.prod()} values of {shape.tolist()}, got {values.size}")
    return values.reshape(shape)


def load(folder: Path) -> Digits:
    """From mnist.npz (as Keras has it), or from the four idx files, packed or not."""
    packed = folder if folder.is_file() else folder / "mnist.npz"
    if packed.is_file():
        with np.load(packed) as file:
            if missing := set(ARRAYS) - set(file.files):
                raise Refused(f"{packed}: it lacks {', '.join(sorted(missing))}")
            arrays = [file[name] for name in ARRAYS]
    else:
        found = [next(iter(sorted(folder.glob(f"{name[:-5]}?{name[-4:]}-ubyte*"))), None) for name in IDX]
        if None in found:
            raise Refused(f"--data {folder}: expected mnist.npz, or {IDX[0]}-ubyte[.gz] and the three like it")
        arrays = [_idx(path) for path in found if path is not None]
    for name, array, other in zip(ARRAYS, arrays, [arrays[1], arrays[0], arrays[3], arrays[2]], strict=True):
        wanted = (len(other), SIDE, SIDE) if name.startswith("x") else (len(other),)
        if array.shape != wanted or not len(array):
            raise Refused(f"--data {folder}: {name}: expected {list(wanted)}, got {list(array.shape)}")
    images = [torch.from_numpy(array.astype(np.uint8 if i % 2 == 0 else np.int64)) for i, array in enumerate(arrays)]
    return Digits(*images)


def as_input(images: Tensor, model: str, networks: str) -> Tensor:
    """uint8 [B, 28, 28] as the model wants them: [0, 1] for the VAE, else [-1, 1]; [B, 1, 28, 28], or rows."""
    x = images.float() / 255
    x = x if model == "vae" else 2 * x - 1
    return x.unsqueeze(1) if networks == "image" else x


def as_images(x: Tensor, model: str) -> Tensor:
    """The reverse: [B, 28, 28] in [0, 1]."""
    x = x.float().view(-1, SIDE, SIDE)
    return x if model == "vae" else (x + 1) / 2
