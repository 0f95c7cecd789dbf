"""Decoding with a cache gives what the whole sequence at once gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_configs import (
    DECODERS,
    QUICK,
    VOCAB,
    as_tokens,
    batch_for,
    logits,
    model_configs,
    random_params,
    random_tokens,
)

from jaxformer.config import ModelConfig
from jaxformer.nn import cache as caches
from jaxformer.nn.transformer import apply, unstack
from jaxformer.types import NOWHERE, Tokens

ROWS, PROMPT, STEPS = 2, 4, 4
LENGTH, SOURCE = PROMPT + STEPS, 5
LENGTHS = (3, 5)
"""Lengths of the sources."""


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def prefill(config, params, cache, tokens, source):
    """Logits of `tokens`, whose source (if any) is read first, and the cache with them in it."""
    memory = seg = None
    if config.n_encoder_layers:
        memory, seg = apply(config, params, source, method="encode"), source.seg
    params = unstack(params)
    hidden, cache = apply(config, params, tokens, memory, seg, cache, method="decode")
    return apply(config, params, hidden, method="unembed"), cache


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def step(config, params, cache, tokens, parent):
    params = unstack(params)
    cache = caches.follow(cache, parent)
    hidden, cache = apply(config, params, tokens, None, None, cache, method="decode")
    return apply(config, params, hidden, method="unembed"), cache


def assert_same(cached, whole):
    """The same logits, and the same token."""
    np.testing.assert_allclose(cached, whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cached.argmax(-1), whole.argmax(-1))


def right_padded(rows: list[list[int]]) -> Tokens:
    seg = np.array([[i < len(row) for i in range(LENGTH)] for row in rows])
    ids = np.array([row + [0] * (LENGTH - len(row)) for row in rows])
    return as_tokens(ids, np.arange(LENGTH) * seg, seg)


def check_hypotheses(config, seed, width):
    """Each of `width` hypotheses, whatever its parents, sees its own history and nothing else."""
    params, rng = random_params(config, seed), np.random.default_rng(seed)
    source = random_tokens(rng, ROWS, SOURCE, LENGTHS)
    lengths = rng.permutation([PROMPT, rng.integers(1, PROMPT)])
    prompt = random_tokens(rng, ROWS, PROMPT, lengths)

    histories, outs = [], []
    paths = [[prompt.ids[row, :n].tolist()] * width for row, n in enumerate(lengths)]
    memory_length = SOURCE if config.n_encoder_layers else 0
    cache = caches.init_cache(config, ROWS, PROMPT + STEPS * width + 1, memory_length)
    first, cache = prefill(config, params, cache, prompt, source)
    cache = caches.share_prompt(cache, width)
    for t in range(STEPS):
        ids = rng.integers(1, VOCAB, (ROWS, width))
        parent = rng.integers(0, width, (ROWS, width)) if width > 1 else np.zeros((ROWS, 1), int)
        paths = [
            [paths[row][parent[row, w]] + [int(ids[row, w])] for w in range(width)]
            for row in range(ROWS)
        ]
        pos = np.broadcast_to(lengths[:, None] + t, ids.shape)
        queries = as_tokens(ids, pos, np.ones_like(ids))
        parents = jnp.asarray(parent, jnp.int32) if width > 1 else None
        out, cache = step(config, params, cache, queries, parents)
        outs.append(out)
        histories.extend(path for row in paths for path in row)
    assert int(cache.filled) == PROMPT + STEPS * width

    target = right_padded(histories)
    repeated = jax.tree.map(lambda x: jnp.tile(jnp.repeat(x, width, 0), (STEPS, 1)), source)
    whole = np.asarray(logits(config, params, batch_for(config, repeated, target)))
    last = np.asarray(target.seg.sum(1)) - 1
    steps = np.concatenate([np.asarray(out).reshape(ROWS * width, -1) for out in outs])
    assert_same(steps, whole[np.arange(len(last)), last])
    for row, n in enumerate(lengths):
        assert_same(np.asarray(first)[row, :n], whole[row * width, :n])


widths = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=6)
@given(model_configs(DECODERS), seeds, widths)
def test_cached_hypotheses_are_teacher_forced(config, seed, width):
    check_hypotheses(config, seed, width)


@pytest.mark.slow
@settings(max_examples=50)
@given(model_configs(DECODERS, max_layers=3), seeds, widths)
def test_cached_hypotheses_are_teacher_forced_in_many_models(config, seed, width):
    check_hypotheses(config, seed, width)


def check_chunks(config, seed):
    """Two halves of a prompt, one after the other, are the whole prompt; padding is in between."""
    params, rng = random_params(config, seed), np.random.default_rng(seed)
    source = random_tokens(rng, ROWS, SOURCE, LENGTHS)
    prompt = random_tokens(rng, ROWS, LENGTH, [LENGTH, rng.integers(1, LENGTH)])
    memory_length = SOURCE if config.n_encoder_layers else 0
    cache = caches.init_cache(config, ROWS, LENGTH, memory_length)
    parts = []
    for at in (0, PROMPT):
        part = jax.tree.map(lambda x, at=at: x[:, at : at + PROMPT], prompt)
        out, cache = prefill(config, params, cache, part, source)
        parts.append(out)
    # The same tokens in one part, into a cache with room to spare.
    cache = caches.init_cache(config, ROWS, LENGTH + 3, memory_length)
    whole, _ = prefill(config, params, cache, prompt, source)
    real = np.asarray(prompt.seg) > 0
    assert_same(np.concatenate(parts, axis=1)[real], np.asarray(whole)[real])


@settings(max_examples=3)
@given(model_configs(DECODERS), seeds)
def test_chunked_prefill_is_full_prefill(config, seed):
    check_chunks(config, seed)


@pytest.mark.slow
@settings(max_examples=30)
@given(model_configs(DECODERS), seeds)
def test_chunked_prefill_is_full_prefill_in_many_models(config, seed):
    check_chunks(config, seed)


CONFIG = ModelConfig(
    vocab_size=VOCAB,
    n_encoder_layers=1,
    n_decoder_layers=2,
    d_model=8,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    compute_dtype="bfloat16",
)


def test_an_empty_cache_has_its_shapes():
    cache = caches.init_cache(CONFIG, 3, 7, 5)
    assert [kv.k.shape for kv in cache.own] == [(3, 7, 2, 6)] * 2
    assert [kv.v.shape for kv in cache.cross] == [(3, 5, 2, 6)] * 2
    assert cache.own[0].k.dtype == jnp.bfloat16
    assert (cache.pos == NOWHERE).all() and cache.filled == 0


def test_following_moves_history_but_no_keys():
    cache = caches.init_cache(CONFIG, 1, 6, 5)
    cache = cache._replace(pos=cache.pos.at[0, 0].set(0), filled=jnp.int32(2))
    assert caches.follow(cache, jnp.array([[0]])) is cache  # one hypothesis needs no table
    cache = caches.share_prompt(cache, 2)  # slot 1 is padding
    assert cache.seen is not None
    assert cache.seen[0].astype(int).tolist() == [[1, 0, 0, 0, 0, 0]] * 2
    once = caches.follow(cache, None)
    assert once.seen[0].astype(int).tolist() == [[1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
    twice = caches.follow(once._replace(filled=jnp.int32(4)), jnp.array([[1, 1]]))
    assert twice.seen[0].astype(int).tolist() == [[1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1]]
    assert twice.own is cache.own
