"""A checkpoint is read tensor by tensor, to where it will live: in memory once, and each device its
own share."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import flatten_dict

import jaxformer
from jaxformer import sharding
from jaxformer.config import DataConfig, DecodeConfig, MeshConfig, ModelConfig
from jaxformer.data.tokenizer import ByteTokenizer
from jaxformer.hub import engine
from jaxformer.hub.families import FAMILIES
from jaxformer.hub.family import write_config
from jaxformer.hub.tensors import Stored, in_memory, write_safetensors
from jaxformer.model import Model
from jaxformer.nn.transformer import init

SMALL = ModelConfig(
    vocab_size=261, n_decoder_layers=2, d_model=32, d_ff=24, n_heads=8, n_kv_heads=8, head_dim=4,
    max_length=32, norm="rms", gated=True, activation="silu", tie_embeddings=False,
)  # fmt: skip
LLAMA = FAMILIES["llama"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama."""
    path = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    boxed = jax.eval_shape(partial(init, SMALL), jax.random.key(0))
    leaves = {
        name: in_memory(rng.standard_normal(leaf.shape, np.float32))
        for name, leaf in flatten_dict(nn.unbox(boxed), sep="/").items()
    }
    write_safetensors(path, engine.export(LLAMA, SMALL, leaves, prefixed=True))
    (path / "config.json").write_text(json.dumps(write_config(LLAMA, SMALL)))
    return path


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_each_device_reads_its_share(small, shape, monkeypatch):
    data, fsdp, tensor = shape
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices())
    _, whole = jaxformer.load_weights(small)
    read, original = [], engine.Leaf.read

    def counted(leaf: engine.Leaf, index: Any, dtype: Any) -> np.ndarray:
        found = original(leaf, index, dtype)
        read.append(found.size)
        return found

    monkeypatch.setattr(engine.Leaf, "read", counted)
    config, params = jaxformer.load_weights(small, mesh=mesh)
    assert config.vocab_padding == -261 % tensor
    assert dataclasses.replace(config, vocab_size=261, vocab_padding=0) == SMALL

    held = []
    for leaf in jax.tree.leaves(params):
        shards = [shard.data.size for shard in leaf.addressable_shards]
        held += shards[:1] if leaf.sharding.is_fully_replicated else shards
    assert read == held
    cut = fsdp * tensor  # all but the norms, of which there are few
    assert sum(held) / 8 < 1.1 * sum(x.size for x in jax.tree.leaves(params)) / cut

    wanted: dict[str, Any] = flatten_dict(whole, sep="/")
    for path, leaf in flatten_dict(params, sep="/").items():
        found, there = sharding.fetch(leaf), wanted[path].shape
        np.testing.assert_array_equal(found[tuple(map(slice, there))], wanted[path], path)
        assert np.count_nonzero(found) == np.count_nonzero(wanted[path])  # the rest is padding


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 1, 8), marks=pytest.mark.slow)])
def test_a_mesh_generates_what_one_device_does(small, shape):
    data, fsdp, tensor = shape
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices())
    texts, found = ["abc", "Hello", "longer"], []
    for place in (None, mesh):
        model = Model(*jaxformer.load_weights(small, mesh=place), ByteTokenizer(), DataConfig())
        results = model.hypotheses(texts, DecodeConfig(max_length=12))
        found.append([each.hypotheses[0].ids for each in results])
    assert found[0] == found[1] and len({i for ids in found[0] for i in ids}) > 10


def test_no_layout_copies_a_tensor():
    """A part of a file is a view of it, whatever its axes: nothing else of it is read."""
    letters = dict(zip("defnkhvsptbc1", (*range(2, 14), 1), strict=True))
    layouts = {
        (layout, row.axis) for family in FAMILIES.values() for row in family.rows
        for layout in row.layouts
    }  # fmt: skip
    assert len(layouts) > 10
    for layout, axis in layouts:
        left, right = layout.split(" -> ")
        whole = np.zeros([letters[letter] for letter in left if letter in letters])
        joined = rearrange(whole, f"{left.replace('(', '').replace(')', '')} -> {left}")
        wide = np.concatenate([joined] * 3, axis)  # of which it is the middle
        n = joined.shape[axis]
        sizes = {letter: letters[letter] for letter in left if letter in letters and letter != "1"}
        part = engine.Part(in_memory(wide), axis, n, 2 * n, layout, sizes)
        assert part.view().shape == tuple(letters[letter] for letter in right.split())
        assert np.shares_memory(part.view(), wide), layout


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jax.numpy.bfloat16])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 100, 7)])
def test_jax_takes_what_is_read_without_a_copy(shape, dtype):
    made = engine.aligned_zeros(shape, np.dtype(dtype))
    assert (made.shape, made.dtype, made.any()) == (shape, dtype, False)
    found = jax.make_array_from_callback(
        shape, jax.sharding.SingleDeviceSharding(jax.devices()[0]), lambda _: made
    )
    if made.size:
        assert found.unsafe_buffer_pointer() == made.ctypes.data


# A gigabyte in memory once

WIDTH, INNER, LAYERS = 2048, 8192, 4
TENSOR = 4 * WIDTH * INNER  # bytes of the largest
MEASURE = """
import sys, jax, jaxformer
from jaxformer import sharding
from jaxformer.config import MeshConfig

def most():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

path, dtype, devices = sys.argv[1:]
mesh = sharding.make_mesh(MeshConfig(tensor=8)) if devices == "8" else None
jaxformer.load_weights
jax.block_until_ready(jax.numpy.zeros(9) + 1)
before = most()
_, params = jaxformer.load_weights(path, dtype=dtype, mesh=mesh)
jax.block_until_ready(params)
print(sum(x.nbytes for x in jax.tree.leaves(params)), most() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama of a gigabyte in float32."""
    path = tmp_path_factory.mktemp("large")
    config = dataclasses.replace(SMALL, vocab_size=1000, d_model=WIDTH, d_ff=INNER,
                                 n_decoder_layers=LAYERS, head_dim=WIDTH // 8)  # fmt: skip
    (path / "config.json").write_text(json.dumps(write_config(LLAMA, config)))
    boxed = jax.eval_shape(partial(init, config), jax.random.key(0))
    leaves = {
        name: Stored(leaf.shape, np.dtype(np.float32), partial(np.ones, leaf.shape, np.float32))
        for name, leaf in flatten_dict(nn.unbox(boxed), sep="/").items()
    }
    write_safetensors(path, engine.export(LLAMA, config, leaves, prefixed=True))
    assert sum(4 * prod(leaf.shape) for leaf in leaves.values()) > 10**9
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measured by Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "devices"), [("float32", 1), ("bfloat16", 1), ("float32", 8)], ids=str
)
def test_memory_is_the_model_and_about_one_tensor(large, dtype, devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), dtype, str(devices)],
        env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, peak = map(int, done.stdout.split())
    assert model > 10**9 / (1 if dtype == "float32" else 2)
    assert peak < model + 1.5 * TENSOR, f"{(peak - model) / TENSOR:.2f} tensors over the model"
