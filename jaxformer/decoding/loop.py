"""The one decoding loop: process the logits, let the strategy choose, write, step the model.

The loop knows the model as a step function and never reorders its cache: the step is told which
hypothesis each one continues, and does what it must.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from jaxformer.decoding.processors import Processor


class Finish(IntEnum):
    """Why a hypothesis ended."""

    EOS = 0
    """It reached its end of sequence."""
    LIMIT = 1
    """It reached its row's limit."""
    DEAD_END = 2
    """Every next token was forbidden or is no number, or no further hypothesis exists."""
    STOP = 3
    """It spelt a text at which it was to stop."""


class Decoded(NamedTuple):
    """N hypotheses per row, best first; dead ends last."""

    tokens: Int[Array, "B N T"]
    """Padding follows the end of sequence."""
    score: Float[Array, "B N"]
    """What they are ranked by: length-normalised in beam search, else `log_prob`."""
    log_prob: Float[Array, "B N"]
    """Log-probability under the model, before any processor."""
    length: Int[Array, "B N"]
    """Tokens generated, the end of sequence included."""
    finish: Int[Array, "B N"]
    """A `Finish`."""


class DecodeState(NamedTuple):
    """Everything one step changes, for W hypotheses in each row."""

    t: Int[Array, " B"]
    """Tokens that stand before the next one, in each row."""
    tokens: Int[Array, "B W T"]
    logits: Float[Array, "B W V"]
    log_prob: Float[Array, "B W"]
    length: Int[Array, "B W"]
    finish: Int[Array, "B W"]
    done: Bool[Array, "B W"]
    cache: Any
    processor: Any
    strategy: Any
    limit: Int[Array, " B"]
    eos_ids: Int[Array, " E"]
    keys: Key[Array, " B"]


class Choice(NamedTuple):
    """One token for each hypothesis."""

    parent: Int[Array, "B W"] | None
    """The hypothesis each one continues; None if each continues itself."""
    token: Int[Array, "B W"]
    log_prob: Float[Array, "B W"]
    """Of the whole hypothesis, this token included, under the model."""
    stop: Bool[Array, "B W"]
    """Nothing was chosen: the hypothesis ends as it stands."""
    state: Any
    """The strategy's own."""


class Strategy(NamedTuple):
    """How tokens are chosen, from `width` hypotheses in each row."""

    width: int
    init: Callable[[Array, Array], Any]
    """(tokens "B W T", limit "B") -> the strategy's own state."""
    choose: Callable[[DecodeState, Array, "Ends"], Choice]
    """(state, processed logits "B W V", what ends a hypothesis) -> choice."""
    finish: Callable[[DecodeState], Decoded]


Ends = Callable[[Any, Int[Array, "B W ..."]], Bool[Array, "B W ..."]]
"""(the processor's state, tokens) -> whether each would end its hypothesis."""


@runtime_checkable
class Step(Protocol):
    """The model: feed one token per hypothesis, get the logits of the next."""

    def __call__(
        self,
        cache: Any,
        tokens: Int[Array, "B W"],
        parent: Int[Array, "B W"] | None,
        t: Int[Array, " B"],
        /,
    ) -> tuple[Float[Array, "B W V"], Any]: ...


def decode(
    step: Step,
    logits: Float[Array, "B V"],
    cache: Any,
    strategy: Strategy,
    processor: Processor,
    *,
    length: int,
    limit: Int[Array, " B"],
    eos_ids: Sequence[int] | Int[Array, " E"],
    pad_id: int | Int[Array, ""],
    keys: Key[Array, " B"],
    chunk: int = 8,
) -> Decoded:
    """Generate at most `length` (at least 1) tokens after prompts whose last logits are given:
    `begin`, `advance` and the strategy's `finish`, for any model that is a `Step`.

    Any of `eos_ids` ends a hypothesis, and whatever else the processor says does.
    A row stops at its own `limit`, and draws only from its own key, so that its samples do not
    depend on its batch. All rows are checked for their end once in `chunk` steps.
    """
    state = begin(logits, cache, strategy, processor, length, limit, eos_ids, pad_id, keys)
    chunk = -(-length // -(-length // chunk))  # as few steps past the end as this many chunks allow
    return strategy.finish(advance(step, state, strategy, processor, pad_id=pad_id, chunk=chunk))


def begin(
    logits: Float[Array, "B V"],
    cache: Any,
    strategy: Strategy,
    processor: Processor,
    length: int,
    limit: Int[Array, " B"],
    eos_ids: Sequence[int] | Int[Array, " E"],
    pad_id: int | Int[Array, ""],
    keys: Key[Array, " B"],
) -> DecodeState:
    """The state before the first of at most `length` tokens."""
    (rows, vocabulary), width = logits.shape, strategy.width
    limit = jnp.minimum(limit, length).astype(jnp.int32)
    tokens = jnp.full((rows, width, length), pad_id, jnp.int32)
    return DecodeState(
        t=jnp.zeros(rows, jnp.int32),
        tokens=tokens,
        logits=jnp.broadcast_to(logits[:, None], (rows, width, vocabulary)).astype(jnp.float32),
        log_prob=jnp.zeros((rows, width), jnp.float32),
        length=jnp.zeros((rows, width), jnp.int32),
        finish=jnp.full((rows, width), int(Finish.LIMIT), jnp.int32),
        done=jnp.broadcast_to(limit[:, None] <= 0, (rows, width)),
        cache=cache,
        processor=processor.init(rows, width),
        strategy=strategy.init(tokens, limit),
        limit=limit,
        eos_ids=jnp.asarray(eos_ids, jnp.int32),
        keys=keys,
    )


def advance(
    step: Step,
    state: DecodeState,
    strategy: Strategy,
    processor: Processor,
    *,
    pad_id: int | Int[Array, ""],
    chunk: int,
    chunks: int | Int[Array, ""] | None = None,
) -> DecodeState:
    """The state after `chunks` times `chunk` more steps, or once all rows are at their end."""

    def body(state: DecodeState, _) -> tuple[DecodeState, None]:
        ends = ends_of(processor, state.eos_ids)
        choice = strategy.choose(state, processor.apply(state.logits, state.processor), ends)
        old = gather(
            (state.tokens, state.log_prob, state.length, state.finish, state.done, state.processor),
            choice.parent,
        )
        tokens, log_prob, count, finish, done, processed = old
        idle = done | choice.stop
        token = jnp.where(idle, pad_id, choice.token).astype(jnp.int32)
        ended = ~idle & ends(processed, choice.token)
        finish = jnp.where(ended, ending(choice.token, state.eos_ids), finish)
        next_logits, cache = step(state.cache, token, choice.parent, state.t)
        return state._replace(
            t=state.t + 1,
            tokens=put(tokens, token, state.t),
            logits=next_logits.astype(jnp.float32),
            log_prob=jnp.where(idle, log_prob, choice.log_prob),
            length=jnp.where(idle, count, count + 1),
            finish=jnp.where(choice.stop & ~done, Finish.DEAD_END, finish).astype(jnp.int32),
            done=idle | ended | (state.t + 1 >= state.limit)[:, None],
            cache=cache,
            processor=processor.update(processed, token),
            strategy=choice.state,
        ), None

    def goes_on(carry: tuple[DecodeState, Array]) -> Array:
        state, n = carry
        return ~state.done.all() & (True if chunks is None else n < chunks)

    return jax.lax.while_loop(
        goes_on,
        lambda carry: (jax.lax.scan(body, carry[0], length=chunk)[0], carry[1] + 1),
        (state, jnp.int32(0)),
    )[0]


def ends_of(processor: Processor, eos_ids: Int[Array, " E"]) -> Ends:
    """What ends a hypothesis: an end of sequence, and what the processor says does."""
    return lambda state, token: jnp.isin(token, eos_ids) | processor.ends(state, token)


def ending(token: Int[Array, "..."], eos_ids: Int[Array, " E"]) -> Int[Array, "..."]:
    """The `Finish` of a hypothesis that this token ended."""
    return jnp.where(jnp.isin(token, eos_ids), Finish.EOS, Finish.STOP).astype(jnp.int32)


def put(
    tokens: Int[Array, "B W T"], token: Int[Array, "B W"], at: Int[Array, " B"]
) -> Int[Array, "B W T"]:
    """`tokens` with `token` in the place `at` of its row."""
    here = jnp.arange(tokens.shape[-1]) == at[:, None, None]
    return jnp.where(here, token[..., None], tokens)


def gather(tree: Any, parent: Int[Array, "B W"] | None) -> Any:
    """Let the leaves "B W ..." follow their parents; None moves nothing."""
    if parent is None:
        return tree
    return jax.tree.map(lambda x: jax.vmap(lambda row, at: row[at])(x, parent), tree)
