"""Records of a file to be generated from: each as it is read, and as it is written, more in it.

A shard is so many rows that follow each other. The files are read once to be checked, and then
shard by shard; a row is numbered by its place in the file, from 0, whatever is left out.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from jaxformer.data.sources import as_text
from jaxformer.errors import DataError, listed
from jaxformer.files import open_regular

MOST = 16 * 2**20
"""Bytes of a line; a longer one is a bad record."""
Kind = Literal["text", "jsonl", "parquet"]


class Layout(NamedTuple):
    """How records are to be read and written."""

    path: Path
    kind: Kind
    field: str
    """What holds the text."""
    added: tuple[str, ...]
    """Fields that will be added, which no record may have."""
    shard_rows: int


class Survey(NamedTuple):
    """What a file is: two of the same SHA-256 have the same records."""

    sha256: str
    size: int
    rows: int
    starts: tuple[int, ...]
    """The byte at which each shard begins (in a file of lines)."""
    changed: int
    """When it was last written to."""


class Record(NamedTuple):
    """One row: its text, or why there is none; and all of it, as it is kept."""

    row: int
    text: str
    error: str
    kept: Any
    """A JSON object as it was written; of a Parquet file, a table of one row."""


def kind_of(path: Path) -> Kind:
    """What a file holds, by its name."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    return "jsonl" if suffix in (".jsonl", ".ndjson", ".json") else "text"


def survey(layout: Layout, *, strict: bool) -> Survey:
    """Read a file through; if `strict`, raise a `DataError` for the first bad record."""
    if layout.kind == "parquet":
        from jaxformer.data import parquet

        return parquet.survey(layout, strict=strict)
    digest, starts, rows = hashlib.sha256(), [], 0
    with open_regular(layout.path, DataError) as file:
        for start, line in _lines(file, digest):
            if rows % layout.shard_rows == 0:
                starts.append(start)
            if strict:
                require_good(_record(layout, rows, line))
            rows += 1
        return Survey(digest.hexdigest(), file.tell(), rows, tuple(starts), _changed(file))


def read(layout: Layout, found: Survey, shard: int) -> list[Record]:
    """The records of a shard; `DataError` if the file is no longer what was surveyed."""
    first = shard * layout.shard_rows
    last = min(first + layout.shard_rows, found.rows)
    with open_regular(layout.path, DataError) as file:
        if (os.fstat(file.fileno()).st_size, _changed(file)) != (found.size, found.changed):
            raise DataError(
                f"{layout.path} has changed while it was being read; give the same command again."
            )
        if layout.kind == "parquet":
            from jaxformer.data import parquet

            return parquet.read(layout, file, first, last)
        file.seek(found.starts[shard])
        rows = zip(range(first, last), _lines(file), strict=False)
        return [_record(layout, row, line) for row, (_, line) in rows]


def require_good(record: Record) -> None:
    """Raise a `DataError` if nothing can be generated from a record."""
    if record.error:
        raise DataError(
            f"{record.error} Mend or remove it; or have such records left out with "
            "--on_bad_record skip, or told of in their place with emit."
        )


def write(
    layout: Layout,
    file: BinaryIO,
    records: Sequence[Record],
    added: Sequence[Mapping[str, str | list[Any]]],
) -> None:
    """Write records, each with fields that are added to it."""
    if layout.kind == "parquet":
        from jaxformer.data import parquet

        return parquet.write(layout, file, records, added)
    for record, fields in zip(records, added, strict=True):
        # What was there stays as it was written: numbers, spaces, and keys that stand twice.
        head = record.kept.rstrip()[:-1].rstrip()
        comma = "" if head == "{" else ", "
        line = head + comma + json.dumps(fields, ensure_ascii=False)[1:] + "\n"
        file.write(line.encode("utf-8", "backslashreplace"))


def as_pair(line: str, where: str) -> tuple[str, str]:
    """The source and target of a JSON object with such fields; without a source, it is empty."""
    try:
        pair = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({e}); mend or remove the line.") from None
    if not isinstance(pair, dict) or "target" not in pair:
        raise DataError(f'{where}: no pair; write {{"source": "...", "target": "..."}}.')
    source = as_text(pair.get("source", ""), f"{where}: field 'source'")
    return source, as_text(pair["target"], f"{where}: field 'target'")


def of_object(layout: Layout, row: int, where: str, value: Any, kept: Any) -> Record:
    """The record whose fields are `value`."""
    if not isinstance(value, dict):
        return _bad(row, f"{where}: not a JSON object; write {{...}} with named fields.")
    if layout.field not in value:
        error = f"{where}: no field {layout.field!r}, only {listed(value) or 'none'}."
        return Record(row, "", error, kept)
    if taken := [name for name in layout.added if name in value]:
        return _bad(row, f"{where}: has a field {taken[0]!r} already; choose an output_field.")
    try:
        text = as_text(value[layout.field], f"{where}: field {layout.field!r}")
    except DataError as e:
        return Record(row, "", str(e), kept)
    return Record(row, text, "", kept)


def _record(layout: Layout, row: int, line: bytes | None) -> Record:
    where = f"{layout.path}:{row + 1}"
    if line is None:
        return _bad(row, f"{where}: a line of over {MOST} bytes.")
    try:
        text = line.decode("utf-8-sig" if row == 0 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as e:
        return _bad(row, f"{where}: byte {e.start} of the line is not UTF-8 ({e.reason}).")
    if "\0" in text:
        return _bad(row, f"{where}: NUL byte; is this a text file?")
    if layout.kind == "text":
        kept = json.dumps({layout.field: text}, ensure_ascii=False)
        return Record(row, text, "", kept)
    if not text.strip():
        return Record(row, "", "", "{}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        return _bad(row, f"{where}: not JSON ({e}).")
    return of_object(layout, row, where, value, text)


def _bad(row: int, error: str) -> Record:
    return Record(row, "", error, "{}")


def _lines(file: BinaryIO, digest: Any = None) -> Iterator[tuple[int, bytes | None]]:
    """Where each line begins, and the line; None in place of one that is too long."""
    at = file.tell()
    while part := file.readline(MOST):
        start, line = at, part
        while True:
            at += len(part)
            if digest is not None:
                digest.update(part)
            if part.endswith(b"\n") or not (part := file.readline(MOST)):
                break
            line = None
        yield start, line


def _changed(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_mtime_ns
