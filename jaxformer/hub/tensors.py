"""Tensors in safetensors files: found and checked as a whole, then read or written one by one.

The safetensors package checks each header; it is not asked for tensors, since what it returns are
copies, and numpy has no bfloat16 of its own.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from jaxformer.errors import CheckpointError, listed
from jaxformer.files import MAX_JSON, open_regular, read_capped, replacing, writing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
OTHERS = {".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".safetensors"}

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
        "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64,
        "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor that is not in memory: its shape and dtype, and how to read it.

    `read` gives a read-only memory map of this tensor alone: pages come in as they are used, and
    are let go of with the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Shaped[np.ndarray, "..."]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_safetensors(folder: Path) -> dict[str, Stored]:
    """The tensors of `model.safetensors` in a folder, or of the shards that its index names.

    Nothing but headers is read. Raises `CheckpointError` if there are no such files, or anything
    is wrong with one of them, or the index does not fit them.
    """
    if os.path.lexists(folder / WEIGHTS):
        return _open_file(folder / WEIGHTS)
    if not os.path.lexists(folder / INDEX):
        raise CheckpointError(_what_is_there(folder))
    wanted = _weight_map(folder / INDEX)
    shards = sorted(set(wanted.values()))
    _refuse(
        f"{folder / INDEX} names what is no plain file name ending in .safetensors",
        (shard for shard in shards if not SHARD.fullmatch(shard)),
    )
    _refuse(
        f"{folder} lacks files that {INDEX} names; download them again",
        (shard for shard in shards if not os.path.lexists(folder / shard)),
    )
    tensors, place, twice = {}, {}, []
    for shard in shards:
        found = _open_file(folder / shard)
        twice += tensors.keys() & found.keys()
        tensors |= found
        place |= dict.fromkeys(found, shard)
    _refuse(f"{folder} has tensors in two shards", sorted(twice))
    _refuse(
        f"{folder} lacks tensors in the shards where {INDEX} says they are",
        (name for name, shard in wanted.items() if place.get(name) != shard),
    )
    return tensors


def write_safetensors(
    folder: Path, tensors: Mapping[str, Stored], *, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write `model.safetensors`, or shards and their index if that would be over a shard's size.

    One tensor is in memory at a time. The file that makes a checkpoint of the folder comes last
    and by renaming, so that a kill leaves all or none. Raises `CheckpointError` if the folder holds
    such a file already or cannot be written to, or safetensors has no name for a dtype.
    """
    _refuse(
        f"{folder} holds weights already; choose an empty folder, or remove them first",
        (name for name in (WEIGHTS, INDEX) if os.path.lexists(folder / name)),
    )
    _refuse(
        f"cannot write these to {folder}, since safetensors has no such dtype or name",
        (f"{k} ({t.dtype})" for k, t in tensors.items()
         if t.dtype not in NAMES or k == "__metadata__"),
    )  # fmt: skip
    shards: list[dict[str, Stored]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if len(shards) == 1:
            _write_file(folder / WEIGHTS, tensors)
            return
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            _write_file(folder / file, shard)
            weight_map |= dict.fromkeys(shard, file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        with replacing(folder / INDEX) as file:
            file.write(json.dumps(index, indent=2).encode() + b"\n")


def in_memory(array: Shaped[np.ndarray, "..."]) -> Stored:
    """An array as what `write_safetensors` takes."""
    return Stored(array.shape, array.dtype, lambda: array)


def map_file(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> Shaped[np.ndarray, "..."]:
    """A read-only array over the bytes of a file from `offset`; `CheckpointError` if it shrank."""
    if 0 in shape:  # of which there is no map
        return np.ndarray(shape, dtype, b"")
    try:
        return np.asarray(np.memmap(path, dtype, "r", offset, shape))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} has changed since it was opened: {e}.") from None


def fits_numpy(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether there can be such an array; one that holds nothing can be too large too."""
    return len(shape) <= 32 and math.prod(max(n, 1) for n in shape) * dtype.itemsize < 2**63


def _open_file(path: Path) -> dict[str, Stored]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(MAX_JSON, size - 8):
            raise _damaged(path, f"its {size} bytes cannot have a header of {length}")
        try:
            with safe_open(path, "numpy"):  # sizes, dtypes, spans: no overlap, hole or overflow
                header = _json(file.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError) as e:
            raise _damaged(path, str(e)) from None
    header.pop("__metadata__", None)
    _refuse(
        f"{path} has dtypes that are not read here; convert it to BF16, F16 or F32",
        (f"{name} ({t['dtype']})" for name, t in header.items() if t["dtype"] not in DTYPES),
    )
    tensors = {}
    for name, tensor in header.items():
        begin, end = (8 + length + n for n in tensor["data_offsets"])
        shape, dtype = tuple(tensor["shape"]), DTYPES[tensor["dtype"]]
        fits = begin <= end <= size and math.prod(shape) * dtype.itemsize == end - begin
        if not (fits and fits_numpy(shape, dtype)):
            raise _damaged(path, f"{name!r} does not fit its place")
        tensors[name] = Stored(shape, dtype, _reader(path, begin, shape, dtype))
    return tensors


def _reader(
    path: Path, begin: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
    return lambda: map_file(path, begin, shape, dtype)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = _json(read_capped(path, MAX_JSON))
    except (ValueError, RecursionError) as e:
        raise _damaged(path, str(e)) from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise _damaged(path, "it has no weight_map of tensor names to file names")
    return places


def _json(data: bytes) -> Any:
    """JSON in UTF-8 where no object has a key twice: readers would not agree on its value."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    return json.loads(data.decode(), object_pairs_hook=unique)


def _write_file(path: Path, tensors: Mapping[str, Stored]) -> None:
    # Wide dtypes first, as safetensors does it, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            _write_tensor(file, name, tensor)


def _write_tensor(file: BinaryIO, name: str, tensor: Stored) -> None:
    """In a function of its own, so that the array is gone when the next one is read."""
    array = tensor.read()
    if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(f"{name} is {array.dtype}{array.shape}, not as announced: {tensor}")
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder; give one with {WEIGHTS} in it."
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if Path(name).suffix in PICKLES | OTHERS]
    found = (
        f"{folder} has neither {WEIGHTS} nor {INDEX}, only {listed(others or names) or 'nothing'}."
    )
    if not others:
        return found
    convert = "save the model as safetensors where it was made: transformers' save_pretrained does."
    if any(Path(name).suffix in PICKLES for name in others):
        return f"{found} Pickles can run any code, so they are never executed here; {convert}"
    return f"{found} These are not read here; {convert}"


def _refuse(why: str, names: Iterable[str]) -> None:
    """Raise a `CheckpointError` that lists `names`, if there are any."""
    if names := list(names):
        raise CheckpointError(f"{why}: {listed(names)}.")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({why}); download or export it again.")
