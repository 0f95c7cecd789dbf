"""What decoding costs beside its products: by the greatest length there may be, and in compilation.

    python benchmarks/costs.py [--runs 5] [--json FILE]

Keys and values have room for the longest text there may be, for which a token should cost no more:
16 tokens in and 48 out, with room for 128, 512 and 2048, in a Llama of 135M with random weights.
Compilation is that of T5-small, 64 tokens in and 64 out, each in a process of its own: with an
empty compilation cache, and from what this left in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxformer.batching import pad
from jaxformer.config import DecodeConfig, ModelConfig
from jaxformer.generate import _decode, _run, prepare, request
from jaxformer.nn.transformer import init
from jaxformer.presets import PRESETS

LENGTHS = (128, 512, 2048)
PROMPT, NEW = 16, 48


def model(name: str) -> tuple[ModelConfig, Any]:
    """A preset, and random parameters as decoding takes them."""
    config = PRESETS[name]
    params = jax.jit(lambda: nn.unbox(init(config, jax.random.key(0))))()
    return config, prepare(params)


def asked(config: ModelConfig, rows: int, prompt: int, options: DecodeConfig) -> tuple[Any, Any]:
    """What is compiled for random prompts, and what is run."""
    ids = np.random.default_rng(1).integers(3, config.vocab_size, (rows, prompt))
    special: Any = SimpleNamespace(start_id=0, pad_id=0, stop_ids=(1,))
    return request(config, special, pad(ids.tolist(), prompt, 0), range(rows), options)


def lengths(runs: int) -> list[dict[str, Any]]:
    """Milliseconds a token, by rows and by the greatest length, in turns."""
    config, params = model("llama-135m")
    found = []
    for rows in (1, 8):
        decode = {}
        for longest in LENGTHS:
            options = DecodeConfig(max_length=longest - PROMPT, min_length=NEW)
            method, job = asked(config, rows, PROMPT, options)
            job = job._replace(limit=np.full(rows, NEW, np.int32))
            decode[longest] = (config, params, method, job, options, None)
            _run(*decode[longest])
        seconds: dict[int, list[float]] = {longest: [] for longest in LENGTHS}
        for _ in range(runs):
            for longest, arguments in decode.items():
                start = time.perf_counter()
                _run(*arguments)
                seconds[longest].append(time.perf_counter() - start)
        cost = {longest: 1e3 * statistics.median(each) / NEW for longest, each in seconds.items()}
        ratio = max(cost.values()) / min(cost.values())
        print(
            f"{rows} rows, room for {' / '.join(map(str, LENGTHS))}: "
            f"{' / '.join(f'{ms:.1f}' for ms in cost.values())} ms a token, ratio {ratio:.2f}",
            flush=True,
        )
        found.append({"rows": rows, "milliseconds": cost, "ratio": ratio})
    return found


def compilation(beams: int) -> float:
    """Seconds to trace, lower and compile a decode, or to find it in the cache."""
    config, params = model("t5-small")
    jax.block_until_ready(params)
    method, job = asked(config, 1, 64, DecodeConfig(beams=beams, max_length=64, min_length=64))
    start = time.perf_counter()
    _decode.trace(None, config, None, method, params, None, job).lower().compile()
    return time.perf_counter() - start


def compilations(runs: int) -> list[dict[str, Any]]:
    """Medians, cold and cached."""
    found = []
    for beams in (1, 4):
        seconds: dict[str, list[float]] = {"cold": [], "cached": []}
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as folder:
                # As the command `jaxformer` sets them.
                kept = {
                    "JAX_COMPILATION_CACHE_DIR": folder,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                }
                command = [sys.executable, __file__, "--compile", str(beams)]
                for name in seconds:
                    printed = subprocess.check_output(command, env=os.environ | kept)
                    seconds[name].append(float(printed))
        median = {name: statistics.median(each) for name, each in seconds.items()}
        print(
            f"compilation with {beams} beams: {median['cold']:.2f} s, "
            f"from the cache {median['cached']:.2f} s",
            flush=True,
        )
        found.append({"beams": beams, "seconds": median})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", default="")
    parser.add_argument("--compile", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        print(compilation(options.compile))
        return
    found = {"compilation": compilations(options.runs), "lengths": lengths(options.runs)}
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
