"""Adapters: nothing at first, all that trains, and a kernel in the end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_configs import (
    VOCAB,
    batch_for,
    examples,
    logits,
    model_configs,
    random_params,
    random_tokens,
)

from jaxformer.config import ModelConfig
from jaxformer.nn import lora

seeds = st.integers(0, 2**32 - 1)


def adapters(path):
    return path[-1].key in ("lora_a", "lora_b")


def without_adapters(params):
    """The base model's parameters: `params` less all adapters."""
    if not isinstance(params, dict):
        return params
    return {
        name: without_adapters(child)
        for name, child in params.items()
        if name not in ("lora_a", "lora_b")
    }


def check(config, seed):
    config = dataclasses.replace(config, lora_rank=2)
    base = dataclasses.replace(config, lora_rank=0)
    params, rng = random_params(config, seed), np.random.default_rng(seed)
    batch = batch_for(config, random_tokens(rng, 2, 6, [6, 4]), random_tokens(rng, 2, 6))
    adapted = logits(config, params, batch)
    plain = logits(base, without_adapters(params), batch)
    assert abs(adapted - plain).max() > 1e-4

    fresh = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if path[-1].key == "lora_b" else x, params
    )
    np.testing.assert_allclose(logits(config, fresh, batch), plain, rtol=1e-5, atol=1e-5)

    merged_config, merged = lora.merge(config, params)
    assert merged_config == base
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, without_adapters(params))
    np.testing.assert_allclose(logits(merged_config, merged, batch), adapted, rtol=1e-3, atol=1e-3)


@examples(2)
@given(model_configs(), seeds)
def test_adapters_are_the_base_at_first_and_a_kernel_in_the_end(config, seed):
    check(config, seed)


@pytest.mark.slow
@examples(20)
@given(model_configs(), seeds)
def test_adapters_in_many_models(config, seed):
    check(config, seed)


EVERYTHING = ModelConfig(
    vocab_size=VOCAB,
    n_encoder_layers=2,
    n_decoder_layers=3,
    d_model=8,
    d_ff=12,
    n_heads=2,
    head_dim=6,
    gated=True,
    tie_embeddings=False,
    lora_rank=3,
    lora_alpha=6.0,
    lora_targets=("query", "key", "value", "out", "gate", "up", "down", "head"),
)


def test_merging_adds_every_product():
    """W + (alpha / rank) A B, layer by layer."""
    params = random_params(EVERYTHING, 0)
    _, merged = lora.merge(EVERYTHING, params)
    out = params["decoder"]["layers"]["cross"]["out"]
    a, b = (np.asarray(out[name]) for name in ("lora_a", "lora_b"))
    assert a.shape == (3, 2, 6, 3) and b.shape == (3, 3, 8)
    for layer in range(3):
        wanted = out["kernel"][layer] + 2 * np.einsum("nhr,rd->nhd", a[layer], b[layer])
        got = merged["decoder"]["layers"]["cross"]["out"]["kernel"][layer]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    head = params["head"]
    wanted = head["kernel"] + 2 * head["lora_a"] @ head["lora_b"]
    np.testing.assert_allclose(merged["head"]["kernel"], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged["embed"]["embedding"], params["embed"]["embedding"])


def test_merging_keeps_the_dtype():
    config = dataclasses.replace(EVERYTHING, param_dtype="bfloat16")
    merged = jax.eval_shape(lambda: lora.merge(config, random_params(config, 0))[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_only_adapters_train():
    params = random_params(EVERYTHING, 0)
    mask = lora.trainable(EVERYTHING, params)
    wanted = jax.tree_util.tree_map_with_path(lambda path, _: adapters(path), params)
    assert mask == wanted
    attention, mlp, head = 4 * (2 + 1), 3 * 2, 1  # a stack counts once
    assert sum(jax.tree.leaves(mask)) == 2 * (attention + mlp + head)


def test_everything_trains_without_adapters():
    config = dataclasses.replace(EVERYTHING, lora_rank=0)
    mask = lora.trainable(config, random_params(config, 0))
    assert all(jax.tree.leaves(mask))
    assert lora.merge(config, {"embed": 1}) == (config, {"embed": 1})
