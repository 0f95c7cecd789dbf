"""Speculative decoding against the one loop: whatever is guessed, the same tokens."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoder import EOS, PAD, automaton, hypotheses, run, strategy_named, toy

from jaxformer.decoding.loop import begin
from jaxformer.decoding.processors import ban, chain, min_length
from jaxformer.decoding.speculative import draft, lookup, speculate

seeds = st.integers(0, 2**32 - 1)
K = 3
every_strategy = pytest.mark.parametrize("name", ["greedy", "sample"])


def check(model, cache, tokens, count):
    """The hidden states before the first token and after each."""
    states = [cache]
    for i in range(tokens.shape[1]):
        states.append(jnp.tanh(states[-1] @ model.mix + jnp.asarray(model.embed)[tokens[:, i]]))
    states = jnp.stack(states, 1)
    return states[:, 1:] @ model.out, states


def keep(states, kept):
    return jnp.take_along_axis(states, kept[:, None, None], 1)[:, 0]


@cache
def compiled(name, length=7):
    def decode(model, guesses, prompt, mask, table, least, limit, keys, passes=None):
        def guess(state, first):
            if guesses is None:
                return lookup(*prompt, K)(state, first)
            count = state.length[:, 0] + 1
            at = jnp.minimum(count[:, None] + jnp.arange(K), guesses.shape[1] - 1)
            return jnp.take_along_axis(guesses, at, 1), state.cache

        def counted(cache, tokens, count):
            jax.debug.callback(lambda: PASSES.append(1))
            return check(model, cache, tokens, count)

        return speculate(
            counted, keep, guess,
            jnp.asarray(model.start) @ model.out, jnp.asarray(model.start),
            strategy_named(name, 1, 0.0),
            chain(ban(mask), automaton(table), min_length(least, [EOS])),
            length=length, limit=limit, eos_ids=[EOS], pad_id=PAD, keys=keys,
        )  # fmt: skip

    return jax.jit(decode)


PASSES = []


def guessing(model, name, guesses, limit=7, mask=None, table=None, least=0):
    rows, size = len(model.start), model.out.shape[1]
    mask = np.zeros(size, bool) if mask is None else mask
    table = np.zeros((4, size)) if table is None else np.asarray(table)
    table = np.pad(table, ((0, 4 - len(table)), (0, 0)), constant_values=-1).astype(np.int32)
    prompt = (np.zeros((rows, 2), np.int32), np.zeros(rows, np.int32))
    limit = np.broadcast_to(np.int32(limit), rows)
    keys = jax.random.split(jax.random.key(0), rows)
    PASSES.clear()
    found = compiled(name)(model, guesses, prompt, mask, table, np.int32(least), limit, keys)
    jax.block_until_ready(found)
    jax.effects_barrier()
    return found


def assert_equal(found, wanted):
    for row in range(len(wanted.tokens)):
        [(*a, x, y, b)], [(*c, z, w, d)] = (
            [(tokens, finish, score, log_prob, finish)]
            for [(tokens, score, log_prob, finish)] in (
                hypotheses(found, row),
                hypotheses(wanted, row),
            )
        )
        assert (a, b) == (c, d)
        np.testing.assert_allclose([x, y], [z, w], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)


@every_strategy
@given(seeds, st.sampled_from([-1.0, 0.0, 1.0]), st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_any_guesses_give_what_the_loop_gives(name, seed, eos, least):
    model = toy(seed, eos=eos)
    wanted = run(model, name, limit=[7, 5], least=least)
    random = np.random.default_rng(seed).integers(0, 5, (2, 7)).astype(np.int32)
    for guesses in (random, None):
        assert_equal(guessing(model, name, guesses, limit=[7, 5], least=least), wanted)


@every_strategy
def test_right_guesses_save_passes_and_wrong_ones_cost_none(name):
    model = toy(3, eos=-20.0)
    wanted = run(model, name)
    right = np.asarray(wanted.tokens[:, 0])
    assert_equal(guessing(model, name, right), wanted)
    assert len(PASSES) == 2  # seven tokens, four at a time
    assert_equal(guessing(model, name, np.full((2, 7), -1, np.int32)), wanted)
    assert len(PASSES) == 7


@every_strategy
def test_constraints_and_dead_ends(name):
    model = toy(0, eos=1.0)
    tables = [
        ((-1, -1, 1, -1, 2), (-1, 3, 1, -1, -1), (-1, 3, -1, -1, 2), (-1,) * 5),
        ((-1, -1, 1, -1, -1), (-1,) * 5),
    ]
    for table in tables:
        wanted = run(model, name, table=table)
        right = np.asarray(wanted.tokens[:, 0])
        for guesses in (right, None):
            assert_equal(guessing(model, name, guesses, table=table), wanted)
    banned = np.ones(5, bool)
    assert_equal(guessing(model, name, None, mask=banned), run(model, name, mask=banned))
    assert_equal(guessing(model, name, None, limit=[0, 3]), run(model, name, limit=[0, 3]))


@every_strategy
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_a_draft_of_the_model_itself_guesses_right(name, seed):
    model = toy(seed, eos=-20.0)
    wanted = np.asarray(run(model, name, least=7).tokens[:, 0])
    strategy, processor = strategy_named(name, 1, 0.0), chain(min_length(7, [EOS]))
    start = jnp.asarray(model.start)
    state = begin(
        start @ model.out, start[:, None], strategy, processor, 7, jnp.full(2, 7), [EOS], PAD,
        jax.random.split(jax.random.key(0), 2),
    )  # fmt: skip

    def step(cache, token, count):
        np.testing.assert_array_equal(count.shape, (2,))
        return model.step(cache, token, None, count)

    guesses, cache = draft(step, strategy, processor, K)(state, jnp.asarray(wanted[:, :1]))
    np.testing.assert_array_equal(guesses, wanted[:, 1 : 1 + K])
    for token in wanted[:, : 1 + K].T:  # all that it guessed, it has read
        _, start = model.step(start, jnp.asarray(token), None, 0)
    np.testing.assert_allclose(cache[:, 0], start, atol=1e-6)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(0, 11))
@settings(max_examples=60, deadline=None)
def test_look_up_finds_the_longest_and_latest_match(text, split):
    split = min(split, len(text) - 1)
    places = []
    for at in range(1, len(text)):
        alike = 0
        while alike < min(3, at) and text[at - 1 - alike] == text[len(text) - 1 - alike]:
            alike += 1
        places.append((alike, at))
    alike, at = max(places, default=(0, 0))
    prompt = np.full((1, 12), 9, np.int32)
    prompt[0, :split] = text[:split]
    tokens = np.full((1, 12), 9, np.int32)
    tokens[0, : len(text) - split] = text[split:]
    guess = lookup(jnp.asarray(prompt), jnp.array([split]), 3)
    before = len(text) - split - 1  # the last token is about to be written
    state: Any = SimpleNamespace(
        tokens=jnp.asarray(tokens)[:, None], length=jnp.array([[before]]), cache=None
    )
    found = np.asarray(guess(state, jnp.array([text[-1:]]))[0])[0].tolist()
    if alike:  # what follows there and, if it reaches the end, the same again
        assert found == [text[at + i % (len(text) - at)] for i in range(3)]
