"""Contrastive search: likely tokens, as long as the text does not turn back on itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxformer.decoding.loop import Choice, Decoded, DecodeState, Strategy, gather
from jaxformer.decoding.select import argmax, top_k


def contrastive(
    k: int,
    alpha: float | Float[Array, ""],
    hidden: Callable[[Any], Float[Array, "B W D"]],
    prompt: Float[Array, "B P D"] | None = None,
    there: Bool[Array, "B P"] | None = None,
) -> Strategy:
    """Of the `k` (at most the vocabulary) likeliest tokens, the one least like the text so far.

    The best is largest in (1 - alpha) * probability - alpha * the greatest cosine between its
    hidden state and that of any token before it. The k hypotheses of a row are one text with k
    candidates for its last token: the step that was just run on them is the look-ahead, and no
    token costs a second one. `hidden` finds the last hidden states in the step's cache (before the
    first step, that of the prompt's end); `prompt` are those of the prompt, whose tokens are where
    `there` is true, and only the beginning needs them. One hypothesis is returned for each row.
    Su et al., 2022.
    """

    def init(tokens, limit):
        if prompt is None or there is None:
            raise ValueError("contrastive search begins with the hidden states of its prompt")
        rows, _, steps = tokens.shape
        # Slot P takes the prompt's end once more, which changes no maximum.
        past = jnp.pad(_direction(prompt), ((0, 0), (0, steps), (0, 0)))
        return past, there, jnp.zeros((rows, k), jnp.float32)

    def best(state: DecodeState) -> Array:
        """The chosen candidate of each row, "B 1"."""
        past, there, probability = state.strategy
        cosine = jnp.einsum("bwd,bsd->bws", _direction(hidden(state.cache)), past)
        written = jnp.arange(past.shape[1] - there.shape[1]) < state.t[:, None]
        seen = jnp.concatenate([there, written], 1)
        likeness = jnp.where(seen[:, None], cosine, -1.0).max(-1)
        value = (1 - alpha) * probability - alpha * likeness
        return argmax(jnp.where(probability >= 0, value, -jnp.inf))[:, None]

    def choose(state, logits, ends):
        past, there, _ = state.strategy
        at = best(state)
        new = _direction(gather(hidden(state.cache), at))
        here = jnp.arange(past.shape[1]) == (there.shape[1] + state.t)[:, None]
        past = jnp.where(here[..., None], new, past)

        processed, raw, log_prob = gather((logits, state.logits, state.log_prob), at)
        values, token = top_k(processed[:, 0], k)
        likely = jnp.take_along_axis(jax.nn.softmax(processed[:, 0], -1), token, -1)
        of_token = jnp.take_along_axis(raw[:, 0], token, -1) - jax.nn.logsumexp(raw, -1)
        exists = values > -jnp.inf
        stop = jnp.broadcast_to(~exists[:, :1], token.shape)
        kept = (past, there, jnp.where(exists, likely, -1.0))
        return Choice(jnp.broadcast_to(at, token.shape), token, log_prob + of_token, stop, kept)

    def finish(state):
        decoded = Decoded(state.tokens, state.log_prob, state.log_prob, state.length, state.finish)
        return gather(decoded, best(state))

    return Strategy(k, init, choose, finish)


def _direction(hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    hidden = hidden.astype(jnp.float32)
    return hidden / jnp.maximum(jnp.linalg.norm(hidden, axis=-1, keepdims=True), 1e-12)
