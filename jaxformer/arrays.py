"""What a model computes of a batch, compiled: logits, log-probabilities of labels, weights of
attention, embeddings."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.batching import pad
from jaxformer.config import ModelConfig
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.decoding.select import top_k
from jaxformer.nn.transformer import Transformer, apply
from jaxformer.types import Batch, Tokens


@partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: Any, batch: Batch) -> Float[Array, "B *T V"]:
    """What the model's head makes of a batch, in float32."""
    return apply(config, params, batch)


class Likelihood(NamedTuple):
    """How likely each label is, in nats, and which `k` tokens are likeliest in its place."""

    log_prob: Float[Array, "B T"]
    top: Float[Array, "B T k"]
    """In falling order."""
    top_ids: Int[Array, "B T k"]


@partial(jax.jit, static_argnums=(0, 3))
def likelihood(config: ModelConfig, params: Any, batch: Batch, k: int = 0) -> Likelihood:
    """The log-probability of each label of a batch, and the `k` largest beside it."""
    found = logits(config, params, batch)
    total = jax.nn.logsumexp(found, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(found, batch.labels[..., None], axis=-1) - total
    top, ids = top_k(found, min(k, config.vocab_size))
    return Likelihood(picked[..., 0], top - total, ids)


@partial(jax.jit, static_argnums=0)
def attention(config: ModelConfig, params: Any, batch: Batch) -> Float[Array, "B L N T S"]:
    """How much each token of the target attends to each of the source or, without an encoder, of
    the target itself: the weights of every layer and head of the decoder, in float32."""
    model = Transformer(config)
    _, kept = model.apply({"params": params}, batch, mutable=["intermediates"])
    of_layers: Any = kept["intermediates"]["decoder"]["layers"]
    (weights,) = of_layers["cross" if config.n_encoder_layers else "attention"]["weights"]
    return einops.rearrange(weights, "l b k g t s -> b l (k g) t s").astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def embeddings(config: ModelConfig, params: Any, source: Tokens) -> Float[Array, "B D"]:
    """One vector for each row, in float32."""
    return apply(config, params, source, method="embedding")


def source_batch(source: Tokens) -> Batch:
    """A batch for an encoder, with nothing to learn."""
    return Batch(source, None, np.zeros_like(source.ids), np.zeros(source.ids.shape, np.float32))


def scoring_batch(
    config: ModelConfig,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[Int[np.ndarray, "S"], Int[np.ndarray, "T"]]],
    length: int,
) -> Batch:
    """Prompts and targets as a batch whose weights are 1 on the tokens of the targets."""
    start, pad_id = tokenizer.start_id, tokenizer.pad_id
    prompts, targets = zip(*pairs, strict=True)
    if config.n_encoder_layers:
        source = pad(prompts, length, pad_id)
        inputs = [np.array([start, *t[:-1]], np.int32) for t in targets]
        before = [0] * len(pairs)
    else:
        source = None
        inputs = [np.concatenate([p, t[:-1]]) for p, t in pairs]
        before = [len(p) - 1 for p in prompts]
    target = pad(inputs, length, pad_id)
    labels, weights = np.zeros_like(target.ids), np.zeros(target.ids.shape, np.float32)
    for row, (at, t) in enumerate(zip(before, targets, strict=True)):
        labels[row, at : at + len(t)] = t
        weights[row, at : at + len(t)] = 1
    return Batch(source, target, labels, weights)
