"""Well-known shapes, by name. `dataclasses.replace(PRESETS["t5-small"], dropout=0.0)` varies one.

Parameter counts are those of the papers' models, and tested.
"""

import dataclasses

from jaxformer.config import ModelConfig

_BASE = ModelConfig(
    # Vaswani et al. 2017, table 3; 37,000 shared pieces.
    vocab_size=37000,
    n_encoder_layers=6,
    n_decoder_layers=6,
    d_model=512,
    d_ff=2048,
    n_heads=8,
    max_length=1024,
    norm_position="post",
    final_norm=False,
    position="sinusoidal",
    activation="relu",
    mlp_bias=True,
    embed_scale=512**0.5,
    embed_init_std=512**-0.5,
    initializer="xavier",
    dropout=0.1,
)

_T5 = ModelConfig(
    # Raffel et al. 2020, version 1.0: ReLU, tied head scaled by d_model ** -0.5, no biases.
    vocab_size=32128,
    n_encoder_layers=6,
    n_decoder_layers=6,
    d_model=512,
    d_ff=2048,
    n_heads=8,
    head_dim=64,
    max_length=512,
    norm="rms",
    position="relative",
    activation="relu",
    attention_scale=1.0,
    logit_scale=512**-0.5,
    embed_init_std=1.0,
    dropout=0.1,
    attention_dropout=0.1,
    mlp_dropout=0.1,
)


def _t5(layers: int, d_model: int, d_ff: int, heads: int, head_dim: int) -> ModelConfig:
    return dataclasses.replace(
        _T5,
        n_encoder_layers=layers,
        n_decoder_layers=layers,
        d_model=d_model,
        d_ff=d_ff,
        n_heads=heads,
        head_dim=head_dim,
        logit_scale=d_model**-0.5,
    )


PRESETS: dict[str, ModelConfig] = {
    "transformer-base": _BASE,
    "transformer-big": dataclasses.replace(
        _BASE,
        d_model=1024,
        d_ff=4096,
        n_heads=16,
        embed_scale=1024**0.5,
        embed_init_std=1024**-0.5,
        dropout=0.3,
    ),
    "t5-small": _T5,
    "t5-base": _t5(12, 768, 3072, 12, 64),
    "t5-large": _t5(24, 1024, 4096, 16, 64),
    "t5-3b": _t5(24, 1024, 16384, 32, 128),
    "t5-11b": _t5(24, 1024, 65536, 128, 128),
    "gpt2-small": ModelConfig(
        # Radford et al. 2019.
        vocab_size=50257,
        n_decoder_layers=12,
        d_model=768,
        d_ff=3072,
        n_heads=12,
        max_length=1024,
        norm_eps=1e-5,
        position="learned",
        activation="gelu_tanh",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        initializer="normal",
        init_residual_scaled=True,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    "llama-135m": ModelConfig(
        # Touvron et al. 2023, at the size of SmolLM2-135M (Allal et al. 2025).
        vocab_size=49152,
        n_decoder_layers=30,
        d_model=576,
        d_ff=1536,
        n_heads=9,
        n_kv_heads=3,
        max_length=2048,
        norm="rms",
        norm_eps=1e-5,
        position="rotary",
        rope_theta=(100000.0,),
        activation="silu",
        gated=True,
        initializer="normal",
    ),
    "bert-base": ModelConfig(
        # Devlin et al. 2019, with its masked-LM head.
        vocab_size=30522,
        n_encoder_layers=12,
        d_model=768,
        d_ff=3072,
        n_heads=12,
        max_length=512,
        norm_eps=1e-12,
        norm_position="post",
        final_norm=False,
        embed_norm=True,
        n_token_types=2,
        position="learned",
        activation="gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        head_transform=True,
        initializer="truncated_normal",
        dropout=0.1,
        attention_dropout=0.1,
    ),
}
