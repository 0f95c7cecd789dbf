"""Diverse beam search against beam search, and against the paper's algorithm on lists."""

from collections import Counter
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoder import EOS, hypotheses, lengthen, run, toy

from jaxformer.decoding.diverse import diverse
from jaxformer.decoding.loop import Finish
from jaxformer.decoding.processors import ban
from jaxformer.decoding.strategies import beam

pytestmark = pytest.mark.slow  # many random models, against a plain reference

seeds = st.integers(0, 2**32 - 1)
alphas = st.sampled_from([-0.5, 0.0, 0.6, 3.0])


def search(model, row, groups, size, length, alpha, diversity):
    """(score, tokens) of every group's pool, best first: Algorithm 1 of the paper, where each
    group is a beam search that ends when no live hypothesis can enter its pool any more."""
    live, pools = [[(0.0, ())] for _ in range(groups)], [[] for _ in range(groups)]
    for t in range(length):
        chosen = Counter()
        for g in range(groups):
            scored = [
                (score + step - diversity * chosen[token], (*tokens, token))
                for score, tokens in live[g]
                for token, step in enumerate(model.next(row, tokens))
            ]
            scored = sorted(scored, reverse=True)[: 2 * size if size > 1 else 1]
            ends = [tokens[-1] == EOS or t + 1 == length for _, tokens in scored]
            pools[g] += [
                (score / lengthen(t + 1, alpha, "wu"), tokens)
                for (score, tokens), end in zip(scored[:size], ends[:size], strict=True)
                if end
            ]
            pools[g] = sorted(pools[g], reverse=True)[:size]
            live[g] = [h for h in scored if h[1][-1] != EOS][:size]
            chosen.update(tokens[-1] for _, tokens in live[g])
            if live[g] and len(pools[g]) == size and t + 1 < length:
                later = range(t + 1, length + 1)
                best = max(live[g][0][0] / lengthen(n, alpha, "wu") for n in later)
                live[g] = live[g] if best > pools[g][-1][0] else []
    return sorted(sum(pools, []), reverse=True)


@cache
def compiled(groups, size, length=7, chunk=8):
    def decode(model, alpha, diversity, limit, mask):
        strategy = diverse(beam(size, alpha), groups, diversity)
        return model.decode(strategy, ban(mask), length=length, limit=limit, chunk=chunk)

    return jax.jit(decode)


def diversely(model, groups, size, alpha=0.6, diversity=0.5, limit=7, mask=None, **options):
    limit = np.broadcast_to(np.int32(limit), len(model.start))
    mask = np.zeros(model.out.shape[1], bool) if mask is None else mask
    function = compiled(groups, size, **options)
    return function(model, np.float32(alpha), np.float32(diversity), limit, mask)


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


@given(seeds, alphas, st.sampled_from([-1.0, 0.0, 2.0]), st.floats(0.0, 3.0))
@settings(max_examples=15, deadline=None)
def test_one_group_is_beam_search(seed, alpha, eos, diversity):
    model = toy(seed, eos=eos)
    assert_equal(diversely(model, 1, 3, alpha, diversity), run(model, "beam", 3, alpha=alpha))


@given(seeds, alphas)
@settings(max_examples=10, deadline=None)
def test_without_diversity_every_group_finds_the_same(seed, alpha):
    model = toy(seed)
    found, wanted = diversely(model, 2, 2, alpha, 0.0), run(model, "beam", 2, alpha=alpha)
    assert_equal(found, jax.tree.map(lambda x: np.repeat(x, 2, 1), wanted))


@pytest.mark.parametrize(("groups", "size"), [(2, 2), (3, 1), (2, 3)])
@given(seeds, alphas, st.sampled_from([-1.0, 0.0, 1.0]), st.sampled_from([0.2, 0.7, 5.0]))
@settings(max_examples=20, deadline=None)
def test_what_the_paper_finds(groups, size, seed, alpha, eos, diversity):
    model = toy(seed, eos=eos)
    decoded = diversely(model, groups, size, alpha, diversity)
    for row in range(2):
        wanted = search(model, row, groups, size, 7, alpha, diversity)
        found = hypotheses(decoded, row)
        real = [h for h in found if h[3] != Finish.DEAD_END]
        assert real == found[: len(real)]
        np.testing.assert_allclose(
            [h[1] for h in real], [score for score, _ in wanted], rtol=1e-4, atol=1e-4
        )
        assert Counter(h[0] for h in real) == Counter(tokens for _, tokens in wanted)
        for tokens, _, log_prob, _ in real:  # of the model, not of what the groups took from it
            np.testing.assert_allclose(log_prob, model.log_prob(row, tokens), rtol=1e-4, atol=1e-4)


def test_groups_differ_more_with_more_diversity():
    """Among groups of one, a great enough loss lets no two tokens of a step agree."""
    decoded = diversely(toy(3, eos=-20.0), 4, 1, diversity=50.0)
    for tokens in np.asarray(decoded.tokens):
        for column in tokens.T:
            assert len(set(column.tolist())) == 4
    alike = diversely(toy(3, eos=-20.0), 4, 1, diversity=0.0)
    assert (alike.tokens == alike.tokens[:, :1]).all()


def test_rows_do_not_depend_on_their_batch_nor_on_the_chunk():
    model, limit = toy(5, rows=4), np.array([7, 2, 5, 0])
    together = diversely(model, 2, 2, limit=limit)
    order = np.array([2, 3, 0, 1])
    moved = diversely(model._replace(start=model.start[order]), 2, 2, limit=limit[order])
    assert_equal(moved, jax.tree.map(lambda x: x[order], together))
    assert_equal(diversely(model, 2, 2, limit=limit, chunk=4), together)
    alone = diversely(model._replace(start=model.start[2:3]), 2, 2, limit=limit[2:3])
    assert_equal(alone, jax.tree.map(lambda x: x[2:3], together))
    assert (together.length <= limit[:, None]).all()
    assert hypotheses(together, 3)[0] == ((), 0.0, 0.0, Finish.LIMIT)


def test_every_token_banned_is_a_dead_end():
    decoded = diversely(toy(0), 2, 2, mask=np.ones(5, bool))
    assert (decoded.finish == Finish.DEAD_END).all() and (decoded.length == 0).all()
    assert np.isfinite(decoded.score).all()


def test_numbers_never_recompile():
    model = toy(0)
    for alpha, diversity in ((0.1, 0.0), (1.0, 2.0), (-1.0, 0.3)):
        diversely(model, 2, 2, alpha, diversity, length=3)
    assert compiled(2, 2, length=3)._cache_size() == 1
