"""The loop: ends, limits, padding, scores, and independence of batch and chunk."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_decoder import EOS, LENGTH, PAD, hypotheses, run, strategy_named, toy

from jaxformer.decoding.loop import Finish
from jaxformer.decoding.processors import chain, min_length, min_p, temperature, top_k, top_p
from jaxformer.decoding.strategies import beam, sample

seeds = st.integers(0, 2**32 - 1)
WIDTHS = {"greedy": 1, "sample": 3, "beam": 3}
every_strategy = pytest.mark.parametrize(("name", "width"), WIDTHS.items())


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_greedy_takes_the_best_token_until_the_end(seed):
    model = toy(seed)
    decoded = run(model, "greedy")
    for row in range(2):
        wanted = []
        while len(wanted) < LENGTH and EOS not in wanted:
            wanted.append(int(model.next(row, wanted).argmax()))
        [(tokens, _, _, finish)] = hypotheses(decoded, row)
        assert tokens == tuple(wanted)
        assert finish == (Finish.EOS if EOS in wanted else Finish.LIMIT)


@every_strategy
@given(seeds)
@settings(max_examples=15, deadline=None)
def test_log_prob_is_the_teacher_forced_score(name, width, seed):
    model = toy(seed)
    decoded = run(model, name, width, alpha=0.6)
    for row in range(2):
        for tokens, score, log_prob, _ in hypotheses(decoded, row):
            np.testing.assert_allclose(log_prob, model.log_prob(row, tokens), rtol=1e-4, atol=1e-4)
            norm = ((5 + len(tokens)) / 6) ** 0.6 if name == "beam" else 1.0
            np.testing.assert_allclose(score, log_prob / norm, rtol=1e-5)


@every_strategy
@given(seeds)
@settings(max_examples=15, deadline=None)
def test_hypotheses_are_sorted_and_padded_after_their_end(name, width, seed):
    decoded = run(toy(seed, eos=1.0), name, width)
    assert (np.diff(decoded.score, axis=1) <= 0).all()
    after = np.arange(LENGTH) >= np.asarray(decoded.length)[..., None]
    tokens = np.asarray(decoded.tokens)
    assert (tokens[after] == PAD).all()
    ends = np.asarray(decoded.finish) == Finish.EOS
    np.testing.assert_array_equal(((tokens == EOS) & ~after).sum(-1), ends)
    np.testing.assert_array_equal(np.asarray(decoded.length)[~ends], LENGTH)


@every_strategy
def test_the_chunk_changes_nothing(name, width):
    """One chunk of seven, or two of four of which the last step is too much."""
    model, strategy = toy(3, eos=-1.0), strategy_named(name, width, 0.6)
    small = jax.jit(lambda model: model.decode(strategy, chunk=4))(model)
    assert_equal(small, run(model, name, width))
    assert small.tokens.shape[-1] == LENGTH


@every_strategy
def test_rows_do_not_depend_on_their_batch(name, width):
    model, keys = toy(5, rows=4), jax.random.split(jax.random.key(1), 4)
    limit = np.array([7, 2, 5, 3])
    together = run(model, name, width, limit=limit, keys=keys)
    others = toy(6, rows=4).start
    order = np.array([2, 0, 3, 1])
    mixed = np.where(np.arange(4)[:, None] == 3, others, model.start[order])
    moved = run(model._replace(start=mixed), name, width, limit=limit[order], keys=keys[order])
    assert_equal(
        jax.tree.map(lambda x: x[:3], moved), jax.tree.map(lambda x: x[order[:3]], together)
    )
    if name == "greedy":
        return
    alone = model._replace(start=model.start[2:3])
    alone = run(alone, name, width, limit=limit[2:3], keys=keys[2:3])
    assert_equal(alone, jax.tree.map(lambda x: x[2:3], together))


@every_strategy
def test_each_row_stops_at_its_limit(name, width):
    model = toy(11, rows=3, eos=-1.0)
    decoded, free = (run(model, name, width, limit=limit) for limit in ([7, 3, 0], [99, 7, 7]))
    assert hypotheses(decoded, 0) == hypotheses(free, 0)
    assert any(len(h[0]) == 7 for h in hypotheses(free, 0))
    if name == "beam":  # as if 3 were the length of all
        assert hypotheses(decoded, 1) == hypotheses(run(model, name, width, length=3, limit=3), 1)
    else:
        assert {h[0] for h in hypotheses(decoded, 1)} == {h[0][:3] for h in hypotheses(free, 1)}
    assert hypotheses(decoded, 2)[0] == ((), 0.0, 0.0, Finish.LIMIT)
    assert (decoded.length[2] == 0).all() and (decoded.tokens[2] == PAD).all()


@every_strategy
def test_end_of_sequence_first(name, width):
    model = toy(0)
    decoded = run(model, name, width, mask=np.arange(5) != EOS)
    for row in range(2):
        tokens, _, log_prob, finish = hypotheses(decoded, row)[0]
        assert tokens == (EOS,) and finish == Finish.EOS
        np.testing.assert_allclose(log_prob, model.log_prob(row, (EOS,)), rtol=1e-5)


@every_strategy
def test_every_token_banned_is_a_dead_end(name, width):
    decoded = run(toy(0), name, width, mask=np.ones(5, bool))
    assert (decoded.finish == Finish.DEAD_END).all()
    assert (decoded.length == 0).all() and (decoded.tokens == PAD).all()
    assert jnp.isfinite(decoded.score).all() and jnp.isfinite(decoded.log_prob).all()


@every_strategy
@pytest.mark.parametrize("tokens", [slice(None), 2], ids=["all", "one"])
def test_logits_that_are_no_numbers_are_a_dead_end(name, width, tokens):
    model = toy(0)
    model.out[:, tokens] = np.nan
    decoded = run(model, name, width)
    assert (decoded.finish == Finish.DEAD_END).all() and (decoded.length == 0).all()
    assert jnp.isfinite(decoded.score).all()


@pytest.mark.parametrize(("name", "width"), [("greedy", 1), ("sample", 3)])
def test_a_dead_end_keeps_what_was_generated(name, width):
    model = toy(0)
    decoded = run(model, name, width, table=[[-1, -1, 1, -1, -1], [-1] * 5])
    for tokens, score, log_prob, finish in hypotheses(decoded, 1):
        assert tokens == (2,) and finish == Finish.DEAD_END and score == log_prob
        np.testing.assert_allclose(log_prob, model.log_prob(1, (2,)), rtol=1e-5)


def test_dead_ends_come_last():
    """A sample that died early has the higher log-probability, and is still the worse one."""
    table = [[-1, -1, 1, 2, -1], [-1] * 5, [-1, 2, 2, 2, 2]]
    keys = jax.random.split(jax.random.key(0), 2)
    seen = set()
    for seed in range(6):
        decoded = run(toy(seed), "sample", 3, table=table, keys=keys)
        dead = np.asarray(decoded.finish) == Finish.DEAD_END
        assert (np.diff(dead.astype(int), axis=1) >= 0).all()
        seen |= set(dead.sum(1).tolist())
    assert seen & {1, 2}  # rows with both kinds


@every_strategy
def test_min_length_holds_back_the_end(name, width):
    model = toy(0, eos=4.0)
    assert int(run(model, name, width, least=3).length.min()) == 4  # three tokens and the end
    assert int(run(model, name, width).length.min()) < 4


@every_strategy
@given(seeds)
@settings(max_examples=10, deadline=None)
def test_what_an_automaton_constrains_it_accepts(name, width, seed):
    """2 2* eos | 4 4* eos: state 0 is the start, 1 and 2 repeat, 3 is the end."""
    table = ((-1, -1, 1, -1, 2), (-1, 3, 1, -1, -1), (-1, 3, -1, -1, 2), (-1,) * 5)
    decoded = run(toy(seed, eos=1.0), name, width, table=table)
    for row in range(2):
        for tokens, score, log_prob, finish in hypotheses(decoded, row):
            state = 0
            for token in tokens:
                state = table[state][token]
                assert state >= 0
            assert finish == (Finish.EOS if state == 3 else Finish.LIMIT)
            assert np.isfinite([score, log_prob]).all()


@pytest.mark.parametrize(("name", "width"), [("greedy", 1), ("beam", 3)])
def test_finished_rows_cost_no_steps(name, width):
    """Sixteen chunks of four are allowed; one is run."""
    steps = []

    def counted(cache, tokens, parent, t):
        jax.debug.callback(lambda t: steps.append(int(t[0])), t)
        return model.step(cache, tokens, parent, t)

    model, strategy = toy(0, eos=20.0), strategy_named(name, width, 0.0)
    decode = partial(model.decode, strategy, length=64, chunk=4, step=counted)
    jax.block_until_ready(jax.jit(decode)())
    jax.effects_barrier()
    assert sorted(steps) == [0, 1, 2, 3]


def test_the_body_is_traced_once_and_numbers_never_recompile():
    traces = []

    @jax.jit
    def both(model, t, k, p, floor, alpha, least, seed):
        def counted(*arguments):
            traces.append(1)
            return model.step(*arguments)

        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(2))
        limits = min_length(least, [EOS])
        truncate = chain(limits, temperature(t), top_k(k), top_p(p), min_p(floor))
        options = dict(length=4, chunk=2, step=counted, keys=keys)
        return (
            model.decode(sample(2), truncate, **options),
            model.decode(beam(2, alpha), limits, **options),
        )

    model = toy(0)
    results = [
        both(model, 1.0, 0, 1.0, 0.0, 0.6, 0, 0),
        both(model, 0.0, 3, 0.5, 0.1, -1.0, 2, 1),
        both(model, 5.0, 4, 0.9, 0.01, 0.0, 1, 2),
    ]
    assert len(traces) == 2  # one body each
    for i in range(2):  # and the numbers do count
        assert all((results[0][i].score != other[i].score).any() for other in results[1:])
