"""Beam sampling: its exact distribution, enumerated, and what is left when nothing is random."""

from collections import Counter, defaultdict
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from toy_decoder import EOS, hypotheses, lengthen, run, toy

from jaxformer.decoding.beam_sample import beam_sample
from jaxformer.decoding.loop import Finish
from jaxformer.decoding.processors import ban, chain, temperature, top_k
from jaxformer.decoding.strategies import beam

pytestmark = pytest.mark.slow  # many random models, against a plain reference

seeds = st.integers(0, 2**32 - 1)


@cache
def compiled(width, length=7, chunk=8):
    def decode(model, t, k, limit, mask, keys):
        return model.decode(
            beam_sample(beam(width, 0.6)),
            chain(ban(mask), temperature(t), top_k(k)),
            length=length,
            limit=limit,
            keys=keys,
            chunk=chunk,
        )

    return jax.jit(decode)


def draw(model, width, t=1.0, k=0, limit=7, mask=None, keys=None, **options):
    rows = len(model.start)
    limit = np.broadcast_to(np.int32(limit), rows)
    mask = np.zeros(model.out.shape[1], bool) if mask is None else mask
    keys = jax.random.split(jax.random.key(0), rows) if keys is None else keys
    return compiled(width, **options)(model, np.float32(t), np.int32(k), limit, mask, keys)


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


def without_replacement(weights, n):
    """The probability of each set of `n` indices, drawn one after the other."""
    sets = {frozenset(): 1.0}
    for _ in range(n):
        grown = defaultdict(float)
        for taken, p in sets.items():
            left = [i for i in range(len(weights)) if i not in taken]
            total = sum(weights[i] for i in left)
            for i in left:
                grown[taken | {i}] += p * weights[i] / total
        sets = grown
    return sets


def outcomes(model, width, length):
    """The probability of each final pool: the tokens of its hypotheses, best first."""
    states = {(((0.0, ()),), ()): 1.0}  # (live, pool), each (score, tokens) in falling order
    for t in range(length):
        following = defaultdict(float)
        for (live, pool), p in states.items():
            scored = [
                (score + step, (*tokens, token))
                for score, tokens in live
                for token, step in enumerate(model.next(0, tokens))
            ]
            if not scored:
                following[live, pool] += p
                continue
            weights = np.exp([score for score, _ in scored])
            for drawn, q in without_replacement(weights, min(2 * width, len(scored))).items():
                best = sorted((scored[i] for i in drawn), reverse=True)
                ends = [tokens[-1] == EOS or t + 1 == length for _, tokens in best]
                ended = [
                    (score / lengthen(t + 1, 0.6, "wu"), tokens)
                    for (score, tokens), end in zip(best[:width], ends[:width], strict=True)
                    if end
                ]
                rest = tuple(h for h, end in zip(best, ends, strict=True) if not end)[:width]
                finished = tuple(sorted([*pool, *ended], reverse=True)[:width])
                following[rest, finished] += p * q
        states = following
    found = defaultdict(float)
    for (_, pool), p in states.items():
        found[tuple(tokens for _, tokens in pool)] += p
    return found


@pytest.mark.parametrize("length", [1, 2])
def test_pools_follow_the_exact_probabilities(length):
    rows = 4000
    model = toy(8, rows=1, vocabulary=6, eos=-0.5)
    many = model._replace(start=np.repeat(model.start, rows, 0))
    decoded = draw(many, 2, limit=length, length=2)
    counts = Counter(tuple(h[0] for h in hypotheses(decoded, row)) for row in range(rows))
    wanted = outcomes(model, 2, length)
    assert counts.keys() <= wanted.keys() and len(wanted) > 2
    pairs = [(counts[pool], p * rows) for pool, p in wanted.items()]
    common = [pair for pair in pairs if pair[1] > 5]  # the chi-square needs a few in each cell
    rare = np.sum([pair for pair in pairs if pair[1] <= 5], 0).reshape(-1, 2).tolist()
    observed, expected = np.array([*common, *rare]).T
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@given(seeds, st.sampled_from([-1.0, 0.0, 2.0]))
@settings(max_examples=15, deadline=None)
def test_a_beam_of_one_is_a_sample(seed, eos):
    model = toy(seed, eos=eos)
    found, wanted = draw(model, 1), run(model, "sample", 1)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.log_prob, wanted.log_prob, rtol=1e-5)


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_hypotheses_are_unique_ranked_and_scored_by_the_model(seed):
    for width in (3, 9):  # also with more beams than tokens
        decoded = draw(toy(seed), width)
        for row in range(2):
            found = hypotheses(decoded, row)
            assert len({h[0] for h in found}) == width
            assert [h[1] for h in found] == sorted((h[1] for h in found), reverse=True)
            for tokens, score, log_prob, _ in found:
                again = toy(seed).log_prob(row, tokens)
                np.testing.assert_allclose(log_prob, again, rtol=1e-4, atol=1e-4)
                penalty = lengthen(len(tokens), 0.6, "wu")
                np.testing.assert_allclose(score, again / penalty, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(t=0.0), dict(k=1)])
def test_with_one_token_left_nothing_is_random(options):
    model = toy(2)
    keys = jax.random.split(jax.random.key(9), 2)
    first, other = draw(model, 3, **options), draw(model, 3, keys=keys, **options)
    assert_equal(first, other)
    greedy = run(model, "greedy")
    np.testing.assert_array_equal(first.tokens[:, 0], greedy.tokens[:, 0])
    assert (first.finish[:, 1:] == Finish.DEAD_END).all()
    assert (draw(model, 3).tokens != draw(model, 3, keys=keys).tokens).any()


def test_drawing_everything_is_beam_search():
    """As many continuations are drawn as a beam of nine has in all."""
    model = toy(4)
    assert_equal(draw(model, 27, limit=2), run(model, "beam", 27, limit=2))


def test_rows_do_not_depend_on_their_batch_nor_on_the_chunk():
    model, limit = toy(5, rows=4), np.array([7, 2, 5, 0])
    keys = jax.random.split(jax.random.key(1), 4)
    together = draw(model, 3, limit=limit, keys=keys)
    order = np.array([2, 3, 0, 1])
    moved = model._replace(start=model.start[order])
    moved = draw(moved, 3, limit=limit[order], keys=keys[order])
    assert_equal(moved, jax.tree.map(lambda x: x[order], together))
    assert_equal(draw(model, 3, limit=limit, keys=keys, chunk=4), together)
    alone = model._replace(start=model.start[2:3])
    alone = draw(alone, 3, limit=limit[2:3], keys=keys[2:3])
    assert_equal(alone, jax.tree.map(lambda x: x[2:3], together))
    assert hypotheses(together, 3)[0] == ((), 0.0, 0.0, Finish.LIMIT)


def test_every_token_banned_is_a_dead_end():
    decoded = draw(toy(0), 3, mask=np.ones(5, bool))
    assert (decoded.finish == Finish.DEAD_END).all() and (decoded.length == 0).all()
    assert np.isfinite(decoded.score).all()
