"""Processors: what each keeps, and that samples follow the distribution that is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from toy_decoder import EOS, run, toy

from jaxformer.decoding.loop import decode
from jaxformer.decoding.processors import (
    ban,
    ban_at,
    chain,
    epsilon,
    eta,
    forced,
    min_length,
    min_p,
    temperature,
    top_k,
    top_p,
    typical,
)
from jaxformer.decoding.strategies import sample

logits_rows = st.lists(  # few levels, so that ties abound
    st.sampled_from([-np.inf, -3.0, -1.0, 0.0, 0.5, 2.0]), min_size=7, max_size=7
).filter(lambda row: max(row) > -np.inf)


def apply(processor, row):
    logits = jnp.array(row, jnp.float32)[None, None]
    with jax.disable_jit():  # else each processor's condition compiles anew
        return np.asarray(processor.apply(logits, processor.init(1, 1)))[0, 0]


def kept(processor, row):
    """The tokens left, after checking that their logits are untouched."""
    out = apply(processor, row)
    left = out > -np.inf
    np.testing.assert_array_equal(out[left], np.float32(row)[left])
    return set(np.flatnonzero(left).tolist())


def ranking(row):
    """Possible tokens, the most likely first, of equal ones the lowest id."""
    return [i for i in np.argsort(-np.array(row), kind="stable").tolist() if row[i] > -np.inf]


@given(logits_rows, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_top_k_keeps_the_first_k(row, k):
    assert kept(top_k(k), row) == set(ranking(row)[: k or None])


@given(logits_rows, st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_the_fewest_that_reach_p(row, p):
    order = ranking(row)
    exact = np.exp(np.array(row, np.float64)) / np.exp(np.array(row, np.float64)).sum()
    before = np.concatenate([[0.0], np.cumsum(exact[order])[:-1]])
    if np.abs(before - p).min() < 1e-5:
        return  # decided by rounding
    assert kept(top_p(p), row) == {token for token, b in zip(order, before, strict=True) if b < p}


@given(logits_rows, st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_min_p_keeps_what_is_likely_enough(row, p):
    ratio = np.exp(np.array(row) - max(row))
    if np.abs(ratio - p).min() < 1e-5 and p < 1:
        return
    assert kept(min_p(p), row) == {i for i in ranking(row) if ratio[i] >= p}


def distribution(row):
    """Exact probabilities, and their entropy."""
    p = np.exp(np.array(row, np.float64) - max(row))
    p /= p.sum()
    return p, -(p[p > 0] * np.log(p[p > 0])).sum()


@given(logits_rows, st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_typical_keeps_the_nearest_to_the_entropy(row, mass):
    p, entropy = distribution(row)
    tokens = ranking(row)
    distance = {i: abs(-np.log(p[i]) - entropy) for i in tokens}
    levels = sorted({round(d, 4) for d in distance.values()})
    left, reached = set(), 0.0
    for level in levels:  # equally near ones together
        if abs(reached - mass) < 1e-5:
            return  # decided by rounding
        if reached < mass:
            near = {i for i in tokens if abs(distance[i] - level) < 1e-3}
            left |= near
            reached += sum(p[i] for i in near)
    assert kept(typical(mass), row) == left


@given(logits_rows, st.floats(0.01, 0.9))
@settings(max_examples=60, deadline=None)
def test_epsilon_and_eta_keep_what_is_likely_enough(row, least):
    p, entropy = distribution(row)
    for made, floor in (
        (epsilon, least),
        (eta, min(least, np.sqrt(least) * np.exp(-entropy))),
    ):
        if np.abs(p - floor).min() > 1e-5:
            best = {i for i in ranking(row) if row[i] == max(row)}
            assert kept(made(least), row) == best | set(np.flatnonzero(p >= floor).tolist())


@given(logits_rows)
@settings(max_examples=30, deadline=None)
def test_the_neutral_values_keep_everything(row):
    every = set(ranking(row))
    assert kept(chain(top_k(0), top_p(1.0), min_p(0.0)), row) == every
    assert kept(chain(typical(1.0), epsilon(0.0), eta(0.0)), row) == every
    assert kept(chain(), row) == every
    np.testing.assert_allclose(apply(temperature(1.0), row), row, rtol=1e-6)


def test_top_p_of_one_survives_rounding():
    """In float32 a long tail sums to 1 early; nothing may be cut."""
    row = np.linspace(0.0, -40.0, 500)
    assert len(kept(top_p(1.0), row)) == 500
    assert len(kept(top_p(0.99), row)) < 500


@given(logits_rows, st.sampled_from([0.0, 1e-30, 0.3, 1.0, 4.0]))
@settings(max_examples=40, deadline=None)
def test_temperature_sharpens_and_zero_keeps_the_argmax(row, t):
    out = apply(temperature(t), row)
    assert not np.isnan(out).any() and out.argmax() == np.argmax(row)
    if t == 0:
        assert kept(temperature(t), row) == {int(np.argmax(row))}
    elif t >= 0.3:
        np.testing.assert_allclose(
            jax.nn.softmax(out), jax.nn.softmax(jnp.array(row) / t), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "processor",
    [temperature(0.0), temperature(0.5), top_k(2), top_p(0.5), min_p(0.5), min_p(0.0),
     typical(0.5), epsilon(0.1), eta(0.1)],
)  # fmt: skip
def test_a_dead_end_stays_one(processor):
    assert (apply(processor, [-np.inf] * 5) == -np.inf).all()


def test_ban_and_min_length():
    row = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert kept(ban(jnp.arange(7) % 2 == 0), row) == {1, 3, 5}
    processor, logits = min_length(2, [EOS]), jnp.array(row)[None, None]
    state, forbidden = processor.init(1, 1), []
    for _ in range(4):
        forbidden.append(bool(processor.apply(logits, state)[0, 0, EOS] == -jnp.inf))
        state = processor.update(state, jnp.array([[3]]))
    assert forbidden == [True, True, False, False]


def test_forced_is_certain_at_its_place_alone():
    processor = forced(4, jnp.array([0, 2]), ban(jnp.arange(5) == 1))
    logits = jnp.array([0.0, 1.0, 2.0, 3.0, -1.0]) + jnp.zeros((2, 1, 5))
    state, certain = processor.init(2, 1), []
    for _ in range(3):
        processed = processor.apply(logits, state)
        alone = np.isneginf(processed[:, 0, :4]).all(-1)
        others = logits.at[:, :, 1].set(-jnp.inf)
        for row in range(2):
            if alone[row]:  # log-probability 0 under the unprocessed logits
                np.testing.assert_allclose(
                    processed[row, 0, 4], jax.nn.logsumexp(logits[row, 0]), rtol=1e-6
                )
            else:
                np.testing.assert_array_equal(processed[row], others[row])
        certain.append(alone.tolist())
        state = processor.update(state, jnp.array([[3], [3]]))
    assert certain == [[True, False], [False, False], [False, True]]


def test_ban_at_bans_once():
    processor, logits = ban_at(jnp.arange(5) < 2, 1), jnp.zeros((1, 1, 5))
    state, banned = processor.init(1, 1), []
    for _ in range(3):
        banned.append(np.isneginf(processor.apply(logits, state)[0, 0]).tolist())
        state = processor.update(state, jnp.array([[3]]))
    assert banned == [[False] * 5, [True] * 2 + [False] * 3, [False] * 5]


def test_any_end_is_held_back():
    processor = min_length(1, [1, 3])
    processed = processor.apply(jnp.zeros((1, 1, 5)), processor.init(1, 1))
    assert np.isneginf(processed[0, 0]).tolist() == [False, True, False, True, False]


ROW = np.array([1.0, -0.5, 0.8, 0.0, 2.0, -1.5, 1.0], np.float32)
NEUTRAL = dict(mask=np.zeros(7, bool), t=1.0, k=0, p=1.0, floor=0.0, mass=1.0, least=0.0, flat=0.0)


@jax.jit
def draw(mask, t, k, p, floor, mass, least, flat):
    """Two-token samples of a model whose logits never change."""
    rows, n = 500, 8
    logits = jnp.broadcast_to(jnp.array(ROW), (rows, n, len(ROW)))
    return decode(
        lambda cache, tokens, parent, t: (logits, cache),
        logits[:, 0],
        (),
        sample(n),
        chain(
            ban(mask),
            temperature(t),
            top_k(k),
            top_p(p),
            min_p(floor),
            typical(mass),
            epsilon(least),
            eta(flat),
        ),
        length=2,
        limit=jnp.full(rows, 2),
        eos_ids=[-1],
        pad_id=0,
        keys=jax.random.split(jax.random.key(7), rows),
    )


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, range(7)),
        (dict(t=0.5), range(7)),
        (dict(t=3.0), range(7)),
        (dict(k=3), [4, 0, 6]),
        (dict(k=2), [4, 0]),  # of 0 and 6, equally likely, the lower
        (dict(p=0.59), [4, 0]),
        (dict(p=0.61), [4, 0, 6]),
        (dict(floor=0.3), [4, 0, 6, 2]),
        (dict(mask=np.arange(7) == 4), [0, 1, 2, 3, 5, 6]),
        (dict(t=2.0, k=5, floor=0.6), [4, 0, 6]),
        (dict(t=0.0), [4]),
        # The probabilities are .16, .04, .13, .06, .44, .01, .16; 0 and 6 are the most typical.
        (dict(mass=0.1), [0, 6]),
        (dict(mass=0.4), [0, 6, 2]),
        (dict(mass=0.5), [0, 6, 2, 4]),
        (dict(least=0.1), [4, 0, 6, 2]),
        (dict(least=0.9), [4]),
        (dict(flat=0.1), [4, 0, 6, 2]),
        (dict(flat=0.07), [4, 0, 6, 2, 3]),  # least=0.07 would not keep 3
    ],
)
def test_samples_follow_the_exact_probabilities(options, left):
    weight = np.exp(ROW.astype(np.float64) / (options.get("t") or 1.0)) * np.isin(
        np.arange(7), list(left)
    )
    probability = weight / weight.sum()
    pairs = np.asarray(draw(**NEUTRAL | options).tokens).reshape(-1, 2)
    counts = np.zeros((7, 7))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    wanted = np.outer(probability, probability) * len(pairs)
    assert (counts[wanted == 0] == 0).all()
    common = wanted > 5  # the chi-square needs a few in each cell
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(wanted[common], wanted[~common].sum())
    some = expected > 0
    if some.sum() > 1:
        assert chisquare(observed[some], expected[some]).pvalue > 1e-3


@pytest.mark.parametrize("options", [(0.0, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-6, 0.0)])
def test_one_token_left_is_greedy(options):
    """Also among equals, where the lowest id is the one that is left."""
    model = toy(9)
    level = model._replace(out=np.zeros_like(model.out))
    for made in (model, level):
        wanted = run(made, "greedy")
        found = truncated(made, *options)
        for i in range(2):
            np.testing.assert_array_equal(found.tokens[:, i], wanted.tokens[:, 0])
            np.testing.assert_allclose(found.log_prob[:, i], wanted.log_prob[:, 0], rtol=1e-5)


@jax.jit
def truncated(model, t, k, p, floor):
    return model.decode(sample(2), chain(temperature(t), top_k(k), top_p(p), min_p(floor)))


def test_samples_of_a_row_and_of_seeds_differ():
    model = toy(1, eos=-5.0)
    first = run(model, "sample", 3)
    assert len({tuple(tokens) for tokens in first.tokens[0].tolist()}) > 1
    again, other = (
        run(model, "sample", 3, keys=jax.random.split(jax.random.key(seed), 2)) for seed in (0, 1)
    )
    assert (again.tokens == first.tokens).all() and (other.tokens != first.tokens).any()
