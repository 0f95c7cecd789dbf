"""Checkpoints of a training run, kept in `RUN/checkpoints/STEP`.

Orbax writes and reads the arrays. The manifest beside them (manifest.py) is what Orbax lacks: it
restores a flipped bit without a word, and casts dtypes as silently.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxformer.errors import CheckpointError
from jaxformer.files import writing
from jaxformer.training import manifest

warn = logging.getLogger(__name__).warning


class Restored(NamedTuple):
    """A training state, the `meta` saved with it, and its step."""

    state: Any
    meta: dict[str, Any]
    step: int


class Checkpoints:
    """The checkpoints of one run, for its one writer; leaving the `with` block waits for the last.

    Kept are the `keep_latest` newest and the `keep_best` of lowest loss. Making one deletes what
    killed saves left behind, so hold `lock(run_dir)` first. `report` is told of whatever else is
    not as it was saved.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_latest: int,
        keep_best: int,
        report: Callable[[str], None] = warn,
    ) -> None:
        self._dir = _directory(run_dir)
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._report = report
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        with writing(run_dir):
            self._dir.mkdir(parents=True, exist_ok=True)
        for step in set(manifest.begun(self._dir)) - set(self.steps()):
            path = self._dir / str(step)
            report(f"{path} has no {manifest.NAME}: lost, or its save was killed. Deleting it.")
        self._clean()
        _barrier("clean")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointError as e:
            if error is None:
                raise
            warn("%s", e)  # what ended the run matters more
        finally:
            self._pool.shutdown()

    def save(self, step: int, state: PyTree, meta: dict[str, Any], *, loss: float | None) -> None:
        """Begin to save `state` (arrays) and `meta` (JSON); returns once the arrays are copied.

        The caller may donate the arrays at once. Steps after this one, which only a run that went
        back can have, are dropped. Raises `CheckpointError` if the save before this one failed.
        """
        self.wait()
        record = {
            "step": step,
            "loss": None if loss is None else float(loss),
            "meta": json.loads(json.dumps(meta)),  # a copy: the caller's may change meanwhile
            "structure": manifest.structure(state),
        }
        path = self._dir / str(step)
        if jax.process_index() == 0:
            manifest.delete(path)
        _barrier("delete")
        try:
            response = ocp.save_async(str(path), state, checkpointable_name="state")
        except Exception as e:
            raise self._failure(step, e) from e
        self._saving = step, self._pool.submit(self._finish, path, response, record)

    def amend(self, step: int, meta: dict[str, Any], *, loss: float) -> None:
        """Give the complete checkpoint of `step` another `meta` and `loss`.

        Its arrays are not touched. Raises `CheckpointError` if it is damaged or cannot be written.
        """
        self.wait()
        if jax.process_index() == 0:
            with writing(self._dir):
                manifest.amend(self._dir / str(step), {"loss": float(loss), "meta": meta})
            self._prune(self.steps()[-1])
        _barrier("amended")

    def check(self) -> None:
        """Raise `CheckpointError` if the save in flight has failed already; waits for nothing.

        Several processes, which must fail together, learn of it from `wait`.
        """
        if self._saving and self._saving[1].done() and jax.process_count() == 1:
            self.wait()

    def wait(self) -> None:
        """Wait until the save in flight is complete; raises `CheckpointError` if it failed."""
        if self._saving is None:
            return
        step, future = self._saving
        error = future.exception()
        self._saving = None
        if error is not None:
            raise self._failure(step, error) from error
        _barrier("saved")

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint on disk, rising."""
        return manifest.steps(self._dir)

    def restore(
        self,
        abstract_state: PyTree,
        step: int | None = None,
        *,
        cast: bool = False,
    ) -> Restored | None:
        """The state of `step`, or of the newest sound checkpoint; None if there are none at all.

        `abstract_state`: `jax.ShapeDtypeStruct` leaves; their shardings need not be those of the
        saved arrays. Damaged checkpoints are passed over, and reported, unless asked for by
        name. `cast` lets floating-point dtypes differ. Raises `CheckpointError`.
        """
        self.wait()
        if step is None and not self.steps():
            return None
        path, record = manifest.choose(self._dir, step, self._report)
        manifest.require_fit(path, manifest.structure(abstract_state), record["structure"], cast)
        return Restored(_load(path, _placed(abstract_state)), record["meta"], record["step"])

    def _finish(self, path: Path, response: Any, record: dict[str, Any]) -> None:
        """Wait for Orbax, write the manifest, and delete what need not be kept (in a thread)."""
        response.result()
        if jax.process_index() == 0:
            manifest.write(path, record)
            self._prune(record["step"])

    def _prune(self, newest: int) -> None:
        """Delete what need not be kept now that `newest` is complete."""
        for step in set(self.steps()) - self._kept(newest):
            manifest.delete(self._dir / str(step))

    def _kept(self, newest: int) -> set[int]:
        """The steps to keep now that `newest` is complete."""
        steps = [step for step in self.steps() if step <= newest]
        losses = {}
        for step in steps:
            with contextlib.suppress(CheckpointError):  # a damaged one cannot be the best
                losses[step] = manifest.read(self._dir / str(step))["loss"]
        ranked = sorted(
            (s for s in losses if losses[s] is not None and math.isfinite(losses[s])),
            key=lambda s: (losses[s], -s),
        )
        return set(steps[-self._keep_latest :]) | set(ranked[: self._keep_best])

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        """Remove what the failed save of `step` left, and say what happened."""
        self._clean()
        return CheckpointError(
            f"saving step {step} in {self._dir} failed: {_first_line(error)}\n"
            f"{shutil.disk_usage(self._dir).free / 1e9:.1f} GB are free there. Complete "
            f"checkpoints: {self.steps() or 'none'}. Make room, then resume the run."
        )

    def _clean(self) -> None:
        """Delete what killed or failed saves left behind."""
        if jax.process_index() == 0:
            complete = {str(step) for step in self.steps()}
            ours = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
            for path in self._dir.iterdir():
                if ours.fullmatch(path.name) and path.name not in complete:
                    manifest.delete(path)


def restore_params(
    run_dir: Path,
    abstract_params: PyTree,
    step: int | None = None,
    *,
    cast: bool = False,
    report: Callable[[str], None] = warn,
) -> PyTree:
    """The parameters alone of `step`, or of the newest sound checkpoint; changes nothing on disk.

    Arguments and errors are those of `Checkpoints.restore`, and no checkpoint is an error too;
    damaged ones that it passes over are told to `report`.
    """
    path, record = manifest.choose(_directory(run_dir), step, report)
    wanted = manifest.structure({"params": abstract_params})
    found = {k: v for k, v in record["structure"].items() if k.startswith("params/")}
    manifest.require_fit(path, wanted, found, cast)
    tree: Any = jax.tree.map(lambda _: ocp.PLACEHOLDER, ocp.metadata(str(path)).metadata)
    return _load(path, tree | {"params": _placed(abstract_params)})["params"]


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; `CheckpointError` if another one does.

    The operating system lets go of the lock when its process ends, however it ends.
    """
    path = Path(run_dir) / "lock"
    with writing(run_dir):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            host, _, pid = file.read().strip().partition(" ")
            raise CheckpointError(
                f"{run_dir} is in use by process {pid or '?'} on host {host or '?'}. "
                "Wait for it or stop it, or choose another run_dir."
            ) from None
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        yield


def _directory(run_dir: Path) -> Path:
    return Path(run_dir).absolute() / "checkpoints"


def _placed(tree: PyTree) -> PyTree:
    """`tree`, with leaves that name no sharding put on the first local device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here),
        tree,
    )


def _load(path: Path, tree: PyTree) -> Any:
    try:
        return ocp.load(str(path), tree, checkpointable_name="state")
    except Exception as e:
        raise CheckpointError(f"cannot load the checkpoint {path}: {_first_line(e)}") from e


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _barrier(name: str) -> None:
    """Wait until every process of a multi-host run is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint: {name}")
