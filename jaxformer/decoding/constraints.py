"""Constraints as a processor: tokens that an automaton forbids, or that leave no room to end.

The table is traced: another pattern of about the same size compiles nothing anew.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jaxformer.decoding.processors import Processor

NEVER = 2**30
"""More tokens than any text has."""


class Table(NamedTuple):
    """A finite automaton over tokens; decoding starts in state 0."""

    following: Int[Array, "S C"] | Int[np.ndarray, "S C"]
    """The state after each class of tokens, -1 if it is forbidden."""
    class_of: Int[Array, " V"] | Int[np.ndarray, " V"]
    """The class of each token: those of a class are allowed, and lead, alike."""
    need: Int[Array, " S"] | Int[np.ndarray, " S"]
    """How many more tokens a text must have to be accepted; -1 after its end."""


def constrained(table: Table, limit: Int[Array, " B"]) -> Processor:
    """Accept only what `table` accepts within `limit` tokens.

    While a row has more room than its text still needs, any token the automaton knows will do;
    after that, only those that lead to its end. Where there is not enough room from the start,
    nothing is allowed: a dead end.
    """
    following, class_of, need = map(jnp.asarray, table)

    def apply(logits, states):
        state, count = states
        after = following[state]  # B W C
        room = (limit[:, None] - count - 1)[..., None]
        allowed = (after >= 0) & (need[after] <= room)
        return jnp.where(allowed[..., class_of], logits, -jnp.inf)

    def needs(states, token):
        state, _ = states
        if token is None:
            return jnp.maximum(need[state], 0)
        after = following[state]  # B W C
        after = jnp.where(after >= 0, jnp.maximum(need[after], 0), NEVER)
        kind = class_of[token]
        return after[..., kind] if token.ndim == 1 else jnp.take_along_axis(after, kind, -1)

    # A finished hypothesis is fed padding, which may lead to -1; nothing asks for what follows.
    return Processor(
        lambda b, w: (jnp.zeros((b, w), jnp.int32), jnp.zeros((b, w), jnp.int32)),
        apply,
        lambda states, token: (following[states[0], class_of[token]], states[1] + 1),
        needs=needs,
    )


def stopping(table: Table) -> Processor:
    """End a hypothesis as soon as `table` accepts what it has spelt.

    A token that the table does not know changes nothing: it cannot be forbidden.
    """
    following, class_of, need = map(jnp.asarray, table)

    def move(state, token):
        state = state.reshape(*state.shape, *(1,) * (token.ndim - 2))
        after = following[state, class_of[token]]
        return jnp.where(after >= 0, after, state)

    return Processor(
        lambda b, w: jnp.zeros((b, w), jnp.int32),
        lambda logits, _: logits,
        move,
        lambda state, token: need[move(state, token)] == 0,
    )
