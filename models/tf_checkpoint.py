"""TensorFlow checkpoints (PREFIX.index with PREFIX.data-00000-of-00001 ...) read without TensorFlow.

The index is a sorted string table in the format of LevelDB: blocks of entries whose keys share prefixes, each block
followed by a byte that tells its compression (0 none, 1 Snappy) and a masked CRC-32C. Keys are names of variables,
values are protocol buffers (BundleEntryProto) with type, shape, and place in the data files. Formats:
doc/table_format.md of https://github.com/google/leveldb, format_description.txt of https://github.com/google/snappy,
and tensorflow/core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message tells which file, and all that is wrong with it."""


class Variable(NamedTuple):
    dtype: torch.dtype | int  # the number of a type that is not known here
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


class TensorFlowCheckpoint:
    """variables: of all names, without reading data. prefix: the path up to ".index" (which may be there, too)."""

    def __init__(self, prefix: str | Path) -> None:
        text = str(prefix)
        self.prefix = text.removesuffix(".index")
        self._index = Path(self.prefix + ".index")
        if not self._index.is_file():
            raise CheckpointError(f"{self._index} does not exist: expected the path of a checkpoint up to .index")
        data = self._index.read_bytes()
        try:
            entries = dict(_entries(data))
            header = _fields(entries.pop(b""))
            self.shards = int(header.get(1, [1])[-1])
            if header.get(2, [0])[-1]:
                raise _Broken("its data is big-endian")
            self.variables = {name.decode(): _variable(value) for name, value in entries.items()}
        except (_Broken, KeyError, IndexError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self._index}: no index of a TensorFlow checkpoint: {error}") from None

    def data_file(self, shard: int) -> Path:
        return Path(f"{self.prefix}.data-{shard:05d}-of-{self.shards:05d}")

    def problem(self, name: str) -> str | None:
        """Why a variable cannot be read, or None."""
        v = self.variables[name]
        if isinstance(v.dtype, int):
            return f"{name}: values of TensorFlow's type {v.dtype}"
        wanted = math.prod(v.shape) * v.dtype.itemsize
        if v.size != wanted:
            return f"{name}: expected {wanted} bytes of {v.dtype} {list(v.shape)}, got {v.size}"
        path = self.data_file(v.shard)
        if not path.is_file():
            return f"{name}: {path} does not exist"
        if path.stat().st_size < v.offset + v.size:
            return f"{name}: {path} has {path.stat().st_size} bytes, expected {v.offset + v.size} or more"
        return None

    def read(self, name: str) -> Tensor:
        """A copy of the variable's values."""
        if problem := self.problem(name):
            raise CheckpointError(problem)
        v = self.variables[name]
        with open(self.data_file(v.shard), "rb") as file:
            file.seek(v.offset)
            values = bytearray(file.read(v.size))
        if not values:
            return torch.empty(v.shape, dtype=v.dtype)  # type: ignore[arg-type]
        return torch.frombuffer(values, dtype=v.dtype).reshape(v.shape)  # type: ignore[arg-type]


# --- the string table ---


class _Broken(Exception):
    pass


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, least first, and where the next begins."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _Broken("a number is cut off")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise _Broken("its last eight bytes are not those of a string table")
    footer = data[-FOOTER:]
    at = 0
    for _ in range(2):  # of the block of metadata, which is empty
        _, at = _varint(footer, at)
    offset, at = _varint(footer, at)
    size, _ = _varint(footer, at)
    for _, place in _block_entries(_block(data, offset, size)):
        offset, at = _varint(place, 0)
        size, _ = _varint(place, at)
        yield from _block_entries(_block(data, offset, size))


def _block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + 5 > len(data):
        raise _Broken("a block is cut off")
    compression, crc = data[end], int.from_bytes(data[end + 1 : end + 5], "little")
    if _masked_crc(data[offset : end + 1]) != crc:
        raise _Broken("a checksum is wrong")
    if compression not in (0, 1):
        raise _Broken(f"compression {compression} is not known")
    return _unsnappy(data[offset:end]) if compression else data[offset:end]


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 - 4 * restarts, 0, b""
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or at + rest + size > end:
            raise _Broken("an entry is cut off")
        key = key[:shared] + block[at : at + rest]
        at += rest
        yield key, block[at : at + size]
        at += size


def _unsnappy(data: bytes) -> bytes:
    size, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:  # literal bytes
            length = tag >> 2
            if length >= 60:
                more = length - 59
                length, at = int.from_bytes(data[at : at + more], "little"), at + more
            out += data[at : at + length + 1]
            at += length + 1
            continue
        if tag & 3 == 1:  # a copy of what is already there
            length, distance, at = 4 + (tag >> 2 & 7), (tag >> 5) << 8 | data[at], at + 1
        else:
            width = 2 if tag & 3 == 2 else 4
            length, distance, at = 1 + (tag >> 2), int.from_bytes(data[at : at + width], "little"), at + width
        if not 0 < distance <= len(out):
            raise _Broken("compressed data is damaged")
        start = len(out) - distance
        for i in range(length):  # may reach into what it writes
            out.append(out[start + i])
    if len(out) != size:
        raise _Broken("compressed data is damaged")
    return bytes(out)


def _crc_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC = _crc_table()


def _masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


# --- protocol buffers ---


def _fields(data: bytes) -> dict[int, list[int | bytes]]:
    """Values of a message by the numbers of their fields."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varint(data, at)
        elif tag & 7 in (1, 5):
            width = 8 if tag & 7 == 1 else 4
            value, at = int.from_bytes(data[at : at + width], "little"), at + width
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            raise _Broken(f"a field of type {tag & 7}")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _variable(entry: bytes) -> Variable:
    fields = _fields(entry)

    def number(field: int) -> int:
        return int(fields.get(field, [0])[-1])

    shape = _fields(fields.get(2, [b""])[-1])  # type: ignore[arg-type]
    sizes = tuple(int(_fields(dim).get(1, [0])[-1]) for dim in shape.get(2, []))  # type: ignore[arg-type]
    if 7 in fields:
        raise _Broken("it has a variable in slices")
    return Variable(DTYPES.get(number(1), number(1)), sizes, number(3), number(4), number(5))
