"""Models of a few thousand parameters that small meshes divide, and batches for them."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.config import ModelConfig
from jaxformer.nn import transformer
from jaxformer.types import Batch, Tokens

LAYERS = {
    "encoder-decoder": dict(n_encoder_layers=1, n_decoder_layers=2),
    "decoder-only": dict(n_decoder_layers=2),
    "encoder-only": dict(n_encoder_layers=2),
}


def toy(kind: str = "decoder-only", **options: Any) -> ModelConfig:
    small = dict(vocab_size=16, d_model=8, d_ff=12, n_heads=2, max_length=16)
    return ModelConfig(**{**small, **LAYERS[kind], **options})


def toy_batch(config: ModelConfig, rows: int = 8, length: int = 6, seed: int = 0) -> Batch:
    """Random ids; rows of all lengths, one of them empty, the rest padding of weight 0."""
    rng = np.random.default_rng(seed)

    def tokens() -> Tokens:
        size = rng.integers(1, length + 1, rows)
        size[:2] = length, 0
        seg = (np.arange(length) < size[:, None]).astype(np.int32)
        ids = rng.integers(1, config.vocab_size, (rows, length)).astype(np.int32)
        return Tokens(ids * seg, np.arange(length, dtype=np.int32) * seg, seg)

    source = tokens() if config.n_encoder_layers else None
    target = tokens() if config.n_decoder_layers else None
    learner = target or source
    assert learner is not None
    labels = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32) * learner.seg
    made = Batch(source, target, labels, learner.seg.astype(np.float32))
    return jax.tree.map(jnp.asarray, made)


@cache
def toy_params(config: ModelConfig) -> Any:
    """Random parameters; quicker than the compiled initialisers, and biases are not zero."""
    boxed = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape).astype(leaf.dtype)),
        nn.unbox(boxed),
    )
