"""GGUF files: a header of named fields and tensor places, then blocks of quantised numbers.

The gguf package says what the numbers in a header mean and how blocks become floats. Its own reader
is not used: it believes a header, and makes arrays of whatever sizes that states.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from jaxtyping import Shaped

from jaxformer.errors import CheckpointError
from jaxformer.files import open_regular
from jaxformer.hub.tensors import Stored, map_file

VERSIONS = (2, 3)
MAX_HEADER = 64 * 2**20
"""Bytes of a header: several times what the largest vocabularies in use take."""
MAX_DIMS = 4
CHUNK = 2**22
"""Bytes of blocks that are turned into floats at once."""

Kind = GGMLQuantizationType
FLOATS = {
    Kind.F32: np.dtype("<f4"),
    Kind.F16: np.dtype("<f2"),
    Kind.BF16: np.dtype(ml_dtypes.bfloat16),
}
# The last ones are what llama.cpp falls back on for rows that 256 does not divide.
KINDS = (*FLOATS, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0,
         Kind.Q5_1)  # fmt: skip

NUMBERS = {
    GGUFValueType.UINT8: np.dtype("<u1"), GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"), GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"), GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"), GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"), GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("<u1"),
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file, its shape (rows first), and the kind of its blocks."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    A field is an int, float, bool, string, list of strings, or array of numbers.
    """

    path: Path
    fields: dict[str, Any]
    places: dict[str, Place]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The field `key`; `CheckpointError` if there is none, or it is not of type `kind`."""
        value = self.fields.get(key, default)
        if type(value) is not kind:
            fault = "is missing" if value is None else f"is of type {type(value).__name__}"
            raise self.error(f"the field {key!r} {fault}, and should be of type {kind.__name__}")
        return value

    def stored(self, name: str) -> Stored:
        """The tensor `name`: half floats as they are, and all other kinds as float32."""
        place = self.places[name]
        dtype = FLOATS.get(place.kind, np.dtype(np.float32))
        return Stored(place.shape, dtype, lambda: _read(self.path, place))

    def error(self, why: str) -> CheckpointError:
        """What to raise if the file is of no use."""
        return CheckpointError(f"cannot use {self.path}: {why}. Convert the model to GGUF again.")


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Every size in it is checked against the file's own before memory is taken for it. Raises
    `CheckpointError` if anything in it is wrong, or a tensor is of a kind that is not read here.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            cursor = _Cursor(file, min(size, MAX_HEADER))
            if (magic := cursor.take(4)) != b"GGUF":
                raise ValueError(f"it begins with {magic!r}, not with b'GGUF'")
            if (version := cursor.integer(4)) not in VERSIONS:
                raise ValueError(f"version {version:#x} is not 2 or 3 in little-endian bytes")
            n_tensors, n_fields = cursor.integer(8), cursor.integer(8)
            fields = _unique((cursor.string(), cursor.value()) for _ in range(n_fields))
            places = _places(cursor, n_tensors, fields.get("general.alignment", 32))
            _check_spans(places, size)
        except (ValueError, OSError) as e:
            raise CheckpointError(
                f"{path} is damaged or no GGUF file ({e}); download or convert it again."
            ) from None
    unknown = {place.kind.name for place in places.values() if place.kind not in KINDS}
    if unknown:
        raise CheckpointError(
            f"{path} has tensors of types that are not read here: {', '.join(sorted(unknown))}. "
            f"Get the model in one of {', '.join(kind.name for kind in KINDS)}."
        )
    return Header(path, fields, places)


class _Cursor:
    """Reads a header from its start; raises `ValueError` rather than pass `end`."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self.end, self.at = file, end, 0

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.end - self.at:
            raise ValueError(f"its header would end {n_bytes} bytes after byte {self.at}, which is "
                             f"past the file's end or {MAX_HEADER >> 20} MiB")  # fmt: skip
        data = self.file.read(n_bytes)
        if len(data) < n_bytes:
            raise ValueError("it shrank while it was read")
        self.at += n_bytes
        return data

    def integer(self, n_bytes: int) -> int:
        return int.from_bytes(self.take(n_bytes), "little")

    def string(self) -> str:
        return self.take(self.integer(8)).decode()

    def value(self) -> Any:
        kind = GGUFValueType(self.integer(4))
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self.array(GGUFValueType(self.integer(4)), self.integer(8))
        number = np.frombuffer(self.take(NUMBERS[kind].itemsize), NUMBERS[kind])[0].item()
        return bool(number) if kind == GGUFValueType.BOOL else number

    def array(self, kind: GGUFValueType, n: int) -> list[str] | np.ndarray:
        if kind == GGUFValueType.ARRAY:
            raise ValueError("it has an array of arrays")
        if kind == GGUFValueType.STRING:  # as many as there are: each takes a part of the file
            return [self.string() for _ in range(n)]
        return np.frombuffer(self.take(n * NUMBERS[kind].itemsize), NUMBERS[kind])


def _places(cursor: _Cursor, n_tensors: int, alignment: Any) -> dict[str, Place]:
    """The rest of the header: names, shapes, kinds, and offsets from the first aligned byte."""
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    places = _unique((cursor.string(), _place(cursor)) for _ in range(n_tensors))
    data = -(-cursor.at // alignment) * alignment
    return {name: replace(place, begin=data + place.begin) for name, place in places.items()}


def _place(cursor: _Cursor) -> Place:
    n_dims = cursor.integer(4)
    if not 1 <= n_dims <= MAX_DIMS:
        raise ValueError(f"it has a tensor of {n_dims} dimensions")
    shape = tuple(cursor.integer(8) for _ in range(n_dims))[::-1]
    kind = GGMLQuantizationType(cursor.integer(4))
    block, nbytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"it has a tensor of shape {shape} in blocks of {block}")
    return Place(shape, kind, cursor.integer(8), math.prod(shape) // block * nbytes)


def _check_spans(places: dict[str, Place], size: int) -> None:
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].begin):
        if place.begin < end or place.begin + place.nbytes > size:
            raise ValueError(f"the tensor {name!r} passes the file's end or overlaps another")
        end = place.begin + place.nbytes


def _unique(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} comes twice")
        found[name] = value
    return found


def _read(path: Path, place: Place) -> Shaped[np.ndarray, "..."]:
    """A read-only array: a map of the file, or what its blocks stand for."""
    if place.kind in FLOATS:
        return map_file(path, place.begin, place.shape, FLOATS[place.kind])
    data = map_file(path, place.begin, (place.nbytes,), np.dtype(np.uint8))
    rows = data.reshape(math.prod(place.shape[:-1]), -1)
    floats = np.empty((len(rows), place.shape[-1]), np.float32)
    step = max(1, CHUNK // rows.shape[1])  # the package holds what it makes twice
    for i in range(0, len(rows), step):
        with np.errstate(all="ignore"):  # a scale may be any half float, so infinite too
            floats[i : i + step] = dequantize(rows[i : i + step], place.kind)
    floats.flags.writeable = False
    return floats.reshape(place.shape)
