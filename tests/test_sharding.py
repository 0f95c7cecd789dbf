"""Eight devices compute what one does, and each really holds only its part."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toy_models import toy, toy_batch

from jaxformer import sharding
from jaxformer.config import MeshConfig, ModelConfig, OptimConfig
from jaxformer.errors import ConfigError
from jaxformer.nn import transformer
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.optim import make_optimizer
from jaxformer.training.state import TrainState, abstract_state, init_state
from jaxformer.training.step import loss_sums, make_train_step

# With a small eps, a key's bias, whose gradient is zero but for rounding, would go anywhere.
OPTIM = OptimConfig(learning_rate=0.01, schedule="constant", warmup=0, eps=1e-3)
ROWS, LENGTH = 16, 5
# No two of its sizes are alike, nor like the rows' and the length's.
SIZES: dict[str, Any] = dict(d_model=12, d_ff=40, vocab_size=28, n_heads=2, head_dim=6)


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


CONFIGS = {
    "decoder-only": toy(**SIZES, norm="rms", gated=True, n_kv_heads=2),
    "encoder-decoder": toy(
        "encoder-decoder",
        **SIZES,
        qkv_bias=True,
        mlp_bias=True,
        head_bias=True,
        position="relative",
        tie_embeddings=False,
    ),
    "encoder-only": toy(
        "encoder-only",
        **SIZES,
        position="learned",
        n_token_types=2,
        head_transform=True,
    ),
    "grouped heads, dropout": toy(**SIZES | dict(n_heads=4), n_kv_heads=2, dropout=0.3),
    "adapters": toy(**SIZES, lora_rank=2),
}
ACCUMULATE = {CONFIGS["grouped heads, dropout"]: 2}


def place(state: TrainState, config: ModelConfig, mesh: Mesh) -> TrainState:
    """A copy of the state, laid out for another mesh."""
    places = abstract_state(config, make_optimizer(config, OPTIM, 100), mesh)
    copy = jax.tree.map(lambda leaf: leaf.copy(), state)
    return jax.device_put(copy, jax.tree.map(lambda leaf: leaf.sharding, places))


@cache
def stepper(config: ModelConfig, mesh: Mesh) -> Callable[..., Any]:
    tx = make_optimizer(config, OPTIM, 100)
    parts = ACCUMULATE.get(config, 1)
    return make_train_step(config, OPTIM, tx, parts, mesh, abstract_state(config, tx, mesh))


def train(config: ModelConfig, mesh: Mesh, state: TrainState) -> tuple[TrainState, list[float]]:
    """The state three steps on, and their losses."""
    step = stepper(config, mesh)
    losses, first = [], int(state.step)
    for i in range(first, first + 3):
        batch = jax.device_get(toy_batch(config, ROWS, LENGTH, seed=i))
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        losses.append(float(metrics.loss))
    return state, losses


SPECS = {
    "embedding": ("tensor", "fsdp"),
    "positions/embedding": (None, "fsdp"),
    "token_types/embedding": (None, "fsdp"),
    "transform/kernel": ("fsdp", "tensor"),
    "transform/bias": ("tensor",),
    "query/kernel": ("fsdp", "tensor", None),
    "key/kernel": ("fsdp", "tensor", None),
    "value/kernel": ("fsdp", "tensor", None),
    "out/kernel": ("tensor", None, "fsdp"),
    "query/bias": ("tensor", None),
    "key/bias": ("tensor", None),
    "value/bias": ("tensor", None),
    "gate/kernel": ("fsdp", "tensor"),
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


def check_shardings(config: ModelConfig, state: TrainState, mesh: Mesh) -> None:
    """Parameters and both their moments lie where `SPECS` says, in parts of the right size.

    What adapters leave frozen has no moments.
    """
    moments = by_name(state.opt_state)
    for name, leaf in by_name(state.params).items():
        spec = SPECS[max((end for end in SPECS if name.endswith(end)), key=len)]
        spec = (None, *spec) if "/layers/" in name else spec
        own = [moment for path, moment in moments.items() if path.endswith("/" + name)]
        assert len(own) == (0 if config.lora_rank and "lora" not in name else 2), name
        for x in (leaf, *own):
            expected = NamedSharding(mesh, PartitionSpec(*spec))
            assert x.sharding.is_equivalent_to(expected, x.ndim), (name, x.sharding)
            parts = [mesh.shape[axis] if axis else 1 for axis in spec]
            shape = tuple(n // k for n, k in zip(x.shape, parts, strict=True))
            assert len(x.addressable_shards) == mesh.size
            assert {shard.data.shape for shard in x.addressable_shards} == {shape}, name


@pytest.mark.parametrize(
    "kind, shape",
    [
        ("decoder-only", (2, 2, 2)),
        pytest.param("decoder-only", (8, 1, 1), marks=pytest.mark.slow),
        pytest.param("decoder-only", (2, 4, 1), marks=pytest.mark.slow),
        pytest.param("encoder-decoder", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("encoder-decoder", (8, 1, 1), marks=pytest.mark.slow),
        pytest.param("encoder-decoder", (2, 4, 1), marks=pytest.mark.slow),
        pytest.param("encoder-only", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("grouped heads, dropout", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("adapters", (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_as_one(kind, shape):
    config = CONFIGS[kind]
    mesh, one = make_mesh(*shape), make_mesh(1, 1, 1)
    state = init_state(config, make_optimizer(config, OPTIM, 100), mesh, seed=0)
    check_shardings(config, state, mesh)
    expected, losses = train(config, one, place(state, config, one))
    old = state
    state, found = train(config, mesh, old)
    # The old state was given up for the new one to be written over it.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    check_shardings(config, state, mesh)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    same_params(state, expected, 1e-4)


def same_params(a: TrainState, b: TrainState, tolerance: float) -> None:
    theirs = by_name(b.params)
    for name, leaf in by_name(a.params).items():
        found, expected = sharding.fetch(leaf), sharding.fetch(theirs[name])
        np.testing.assert_allclose(found, expected, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_eight_devices_start_as_one():
    config = CONFIGS["decoder-only"]
    tx = make_optimizer(config, OPTIM, 100)
    one, eight = (init_state(config, tx, make_mesh(*m), seed=3) for m in [(1, 1, 1), (2, 2, 2)])
    same_params(one, eight, 0)
    other = init_state(config, tx, make_mesh(1, 1, 1), seed=4)
    assert not np.array_equal(other.params["embed"]["embedding"], one.params["embed"]["embedding"])


def computed(config: ModelConfig, mesh: Mesh) -> Counter[tuple[int, ...]]:
    """The shapes of the arrays that one device computes for a gradient, and how many of each."""
    params = abstract_state(config, make_optimizer(config, OPTIM, 100), mesh).params
    rows = sharding.batch_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
        toy_batch(config, ROWS, LENGTH),
    )
    gradient = jax.jit(
        jax.grad(lambda params, batch: loss_sums(config, OPTIM, params, batch)[0]),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params),
    )
    with sharding.use(mesh):
        text = gradient.lower(params, batch).compile().as_text()
    return Counter(tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text))


@pytest.mark.parametrize(
    "kind, shape",
    [
        ("decoder-only", (2, 2, 2)),
        pytest.param("encoder-decoder", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("encoder-decoder", (2, 4, 1), marks=pytest.mark.slow),
        pytest.param("decoder-only", (8, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_each_device_computes_its_part_of_the_activations(kind, shape):
    mesh = make_mesh(*shape)
    rows, tensor = ROWS // (shape[0] * shape[1]), shape[2]
    found = computed(CONFIGS[kind], mesh)
    assert {size[0] for size in found if len(size) == 3 and size[1] == LENGTH} == {rows}
    assert found[rows, LENGTH, 12] > 10  # the residual stream: its rows, the whole width
    assert found[rows, LENGTH, 40 // tensor] > 10  # inside the feed-forward layers
    assert found[rows, LENGTH, 28 // tensor] > 3  # logits
    assert found[rows, LENGTH, 2 // tensor, 6] > 10  # queries, keys and values of its heads
    assert found[rows, 2 // tensor, 1, LENGTH, LENGTH] > 10  # what they attend to
    if tensor > 1:  # and never all heads at once
        assert not found[rows, LENGTH, 2, 6] and not found[rows, 2, 1, LENGTH, LENGTH]


def test_hidden_states_come_out_in_rows():
    config, mesh = toy("encoder-decoder", **SIZES), make_mesh(2, 2, 2)
    params = abstract_state(config, make_optimizer(config, OPTIM, 100), mesh).params
    batch = sharding.put_batch(jax.device_get(toy_batch(config, ROWS, LENGTH)), mesh)
    for leaf in jax.tree.leaves(batch):
        assert leaf.sharding.spec == PartitionSpec(("data", "fsdp"))
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(4, LENGTH)}
    encode = jax.jit(partial(transformer.apply, config, method="encode"))
    with sharding.use(mesh):
        out = encode.lower(params, batch.source).compile().output_shardings
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    assert out.is_equivalent_to(rows, 3), out


def test_batches_go_there_and_back():
    mesh = make_mesh(2, 2, 2)
    batch = jax.device_get(toy_batch(toy("encoder-decoder"), ROWS))
    back = sharding.fetch(sharding.put_batch(batch, mesh))
    assert jax.tree.structure(back) == jax.tree.structure(batch)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(batch), strict=True):
        assert isinstance(x, np.ndarray) and x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert sharding.batch_shards(mesh) == 4


def test_the_rest_of_the_devices_go_to_data():
    assert dict(sharding.make_mesh(MeshConfig()).shape) == dict(data=8, fsdp=1, tensor=1)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "shape, product",
    [((-1, 3, 1), "2 x 3 x 1 takes 6"), ((3, 2, 1), "3 x 2 x 1 takes 6"), ((-1, 4, 4), "takes 16")],
)
def test_a_mesh_of_the_wrong_size_is_refused(shape, product):
    data, fsdp, tensor = shape
    with pytest.raises(ConfigError, match=product) as caught:
        sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    assert "there are 8" in str(caught.value) and caught.value.exit_code == 2


def test_rows_are_not_cut_across_processes():
    devices = [SimpleNamespace(process_index=i // 2) for i in range(4)]
    with pytest.raises(ConfigError, match="tensor 4 reaches over more than one process"):
        sharding.make_mesh(MeshConfig(tensor=4), devices)


def test_all_that_does_not_fit_is_named_at_once():
    config = toy(d_model=18, n_heads=6, n_kv_heads=3, head_dim=4, d_ff=10, vocab_size=15)
    mesh = make_mesh(1, 4, 2)
    with pytest.raises(ConfigError) as caught:
        sharding.check_fits(config, mesh)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == [
        "model.n_kv_heads",
        "model.vocab_size",
        "model.d_model",
    ]
    # Four would not divide the six heads.
    assert "multiple of mesh.tensor 2 (mesh.tensor could be 1, 3; or n_kv_heads 6)" in lines[0]
    assert "could be 1, 3, 5, 15; or vocab_size 16)" in lines[1]
    assert (
        "multiple of mesh.fsdp 4 (mesh.fsdp could be 1, 2, 3, 6, 9, 18; or d_model 20)" in lines[2]
    )
    assert caught.value.exit_code == 2
    # Heads share the width evenly, and rotary ones are of an even size.
    config = toy(d_model=18, n_heads=3, d_ff=8, vocab_size=16)
    with pytest.raises(ConfigError) as caught:
        sharding.check_fits(config, mesh)
    heads, width = str(caught.value).splitlines()[1:]
    assert heads.endswith("(mesh.tensor could be 1, 3)") and width.endswith("; or d_model 24)")


multiples = st.sampled_from([2, 3, 4, 6])


@pytest.mark.slow
@settings(max_examples=15)
@given(
    st.sampled_from([(8, 1, 1), (1, 2, 4), (1, 4, 2), (1, 3, 2), (2, 1, 3)]),
    multiples,
    multiples,
    st.fixed_dictionaries(
        dict(d_model=multiples, d_ff=multiples, vocab_size=multiples, head_transform=st.booleans())
    ),
)
def test_what_passes_the_check_can_be_laid_out(shape, kv_heads, groups, sizes):
    config = toy(
        n_heads=kv_heads * groups, n_kv_heads=kv_heads, head_dim=2, position="relative", **sizes
    )
    mesh = make_mesh(*shape)
    state = abstract_state(config, make_optimizer(config, OPTIM, 100), mesh)

    def fits() -> bool:
        try:
            for leaf in jax.tree.leaves(state.params):
                leaf.sharding.shard_shape(leaf.shape)
        except ValueError:
            return False
        return True

    if fits():
        sharding.check_fits(config, mesh)
    else:
        with pytest.raises(ConfigError) as caught:
            sharding.check_fits(config, mesh)
        for axis, name, size in re.findall(
            r"of mesh\.(\w+) .*; or (\w+) (\d+)\)", str(caught.value)
        ):
            assert int(size) % mesh.shape[axis] == 0
            dataclasses.replace(config, **{name: int(size)})  # which is allowed


@pytest.mark.slow
def test_eight_devices_to_two_and_one(tmp_path):
    config = CONFIGS["encoder-decoder"]
    tx = make_optimizer(config, OPTIM, 100)
    mesh = make_mesh(2, 2, 2)
    state, _ = train(config, mesh, init_state(config, tx, mesh, seed=0))
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(3, state, {}, loss=None)
        saved = jax.device_get((state.params, state.opt_state))
        _, expected = train(config, mesh, state)
        for shape in [(1, 2, 1), (1, 1, 1)]:
            mesh = make_mesh(*shape)
            restored = checkpoints.restore(abstract_state(config, tx, mesh))
            assert restored is not None and restored.step == 3
            found = jax.device_get((restored.state.params, restored.state.opt_state))
            jax.tree.map(np.testing.assert_array_equal, found, saved)
            _, losses = train(config, mesh, restored.state)
            np.testing.assert_allclose(losses, expected, rtol=1e-5)
