"""Records in Parquet files, which pyarrow reads and writes (the extra `parquet`)."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from jaxformer.data.records import Layout, Record, Survey, of_object, require_good
from jaxformer.errors import ConfigError, DataError, listed
from jaxformer.files import open_regular


def survey(layout: Layout, *, strict: bool) -> Survey:
    """Read a file through; if `strict`, raise a `DataError` for the first bad record."""
    with open_regular(layout.path, DataError) as file:
        table = _opened(layout, file)
        names = table.schema_arrow.names
        if layout.field not in names:
            raise DataError(f"{layout.path} has no column {layout.field!r}, only {listed(names)}.")
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise DataError(f"{layout.path} has two columns {twice[0]!r}; rename one of them.")
        if taken := [name for name in layout.added if name in names]:
            raise DataError(
                f"{layout.path} has a column {taken[0]!r} already; choose another output_field."
            )
        rows = table.metadata.num_rows
        for first in range(0, rows if strict else 0, layout.shard_rows):
            for record in read(layout, file, first, min(first + layout.shard_rows, rows)):
                require_good(record)
        file.seek(0)
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
        status = os.fstat(file.fileno())
        return Survey(digest.hexdigest(), status.st_size, rows, (), status.st_mtime_ns)


def read(layout: Layout, file: BinaryIO, first: int, last: int) -> list[Record]:
    """The records of rows `first` to `last`, reading only the groups of rows they are in."""
    import pyarrow as pa

    table = _opened(layout, file)
    groups, begin, end = [], None, 0
    for group in range(table.metadata.num_row_groups):
        start, end = end, end + table.metadata.row_group(group).num_rows
        if start < last and end > first:
            begin = start if begin is None else begin
            groups.append(group)
    try:
        rows = table.read_row_groups(groups).slice(first - (begin or 0), last - first)
        texts = rows.column(layout.field).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DataError(f"{layout.path} is damaged: {_first_line(e)}") from None
    records = []
    for i, text in enumerate(texts):
        where = f"{layout.path}: row {first + i + 1}"
        found = of_object(layout, first + i, where, {layout.field: text}, None)
        records.append(found._replace(kept=rows.slice(i, 1)))
    return records


def write(
    layout: Layout,
    file: BinaryIO,
    records: Sequence[Record],
    added: Sequence[Mapping[str, str | list[Any]]],
) -> None:
    """Write records, each with columns of strings that are added to it; lists as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if records:
        table = pa.concat_tables([record.kept for record in records]).combine_chunks()
    else:
        with open_regular(layout.path, DataError) as source:
            table = _opened(layout, source).schema_arrow.empty_table()
    for name in layout.added:
        column = [_text(fields.get(name)) for fields in added]
        table = table.append_column(name, pa.array(column, pa.string()))
    pq.write_table(table, file)


def _opened(layout: Layout, file: BinaryIO) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ConfigError(
            f'{layout.path} needs pyarrow to be read: pip install -e ".[parquet]"; or convert '
            "it to JSON lines."
        ) from None
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DataError(f"{layout.path} is no sound Parquet file: {_first_line(e)}") from None


def _text(value: str | list[Any] | None) -> str | None:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
