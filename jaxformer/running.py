"""Decoding that is looked at on its way: text as it comes, and new rows in the place of ended ones.

A batch takes as long as its longest text. Where many wait, a row that is at its end hands its place
to the next prompt (Yu et al. 2022) instead of idling.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxformer import generate, sharding
from jaxformer.batching import pad
from jaxformer.config import DecodeConfig, ModelConfig
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding.loop import Decoded, DecodeState
from jaxformer.generate import Request, blanks, request
from jaxformer.method import Method
from jaxformer.nn.cache import slide
from jaxformer.types import Tokens

CHUNK = 16
"""Steps between two looks at which rows are at their end."""


class Look(NamedTuple):
    """How far a batch is."""

    decoded: Decoded
    done: bool


def stream_batch(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompt: Tokens,
    row_ids: Sequence[int],
    options: DecodeConfig,
    every: int,
) -> Iterator[Look]:
    """`decode_batch`, looked at after each `every` steps; the last look is what that returns."""
    method, job = request(config, tokenizer, prompt, row_ids, options)
    state = _begin(config, method, 0, params, job)
    done = False
    while not done:
        state = _advance(config, method, every, params, job, state)
        decoded, done = sharding.fetch((_ended(method, job, state), state.done.all()))
        yield Look(decoded, bool(done))


def decode_rows(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    length: int,
    row_ids: Sequence[int],
    options: DecodeConfig,
) -> Iterator[tuple[list[int], Decoded]]:
    """Decode any number of prompts, none over `length` tokens: numbers of those that came to their
    end, and what became of them. Row i draws from the key of `row_ids[i]`.

    At most `options.batch_size` are decoded at once. When a quarter of them have ended, others take
    their places in the cache.
    """
    method, whole = request(
        config, tokenizer, pad(prompts, length, tokenizer.pad_id), row_ids, options
    )

    def of(rows: Iterable[int]) -> Request:
        """The request of some rows."""
        rows = list(rows)
        return whole._replace(
            prompt=Tokens(*(x[rows] for x in whole.prompt)),
            limit=whole.limit[rows],
            row_ids=whole.row_ids[rows],
        )

    places = places_of(options, len(prompts))
    quarter = max(places // 4, 1)
    held = np.arange(places)
    waiting = list(range(places, len(prompts)))
    open_ = np.ones(places, bool)  # whose end nobody has seen yet
    job = of(held)
    state = _begin(config, method, CHUNK, params, job)
    slots = state.cache.cache.pos.shape[1]
    first = filled = int(state.cache.cache.filled)
    while open_.any():
        if filled + CHUNK * method.width > slots:
            done, t = sharding.fetch((state.done.all(1), state.t))
            used = int(np.where(done, 0, t).max()) * method.width
            state, filled = _slide(first, state, used), first + used
        state = _advance(config, method, CHUNK, params, job, state)
        filled += CHUNK * method.width
        done = sharding.fetch(state.done.all(1))
        if done.sum() < (quarter if waiting else places):
            continue
        ended = np.flatnonzero(done & open_)
        decoded = sharding.fetch(_ended(method, job, state))
        yield held[ended].tolist(), Decoded(*(leaf[ended] for leaf in decoded))
        open_[ended] = False
        free = np.flatnonzero(done)
        while waiting and len(free) >= quarter:
            size = 1 << (len(free).bit_length() - 1)  # few sizes, few compilations
            new, waiting = waiting[:size], waiting[size:]
            at, free = free[: len(new)], free[size:]
            held[at], open_[at] = new, True
            job = of(held)
            nowhere = [places] * (size - len(new))
            fresh = of(new + new[:1] * len(nowhere))
            state = _refill(
                config, method, params, fresh, state, np.concatenate([at, nowhere]).astype(int)
            )


def warm_rows(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, length: int, options: DecodeConfig
) -> None:
    """Compile what `decode_rows` runs for any number of prompts over `options.batch_size`."""
    places = places_of(options, options.batch_size)
    for method, job in blanks(config, tokenizer, places, length, options):
        state = _begin(config, method, CHUNK, params, job)
        state = _slide(int(state.cache.cache.filled), state, 0)
        state = _advance(config, method, CHUNK, params, job, state)
        sharding.fetch((state.done.all(1), _ended(method, job, state)))
        size = max(places // 4, 1)
        while size <= places:
            fresh = job._replace(
                prompt=Tokens(*(x[:size] for x in job.prompt)),
                limit=job.limit[:size],
                row_ids=job.row_ids[:size],
            )
            state = _refill(config, method, params, fresh, state, np.full(size, places))
            size *= 2


def places_of(options: DecodeConfig, prompts: int) -> int:
    """How many of so many prompts are decoded at once."""
    return 1 << (min(options.batch_size, prompts).bit_length() - 1)


def can_refill(options: DecodeConfig) -> bool:
    """Whether `decode_rows` knows how to decode so."""
    return not (options.contrastive or options.lookup)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(
    config: ModelConfig, method: Method, spare: int, params: Any, job: Request
) -> DecodeState:
    return generate.begin(config, method, params, job, spare)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def _advance(
    config: ModelConfig, method: Method, chunk: int, params: Any, job: Request, state: DecodeState
) -> DecodeState:
    return generate.advance(config, method, params, job, state, chunk, 1)


@partial(jax.jit, static_argnums=0)
def _ended(method: Method, job: Request, state: DecodeState) -> Decoded:
    return generate.ended(method, job, state)


@partial(jax.jit, static_argnums=0, donate_argnames="state")
def _slide(first: int, state: DecodeState, used: Int[Array, ""]) -> DecodeState:
    """Make room: only the last `used` slots after the prompts' belong to rows that go on."""
    cache = slide(state.cache.cache, first, used)
    return state._replace(cache=state.cache._replace(cache=cache))


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def _refill(
    config: ModelConfig,
    method: Method,
    params: Any,
    fresh: Request,
    state: DecodeState,
    places: Int[Array, " R"],
) -> DecodeState:
    """The state with the beginning of `fresh` in these places; one beyond the last is nowhere."""
    begun = generate.begin(config, method, params, fresh, CHUNK)

    filled, eos_ids = state.cache.cache.filled, state.eos_ids

    def rows_of(state: DecodeState) -> DecodeState:
        """Without what has no rows."""
        cache = state.cache.cache._replace(filled=None)
        return state._replace(cache=state.cache._replace(cache=cache), eos_ids=None)

    both = jax.tree.map(
        lambda old, new: old.at[places].set(new, mode="drop"), rows_of(state), rows_of(begun)
    )
    cache = both.cache.cache._replace(filled=filled)
    return both._replace(cache=both.cache._replace(cache=cache), eos_ids=eos_ids)
