"""Files: read no further than they may be long, and written whole or not at all."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxformer.errors import CheckpointError, UserError

MAX_JSON = 16 * 2**20
"""Bytes of a config, a header or an index: twice what the largest models have."""


def open_regular(path: Path, error: type[UserError] = CheckpointError) -> BinaryIO:
    """A file to read bytes from, or a link to one; devices and pipes are refused without a wait.

    Raises `error`, naming the file, if it cannot be opened.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(number).st_mode):
            return os.fdopen(number, "rb")
        os.close(number)
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror}.") from None
    raise error(f"{path} is no regular file; remove it, or download it again.")


def read_capped(path: Path, most: int, error: type[UserError] = CheckpointError) -> bytes:
    """The bytes of a file of at most `most`; raises `error`, naming it, if there are more."""
    with open_regular(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise error(
                f"{path} has {size} bytes, over {most}: too much for what it should be. "
                "Is it another file?"
            )
        try:
            return file.read(size)
        except OSError as e:
            raise error(f"cannot read {path}: {e.strerror}.") from None


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Within it, an `OSError` (no room, no permission) is a `CheckpointError`."""
    try:
        yield
    except OSError as e:
        raise CheckpointError(
            f"cannot write to {place}: {e.strerror or e}. Make room or mend what is wrong "
            "there, and give the same command again."
        ) from e


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name, too
    finally:
        os.close(directory)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, whole."""
    with replacing(path) as file:
        file.write(text.encode())
