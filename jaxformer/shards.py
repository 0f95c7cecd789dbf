"""A folder of shards and its manifest, which says what they are made of.

The manifest is written before the first shard and never changes; a shard is there whole or not at
all. Whoever would go on with something else is refused.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from jaxformer.errors import CheckpointError, ConfigError
from jaxformer.files import MAX_JSON, read_capped, replacing, writing

MANIFEST = "manifest.json"
MOST = 10**5
"""Shards of a folder, whose manifest is then below what is read of one."""


def ranges(rows: int, most: int, suffix: str) -> list[dict[str, Any]]:
    """The file of each shard, and the rows of the input that it is of: at most `most`.

    Raises `ConfigError` if they are more than a folder and its manifest should hold.
    """
    starts = range(0, rows, most)
    if len(starts) > MOST:
        raise ConfigError(
            f"{rows} rows make {len(starts)} shards of shard_rows {most}, over {MOST}; raise it to "
            f"{-(-rows // MOST)} or more."
        )
    return [
        {
            "file": f"part-{n:05}-of-{len(starts):05}{suffix}",
            "first_row": start,
            "rows": min(most, rows - start),
        }
        for n, start in enumerate(starts)
    ]


def check_same(output: Path, plan: dict[str, Any]) -> None:
    """Raise a `CheckpointError` naming all in which the job in a folder, if any, is another."""
    names = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    path = output / MANIFEST
    if not path.exists():
        others = sorted(set(names) - {"lock"})
        if others and not path.exists():  # another process may have begun meanwhile
            raise CheckpointError(
                f"{output} has no {MANIFEST}, but holds {others[0]!r}: it is no job of this "
                "command. Choose another output."
            )
        return
    try:
        old = _flat(json.loads(read_capped(path, MAX_JSON)))
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged; choose another output.") from None
    new = _flat(plan)
    differing = [
        f"  {key}: {old.get(key)!r} there, {new[key]!r} now"
        for key in new
        if old.get(key) != new[key]
    ]
    if differing:
        raise CheckpointError(
            f"{output} holds the results of another job:\n" + "\n".join(differing) + "\n"
            "Choose another output to start anew, or give the same to go on with it."
        )


def claim(output: Path, plan: dict[str, Any], index: int) -> None:
    """Write the manifest, unless it is there; the first of several processes has its way."""
    mine = output / f".{MANIFEST}.{index}"
    with writing(output):
        with replacing(mine) as file:
            file.write((json.dumps(plan, indent=1) + "\n").encode())
        with contextlib.suppress(FileExistsError):
            os.link(mine, output / MANIFEST)
        mine.unlink()
    check_same(output, plan)


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    """The values of a plan by dotted name."""
    return {
        f"{part}.{key}": value
        for part, values in plan.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
