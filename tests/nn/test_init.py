"""Initial parameters: spread as configured, and every axis named."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from random_configs import abstract_params, examples, model_configs

from jaxformer.config import ModelConfig
from jaxformer.nn import transformer
from jaxformer.nn.layers import kernel_init
from jaxformer.sharding import RULES

D, F, N, H = 96, 160, 4, 40  # N * H is neither D nor F

BASE = ModelConfig(
    vocab_size=300,
    n_decoder_layers=2,
    d_model=D,
    d_ff=F,
    n_heads=N,
    n_kv_heads=2,
    head_dim=H,
    max_length=50,
    tie_embeddings=False,
    head_bias=True,
    head_transform=True,
    gated=True,
    mlp_bias=True,
    qkv_bias=True,
    out_bias=True,
    embed_init_std=0.7,
    init_std=0.05,
    position="relative",
    lora_rank=16,
    lora_targets=("query", "out"),
)
FANS = {
    "query": (D, N * H),
    "key": (D, 2 * H),
    "value": (D, 2 * H),
    "out": (N * H, D),
    "up": (D, F),
    "gate": (D, F),
    "down": (F, D),
    "head": (D, 300),
    "transform": (D, D),
}


jitted_init = jax.jit(transformer.init, static_argnums=0)


def initial(config, seed=0):
    params = nn.unbox(jitted_init(config, jax.random.key(seed)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def kernels(params):
    """(Linear's name, its path, kernel) of all of them."""
    for path, leaf in params.items():
        if path.endswith("/kernel"):
            yield path.split("/")[-2], path, leaf


def assert_spread(values, std):
    """Deviation and mean, within what this many draws allow."""
    np.testing.assert_allclose(values.std(), std, rtol=5 / math.sqrt(values.size))
    assert abs(values.mean()) < 5 * std / math.sqrt(values.size)


def test_lecun_and_everything_that_is_no_kernel():
    params = initial(BASE)
    for name, _, kernel in kernels(params):
        assert_spread(kernel, FANS[name][0] ** -0.5)
        assert abs(kernel).max() > 3 * kernel.std()  # a normal has tails
    assert_spread(params["embed/embedding"], 0.7)
    assert_spread(params["decoder/relative_bias"], D**-0.5)
    for path, leaf in params.items():
        if path.endswith("scale"):
            assert (leaf == 1).all(), path
        if path.endswith(("/bias", "lora_b")):
            assert (leaf == 0).all(), path
        if path.endswith("lora_a"):
            fan_in = D if "query" in path else N * H
            assert_spread(leaf, fan_in**-0.5)

    # The layers of a stack are not copies of each other, nor is another seed.
    up = params["decoder/layers/mlp/up/kernel"]
    assert not np.isclose(up[0], up[1]).any(axis=0).all()
    again, other = initial(BASE), initial(BASE, seed=1)
    assert all((again[path] == params[path]).all() for path in params)
    assert (other["embed/embedding"] != params["embed/embedding"]).mean() > 0.99


@pytest.mark.parametrize("initializer", ["normal", "truncated_normal", "xavier"])
@pytest.mark.parametrize(("d_in", "d_out"), [((D,), (N, H)), ((N, H), (D,))], ids=str)
def test_initializer(initializer, d_in, d_out):
    config = dataclasses.replace(BASE, initializer=initializer)
    init = kernel_init(config, len(d_in), len(d_out), gain=3.0)
    kernel = np.asarray(init(jax.random.key(0), d_in + d_out, jnp.float32)) / 3
    if initializer == "normal":
        assert_spread(kernel, 0.05)
    elif initializer == "truncated_normal":  # cut at two deviations
        assert 1.9 * 0.05 < abs(kernel).max() <= 2 * 0.05
        assert_spread(kernel, 0.88 * 0.05)
    else:
        bound = math.sqrt(6 / (math.prod(d_in) + math.prod(d_out)))
        assert 0.98 * bound < abs(kernel).max() <= bound
        assert_spread(kernel, bound / math.sqrt(3))


def test_gains():
    """GPT-2's smaller output projections; T5's smaller queries, whose logits are not scaled."""
    config = dataclasses.replace(
        BASE, n_encoder_layers=1, init_residual_scaled=True, attention_scale=1.0, lora_rank=0
    )
    for name, path, kernel in kernels(initial(config)):
        std = FANS[name][0] ** -0.5
        if name in ("out", "down"):
            std *= (2 * (1 if "encoder" in path else 2)) ** -0.5
        if name == "query":
            std *= H**-0.5
        assert_spread(kernel, std)


AXES = {
    "query": ("embed", "heads", "head_dim"),
    "key": ("embed", "kv_heads", "head_dim"),
    "value": ("embed", "kv_heads", "head_dim"),
    "out": ("heads", "head_dim", "embed"),
    "up": ("embed", "mlp"),
    "gate": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "head": ("embed", "vocab"),
    "transform": ("embed", "mlp"),
}


@examples(8)
@given(model_configs())
def test_every_axis_of_every_parameter_has_a_name(config):
    boxed = abstract_params(config)
    leaves = jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    known = {name for name, _ in RULES}
    for path, leaf in leaves:
        path = [part.key for part in path]
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == leaf.value.ndim, path
        assert set(leaf.names) <= known, path
        assert (leaf.names[0] == "layers") == ("layers" in path), path
        names = leaf.names[1:] if "layers" in path else leaf.names
        sizes = {
            "layers": {config.n_encoder_layers, config.n_decoder_layers},
            "embed": {config.d_model},
            "heads": {config.n_heads},
            "kv_heads": {config.kv_heads},
            "head_dim": {config.dim_per_head},
            "vocab": {config.vocab_size, config.source_vocab_size},
            "mlp": {config.d_model if "transform" in path else config.d_ff},
            "length": {config.max_length + config.position_offset},
            "buckets": {config.relative_buckets},
            "types": {config.n_token_types},
            "lora": {config.lora_rank},
        }
        for name, size in zip(leaf.names, leaf.value.shape, strict=True):
            assert size in sizes[name], (path, name)
        if path[-1] == "kernel":
            assert names == AXES[path[-2]], path


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_have_their_dtype(dtype):
    config = dataclasses.replace(BASE, param_dtype=dtype, compute_dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(config))} == {jnp.dtype(dtype)}
