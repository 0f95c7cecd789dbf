"""Penalties against plain references that read each hypothesis from its start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoder import run, toy

from jaxformer.decoding.loop import gather
from jaxformer.decoding.penalties import (
    bad_words,
    length_decay,
    logit_bias,
    no_repeat_ngram,
    no_repeat_source_ngram,
    presence_frequency,
    repetition,
)
from jaxformer.decoding.processors import chain
from jaxformer.decoding.strategies import beam

V, LENGTH, WIDTH = 5, 6, 2
ids = st.integers(0, V - 1)
histories = st.lists(st.lists(ids, min_size=1, max_size=4), min_size=2, max_size=2)
generated = st.lists(
    st.lists(st.tuples(ids, st.integers(0, WIDTH - 1)), min_size=WIDTH, max_size=WIDTH),
    max_size=LENGTH,
)
"""At each step, the token and the parent of each hypothesis (the same in all rows)."""
seeds = st.integers(0, 2**32 - 1)


def padded(rows, left=True):
    """Ragged rows as one array, -1 where there is nothing."""
    size = max(map(len, rows))
    return jnp.array([[-1] * (size - len(r)) + r if left else r + [-1] * (size - len(r))
                      for r in rows])  # fmt: skip


def check(processor, reference, history, steps, seed):
    """The processor after all steps, against `reference(logits, before, generated)` of each."""
    logits = np.random.default_rng(seed).normal(0, 2, (len(history), WIDTH, V)).astype(np.float32)
    logits[0, 0, 0] = -np.inf  # forbidden before
    texts = [[] for _ in range(WIDTH)]
    state = processor.init(len(history), WIDTH)
    for step in steps:
        token, parent = (jnp.array([list(x)] * len(history)) for x in zip(*step, strict=True))
        state = processor.update(gather(state, parent), token)
        texts = [[*texts[parent], token] for token, parent in step]
    found = np.asarray(processor.apply(jnp.array(logits), state))
    for row, before in enumerate(history):
        for w, text in enumerate(texts):
            wanted = reference(logits[row, w].astype(np.float64), row, list(before), text)
            np.testing.assert_allclose(found[row, w], wanted, rtol=1e-5, atol=1e-6)


def forbid(logits, banned):
    return np.where(np.isin(np.arange(V), list(banned)), -np.inf, logits)


def ended(n, text, last):
    """What ends an n-gram of `text` that begins with the end of `last`."""
    if n > 1 and len(last) < n - 1:
        return set()
    begun = last[len(last) - (n - 1) :]
    return {text[i + n - 1] for i in range(len(text) - n + 1) if text[i : i + n - 1] == begun}


@given(histories, generated, seeds, st.sampled_from([0.5, 1.0, 1.7]))
@settings(max_examples=25, deadline=None)
def test_repetition(history, steps, seed, penalty):
    def reference(logits, row, before, text):
        there = np.isin(np.arange(V), before + text)
        return np.where(there, np.where(logits < 0, logits * penalty, logits / penalty), logits)

    check(repetition(penalty, padded(history), V), reference, history, steps, seed)


@given(histories, generated, seeds, st.sampled_from([0.0, 0.5]), st.sampled_from([-0.5, 0.3]))
@settings(max_examples=25, deadline=None)
def test_presence_and_frequency_count_what_was_generated(history, steps, seed, once, each):
    def reference(logits, row, before, text):
        count = np.bincount(text, minlength=V) if text else np.zeros(V)
        return logits - each * count - once * (count > 0)

    check(presence_frequency(once, each, V), reference, history, steps, seed)


@pytest.mark.slow
@given(histories, generated, seeds, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_no_ngram_twice(history, steps, seed, n):
    def reference(logits, row, before, text):
        return forbid(logits, ended(n, before + text, before + text))

    check(no_repeat_ngram(n, padded(history), LENGTH), reference, history, steps, seed)


@pytest.mark.slow
@given(histories, histories, generated, seeds, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_no_ngram_of_the_source(sources, history, steps, seed, n):
    def reference(logits, row, before, text):
        return forbid(logits, ended(n, sources[row], before + text))

    processor = no_repeat_source_ngram(n, padded(sources, left=False), padded(history))
    check(processor, reference, history, steps, seed)


@pytest.mark.slow
@given(
    histories, generated, seeds, st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1,
    max_size=5),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_bad_words_are_never_finished(history, steps, seed, words):
    def reference(logits, row, before, text):
        last = before + text
        banned = {word[-1] for word in words if last[len(last) - len(word) + 1 :] == word[:-1]}
        return forbid(logits, banned)

    check(bad_words(words, padded(history)), reference, history, steps, seed)


def test_words_and_biases_beyond_the_vocabulary_are_nothing():
    logits, history = jnp.zeros((1, 1, V)), jnp.array([[1]])
    for processor in (
        bad_words([[V], [1, V + 1]], history),
        logit_bias(jnp.array([V]), jnp.array([3.0])),
        no_repeat_source_ngram(1, jnp.array([[V, V + 2]]), history),
        repetition(2.0, jnp.array([[V + 1]]), V),
    ):
        np.testing.assert_array_equal(processor.apply(logits, processor.init(1, 1)), logits)


@given(histories, generated, seeds)
@settings(max_examples=20, deadline=None)
def test_bias(history, steps, seed):
    bias = np.array([0.0, -1.5, 0.0, 2.0, 0.0])
    check(
        logit_bias(jnp.array([3, 1]), jnp.array([2.0, -1.5])),
        lambda logits, row, before, text: logits + bias,
        history, steps, seed,
    )  # fmt: skip


@given(histories, generated, seeds, st.sampled_from([0.8, 1.5]), st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_the_end_grows_after_the_start(history, steps, seed, factor, start):
    def reference(logits, row, before, text):
        out = logits.copy()
        for end in (0, 3):
            if len(text) > start and logits[end] > -np.inf:
                out[end] += abs(logits[end]) * (factor ** (len(text) - start) - 1)
        return out

    check(length_decay(factor, start, [0, 3]), reference, history, steps, seed)


def test_a_growth_beyond_all_bounds_is_finite():
    processor = length_decay(1000.0, 0, [1])
    state = processor.init(1, 1) + 500
    assert jnp.isfinite(processor.apply(jnp.full((1, 1, V), -3.0), state)).all()


def test_numbers_never_recompile():
    traces = []

    @jax.jit
    def search(model, penalty, presence, frequency, bias, factor, start, alpha):
        def counted(*arguments):
            traces.append(1)
            return model.step(*arguments)

        parts = chain(
            logit_bias(jnp.array([2]), bias),
            repetition(penalty, jnp.array([[2], [3]]), V),
            presence_frequency(presence, frequency, V),
            length_decay(factor, start, [1]),
        )
        return model.decode(beam(2, alpha, "plain", "heuristic"), parts, step=counted)

    numbers = [1.0, 0.0, 0.0, np.float32([0.0]), 1.0, 0, 1.0]
    first = search(toy(0), *numbers)
    for i, value in enumerate([3.0, 2.0, 2.0, np.float32([5.0]), 2.0]):
        other = search(toy(0), *numbers[:i], value, *numbers[i + 1 :])
        assert (other.score != first.score).any()
    assert len(traces) == 1


@pytest.mark.parametrize("norm", ["wu", "plain"])
@given(seeds, st.sampled_from([-0.5, 0.0, 1.0, 2.0]))
@settings(max_examples=20, deadline=None)
def test_full_stops_first_and_exact_last(norm, seed, alpha):
    """The later a search stops, the better what it has found."""
    model = toy(seed, eos=0.5)
    full, heuristic, exact = (
        run(model, f"beam {stop}", 3, norm, alpha=alpha).score
        for stop in ("full", "heuristic", "exact")
    )
    np.testing.assert_array_equal(exact, run(model, "beam", 3, norm, alpha=alpha).score)
    assert (full <= heuristic + 1e-5).all() and (heuristic <= exact + 1e-5).all()
