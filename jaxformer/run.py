"""What a run directory holds besides its checkpoints, written once and checked when read again."""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from jaxformer.config import TrainConfig, from_json, to_json
from jaxformer.data.tokenizer import Tokenizer, load_tokenizer
from jaxformer.errors import CheckpointError, ConfigError
from jaxformer.files import MAX_JSON, read_capped, write_atomically, writing

CONFIG, TOKENIZER, VERSIONS, METRICS = "config.json", "tokenizer", "run.json", "metrics.jsonl"
ORIGIN = "origin.json"
"""What a checkpoint of another library said of itself, in a run that was made from one."""
PACKAGES = ("jaxformer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# What may differ when a run is resumed: none of it changes what has been computed so far.
MAY_CHANGE = {"run_dir", "steps", "log_every", "eval_every", "save_every", "keep_latest",
              "keep_best", "metrics", "eval_examples", "max_bad_steps", "distributed",
              "mesh", "decode"}  # fmt: skip


def exists(run_dir: Path) -> bool:
    """Whether a run was begun in this directory."""
    return os.path.isfile(run_dir / VERSIONS)  # unlike Path's, quiet about names too long


def create(run_dir: Path, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Keep the resolved config, the tokenizer, and the versions of what it runs with."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record = {"tokenizer_hash": tokenizer.hash, "versions": versions}
    with writing(run_dir):
        tokenizer.save(run_dir / TOKENIZER)
        write_atomically(run_dir / CONFIG, to_json(config))
        # Last: with it, the run exists.
        write_atomically(run_dir / VERSIONS, json.dumps(record, indent=2) + "\n")


def read(run_dir: Path) -> tuple[TrainConfig, Tokenizer]:
    """The config and tokenizer of a run.

    Raises `CheckpointError` if there is none, or the tokenizer is not the one it was trained with.
    """
    if not exists(run_dir):
        raise CheckpointError(
            f"{run_dir} is no run directory: it has no {VERSIONS}. "
            "Give the run_dir of a training run."
        )
    try:
        config = from_json(TrainConfig, _read(run_dir / CONFIG), str(run_dir / CONFIG))
    except ConfigError as e:
        raise CheckpointError(f"{e} Restore the file, or retrain.") from None
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    try:
        expected = json.loads(_read(run_dir / VERSIONS))["tokenizer_hash"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{run_dir / VERSIONS} is damaged; restore it or retrain.") from None
    if tokenizer.hash != expected:
        raise CheckpointError(
            f"the tokenizer in {run_dir / TOKENIZER} (SHA-256 {tokenizer.hash[:12]}) is not the "
            f"one the model was trained with ({str(expected)[:12]}): its ids would mean other "
            "text. Put the original tokenizer back."
        )
    return config, tokenizer


def write_origin(run_dir: Path, origin: dict[str, Any] | None) -> None:
    """Keep what the checkpoint that a run is made from says of itself; None if there is none."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        if origin is None:
            (run_dir / ORIGIN).unlink(missing_ok=True)
        else:
            write_atomically(run_dir / ORIGIN, json.dumps(origin) + "\n")


def read_origin(run_dir: Path) -> dict[str, Any] | None:
    """What the checkpoint that a run was made from said of itself; None if there was none."""
    if not (run_dir / ORIGIN).is_file():
        return None
    try:
        match json.loads(_read(run_dir / ORIGIN)):
            case {
                "config": {"model_type": str()},
                "generation": dict(),
                "prefixed": bool(),
                **rest,
            } as origin:
                if not rest:
                    return origin
    except (ValueError, RecursionError):
        pass
    raise CheckpointError(f"{run_dir / ORIGIN} is damaged; convert the model again.")


def check_resumable(run_dir: Path, old: TrainConfig, new: TrainConfig) -> None:
    """Raise a `CheckpointError` naming every option that makes `new` another run than `old`."""
    was, now = flatten(old), flatten(new)
    differing = [
        f"  {name}: {was[name]!r} there, {now[name]!r} now"
        for name in now
        if was[name] != now[name] and name.split(".")[0] not in MAY_CHANGE
    ]
    if differing:
        raise CheckpointError(
            f"{run_dir} holds a run with other options:\n" + "\n".join(differing) + "\n"
            "Choose another --run_dir to start anew, or give the same options to resume."
        )


def flatten(config: Any) -> dict[str, Any]:
    """The fields of a config by dotted name."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out |= {f"{field.name}.{k}": v for k, v in flatten(value).items()}
        else:
            out[field.name] = value
    return out


def _read(path: Path) -> str:
    try:
        return read_capped(path, MAX_JSON).decode()
    except UnicodeDecodeError as e:
        raise CheckpointError(f"cannot read {path}: {e}") from None
