"""The weight file of an ML Program (``weights/weight.bin``, MIL blob storage version 2), without Apple's library.

Layout, little-endian: a 64-byte header (count, version), then per blob a 64-byte record (sentinel, type, size in bytes,
offset of the data, padding bits) that the program points at, and the data itself, aligned to 64 bytes.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import ModelFileError

__all__ = ["WeightFile", "WeightWriter", "pack_bits", "unpack_bits"]

_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
_VERSION = 2
_SENTINEL = 0xDEADBEEF
_ALIGNMENT = 64

# Number in the record -> NumPy type; the sub-byte types are packed and get their own table below.
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f2"),
    2: np.dtype("<f4"),
    3: np.dtype("u1"),
    4: np.dtype("i1"),
    6: np.dtype("<i2"),
    7: np.dtype("<u2"),
    14: np.dtype("<i4"),
    15: np.dtype("<u4"),
}
# Number -> (bits, signed).
_PACKED = {8: (4, True), 9: (1, False), 10: (2, False), 11: (4, False), 12: (3, False), 13: (6, False)}

_NUMBERS = {
    "FLOAT16": 1, "FLOAT32": 2, "UINT8": 3, "INT8": 4, "INT4": 8, "UINT1": 9, "UINT2": 10, "UINT4": 11, "UINT6": 13,
}  # fmt: skip


def unpack_bits(data: np.ndarray, bits: int, count: int, *, signed: bool) -> np.ndarray:
    """Unpack values of less than a byte, the first value in the lowest bits of the first byte.

    Args:
        data: Bytes, uint8.
        bits: Of one value, 1 to 7.
        count: How many values to take; what follows is padding.
        signed: Whether the values are two's complement.

    Returns:
        (count,) int8 or uint8.

    Raises:
        ModelFileError: There are fewer values than asked for.
    """
    if data.size * 8 < bits * count:
        raise ModelFileError(f"{count} values of {bits} bits need {-(-bits * count // 8)} bytes; there are {data.size}")
    flags = np.unpackbits(data, count=bits * count, bitorder="little").reshape(count, bits)
    values = flags @ (1 << np.arange(bits, dtype=np.int16))
    if signed:
        values = np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    return values.astype(np.int8 if signed else np.uint8)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of :func:`unpack_bits`: (count,) integers to bytes, the rest of the last one zero."""
    flags = (values.astype(np.uint8).reshape(-1, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(flags.reshape(-1), bitorder="little")


class WeightFile:
    """A ``weight.bin``, memory-mapped.

    Raises:
        ModelFileError: It is missing, empty or of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise ModelFileError(f"the package has no weight file {path.name!r}, to which its program points")
        if path.stat().st_size < 64:
            raise ModelFileError(f"{path} is truncated: {path.stat().st_size} bytes are less than its header")
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        _, version = _HEADER.unpack_from(self._bytes[: _HEADER.size].tobytes())
        if version != _VERSION:
            raise ModelFileError(f"{path} is not MIL blob storage version {_VERSION} (its header says {version})")

    def read(self, offset: int, count: int) -> np.ndarray:
        """The blob whose record stands at ``offset``.

        Args:
            offset: Of the record, as the program states it.
            count: Of values, as the program's type states it.

        Returns:
            (count,) of the blob's own type; values of less than a byte as int8 or uint8.

        Raises:
            ModelFileError: The record is not there, the data ends early, or its size does not fit.
        """
        kind, data, padding = self.record(offset)
        size = data.size
        if kind in _PACKED:
            bits, signed = _PACKED[kind]
            found = (size * 8 - padding) // bits
            values = unpack_bits(data, bits, min(found, count), signed=signed)
        elif kind in _DTYPES and size % _DTYPES[kind].itemsize == 0:
            values = data.view(_DTYPES[kind])
            found = values.size
        else:
            raise ModelFileError(f"{self._path} has a blob of unknown type {kind} at {offset}")
        if found != count:
            raise ModelFileError(f"{self._path} has {found} values at {offset}; the program declares {count}")
        return values

    def record(self, offset: int) -> tuple[int, np.ndarray, int]:
        """The blob as it is stored: number of its type, its bytes, and the bits at their end that mean nothing.

        Raises:
            ModelFileError: The record is not there, or the data ends early.
        """
        record = self._bytes[offset : offset + _RECORD.size]
        if record.size < _RECORD.size:
            raise ModelFileError(f"{self._path} is truncated: no blob record at {offset} of {self._bytes.size} bytes")
        sentinel, kind, size, start, padding = _RECORD.unpack_from(record.tobytes())
        if sentinel != _SENTINEL:
            raise ModelFileError(f"{self._path} is damaged: no blob record at {offset}")
        data = self._bytes[start : start + size]
        if data.size < size:
            raise ModelFileError(
                f"{self._path} is truncated: a blob ends at {start + size} of {self._bytes.size} bytes"
            )
        return kind, data, padding


class WeightWriter:
    """Writes a ``weight.bin``; what has the same type and bytes is written once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(_ALIGNMENT))
        self._offsets: dict[tuple[int, int, bytes], int] = {}

    def add(self, values: np.ndarray, kind: str) -> int:
        """Append values, of MIL's type of that name (``UINT4``); the offset that the program points at."""
        number = _NUMBERS[kind]
        if number not in _PACKED:
            data = np.ascontiguousarray(values, _DTYPES[number]).reshape(-1)
            return self.add_record(number, data.view(np.uint8), 0)
        bits = _PACKED[number][0]
        packed = pack_bits(values.reshape(-1), bits)
        return self.add_record(number, packed, packed.size * 8 - values.size * bits)

    def add_record(self, kind: int, data: np.ndarray, padding: int) -> int:
        """Append a blob as :meth:`WeightFile.record` gives it."""
        content = data.tobytes()
        key = (kind, padding, hashlib.sha256(content).digest())
        if key not in self._offsets:
            offset = self._align()
            record = _RECORD.pack(_SENTINEL, kind, len(content), offset + _ALIGNMENT, padding)
            self._file.write(record.ljust(_ALIGNMENT, b"\0") + content)
            self._offsets[key] = offset
        return self._offsets[key]

    def close(self) -> None:
        self._align()
        self._file.seek(0)
        self._file.write(_HEADER.pack(len(self._offsets), _VERSION))
        self._file.close()

    def _align(self) -> int:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        return self._file.tell()
