"""Weights in eight bits: exact where those are enough, near elsewhere, the same for all uses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.data.tokenizer import SymbolTokenizer
from jaxformer.model import Model
from jaxformer.nn import transformer
from jaxformer.nn.quantize import project_int8, quantize

LETTERS = SymbolTokenizer(tuple("abcde"), "")


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_integers_are_multiplied_exactly(rows, inputs, outputs, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (rows, inputs))
    x[:, 0] = 127  # so that a step is 1
    weight = rng.integers(-127, 128, (outputs, inputs))
    scale = rng.uniform(0.5, 2, outputs).astype(np.float32)
    found = project_int8(
        jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.int8), jnp.asarray(scale), jnp.float32
    )
    np.testing.assert_allclose(found, x @ weight.T * scale, rtol=1e-5)


def made(kind: str) -> Model:
    config = ModelConfig(
        vocab_size=LETTERS.vocab_size,
        n_encoder_layers=2 * (kind == "encoder-decoder"),
        n_decoder_layers=2,
        d_model=32,
        d_ff=48,
        n_heads=4,
        n_kv_heads=2,
        gated=True,
        max_length=16,
        tie_embeddings=kind == "encoder-decoder",
    )
    params = nn.unbox(transformer.init(config, jax.random.key(1)))
    data = DataConfig(task="seq2seq" if config.n_encoder_layers else "lm", tokenizer="char")
    return Model(config, params, LETTERS, data, DecodeConfig())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_a_model_in_eight_bits(kind: str):
    model = made(kind)
    wide = model.score_tokens(["abc", "e"], ["edcba", "aabb"])
    params = quantize(model.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert "kernel" not in name
        assert leaf.dtype == (jnp.int8 if "int8" in name else jnp.float32)
    narrow = dataclasses.replace(model, params=params)
    found = narrow.score_tokens(["abc", "e"], ["edcba", "aabb"])
    for a, b in zip(wide, found, strict=True):
        assert a != b
        np.testing.assert_allclose(a.token_log_probs, b.token_log_probs, atol=0.1)
    for way in (DecodeConfig(max_length=5), DecodeConfig(max_length=5, beams=3)):
        [best] = narrow.hypotheses(["abc"], way)[0].hypotheses
        options = dataclasses.replace(way, token_log_probs=True)
        [again] = narrow.hypotheses(["abc"], options)[0].hypotheses
        np.testing.assert_allclose(sum(again.token_log_probs), best.log_prob, rtol=1e-4)
