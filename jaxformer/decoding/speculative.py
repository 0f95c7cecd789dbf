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

from jaxformer.decoding.loop import Decoded, DecodeState, Finish, Strategy, begin
from jaxformer.decoding.processors import Processor


def speculate(
    check: Callable[[Any, Array, Array], tuple[Array, Any]],
    keep: Callable[[Any, Array], Any],
    guess: Callable[[Array, Array], Array],
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

    `guess` is given the tokens "B T" of which the first "B" are there, and returns the K that may
    follow. `check` feeds 1 + K tokens of each row, before which "B" were generated, and returns the
    logits after each, "B 1+K V", and the cache; `keep` forgets all but the first "B" of them. With
    the model's own noise, to accept a guess that equals the draw is the exact test of Leviathan et
    al. (2023) for guesses that are certain.
    """
    limit = jnp.minimum(limit, length).astype(jnp.int32)

    def choose(state: DecodeState):
        return strategy.choose(state, processor.apply(state.logits, state.processor))

    def write(state: DecodeState, token: Int[Array, "B 1"], where: Bool[Array, "B 1"]) -> Array:
        here = (jnp.arange(length) == state.length[..., None]) & where[..., None]
        return jnp.where(here, token[..., None], state.tokens)

    def body(state: DecodeState) -> DecodeState:
        choice, count = choose(state), state.length
        first = choice.token.astype(jnp.int32)
        written = write(state, first, jnp.ones_like(state.done))
        fed = jnp.concatenate([first, guess(written[:, 0], count[:, 0] + 1)], 1)
        after, cache = check(state.cache, fed, count[:, 0])

        def emit(carry, each):
            """Write the chosen token where it is the one that was fed, and choose the next."""
            state, choice, goes = carry
            fed, logits = each
            goes = goes & ~state.done & (choice.token == fed[:, None])
            ends, goes = goes & choice.stop, goes & ~choice.stop
            eos = goes & jnp.isin(choice.token, state.eos_ids)
            finish = jnp.where(eos, Finish.EOS, jnp.where(ends, Finish.DEAD_END, state.finish))
            count = state.length + goes
            state = state._replace(
                tokens=write(state, choice.token, goes),
                logits=jnp.where(goes[..., None], logits[:, None], state.logits),
                log_prob=jnp.where(goes, choice.log_prob, state.log_prob),
                length=count,
                finish=finish.astype(jnp.int32),
                done=state.done | ends | eos | (count >= limit[:, None]),
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


def lookup(
    prompt: Int[Array, "B P"], taken: Int[Array, " B"], k: int, longest: int = 3
) -> Callable[[Array, Array], Array]:
    """Guess that the text goes on as it did before: prompt look-up (Saxena, 2023).

    Of all earlier places, the one before which most of the last `longest` tokens stood as they do
    now, and of those the latest, tells the next k. A row's prompt is its first `taken` tokens.
    """

    def guess(tokens, count):
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
        return jnp.take_along_axis(text, follows, 1).astype(jnp.int32)

    return guess


def _where(mask: Bool[Array, "B 1"], new: Any, old: Any) -> Any:
    """`new` where the mask is true, for leaves "B 1 ..."."""
    return jax.tree.map(
        lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 2)), a, b), new, old
    )
