"""Small models with any mixture of options, lively parameters, and batches for them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from hypothesis import Phase, settings
from hypothesis import strategies as st

from jaxformer.config import ModelConfig
from jaxformer.nn import transformer
from jaxformer.types import Batch, Tokens

VOCAB, MAX_LENGTH = 13, 16
KINDS = ("encoder-decoder", "decoder-only", "encoder-only")
DECODERS = KINDS[:2]
POSITIONS = ("learned", "sinusoidal", "rotary", "relative", "alibi", "none")


def examples(n: int) -> settings:
    """Try n models; a failing one is not shrunk, as that would compile hundreds."""
    return settings(max_examples=n, phases=(Phase.explicit, Phase.generate))


@st.composite
def model_configs(draw, kinds=KINDS, positions=POSITIONS, max_layers=2) -> ModelConfig:
    """Any `ModelConfig` of few layers, of width 8 to 12, without dropout and in float32."""

    def pick(*values):
        return draw(st.sampled_from(values))

    layers = st.integers(1, max_layers)
    kind = pick(*kinds)
    # Heads need not divide the width, nor its share be even.
    kv_heads, group, head_dim = draw(
        st.sampled_from([(2, 1, 4), (1, 2, 6), (2, 2, 2), (1, 1, 4), (3, 1, 4)])
    )
    position = pick(*positions)
    tied, gated = pick(True, False), pick(False, True)
    targets = ["query", "key", "value", "out", "up", "down"]
    targets += ["gate"] * gated + ["head"] * (not tied)
    return ModelConfig(
        vocab_size=VOCAB,
        n_encoder_layers=0 if kind == "decoder-only" else draw(layers),
        n_decoder_layers=0 if kind == "encoder-only" else draw(layers),
        d_model=pick(8, 10, 12),
        d_ff=pick(8, 14),
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        max_length=MAX_LENGTH,
        norm=pick("layer", "rms"),
        norm_bias=pick(True, False),
        norm_unit_offset=pick(False, True),
        norm_position=pick("pre", "post", "both"),
        final_norm=pick(True, False),
        embed_norm=pick(False, True),
        position=position,
        position_offset=pick(0, 2),
        sinusoid=pick("interleaved", "halves"),
        rope_theta=pick((10000.0,), (100.0, 10.0)),
        rope_factor=pick((1.0,), (1.0, 4.0)),
        rope_scaling=pick("linear", "llama3"),
        rope_original_length=pick(16, 64),
        rope_magnitude=pick(1.0, 1.2),
        rotary_dim=pick(0, 2),
        relative_buckets=pick(4, 7, 8),
        relative_max_distance=pick(6, 20),
        window=pick((0,), (3,), (2, 0), (0, 4, 3)),
        activation=pick("gelu", "relu", "gelu_tanh", "silu"),
        gated=gated,
        qkv_bias=pick(False, True),
        out_bias=pick(False, True),
        mlp_bias=pick(False, True),
        qk_norm=pick(False, True),
        attention_scale=pick(0.0, 1.0),
        attention_softcap=pick(0.0, 5.0),
        source_vocab_size=pick(0, VOCAB) if kind == "encoder-decoder" else 0,
        tie_embeddings=tied,
        head_bias=pick(False, True),
        head_transform=pick(False, True),
        n_token_types=pick(0, 2),
        embed_scale=pick(1.0, 2.5),
        logit_scale=pick(1.0, 0.5),
        logit_softcap=pick(0.0, 8.0),
        lora_rank=pick(0, 2),
        lora_alpha=pick(1.0, 4.0),
        lora_targets=tuple(draw(st.lists(st.sampled_from(targets), min_size=1, unique=True))),
        initializer=pick("lecun", "normal", "truncated_normal", "xavier"),
        init_residual_scaled=pick(False, True),
        scan_layers=pick(True, False),
    )


def abstract_params(config: ModelConfig):
    """Shapes and types of the parameters, and which axes they have."""
    return jax.eval_shape(partial(transformer.init, config), jax.random.key(0))


def random_params(config: ModelConfig, seed: int):
    """Parameters of which none is zero or one, so that each has its effect.

    Small enough that a change in their last bits moves no logit by as much as tests allow.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.1
        return jnp.asarray(rng.normal(mean, 0.2, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(abstract_params(config)))


def random_tokens(rng: np.random.Generator, rows: int, length: int, lengths=None) -> Tokens:
    """Right-padded rows of `lengths` (all of `length` if none are given)."""
    lengths = np.full(rows, length) if lengths is None else np.asarray(lengths)
    seg = np.arange(length)[None] < lengths[:, None]
    ids = np.where(seg, rng.integers(1, VOCAB, (rows, length)), 0)
    return as_tokens(ids, np.arange(length) * seg, seg)


def as_tokens(ids, pos, seg) -> Tokens:
    return Tokens(*(jnp.asarray(x, jnp.int32) for x in (ids, pos, seg)))


def batch_for(config: ModelConfig, source: Tokens, target: Tokens) -> Batch:
    """What of the two the model reads."""
    return Batch(
        source if config.n_encoder_layers else None,
        target if config.n_decoder_layers else None,
        (target if config.n_decoder_layers else source).ids,
        jnp.ones(target.ids.shape, jnp.float32),
    )


@partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params, batch: Batch):
    return transformer.apply(config, params, batch)
