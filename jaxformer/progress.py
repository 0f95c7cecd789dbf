"""How far a long job is: a bar on a terminal, a line now and then elsewhere; on standard error."""

import time
from types import TracebackType

import rich.progress
from rich.console import Console


class Progress:
    """Counts rows and tokens; the time left is told from the rows of this session."""

    def __init__(self, total: int, done: int, every: float = 10.0) -> None:
        self._total, self._done, self._every = total, done, every
        self._rows = self._tokens = 0
        self._begin = self._told = time.monotonic()
        self._console = Console(stderr=True, highlight=False, emoji=False)
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(self.note(), total=total, completed=done)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, rows: int, tokens: int) -> None:
        """So many more rows are done, with so many tokens generated."""
        self._done, self._rows, self._tokens = (
            self._done + rows,
            self._rows + rows,
            self._tokens + tokens,
        )
        self._bar.update(self._task, completed=self._done, description=self.note())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told >= self._every:
            self._told = now
            self.say(self.note())

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def note(self) -> str:
        """Rows done and how fast."""
        seconds = max(time.monotonic() - self._begin, 1e-9)
        note = f"{self._done:,}/{self._total:,} rows"
        if not self._rows:
            return note
        left = int((self._total - self._done) * seconds / self._rows)
        return (
            f"{note}, {self._rows / seconds:,.1f} rows/s, {self._tokens / seconds:,.0f} tokens/s, "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
