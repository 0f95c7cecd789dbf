"""Speculative decoding: the next tokens are guessed, and the model checks the guesses all at once.

Every token is chosen as the one loop chooses it, from the same logits with the same noise, so that
guesses decide how many tokens a pass of the model yields, and never which. Rows advance at their
own pace, which is why this is a loop of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from jaxformer.decoding.loop import (
    Decoded,
    DecodeState,
    Finish,
    Strategy,
    begin,
    ending,
    ends_of,
    put,
)
from jaxformer.decoding.processors import Processor


def speculate(
    check: Callable[[Any, Array, Array], tuple[Array, Any]],
    keep: Callable[[Any, Array], Any],
    guess: Callable[[DecodeState, Array], tuple[Array, Any]],
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
) -> Decoded:
    """What `decode` generates with `strategy`, greedy or one sample, in fewer passes.

    `guess` is given the state and the next token "B 1", and returns the K that may follow, "B K",
    and the cache. `check` feeds 1 + K tokens of each row, before which "B" were generated, and
    returns the logits after each, "B 1+K V", and the cache; `keep` forgets all but the first "B" of
    them. A guess is kept if it is what the model draws with its own noise, so that no guess, and no
    draft model, can change the distribution; nor does the test of Leviathan et al. (2023), which
    may keep other guesses.
    """

    def choose(state: DecodeState):
        logits = processor.apply(state.logits, state.processor)
        return strategy.choose(state, logits, ends_of(processor, state.eos_ids))

    def write(state: DecodeState, token: Int[Array, "B 1"], where: Bool[Array, "B 1"]) -> Array:
        here = (jnp.arange(length) == state.length[..., None]) & where[..., None]
        return jnp.where(here, token[..., None], state.tokens)

    def body(state: DecodeState) -> DecodeState:
        choice, count = choose(state), state.length
        first = choice.token.astype(jnp.int32)
        guesses, cache = guess(state, first)
        fed = jnp.concatenate([first, guesses], 1)
        after, cache = check(cache, fed, count[:, 0])

        def emit(carry, each):
            """Write the chosen token where it is the one that was fed, and choose the next."""
            state, choice, goes = carry
            fed, logits = each
            goes = goes & ~state.done & (choice.token == fed[:, None])
            ends, goes = goes & choice.stop, goes & ~choice.stop
            ended = goes & ends_of(processor, state.eos_ids)(state.processor, choice.token)
            finish = jnp.where(ends, Finish.DEAD_END, state.finish)
            finish = jnp.where(ended, ending(choice.token, state.eos_ids), finish)
            count = state.length + goes
            state = state._replace(
                tokens=write(state, choice.token, goes),
                logits=jnp.where(goes[..., None], logits[:, None], state.logits),
                log_prob=jnp.where(goes, choice.log_prob, state.log_prob),
                length=count,
                finish=finish.astype(jnp.int32),
                done=state.done | ends | ended | (count >= state.limit[:, None]),
                processor=_where(
                    goes, processor.update(state.processor, choice.token), state.processor
                ),
            )
            return (state, choose(state), goes), None

        each = (fed.T, jnp.moveaxis(after, 1, 0).astype(jnp.float32))
        state = state._replace(cache=())
        (state, _, _), _ = jax.lax.scan(emit, (state, choice, jnp.ones_like(state.done)), each)
        return state._replace(t=state.t + 1, cache=keep(cache, (state.length - count)[:, 0]))

    state = begin(logits, cache, strategy, processor, length, limit, eos_ids, pad_id, keys)
    return strategy.finish(jax.lax.while_loop(lambda state: ~state.done.all(), body, state))


def draft(
    step: Callable[[Any, Array, Array], tuple[Array, Any]],
    strategy: Strategy,
    processor: Processor,
    k: int,
) -> Callable[[DecodeState, Array], tuple[Array, Any]]:
    """Guess what a smaller model would go on with (Leviathan et al. 2023, Chen et al. 2023).

    `step` feeds it the token "B 1" after "B" generated ones. It chooses with the same strategy,
    processor and noise, so that the two models agree as often as they can.
    """

    def guess(state: DecodeState, first: Array) -> tuple[Array, Any]:
        def body(carry: tuple[DecodeState, Array], _) -> tuple[tuple[DecodeState, Array], Array]:
            state, token = carry
            logits, cache = step(state.cache, token, state.length[:, 0])
            state = state._replace(
                logits=logits.astype(jnp.float32),
                length=state.length + 1,
                cache=cache,
                processor=processor.update(state.processor, token),
            )
            logits = processor.apply(state.logits, state.processor)
            choice = strategy.choose(state, logits, ends_of(processor, state.eos_ids))
            return (state, choice.token.astype(jnp.int32)), token

        # One step more than there are guesses, so that the last of them is in its cache too.
        (state, _), fed = jax.lax.scan(body, (state, first), length=k + 1)
        return fed[1:, :, 0].T, state.cache

    return guess


def lookup(
    prompt: Int[Array, "B P"], taken: Int[Array, " B"], k: int, longest: int = 3
) -> Callable[[DecodeState, Array], tuple[Array, Any]]:
    """Guess that the text goes on as it did before: prompt look-up (Saxena, 2023).

    Of all earlier places, the one before which most of the last `longest` tokens stood as they do
    now, and of those the latest, tells the next k. A row's prompt is its first `taken` tokens.
    """

    def guess(state, first):
        count = state.length[:, 0] + 1
        tokens = put(state.tokens, first, count - 1)[:, 0]
        at = jnp.arange(prompt.shape[1] + tokens.shape[1])
        text = jnp.pad(prompt, ((0, 0), (0, tokens.shape[1])))
        own = jnp.clip(at - taken[:, None], 0, tokens.shape[1] - 1)
        text = jnp.where(at < taken[:, None], text, jnp.take_along_axis(tokens, own, 1))
        end = (taken + count)[:, None]

        same, alike = jnp.ones(text.shape, bool), jnp.zeros(text.shape, jnp.int32)
        for back in range(1, longest + 1):
            last = jnp.take_along_axis(text, jnp.maximum(end - back, 0), 1)
            same &= (jnp.roll(text, back, 1) == last) & (at >= back)
            alike += same
        best = jnp.argmax(jnp.where(at < end, alike * at.size + at, -1), 1)[:, None]
        follows = best + jnp.arange(k) % jnp.maximum(end - best, 1)  # at the end, round again
        return jnp.take_along_axis(text, follows, 1).astype(jnp.int32), state.cache

    return guess


def _where(mask: Bool[Array, "B 1"], new: Any, old: Any) -> Any:
    """`new` where the mask is true, for leaves "B 1 ..."."""
    return jax.tree.map(
        lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 2)), a, b), new, old
    )
