"""What the table of an automaton accepts, within the room there is, is all that comes out."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoder import EOS, hypotheses, lengthen, sequences, strategy_named, toy

from jaxformer.decoding.constraints import Table, constrained, stopping
from jaxformer.decoding.loop import Finish
from jaxformer.decoding.processors import chain, forced
from jaxformer.decoding.strategies import beam

STATES, LENGTH = 5, 4


def random_table(seed: int, vocabulary: int) -> Table:
    """Few arrows, so that there are dead ends; the last state is the end."""
    rng = np.random.default_rng(seed)
    following = rng.integers(-2, STATES - 1, (STATES, vocabulary)).clip(-1)
    following[:, EOS] = np.where(rng.random(STATES) < 0.4, STATES - 1, -1)
    following[-1] = -1
    ends = following[:, EOS] >= 0
    need = np.where(ends, 0, 99)
    need[-1] = -1
    for _ in range(STATES):
        after = np.where(following >= 0, need[following], 99)
        need[:-1] = np.minimum(need, 1 + after.min(1))[:-1]
    classes, class_of = np.unique(following, axis=1, return_inverse=True)
    padded = np.full((8, 8), -1)
    padded[:STATES, : classes.shape[1]] = classes
    return Table(padded, class_of.reshape(-1), np.pad(need, (0, 3), constant_values=99))


def accepted(table: Table, tokens: tuple[int, ...]) -> bool:
    state = 0
    for token in tokens:
        state = table.following[state, table.class_of[token]] if state >= 0 else -1
    return state >= 0 and table.need[state] <= 0


@cache
def compiled(name: str, width: int):
    def decode(model, table, limit, alpha):
        table = Table(*map(jnp.asarray, table))
        strategy = strategy_named(name, width, alpha)
        return model.decode(strategy, constrained(table, limit), length=LENGTH, limit=limit)

    return jax.jit(decode)


@pytest.mark.parametrize(("name", "width"), [("greedy", 1), ("sample", 4), ("beam", 3)])
@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(1, LENGTH), st.integers(1, LENGTH)))
@settings(max_examples=60, deadline=None)
def test_what_comes_out_is_accepted_or_cannot_be(name, width, seed, limit):
    model, table = toy(seed), random_table(seed, 5)
    decoded = compiled(name, width)(model, table, np.array(limit, np.int32), 0.6)
    for row in range(2):
        possible = any(accepted(table, s) for s in sequences(5, limit[row]))
        for i, (tokens, score, log_prob, finish) in enumerate(hypotheses(decoded, row)):
            assert np.isfinite([score, log_prob]).all()
            if finish == Finish.DEAD_END:
                assert tokens == ()
                assert not possible or (name == "beam" and i)  # fewer than its beams
            else:
                assert accepted(table, tokens) and len(tokens) <= limit[row]
                assert (tokens[-1] == EOS) == (finish == Finish.EOS)


@pytest.mark.parametrize("shared", [False, True])
@given(st.integers(0, 2**32 - 1), st.sampled_from([-1.0, 0.0, 0.6, 2.0]))
@settings(max_examples=40, deadline=None)
def test_a_wide_beam_is_brute_force_over_what_is_accepted(shared, seed, alpha):
    model, table = toy(seed, vocabulary=4), random_table(seed, 4)
    limits = np.array([LENGTH, 3], np.int32)
    decoded = (banked(108) if shared else compiled("beam", 108))(model, table, limits, alpha)
    for row, limit in enumerate((LENGTH, 3)):
        ranked = sorted(
            (model.log_prob(row, tokens) / lengthen(len(tokens), alpha, "wu"), tokens)
            for tokens in sequences(4, limit)
            if accepted(table, tokens)
        )[::-1]
        found = [h for h in hypotheses(decoded, row) if h[3] != Finish.DEAD_END]
        assert {h[0] for h in found} == {tokens for _, tokens in ranked}
        np.testing.assert_allclose(
            [h[1] for h in found], [score for score, _ in ranked], rtol=1e-4, atol=1e-4
        )


def shared_out(model, table, row, width, length, alpha):
    """Beam search on lists, its beams shared out among banks: (score, tokens) of the pool."""

    def need_of(tokens):
        state = 0
        for token in tokens:
            state = table.following[state, table.class_of[token]]
        return max(table.need[state], 0) if state >= 0 else None

    def rank(found):
        """The likeliest first, and with its place in its bank."""
        found = sorted(found, key=lambda each: -each[0])
        places = [
            sum(need_of(b[1]) == need_of(each[1]) for b in found[:i])
            for i, each in enumerate(found)
        ]
        return list(zip(places, found, strict=True))

    live, pool = [(0.0, ())], []
    for t in range(length):
        scored = []
        for score, tokens in live:
            kinds = {}
            for token, step in enumerate(model.next(row, tokens)):
                after = (*tokens, token)
                need = need_of(after)
                if need is not None and need <= length - t - 1:
                    kind = "end" if token == EOS else need < need_of(tokens)
                    kinds.setdefault(kind, []).append((score + step, after))
            for kind in kinds.values():  # no more than this of each
                scored += sorted(kind, reverse=True)[:width]
        pool += [
            (score / lengthen(t + 1, alpha, "wu"), tokens)
            for place, (score, tokens) in rank(scored)
            if place < width and (tokens[-1] == EOS or t + 1 == length)
        ]
        pool = sorted(pool, reverse=True)[:width]
        going = rank([each for each in scored if each[1][-1] != EOS])
        others = sorted(going[1:], key=lambda each: (each[0], need_of(each[1][1])))
        live = [each for _, each in going[:1] + others][:width]
    return pool


@cache
def banked(width: int):
    def decode(model, table, limit, alpha):
        processor = constrained(Table(*map(jnp.asarray, table)), limit)
        processor = forced(0, -1, chain(processor))  # no token is number -1
        strategy = beam(width, alpha, needs=processor.needs)
        return model.decode(strategy, processor, length=LENGTH + 2, limit=limit)

    return jax.jit(decode)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.6, 2.0]), st.sampled_from([2, 3, 5]))
@settings(max_examples=60, deadline=None)
def test_beams_are_shared_out_among_those_that_need_more_and_less(seed, alpha, width):
    model, table = toy(seed), random_table(seed, 5)
    limit = np.full(2, LENGTH + 2, np.int32)
    decoded = banked(width)(model, table, limit, alpha)
    for row in range(2):
        wanted = shared_out(model, table, row, width, LENGTH + 2, alpha)
        found = [h for h in hypotheses(decoded, row) if h[3] != Finish.DEAD_END]
        np.testing.assert_allclose(
            [h[1] for h in found], [score for score, _ in wanted], rtol=1e-4, atol=1e-4
        )


def test_a_phrase_stands_where_it_costs_least():
    """And not where the room ends, as it does when only the likeliest hypotheses live."""
    model = toy(3)
    model.out[:] = 0  # tokens are equally likely, but for the phrase's, which is not, and the end's
    model.out[0] = [0, 1, 0, 0, -2]
    following = np.array([[0, -1, 0, 0, 1], [1, 2, 1, 1, 1], [-1] * 5])
    table = Table(following, np.arange(5), np.array([1, 0, -1]))
    limit = np.full(2, LENGTH + 2, np.int32)
    shared = banked(2)(model, table, limit, 0.0)
    limit = jnp.asarray(limit)
    alone = model.decode(beam(2, 0.0), constrained(table, limit), length=LENGTH + 2, limit=limit)
    for row in range(2):
        [best, *_], [late, *_] = hypotheses(shared, row), hypotheses(alone, row)
        assert best[0][-2:] == (4, EOS) and len(best[0]) < LENGTH and best[1] > late[1]
        assert late[0][-1] == 4 and len(late[0]) == LENGTH + 2


def test_another_table_of_the_same_size_compiles_nothing():
    for seed in range(5):
        compiled("greedy", 1)(toy(seed), random_table(seed, 5), np.full(2, 4, np.int32), 0.6)
    assert compiled("greedy", 1)._cache_size() == 1


def test_a_token_that_the_table_of_stops_does_not_know_changes_nothing():
    """Nor does it end a text: it cannot be forbidden."""
    following = np.array([[-1, 1, 0], [-1, 1, 2], [-1, 2, 2]])  # class 1, then class 2
    processor = stopping(Table(following, np.array([0, 1, 2]), np.array([2, 1, 0])))
    state = processor.init(1, 1)
    for token, ends in ((0, False), (2, False), (1, False), (0, False), (2, True)):
        each = jnp.array([[token]])
        assert bool(processor.ends(state, each)[0, 0]) == ends
        every = processor.ends(state, jnp.arange(3)[None, None])  # of all tokens at once
        assert bool(every[0, 0, token]) == ends
        state = processor.update(state, each)
