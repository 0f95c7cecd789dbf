"""GPT-2 and OPT: decoder-only, with learned positions and LayerNorm."""

from collections.abc import Mapping
from typing import Any

from jaxformer.hub.family import Derived, Family, Field, Row, linear, norm, row

LAYER = "decoder/layers"
QKV = tuple(f"{LAYER}/attention/{part}" for part in ("query", "key", "value"))
ACTIVATIONS = (("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"))
FIXED = {
    "norm": "layer",
    "norm_position": "pre",
    "position": "learned",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}


def _projection(ours: str, theirs: str, layout: str) -> tuple[Row, ...]:
    """A Conv1D, whose kernel is [in, out]."""
    return (
        row(f"{ours}/kernel", f"{theirs}.weight", layout),
        row(f"{ours}/bias", f"{theirs}.bias", "d -> d" if layout.endswith("d") else "f -> f"),
    )


def _inner(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {"d_ff": theirs.get("n_inner") or 4 * theirs["n_embd"]}


GPT2 = Family(
    name="GPT-2",
    model_type="gpt2",
    architectures={"GPT2LMHeadModel": {}},
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "n_embd"),
        Field("n_decoder_layers", "n_layer"),
        Field("n_heads", "n_head"),
        Field("max_length", "n_positions", 1024),
        Field("norm_eps", "layer_norm_epsilon", 1e-5),
        Field("activation", "activation_function", "gelu_new", ACTIVATIONS),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("dropout", "resid_pdrop", 0.1),
        Field("attention_dropout", "attn_pdrop", 0.1),
    ),
    fixed=FIXED,
    demands={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    derived=(Derived(_inner, lambda c: {"n_inner": c.d_ff}),),
    rows=(
        row("embed/embedding", "transformer.wte.weight", "v d -> v d"),
        row("decoder/positions/embedding", "transformer.wpe.weight", "p d -> p d"),
        *norm(f"{LAYER}/attention_norm", "transformer.h.*.ln_1"),
        Row(
            tuple(f"{path}/kernel" for path in QKV),
            "transformer.h.*.attn.c_attn.weight",
            ("d (n h) -> d n h",) * 3,
            axis=1,
        ),
        Row(
            tuple(f"{path}/bias" for path in QKV),
            "transformer.h.*.attn.c_attn.bias",
            ("(n h) -> n h",) * 3,
        ),
        *_projection(f"{LAYER}/attention/out", "transformer.h.*.attn.c_proj", "(n h) d -> n h d"),
        *norm(f"{LAYER}/mlp_norm", "transformer.h.*.ln_2"),
        *_projection(f"{LAYER}/mlp/up", "transformer.h.*.mlp.c_fc", "d f -> d f"),
        *_projection(f"{LAYER}/mlp/down", "transformer.h.*.mlp.c_proj", "f d -> f d"),
        *norm("decoder/final_norm", "transformer.ln_f"),
        row("head/kernel", "lm_head.weight", "v d -> d v"),
    ),
    prefix="transformer.",
    ignored=(
        "lm_head.weight",
        "transformer.h.*.attn.bias",
        "transformer.h.*.attn.masked_bias",
    ),
    about="joined projections in [in, out] layout",
)
OPT = Family(
    name="OPT",
    model_type="opt",
    architectures={"OPTForCausalLM": {}},
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "hidden_size"),
        Field("d_model", "word_embed_proj_dim"),
        Field("d_ff", "ffn_dim"),
        Field("n_decoder_layers", "num_hidden_layers"),
        Field("n_heads", "num_attention_heads"),
        Field("max_length", "max_position_embeddings", 2048),
        Field("activation", "activation_function", "relu", ACTIVATIONS),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("dropout", "dropout", 0.1),
        Field("attention_dropout", "attention_dropout", 0.0),
    ),
    fixed=FIXED | {"norm_eps": 1e-5, "position_offset": 2},
    demands={
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
    rows=(
        row("embed/embedding", "model.decoder.embed_tokens.weight", "v d -> v d"),
        row("decoder/positions/embedding", "model.decoder.embed_positions.weight", "p d -> p d"),
        *norm(f"{LAYER}/attention_norm", "model.decoder.layers.*.self_attn_layer_norm"),
        *(
            part
            for path, name in zip(QKV, ("q_proj", "k_proj", "v_proj"), strict=True)
            for part in linear(path, f"model.decoder.layers.*.self_attn.{name}", "(n h) d -> d n h")
        ),
        *linear(
            f"{LAYER}/attention/out",
            "model.decoder.layers.*.self_attn.out_proj",
            "d (n h) -> n h d",
        ),
        *norm(f"{LAYER}/mlp_norm", "model.decoder.layers.*.final_layer_norm"),
        *linear(f"{LAYER}/mlp/up", "model.decoder.layers.*.fc1", "f d -> d f"),
        *linear(f"{LAYER}/mlp/down", "model.decoder.layers.*.fc2", "d f -> f d"),
        *norm("decoder/final_norm", "model.decoder.final_layer_norm"),
        row("head/kernel", "lm_head.weight", "v d -> d v"),
    ),
    prefix="model.",
    ignored=("lm_head.weight",),
    about="all sizes but 350m, which normalises after and projects its embeddings",
)
FAMILIES = (GPT2, OPT)
