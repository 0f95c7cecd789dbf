"""Training runs from end to end: stopped, killed, damaged, refused, and what they leave behind."""

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

import jaxformer
from jaxformer import generate, run, sharding
from jaxformer.config import MeshConfig, TrainConfig
from jaxformer.data import pipeline
from jaxformer.data.tokenizer import ByteTokenizer
from jaxformer.errors import CheckpointError, ConfigError, NumericsError, Stopped
from jaxformer.training import loop, manifest, step
from jaxformer.training.checkpoint import lock
from jaxformer.training.evaluate import evaluate_loss, evaluate_text
from jaxformer.training.loop import fit
from jaxformer.training.report import Report, read_metrics
from jaxformer.training.step import make_eval_step
from jaxformer.training.stopping import StopRequest


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    run_dir = tmp_path_factory.mktemp("masked")
    fit(tiny.masked(run_dir))
    return run_dir


def replace_options(config: TrainConfig, part: str, options: dict[str, Any]) -> TrainConfig:
    changed: Any = dataclasses.replace(getattr(config, part), **options)
    return dataclasses.replace(config, **{part: changed})


@pytest.mark.slow
def test_what_a_run_leaves_behind():
    run_dir = tiny.reversing_run()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    training = {"train/loss", "train/grad_norm", "train/skipped", "train/learning_rate"}
    evaluation = {"eval/loss", "eval/perplexity", "eval/tokens", "eval/wer", "eval/per",
                  "eval/bleu", "eval/bleu_signature"}  # fmt: skip
    names = [(line.pop("step"), set(line)) for line in lines]
    training |= tiny.CLOCK
    assert names == [(3, training), (4, evaluation), (6, training), (7, training), (7, evaluation)]
    numbers = [v for line in lines for v in line.values() if not isinstance(v, str)]
    assert all(math.isfinite(v) for v in numbers)
    assert lines[0]["train/tokens_per_second"] > 0

    config, tokenizer = run.read(run_dir)
    assert config.model.vocab_size == tokenizer.vocab_size == 4 + len("abcde")
    record = json.loads((run_dir / "run.json").read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    events = next((run_dir / "tensorboard").iterdir()).read_bytes()
    assert b"train/loss" in events and b"eval/wer" in events
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["5", "7"]


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(tmp_path: Path):
    shutil.copytree(tiny.reversing_run(), tmp_path / "run")

    def files() -> dict[str, int]:
        kept = [*(tmp_path / "run").glob("checkpoints/**/*"), tmp_path / "run" / "loss.png"]
        return {str(path): path.stat().st_mtime_ns for path in kept}

    before, text = files(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    fit(tiny.reverse(tmp_path / "run"))
    assert files() == before
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == text


def in_compilation(patch: pytest.MonkeyPatch, stop: Callable[[], None]) -> None:
    loss_sums = step.loss_sums

    def traced(*arguments: Any) -> Any:
        stop()
        return loss_sums(*arguments)

    patch.setattr(step, "loss_sums", traced)


def in_step(patch: pytest.MonkeyPatch, stop: Callable[[], None]) -> None:
    patch.setattr(Report, "advance", lambda self, step, note: stop() if step % 5 == 2 else None)


def in_evaluation(patch: pytest.MonkeyPatch, stop: Callable[[], None]) -> None:
    batches = pipeline.evaluation_batches

    def asked(*arguments: Any, **options: Any) -> Iterator[Any]:
        for i, batch in enumerate(batches(*arguments, **options)):
            if i == 1:
                stop()
            yield batch

    patch.setattr(pipeline, "evaluation_batches", asked)


def in_decoding(patch: pytest.MonkeyPatch, stop: Callable[[], None]) -> None:
    decode = generate._decode

    def asked(*arguments: Any) -> Any:
        decoded = decode(*arguments)  # begins to, and returns
        stop()
        return decoded

    patch.setattr(generate, "_decode", asked)


def interrupt(
    config: TrainConfig, signal_name: str, when: Callable[[Any, Callable[[], None]], None]
) -> None:
    """Start or resume a run, and send it a signal then, once: a second would end the tests."""
    left = [signal.Signals[signal_name]]
    with pytest.MonkeyPatch.context() as patch:
        when(patch, lambda: signal.raise_signal(left.pop()) if left else None)
        with pytest.raises(Stopped, match=signal_name) as caught:
            fit(config)
    assert caught.value.exit_code == 75


def written(checkpoint: Path) -> dict[str, int]:
    """When each file of a checkpoint but its manifest was written."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return {str(p): p.stat().st_mtime_ns for p in files if p.name != manifest.NAME}


@pytest.mark.slow
def test_a_stopped_run_is_the_uninterrupted_one(tmp_path: Path, masked_run: Path):
    check_interrupted(tiny.masked(tmp_path), masked_run)


@pytest.mark.slow
def test_a_stopped_language_model_is_the_uninterrupted_one(tmp_path: Path, capsys: Any):
    fit(tiny.causal(tmp_path / "whole"))
    said = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert len(said) == 2  # after each evaluation, of the one document
    check_interrupted(tiny.causal(tmp_path / "stopped"), tmp_path / "whole")


def check_interrupted(config: TrainConfig, uninterrupted: Path) -> None:
    """A run stopped in everything it does, each time going on, ends as one that never was."""
    tmp_path = Path(config.run_dir)
    interrupt(config, "SIGTERM", in_compilation)
    assert tiny.last_state(tmp_path).step == 1  # what was compiled has run once
    interrupt(config, "SIGINT", in_step)
    assert tiny.last_state(tmp_path).step == 2  # between two lines of metrics, and two saves
    interrupt(config, "SIGTERM", in_evaluation)
    assert tiny.last_state(tmp_path).step == 5
    assert tiny.metrics(tmp_path)[-1]["step"] == 3
    checkpoint = tmp_path / "checkpoints" / "5"
    before = written(checkpoint)
    interrupt(config, "SIGINT", in_step)
    assert tiny.last_state(tmp_path).step == 7
    # The loss that 5 lacked came to its manifest; its arrays, the only ones there, stayed.
    (line,) = (line for line in tiny.metrics(tmp_path) if "eval/loss" in line)
    assert line["step"] == 5 and line["eval/loss"] == manifest.read(checkpoint)["loss"]
    assert written(checkpoint) == before
    fit(config)
    tiny.assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_stopped_in_decoding(tmp_path: Path):
    config = tiny.reverse(tmp_path)
    interrupt(config, "SIGTERM", in_decoding)
    assert tiny.last_state(tmp_path).step == 4
    assert tiny.last_state(tmp_path).meta["evaluated"] == 0
    assert tiny.metrics(tmp_path)[-1]["step"] == 3
    fit(config)
    tiny.assert_same_run(tmp_path, tiny.reversing_run())


@pytest.mark.slow
def test_more_steps_go_on(tmp_path: Path, masked_run: Path):
    for steps in (3, 8):
        fit(dataclasses.replace(tiny.masked(tmp_path), steps=steps))
    a, b = tiny.last_state(tmp_path), tiny.last_state(masked_run)
    assert tiny.leaves(a.state) == tiny.leaves(b.state)
    assert a.meta["data"] == b.meta["data"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [flip, lambda path: os.truncate(path, 9), Path.unlink], ids=["flip", "cut", "remove"]
)
def test_a_damaged_checkpoint_costs_only_its_steps(
    tmp_path: Path, masked_run: Path, damage: Callable[[Path], None], capsys: Any
):
    shutil.copytree(masked_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "12").mkdir()
    file = max((tmp_path / "checkpoints" / "8").rglob("d/*"), key=lambda p: p.stat().st_size)
    damage(file)
    fit(tiny.masked(tmp_path))
    out = capsys.readouterr().out
    assert file.name in out and "Passing over it" in out and "resumed at step 4" in out
    assert not (tmp_path / "checkpoints" / "12").exists()
    tiny.assert_same_run(tmp_path, masked_run)


def test_a_second_writer_is_refused(tmp_path: Path):
    with lock(tmp_path), pytest.raises(CheckpointError) as caught:
        (tmp_path / "lock").write_text("elsewhere 123\n")  # as another host would have
        fit(tiny.masked(tmp_path))
    assert f"{tmp_path} is in use by process 123 on host elsewhere" in str(caught.value)


def test_another_model_or_data_is_refused(masked_run: Path):
    config = replace_options(
        tiny.masked(masked_run), "model", {"d_ff": 32, "param_dtype": "bfloat16"}
    )
    config = replace_options(config, "data", {"mask_rate": 0.5})
    with pytest.raises(CheckpointError) as caught:
        fit(dataclasses.replace(config, log_every=1))
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "model.d_ff: 8 there, 32 now",
        "model.param_dtype: 'float32' there, 'bfloat16' now",
        "data.mask_rate: 0.15 there, 0.5 now",
    ]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("d_ff", 32, r"mlp/up/kernel: wanted float32\[.*32\], found float32\[.*8\]"),
        ("param_dtype", "bfloat16", r"mlp/up/kernel: wanted bfloat16.*another dtype"),
    ],
)
def test_a_checkpoint_of_another_model_is_not_loaded(
    tmp_path: Path, masked_run: Path, field: str, value: Any, says: str
):
    shutil.copytree(masked_run, tmp_path, dirs_exist_ok=True)
    options = json.loads((tmp_path / "config.json").read_text())
    options["model"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match=says):
        jaxformer.load(tmp_path)


def test_another_tokenizer_is_refused(tmp_path: Path, masked_run: Path):
    shutil.copytree(masked_run, tmp_path, dirs_exist_ok=True)
    ByteTokenizer().save(tmp_path / "tokenizer")
    for use in (lambda: jaxformer.load(tmp_path), lambda: fit(tiny.masked(tmp_path))):
        with pytest.raises(CheckpointError, match="not the one the model was trained with"):
            use()


def test_text_scores_are_those_of_what_is_generated():
    run_dir = tiny.reversing_run()
    model = jaxformer.load(run_dir)
    config, data = loop.prepare(run.read(run_dir)[0], run_dir)
    written = model.generate([example.source for example in data.examples])
    wrong = sum(
        text != example.targets[0] for text, example in zip(written, data.examples, strict=True)
    )
    logged = tiny.metrics(run_dir)[-1]
    assert logged["eval/wer"] == pytest.approx(100 * wrong / len(data.examples))
    scores, predictions = evaluate_text(model, data.examples, ("wer", "exact"), StopRequest())
    assert predictions == written
    assert scores == {"eval/wer": logged["eval/wer"], "eval/exact": 100 - logged["eval/wer"]}


def test_the_loss_is_that_of_each_example_alone():
    run_dir = tiny.reversing_run()
    model = jaxformer.load(run_dir)
    config, data = loop.prepare(run.read(run_dir)[0], run_dir)
    assert len(data.valid) % (config.data.batch_tokens // 8)  # the last batch is short
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    one_row = dataclasses.replace(config.data, batch_tokens=8)
    batches = pipeline.evaluation_batches(one_row, data.valid, data.tokenizer, multiple=1)
    alone = evaluate_loss(make_eval_step(config.model, mesh), model.params, batches, mesh)
    logged = tiny.metrics(run_dir)[-1]
    assert logged["eval/tokens"] == alone["eval/tokens"]
    assert logged["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-6)
    # The same again, through what scores text.
    pairs = [(example.source, example.targets[0]) for example in data.examples]
    scores = model.score(*map(list, zip(*pairs, strict=True)))
    tokens = sum(len(target) + 1 for _, target in pairs)
    assert logged["eval/loss"] == pytest.approx(-sum(scores) / tokens, rel=1e-5)


def test_a_loss_that_stays_infinite_ends_the_run(tmp_path: Path):
    config = replace_options(tiny.masked(tmp_path), "model", {"compute_dtype": "float16"})
    config = replace_options(config, "optim", {"learning_rate": 1e3, "warmup": 0, "clip": 0.0})
    config = dataclasses.replace(
        config, save_every=2, eval_every=99, log_every=2, max_bad_steps=3, steps=99
    )
    with pytest.raises(NumericsError, match="3 updates in a row") as caught:
        fit(config)
    assert caught.value.exit_code == 5
    restored = tiny.last_state(tmp_path)
    skipped = [line["train/skipped"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert skipped[-1] > 0 and restored.step == 2 * len(skipped)
    assert restored.step >= 2
    for leaf in jax.tree.leaves(restored.state.params):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mesh": MeshConfig(tensor=8)}, "n_heads 2 is not a multiple of mesh.tensor 8"),
        # Only with the data the vocabulary is known.
        ({"mesh": MeshConfig(tensor=2)}, "vocab_size 9 is not a multiple of mesh.tensor 2"),
        ({"accumulate": 2}, "batch_tokens 64 is 8 rows .* set data.batch_tokens to at least 128"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
):
    names = ["init_state", "make_train_step", "make_eval_step"]
    if "n_heads" in says:  # which is known without the data
        names.append("prepare")
    for name in names:
        monkeypatch.setattr(loop, name, lambda *_, name=name: pytest.fail(name))
    with pytest.raises(ConfigError, match=says):
        fit(dataclasses.replace(tiny.masked(tmp_path), **options))


@pytest.mark.parametrize(
    ("save_every", "eval_every", "kept"),
    [  # evaluated and saved: 6 8, 2 4 6 8, 8
        (3, 2, ["6", "8"]),
        pytest.param(2, 2, ["4", "8"], marks=pytest.mark.slow),
        pytest.param(8, 2, ["8"], marks=pytest.mark.slow),
    ],
)
def test_the_latest_and_the_best_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int, eval_every: int, kept: list
):
    losses = iter({2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0}.values())
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: {"eval/loss": next(losses)})
    config = dataclasses.replace(tiny.masked(tmp_path), keep_latest=1, keep_best=1)
    fit(dataclasses.replace(config, save_every=save_every, eval_every=eval_every))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


@pytest.mark.slow
def test_a_failed_save_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not at the next save, which may be hours away."""
    failed, seen = threading.Event(), []

    def full(*_: Any) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    def advance(self: Report, step: int, note: str) -> None:
        seen.append(step)
        if step > 20:
            assert failed.wait(60)
            time.sleep(0.1)

    monkeypatch.setattr(manifest, "write", full)
    monkeypatch.setattr(Report, "advance", advance)
    config = tiny.masked(tmp_path)
    config = dataclasses.replace(config, steps=39, save_every=20, eval_every=99, log_every=99)
    with pytest.raises(CheckpointError, match="saving step 20 .*failed: .*No space left") as caught:
        fit(config)
    assert caught.value.exit_code == 4 and seen[-1] < 25
    assert not manifest.steps(tmp_path / "checkpoints")


# Real processes, with one device each.


def train(config: Path) -> "subprocess.Popen[str]":
    return tiny.start(str(tiny.ROOT / "train.py"), "--config", str(config))


TELLING = """
import sys
from jaxformer import cli, running
from jaxformer.training import step

def telling(module, name, said):
    function = getattr(module, name)
    def told(*arguments):
        print(said, flush=True)
        return function(*arguments)
    setattr(module, name, told)

telling(step, "loss_sums", "tracing")
telling(running, "_begin", "decoding")
sys.exit(cli.main(["train", "--config", sys.argv[1]]))
"""
"""Train, saying when a step is being compiled and when texts are being decoded."""


def long_run(tmp_path: Path) -> tuple[Path, Path]:
    """A run directory and a config file, of a run in which there is always something to stop."""
    config = tiny.reverse(tmp_path / "run")
    config = replace_options(config, "model", {"dropout": 0.1})
    config = dataclasses.replace(
        config, steps=48, log_every=5, eval_every=10, save_every=6, keep_latest=3
    )
    return tmp_path / "run", Path(tiny.config_file(tmp_path / "config.py", config))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir, config = long_run(tmp_path_factory.mktemp("long"))
    with train(config) as process:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return run_dir


def wait_for(process: "subprocess.Popen[str]", said: str) -> None:
    """Read what a run says until it says `said`."""
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith(said):
            return
    pytest.fail(f"the run ended without {said!r}: {process.stderr.read()}")


def unfinished(run_dir: Path) -> set[str]:
    """The checkpoints that are there, but not whole."""
    paths = (run_dir / "checkpoints").glob("*")
    return {path.name for path in paths if not (path / manifest.NAME).exists()}


def kill_in_a_save(process: "subprocess.Popen[str]", run_dir: Path, leftovers: set[str]) -> None:
    """Wait until another checkpoint than `leftovers` is being written, and kill the run then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if unfinished(run_dir) - leftovers:
            process.send_signal(signal.SIGSTOP)  # look again while nothing moves
            time.sleep(0.01)
            if unfinished(run_dir) - leftovers:
                return process.kill()
            process.send_signal(signal.SIGCONT)
    pytest.fail("no save was met")


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path: Path, uninterrupted: Path):
    moments = random.Random(0)
    run_dir, config = long_run(tmp_path)
    for said in ("", "step 10  train", "step 15", "save", "step 30  train", "step"):
        leftovers = unfinished(run_dir)
        with train(config) as process:
            if said == "save":
                kill_in_a_save(process, run_dir, leftovers)
                continue
            wait_for(process, said)
            time.sleep(moments.uniform(0, 0.05))
            assert process.poll() is None, "nothing was killed"
            process.kill()
    with train(config) as process:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert "resumed at step" in out
    tiny.assert_same_run(run_dir, uninterrupted)


@pytest.mark.slow
def test_signals_end_with_75_and_the_run_goes_on(tmp_path: Path, uninterrupted: Path):
    run_dir, config = long_run(tmp_path)
    for said, number, steps in [
        ("tracing", signal.SIGTERM, {1}),
        ("step 5  train", signal.SIGINT, set(range(5, 10))),
        ("decoding", signal.SIGTERM, {10}),
    ]:
        with tiny.start("-c", TELLING, str(config)) as process:
            wait_for(process, said)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 75, errors
        assert errors.startswith(f"jaxformer: stopped by {number.name}")
        assert tiny.last_state(run_dir).step in steps
    with train(config) as process:
        assert process.wait(120) == 0
    tiny.assert_same_run(run_dir, uninterrupted)


@pytest.mark.slow
def test_the_second_signal_ends_at_once(tmp_path: Path):
    _, config = long_run(tmp_path)
    with tiny.start("-c", TELLING, str(config)) as process:
        wait_for(process, "tracing")
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert process.wait(60) == -signal.SIGINT
        assert time.monotonic() - begin < 1
