"""Two processes, each with two devices, train what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PAIRS = [(f"{i} {i * 7 % 10}", f"{i * 7 % 10} {i}") for i in range(40)]


def write_config(directory: Path) -> Path:
    """A config file for a small run on pairs of lines, and the files it reads."""
    for side, lines in zip(("source", "target"), zip(*PAIRS, strict=True), strict=True):
        (directory / side).write_text("\n".join(lines) + "\n")
    path = directory / "config.py"
    path.write_text(
        f"""
from jaxformer.config import *

def get_config():
    return TrainConfig(
        model=ModelConfig(n_encoder_layers=1, n_decoder_layers=1, d_model=8, d_ff=16, n_heads=2,
                          max_length=16),
        data=DataConfig(source="parallel", task="seq2seq", tokenizer="char", buckets=(8, 16),
                        batch_tokens=96, train=({str(directory / "source")!r},
                                                {str(directory / "target")!r})),
        optim=OptimConfig(warmup=2, schedule="constant"),
        steps=6, log_every=1, eval_every=2, save_every=4, eval_examples=99, metrics=("exact",),
    )
"""
    )
    return path


def start(config: Path, run_dir: Path, devices: int, *options: str, **env: str):
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "jaxformer.cli", "train", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"--run-dir={run_dir}", *options],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(config: Path, run_dir: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Two processes that find each other as they would under Slurm."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        start(
            config,
            run_dir,
            2,
            "--distributed=True",
            *options,
            JAX_COORDINATOR_ADDRESS=address,
            SLURM_JOB_ID="1",
            SLURM_STEP_NODELIST="localhost",
            SLURM_NTASKS="2",
            SLURM_PROCID=str(i),
            SLURM_LOCALID=str(i),
        )
        for i in range(2)
    ]


def finish(*processes: subprocess.Popen[str]) -> str:
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs[0]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    kept = ("step", "train/loss", "train/grad_norm", "eval/loss", "eval/tokens", "eval/exact")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in kept if name in line} for line in lines]


def assert_same(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert [line["step"] for line in a] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    config = write_config(tmp_path)
    finish(start(config, tmp_path / "one", 1))
    expected = metrics(tmp_path / "one")
    # Begun by two, finished by one.
    finish(*start_two(config, tmp_path / "two", "--mesh.fsdp=2", "--steps=4"))
    output = finish(start(config, tmp_path / "two", 1))
    assert "resumed at step 4" in output
    assert_same(metrics(tmp_path / "two"), expected)
