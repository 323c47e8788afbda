"""The weight file of an ML Program (``weights/weight.bin``, MIL blob storage version 2), read without Apple's library.

Layout, little-endian: a 64-byte header (count, version), then per blob a 64-byte record (sentinel, type, size in bytes,
offset of the data, padding bits) that the program points at, and the data itself, aligned to 64 bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import ModelFileError

__all__ = ["WeightFile", "unpack_bits"]

_HEADER = struct.Struct("<II")
_RECORD = struct.Struct("<IIQQQ")
_VERSION = 2
_SENTINEL = 0xDEADBEEF

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
