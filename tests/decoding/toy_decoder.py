"""A recurrent toy model for decoding, and the same model in float64 without a loop of ours."""

import itertools
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.decoding import strategies
from jaxformer.decoding.loop import Decoded, decode
from jaxformer.decoding.processors import Processor, ban, chain, min_length

PAD, EOS = 3, 1
LENGTH = 7


def automaton(following: jax.Array) -> Processor:
    """Accept only what a finite automaton accepts: `following[state, token]`, -1 if forbidden.

    Decoding starts in state 0.
    """

    # A finished hypothesis is fed padding, which may lead to -1; nothing reads its state again.
    return Processor(
        lambda b, w: jnp.zeros((b, w), jnp.int32),
        lambda logits, state: jnp.where(following[state] >= 0, logits, -jnp.inf),
        lambda state, token: following[state, token].astype(jnp.int32),
    )


class Toy(NamedTuple):
    """hidden = tanh(hidden @ mix + embed[token]); logits = hidden @ out."""

    mix: np.ndarray
    embed: np.ndarray
    out: np.ndarray
    start: np.ndarray
    """The hidden state of each row after its prompt."""

    def step(self, cache, tokens, parent, t):
        if parent is not None:
            cache = jnp.take_along_axis(cache, parent[..., None], 1)
        cache = jnp.tanh(cache @ self.mix + jnp.asarray(self.embed)[tokens])
        return cache @ self.out, cache

    def decode(self, strategy, processor=None, *, length=LENGTH, limit=None, keys=None, **options):
        rows, width = len(self.start), strategy.width
        return decode(
            options.pop("step", self.step),
            jnp.asarray(self.start) @ self.out,
            jnp.repeat(jnp.asarray(self.start)[:, None], width, 1),
            strategy,
            chain() if processor is None else processor,
            length=length,
            limit=jnp.full(rows, length) if limit is None else limit,
            keys=jax.random.split(jax.random.key(0), rows) if keys is None else keys,
            eos_ids=[EOS],
            pad_id=PAD,
            **options,
        )

    def next(self, row, prefix):
        """Log-probabilities of the token after `prefix`, in float64."""
        hidden = self.start[row].astype(np.float64)
        for token in prefix:
            hidden = np.tanh(hidden @ self.mix + self.embed[token])
        logits = hidden @ self.out
        return logits - np.log(np.exp(logits).sum())

    def log_prob(self, row, tokens):
        return sum(self.next(row, tokens[:i])[token] for i, token in enumerate(tokens))


def toy(seed, rows=2, vocabulary=5, eos=0.0):
    """Random weights; `eos` is added to the end's logits, more or less."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    made = Toy(draw(6, 6) / 2, draw(vocabulary, 6), draw(6, vocabulary), draw(rows, 6))
    made.embed[:, 0] = made.start[:, 0] = 2.0
    made.out[0, EOS] += eos
    return made


def lengthen(length, alpha, norm):
    return ((5 + length) / 6 if norm == "wu" else length) ** alpha


def hypotheses(decoded: Decoded, row):
    """(tokens without padding, score, log_prob, finish) of each hypothesis of a row."""
    return [
        (tuple(np.asarray(tokens)[:length].tolist()), float(score), float(log_prob), int(finish))
        for tokens, score, log_prob, length, finish in zip(
            *(np.asarray(leaf)[row] for leaf in decoded), strict=True
        )
    ]


def sequences(vocabulary, length):
    """Every sequence that ends in EOS, or has `length` tokens and none."""
    others = [token for token in range(vocabulary) if token != EOS]
    for n in range(length):
        for prefix in itertools.product(others, repeat=n):
            yield (*prefix, EOS)
    yield from itertools.product(others, repeat=length)


class Options(NamedTuple):
    """Everything traced: one compilation serves them all."""

    alpha: float = 0.6
    limit: Any = LENGTH
    """One for all rows or one per row."""
    keys: Any = None
    mask: Any = None
    """Forbidden tokens; None forbids none."""
    table: Any = None
    """An automaton; None accepts everything."""
    least: int = 0


def run(model: Toy, name, width=1, norm="wu", length=LENGTH, **options) -> Decoded:
    """Decode with a compiled function, made once for each strategy and shape."""
    chosen = Options(**options)
    rows, size = len(model.start), model.out.shape[1]
    if constrained := bool({"mask", "table", "least"} & options.keys()):
        mask = np.zeros(size, bool) if chosen.mask is None else np.asarray(chosen.mask)
        table = np.zeros((4, size)) if chosen.table is None else np.asarray(chosen.table)
        table = np.pad(table, ((0, 4 - len(table)), (0, 0)), constant_values=-1).astype(np.int32)
        chosen = chosen._replace(mask=mask, table=table)
    if chosen.keys is None:
        chosen = chosen._replace(keys=jax.random.split(jax.random.key(0), rows))
    limit = np.broadcast_to(np.int32(chosen.limit), rows)
    return compiled(name, width, norm, length, constrained)(model, chosen._replace(limit=limit))


def strategy_named(name, width, alpha, norm="wu"):
    if name.startswith("beam"):  # and when it stops, as in "beam full"
        return strategies.beam(width, alpha, norm, *name.split()[1:])
    return strategies.sample(width) if name == "sample" else strategies.greedy()


@cache
def compiled(name, width, norm, length, constrained):
    def decode(model: Toy, options: Options):
        processor = chain()
        if constrained:
            processor = chain(
                ban(options.mask), automaton(options.table), min_length(options.least, [EOS])
            )
        strategy = strategy_named(name, width, options.alpha, norm)
        return model.decode(
            strategy, processor, length=length, limit=options.limit, keys=options.keys
        )

    return jax.jit(decode)
