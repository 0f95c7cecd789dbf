"""SIGTERM and Ctrl-C: finish the step, save, and exit with 75; a second signal exits at once."""

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxformer.errors import Stopped

Item = TypeVar("Item")


class StopRequest:
    """Within its `with` block, the first signal is only noted; `check` then raises `Stopped`."""

    def __init__(self) -> None:
        self._name = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._name = signal.Signals(number).name
        for each in self._old:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        name = self._name
        if jax.process_count() > 1:  # all processes must stop at the same step
            asked = multihost_utils.process_allgather(np.bool_(bool(name)))
            name = name or ("a signal to another process" if asked.any() else "")
        if name:
            raise Stopped(f"stopped by {name}; the same command resumes the run.")

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, with a check before each."""
        for item in items:
            self.check()
            yield item
