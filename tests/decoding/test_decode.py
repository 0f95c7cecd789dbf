"""The loop: ends, limits, padding, scores, and independence of batch and chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoder import EOS, PAD, compiled, hypotheses, toy

from jaxformer.decoding.loop import Finish
from jaxformer.decoding.processors import (
    automaton,
    ban,
    chain,
    min_length,
    min_p,
    temperature,
    top_k,
    top_p,
)
from jaxformer.decoding.strategies import beam, greedy, sample

seeds = st.integers(0, 2**32 - 1)
STRATEGIES = {"greedy": greedy(), "sample": sample(3), "beam": beam(3, 0.6)}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)

# Accepts (2 | 3) 4* eos over six tokens: state 0 the start, 1 the middle, 2 the end.
TABLE = ((-1, -1, 1, 1, -1, -1), (-1, 2, -1, -1, 1, -1), (-1, -1, -1, -1, -1, -1))


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_greedy_takes_the_best_token_until_the_end(seed):
    model = toy(seed)
    decoded = compiled("greedy")(model, 0.0)
    for row in range(2):
        wanted = []
        while len(wanted) < 4 and EOS not in wanted:
            wanted.append(int(model.next(row, wanted).argmax()))
        [(tokens, _, _, finish)] = hypotheses(decoded, row)
        assert tokens == tuple(wanted)
        assert finish == (Finish.EOS if EOS in wanted else Finish.LIMIT)


@every_strategy
@given(seeds)
@settings(max_examples=15, deadline=None)
def test_log_prob_is_the_teacher_forced_score(name, seed):
    model = toy(seed)
    decoded = compiled(name, width=STRATEGIES[name].width)(model, 0.6)
    for row in range(2):
        for tokens, score, log_prob, _ in hypotheses(decoded, row):
            np.testing.assert_allclose(log_prob, model.log_prob(row, tokens), rtol=1e-4, atol=1e-4)
            norm = ((5 + len(tokens)) / 6) ** 0.6 if name == "beam" else 1.0
            np.testing.assert_allclose(score, log_prob / norm, rtol=1e-5)


@every_strategy
@given(seeds)
@settings(max_examples=15, deadline=None)
def test_hypotheses_are_sorted_and_padded_after_their_end(name, seed):
    decoded = compiled(name, width=STRATEGIES[name].width)(toy(seed, eos=1.0), 0.6)
    assert (np.diff(decoded.score, axis=1) <= 0).all()
    after = np.arange(4) >= np.asarray(decoded.length)[..., None]
    tokens = np.asarray(decoded.tokens)
    assert (tokens[after] == PAD).all()
    ends = np.asarray(decoded.finish) == Finish.EOS
    np.testing.assert_array_equal(((tokens == EOS) & ~after).sum(-1), ends)
    np.testing.assert_array_equal(np.asarray(decoded.length)[~ends], 4)


@every_strategy
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_chunk_changes_nothing(name, chunk):
    model = toy(3)
    run = lambda chunk: model.decode(STRATEGIES[name], length=7, chunk=chunk)  # noqa: E731
    assert_equal(run(chunk), run(7))
    assert run(chunk).tokens.shape[-1] == 7


@every_strategy
def test_rows_do_not_depend_on_their_batch(name):
    model, keys = toy(5, rows=4), jax.random.split(jax.random.key(1), 4)
    limit = jnp.array([6, 2, 5, 3])
    together = model.decode(STRATEGIES[name], length=6, limit=limit, keys=keys)
    order = jnp.array([2, 0, 3])
    some = model._replace(start=model.start[order])
    picked = some.decode(STRATEGIES[name], length=6, limit=limit[order], keys=keys[order])
    assert_equal(picked, jax.tree.map(lambda x: x[order], together))


@every_strategy
def test_each_row_stops_at_its_limit(name):
    """A row with a shorter limit decodes as if that were the whole length; 0 decodes nothing."""
    model = toy(11, rows=3, eos=-1.0)
    keys = jax.random.split(jax.random.key(1), 3)
    decoded = model.decode(STRATEGIES[name], length=5, limit=jnp.array([5, 3, 0]), keys=keys)
    short = model.decode(STRATEGIES[name], length=3, keys=keys)
    assert hypotheses(decoded, 1) == hypotheses(short, 1)
    assert any(len(h[0]) == 5 for h in hypotheses(decoded, 0))
    assert hypotheses(decoded, 2)[0] == ((), 0.0, 0.0, Finish.LIMIT)


@every_strategy
def test_limits_beyond_the_length_are_cut(name):
    model = toy(11)
    assert_equal(
        model.decode(STRATEGIES[name], length=4, limit=jnp.array([9, 9])),
        model.decode(STRATEGIES[name], length=4),
    )


@every_strategy
def test_end_of_sequence_first(name):
    only_eos = ban(jnp.arange(5) != EOS)
    decoded = toy(0).decode(STRATEGIES[name], only_eos)
    for row in range(2):
        tokens, _, log_prob, finish = hypotheses(decoded, row)[0]
        assert tokens == (EOS,) and finish == Finish.EOS
        np.testing.assert_allclose(log_prob, toy(0).log_prob(row, (EOS,)), rtol=1e-5)


@every_strategy
def test_every_token_banned_is_a_dead_end(name):
    truncate = chain(ban(jnp.ones(5, bool)), temperature(0.5), top_k(3), top_p(0.5), min_p(0.1))
    decoded = toy(0).decode(STRATEGIES[name], truncate)
    assert (decoded.finish == Finish.DEAD_END).all()
    assert (decoded.length == 0).all() and (decoded.tokens == PAD).all()
    assert jnp.isfinite(decoded.score).all() and jnp.isfinite(decoded.log_prob).all()


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_a_dead_end_keeps_what_was_generated(name):
    start_only = automaton(jnp.array([[-1, -1, 1, -1, -1], [-1, -1, -1, -1, -1]]))
    decoded = toy(0).decode(STRATEGIES[name], start_only)
    for tokens, score, log_prob, finish in hypotheses(decoded, 1):
        assert tokens == (2,) and finish == Finish.DEAD_END and score == log_prob
        np.testing.assert_allclose(log_prob, toy(0).log_prob(1, (2,)), rtol=1e-5)


def test_dead_ends_come_last():
    """A sample that died early has the higher log-probability, and is still the worse one."""
    table = jnp.array([[-1, -1, 1, 2, -1], [-1] * 5, [-1, 2, 2, 2, 2]])
    decoded = toy(2, rows=8).decode(sample(8), automaton(table))
    dead = np.asarray(decoded.finish) == Finish.DEAD_END
    assert dead.any() and not dead.all()
    assert (np.diff(dead.astype(int), axis=1) >= 0).all()


@every_strategy
def test_min_length_holds_back_the_end(name):
    model = toy(0, eos=4.0)
    decoded = model.decode(STRATEGIES[name], min_length(3, EOS), length=6)
    assert int(decoded.length.min()) == 4  # three tokens and the end
    assert int(model.decode(STRATEGIES[name], length=6).length.min()) < 4


@every_strategy
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_what_an_automaton_constrains_it_accepts(name, seed):
    run = compiled(name, width=STRATEGIES[name].width, length=5, table=TABLE)
    decoded = run(toy(seed, vocabulary=6, eos=2.0), 0.6)
    for row in range(2):
        for tokens, score, log_prob, finish in hypotheses(decoded, row):
            state = 0
            for token in tokens:
                state = TABLE[state][token]
                assert state >= 0
            assert finish == Finish.LIMIT or (finish == Finish.EOS and state == 2)
            assert np.isfinite([score, log_prob]).all()


def test_finished_rows_cost_no_steps():
    steps = []

    def counted(cache, tokens, parent, t):
        jax.debug.callback(lambda t: steps.append(int(t)), t)
        return model.step(cache, tokens, parent, t)

    model = toy(0, eos=20.0)
    for strategy in STRATEGIES.values():
        steps.clear()
        jax.block_until_ready(model.decode(strategy, length=64, chunk=4, step=counted))
        jax.effects_barrier()
        assert sorted(steps) in ([0, 1, 2, 3], list(range(8)))


def test_the_body_is_traced_once_and_numbers_never_recompile():
    traces = []

    @jax.jit
    def run(model, t, k, p, floor, alpha, least, seed):
        def counted(*arguments):
            traces.append(1)
            return model.step(*arguments)

        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(2))
        limits = min_length(least, EOS)
        truncate = chain(limits, temperature(t), top_k(k), top_p(p), min_p(floor))
        options = dict(length=4, chunk=2, step=counted, keys=keys)
        return (
            model.decode(sample(2), truncate, **options),
            model.decode(beam(2, alpha), limits, **options),
        )

    model = toy(0)
    results = [
        run(model, 1.0, 0, 1.0, 0.0, 0.6, 0, 0),
        run(model, 0.0, 3, 0.5, 0.1, -1.0, 2, 1),
        run(model, 5.0, 4, 0.9, 0.01, 0.0, 1, 2),
    ]
    assert len(traces) == 2  # one body each
    assert any(bool((results[0][0].tokens != other[0].tokens).any()) for other in results[1:])
