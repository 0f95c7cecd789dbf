"""Processors change the logits before a token is chosen: truncate, forbid, constrain.

A processor is a few pure functions over a state of its own, whose leaves are "B W ..." and follow
their hypothesis through the search. A forbidden token has logit -inf. Every number may be traced:
another temperature compiles nothing anew.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxformer.decoding.select import argmax


class Processor(NamedTuple):
    """What happens to the logits "B W V" of each next token."""

    init: Callable[[int, int], Any]
    """(B, W) -> state before the first token."""
    apply: Callable[[Array, Any], Array]
    """(logits, state) -> logits."""
    update: Callable[[Any, Array], Any]
    """(state, token "B W") -> state after that token."""
    ends: Callable[[Any, Array], Array] = lambda state, token: jnp.zeros(token.shape, bool)
    """(state, tokens "B W ...") -> whether each would end its hypothesis."""
    needs: Callable[[Any, Array | None], Array] | None = None
    """(state, tokens "B W k", or "k" for every hypothesis, or None) -> how many more tokens are
    asked for after each of them, or as it stands; None if this processor asks for none."""


def chain(*parts: Processor) -> Processor:
    """Apply processors in the order given; none at all leaves the logits as they are."""

    def apply(logits, states):
        for part, state in zip(parts, states, strict=True):
            logits = part.apply(logits, state)
        return logits

    def needs(states, token):
        both = zip(parts, states, strict=True)
        return reduce(jnp.maximum, (part.needs(state, token) for part, state in both if part.needs))

    return Processor(
        lambda b, w: tuple(part.init(b, w) for part in parts),
        apply,
        lambda states, token: tuple(
            part.update(state, token) for part, state in zip(parts, states, strict=True)
        ),
        lambda states, token: reduce(
            jnp.logical_or,
            (part.ends(state, token) for part, state in zip(parts, states, strict=True)),
            jnp.zeros(token.shape, bool),
        ),
        needs if any(part.needs for part in parts) else None,
    )


def stateless(function: Callable[[Array], Array]) -> Processor:
    """A processor that needs only the logits."""
    return Processor(lambda b, w: (), lambda logits, _: function(logits), lambda state, _: state)


def counting(function: Callable[[Array, Array], Array]) -> Processor:
    """A processor that needs the logits and how many tokens stand before them, "B W"."""
    return Processor(
        lambda b, w: jnp.zeros((b, w), jnp.int32), function, lambda count, _: count + 1
    )


def _when(condition: bool | Bool[Array, ""], function: Callable[[Array], Array]) -> Processor:
    """`function` if the traced `condition` holds; else nothing is computed."""
    return stateless(lambda logits: jax.lax.cond(condition, function, lambda x: x, logits))


def temperature(t: float | Float[Array, ""]) -> Processor:
    """Divide the logits by t, measured from the largest; 0 keeps the most likely token alone."""

    def apply(logits):
        top = logits.max(-1, keepdims=True)
        top = jnp.where(top > -jnp.inf, top, 0.0)  # a dead end stays -inf, not NaN
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        best = jnp.where(ids == argmax(logits)[..., None], logits, -jnp.inf)
        # From the largest, so that a tiny t cannot overflow and the best token keeps its logit.
        scaled = top + (logits - top) / jnp.where(t > 0, t, 1.0)
        return jnp.where(t > 0, scaled, best)

    return stateless(apply)


def top_k(k: int | Int[Array, ""]) -> Processor:
    """Keep the k most likely tokens, of equal ones those with the lowest ids; 0 keeps all.

    Fan et al., 2018.
    """

    def apply(logits):
        size = logits.shape[-1]
        count = jnp.clip(k, 1, size)
        return _keep(logits, _falling(logits), jnp.full((*logits.shape[:-1], 1), count))

    return _when(k > 0, apply)


def top_p(p: float | Float[Array, ""]) -> Processor:
    """Keep the fewest tokens whose probabilities reach p, the one that crosses included.

    1 keeps all; of equally likely tokens those with the lowest ids are kept. Holtzman et al., 2020.
    """

    def apply(logits):
        ordered = _falling(logits)
        probability = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(probability, -1) - probability
        count = jnp.maximum((before < p).sum(-1, keepdims=True), 1)
        return _keep(logits, ordered, count)

    # A rounded sum may reach 1 before the last token, so 1 must not even try.
    return _when(p < 1, apply)


def min_p(p: float | Float[Array, ""]) -> Processor:
    """Keep tokens at least p times as likely as the most likely one; 0 keeps all.

    Nguyen et al., 2024.
    """

    def apply(logits):
        floor = logits.max(-1, keepdims=True) + jnp.log(jnp.asarray(p, logits.dtype))
        return jnp.where(logits >= floor, logits, -jnp.inf)

    return stateless(apply)


def typical(p: float | Float[Array, ""]) -> Processor:
    """Keep the tokens of most typical information, until their probabilities reach p; 1 keeps all.

    Those come first whose -log p(token) is nearest to its mean, the entropy; equally near ones go
    together. Meister et al., 2022.
    """

    def apply(logits):
        information = -jax.nn.log_softmax(logits, -1)
        probability = jnp.exp(-information)
        distance = jnp.abs(information - _entropy(logits)[..., None])
        distance = jnp.where(logits > -jnp.inf, distance, jnp.inf)
        ordered, of_ordered = jax.lax.sort((distance, probability), num_keys=1)
        below = (jnp.cumsum(of_ordered, -1) < p).sum(-1, keepdims=True)
        farthest = jnp.take_along_axis(ordered, jnp.minimum(below, logits.shape[-1] - 1), -1)
        return jnp.where(distance <= farthest, logits, -jnp.inf)

    return _when(p < 1, apply)


def epsilon(least: float | Float[Array, ""]) -> Processor:
    """Keep tokens with a probability of at least `least`, and the most likely ones; 0 keeps all.

    Hewitt et al., 2022.
    """
    return stateless(lambda logits: _likely(logits, jnp.asarray(least)))


def eta(least: float | Float[Array, ""]) -> Processor:
    """`epsilon`, at sqrt(least) * exp(-entropy) where that is less: kinder to flat distributions.

    Hewitt et al., 2022.
    """

    def apply(logits):
        flat = jnp.sqrt(least) * jnp.exp(-_entropy(logits)[..., None])
        return _likely(logits, jnp.minimum(least, flat))

    return stateless(apply)


def ban(mask: Bool[Array, " V"]) -> Processor:
    """Forbid every token whose mask is true."""
    return stateless(lambda logits: jnp.where(mask[None, None], -jnp.inf, logits))


def ban_at(mask: Bool[Array, " V"], at: int) -> Processor:
    """Forbid every token whose mask is true, as token number `at` only, counted from 0."""
    return counting(
        lambda logits, count: jnp.where((count == at)[..., None] & mask, -jnp.inf, logits)
    )


def min_length(
    least: int | Int[Array, ""] | Int[Array, " B"], eos_ids: Sequence[int] | Int[Array, " E"]
) -> Processor:
    """Forbid the ends of sequence until `least` tokens of their row stand before them."""

    def apply(logits, count):
        ends = jnp.isin(jnp.arange(logits.shape[-1]), jnp.asarray(eos_ids))
        early = count < jnp.reshape(least, (-1, 1))
        return jnp.where(early[..., None] & ends, -jnp.inf, logits)

    return counting(apply)


def forced(token: int, at: int | Int[Array, " B"], others: Processor) -> Processor:
    """Make `token` the only choice for the token number `at` of its row, counted from 0.

    It is certain then: its log-probability is 0. Every other number is for `others` to process.
    """

    def apply(logits, states):
        count, state = states
        now = (count == jnp.reshape(at, (-1, 1)))[..., None]
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        certain = jax.nn.logsumexp(logits, -1, keepdims=True)
        return jnp.where(
            now, jnp.where(ids == token, certain, -jnp.inf), others.apply(logits, state)
        )

    of_others = others.needs
    return Processor(
        lambda b, w: (jnp.zeros((b, w), jnp.int32), others.init(b, w)),
        apply,
        lambda states, token: (states[0] + 1, others.update(states[1], token)),
        lambda states, token: others.ends(states[1], token),
        of_others and (lambda states, token: of_others(states[1], token)),
    )


def _entropy(logits: Float[Array, "B W V"]) -> Float[Array, "B W"]:
    log_prob = jax.nn.log_softmax(logits, -1)
    return -jnp.where(logits > -jnp.inf, jnp.exp(log_prob) * log_prob, 0.0).sum(-1)


def _likely(logits: Float[Array, "B W V"], least: Float[Array, "..."]) -> Float[Array, "B W V"]:
    probability = jax.nn.softmax(logits, -1)
    best = logits == logits.max(-1, keepdims=True)
    return jnp.where((probability >= least) | best, logits, -jnp.inf)


def _falling(logits: Float[Array, "B W V"]) -> Float[Array, "B W V"]:
    return -jnp.sort(-logits, -1)


def _keep(
    logits: Float[Array, "B W V"], ordered: Float[Array, "B W V"], count: Int[Array, "B W 1"]
) -> Float[Array, "B W V"]:
    """Keep the `count` largest, given the logits in falling order; ties go to the lowest ids."""
    last = jnp.take_along_axis(ordered, count - 1, -1)
    above, level = logits > last, logits == last
    room = count - above.sum(-1, keepdims=True)
    return jnp.where(above | (level & (jnp.cumsum(level, -1) <= room)), logits, -jnp.inf)
