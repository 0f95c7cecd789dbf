"""Strategies choose: the most likely token, a random one, or the best of many continuations."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxformer.decoding.loop import (
    Choice,
    Decoded,
    DecodeState,
    Ends,
    Finish,
    Strategy,
    ending,
    gather,
    put,
)
from jaxformer.decoding.select import argmax, top_k

NEG = float(np.finfo(np.float32).min) / 2
"""Score of what does not exist: below every real score, and finite."""


def greedy() -> Strategy:
    """The most likely token at every step, of equal ones the lowest id."""
    return Strategy(1, _no_state, _most_likely, _ranked)


def sample(n: int) -> Strategy:
    """n independent samples per row from the processed distribution."""

    def choose(state, logits, ends):
        return _pick(state, logits, logits + gumbel(state, logits))

    return Strategy(n, _no_state, choose, _ranked)


def beam(
    width: int,
    alpha: float | Float[Array, ""],
    norm: Literal["wu", "plain"] = "wu",
    stop_when: Literal["exact", "heuristic", "full"] = "exact",
    many_ends: bool = False,
    needs: Callable[[Any, Array | None], Array] | None = None,
) -> Strategy:
    """Beam search with a pool of finished hypotheses and an early stop.

    A hypothesis of n tokens scores its log-probability over ((5 + n) / 6) ** alpha ("wu", Wu et
    al., 2016) or over n ** alpha ("plain"). Each row keeps its `width` best finished hypotheses,
    and stops when no live one can still enter them: at any length ("exact", as long as processors
    only lower logits), or if it ended here and now ("heuristic"); or at once when there are `width`
    of them ("full"). transformers' early_stopping calls these "never", False and True. The
    probability of a forbidden token is not shared out among the others. Where fewer than `width`
    hypotheses exist, the rest are empty dead ends. With `many_ends` any number of tokens may end a
    hypothesis, and not only the ends of sequence.

    With a processor's `needs`, hypotheses that still need equally many tokens make a bank, and the
    beams are shared out among the banks, so that those on their way to a phrase, which seldom are
    the likeliest, live on (Post and Vilar 2018): the likeliest of all, then the best of each bank,
    that which needs least first, then the second of each. Only the `width` best of a bank may end.
    Where the banks are more than the beams, those that need most are seldom tried.
    """
    needs = needs if width > 1 else None

    def penalty(n: Int[Array, "..."]) -> Float[Array, "..."]:
        n = n.astype(jnp.float32)
        # Clipped so that no alpha overflows.
        return jnp.exp(jnp.clip(alpha * jnp.log((5 + n) / 6 if norm == "wu" else n), -60.0, 60.0))

    def init(tokens, limit):
        shape = tokens.shape[:2]
        first = jnp.broadcast_to(jnp.arange(width) == 0, shape)
        # A row that may generate nothing has one hypothesis, the empty one.
        empty = first & (limit == 0)[:, None]
        score = jnp.where(empty, 0.0, jnp.float32(NEG))
        finish = jnp.where(empty, Finish.LIMIT, Finish.DEAD_END).astype(jnp.int32)
        pool = Decoded(tokens, score, score, jnp.zeros(shape, jnp.int32), finish)
        return jnp.where(first, 0.0, jnp.float32(NEG)), pool

    def choose(state, logits, ends):
        live, pool = state.strategy
        rows, _, vocabulary = logits.shape

        # The best continuations of each beam: log-softmax keeps their order, so it can wait.
        if width > 1 and (many_ends or needs):
            every = jnp.arange(vocabulary)
            ending_here = ends(state.processor, jnp.broadcast_to(every, logits.shape))
            kinds = [~ending_here, ending_here]
            if needs:
                now = needs(state.processor, None)[..., None]
                nearer = needs(state.processor, every) < now
                kinds = [nearer & kinds[0], ~nearer & kinds[0], ending_here]
            # As many of each kind as may live, for none of a kind may be among the likeliest.
            k = min(width, vocabulary)
            found = [top_k(jnp.where(kind, logits, -jnp.inf), k) for kind in kinds]
            values, token = (jnp.concatenate(parts, -1) for parts in zip(*found, strict=True))
            wanted = width * token.shape[-1]
        else:
            wanted = continuations(width, state.eos_ids)
            values, token = top_k(logits, min(wanted, vocabulary))
        k = token.shape[-1]
        total = jax.nn.logsumexp(state.logits, -1, keepdims=True)
        log_prob = jnp.take_along_axis(state.logits, token, -1) - total + state.log_prob[..., None]
        exists = (live > NEG)[..., None] & ~state.done[..., None] & (values > -jnp.inf)
        score = jnp.where(exists, values - total + live[..., None], NEG)

        # The best of the row.
        score, best = top_k(score.reshape(rows, -1), min(wanted, width * k))
        parent = best // k
        bank = needs(state.processor, token) if needs else jnp.zeros_like(token)
        candidates = (token, log_prob, ends(state.processor, token), bank)
        candidates = jax.tree.map(lambda each: each.reshape(rows, -1), candidates)
        token, log_prob, ended, bank = gather(candidates, best)
        n = (state.t + 1)[:, None]
        last = (state.t + 1 >= state.limit)[:, None]

        # Finished ones enter the pool, if they are among the `width` best of this step or bank.
        place = _places(bank, jnp.ones_like(ended)) if needs else jnp.arange(score.shape[1])
        enters = (ended | last) & (score > NEG) & (place < width)
        finished = Decoded(
            put(gather(state.tokens, parent), token, state.t),
            jnp.where(enters, score / penalty(n), NEG),
            log_prob,
            jnp.broadcast_to(n, token.shape),
            jnp.where(ended, ending(token, state.eos_ids), Finish.LIMIT),
        )
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), pool, finished)
        _, best = jax.lax.top_k(both.score, width)
        pool = gather(both, best)

        # The others live on, until even the kindest length cannot lift them over the pool's worst.
        worst = pool.score[:, -1]
        score = jnp.where(ended, NEG, score)
        if needs:
            turn = jnp.where(score > NEG, _places(bank, ~ended), score.shape[1])
            turn = jnp.where(jnp.arange(turn.shape[1]) == score.argmax(-1)[:, None], -1, turn)
            best = jnp.lexsort((bank, turn))[:, :width]
        else:
            best = jax.lax.top_k(score, width)[1]
        live, parent, token, log_prob = gather((score, parent, token, log_prob), best)
        kindest = penalty(n[:, 0])
        if stop_when == "exact":
            kindest = jnp.maximum(kindest, penalty(state.limit))
        likeliest = live.max(-1)
        enough = worst > NEG if stop_when == "full" else likeliest / kindest <= worst
        stop = last[:, 0] | (likeliest <= NEG) | enough
        return Choice(
            parent, token, log_prob, jnp.broadcast_to(stop[:, None], token.shape), (live, pool)
        )

    return Strategy(width, init, choose, lambda state: state.strategy[1])


def _places(bank: Int[Array, "B N"], counts: Bool[Array, "B N"]) -> Int[Array, "B N"]:
    """How many of those that count stand before each in its bank."""
    order = jnp.argsort(bank, axis=-1, stable=True)
    bank, counts = gather((bank, counts.astype(jnp.int32)), order)
    before = jnp.cumsum(counts, -1) - counts
    begins = jnp.diff(bank, axis=-1, prepend=-1) > 0
    before -= jax.lax.cummax(jnp.where(begins, before, 0), axis=1)
    return gather(before, jnp.argsort(order, axis=-1))


def continuations(width: int, eos_ids: Int[Array, " E"]) -> int:
    """How many continuations of a row `beam` ranks in a step, without `many_ends`.

    Enough for `width` to live on though each beam may end in every way there is. A beam of 1 has no
    second choice, so it ends where greedy does, whatever alpha is.
    """
    return (1 + max(eos_ids.size, 1)) * width if width > 1 else 1


def gumbel(state: DecodeState, logits: Float[Array, "B W V"]) -> Float[Array, "B W V"]:
    """Noise under which the largest logit is a draw, from each row's own key."""

    def noise(key, length, i):
        key = jax.random.fold_in(jax.random.fold_in(key, length), i)
        return jax.random.gumbel(key, logits.shape[-1:])

    every = jax.vmap(jax.vmap(noise, (None, 0, 0)), (0, 0, None))
    return every(state.keys, state.length, jnp.arange(logits.shape[1]))


def _most_likely(state: DecodeState, logits: Float[Array, "B W V"], ends: Ends) -> Choice:
    return _pick(state, logits, logits)


def _no_state(tokens: Int[Array, "B W T"], limit: Int[Array, " B"]) -> tuple[()]:
    return ()


def _pick(
    state: DecodeState, logits: Float[Array, "B W V"], preference: Float[Array, "B W V"]
) -> Choice:
    token = argmax(preference)
    of_token = jnp.take_along_axis(state.logits, token[..., None], -1)[..., 0]
    log_prob = state.log_prob + of_token - jax.nn.logsumexp(state.logits, -1)
    return Choice(None, token, log_prob, ~(logits.max(-1) > -jnp.inf), state.strategy)


def _ranked(state: DecodeState) -> Decoded:
    dead = state.finish == Finish.DEAD_END
    order = jnp.lexsort((-state.log_prob, dead))
    decoded = Decoded(state.tokens, state.log_prob, state.log_prob, state.length, state.finish)
    return gather(decoded, order)
