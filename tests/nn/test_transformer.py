"""What a token may depend on: not the future, padding, neighbours in its row, or other rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_configs import (
    VOCAB,
    as_tokens,
    batch_for,
    examples,
    logits,
    model_configs,
    random_params,
    random_tokens,
)

from jaxformer.config import ModelConfig
from jaxformer.types import Batch, Tokens

ROWS, LENGTH = 3, 8
SOURCES, TARGETS = np.array([3, 4, 6]), np.array([5, 3, 7])
"""Lengths of three examples, of which the first two fit into one row."""

seeds = st.integers(0, 2**32 - 1)
alone = random_tokens(np.random.default_rng(0), 1, LENGTH)


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def real(tokens: Tokens):
    return np.asarray(tokens.seg) > 0


def predicting(batch: Batch) -> Tokens:
    tokens = batch.source if batch.target is None else batch.target
    assert tokens is not None
    return tokens


def other_ids(ids):
    """Other real tokens than these."""
    return ids % (VOCAB - 1) + 1


def scramble_padding(rng, tokens: Tokens) -> Tokens:
    ids, pos = (rng.integers(0, 12, (ROWS, LENGTH)) for _ in range(2))
    keep = real(tokens)
    return as_tokens(np.where(keep, tokens.ids, ids), np.where(keep, tokens.pos, pos), tokens.seg)


def pack(tokens: Tokens, lengths) -> Tokens:
    """Rows [0, 1], [2], and one of padding."""
    packed = np.zeros((3, ROWS, LENGTH), int)
    for example, (row, at, seg) in enumerate([(0, 0, 1), (0, lengths[0], 2), (1, 0, 1)]):
        n = lengths[example]
        packed[:, row, at : at + n] = tokens.ids[example, :n], np.arange(n), np.full(n, seg)
    return as_tokens(*packed)


def check(config, seed):
    rng = np.random.default_rng(seed)
    params = random_params(config, seed)
    source = random_tokens(rng, ROWS, LENGTH, SOURCES)
    target = random_tokens(rng, ROWS, LENGTH, TARGETS)
    batch = batch_for(config, source, target)
    out = logits(config, params, batch)
    assert out.dtype == jnp.float32 and out.shape == (ROWS, LENGTH, VOCAB)

    # Rows do not see each other.
    order = jnp.array([2, 0, 1])
    np.testing.assert_array_equal(
        logits(config, params, jax.tree.map(lambda x: x[order], batch)), out[order]
    )

    # Nobody sees padding, whatever it says.
    changed = batch_for(config, scramble_padding(rng, source), scramble_padding(rng, target))
    keep = real(predicting(batch))
    np.testing.assert_array_equal(logits(config, params, changed)[keep], out[keep])

    # Nor another example in the same row; and what is all padding is no NaN.
    packed = batch_for(config, pack(source, SOURCES), pack(target, TARGETS))
    together = np.asarray(logits(config, params, packed))
    n = TARGETS if config.n_decoder_layers else SOURCES
    assert_close(together[0, : n[0]], out[0, : n[0]])
    assert_close(together[0, n[0] : n[0] + n[1]], out[1, : n[1]])
    assert_close(together[1, : n[2]], out[2, : n[2]])
    assert np.isfinite(together).all()

    # Nor, in a decoder, the future; but the present is seen.
    if config.n_decoder_layers:
        at = int(rng.integers(1, LENGTH))
        target = random_tokens(rng, ROWS, LENGTH)
        before = logits(config, params, batch_for(config, source, target))
        future = jnp.arange(LENGTH) >= at
        target = target._replace(ids=jnp.where(future, other_ids(target.ids), target.ids))
        after = logits(config, params, batch_for(config, source, target))
        np.testing.assert_array_equal(after[:, :at], before[:, :at])
        assert (abs(after - before)[:, at].max(-1) > 1e-4).all()


@examples(6)
@given(model_configs(), seeds)
def test_a_token_depends_on_nothing_it_may_not_see(config, seed):
    check(config, seed)


@pytest.mark.slow
@examples(30)
@given(model_configs(max_layers=3), seeds)
def test_a_token_depends_on_nothing_it_may_not_see_in_many_models(config, seed):
    check(config, seed)


def check_longer(config, seed):
    params, rng = random_params(config, seed), np.random.default_rng(seed)
    long = [random_tokens(rng, 2, LENGTH, lengths) for lengths in ([5, 2], [3, 5])]
    short = [jax.tree.map(lambda x: x[:, :5], tokens) for tokens in long]
    batch = batch_for(config, *short)
    keep = real(predicting(batch))
    longer = logits(config, params, batch_for(config, *long))[:, :5]
    assert_close(longer[keep], logits(config, params, batch)[keep])


@examples(2)
@given(model_configs(), seeds)
def test_more_padding_changes_nothing(config, seed):
    check_longer(config, seed)


@pytest.mark.slow
@examples(15)
@given(model_configs(), seeds)
def test_more_padding_changes_nothing_in_many_models(config, seed):
    check_longer(config, seed)


def changed_by(config, side: str, at: int, params=None):
    """Which logits of one row change with the token at `at` of its source or target."""
    params = random_params(config, 1) if params is None else params
    sides = {"source": alone, "target": alone}
    before = logits(config, params, batch_for(config, **sides))
    ids = alone.ids.at[0, at].set(other_ids(alone.ids[0, at]))
    sides[side] = alone._replace(ids=ids)
    after = logits(config, params, batch_for(config, **sides))
    return (np.asarray(after != before)).any(-1)[0].nonzero()[0].tolist()


DECODER = ModelConfig(
    vocab_size=VOCAB, n_decoder_layers=1, d_model=8, d_ff=8, n_heads=2, max_length=16
)


@pytest.mark.parametrize(
    ("window", "at", "seen_by"),
    [((3,), 2, [2, 3, 4]), ((1,), 4, [4]), ((0,), 5, [5, 6, 7])],
)
def test_a_window_is_what_one_causal_layer_sees(window, at, seen_by):
    config = dataclasses.replace(DECODER, window=window)
    assert changed_by(config, "target", at) == seen_by


def test_an_encoder_sees_both_sides_and_its_window():
    config = dataclasses.replace(DECODER, n_encoder_layers=1, n_decoder_layers=0)
    assert changed_by(config, "source", 4) == [0, 1, 2, 3, 4, 5, 6, 7]
    windowed = dataclasses.replace(config, window=(3,))
    assert changed_by(windowed, "source", 4) == [2, 3, 4, 5, 6]


def test_windows_repeat_over_the_layers():
    """Three layers of windows 2, 3, 2 reach 1 + 2 + 1 back."""
    config = dataclasses.replace(DECODER, n_decoder_layers=3, window=(2, 3))
    assert changed_by(config, "target", 1) == [1, 2, 3, 4, 5]


def test_cross_attention_has_no_window():
    config = dataclasses.replace(DECODER, n_encoder_layers=1, window=(1,))
    assert changed_by(config, "source", 6) == list(range(LENGTH))


@pytest.mark.parametrize(
    ("side", "layers", "bucket", "seen_by"),
    [
        ("target", dict(n_decoder_layers=1), 3, [4, 7]),  # three behind
        # One ahead, of which the last token has none: it sees all.
        ("source", dict(n_encoder_layers=1, n_decoder_layers=0), 5, [3, 4, 7]),
    ],
    ids=["decoder", "encoder"],
)
def test_the_relative_bias_knows_before_from_after(side, layers, bucket, seen_by):
    config = dataclasses.replace(
        DECODER, **layers, position="relative", relative_buckets=8, relative_max_distance=20
    )
    params = random_params(config, 1)
    stack = params["decoder" if side == "target" else "encoder"]
    stack["relative_bias"] = stack["relative_bias"].at[bucket].set(1e4)
    assert changed_by(config, side, 4, params) == seen_by


@pytest.mark.parametrize("thetas", [((10.0, 1e4), (1e4, 10.0)), ((10.0, 1e4), (10.0,))])
def test_each_layer_has_its_rotary_base(thetas):
    one, two = (
        dataclasses.replace(DECODER, n_decoder_layers=2, rope_theta=theta) for theta in thetas
    )
    params, batch = random_params(one, 0), batch_for(one, alone, alone)
    assert abs(logits(one, params, batch) - logits(two, params, batch)).max() > 1e-3


def test_equal_rotary_bases_are_one():
    one, two = (
        dataclasses.replace(DECODER, n_decoder_layers=2, rope_theta=theta)
        for theta in [(50.0,), (50.0, 50.0)]
    )
    params, batch = random_params(one, 0), batch_for(one, alone, alone)
    np.testing.assert_array_equal(logits(one, params, batch), logits(two, params, batch))
