"""What a run tells: the console, metrics.jsonl, TensorBoard and loss.png."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.progress
from rich.console import Console

from jaxformer import run
from jaxformer.files import write_atomically, writing

Value = float | int | str
BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
SAMPLE_LENGTH = 100  # characters shown of each part of a sample


class Report:
    """Writes the metrics of a run, each line as it comes; all but the first process are silent.

    On a resumed run, lines after `step` are dropped first, and the evaluation of `step` unless it
    is `evaluated`: they are about to be written again.
    """

    def __init__(self, run_dir: Path, step: int, steps: int, evaluated: bool = True) -> None:
        from tensorboardX import SummaryWriter

        self._lead = jax.process_index() == 0
        self._path = run_dir / run.METRICS
        if not self._lead:
            return
        lines = [
            line
            for line in read_metrics(self._path)
            if line["step"] < step
            or line["step"] == step
            and (evaluated or "eval/loss" not in line)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with writing(run_dir):
            write_atomically(self._path, text)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self._console = Console(highlight=False, emoji=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, note="")
        self._bar.start()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._lead:
            return
        self._bar.stop()
        with writing(self._path.parent):
            self._file.close()
            self._board.close()

    def advance(self, step: int, note: str) -> None:
        """Move the progress bar."""
        if self._lead:
            self._bar.update(self._task, completed=step, note=note)

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Write one line of metrics everywhere."""
        if not self._lead:
            return
        with writing(self._path.parent):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._board.add_scalar(name, value, step)
        shown = (f"{name} {_short(value)}" for name, value in metrics.items())
        self.say(f"step {step}  " + "  ".join(shown))

    def samples(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Show a few (source, prediction, reference)."""
        for row in rows:
            source, prediction, reference = (printable(text[:SAMPLE_LENGTH]) for text in row)
            self.say(f"  {source} -> {prediction}  ({reference})")

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._lead:
            self._console.print(text, markup=False, soft_wrap=True)

    def plot(self) -> None:
        """Draw the losses so far as loss.png."""
        if self._lead:
            with writing(self._path.parent):
                draw_losses(read_metrics(self._path), self._path.with_name("loss.png"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a kill cut short is left out."""
    if not path.is_file():
        return []
    whole = [
        line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1:] == "\n"
    ]
    return [json.loads(line) for line in whole]


def draw_losses(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training and validation loss by step, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for name, style in {"train/loss": "-", "eval/loss": "o-"}.items():
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def printable(text: str) -> str:
    """`text` with control characters escaped, so that no output can drive a terminal.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(c.encode("unicode_escape").decode() if drives(c) else c for c in text)


def json_line(value: Any) -> str:
    """`value` as one line of JSON that cannot drive a terminal either.

    >>> json_line("a\\x9bé")
    '"a\\\\u009bé"'
    """
    text = json.dumps(value, ensure_ascii=False)  # leaves only what may stand in a string
    return "".join(json.dumps(c)[1:-1] if drives(c) else c for c in text)


def drives(c: str) -> bool:
    """Whether a character controls the terminal, ends the line, or turns the writing direction."""
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in BIDI


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
