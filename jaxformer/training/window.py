"""The steps since the last line of metrics, and what that line says."""

import time
from typing import Any

import jax

from jaxformer import sharding
from jaxformer.errors import NumericsError
from jaxformer.training.step import StepMetrics
from jaxformer.types import Batch

AHEAD = 2  # steps that may be under way before the host waits for the first


class Window:
    """Collects the metrics of steps, which stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._steps: list[Any] = []
        self._bad = 0
        self._tokens = 0
        self._seconds = 0.0
        self._waited = 0.0

    def add(self, metrics: StepMetrics, batch: Batch, begin: float, waited: float) -> None:
        """Note a step that began at `begin` and waited for data; the host must not run away."""
        self._steps.append(metrics)
        self._tokens += _real_tokens(batch) * jax.process_count()
        if len(self._steps) > AHEAD:
            jax.block_until_ready(self._steps[-1 - AHEAD])
        self._seconds += time.perf_counter() - begin
        self._waited += waited

    def note(self) -> str:
        """Tokens per second and the share of time spent waiting for data."""
        seconds = max(self._seconds, 1e-9)
        return f"{self._tokens / seconds:,.0f} tokens/s  data {self._waited / seconds:.0%}"

    def close(self, max_bad_steps: int) -> dict[str, float]:
        """The metrics of the window, which then begins anew.

        Loss is the mean over tokens. Raises `NumericsError` after `max_bad_steps` skipped in a row.
        """
        begin = time.perf_counter()
        steps = self._fetched()
        seconds = self._seconds + time.perf_counter() - begin
        for *_, skipped in steps:
            self._bad = self._bad + 1 if skipped else 0
            if self._bad >= max_bad_steps:
                raise NumericsError(
                    f"the loss or gradient was NaN or infinite {self._bad} updates in a row; the "
                    "last checkpoint is sound. Lower optim.learning_rate, raise optim.warmup, or "
                    "use compute_dtype float32, in another run_dir with init_from this one."
                )
        good = [step for step in steps if not step[-1]]
        scores = {}
        if good:
            total = sum(loss * tokens for loss, tokens, _, _ in good)
            scores["train/loss"] = total / max(sum(tokens for _, tokens, _, _ in good), 1)
            scores["train/grad_norm"] = sum(norm for _, _, norm, _ in good) / len(good)
        scores["train/skipped"] = len(steps) - len(good)
        scores["train/tokens_per_second"] = self._tokens / seconds
        scores["train/data_wait"] = self._waited / seconds
        self._steps.clear()
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        return scores

    def to_json(self) -> dict[str, Any]:
        """The steps, and how many were bad in a row before them, to be kept in a checkpoint."""
        return {"bad": self._bad, "steps": self._fetched()}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Window":
        """The window that `to_json` kept."""
        window = cls()
        window._bad = kept["bad"]
        window._steps.extend(kept["steps"])
        return window

    def _fetched(self) -> list[list[float]]:
        return [[float(x) for x in step] for step in sharding.fetch(self._steps)]


def _real_tokens(batch: Batch) -> int:
    return sum(int((side.seg > 0).sum()) for side in (batch.source, batch.target) if side)
