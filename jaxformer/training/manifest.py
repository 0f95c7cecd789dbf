"""What makes a directory a sound checkpoint: the `manifest.json` in it.

It holds step, loss and meta, the structure of the state, and size and SHA-256 digest of every other
file. It is written last: a directory without one is no checkpoint, but what a killed save left.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from jaxformer.errors import CheckpointError
from jaxformer.files import MAX_JSON, read_capped, write_atomically

NAME = "manifest.json"


def begun(directory: Path) -> list[int]:
    """The steps under `directory`, rising, complete or not."""
    names = (path.name for path in directory.glob("*/"))
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def steps(directory: Path) -> list[int]:
    """The steps under `directory` that have a manifest, rising."""
    return [step for step in begun(directory) if (directory / str(step) / NAME).exists()]


def is_only_parameters(directory: Path) -> bool:
    """Whether the checkpoint under `directory` is of a model that was saved, not trained: training
    saves none of step 0."""
    return steps(directory) == [0]


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Add the files' digests and write the manifest, which makes `path` a checkpoint."""
    _write(path, manifest | {"files": _digests(path)})


def amend(path: Path, changes: dict[str, Any]) -> None:
    """Put `changes` in the manifest of a checkpoint; after a crash it is the old or the new one."""
    _write(path, read(path) | changes)


def _write(path: Path, manifest: dict[str, Any]) -> None:
    signed = {"sha256": _sha256(manifest), "manifest": manifest}
    write_atomically(path / NAME, json.dumps(signed, indent=1))


def read(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; `CheckpointError` if it is not what was written."""
    fault = "has changed"
    if not (path / NAME).exists():
        fault = "is missing (lost, or yet to be written)"
    else:
        with suppress(CheckpointError, ValueError, TypeError, KeyError, RecursionError):
            signed = json.loads(read_capped(path / NAME, MAX_JSON))
            if signed["sha256"] == _sha256(signed["manifest"]):
                return signed["manifest"]
    raise CheckpointError(f"the checkpoint {path} is damaged: {NAME} {fault}.")


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, every file being what was written; else `CheckpointError`."""
    manifest = read(path)
    try:
        found = _digests(path)
    except OSError as e:
        raise CheckpointError(f"cannot read the checkpoint {path}: {e}.") from e
    for name in sorted(manifest["files"].keys() | found.keys()):
        want, got = manifest["files"].get(name), found.get(name)
        if want == got:
            continue
        if want is None:
            fault = "does not belong to it"
        elif got is None:
            fault = "is missing"
        elif want["size"] != got["size"]:
            fault = f"has {got['size']} bytes instead of {want['size']}"
        else:
            fault = "has changed"
        raise CheckpointError(f"the checkpoint {path} is damaged: {name} {fault}.")
    return manifest


def choose(
    directory: Path, step: int | None, report: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of `step`, or the newest sound one, telling `report` what it passes over."""
    there = begun(directory)
    if step is not None:
        if step not in there:
            raise CheckpointError(
                f"{directory} has no checkpoint of step {step}, only of {there or 'none'}."
            )
        return directory / str(step), verify(directory / str(step))
    for candidate in reversed(there):
        path = directory / str(candidate)
        try:
            return path, verify(path)
        except CheckpointError as e:
            report(f"{e} Passing over it.")
    raise CheckpointError(
        f"{directory} has no sound checkpoint" + (f"; {there} are damaged." if there else ".")
    )


def delete(path: Path) -> None:
    """Delete a checkpoint, its manifest first: half deleted, it must not look like one."""
    (path / NAME).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def structure(tree: PyTree) -> dict[str, str]:
    """Path of each leaf -> its dtype and shape.

    >>> structure({"head": {"kernel": jax.ShapeDtypeStruct((8, 100), "float32")}})
    {'head/kernel': 'float32[8,100]'}
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def require_fit(path: Path, wanted: dict[str, str], found: dict[str, str], cast: bool) -> None:
    """Raise a `CheckpointError` naming every leaf in which two structures differ.

    `cast` lets floating-point dtypes differ.
    """
    rows = []
    for name in sorted(wanted.keys() | found.keys()):
        want, got = wanted.get(name), found.get(name)
        if want == got or (cast and want and got and _castable(want, got)):
            continue
        cause = _likely_cause(name, want, got)
        rows.append(f"  {name}: wanted {want or 'nothing'}, found {got or 'nothing'}; {cause}")
    if rows:
        raise CheckpointError(
            f"the checkpoint {path} does not fit; nothing was loaded:\n" + "\n".join(rows) + "\n"
            "Use the options that the run was started with, or another run_dir."
        )


def _castable(want: str, got: str) -> bool:
    (dtype, _, shape), (other, _, other_shape) = want.partition("["), got.partition("[")
    return shape == other_shape and "float" in dtype and "float" in other


def _likely_cause(name: str, want: str | None, got: str | None) -> str:
    if "lora" in name:
        return "another lora_rank or lora_targets?"
    if name.startswith("opt_state") and not (want and got):
        return "another optimizer?"
    if want is None:
        return "the checkpoint is of a model with this part"
    if got is None:
        return "the checkpoint is of a model without this part"
    if want.partition("[")[2] != got.partition("[")[2]:
        return "another model size or vocabulary?"
    return "another dtype; converting must be asked for (cast=True, floating point only)"


def _digests(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a checkpoint but its manifest and hidden files."""
    digests = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != NAME and not file.name.startswith("."):
            with file.open("rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
            digests[name] = {"size": file.stat().st_size, "sha256": digest}
    return digests


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
