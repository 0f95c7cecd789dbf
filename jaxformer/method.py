"""How a batch is decoded: what is compiled for it, what may change, and the processors of both."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxformer.config import DecodeConfig, ModelConfig
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding import penalties, processors
from jaxformer.types import Tokens


class Method(NamedTuple):
    """What a decoding function is compiled for, besides the shapes of its input."""

    sampling: bool
    width: int
    length: int
    norm: Any
    start_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    forced_first: int = -1
    forced_last: int = -1
    beams: int = 1
    groups: int = 1
    banks: bool = False
    """Whether beams are shared out among texts that still need more and fewer tokens."""
    contrastive: bool = False
    guesses: int = 0
    """Tokens guessed ahead at a time."""
    prefill: int = 512
    """Tokens of a prompt that are read at a time, at most."""
    shared: int = 0
    """Tokens that all prompts begin with alike, and that are read once."""
    early_stopping: Any = "exact"
    no_repeat_ngram: int = 0
    encoder_no_repeat_ngram: int = 0
    bad_ids: tuple[tuple[int, ...], ...] = ()
    biased: tuple[int, ...] = ()
    on: tuple[str, ...] = ()
    """Which of `OPTIONAL` are."""


class Numbers(NamedTuple):
    """What may change without compiling anew."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    length_penalty: float
    min_length: int = 0
    diversity: float = 0.0
    penalty_alpha: float = 0.0
    typical_p: float = 1.0
    epsilon: float = 0.0
    eta: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    length_decay: float = 1.0
    length_decay_start: int = 0
    bias: tuple[float, ...] = ()


OPTIONAL = ("typical_p", "epsilon", "eta", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "length_decay")  # fmt: skip
"""Numbers that are compiled for only where they have an effect."""
DEFAULT = DecodeConfig()


def method_of(
    config: ModelConfig, tokenizer: Tokenizer, options: DecodeConfig, length: int
) -> Method:
    """What `options` are compiled for, at most `length` tokens at a time."""
    return Method(
        sampling=options.sampling,
        width=min(options.contrastive, config.vocab_size) or options.width,
        length=length,
        norm=options.length_norm,
        start_id=tokenizer.start_id,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        suppress=options.suppress,
        suppress_first=options.suppress_first,
        forced_first=options.forced_first,
        forced_last=options.forced_last,
        beams=options.beams,
        groups=options.groups,
        banks=bool(options.include) and options.beams > options.groups and not options.sampling,
        contrastive=options.contrastive > 0,
        guesses=options.lookup,
        prefill=options.prefill,
        early_stopping=options.early_stopping,
        no_repeat_ngram=options.no_repeat_ngram,
        encoder_no_repeat_ngram=options.encoder_no_repeat_ngram,
        bad_ids=bad_ids(options, tokenizer),
        biased=tuple(i for i, _ in options.logit_bias),
        on=tuple(name for name in OPTIONAL if getattr(options, name) != getattr(DEFAULT, name)),
    )


def numbers_of(options: DecodeConfig) -> Numbers:
    """The numbers among `options`: an int where a float belongs would compile anew."""
    floats = ("temperature", "top_p", "min_p", "length_penalty", "diversity", "penalty_alpha")
    return Numbers(
        **{name: float(getattr(options, name)) for name in (*floats, *OPTIONAL)},
        top_k=options.top_k,
        min_length=options.min_length,
        length_decay_start=options.length_decay_start,
        bias=tuple(float(bias) for _, bias in options.logit_bias),
    )


def bad_ids(options: DecodeConfig, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """What must not be written, but for a bare end: that is for min_length to hold back."""
    ends = {(i,) for i in tokenizer.stop_ids}
    found = dict.fromkeys(ids for ids in options.bad_ids if ids not in ends)
    for word in options.bad_words:
        for text in (word, f" {word}"):
            ids = tokenizer.target(text)
            known = tokenizer.unk_id in tokenizer.stop_ids or tokenizer.unk_id not in ids
            kept = tuple(i for i in ids if i not in tokenizer.special_ids)
            if known and kept:
                found[kept] = None
    return tuple(found)


def processors_of(
    config: ModelConfig,
    method: Method,
    numbers: Numbers,
    limit: Int[Array, " B"],
    target: Tokens,
    prompt: Tokens,
) -> list[processors.Processor]:
    """Everything but sampling, in transformers' order.

    `target` is what the decoder continues; `prompt` what the encoder reads or, without one, it too.
    """

    def mask(ids: tuple[int, ...]) -> Array:
        return jnp.isin(jnp.arange(config.vocab_size), jnp.array(ids))

    first, last = method.forced_first, method.forced_last
    parts = _penalties(config, method, numbers, target, prompt)
    parts.append(processors.min_length(numbers.min_length, method.stop_ids))
    if first >= 0:
        parts = [processors.forced(first, 0, processors.chain(*parts))]
    if last >= 0:  # however few tokens there is room for
        parts = [processors.forced(last, limit - 1, processors.chain(*parts))]
    if method.suppress:
        parts.append(processors.ban(mask(method.suppress)))
    if method.suppress_first:  # the first that is free
        parts.append(processors.ban_at(mask(method.suppress_first), int(first >= 0)))
    return parts


def truncations(method: Method, numbers: Numbers) -> list[processors.Processor]:
    """What samples are drawn from."""
    optional = {
        "typical_p": processors.typical,
        "epsilon": processors.epsilon,
        "eta": processors.eta,
    }
    return [
        processors.temperature(numbers.temperature),
        processors.top_k(numbers.top_k),
        processors.top_p(numbers.top_p),
        processors.min_p(numbers.min_p),
        *(make(getattr(numbers, name)) for name, make in optional.items() if name in method.on),
    ]


def _penalties(
    config: ModelConfig,
    method: Method,
    numbers: Numbers,
    target: Tokens,
    prompt: Tokens,
) -> list[processors.Processor]:
    """What weighs tokens by those before them."""
    on, size = method.on, config.vocab_size
    history, source = _right_aligned(target), jnp.where(prompt.seg > 0, prompt.ids, -1)
    parts = []
    if method.biased:
        parts.append(penalties.logit_bias(jnp.array(method.biased), jnp.array(numbers.bias)))
    if "repetition_penalty" in on:
        parts.append(penalties.repetition(numbers.repetition_penalty, history, size))
    if {"presence_penalty", "frequency_penalty"} & set(on):
        presence, frequency = numbers.presence_penalty, numbers.frequency_penalty
        parts.append(penalties.presence_frequency(presence, frequency, size))
    if method.no_repeat_ngram:
        parts.append(penalties.no_repeat_ngram(method.no_repeat_ngram, history, method.length))
    if method.encoder_no_repeat_ngram:
        n = method.encoder_no_repeat_ngram
        parts.append(penalties.no_repeat_source_ngram(n, source, history))
    if method.bad_ids:
        parts.append(penalties.bad_words(method.bad_ids, history))
    if "length_decay" in on:
        factor, start = numbers.length_decay, numbers.length_decay_start
        parts.append(penalties.length_decay(factor, start, method.stop_ids))
    return parts


def _right_aligned(tokens: Tokens) -> Int[Array, "B T"]:
    """Ids that end with each row's last, -1 before its first."""
    size = tokens.ids.shape[1]
    at = jnp.arange(size) - (size - tokens.seg.sum(1, keepdims=True))
    return jnp.where(at < 0, -1, jnp.take_along_axis(tokens.ids, jnp.maximum(at, 0), 1))
