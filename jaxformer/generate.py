"""Prompts in, tokens out: what is compiled to encode, prefill and decode a batch.

Another temperature, seed or top-p compiles nothing.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxformer import sharding
from jaxformer.batching import power_of_two
from jaxformer.config import DecodeConfig, ModelConfig
from jaxformer.constraining import compile_table, constraints
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding import processors, strategies
from jaxformer.decoding.beam_sample import beam_sample
from jaxformer.decoding.constraints import Table, constrained
from jaxformer.decoding.contrastive import contrastive
from jaxformer.decoding.diverse import diverse
from jaxformer.decoding.loop import Decoded, Strategy, decode
from jaxformer.decoding.speculative import lookup, speculate
from jaxformer.method import Method, Numbers, method_of, numbers_of, processors_of, truncations
from jaxformer.nn.cache import Cache, follow, init_cache, keep, share_prompt
from jaxformer.nn.transformer import apply, pack, unstack
from jaxformer.types import Tokens


class Carried(NamedTuple):
    """What a step hands to the next."""

    cache: Cache
    hidden: Float[Array, "B W D"] | None
    """The last hidden states, for the strategy that reads them."""


def prepare(params: Any) -> Any:
    """Parameters as `decode_batch` takes them, made once for many batches."""
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    devices = {device for leaf in arrays for device in leaf.devices()}
    return _prepare([device.platform for device in devices] == ["cpu"], params)


@partial(jax.jit, static_argnums=0)
def _prepare(packed: bool, params: Any) -> Any:
    apart = unstack(params)
    return pack(apart) if packed else apart


def decode_batch(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompt: Tokens,
    row_ids: Sequence[int],
    options: DecodeConfig,
) -> Decoded:
    """Decode one padded batch of prompts, whose rows draw from the keys of `row_ids`; on the host.
    The parameters are those that `prepare` made.

    What an encoder reads or, without one, what the decoder is to continue. Where several devices
    hold a copy of the model each decodes its share of the rows, whose number they must divide.
    """
    lengths = prompt.seg.sum(1)
    taken = np.ones_like(lengths) if config.n_encoder_layers else lengths
    room = config.max_length - taken
    limit = np.minimum(room, options.max_length) if options.max_length else room
    length = min(power_of_two(int(limit.max()), 16), config.max_length)
    method = method_of(config, tokenizer, options, length)
    numbers = numbers_of(options)
    table = None
    if wanted := constraints(options):
        table = compile_table(
            wanted, tokenizer, config.vocab_size, options.suppress, options.forced_first
        )
    ids = np.zeros(len(lengths), np.int32)
    ids[: len(row_ids)] = row_ids
    arguments = (params, prompt, limit, numbers, options.seed, ids, table)
    mesh = sharding.copies(params)
    if mesh is None:
        return sharding.fetch(_decode(config, method, *arguments))
    return sharding.fetch(_decode_over(mesh, config, method, *arguments))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode_over(mesh: Mesh, config: ModelConfig, method: Method, *arguments: Any) -> Decoded:
    """`_decode` with the rows cut over devices that each hold the model, and never talk."""
    rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(
        partial(_decode, config, method),
        mesh=mesh,
        in_specs=(whole, rows, rows, whole, whole, rows, whole),
        out_specs=rows,
        check_vma=False,
    )(*arguments)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(
    config: ModelConfig,
    method: Method,
    params: Any,
    prompt: Tokens,
    limit: Int[Array, " B"],
    numbers: Numbers,
    seed: Int[Array, ""],
    row_ids: Int[Array, " B"],
    table: Table | None = None,
) -> Decoded:
    """Encode, prefill and decode a batch of prompts."""
    run = partial(apply, config, params)
    rows, width = prompt.ids.shape[0], method.width
    memory = memory_seg = None
    target = prompt
    if config.n_encoder_layers:
        memory, memory_seg = run(prompt, method="encode"), prompt.seg
        ones = jnp.ones((rows, 1), jnp.int32)
        target = Tokens(ones * method.start_id, ones * 0, ones)
    taken = target.seg.sum(1)

    slots = target.ids.shape[1] + method.length * width
    fed = 1 + method.lookup
    if method.lookup:  # a pass takes as many slots as its luckiest row keeps tokens
        slots += method.length * (min(rows, fed) - 1) + fed
    cache = init_cache(config, rows, slots, prompt.ids.shape[1] if config.n_encoder_layers else 0)
    hidden, cache = run(target, memory, memory_seg, cache, method="decode")
    last = jnp.take_along_axis(hidden, (taken - 1)[:, None, None], axis=1)[:, 0]

    def head(hidden: Array) -> Array:
        """Logits; for beam search under a penalty that is no mere difference, log-probabilities."""
        logits = run(hidden, method="unembed")
        if method.beams > 1 and {"repetition_penalty", "length_decay"} & set(method.on):
            return jax.nn.log_softmax(logits.astype(jnp.float32))
        return logits

    def step(
        carried: Carried, tokens: Array, parent: Array | None, t: Array
    ) -> tuple[Array, Carried]:
        """One token for each of the `width` hypotheses, as that many queries of its row."""
        pos = jnp.broadcast_to(taken[:, None] + t, tokens.shape)
        queries = Tokens(tokens, pos, jnp.ones_like(tokens))
        cache = follow(carried.cache, parent)
        hidden, cache = run(queries, None, None, cache, method="decode")
        return head(hidden), Carried(cache, hidden if method.contrastive else None)

    def check(carried: Carried, tokens: Array, count: Array) -> tuple[Array, Carried]:
        """A token of each row and the guesses after it; those beyond its limit are as padding."""
        there = count[:, None] + jnp.arange(fed)
        pos = jnp.minimum(taken[:, None] + there, config.max_length - 1)
        queries = Tokens(tokens, pos, (there < limit[:, None]).astype(jnp.int32))
        hidden, cache = run(queries, None, None, carried.cache, method="decode")
        return run(hidden, method="unembed"), Carried(cache, None)

    loop = partial(decode, step)
    if method.lookup:
        known = jnp.minimum(prompt.ids, config.vocab_size - 1)
        guess = lookup(known, prompt.seg.sum(1), method.lookup)
        loop = partial(
            speculate, check, lambda c, kept: Carried(keep(c.cache, fed, kept), None), guess
        )
    parts = processors_of(config, method, numbers, limit, target, prompt)
    if table is not None:  # a forced end takes the last place
        parts.append(constrained(table, limit - (method.forced_last >= 0)))
    if method.sampling:
        parts += truncations(method, numbers)
    now = jnp.broadcast_to(last[:, None], (rows, width, last.shape[-1]))
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(row_ids)
    return loop(
        head(last),
        Carried(share_prompt(cache, width), now if method.contrastive else None),
        _strategy(method, numbers, hidden, target.seg > 0),
        processors.chain(*parts),
        length=method.length,
        limit=limit,
        eos_ids=method.stop_ids,
        pad_id=method.pad_id,
        keys=keys,
    )


def _strategy(
    method: Method, numbers: Numbers, hidden: Float[Array, "B P D"], there: Bool[Array, "B P"]
) -> Strategy:
    """How tokens are chosen, after a prompt with these hidden states where there are tokens."""
    width = method.width
    if method.contrastive:
        return contrastive(width, numbers.penalty_alpha, lambda c: c.hidden, hidden, there)
    if method.beams > 1:
        size = width // method.groups
        search = strategies.beam(size, numbers.length_penalty, method.norm, method.early_stopping)
        if method.sampling:
            return beam_sample(search)
        return diverse(search, method.groups, numbers.diversity) if method.groups > 1 else search
    return strategies.sample(width) if method.sampling else strategies.greedy()
