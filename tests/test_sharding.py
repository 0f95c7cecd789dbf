"""Eight devices compute what one does, and each really holds only its part."""

import os
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toy_models import toy, toy_batch, toy_params

from jaxformer import sharding
from jaxformer.config import MeshConfig, ModelConfig, OptimConfig
from jaxformer.errors import ConfigError
from jaxformer.nn import transformer
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.optim import make_optimizer
from jaxformer.training.state import TrainState, abstract_state, init_state
from jaxformer.training.step import make_eval_step, make_train_step

OPTIM = OptimConfig(learning_rate=0.01, schedule="constant", warmup=0)
ROWS, LENGTH = 16, 5
# No two of its sizes are alike, nor like the rows' and the length's.
SIZES: dict[str, Any] = dict(d_model=12, d_ff=40, vocab_size=28, n_heads=2, head_dim=6)
ROOT = os.path.dirname(os.path.dirname(__file__))


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def train(config: ModelConfig, mesh: Mesh, state: TrainState | None = None, steps: int = 3):
    """The state after some steps, and their losses."""
    tx = make_optimizer(config, OPTIM, 100)
    abstract = abstract_state(config, tx, mesh)
    step = make_train_step(config, OPTIM, tx, 1, mesh, abstract)
    state = init_state(config, tx, mesh, seed=0) if state is None else state
    losses, first = [], int(state.step)
    for i in range(first, first + steps):
        batch = jax.device_get(toy_batch(config, ROWS, LENGTH, seed=i))
        old = state
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        losses.append(float(metrics.loss))
        # The old state was given up for the new one to be written over it.
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    return state, losses


SPECS = {
    "embedding": ("tensor", "fsdp"),
    "query/kernel": ("fsdp", "tensor", None),
    "key/kernel": ("fsdp", "tensor", None),
    "value/kernel": ("fsdp", "tensor", None),
    "out/kernel": ("tensor", None, "fsdp"),
    "query/bias": ("tensor", None),
    "key/bias": ("tensor", None),
    "value/bias": ("tensor", None),
    "up/kernel": ("fsdp", "tensor"),
    "up/bias": ("tensor",),
    "down/kernel": ("tensor", "fsdp"),
    "down/bias": ("fsdp",),
    "head/kernel": ("fsdp", "tensor"),
    "head/bias": ("tensor",),
    "scale": ("fsdp",),
    "norm/bias": ("fsdp",),
    "relative_bias": (None, "tensor"),
    "query/lora_a": ("fsdp", None),
    "query/lora_b": (None, "tensor", None),
    "value/lora_a": ("fsdp", None),
    "value/lora_b": (None, "tensor", None),
}


def check_shardings(state: TrainState, mesh: Mesh) -> None:
    """Parameters and both their moments lie where `SPECS` says, in parts of the right size."""
    moments = by_name(state.opt_state)
    for name, leaf in by_name(state.params).items():
        (spec,) = {spec for end, spec in SPECS.items() if name.endswith(end)}
        spec = (None, *spec) if "/layers/" in name else spec
        own = [moment for path, moment in moments.items() if path.endswith("/" + name)]
        assert len(own) == 2, name
        for x in (leaf, *own):
            expected = NamedSharding(mesh, PartitionSpec(*spec))
            assert x.sharding.is_equivalent_to(expected, x.ndim), (name, x.sharding)
            parts = [mesh.shape[axis] if axis else 1 for axis in spec]
            shape = tuple(n // k for n, k in zip(x.shape, parts, strict=True))
            assert len(x.addressable_shards) == mesh.size
            assert {shard.data.shape for shard in x.addressable_shards} == {shape}, name


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2),
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((2, 4, 1), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "kind", ["encoder-decoder", pytest.param("decoder-only", marks=pytest.mark.slow)]
)
def test_eight_devices_train_as_one(kind, shape):
    options = dict(qkv_bias=True, mlp_bias=True, head_bias=True, position="relative")
    config = toy(kind, **SIZES, **options, tie_embeddings=kind == "decoder-only")
    if config.tie_embeddings:
        config = toy(kind, **SIZES, norm="rms", gated=False, n_kv_heads=2)
    mesh = make_mesh(*shape)
    expected, losses = train(config, make_mesh(1, 1, 1))
    state, found = train(config, mesh)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert losses[0] > losses[-1]
    for name, leaf in by_name(state.params).items():
        np.testing.assert_allclose(
            sharding.fetch(leaf), by_name(expected.params)[name], atol=1e-4, err_msg=name
        )
    check_shardings(state, mesh)
    tx = make_optimizer(config, OPTIM, 100)
    check_shardings(init_state(config, tx, mesh, seed=0), mesh)


def compiled_shapes(mesh: Mesh) -> set[tuple[int, ...]]:
    """The shapes of all float arrays that one device's train step computes."""
    config = toy("encoder-decoder", **SIZES)
    tx = make_optimizer(config, OPTIM, 100)
    abstract = abstract_state(config, tx, mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)),
        toy_batch(config, ROWS, LENGTH),
    )
    with sharding.use(mesh):
        text = jitted(config, tx).lower(abstract, batch).compile().as_text()
    return {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)}
