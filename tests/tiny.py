"""Runs so small that tests can afford to train them, in this process or in one of their own."""

import atexit
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from compilation import QUICK
from jax.experimental.compilation_cache import compilation_cache

from jaxformer import run, sharding
from jaxformer.config import (
    DataConfig,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    to_json,
)
from jaxformer.training import optim
from jaxformer.training.checkpoint import Checkpoints, Restored
from jaxformer.training.loop import fit
from jaxformer.training.report import read_metrics
from jaxformer.training.state import abstract_state

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(d_model=8, d_ff=8, n_heads=2, n_encoder_layers=1, max_length=16,
                    norm="rms", activation="relu", scan_layers=False)  # fmt: skip
CLOCK = {"train/tokens_per_second", "train/data_wait"}
"""The metrics that no two runs have in common."""


@cache
def folder() -> Path:
    """Where this session keeps what its tests share."""
    path = Path(tempfile.mkdtemp(prefix="jaxformer-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def set_cache(shared: bool) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder() / "compiled") if shared else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1 if shared else 1.0)
    compilation_cache.reset_cache()


@contextmanager
def shared_compilation() -> Iterator[None]:
    """Within it, what was compiled for one run is read by the next."""
    set_cache(True)
    yield
    set_cache(False)


def environment() -> dict[str, str]:
    """Of a process with one device, which compiles quickly, and once for all of its like."""
    return os.environ | {
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(folder() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def words() -> list[str]:
    """Fifty words of at most six letters, the empty one among them."""
    draw = random.Random(0)
    return ["", "abcde", *("".join(draw.choices("abcde", k=1 + i % 6)) for i in range(48))]


@cache
def files() -> tuple[str, str]:
    """Words, and the same reversed."""
    names = str(folder() / "words.txt"), str(folder() / "reversed.txt")
    for name, way in zip(names, (1, -1), strict=True):
        text = "".join(word[::way] + "\n" for word in words())
        Path(name).write_text(text, encoding="utf-8")
    return names


def reverse(run_dir: Path) -> TrainConfig:
    """An encoder-decoder that begins to learn to reverse words."""
    return TrainConfig(
        run_dir=str(run_dir),
        steps=7,
        log_every=3,
        eval_every=4,
        save_every=5,
        metrics=("wer", "per", "bleu"),
        model=dataclasses.replace(MODEL, n_decoder_layers=1),
        data=DataConfig(
            source="parallel",
            task="seq2seq",
            train=files(),
            tokenizer="char",
            valid_fraction=0.25,
            buckets=(8,),
            batch_tokens=64,
        ),
        optim=OptimConfig(warmup=2, schedule="constant"),
        decode=DecodeConfig(max_length=8, batch_size=1),
    )


def masked(run_dir: Path) -> TrainConfig:
    """An encoder, with dropout, that begins to fill in masked letters."""
    config = reverse(run_dir)
    data = dataclasses.replace(
        config.data, source="text", task="mlm", train=files()[:1], lines=True
    )
    return dataclasses.replace(
        config,
        steps=8,
        eval_every=5,
        save_every=4,
        metrics=(),
        data=data,
        model=dataclasses.replace(MODEL, dropout=0.2),
    )


def causal(run_dir: Path) -> TrainConfig:
    """A decoder, with dropout, that begins to continue a text which it reads in windows."""
    config = masked(run_dir)
    data = dataclasses.replace(config.data, task="lm", lines=False, valid_fraction=0.5)
    model = dataclasses.replace(
        MODEL, n_encoder_layers=0, n_decoder_layers=1, dropout=0.2, max_length=32
    )
    return dataclasses.replace(config, data=data, model=model)


@cache
def reversing_run() -> Path:
    """The finished run of `reverse`, not to be changed."""
    run_dir = folder() / "reversing"
    fit(reverse(run_dir))
    return run_dir


def config_file(path: Path, config: TrainConfig) -> str:
    """Write a config file whose `get_config` returns `config`."""
    path.write_text(
        "from jaxformer.config import TrainConfig, from_json\n\n\n"
        f"def get_config():\n    return from_json(TrainConfig, {to_json(config)!r})\n",
        encoding="utf-8",
    )
    return str(path)


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Run Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_state(run_dir: Path) -> Restored:
    """What the newest checkpoint of a run holds."""
    config, _ = run.read(run_dir)
    tx = optim.make_optimizer(config.model, config.optim, config.steps)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with Checkpoints(run_dir, keep_latest=99, keep_best=99) as checkpoints:
        restored = checkpoints.restore(abstract_state(config.model, tx, mesh))
    assert restored is not None
    return restored


def leaves(tree: Any) -> dict[str, bytes]:
    """The bytes of every leaf, by its path."""
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ).tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = read_metrics(run_dir / run.METRICS)
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs ended alike: every bit of their state, their place in the data, their metrics."""
    one, other = last_state(a), last_state(b)
    assert leaves(one.state) == leaves(other.state)
    assert json.dumps(one.meta) == json.dumps(other.meta)
    assert one.step == other.step
    assert metrics(a) == metrics(b)
