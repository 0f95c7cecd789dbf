"""A picture of attention: which of its source each token of a target looks at."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jaxformer.files import replacing, writing
from jaxformer.model import Attended
from jaxformer.training.report import printable

CELL, GAP, SIDE = 0.22, 0.2, 16.0
"""Inches: a token; around a panel; the most that the tokens of a panel, or panels side by side,
take."""
LONGEST = 24  # characters of a label


def draw_attention(attended: Sequence[Attended], path: Path) -> None:
    """A heat map for each pair, of which a few fit, as a PNG: the target's tokens one below the
    other, the source's side by side, the mean over layers and heads the darker the larger.

    The mean over layers shows alignments wherever in the stack they are made. Raises
    `CheckpointError` if the file cannot be written.
    """
    sources, targets = ([list(map(_label, each[side])) for each in attended] for side in (1, 2))
    across, down = (max(map(len, panels)) for panels in (sources, targets))
    cell = min(CELL, SIDE / max(across, down))
    points = 72 * min(cell, CELL / 2)
    left, top = (GAP + points / 72 * max(map(len, sum(each, []))) for each in (targets, sources))
    width, height = left + cell * across + GAP, top + cell * down + GAP
    columns = min(len(attended), max(1, int(SIDE / width)))
    rows = -(-len(attended) // columns)
    figure = Figure(figsize=(columns * width, rows * height))
    for i, (each, source, target) in enumerate(zip(attended, sources, targets, strict=True)):
        row, column = divmod(i, columns)
        size = cell * len(source) / width / columns, cell * len(target) / height / rows
        corner = (column + left / width) / columns, 1 - (row + top / height) / rows - size[1]
        axes = figure.add_axes((*corner, *size))
        axes.imshow(each.weights.mean((0, 1)), cmap="Blues", vmin=0, aspect="auto")
        axes.tick_params("x", bottom=False, labelbottom=False, labeltop=True, labelrotation=90)
        axes.tick_params("y", left=False)
        for axis, labels in ((axes.xaxis, source), (axes.yaxis, target)):
            # A dollar sign in a text begins no formula.
            axis.set_ticks(range(len(labels)), labels, fontsize=points, parse_math=False)
    with writing(path), replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _label(text: str) -> str:
    """A token as it can be drawn; white space is an open box."""
    return printable(text).strip()[:LONGEST] or "\N{OPEN BOX}"
