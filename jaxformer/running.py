"""Decoding that is looked at on its way: text as it comes, and new rows in the place of ended ones.

A batch takes as long as its longest text. Where many wait, a row that is at its end hands its place
to the next prompt (Yu et al. 2022) instead of idling.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from jaxformer import generate, sharding
from jaxformer.batching import pad
from jaxformer.config import DecodeConfig, ModelConfig
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding.loop import Decoded, DecodeState
from jaxformer.generate import BY_ROW, Request, blanks, request, with_cache
from jaxformer.method import Method
from jaxformer.nn.cache import slide
from jaxformer.sharding import over_rows
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
    # Copies on several devices all decode it, for one row cannot be cut.
    state = _begin(None, config, method, 0, params, job)
    done = False
    while not done:
        state = _advance(None, config, method, every, params, job, state)
        decoded, done = sharding.fetch((_ended(None, method, job, state), state.done.all()))
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

    Each device that holds a copy of the model decodes at most `options.batch_size` at once. When a
    quarter of all have ended, others take their places in the caches.
    """
    method, whole = request(
        config, tokenizer, pad(prompts, length, tokenizer.pad_id), row_ids, options
    )

    mesh = sharding.copies(params)
    parts = sharding.parts_of(mesh)
    places = places_of(options, max(len(prompts) // parts, 1))  # of each device
    held = np.arange(parts * places) % len(prompts)
    waiting = list(range(len(held), len(prompts)))
    open_ = np.arange(len(held)) < len(prompts)  # whose end nobody has seen yet
    job = _of(whole, held)
    state = _begin(mesh, config, method, CHUNK, params, job)
    slots = state.cache.cache.pos.shape[1]
    first = filled = _look(state)[1]
    while open_.any():
        if filled + CHUNK * method.width > slots:
            state = _slide(mesh, first, state)
        state = _advance(mesh, config, method, CHUNK, params, job, state)
        done, filled = _look(state)
        if done.sum() < (max(len(held) // 4, 1) if waiting else len(held)):
            continue
        ended = np.flatnonzero(done & open_)
        decoded = sharding.fetch(_ended(mesh, method, job, state))
        yield held[ended].tolist(), Decoded(*(leaf[ended] for leaf in decoded))
        open_[ended] = False
        free = [np.flatnonzero(part) for part in done.reshape(parts, places)]
        least = max(places // 4, 1)
        while waiting and max(map(len, free)) >= least:
            shares = deal(len(waiting), list(map(len, free)))
            size = max(1 << (max(shares).bit_length() - 1), least)  # few sizes, few compilations
            at = np.full((parts, size), places)  # beyond the last is nowhere
            new = np.full((parts, size), waiting[0])
            for part, n in enumerate(min(share, size) for share in shares):
                mine, waiting = waiting[:n], waiting[n:]
                at[part, :n], free[part] = free[part][:n], free[part][n:]
                new[part, :n] = mine
                rows = part * places + at[part, :n]
                held[rows], open_[rows] = mine, True
            job, fresh = _of(whole, held), _of(whole, new.ravel())
            state = _refill(mesh, config, method, params, fresh, state, at.ravel())


def deal(n: int, room: Sequence[int]) -> list[int]:
    """How many of `n` each is dealt, one by one, of those that have room.

    >>> deal(6, [0, 1, 4, 3]), deal(9, [1, 1])
    ([0, 1, 3, 2], [1, 1])
    """
    shares = [0] * len(room)
    while n and shares != list(room):
        for i, most in enumerate(room):
            if n and shares[i] < most:
                shares[i], n = shares[i] + 1, n - 1
    return shares


def warm_rows(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, length: int, options: DecodeConfig
) -> None:
    """Compile what `decode_rows` runs for more prompts than are decoded at once."""
    mesh = sharding.copies(params)
    parts = sharding.parts_of(mesh)
    places = places_of(options, options.batch_size)
    several = max(parts * places, 2)  # so many may begin alike
    for method, whole in blanks(config, tokenizer, several, length, options, parts):
        job = _of(whole, range(parts * places))
        state = _begin(mesh, config, method, CHUNK, params, job)
        state = _slide(mesh, _look(state)[1], state)
        state = _advance(mesh, config, method, CHUNK, params, job, state)
        sharding.fetch((_look(state), _ended(mesh, method, job, state)))
        size = max(places // 4, 1)
        while size <= places:
            fresh = _of(whole, range(parts * size))
            nowhere = np.full(parts * size, places)
            state = _refill(mesh, config, method, params, fresh, state, nowhere)
            size *= 2


def places_of(options: DecodeConfig, prompts: int) -> int:
    """How many of so many prompts a device decodes at once."""
    return 1 << (min(options.batch_size, prompts).bit_length() - 1)


def can_refill(options: DecodeConfig) -> bool:
    """Whether `decode_rows` knows how to decode so."""
    return not (options.contrastive or options.lookup)


def _of(job: Request, rows: Iterable[int]) -> Request:
    """The request of some of its rows."""
    rows = list(rows)
    return job._replace(
        prompt=Tokens(*(x[rows] for x in job.prompt)),
        limit=job.limit[rows],
        row_ids=job.row_ids[rows],
    )


def _look(state: DecodeState) -> tuple[Bool[np.ndarray, " B"], int]:
    """Which rows are at their end, and how many slots are written where most are."""
    done, filled = sharding.fetch((state.done.all(1), state.cache.cache.filled))
    return done, int(filled.max())


def _apart(state: DecodeState) -> DecodeState:
    """The state as it is kept. What has no rows is each device's own: one whose rows have all ended
    fills no more slots."""
    return with_cache(state, lambda cache: cache._replace(filled=cache.filled[None]))


def _own(state: DecodeState) -> DecodeState:
    """What a device has of a state that is kept."""
    return with_cache(state, lambda cache: cache._replace(filled=cache.filled[0]))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _begin(
    mesh: Mesh | None, config: ModelConfig, method: Method, spare: int, params: Any, job: Request
) -> DecodeState:
    def begin(params: Any, job: Request) -> DecodeState:
        return _apart(generate.begin(config, method, params, job, spare))

    return over_rows(mesh, begin, False, BY_ROW)(params, job)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames="state")
def _advance(
    mesh: Mesh | None,
    config: ModelConfig,
    method: Method,
    chunk: int,
    params: Any,
    job: Request,
    state: DecodeState,
) -> DecodeState:
    def advance(params: Any, job: Request, state: DecodeState) -> DecodeState:
        return _apart(generate.advance(config, method, params, job, _own(state), chunk, 1))

    return over_rows(mesh, advance, False, BY_ROW, True)(params, job, state)


@partial(jax.jit, static_argnums=(0, 1))
def _ended(mesh: Mesh | None, method: Method, job: Request, state: DecodeState) -> Decoded:
    return over_rows(mesh, partial(generate.ended, method), BY_ROW, True)(job, state)


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def _slide(mesh: Mesh | None, first: int, state: DecodeState) -> DecodeState:
    """Make room: only the last slots after the prompts' belong to rows that go on."""

    def slid(state: DecodeState) -> DecodeState:
        used = jnp.where(state.done.all(1), 0, state.t).max() * state.done.shape[1]
        return _apart(with_cache(_own(state), lambda cache: slide(cache, first, used)))

    return over_rows(mesh, slid, True)(state)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def _refill(
    mesh: Mesh | None,
    config: ModelConfig,
    method: Method,
    params: Any,
    fresh: Request,
    state: DecodeState,
    places: Int[Array, " R"],
) -> DecodeState:
    """The state with the beginning of `fresh` in these places of each device; one beyond the last
    is nowhere."""

    def refilled(params: Any, fresh: Request, state: DecodeState, places: Array) -> DecodeState:
        begun = generate.begin(config, method, params, fresh, CHUNK)

        def rows_of(state: DecodeState) -> DecodeState:
            """Without what has no rows."""
            state = with_cache(state, lambda cache: cache._replace(filled=None))
            return state._replace(eos_ids=None)

        both = jax.tree.map(
            lambda old, new: old.at[places].set(new, mode="drop"), rows_of(state), rows_of(begun)
        )
        both = with_cache(both, lambda cache: cache._replace(filled=state.cache.cache.filled))
        return both._replace(eos_ids=state.eos_ids)

    return over_rows(mesh, refilled, False, BY_ROW, True, True)(params, fresh, state, places)
