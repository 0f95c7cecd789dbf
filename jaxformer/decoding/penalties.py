"""Processors that weigh the next token by those before it: penalties, n-grams, bad words, bias.

A history is "B S" ids that end with the last token, the prompt's in front; -1 is none. Semantics
and numbers are those of transformers.
"""

from collections.abc import Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxformer.decoding.processors import Processor, counting, stateless


def repetition(
    penalty: float | Float[Array, ""], history: Int[Array, "B S"], vocabulary: int
) -> Processor:
    """Divide the positive logits of tokens that were there before by `penalty`, multiply others.

    Over 1 it discourages them, the history's too. It depends on where logits are 0: beam search
    gives log-probabilities. Keskar et al., 2019.
    """

    def init(b, w):
        rows, ids = jnp.arange(b)[:, None], jnp.where(history < 0, vocabulary, history)
        seen = jnp.zeros((b, vocabulary), bool).at[rows, ids].set(True, mode="drop")
        return jnp.broadcast_to(seen[:, None], (b, w, vocabulary))

    def apply(logits, seen):
        return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    return Processor(init, apply, lambda seen, token: seen | _one_hot(token, vocabulary))


def presence_frequency(
    presence: float | Float[Array, ""], frequency: float | Float[Array, ""], vocabulary: int
) -> Processor:
    """Take `frequency` off a logit for each time its token was generated, `presence` if it was.

    OpenAI's API reference, 2023.
    """
    return Processor(
        lambda b, w: jnp.zeros((b, w, vocabulary), jnp.int32),
        lambda logits, count: logits - frequency * count - presence * (count > 0),
        lambda count, token: count + _one_hot(token, vocabulary),
    )


def no_repeat_ngram(n: int, history: Int[Array, "B S"], length: int) -> Processor:
    """Forbid the tokens that would end an n-gram which the hypothesis or its history has.

    The state is the last tokens, the history's and at most `length` more. Paulus et al., 2018.
    """

    def init(b, w):
        room = jnp.full((b, length), -1, jnp.int32)
        text = jnp.concatenate([room, history.astype(jnp.int32)], 1)
        return jnp.broadcast_to(text[:, None], (b, w, text.shape[1]))

    def apply(logits, text):
        return _ban_after(logits, text, text[..., text.shape[-1] - (n - 1) :])

    return Processor(init, apply, _push)


def no_repeat_source_ngram(
    n: int, source: Int[Array, "B M"], history: Int[Array, "B S"]
) -> Processor:
    """Forbid the tokens that would end an n-gram which the source has (padded with -1)."""
    return Processor(
        lambda b, w: _tail(history, n - 1, w),
        lambda logits, last: _ban_after(logits, source[:, None], last),
        _push,
    )


def bad_words(words: Sequence[Sequence[int]], history: Int[Array, "B S"]) -> Processor:
    """Forbid the last token of each of `words`, ids one by one, where the others stand before it.

    They may stand in the history.
    """
    longest = max(map(len, words))
    groups = [list(group) for _, group in groupby(sorted(words, key=len), len)]

    def apply(logits, last):
        for group in groups:
            words = jnp.array(group)
            before = last[..., None, last.shape[-1] - (words.shape[1] - 1) :]
            matches = (before == words[:, :-1]).all(-1)
            bound = jnp.where(matches, -jnp.inf, jnp.inf)
            logits = logits.at[..., words[:, -1]].min(bound, mode="drop")
        return logits

    return Processor(lambda b, w: _tail(history, longest - 1, w), apply, _push)


def logit_bias(ids: Int[Array, " N"], bias: Float[Array, " N"]) -> Processor:
    """Add to the logit of each of `ids` its bias."""
    return stateless(lambda logits: logits.at[..., ids].add(bias, mode="drop"))


def length_decay(
    factor: float | Float[Array, ""],
    start: int | Int[Array, ""],
    eos_ids: Sequence[int] | Int[Array, " E"],
) -> Processor:
    """Add (factor ** n - 1) times its size to the logit of each end, n tokens after `start`.

    Over 1 it hurries the end. It depends on where logits are 0, as `repetition` does. transformers'
    exponential_decay_length_penalty.
    """

    def apply(logits, count):
        ends = jnp.isin(jnp.arange(logits.shape[-1]), jnp.asarray(eos_ids))
        over = jnp.maximum(count - start, 0)[..., None]
        # Clipped so that no factor overflows.
        growth = jnp.minimum(jnp.power(jnp.float32(factor), over), 1e30) - 1
        return jnp.where(ends & jnp.isfinite(logits), logits + jnp.abs(logits) * growth, logits)

    return counting(apply)


def _one_hot(token: Int[Array, "B W"], vocabulary: int) -> Bool[Array, "B W V"]:
    return jax.lax.broadcasted_iota(jnp.int32, (*token.shape, vocabulary), 2) == token[..., None]


def _push(last: Int[Array, "B W S"], token: Int[Array, "B W"]) -> Int[Array, "B W S"]:
    return jnp.concatenate([last, token[..., None].astype(last.dtype)], -1)[..., 1:]


def _tail(history: Int[Array, "B S"], n: int, width: int) -> Int[Array, "B W n"]:
    """The last n tokens, for each of `width` hypotheses."""
    padded = jnp.pad(history.astype(jnp.int32), ((0, 0), (n, 0)), constant_values=-1)
    last = padded[:, padded.shape[1] - n :]
    return jnp.broadcast_to(last[:, None], (len(history), width, n))


def _ban_after(
    logits: Float[Array, "B W V"], text: Int[Array, "B #W S"], last: Int[Array, "B W n"]
) -> Float[Array, "B W V"]:
    """Forbid what follows `last` anywhere in `text`."""
    rows, width, vocabulary = logits.shape
    n = last.shape[-1]
    places = text.shape[-1] - n
    if places <= 0:
        return logits
    following = jnp.broadcast_to(text[..., n:], (rows, width, places))
    matches = following >= 0
    for i in range(n):
        here = last[..., i : i + 1]
        matches &= (text[..., i : i + places] == here) & (here >= 0)
    ids = jnp.where(matches, following, vocabulary)  # beyond the vocabulary, where nothing is
    row, hypothesis = jnp.arange(rows)[:, None, None], jnp.arange(width)[:, None]
    banned = jnp.zeros(logits.shape, bool).at[row, hypothesis, ids].set(True, mode="drop")
    return jnp.where(banned, -jnp.inf, logits)
