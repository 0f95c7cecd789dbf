"""Prompts in, tokens out: what is compiled to encode, prefill and decode a batch.

Another temperature, seed or top-p compiles nothing. `decode_batch` is all of it at once; `begin`,
`advance` and `ended` are its parts, for those who look in between.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxformer import sharding
from jaxformer.batching import pad, power_of_two, shortest
from jaxformer.config import DecodeConfig, ModelConfig
from jaxformer.constraining import compile_stops, compile_table, constraints
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding import loop, processors, strategies
from jaxformer.decoding.beam_sample import beam_sample
from jaxformer.decoding.constraints import Table, constrained, stopping
from jaxformer.decoding.contrastive import contrastive
from jaxformer.decoding.diverse import diverse
from jaxformer.decoding.loop import Decoded, DecodeState, Step, Strategy
from jaxformer.decoding.speculative import draft, lookup, speculate
from jaxformer.method import Method, Numbers, method_of, numbers_of, processors_of, truncations
from jaxformer.nn.cache import (
    Cache,
    follow,
    init_cache,
    keep,
    narrow,
    repeat,
    share_prompt,
    widen,
)
from jaxformer.nn.transformer import apply, pack, unstack
from jaxformer.types import Tokens

CHUNK = 8
"""Steps between two looks at whether all rows are at their end."""
LEAST_SHARED = 32
"""Tokens that prompts begin with alike, from which on they are read once."""


class Small(NamedTuple):
    """A smaller model of the same tokens, whose guesses a larger one checks."""

    config: ModelConfig
    params: Any
    """As `prepare` made them."""


class Request(NamedTuple):
    """What a batch is decoded from, besides the parameters; none of it is compiled for."""

    prompt: Tokens
    """What an encoder reads or, without one, what the decoder is to continue."""
    limit: Int[Array, " B"]
    row_ids: Int[Array, " B"] | Int[np.ndarray, " B"]
    """Rows draw from the keys of these numbers."""
    numbers: Numbers
    seed: int
    table: Table | None
    """What texts are constrained to."""
    stops: Table | None
    """The texts at which they end."""


BY_ROW: Any = Request._make([True] * 3 + [False] * 4)
"""Which parts of a request have rows."""


class Carried(NamedTuple):
    """What a step hands to the next."""

    cache: Cache
    hidden: Float[Array, "B W D"] | None
    """The last hidden states, for the strategy that reads them."""


def prepare(params: Any) -> Any:
    """Parameters as `decode_batch` takes them, made once for many batches."""
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    devices = {device for leaf in arrays for device in leaf.devices()}
    return _prepare({device.platform for device in devices} == {"cpu"}, params)


@partial(jax.jit, static_argnums=0)
def _prepare(packed: bool, params: Any) -> Any:
    apart = unstack(params)
    return pack(apart) if packed else apart


def request(
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompt: Tokens,
    row_ids: Sequence[int],
    options: DecodeConfig,
) -> tuple[Method, Request]:
    """What to compile for a padded batch of prompts, and what to run it on."""
    lengths = prompt.seg.sum(1)
    taken = np.ones_like(lengths) if config.n_encoder_layers else lengths
    most = options.max_length or config.max_length
    limit = np.minimum(config.max_length - taken, most)
    # By the shortest prompt that the bucket may have, so that a bucket is compiled for once.
    least = min(int(taken.min()), shortest(prompt.ids.shape[1]))
    length = power_of_two(min(config.max_length - least, most), 16)
    length = min(length, config.max_length)
    method = method_of(config, tokenizer, options, length)
    if not config.n_encoder_layers:
        method = method._replace(shared=shared(prompt))
    table = stops = None
    if wanted := constraints(options):
        table = compile_table(
            wanted, tokenizer, config.vocab_size, options.suppress, options.forced_first
        )
    if options.stop:
        stops = compile_stops(options.stop, tokenizer, config.vocab_size)
    ids: Any = np.zeros(len(lengths), np.int32)
    ids[: len(row_ids)] = row_ids
    return method, Request(prompt, limit, ids, numbers_of(options), options.seed, table, stops)


def blanks(
    config: ModelConfig,
    tokenizer: Tokenizer,
    rows: int,
    length: int,
    options: DecodeConfig,
    parts: int = 1,
) -> Iterator[tuple[Method, Request]]:
    """Whatever `request` may say to compile for `rows` prompts in the bucket `length`, and such
    prompts, of which no token is asked."""
    prompt = pad([[0] * shortest(length)] * rows, length, tokenizer.pad_id, parts)
    method, job = request(config, tokenizer, prompt, range(rows), options)
    job = job._replace(limit=0 * job.limit)
    yield method._replace(shared=0), job
    n = LEAST_SHARED
    while method.shared >= n:  # they are all the same
        yield method._replace(shared=n), job
        n *= 2


def shared(prompt: Tokens, least: int = LEAST_SHARED) -> int:
    """How many tokens, a power of two and at least `least`, all prompts begin with alike; or 0.

    After them at least one token of each prompt is left.
    """
    ids, rows = np.asarray(prompt.ids), len(prompt.ids)
    alike = int((ids == ids[0]).all(0).cumprod().sum())
    alike = min(alike, int(prompt.seg.sum(1).min()) - 1)
    return 1 << (alike.bit_length() - 1) if rows > 1 and alike >= least else 0


def decode_batch(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompt: Tokens,
    row_ids: Sequence[int],
    options: DecodeConfig,
    small: Small | None = None,
) -> Decoded:
    """Decode one padded batch of prompts, whose rows draw from the keys of `row_ids`; on the host.
    The parameters are those that `prepare` made.

    Where several devices hold a copy of the model each decodes its share of the rows, whose number
    they must divide.
    """
    method, job = request(config, tokenizer, prompt, row_ids, options)
    return _run(config, params, method, job, options, small)


def warm_batch(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    rows: int,
    length: int,
    options: DecodeConfig,
    small: Small | None = None,
) -> None:
    """Compile what `decode_batch` runs for `rows` prompts, padded to the bucket `length`."""
    parts = sharding.parts_of(sharding.copies(params))
    for method, job in blanks(config, tokenizer, rows, length, options, parts):
        _run(config, params, method, job, options, small)


def _run(
    config: ModelConfig,
    params: Any,
    method: Method,
    job: Request,
    options: DecodeConfig,
    small: Small | None,
) -> Decoded:
    smaller = guesser = None
    if small is not None:
        (smaller, guesser), method = small, method._replace(guesses=options.guesses)
    mesh = sharding.copies(params)
    return sharding.fetch(_decode(mesh, config, smaller, method, params, guesser, job))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode(
    mesh: Mesh | None,
    config: ModelConfig,
    smaller: ModelConfig | None,
    method: Method,
    params: Any,
    small: Any,
    job: Request,
) -> Decoded:
    """Encode, prefill and decode a batch of prompts, over devices that each hold the model."""

    def decode(params: Any, small: Any, job: Request) -> Decoded:
        if method.guesses:
            return _speculate(config, smaller, method, params, small, job)
        state = begin(config, method, params, job)
        return ended(method, job, advance(config, method, params, job, state))

    return sharding.over_rows(mesh, decode, False, False, BY_ROW)(params, small, job)


def begin(
    config: ModelConfig, method: Method, params: Any, job: Request, spare: int = 0
) -> DecodeState:
    """The state before the first token, with room in the cache for `spare` more of them."""
    slots = (method.length + spare) * method.width
    read = read_prompt(config, method, params, job.prompt, slots)
    processor = _processor(config, method, job)
    strategy = _strategy(method, job, processor.needs, read)
    now = jnp.broadcast_to(read.last[:, None], (len(read.last), method.width, config.d_model))
    return loop.begin(
        _head(config, method, params)(read.last),
        Carried(share_prompt(read.cache, method.width), now if method.contrastive else None),
        strategy,
        processor,
        method.length,
        job.limit,
        method.stop_ids,
        method.pad_id,
        jax.vmap(partial(jax.random.fold_in, jax.random.key(job.seed)))(job.row_ids),
    )


def advance(
    config: ModelConfig,
    method: Method,
    params: Any,
    job: Request,
    state: DecodeState,
    chunk: int = CHUNK,
    chunks: int | Int[Array, ""] | None = None,
) -> DecodeState:
    """The state after `chunks` times `chunk` more steps, or once all rows are at their end."""
    step = _step(config, method, params, _target(config, method, job.prompt).seg.sum(1))
    processor = _processor(config, method, job)
    strategy = _strategy(method, job, processor.needs)
    state = with_cache(state, narrow)
    state = loop.advance(
        step, state, strategy, processor, pad_id=method.pad_id, chunk=chunk, chunks=chunks
    )
    return with_cache(state, widen)


def with_cache(state: DecodeState, change: Callable[[Cache], Cache]) -> DecodeState:
    """The state with its cache changed."""
    return state._replace(cache=state.cache._replace(cache=change(state.cache.cache)))


def ended(method: Method, job: Request, state: DecodeState) -> Decoded:
    return _strategy(method, job).finish(state)


class Read(NamedTuple):
    """A prompt that the decoder has read."""

    hidden: Float[Array, "B P D"]
    there: Bool[Array, "B P"]
    """Where its tokens are."""
    last: Float[Array, "B D"]
    """The hidden state of the last of them."""
    cache: Cache


def read_prompt(
    config: ModelConfig, method: Method, params: Any, prompt: Tokens, slots: int
) -> Read:
    """Encode and prefill, into a cache with room for `slots` slots after the prompt.

    Tokens with which all prompts begin are read once; a long prompt is read in pieces, so that
    activations never take more than a piece does.
    """
    run = partial(apply, config, params)
    rows, memory, memory_seg = prompt.ids.shape[0], None, None
    target = _target(config, method, prompt)
    if config.n_encoder_layers:
        memory, memory_seg = run(prompt, method="encode"), prompt.seg

    first, length = method.shared, target.ids.shape[1]
    pieces = -(-(length - first) // method.prefill)
    piece = -(-(length - first) // pieces)
    room = (0, 0), (0, first + pieces * piece - length)
    rest = Tokens(*(jnp.pad(x[:, first:], room) for x in target))
    slots += first + pieces * piece
    cache = init_cache(config, rows, slots, prompt.ids.shape[1] if config.n_encoder_layers else 0)
    before = None
    if first:
        begun = Tokens(*(x[:1, :first] for x in target))
        before, cache = run(begun, None, None, init_cache(config, 1, first), method="decode")
        before, cache = jnp.repeat(before, rows, 0), repeat(cache, rows, slots)
    if pieces == 1:
        hidden, cache = run(rest, memory, memory_seg, cache, method="decode")
    else:

        def read(cache: Cache, tokens: Tokens) -> tuple[Cache, Array]:
            hidden, cache = run(tokens, None, None, cache, method="decode")
            return cache, hidden

        cut = Tokens(*(x.reshape(rows, pieces, piece).swapaxes(0, 1) for x in rest))
        cache, hidden = jax.lax.scan(read, cache, cut)
        hidden = hidden.swapaxes(0, 1).reshape(rows, pieces * piece, -1)
    hidden = hidden[:, : length - first]
    hidden = hidden if before is None else jnp.concatenate([before, hidden], 1)
    taken = target.seg.sum(1)
    last = jnp.take_along_axis(hidden, (taken - 1)[:, None, None], axis=1)[:, 0]
    return Read(hidden, target.seg > 0, last, cache)


def _target(config: ModelConfig, method: Method, prompt: Tokens) -> Tokens:
    """What the decoder is to continue."""
    if not config.n_encoder_layers:
        return prompt
    ones = jnp.ones((prompt.ids.shape[0], 1), jnp.int32)
    return Tokens(ones * method.start_id, ones * 0, ones)


def _head(config: ModelConfig, method: Method, params: Any) -> Callable[[Array], Array]:
    """Logits; for beam search under a penalty that is no mere difference, log-probabilities."""

    def head(hidden: Array) -> Array:
        logits = apply(config, params, hidden, method="unembed")
        if method.beams > 1 and {"repetition_penalty", "length_decay"} & set(method.on):
            return jax.nn.log_softmax(logits.astype(jnp.float32))
        return logits

    return head


def _step(config: ModelConfig, method: Method, params: Any, taken: Int[Array, " B"]) -> Step:
    """One token for each hypothesis of a row, as that many queries, after a prompt of `taken`."""
    head = _head(config, method, params)

    def step(
        carried: Carried, tokens: Array, parent: Array | None, t: Array
    ) -> tuple[Array, Carried]:
        pos = jnp.broadcast_to((taken + t)[:, None], tokens.shape)
        queries = Tokens(tokens, pos, jnp.ones_like(tokens))
        cache = follow(widen(carried.cache), parent)
        hidden, cache = apply(config, params, queries, None, None, cache, method="decode")
        return head(hidden), Carried(narrow(cache), hidden if method.contrastive else None)

    return step


def _processor(config: ModelConfig, method: Method, job: Request) -> processors.Processor:
    target = _target(config, method, job.prompt)
    parts = processors_of(config, method, job.numbers, job.limit, target, job.prompt)
    if job.table is not None:  # a forced end takes the last place
        parts.append(constrained(job.table, job.limit - (method.forced_last >= 0)))
    if job.stops is not None:
        parts.append(stopping(job.stops))
    if method.sampling:
        parts += truncations(method, job.numbers)
    return processors.chain(*parts)


def _speculate(
    config: ModelConfig,
    smaller: ModelConfig | None,
    method: Method,
    params: Any,
    small: Any,
    job: Request,
) -> Decoded:
    """`_decode` with tokens guessed ahead: by a smaller model or, without one, from the text."""
    fed, rows = 1 + method.guesses, len(job.limit)
    # A pass takes as many slots as its luckiest row keeps tokens.
    slots = method.length * min(rows, fed) + fed
    read = read_prompt(config, method, params, job.prompt, slots)
    taken = read.there.sum(1)
    strategy, processor = _strategy(method, job), _processor(config, method, job)

    def feed(
        config: ModelConfig, params: Any, cache: Cache, tokens: Array, count: Array
    ) -> tuple[Array, Cache]:
        """The logits after each of `tokens`; those beyond a row's limit are as padding."""
        there = count[:, None] + jnp.arange(tokens.shape[1])
        pos = jnp.minimum(taken[:, None] + there, config.max_length - 1)
        queries = Tokens(tokens, pos, (there < job.limit[:, None]).astype(jnp.int32))
        hidden, cache = apply(config, params, queries, None, None, cache, method="decode")
        return apply(config, params, hidden, method="unembed"), cache

    if smaller is None:
        known = jnp.minimum(job.prompt.ids, config.vocab_size - 1)
        guess, other = lookup(known, job.prompt.seg.sum(1), method.guesses), None
    else:
        other = read_prompt(smaller, method, small, job.prompt, slots).cache

        def step(caches: tuple, token: Array, count: Array) -> tuple[Array, tuple]:
            logits, cache = feed(smaller, small, caches[1], token, count)
            # Of a vocabulary that is padded otherwise, what both have.
            missing = config.vocab_size - logits.shape[-1]
            room = [(0, 0)] * 2 + [(0, max(missing, 0))]
            logits = jnp.pad(logits[..., : config.vocab_size], room, constant_values=-jnp.inf)
            return logits, (caches[0], cache)

        guess = draft(step, strategy, processor, method.guesses)

    def check(caches: tuple, tokens: Array, count: Array) -> tuple[Array, tuple]:
        logits, cache = feed(config, params, caches[0], tokens, count)
        return logits, (cache, caches[1])

    def kept(caches: tuple, count: Array) -> tuple:
        return tuple(None if cache is None else keep(cache, fed, count) for cache in caches)

    return speculate(
        check,
        kept,
        guess,
        _head(config, method, params)(read.last),
        (read.cache, other),
        strategy,
        processor,
        length=method.length,
        limit=job.limit,
        eos_ids=method.stop_ids,
        pad_id=method.pad_id,
        keys=jax.vmap(partial(jax.random.fold_in, jax.random.key(job.seed)))(job.row_ids),
    )


def _strategy(
    method: Method, job: Request, needs: Any = None, read: Read | None = None
) -> Strategy:
    """How tokens are chosen, with what the processor says that texts need; to begin with, after a
    prompt that was read. To finish takes neither."""
    width, numbers = method.width, job.numbers
    if method.contrastive:
        prompt = (None, None) if read is None else (read.hidden, read.there)
        return contrastive(width, numbers.penalty_alpha, lambda c: c.hidden, *prompt)
    if method.beams > 1:
        size = width // method.groups
        search = strategies.beam(
            size,
            numbers.length_penalty,
            method.norm,
            method.early_stopping,
            many_ends=job.stops is not None,
            needs=needs if method.banks else None,
        )
        if method.sampling:
            return beam_sample(search)
        return diverse(search, method.groups, numbers.diversity) if method.groups > 1 else search
    return strategies.sample(width) if method.sampling else strategies.greedy()
