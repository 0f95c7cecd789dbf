"""Tensors in what `torch.save` writes: a zip archive of one pickle and the tensors' bytes.

A pickle is a program, so it is never run: `_interpret` knows only the instructions that a state
dict needs, on plain values and the inert records below, and nothing that it names is imported.
"""

import io
import math
import os
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jaxformer.errors import CheckpointError
from jaxformer.files import open_regular
from jaxformer.hub.tensors import Stored, fits_numpy, map_file

MAX_READ = 4 * 2**20
"""Bytes of the pickle, and of the archive's directory: enough for 20,000 tensors."""
MAX_NAME = 256
"""Characters of a tensor's name, so that long prefixes of many names cost no memory."""

STORAGES = {
    f"torch.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Bool": np.bool_, "Byte": np.uint8, "Char": np.int8, "Short": np.int16, "Int": np.int32,
        "Long": np.int64, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
        "Float": np.float32, "Double": np.float64,
    }.items()
}  # fmt: skip
PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE"}
ALLOWED = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *STORAGES,
}


@dataclass(frozen=True, slots=True)
class _Name:
    """One of ALLOWED, which a pickle would import."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """`size` elements in the archive's member `data/KEY`."""

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage; `offset` and `strides` count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Member(NamedTuple):
    """Where the bytes of an archive's member are, and their checksum."""

    begin: int
    size: int
    crc: int


class _Bounded(io.FileIO):
    """A file of which little is read at once; zipfile would read a directory of any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        size = left if size is None or size < 0 else min(size, left)
        if size > MAX_READ:
            raise ValueError(f"a part of it has {size} bytes, over {MAX_READ}")
        return super().read(size) or b""


def open_torch_pickle(path: Path) -> dict[str, Stored]:
    """The tensors in a file of `torch.save`: a state dict, or dicts of them (`model.embed.weight`).

    Other values in the dicts are left out. Tensors are views with the strides that they were saved
    with. Raises `CheckpointError` if the pickle wants more than a state dict does, or anything is
    wrong with the file.
    """
    try:
        with open_regular(path) as regular, _Bounded(regular.fileno(), closefd=False) as file:
            members = _members(file)
            found = _interpret(_content(file, members["data.pkl"]))
            if "byteorder" in members and _content(file, members["byteorder"]) != b"little":
                raise ValueError("its numbers are big-endian")
        return {
            name: _stored(path, name, tensor, members.get(f"data/{tensor.storage.key}"))
            for name, tensor in _flatten(found).items()
        }
    except LookupError:
        why = "its pickle is malformed"
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as e:
        why = str(e)
    raise CheckpointError(
        f"{path} is not read: {why}. Only tensors in dicts are, as torch.save (PyTorch 1.6 or "
        "later) writes a state_dict(), and code in pickles is never executed. Where you trust "
        "the file, save the state dict alone or, better, as safetensors."
    )


def _members(file: _Bounded) -> dict[str, _Member]:
    """The members of an archive, by their names in its one folder; none may be compressed."""
    end = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    members, folders = {}, set()
    for entry in entries:
        folder, _, name = entry.filename.partition("/")
        file.seek(entry.header_offset)
        magic, *lengths = struct.unpack("<4s22xHH", file.read(30))
        begin = entry.header_offset + 30 + sum(lengths)
        if (
            magic != b"PK\3\4"
            or entry.compress_type != zipfile.ZIP_STORED
            or entry.compress_size != entry.file_size
            or entry.flag_bits & 1  # encrypted
            or begin + entry.file_size > end
            or name in members
        ):
            raise ValueError(
                f"its member {name!r} is compressed, encrypted, misplaced, or there twice"
            )
        members[name] = _Member(begin, entry.file_size, entry.CRC)
        folders.add(folder)
    if len(folders) != 1 or "data.pkl" not in members:
        raise ValueError("it has no data.pkl in its one folder")
    return members


def _content(file: _Bounded, member: _Member) -> bytes:
    file.seek(member.begin)
    data = file.read(member.size)
    if zlib.crc32(data) != member.crc:
        raise ValueError("a checksum is wrong")
    return data


def _interpret(pickle: bytes) -> Any:
    """What a pickle describes: plain values, dicts and lists, and `_Tensor`s.

    Raises `ValueError` at any other instruction or name, and `LookupError` if it is malformed.
    """
    instructions: Iterator[tuple[Any, Any, Any]] = pickletools.genops(pickle)
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = object()

    def since_mark() -> list[Any]:
        items = []
        while (item := stack.pop()) is not mark:
            items.append(item)
        return items[::-1]

    def last(n: int) -> list[Any]:
        return [stack.pop() for _ in range(n)][::-1]

    with warnings.catch_warnings(action="ignore"):  # odd escapes in names
        for opcode, argument, _ in instructions:
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    stack.append(mark)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case name if name in PLAIN:
                    stack.append(argument)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    stack.append(tuple(last(int(name[-1]))))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "APPEND" | "APPENDS" as name:
                    items = last(1) if name == "APPEND" else since_mark()
                    _of_type(list, stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS" as name:
                    items = last(2) if name == "SETITEM" else since_mark()
                    for key, value in zip(items[::2], items[1::2], strict=True):
                        _of_type(dict, stack[-1])[_of_type(str | int, key)] = value
                case "GLOBAL":
                    stack.append(_name(argument.replace(" ", ".")))
                case "STACK_GLOBAL":
                    stack.append(_name(".".join(_of_type(str, part) for part in last(2))))
                case "BINPERSID":
                    stack.append(_storage(*last(1)))
                case "REDUCE":
                    stack.append(_call(*last(2)))
                case "BUILD":  # an OrderedDict's attributes: versions of the modules
                    stack.pop()
                    _of_type(dict, stack[-1])
                case name:
                    raise ValueError(f"its pickle has the instruction {name}")
    raise ValueError("its pickle has no end")


def _of_type(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has a {type(value).__name__} in a wrong place")
    return value


def _name(name: str) -> _Name:
    if name not in ALLOWED:
        raise ValueError(f"its pickle asks for {name[:100]!r}, which is not allowed")
    return _Name(name)


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Name(kind), str(key), str(), int(size)) if kind in STORAGES:
            return _Storage(key, STORAGES[kind], size)
    raise ValueError("its pickle has storage of an unknown type")


def _call(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Name("collections.OrderedDict"), ():
            return {}
        case _Name("torch.Size"), (tuple(shape),):
            return shape
        case _Name("torch._utils._rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
        case (
            _Name("torch._utils._rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
        ):
            return _Tensor(storage, offset, shape, strides)
    raise ValueError("its pickle calls something as PyTorch does not")


def _flatten(found: Any) -> dict[str, _Tensor]:
    """The tensors in dicts of dicts, their keys joined with dots."""
    tensors, seen = {}, set()

    def walk(value: Any, prefix: str) -> Iterator[tuple[str, _Tensor]]:
        if isinstance(value, _Tensor):
            yield prefix[:-1], value
        elif isinstance(value, dict):
            if id(value) in seen:
                raise ValueError("it has the same dict in two places")
            seen.add(id(value))
            for key, item in value.items():
                if len(name := f"{prefix}{key}.") > MAX_NAME:
                    raise ValueError(f"it has a name over {MAX_NAME} characters")
                yield from walk(item, name)

    for name, tensor in walk(found, ""):
        if name in tensors:
            raise ValueError(f"it has two tensors {name!r}")
        tensors[name] = tensor
    if not tensors or "" in tensors:
        raise ValueError("it has no dict of tensors")
    return tensors


def _stored(path: Path, name: str, tensor: _Tensor, member: _Member | None) -> Stored:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    dtype = storage.dtype
    if not (
        member is not None
        and member.size == storage.size * dtype.itemsize
        and len(shape) == len(strides)
        and all(type(n) is int and 0 <= n < 2**48 for n in (tensor.offset, *shape, *strides))
        and fits_numpy(shape, dtype)
        # No more elements than there are, so that a copy is never larger than the file.
        and math.prod(shape) <= storage.size
        and (
            0 in shape
            or tensor.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            < storage.size
        )
    ):
        raise ValueError(f"its tensor {name!r} does not fit its storage")

    def read() -> Shaped[np.ndarray, "..."]:
        if 0 in shape:
            return map_file(path, member.begin, shape, dtype)
        data = map_file(path, member.begin, (member.size,), np.dtype(np.uint8))
        steps = tuple(n * dtype.itemsize for n in strides)
        return np.ndarray(shape, dtype, data, tensor.offset * dtype.itemsize, steps)

    return Stored(shape, dtype, read)
