"""Text in, text out: a model with its parameters and tokenizer, for every use it has."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer import arrays, sharding
from jaxformer.batching import in_buckets, pad, power_of_two
from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.data.tasks import encode_source, encode_target
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding.loop import Decoded, Finish
from jaxformer.decoding.mbr import expected_chrf
from jaxformer.errors import ConfigError
from jaxformer.generate import Small, decode_batch, prepare, warm_batch
from jaxformer.running import can_refill, decode_rows, places_of, stream_batch, warm_rows
from jaxformer.types import Batch, Tokens

Pair: TypeAlias = tuple[Int[np.ndarray, "S"], Int[np.ndarray, "T"]]
"""The ids of a source and of its target."""
MAPPED = 2**26
"""Weights of attention that are computed at once, at most, unless one pair has more."""


class Alternative(NamedTuple):
    """A token that might have stood in a place, and its log-probability under the model there."""

    id: int
    text: str
    log_prob: float


class Hypothesis(NamedTuple):
    """One generated text. `score` ranks it: length-normalised under beam search, the mean chrF
    against all samples under `mbr`, else `log_prob`, the log-probability of its `ids` under the
    model in nats."""

    text: str
    score: float
    log_prob: float
    ids: tuple[int, ...]
    finish: str
    """Why it ended: eos, limit, dead_end or stop."""
    token_log_probs: tuple[float, ...] = ()
    """Of each of `ids`, under the model, if `DecodeConfig.token_log_probs` asks for them."""
    alternatives: tuple[tuple[Alternative, ...], ...] = ()
    """The likeliest in the place of each of `ids`, if `DecodeConfig.alternatives` asks for them."""

    def record(self) -> dict[str, Any]:
        """Its fields as they are written in JSON, without those that were not asked for."""
        tops = [[each._asdict() for each in place] for place in self.alternatives]
        fields = self._asdict() | {"alternatives": tops}
        asked = {"token_log_probs": self.token_log_probs, "alternatives": tops}
        return {name: value for name, value in fields.items() if asked.get(name, True)}


class Scored(NamedTuple):
    """The log-probability of each token of a given target, its end included, in nats; or none, and
    what was wrong with the pair."""

    token_log_probs: tuple[float, ...]
    error: str = ""

    @property
    def log_prob(self) -> float:
        return math.fsum(self.token_log_probs)

    @property
    def perplexity(self) -> float:
        return math.exp(min(-self.log_prob / max(len(self.token_log_probs), 1), 700))


class Attended(NamedTuple):
    """How much each token of a target attends to each of what it is given; or what was wrong with
    the pair, and nothing else.

    The weights of a token are those with which the decoder chooses it, having read the one before.
    """

    weights: Float[np.ndarray, "L N T S"]
    source: tuple[str, ...] = ()
    """The texts of the source's tokens; in a decoder-only model, then of the target's but the last,
    which attend to themselves."""
    target: tuple[str, ...] = ()
    error: str = ""


class Generated(NamedTuple):
    """The hypotheses for one text, best first; or none, and what was wrong with the text."""

    hypotheses: tuple[Hypothesis, ...]
    error: str = ""


class Tag(NamedTuple):
    """A token, its likeliest label, and how likely that is."""

    text: str
    label: str
    probability: float


class Origin(NamedTuple):
    """What another library's checkpoint said of itself, to be said again at export."""

    config: dict[str, Any]
    generation: dict[str, Any]
    prefixed: bool
    """Whether its names of tensors had the family's prefix."""


@dataclass(frozen=True)
class Model:
    """A Transformer with its parameters, tokenizer, and what its texts look like."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    data: DataConfig
    defaults: DecodeConfig = field(default_factory=DecodeConfig)
    origin: Origin | None = None

    @cached_property
    def _prepared(self) -> Any:
        return prepare(self.params)

    def generate(
        self,
        texts: Sequence[str],
        decode: DecodeConfig | None = None,
        *,
        draft: "Model | None" = None,
    ) -> list[str]:
        """The best text generated from each of `texts` (empty, with a warning, where it failed).

        `decode` says how; without it, as the run that trained the model did. A smaller model of the
        same tokenizer may `draft`, which changes no text: see `DecodeConfig.guesses`.
        """
        return _best(self.hypotheses(texts, decode, draft=draft), "text")

    def warmup(
        self,
        decode: DecodeConfig | None = None,
        lengths: Sequence[int] = (8, 16, 32, 64),
        rows: Sequence[int] = (),
        *,
        draft: "Model | None" = None,
    ) -> list[tuple[int, int]]:
        """Compile what `generate` needs for any of so many texts (`rows`), whose prompts are of any
        of `lengths` in tokens: the buckets (rows, length) for which it then is.

        Both are padded to powers of two, lengths to at least 8, so range(1, 501) is at most seven
        buckets; lengths beyond the model's are its longest. Without `rows`, one text and a full
        batch. Texts of several buckets are decoded bucket by bucket. A later `generate`,
        `hypotheses`, `complete` or `chat` within these compiles nothing: neither with prompts that
        begin alike, each power of two of such tokens (from 32) being a function of its own that is
        compiled here too; nor with another seed, or number of an option of `decode` that is on.
        Not covered are constraints and stop texts whose table is of another size, the
        probabilities that `token_log_probs` and `alternatives` ask for, `score` and `stream`.
        """
        decode = decode or self.defaults
        self._require_decoder()
        small = None if draft is None else self._smaller(draft, decode)
        known, parts = (self.config, self._prepared, self.tokenizer), self.copies
        size = decode.batch_size * parts
        most = self.config.max_length - (0 if self.config.n_encoder_layers else 1)
        buckets = sorted({power_of_two(min(max(n, 1), most), 8) for n in lengths})
        refilled = [n for n in rows if self._refills(n, decode, small)]
        whole = {
            parts * power_of_two(-(-min(size, n - first) // parts), 1)
            for n in set(rows or (1, size)).difference(refilled)
            for first in range(0, n, size)
        }
        warm = [(n, length) for n in sorted(whole) for length in buckets]
        for n, length in warm:
            warm_batch(*known, n, length, decode, small)
        if refilled:
            for length in buckets:
                warm_rows(*known, length, decode)
                warm.append((parts * places_of(decode, decode.batch_size), length))
        return list(dict.fromkeys(warm))

    def stream(
        self,
        prompt: str | Sequence[int],
        decode: DecodeConfig | None = None,
        *,
        every: int = 4,
        row: int = 0,
    ) -> Iterator[str]:
        """The text generated from one prompt (or its ids), piece by piece, as it comes.

        The pieces together are what `generate` returns for the text of row `row`; there may be one
        after each `every` tokens. A character whose bytes are not all there, and what may be the
        beginning of a stop text, are held back. Without `decode`, a run's beams are not searched.
        Raises `ConfigError` for a prompt that is too long, and for ways to decode in which no text
        is settled before the end.
        """
        decode = decode or self.defaults.single
        self._require_decoder()
        if every < 1:
            raise ConfigError(f"every is {every}; at least 1 token must come between two looks.")
        ids = self.prompt(prompt) if isinstance(prompt, str) else prompt
        if problem := self.too_long(ids):
            raise ConfigError(problem)
        _require_single(decode, "stream")
        return self._streamed(ids, decode, every, row)

    def _streamed(
        self, ids: Sequence[int], decode: DecodeConfig, every: int, row: int
    ) -> Iterator[str]:
        length = next(in_buckets([len(ids)], 1))[1]
        batch = pad([ids], length, self.tokenizer.pad_id)
        looks = stream_batch(
            self.config, self._prepared, self.tokenizer, batch, [row], decode, every
        )
        told = ""
        for decoded, done in looks:
            text = self.tokenizer.decode(decoded.tokens[0, 0, : decoded.length[0, 0]].tolist())
            text = before_stop(text, decode.stop) if done else settled(text, decode.stop)
            if self.tokenizer.cleans and not done:  # the last word is
                text = text.rpartition(" ")[0]
            if text.startswith(told) and text != told:
                yield text[len(told) :]
                told = text

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        decode: DecodeConfig | None = None,
    ) -> list[str]:
        """The best answer to each of `conversations`: messages with a "role" and "content", the
        last of which is usually the user's.

        The checkpoint's own template says how they are written. Raises `DataError` if it has none.
        """
        return _best(self.complete(list(map(self.tokenizer.chat, conversations)), decode), "chat")

    def hypotheses(
        self,
        texts: Sequence[str],
        decode: DecodeConfig | None = None,
        first_row: int = 0,
        *,
        draft: "Model | None" = None,
    ) -> list[Generated]:
        """The `n_best` hypotheses generated from each of `texts`, in their order.

        Samples of text i draw from the key of row `first_row` + i, however rows are batched.
        """
        return self.complete(list(map(self.prompt, texts)), decode, first_row, draft=draft)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        decode: DecodeConfig | None = None,
        first_row: int = 0,
        row_ids: Sequence[int] | None = None,
        *,
        draft: "Model | None" = None,
        advance: Callable[[dict[int, Generated]], None] = lambda found: None,
    ) -> list[Generated]:
        """`hypotheses` for prompts that are ids already: what the encoder reads or, without one,
        what the decoder is to continue, as `tokenizer.prompt` and `tokenizer.chat` give it.

        `row_ids` are the rows whose keys they draw from, if those do not follow `first_row`.
        `advance` is told of results, by the number of their prompt, as they come.
        """
        decode = decode or (self.defaults if draft is None else self.defaults.single)
        self._require_decoder()
        small = None if draft is None else self._smaller(draft, decode)
        results = [Generated((), self.too_long(ids)) for ids in prompts]
        fits = [i for i, result in enumerate(results) if not result.error]
        keys = range(first_row, first_row + len(prompts)) if row_ids is None else row_ids
        advance({i: result for i, result in enumerate(results) if result.error})
        for rows, length in in_buckets([len(prompts[i]) for i in fits], len(fits)):
            ids = [fits[row] for row in rows]
            mine, of_rows = [prompts[i] for i in ids], [keys[i] for i in ids]
            for ended, decoded in self._decoded(mine, length, of_rows, decode, small):
                found = {
                    ids[row]: Generated(self._ranked(decoded, at, decode))
                    for at, row in enumerate(ended)
                }
                for i, result in found.items():
                    results[i] = result
                advance(found)
        if decode.token_log_probs or decode.alternatives:
            return self._with_log_probs(prompts, results, decode.alternatives)
        return results

    def score(self, sources: Sequence[str], targets: Sequence[str]) -> list[float]:
        """The log-probability of each target given its source, in nats, its end included.

        A decoder-only model continues the source with the target; an empty source is none.
        """
        scored = self.score_tokens(sources, targets)
        for i, result in enumerate(scored):
            if result.error:
                raise ConfigError(f"pair {i} {result.error}")
        return [result.log_prob for result in scored]

    def score_tokens(self, sources: Sequence[str], targets: Sequence[str]) -> list[Scored]:
        """`score`, token by token; a pair that is too long for the model fails alone."""
        if self.config.n_decoder_layers == 0:
            raise ConfigError("an encoder-only model scores no targets; use logits.")
        pairs, wrong = self._pairs(sources, targets)
        found = self._likelihoods(list(pairs.values()), 0)
        scored = {i: Scored((), error) for i, error in wrong.items()}
        for i, each in zip(pairs, found, strict=True):
            scored[i] = Scored(tuple(each.log_prob.tolist()))
        return [scored[i] for i in range(len(sources))]

    def attention(
        self, sources: Sequence[str | Sequence[int]], targets: Sequence[str | Sequence[int]]
    ) -> list[Attended]:
        """How much each token of a target attends to each of its source: [layers, heads, target
        tokens, source tokens] for each pair of texts, or of their ids.

        The attention is cross-attention or, in a decoder-only model, self-attention to the source
        and the target before. A pair that is too long for the model fails alone.
        """
        if self.config.n_decoder_layers == 0:
            raise ConfigError(
                "an encoder-only model has no targets that attend to sources; use a model with "
                "n_decoder_layers over 0."
            )
        pairs, wrong = self._pairs(sources, targets)
        found = self._attention(list(pairs.values()))
        nothing = np.zeros((self.config.n_decoder_layers, self.config.n_heads, 0, 0), np.float32)
        attended = {i: Attended(nothing, error=error) for i, error in wrong.items()}
        text = self.tokenizer.token_text
        for i, weights in zip(pairs, found, strict=True):
            prompt, ids = (each.tolist() for each in pairs[i])
            target = tuple(map(text, ids))
            before = () if self.config.n_encoder_layers else target[:-1]
            source = (text(each, source=True) for each in prompt)
            attended[i] = Attended(weights, (*source, *before), target)
        return [attended[i] for i in range(len(sources))]

    def logits(self, batch: Batch) -> Float[Array, "B *T V"]:
        """What the head makes of a batch, in float32."""
        return arrays.logits(self.config, self.params, batch)

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts D"]:
        """One vector for each of `texts`, in float32, pooled as the model's config says (Reimers
        and Gurevych 2019); of a text over pooling_length, or max_length, for what fits."""
        self._require_encoder("embed")
        out = np.zeros((len(texts), self.config.d_model), np.float32)
        encoded = [self._source(text, self.config.pooling_length) for text in texts]
        for rows, source in self._batches(encoded):
            found = arrays.embeddings(self.config, self.params, source)
            out[rows] = sharding.fetch(found)[: len(rows)]
        return out

    def classify(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The probability of each label for each of `texts`, the likeliest first; of a text over
        max_length, what fits is read."""
        self._require_head("sequence", "classify")
        labels = self.config.labels
        return [
            {labels[i]: float(row[i]) for i in np.argsort(-row, kind="stable")}
            for row in self._probabilities(list(map(self._source, texts)))
        ]

    def tag(self, texts: Sequence[str]) -> list[list[Tag]]:
        """The likeliest label of each token of each of `texts`, special ones left out; of a text
        over max_length, of the tokens that fit."""
        self._require_head("each", "tag")
        special, labels = self.tokenizer.special_ids, self.config.labels
        encoded = list(map(self._source, texts))
        return [
            [
                Tag(self.tokenizer.decode([i]), labels[row.argmax()], float(row.max()))
                for i, row in zip(ids.tolist(), rows, strict=True)
                if i not in special
            ]
            for ids, rows in zip(encoded, self._probabilities(encoded), strict=True)
        ]

    def fill(self, texts: Sequence[str]) -> list[str]:
        """`texts` with the likeliest token at every mask (Devlin et al. 2019), which is written as
        the tokenizer has it: [MASK] for BERT, <mask> for RoBERTa and models trained here.

        Raises `ConfigError` if a text has no mask, or is over max_length.
        """
        self._require_head("tokens", "fill")
        mask, most = self.tokenizer.mask_id, self.config.max_length
        encoded = [np.array(self.tokenizer.masked(text), np.int32) for text in texts]
        for i, ids in enumerate(encoded):
            if mask not in ids:
                raise ConfigError(
                    f"text {i} has no mask; write one, as [MASK] or <mask>, where a token is to be "
                    "filled in."
                )
            if len(ids) > most:
                raise ConfigError(
                    f"text {i} has {len(ids)} tokens, over the model's max_length {most}; "
                    "shorten or split it."
                )
        there, special = self.tokenizer.vocab_size, self.tokenizer.special_ids
        text = [i < there and i not in special for i in range(self.config.vocab_size)]
        filled = []
        for ids, rows in zip(encoded, self._probabilities(encoded), strict=True):
            best = (rows * text).argmax(-1)
            filled.append(self.tokenizer.decode(np.where(ids == mask, best, ids)))
        return filled

    def prompt(self, text: str) -> list[int]:
        """The ids of a text: what the encoder reads or, without one, what the decoder is to
        continue."""
        if self.config.n_encoder_layers:
            return encode_source(self.data, self.tokenizer, text).tolist()
        return self.tokenizer.prompt(text)

    def too_long(self, ids: Sequence[int]) -> str:
        """What is wrong with the length of a prompt, if anything: one token at least must fit."""
        most = self.config.max_length - (0 if self.config.n_encoder_layers else 1)
        if len(ids) <= most:
            return ""
        return (
            f"the text has {len(ids)} tokens, but the model reads at most {most} "
            f"(max_length {self.config.max_length}); shorten or split it."
        )

    @property
    def copies(self) -> int:
        """Devices that each hold all of the model and decode a share of every batch."""
        return sharding.parts_of(sharding.copies(self.params))

    def _smaller(self, draft: "Model", decode: DecodeConfig) -> Small:
        """The draft model, as decoding takes it."""
        if draft.tokenizer.hash != self.tokenizer.hash:
            raise ConfigError(
                "the draft model has another tokenizer; a draft must be of the same tokens."
            )
        if draft.config.n_decoder_layers == 0 or draft.config.kind != self.config.kind:
            raise ConfigError(f"the draft model is {draft.config.kind}, not {self.config.kind}.")
        _require_single(decode, "a draft model")
        return Small(draft.config, sharding.beside(draft._prepared, self._prepared))

    def _require_decoder(self) -> None:
        if self.config.n_decoder_layers == 0:
            raise ConfigError(
                "an encoder-only model generates no text; use embed, fill or logits, or a model "
                "with n_decoder_layers over 0."
            )

    def _require_encoder(self, use: str) -> None:
        if self.config.kind != "encoder-only":
            raise ConfigError(f"{use} is for encoder-only models; this one is {self.config.kind}.")

    def _require_head(self, head: str, use: str) -> None:
        self._require_encoder(use)
        if self.config.head != head:
            raise ConfigError(
                f"{use} needs a model with head {head!r}, but this one's is {self.config.head!r}; "
                "load a checkpoint that was trained for it."
            )

    def _source(self, text: str, length: int = 0) -> Int[np.ndarray, "T"]:
        """What an encoder reads, cut to `length` (or max_length) but for its end."""
        ids = encode_source(self.data, self.tokenizer, text)
        most = min(length or self.config.max_length, self.config.max_length)
        return np.concatenate([ids[:-1][: most - 1], ids[-1:]])

    def _batches(
        self, encoded: Sequence[Int[np.ndarray, "T"]]
    ) -> Iterator[tuple[list[int], Tokens]]:
        """Row numbers and what the encoder reads of them, batch by batch."""
        for rows, length in in_buckets(list(map(len, encoded)), self.defaults.batch_size):
            yield rows, pad([encoded[row] for row in rows], length, self.tokenizer.pad_id)

    def _probabilities(
        self, encoded: Sequence[Int[np.ndarray, "T"]]
    ) -> list[Float[np.ndarray, "*T V"]]:
        """Softmax of what the head makes of each text: a row for it, or one for each token."""
        out: list[Any] = [None] * len(encoded)
        for rows, source in self._batches(encoded):
            found = sharding.fetch(
                jax.nn.softmax(arrays.logits(self.config, self.params, arrays.source_batch(source)))
            )
            for row, each in zip(rows, found, strict=False):
                whole = self.config.head == "sequence"
                out[row] = each if whole else each[: len(encoded[row])]
        return out

    def _decoded(
        self,
        prompts: Sequence[Sequence[int]],
        length: int,
        keys: Sequence[int],
        decode: DecodeConfig,
        small: Small | None,
    ) -> Iterator[tuple[Sequence[int], Decoded]]:
        """Numbers of the prompts, all of one bucket of lengths, that ended together, and how."""
        parts, known = self.copies, (self.config, self._prepared, self.tokenizer)
        size = decode.batch_size * parts
        if self._refills(len(prompts), decode, small):
            yield from decode_rows(*known, prompts, length, keys, decode)
            return
        for first in range(0, len(prompts), size):
            rows = range(first, min(first + size, len(prompts)))
            batch = pad([prompts[i] for i in rows], length, self.tokenizer.pad_id, parts)
            mine = [keys[i] for i in rows]
            yield rows, decode_batch(*known, batch, mine, decode, small)

    def _refills(self, n: int, decode: DecodeConfig, small: Small | None) -> bool:
        """Whether of `n` prompts those that end hand their places to others."""
        few = n <= 2 * decode.batch_size * self.copies
        return not few and small is None and can_refill(decode)

    def _ranked(self, decoded: Decoded, row: int, decode: DecodeConfig) -> tuple[Hypothesis, ...]:
        """The `n_best` hypotheses of a row; dead ends last."""
        most = decode.samples if decode.mbr else decode.n_best
        found = [self._hypothesis(decoded, row, n, decode.stop) for n in range(most)]
        if decode.mbr:
            means = expected_chrf([h.text for h in found])
            found = [h._replace(score=mean) for h, mean in zip(found, means, strict=True)]
            found.sort(key=lambda h: (h.finish == "dead_end", -h.score))
        return tuple(found[: decode.n_best])

    def _pairs(
        self, sources: Sequence[str | Sequence[int]], targets: Sequence[str | Sequence[int]]
    ) -> tuple[dict[int, Pair], dict[int, str]]:
        """The ids of the pairs that fit, by their number, and what is wrong with the others."""
        if len(sources) != len(targets):
            raise ConfigError(f"there are {len(sources)} sources for {len(targets)} targets.")
        pairs, wrong = {}, {}
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            prompt = self.prompt(source) if isinstance(source, str) else source
            if isinstance(target, str):
                target = encode_target(self.data, self.tokenizer, target)
            pair = np.array(prompt, np.int32), np.array(target, np.int32)
            longest = self._longest(pair)
            if longest <= self.config.max_length:
                pairs[i] = pair
                continue
            wrong[i] = (
                f"has {longest} tokens, over the model's max_length {self.config.max_length}; "
                "shorten or split it."
            )
        return pairs, wrong

    def _longest(self, pair: Pair) -> int:
        """How many tokens of a pair are read in a row."""
        prompt, ids = map(len, pair)
        return max(prompt, ids) if self.config.n_encoder_layers else prompt + ids - 1

    def _attention(self, pairs: Sequence[Pair]) -> list[Float[np.ndarray, "L N T S"]]:
        """The weights of attention of each pair, without those of padding."""
        out: list[Any] = [None] * len(pairs)
        lengths = list(map(self._longest, pairs))
        maps = self.config.n_decoder_layers * self.config.n_heads
        each = maps * power_of_two(max(lengths, default=0), 8) ** 2
        size = min(self.defaults.batch_size, max(MAPPED // each, 1))
        for rows, length in in_buckets(lengths, size):
            chosen = [pairs[row] for row in rows]
            batch = arrays.scoring_batch(self.config, self.tokenizer, chosen, length)
            found = sharding.fetch(arrays.attention(self.config, self.params, batch))
            read = batch.source or batch.target
            assert read is not None
            for at, row in enumerate(rows):
                asked, there = batch.weights[at] > 0, read.seg[at] > 0
                out[row] = found[at][:, :, asked][..., there]
        return out

    def _likelihoods(self, pairs: Sequence[Pair], k: int) -> list[arrays.Likelihood]:
        """How likely each token of the targets is after its prompt, and the `k` likeliest there."""
        out: list[Any] = [None] * len(pairs)
        lengths = [len(prompt) + len(ids) for prompt, ids in pairs]
        for rows, length in in_buckets(lengths, self.defaults.batch_size):
            chosen = [pairs[row] for row in rows]
            batch = arrays.scoring_batch(self.config, self.tokenizer, chosen, length)
            found = sharding.fetch(arrays.likelihood(self.config, self.params, batch, k))
            for at, row in enumerate(rows):
                scored = batch.weights[at] > 0
                out[row] = arrays.Likelihood(*(part[at][scored] for part in found))
        return out

    def _with_log_probs(
        self, prompts: Sequence[Sequence[int]], results: Sequence[Generated], k: int
    ) -> list[Generated]:
        """`results` with how likely each token is, by one more pass over them all."""
        pairs = [
            (np.array(prompt, np.int32), np.array(h.ids, np.int32))
            for prompt, result in zip(prompts, results, strict=True)
            for h in result.hypotheses
            if h.ids
        ]
        found = iter(self._likelihoods(pairs, k))

        def explained(h: Hypothesis) -> Hypothesis:
            if not h.ids:
                return h
            each = next(found)
            tops = tuple(
                tuple(
                    Alternative(i, self.tokenizer.decode([i]), log_prob)
                    for i, log_prob in zip(ids, log_probs, strict=True)
                )
                for ids, log_probs in zip(each.top_ids.tolist(), each.top.tolist(), strict=True)
            )
            return h._replace(
                token_log_probs=tuple(each.log_prob.tolist()), alternatives=tops if k else ()
            )

        return [
            result._replace(hypotheses=tuple(map(explained, result.hypotheses)))
            for result in results
        ]

    def _hypothesis(self, decoded: Decoded, row: int, n: int, stops: Sequence[str]) -> Hypothesis:
        ids = decoded.tokens[row, n, : decoded.length[row, n]].tolist()
        return Hypothesis(
            before_stop(self.tokenizer.decode(ids), stops),
            float(decoded.score[row, n]),
            float(decoded.log_prob[row, n]),
            tuple(ids),
            Finish(int(decoded.finish[row, n])).name.lower(),
        )


def _best(results: Sequence[Generated], of: str) -> list[str]:
    """The text of the best hypothesis of each; empty, with a warning, where there is none."""
    for i, result in enumerate(results):
        if result.error:
            warnings.warn(f"{of} {i}: {result.error}", stacklevel=3)
    return [r.hypotheses[0].text if r.hypotheses else "" for r in results]


def _require_single(decode: DecodeConfig, use: str) -> None:
    if decode.width > 1 or decode.contrastive or decode.lookup:
        raise ConfigError(
            f"{use} is for greedy decoding and one sample; leave beams, samples, contrastive and "
            "lookup as they are."
        )


def before_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to that of `stops` in it which is whole first, however tokens cut the text.

    >>> before_stop("To be. Or not", [". ", " not"])
    'To be'
    """
    places = [(text.find(stop), len(stop)) for stop in stops if stop in text]
    first = min(places, key=lambda place: (sum(place), place), default=(len(text), 0))
    return text[: first[0]]


def settled(text: str, stops: Sequence[str]) -> str:
    """What of a text stays as it is whatever tokens follow: neither a character whose bytes are not
    all there, nor the beginning of one of `stops`, at its end.

    >>> settled("To be.", [". "])
    'To be'
    """
    text = before_stop(text, stops).rstrip("\N{REPLACEMENT CHARACTER}")
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(begun, default=0)]
