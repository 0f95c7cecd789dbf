"""Contrastive search against greedy, and against the paper's rule with every forward pass anew."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoder import EOS, PAD, automaton, hypotheses, run, toy

from jaxformer.decoding.contrastive import contrastive
from jaxformer.decoding.loop import Finish
from jaxformer.decoding.processors import ban, chain

pytestmark = pytest.mark.slow  # many random models, against a plain reference

seeds = st.integers(0, 2**32 - 1)
PROMPT = 3
NOTHING = np.zeros(5, bool)
ANYTHING = np.zeros((4, 5), np.int32)


def prompts(seed, rows=2):
    """Hidden states before the prompt's end, and where the (ragged) prompts have tokens."""
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(rows, PROMPT, 6)).astype(np.float32)
    before[..., 0] += 2.0  # as the toy's own: most cosines are positive
    return before, np.arange(PROMPT) < rng.integers(0, PROMPT + 1, (rows, 1))


@cache
def compiled(k, chunk=8, step=None):
    def decode(model, prompt, alpha, limit, mask, table):
        before, there = prompt
        last = jnp.asarray(model.start)[:, None]
        strategy = contrastive(
            k,
            alpha,
            lambda cache: cache,
            jnp.concatenate([before, last], 1),
            jnp.concatenate([there, jnp.ones_like(there[:, :1])], 1),
        )
        processor = chain(ban(mask), automaton(table))
        return model.decode(strategy, processor, limit=limit, chunk=chunk, step=step or model.step)

    return jax.jit(decode)


def contrast(model, prompt, k, alpha=0.6, limit=7, mask=NOTHING, table=ANYTHING, **options):
    limit = np.broadcast_to(np.int32(limit), len(model.start))
    return compiled(k, **options)(model, prompt, np.float32(alpha), limit, mask, table)


def reference(model, prompt, row, k, alpha, length=7, mask=NOTHING):
    """The text, and how narrowly its closest choice was made."""

    def states(tokens):
        hidden = [model.start[row].astype(np.float64)]
        for token in tokens:
            hidden.append(np.tanh(hidden[-1] @ model.mix + model.embed[token]))
        return hidden

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    before, there = prompt
    tokens, margin = [], np.inf
    while len(tokens) < length and EOS not in tokens:
        probability = np.where(mask, 0.0, np.exp(model.next(row, tokens)))
        probability /= probability.sum()
        candidates = [v for v in np.argsort(-probability, kind="stable")[:k] if not mask[v]]
        values = []
        for v in candidates:
            *past, new = states([*tokens, v])
            past = [*before[row][there[row]], *past]
            likeness = max(cosine(new, old) for old in past)
            values.append((1 - alpha) * probability[v] - alpha * likeness)
        best, *others = sorted(values, reverse=True)
        margin = min([margin, *(best - other for other in others)])
        tokens.append(int(candidates[int(np.argmax(values))]))
    return tuple(tokens), margin


@pytest.mark.parametrize("k", [2, 3, 5])
@given(seeds, st.sampled_from([0.2, 0.6, 1.0]), st.sampled_from([-1.0, 0.0, 1.0]))
@settings(max_examples=20, deadline=None)
def test_what_the_paper_chooses(k, seed, alpha, eos):
    model, prompt = toy(seed, eos=eos), prompts(seed)
    decoded = contrast(model, prompt, k, alpha)
    assert decoded.tokens.shape == (2, 1, 7)
    for row in range(2):
        wanted, margin = reference(model, prompt, row, k, alpha)
        [(tokens, score, log_prob, finish)] = hypotheses(decoded, row)
        if margin > 1e-5:  # else decided by rounding
            assert tokens == wanted
            assert finish == (Finish.EOS if EOS in wanted else Finish.LIMIT)
            assert (np.asarray(decoded.tokens)[row, 0, len(wanted) :] == PAD).all()
        assert score == log_prob
        np.testing.assert_allclose(log_prob, model.log_prob(row, tokens), rtol=1e-4, atol=1e-4)


def test_it_chooses_what_greedy_does_not():
    differ = 0
    for seed in range(10):
        model, prompt = toy(seed), prompts(seed)
        found, greedy = contrast(model, prompt, 3), run(model, "greedy")
        differ += hypotheses(found, 0)[0][0] != hypotheses(greedy, 0)[0][0]
    assert differ > 3


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.6), (3, 0.0)])
@given(seeds, st.sampled_from([-1.0, 0.0, 2.0]))
@settings(max_examples=15, deadline=None)
def test_one_candidate_or_no_penalty_is_greedy(k, alpha, seed, eos):
    model = toy(seed, eos=eos)
    found, greedy = contrast(model, prompts(seed), k, alpha), run(model, "greedy")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, greedy)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_forbidden_tokens_are_no_candidates(seed):
    """Also when fewer than k are left."""
    model, prompt, mask = toy(seed), prompts(seed), np.arange(5) < 3
    mask[EOS] = False
    decoded = contrast(model, prompt, 4, mask=mask)
    for row in range(2):
        wanted, margin = reference(model, prompt, row, 4, 0.6, mask=mask)
        if margin > 1e-5:
            assert hypotheses(decoded, row)[0][0] == wanted


def test_dead_ends():
    model, prompt = toy(0), prompts(0)
    decoded = contrast(model, prompt, 3, mask=np.ones(5, bool))
    assert (decoded.finish == Finish.DEAD_END).all() and (decoded.length == 0).all()
    table = np.full((4, 5), -1, np.int32)
    table[0, 2] = 1  # 2, and then nothing
    [(tokens, _, log_prob, finish)] = hypotheses(contrast(model, prompt, 3, table=table), 1)
    assert tokens == (2,) and finish == Finish.DEAD_END
    np.testing.assert_allclose(log_prob, model.log_prob(1, (2,)), rtol=1e-5)


def test_rows_do_not_depend_on_their_batch_nor_on_the_chunk():
    model, limit = toy(7, rows=4, eos=-1.0), np.array([7, 2, 5, 0])
    before, there = prompts(7, rows=4)

    def rows(at, **options):
        part = model._replace(start=model.start[at])
        return contrast(part, (before[at], there[at]), 3, limit=limit[at], **options)

    def assert_equal(a, b):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)

    every, order = np.arange(4), np.array([2, 3, 0, 1])
    together = rows(every)
    assert_equal(rows(order), jax.tree.map(lambda x: x[order], together))
    assert_equal(rows(every, chunk=4), together)
    assert_equal(rows(every[2:3]), jax.tree.map(lambda x: x[2:3], together))
    assert hypotheses(together, 3)[0] == ((), 0.0, 0.0, Finish.LIMIT)
    # A limit cuts the text short, and changes nothing before.
    free = contrast(model, (before, there), 3)
    assert hypotheses(together, 2)[0][0] == hypotheses(free, 2)[0][0][:5]


def test_no_token_takes_a_second_pass_and_numbers_never_recompile():
    model, prompt, steps = toy(0, eos=-20.0), prompts(0), []

    def counted(cache, tokens, parent, t):
        jax.debug.callback(lambda t: steps.append(int(t[0])), t)
        return model.step(cache, tokens, parent, t)

    for alpha, limit in ((0.6, 7), (0.1, 6), (1.0, 5)):
        jax.block_until_ready(contrast(model, prompt, 3, alpha, limit, step=counted))
    jax.effects_barrier()
    assert sorted(steps) == sorted(list(range(7)) * 3)  # one chunk of seven each
    assert compiled(3, step=counted)._cache_size() == 1
