"""Vectors in a .npy file: written row by row, and there only when it is whole."""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from jaxformer.files import replacing, writing


def write_rows(path: Path, width: int, parts: Iterable[Float[np.ndarray, "rows D"]]) -> int:
    """Write `parts`, each of some rows of `width` numbers, as one float32 array; returns its rows.

    No more than a part is in memory. The file is opened before the first part is asked for. Raises
    `CheckpointError` if it cannot be written.
    """
    rows = 0
    with writing(path), replacing(path) as file:
        _write_header(file, rows, width)
        begin = file.tell()
        for part in parts:
            file.write(np.ascontiguousarray(part, "<f4").data)
            rows += len(part)
        file.seek(0)
        _write_header(file, rows, width)
        assert file.tell() == begin, "numpy leaves room for more rows in a header"
    return rows


def _write_header(file: BinaryIO, rows: int, width: int) -> None:
    fields = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, fields)
