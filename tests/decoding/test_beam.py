"""Beam search against greedy, brute force, and a plain search that never stops early."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoder import EOS, hypotheses, lengthen, run, sequences, toy

from jaxformer.decoding.loop import Finish
from jaxformer.decoding.processors import chain
from jaxformer.decoding.strategies import beam

seeds = st.integers(0, 2**32 - 1)
alphas = st.sampled_from([-2.0, -0.5, 0.0, 0.6, 1.0, 3.0])
norms = pytest.mark.parametrize("norm", ["wu", "plain"])


def search(model, row, width, length, alpha, norm, ends_it=lambda tokens: tokens[-1] == EOS):
    """Beam search on lists, to the full length: (score, tokens) of the pool, best first.

    Only what is among the `width` best of a step may end; an end below them is dropped.
    """
    live, pool = [(0.0, ())], []
    for t in range(length):
        scored = [
            (score + step, (*tokens, token))
            for score, tokens in live
            for token, step in enumerate(model.next(row, tokens))
        ]
        scored = sorted(scored, reverse=True)
        ends = [ends_it(tokens) or t + 1 == length for _, tokens in scored]
        pool += [
            (score / lengthen(t + 1, alpha, norm), tokens)
            for (score, tokens), end in zip(scored[:width], ends[:width], strict=True)
            if end
        ]
        pool = sorted(pool, reverse=True)[:width]
        live = [hypothesis for hypothesis, end in zip(scored, ends, strict=True) if not end][:width]
    return pool


@norms
@given(seeds, alphas, st.sampled_from([-1.0, 0.0, 2.0]))
@settings(max_examples=25, deadline=None)
def test_a_beam_of_one_is_greedy(norm, seed, alpha, eos):
    model = toy(seed, eos=eos)
    found, greedy = run(model, "beam", 1, norm, alpha=alpha), run(model, "greedy")
    for row in range(2):
        [(tokens, _, log_prob, finish)] = hypotheses(found, row)
        [(wanted, _, wanted_log_prob, wanted_finish)] = hypotheses(greedy, row)
        assert (tokens, finish) == (wanted, wanted_finish)
        np.testing.assert_allclose(log_prob, wanted_log_prob, rtol=1e-5)


@norms
@given(seeds, alphas)
@settings(max_examples=20, deadline=None)
def test_a_wide_beam_is_brute_force(norm, seed, alpha):
    model = toy(seed, vocabulary=4, eos=0.5)
    # 27 prefixes are alive at the last step, and each has 4 ends.
    decoded = run(model, "beam", 108, norm, 4, alpha=alpha)
    for row in range(2):
        ranked = sorted(
            (model.log_prob(row, tokens) / lengthen(len(tokens), alpha, norm), tokens)
            for tokens in sequences(4, 4)
        )[::-1][:108]
        found = hypotheses(decoded, row)
        np.testing.assert_allclose(
            [h[1] for h in found], [score for score, _ in ranked], rtol=1e-4, atol=1e-4
        )
        if ranked[0][0] - ranked[1][0] > 1e-3:
            assert found[0][0] == ranked[0][1]


@pytest.mark.parametrize(("norm", "width"), [("wu", 3), ("plain", 3), ("plain", 2)])
@given(seeds, alphas, st.sampled_from([-1.0, 0.0, 1.0]))
@settings(max_examples=20, deadline=None)
def test_stopping_early_is_exact(norm, width, seed, alpha, eos):
    model = toy(seed, eos=eos)
    decoded = run(model, "beam", width, norm, alpha=alpha)
    for row in range(2):
        wanted = search(model, row, width, 7, alpha, norm)
        found = hypotheses(decoded, row)
        np.testing.assert_allclose(
            [h[1] for h in found], [score for score, _ in wanted], rtol=1e-4, atol=1e-4
        )
        for tokens, score, log_prob, _ in found:
            again = model.log_prob(row, tokens)
            np.testing.assert_allclose(log_prob, again, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                score, again / lengthen(len(tokens), alpha, norm), rtol=1e-4, atol=1e-4
            )


@given(seeds, alphas)
@settings(max_examples=20, deadline=None)
def test_any_number_of_tokens_may_end_a_hypothesis(seed, alpha):
    """As long as one that does not is left, the search goes on with it."""
    model, width = toy(seed, vocabulary=7), 2

    def ends_it(tokens):
        return tokens[-1] != 2

    decoded = TO_TWO(model, alpha)
    for row in range(2):
        wanted = search(model, row, width, 7, alpha, "wu", ends_it)
        np.testing.assert_allclose(
            [h[1] for h in hypotheses(decoded, row)], [score for score, _ in wanted],
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_hypotheses_of_many_ends_are_ranked_like_others():
    """A processor that ends nothing leaves the search as it is without it."""
    model = toy(1)
    plain, many = run(model, "beam", 3), jax.jit(partial(any_ends, 3, ()))(model, 0.6)
    for a, b in zip(plain, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def any_ends(width, ends, model, alpha):
    """Search where these tokens end a hypothesis too."""
    processor = chain()._replace(ends=lambda state, token: jnp.isin(token, jnp.array(ends, int)))
    return model.decode(beam(width, alpha, many_ends=True), processor)


TO_TWO = jax.jit(partial(any_ends, 2, (0, 3, 4, 5, 6)))


@given(seeds, alphas)
@settings(max_examples=20, deadline=None)
def test_hypotheses_are_unique_and_finite(seed, alpha):
    """Also with more beams than tokens."""
    for width in (3, 9):
        decoded = run(toy(seed), "beam", width, alpha=alpha)
        for row in range(2):
            found = hypotheses(decoded, row)
            assert len({h[0] for h in found}) == width
            assert np.isfinite([h[1:3] for h in found]).all()
            assert Finish.DEAD_END not in [h[3] for h in found]


def test_more_beams_than_hypotheses():
    """Five sequences of at most one token exist: the surplus beams are empty dead ends."""
    found = hypotheses(run(toy(0), "beam", 9, limit=1), 0)
    assert {h[0] for h in found[:5]} == {(token,) for token in range(5)}
    assert sorted(h[3] for h in found[:5]) == [Finish.EOS] + [Finish.LIMIT] * 4
    for tokens, score, log_prob, finish in found[5:]:
        assert tokens == () and finish == Finish.DEAD_END
        assert np.isfinite([score, log_prob]).all() and score < -1e30


def test_a_banned_token_keeps_its_probability():
    """A forbidden token only narrows the search: what is found scores as it would without."""
    model, mask = toy(4), np.arange(5) == 2
    decoded = run(model, "beam", 9, length=3, alpha=0.0, mask=mask)  # 9 live prefixes
    for row in range(2):
        allowed = [tokens for tokens in sequences(5, 3) if 2 not in tokens]
        best = max(model.log_prob(row, tokens) for tokens in allowed)
        np.testing.assert_allclose(hypotheses(decoded, row)[0][1], best, rtol=1e-4)


@pytest.mark.parametrize("alpha", [-100.0, 100.0])
@norms
def test_an_absurd_exponent_stays_finite(alpha, norm):
    decoded = run(toy(0), "beam", 3, norm, alpha=alpha)
    assert np.isfinite(decoded.score).all() and (np.diff(decoded.score, axis=1) <= 0).all()
    assert (decoded.finish != Finish.DEAD_END).all()


def test_equal_logits_take_the_lowest_ids():
    model = toy(0)
    level = model._replace(out=np.zeros_like(model.out))
    for name in ("greedy", "beam"):
        assert (run(level, name, limit=3).tokens[..., :3] == 0).all()
