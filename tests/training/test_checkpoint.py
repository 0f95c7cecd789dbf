"""Faults a checkpoint must survive, and what a restored state must equal."""

import dataclasses
import errno
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxformer.errors import CheckpointError
from jaxformer.training import manifest
from jaxformer.training.checkpoint import Checkpoints, lock, restore_params


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    key: Any


def make_state(seed: int, width: int = 4) -> State:
    kernel, bias = jax.random.split(jax.random.key(seed))
    params = {
        "head": {"kernel": jax.random.normal(kernel, (3, width))},
        "bias": jax.random.normal(bias, (width,), jnp.bfloat16),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    return State(jnp.int32(seed), params, tx.init(params), jax.random.key(seed))


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def raw_bytes(leaf: Any) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert raw_bytes(x) == raw_bytes(y)


def names(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


@pytest.fixture
def run(tmp_path: Path):
    """A run directory with sound checkpoints of steps 1, 2 and 3."""
    with Checkpoints(tmp_path, keep_latest=9, keep_best=0) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"epoch": step}, loss=None)
    return tmp_path


def opened(run_dir: Path, report: Callable[[str], None] = pytest.fail) -> Checkpoints:
    return Checkpoints(run_dir, keep_latest=9, keep_best=0, report=report)


def test_restores_what_was_saved(run: Path):
    restored = opened(run).restore(abstract(make_state(0)))
    assert restored is not None
    assert restored.step == 3 and restored.meta == {"epoch": 3}
    assert_same(restored.state, make_state(3))
    older = opened(run).restore(abstract(make_state(0)), step=1)
    assert older is not None and older.meta == {"epoch": 1}
    assert_same(older.state, make_state(1))


def test_no_checkpoint_is_none(tmp_path: Path):
    assert opened(tmp_path).restore(abstract(make_state(0))) is None


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int32", "uint8", "bool"]),
    shape=st.lists(st.integers(1, 5), max_size=3),
    data=st.data(),
)
def test_every_bit_survives(tmp_path: Path, dtype: str, shape: list[int], data: st.DataObject):
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    content = data.draw(st.binary(min_size=size, max_size=size))  # NaNs and -0.0 among them
    if dtype == "bool":
        content = bytes(byte % 2 for byte in content)
    tree = {"a/b.c": {"x": jnp.asarray(np.frombuffer(content, jnp.dtype(dtype)).reshape(shape))}}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {}, loss=None)
        restored = checkpoints.restore(abstract(tree))
    assert restored is not None
    assert_same(restored.state, tree)


def test_state_may_be_donated_and_meta_changed_at_once(tmp_path: Path):
    overwrite = jax.jit(lambda x: x * 0, donate_argnums=0)
    x, meta = jnp.arange(1 << 20, dtype=jnp.float32), {"seen": [1]}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x}, meta, loss=None)
        overwrite(x).block_until_ready()
        meta["seen"].append(2)
        restored = checkpoints.restore({"x": jax.ShapeDtypeStruct((1 << 20,), "float32")})
    assert restored is not None
    np.testing.assert_array_equal(restored.state["x"], np.arange(1 << 20, dtype=np.float32))
    assert restored.meta == {"seen": [1]}


def test_keeps_the_latest_and_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 4.0, 7: float("-inf")}
    with Checkpoints(tmp_path, keep_latest=2, keep_best=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, {"x": jnp.zeros(())}, {}, loss=loss)
    assert names(tmp_path) == ["2", "3", "6", "7"]
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        write, before = manifest.write, []

        def spy(*args: Any) -> None:
            before.extend(checkpoints.steps())
            write(*args)

        monkeypatch.setattr(manifest, "write", spy)
        checkpoints.save(8, {"x": jnp.zeros(())}, {}, loss=None)
        checkpoints.wait()
        assert before == [2, 3, 6, 7]  # nothing goes until the new one is complete
        assert checkpoints.steps() == [8]


def test_saving_an_earlier_step_drops_the_later(run: Path):
    with opened(run) as checkpoints:
        checkpoints.save(2, make_state(7), {}, loss=None)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        restored = checkpoints.restore(abstract(make_state(0)))
    assert restored is not None
    assert_same(restored.state, make_state(7))


FILES = ["manifest.json", "_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_damage_is_found_and_passed_over(run: Path, damage: str):
    top = run / "checkpoints" / "3"
    files = sorted(p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file())
    assert set(FILES) <= set(files)
    for name in files:
        content = (top / name).read_bytes()
        if damage in ("flip", "truncate") and not content:
            continue
        if damage == "remove" and name == "manifest.json":
            continue  # without it, 3 is no checkpoint: see below
        if damage == "flip":
            bit = random.Random(name).randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (top / name).write_bytes(flipped)
        elif damage == "truncate":
            (top / name).write_bytes(content[:-1])
        elif damage == "remove":
            (top / name).unlink()
        else:
            name += ".new"
            (top / name).touch()

        reports: list[str] = []
        restored = opened(run, reports.append).restore(abstract(make_state(0)))
        assert restored is not None and restored.step == 2
        assert_same(restored.state, make_state(2))
        assert len(reports) == 1 and name in reports[0] and str(top) in reports[0]
        with pytest.raises(CheckpointError, match=name):
            opened(run).restore(abstract(make_state(0)), step=3)
        with pytest.raises(CheckpointError, match=name):
            restore_params(run, abstract(make_state(0).params), step=3)

        if damage == "add":
            (top / name).unlink()
        else:
            (top / name).write_bytes(content)
    restored = opened(run).restore(abstract(make_state(0)))
    assert restored is not None and restored.step == 3


def test_all_damaged_is_an_error_not_a_fresh_start(run: Path):
    for step in "123":
        (run / "checkpoints" / step / "state" / "_METADATA").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\[1, 2, 3\] are damaged"):
        opened(run, lambda _: None).restore(abstract(make_state(0)))


def test_a_lost_manifest_is_told(run: Path):
    top = run / "checkpoints" / "3"
    (top / "manifest.json").unlink()
    params, reports = abstract(make_state(0).params), []
    with pytest.raises(CheckpointError, match=f"{top} is damaged: manifest.json is missing"):
        restore_params(run, params, step=3)
    assert_same(restore_params(run, params, report=reports.append), make_state(2).params)
    restored = opened(run, reports.append).restore(abstract(make_state(0)))
    assert restored is not None and restored.step == 2
    assert len(reports) == 2
    assert all(str(top) in said and "manifest.json" in said for said in reports)
    assert "Passing over it" in reports[0] and "Deleting it" in reports[1]
    assert names(run) == ["1", "2"]


def test_a_manifest_that_is_too_long_is_not_read(run: Path):
    os.truncate(run / "checkpoints" / "3" / "manifest.json", 2**40)  # a sparse file
    restored = opened(run, lambda _: None).restore(abstract(make_state(0)))
    assert restored is not None and restored.step == 2


def test_leftovers_are_skipped_and_the_writer_deletes_them(run: Path):
    directory = run / "checkpoints"
    (directory / "9").mkdir()
    shutil.copytree(directory / "3", directory / "8")
    (directory / "8" / "manifest.json").rename(directory / "8" / "manifest.json.tmp")
    shutil.copytree(directory / "8", directory / "7.orbax-checkpoint-tmp-1")
    (directory / "notes").mkdir()
    before = names(run)
    assert_same(restore_params(run, abstract(make_state(0).params)), make_state(3).params)
    assert names(run) == before
    reports: list[str] = []
    assert opened(run, reports.append).steps() == [1, 2, 3]
    assert names(run) == ["1", "2", "3", "notes"]
    assert len(reports) == 2  # of 8 and 9; 7 is by its name what a killed save left


def test_parameters_alone(run: Path):
    wanted = abstract(make_state(0).params)
    assert_same(restore_params(run, wanted, step=2), make_state(2).params)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5, only of"):
        restore_params(run, wanted, step=5)
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        restore_params(run / "elsewhere", wanted)
    assert not (run / "elsewhere").exists()


def test_every_misfit_is_named_at_once(run: Path):
    params = make_state(0).params
    other = {
        "head": {"kernel": jnp.zeros((3, 5))},
        "extra": jnp.zeros(()),
        "query": {"lora_a": jnp.zeros((3, 2))},
    }
    for attempt in (
        lambda: restore_params(run, abstract(other)),
        lambda: opened(run).restore(abstract(dataclasses.replace(make_state(0), params=other))),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        message = str(caught.value)
        for said in (
            "head/kernel: wanted float32[3,5], found float32[3,4]; another model size or vocabul",
            "extra: wanted float32[], found nothing; the checkpoint is of a model without this",
            "bias: wanted nothing, found bfloat16[4]; the checkpoint is of a model with this part",
            "query/lora_a: wanted float32[3,2], found nothing; another lora_rank or lora_targets?",
        ):
            assert f"params/{said}" in message
        assert caught.value.exit_code == 4
    sgd = dataclasses.replace(make_state(0), opt_state=optax.sgd(0.1, momentum=0.9).init(params))
    with pytest.raises(CheckpointError, match="another optimizer"):
        opened(run).restore(abstract(sgd))


def test_another_dtype_only_if_asked_for(run: Path):
    params = make_state(3).params
    half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    says = r"bias: wanted float16\[4\], found bfloat16\[4\]; another dtype; .*cast=True"
    with pytest.raises(CheckpointError, match=says):
        restore_params(run, abstract(half))
    assert_same(restore_params(run, abstract(half), cast=True), half)
    whole = jax.tree.map(lambda x: x.astype(jnp.int32), params)
    with pytest.raises(CheckpointError, match="int32"):
        restore_params(run, abstract(whole), cast=True)
    legacy = dataclasses.replace(make_state(0), key=jax.random.key(0, impl="rbg"))
    with pytest.raises(CheckpointError, match=r"key: wanted key<rbg>\[\], found key<fry>\[\]"):
        opened(run).restore(abstract(legacy), cast=True)


def test_full_disk_is_reported_and_survived(run: Path):
    big = {"x": jnp.asarray(np.random.default_rng(0).random(1 << 17, np.float32))}
    checkpoints = opened(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # larger files fail to be written
    try:
        checkpoints.save(4, big, {}, loss=None)
        with pytest.raises(CheckpointError, match="saving step 4") as caught:
            checkpoints.save(5, big, {}, loss=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 4
    assert checkpoints.steps() == [1, 2, 3] and names(run) == ["1", "2", "3"]
    with checkpoints:
        restored = checkpoints.restore(abstract(make_state(0)))
        assert restored is not None and restored.step == 3
        checkpoints.save(6, big, {}, loss=None)
        restored = checkpoints.restore(abstract(big))
    assert restored is not None and restored.step == 6
    assert_same(restored.state, big)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_loss_that_comes_later_leaves_the_arrays_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    top = run / "checkpoints" / "3"
    files = [path for path in top.rglob("*") if path.is_file() and path.name != "manifest.json"]
    before = [path.stat().st_mtime_ns for path in files]
    for moment in ("fsync", "replace"):  # no room, or a kill, before the new one has its name
        with monkeypatch.context() as patch, opened(run) as checkpoints:
            patch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[moment], full)
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoints.amend(3, {"epoch": 9}, loss=1.5)
        restored = opened(run).restore(abstract(make_state(0)))
        assert restored is not None and restored.step == 3 and restored.meta == {"epoch": 3}
    with opened(run) as checkpoints:
        checkpoints.amend(3, {"epoch": 9}, loss=1.5)
        restored = checkpoints.restore(abstract(make_state(0)))
    assert restored is not None and restored.step == 3 and restored.meta == {"epoch": 9}
    assert_same(restored.state, make_state(3))
    assert [path.stat().st_mtime_ns for path in files] == before
    with Checkpoints(run, keep_latest=1, keep_best=1) as checkpoints:
        checkpoints.amend(2, {}, loss=0.5)  # the best, now that it has a loss
        assert names(run) == ["2", "3"]
        checkpoints.save(4, make_state(4), {}, loss=None)
    assert names(run) == ["2", "4"]


def test_no_room_for_the_manifest_is_a_failed_save(run: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch, opened(run) as checkpoints:
        patch.setattr(manifest, "write", full)
        checkpoints.save(4, make_state(4), {}, loss=None)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoints.wait()
        checkpoints.wait()  # said once
    assert names(run) == ["1", "2", "3"]


def test_a_failed_save_does_not_hide_what_ended_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(ZeroDivisionError), opened(run) as checkpoints:
        checkpoints.save(4, make_state(4), {}, loss=None)
        raise ZeroDivisionError
    assert "No space left" in caplog.text


def test_second_writer_is_refused_by_name(tmp_path: Path):
    with lock(tmp_path):
        with pytest.raises(CheckpointError) as caught, lock(tmp_path):
            pass
        assert f"process {os.getpid()} on host {socket.gethostname()}" in str(caught.value)
        (tmp_path / "lock").write_text("elsewhere 123\n")  # as another host would have
        with pytest.raises(CheckpointError, match="process 123 on host elsewhere"):
            lock(tmp_path).__enter__()
    with lock(tmp_path):
        assert (tmp_path / "lock").read_text().split() == [socket.gethostname(), str(os.getpid())]


def test_run_dir_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    for use in (
        lambda: lock(tmp_path / "file" / "run").__enter__(),
        lambda: opened(tmp_path / "file"),
    ):
        with pytest.raises(CheckpointError, match="cannot write to"):
            use()


def start(program: str, run_dir: Path, devices: int) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", program, str(run_dir)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )


EIGHT_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxformer.training.checkpoint import Checkpoints

def sharding(n):
    mesh = jax.make_mesh((n,), ("d",), (AxisType.Auto,), devices=jax.devices()[:n])
    return NamedSharding(mesh, P("d"))

x = np.arange(48, dtype=np.float32).reshape(16, 3)
with Checkpoints(sys.argv[1], keep_latest=1, keep_best=0) as checkpoints:
    checkpoints.save(1, {"params": {"x": jax.device_put(x, sharding(8))}}, {}, loss=None)
    two = jax.ShapeDtypeStruct((16, 3), x.dtype, sharding=sharding(2))
    y = checkpoints.restore({"params": {"x": two}}).state["params"]["x"]
assert y.sharding == two.sharding, y.sharding
np.testing.assert_array_equal(x, y)
"""


def test_eight_devices_to_two_and_one(tmp_path: Path):
    with start(EIGHT_DEVICES, tmp_path, 8) as child:
        assert child.wait(60) == 0
    params = restore_params(tmp_path, {"x": jax.ShapeDtypeStruct((16, 3), "float32")})
    np.testing.assert_array_equal(params["x"], np.arange(48, dtype=np.float32).reshape(16, 3))
    assert params["x"].sharding.device_set == {jax.devices()[0]}


WRITER = """
import sys, jax.numpy as jnp
from jaxformer.training.checkpoint import Checkpoints, lock

with lock(sys.argv[1]), Checkpoints(sys.argv[1], keep_latest=2, keep_best=0) as checkpoints:
    step = max(checkpoints.steps(), default=0)
    while True:
        step += 1
        checkpoints.save(step, {"x": jnp.full((64, 1000), step)}, {"step": step}, loss=None)
        print(step - 1, flush=True)  # which is complete, as saving the next waited for it
"""


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path: Path):
    moments = random.Random(0)
    wanted = {"x": jax.ShapeDtypeStruct((64, 1000), "int32")}
    for _ in range(5):
        with start(WRITER, tmp_path, 1) as child:
            assert child.stdout is not None
            first = child.stdout.readline()
            with pytest.raises(CheckpointError, match=str(child.pid)), lock(tmp_path):
                pass
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(moments.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
            complete = int((first + child.stdout.read()).split()[-1])
        reports: list[str] = []
        with lock(tmp_path), opened(tmp_path, reports.append) as checkpoints:
            restored = checkpoints.restore(wanted)
            assert all("has no manifest.json" in said for said in reports)
            assert restored is not None
            assert complete <= restored.step == restored.meta["step"] <= complete + 2
            assert np.all(restored.state["x"] == restored.step)
            assert sorted(map(int, names(tmp_path))) == checkpoints.steps()
