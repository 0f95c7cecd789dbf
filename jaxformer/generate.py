"""Text in, text out: a trained model with its tokenizer, which generates and scores.

Shapes come in buckets, powers of two, so that what is compiled is bounded: another text,
temperature, seed or top-p compiles nothing.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer import sharding
from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.data.tasks import encode_source, encode_target
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding import processors, strategies
from jaxformer.decoding.loop import Decoded, Finish, decode
from jaxformer.errors import ConfigError
from jaxformer.nn.cache import Cache, follow, init_cache, share_prompt
from jaxformer.nn.transformer import apply, unstack
from jaxformer.types import Batch, Tokens


class Hypothesis(NamedTuple):
    """One generated text. `score` ranks it: length-normalised under beam search, else `log_prob`,
    the log-probability of its `ids` under the model in nats."""

    text: str
    score: float
    log_prob: float
    ids: tuple[int, ...]
    finish: str
    """Why it ended: eos, limit, or dead_end."""


class Generated(NamedTuple):
    """The hypotheses for one text, best first; or none, and what was wrong with the text."""

    hypotheses: tuple[Hypothesis, ...]
    error: str = ""


class Method(NamedTuple):
    """What a decoding function is compiled for, besides the shapes of its input."""

    sampling: bool
    width: int
    length: int
    norm: Any
    start_id: int
    eos_id: int
    pad_id: int


class Numbers(NamedTuple):
    """What may change without compiling anew."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    length_penalty: float


@dataclass(frozen=True)
class Model:
    """A Transformer with its parameters, tokenizer, and what its texts look like."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    data: DataConfig
    defaults: DecodeConfig = field(default_factory=DecodeConfig)

    def generate(self, texts: Sequence[str], decode: DecodeConfig | None = None) -> list[str]:
        """The best text generated from each of `texts` (empty, with a warning, where it failed).

        `decode` says how; without it, as the run that trained the model did.
        """
        results = self.hypotheses(texts, decode)
        for i, result in enumerate(results):
            if result.error:
                warnings.warn(f"text {i}: {result.error}", stacklevel=2)
        return [r.hypotheses[0].text if r.hypotheses else "" for r in results]

    def hypotheses(
        self, texts: Sequence[str], decode: DecodeConfig | None = None, first_row: int = 0
    ) -> list[Generated]:
        """The `n_best` hypotheses generated from each of `texts`, in their order.

        Samples of text i draw from the key of row `first_row` + i, however rows are batched.
        """
        decode = decode or self.defaults
        if self.config.n_decoder_layers == 0:
            raise ConfigError(
                "an encoder-only model generates no text; use logits, or train a model with "
                "n_decoder_layers over 0."
            )
        encoded = [self._prompt(text) for text in texts]
        results = [Generated((), self._too_long(ids)) for ids in encoded]
        fits = [i for i, result in enumerate(results) if not result.error]
        for rows, length in _batches([len(encoded[i]) for i in fits], decode.batch_size):
            ids = [fits[row] for row in rows]
            prompt = _pad([encoded[i] for i in ids], length, self.tokenizer.pad_id)
            decoded = self._decode(prompt, [first_row + i for i in ids], decode)
            for row, i in enumerate(ids):
                results[i] = Generated(
                    tuple(self._hypothesis(decoded, row, n) for n in range(decode.n_best))
                )
        return results

    def score(self, sources: Sequence[str], targets: Sequence[str]) -> list[float]:
        """The log-probability of each target given its source, in nats, its end included.

        A decoder-only model continues the source with the target; an empty source is none.
        """
        if self.config.n_decoder_layers == 0:
            raise ConfigError("an encoder-only model scores no targets; use logits.")
        if len(sources) != len(targets):
            raise ConfigError(f"there are {len(sources)} sources for {len(targets)} targets.")
        pairs = []
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            prompt, ids = self._prompt(source), encode_target(self.data, self.tokenizer, target)
            longest = max(len(prompt), len(ids))
            if self.config.kind == "decoder-only":
                longest = len(prompt) + len(ids) - 1
            if longest > self.config.max_length:
                raise ConfigError(
                    f"pair {i} has {longest} tokens, over the model's max_length "
                    f"{self.config.max_length}; shorten or split it."
                )
            pairs.append((prompt, ids))
        totals = np.zeros(len(pairs))
        for rows, length in _batches([len(p) + len(t) for p, t in pairs], self.defaults.batch_size):
            batch = self._scoring_batch([pairs[row] for row in rows], length)
            log_probs = sharding.fetch(_log_probs(self.config, self.params, batch))
            totals[rows] = log_probs[: len(rows)]
        return totals.tolist()

    def logits(self, batch: Batch) -> Float[Array, "B T V"]:
        """The logits of a batch, in float32."""
        return _logits(self.config, self.params, batch)

    def _prompt(self, text: str) -> Int[np.ndarray, "T"]:
        """What the encoder reads; or, without one, what the decoder is to continue."""
        if self.config.n_encoder_layers:
            return encode_source(self.data, self.tokenizer, text)
        ids = self.tokenizer.encode(text)
        return np.array([self.tokenizer.start_id, *ids], np.int32)

    def _too_long(self, ids: Int[np.ndarray, "T"]) -> str:
        """What is wrong with the length of a prompt, if anything: one token at least must fit."""
        most = self.config.max_length - (0 if self.config.n_encoder_layers else 1)
        if len(ids) <= most:
            return ""
        return (
            f"the text has {len(ids)} tokens, but the model reads at most {most} "
            f"(max_length {self.config.max_length}); shorten or split it."
        )

    def _decode(self, prompt: Tokens, row_ids: Sequence[int], options: DecodeConfig) -> Decoded:
        """Decode one padded batch of prompts, whose rows draw from the keys of `row_ids`."""
        lengths = prompt.seg.sum(1)
        taken = np.ones_like(lengths) if self.config.n_encoder_layers else lengths
        room = self.config.max_length - taken
        limit = np.minimum(room, options.max_length) if options.max_length else room
        method = Method(
            options.sampling,
            options.width,
            min(_power_of_two(int(limit.max()), 16), self.config.max_length),
            options.length_norm,
            self.tokenizer.start_id,
            self.tokenizer.eos_id,
            self.tokenizer.pad_id,
        )
        numbers = Numbers(  # an int where a float belongs would compile anew
            float(options.temperature),
            options.top_k,
            float(options.top_p),
            float(options.min_p),
            float(options.length_penalty),
        )
        ids = np.zeros(len(lengths), np.int32)
        ids[: len(row_ids)] = row_ids
        decoded = _decode(
            self.config, method, self.params, prompt, limit, numbers, options.seed, ids
        )
        return sharding.fetch(decoded)

    def _hypothesis(self, decoded: Decoded, row: int, n: int) -> Hypothesis:
        ids = decoded.tokens[row, n, : decoded.length[row, n]].tolist()
        return Hypothesis(
            self.tokenizer.decode(ids),
            float(decoded.score[row, n]),
            float(decoded.log_prob[row, n]),
            tuple(ids),
            Finish(int(decoded.finish[row, n])).name.lower(),
        )

    def _scoring_batch(
        self, pairs: list[tuple[Int[np.ndarray, "S"], Int[np.ndarray, "T"]]], length: int
    ) -> Batch:
        """A batch whose weights are 1 on the tokens of the targets."""
        start, pad = self.tokenizer.start_id, self.tokenizer.pad_id
        prompts, targets = zip(*pairs, strict=True)
        if self.config.n_encoder_layers:
            source = _pad(prompts, length, pad)
            inputs = [np.array([start, *t[:-1]], np.int32) for t in targets]
            before = [0] * len(pairs)
        else:
            source = None
            inputs = [np.concatenate([p, t[:-1]]) for p, t in pairs]
            before = [len(p) - 1 for p in prompts]
        target = _pad(inputs, length, pad)
        labels, weights = np.zeros_like(target.ids), np.zeros(target.ids.shape, np.float32)
        for row, (at, t) in enumerate(zip(before, targets, strict=True)):
            labels[row, at : at + len(t)] = t
            weights[row, at : at + len(t)] = 1
        return Batch(source, target, labels, weights)


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
) -> Decoded:
    """Encode, prefill and decode a batch of prompts."""
    run = partial(apply, config, unstack(params))
    rows, width = prompt.ids.shape[0], method.width
    memory = memory_seg = None
    target = prompt
    if config.n_encoder_layers:
        memory, memory_seg = run(prompt, method="encode"), prompt.seg
        ones = jnp.ones((rows, 1), jnp.int32)
        target = Tokens(ones * method.start_id, ones * 0, ones)
    taken = target.seg.sum(1)

    slots = target.ids.shape[1] + method.length * width
    cache = init_cache(config, rows, slots, prompt.ids.shape[1] if config.n_encoder_layers else 0)
    hidden, cache = run(target, memory, memory_seg, cache, method="decode")
    last = jnp.take_along_axis(hidden, (taken - 1)[:, None, None], axis=1)[:, 0]
    logits = run(last, method="unembed")

    def step(cache: Cache, tokens: Array, parent: Array | None, t: Array) -> tuple[Array, Cache]:
        """One token for each of the `width` hypotheses, as that many queries of its row."""
        pos = jnp.broadcast_to(taken[:, None] + t, tokens.shape)
        queries = Tokens(tokens, pos, jnp.ones_like(tokens))
        hidden, cache = run(queries, None, None, follow(cache, parent), method="decode")
        return run(hidden, method="unembed"), cache

    if method.sampling:
        strategy = strategies.sample(width)
        processor = processors.chain(
            processors.temperature(numbers.temperature),
            processors.top_k(numbers.top_k),
            processors.top_p(numbers.top_p),
            processors.min_p(numbers.min_p),
        )
    else:
        processor = processors.chain()
        strategy = (
            strategies.beam(width, numbers.length_penalty, method.norm)
            if width > 1
            else strategies.greedy()
        )
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(row_ids)
    return decode(
        step,
        logits,
        share_prompt(cache, width),
        strategy,
        processor,
        length=method.length,
        limit=limit,
        eos_id=method.eos_id,
        pad_id=method.pad_id,
        keys=keys,
    )


@partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, batch: Batch) -> Float[Array, "B T V"]:
    return apply(config, params, batch)


@partial(jax.jit, static_argnums=0)
def _log_probs(config: ModelConfig, params: Any, batch: Batch) -> Float[Array, " B"]:
    """Summed log-probability of the weighted labels of each row."""
    logits = _logits(config, params, batch)
    picked = jnp.take_along_axis(logits, batch.labels[..., None], axis=-1)[..., 0]
    return ((picked - jax.nn.logsumexp(logits, axis=-1)) * batch.weights).sum(1)


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _batches(lengths: Sequence[int], size: int) -> Iterator[tuple[list[int], int]]:
    """Row numbers in batches of at most `size`, and the bucket of length each batch falls in."""
    order = sorted(range(len(lengths)), key=lambda row: _power_of_two(lengths[row], 8))
    batch: list[int] = []
    for row in order:
        bucket = _power_of_two(lengths[row], 8)
        if batch and (len(batch) == size or bucket != _power_of_two(lengths[batch[0]], 8)):
            yield batch, _power_of_two(lengths[batch[0]], 8)
            batch = []
        batch.append(row)
    if batch:
        yield batch, _power_of_two(lengths[batch[0]], 8)


def _pad(ids: Sequence[Int[np.ndarray, "T"]], length: int, pad_id: int) -> Tokens:
    """Right-pad to `length`, and to a power of two of rows; rows that fill up repeat the first."""
    rows = [*ids, *([ids[0]] * (_power_of_two(len(ids), 1) - len(ids)))]
    out = np.full((len(rows), length), pad_id, np.int32)
    seg = np.zeros_like(out)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
        seg[row, : len(values)] = 1
    pos = np.arange(length, dtype=np.int32) * seg
    return Tokens(out, pos, seg)
