"""BART and the encoder-decoders built like it: mBART, Marian, Pegasus."""

from collections.abc import Mapping
from typing import Any

from jaxformer.hub.families.derived import ROOT_SCALED
from jaxformer.hub.family import Derived, Family, Field, Row, linear, norm, row


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *linear(f"{ours}/query", f"{theirs}.q_proj", "(n h) d -> d n h"),
        *linear(f"{ours}/key", f"{theirs}.k_proj", "(n h) d -> d n h"),
        *linear(f"{ours}/value", f"{theirs}.v_proj", "(n h) d -> d n h"),
        *linear(f"{ours}/out", f"{theirs}.out_proj", "d (n h) -> n h d"),
    )


def _stack(side: str) -> tuple[Row, ...]:
    ours, theirs = f"{side}/layers", f"model.{side}.layers.*"
    return (
        row(f"{side}/positions/embedding", f"model.{side}.embed_positions.weight", "p d -> p d"),
        *norm(f"{side}/embed_norm", f"model.{side}.layernorm_embedding"),
        *_attention(f"{ours}/attention", f"{theirs}.self_attn"),
        *norm(f"{ours}/attention_norm", f"{theirs}.self_attn_layer_norm"),
        *linear(f"{ours}/mlp/up", f"{theirs}.fc1", "f d -> d f"),
        *linear(f"{ours}/mlp/down", f"{theirs}.fc2", "d f -> f d"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm"),
        *norm(f"{side}/final_norm", f"model.{side}.layer_norm"),
    )


ROWS = (
    row("embed/embedding", "model.shared.weight", "v d -> v d"),
    *_stack("encoder"),
    *_stack("decoder"),
    *_attention("decoder/layers/cross", "model.decoder.layers.*.encoder_attn"),
    *norm("decoder/layers/cross_norm", "model.decoder.layers.*.encoder_attn_layer_norm"),
    row("head/kernel", "lm_head.weight", "v d -> d v"),
    row("head_bias", "final_logits_bias", "1 v -> v", optional=True),
)
FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("d_model", "d_model"),
    Field("n_encoder_layers", "encoder_layers"),
    Field("n_decoder_layers", "decoder_layers"),
    Field("n_heads", "encoder_attention_heads"),
    Field("n_heads", "decoder_attention_heads"),
    Field("d_ff", "encoder_ffn_dim"),
    Field("d_ff", "decoder_ffn_dim"),
    Field("max_length", "max_position_embeddings", 1024),
    Field("activation", "activation_function", "gelu",
          (("swish", "silu"), ("gelu_new", "gelu_tanh"))),
    Field("dropout", "dropout", 0.1),
    Field("attention_dropout", "attention_dropout", 0.0),
    Field("mlp_dropout", "activation_dropout", 0.0),
)  # fmt: skip
BART = Family(
    name="BART",
    model_type="bart",
    architectures={
        "BartForConditionalGeneration": {"head_bias": True},
        "BartModel": {"head_bias": False},
    },
    fields=FIELDS,
    rows=ROWS,
    fixed={
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_position": "post",
        "final_norm": False,
        "embed_norm": True,
        "position": "learned",
        "position_offset": 2,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_embeddings": True,
    },
    demands={"tie_word_embeddings": True},
    derived=(ROOT_SCALED,),
    prefix="model.",
    ignored=(
        "lm_head.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    ),
    about="post-norm, learned positions",
)
MBART = BART._replace(
    name="mBART",
    model_type="mbart",
    architectures={
        "MBartForConditionalGeneration": {"head_bias": True},
        "MBartModel": {"head_bias": False},
    },
    fixed=BART.fixed | {"norm_position": "pre", "final_norm": True},
    about="pre-norm; mBART-50 too",
)
SINUSOIDAL = {"embed_norm": False, "position": "sinusoidal", "position_offset": 0,
              "sinusoid": "halves"}  # fmt: skip
PEGASUS = BART._replace(
    name="Pegasus",
    model_type="pegasus",
    architectures={
        "PegasusForConditionalGeneration": {"head_bias": True},
        "PegasusModel": {"head_bias": False},
    },
    fixed=BART.fixed | SINUSOIDAL | {"norm_position": "pre", "final_norm": True},
    ignored=(*BART.ignored, "model.*coder.embed_positions.weight"),
    about="pre-norm, sinusoidal positions",
)


def _vocabularies(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Both sides share one table, or each has its own."""
    if theirs.get("share_encoder_decoder_embeddings", True):
        return {"vocab_size": theirs["vocab_size"]}
    return {
        "vocab_size": theirs.get("decoder_vocab_size") or theirs["vocab_size"],
        "source_vocab_size": theirs["vocab_size"],
    }


SHARED, OWN = ((("shares_embeddings", value),) for value in (True, False))
MARIAN = BART._replace(
    name="Marian",
    model_type="marian",
    architectures={"MarianMTModel": {"head_bias": True}, "MarianModel": {"head_bias": False}},
    fields=FIELDS[1:],
    rows=(
        ROWS[0]._replace(only=SHARED),
        row("embed/embedding", "model.decoder.embed_tokens.weight", "v d -> v d", only=OWN),
        row("source_embed/embedding", "model.encoder.embed_tokens.weight", "s d -> s d", only=OWN),
        *ROWS[1:],
    ),
    fixed=BART.fixed | SINUSOIDAL,
    derived=(
        ROOT_SCALED,
        Derived(
            _vocabularies,
            lambda c: {
                "vocab_size": c.source_vocab_size or c.vocab_size,
                "decoder_vocab_size": c.vocab_size,
                "share_encoder_decoder_embeddings": not c.source_vocab_size,
            },
        ),
    ),
    ignored=PEGASUS.ignored,
    about="post-norm, sinusoidal positions; one vocabulary or two",
)
FAMILIES = (BART, MBART, PEGASUS, MARIAN)
