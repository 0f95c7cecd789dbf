"""Decoder-only families of Llama's build: Llama, Mistral, Qwen, Gemma, Phi-3."""

import math
from collections.abc import Mapping
from typing import Any

from jaxformer.config import ModelConfig
from jaxformer.hub.families.derived import (
    FULL,
    HEADS,
    QUERY_SCALE,
    ROPE,
    SLIDING,
    heads,
    layer_types,
    numbers,
    rope,
    windows,
    write_rope,
    write_windows,
)
from jaxformer.hub.family import Derived, Family, Field, Row, linear, norm, row

LAYER, THEIRS = "decoder/layers", "model.layers.*"
Q, K = "(n h) d -> d n h", "(k h) d -> d k h"
ACTIVATIONS = (("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("relu", "relu"),
               ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh"))  # fmt: skip

SHELL: tuple[Row, ...] = (
    row("embed/embedding", "model.embed_tokens.weight", "v d -> v d"),
    *norm("decoder/final_norm", "model.norm"),
    row("head/kernel", "lm_head.weight", "v d -> d v"),
)
ATTENTION = (
    *linear(f"{LAYER}/attention/query", f"{THEIRS}.self_attn.q_proj", Q),
    *linear(f"{LAYER}/attention/key", f"{THEIRS}.self_attn.k_proj", K),
    *linear(f"{LAYER}/attention/value", f"{THEIRS}.self_attn.v_proj", K),
    *linear(f"{LAYER}/attention/out", f"{THEIRS}.self_attn.o_proj", "d (n h) -> n h d"),
    row(f"{LAYER}/attention/query_norm/scale", f"{THEIRS}.self_attn.q_norm.weight", "h -> h"),
    row(f"{LAYER}/attention/key_norm/scale", f"{THEIRS}.self_attn.k_norm.weight", "h -> h"),
)
MLP = (
    *linear(f"{LAYER}/mlp/gate", f"{THEIRS}.mlp.gate_proj", "f d -> d f"),
    *linear(f"{LAYER}/mlp/up", f"{THEIRS}.mlp.up_proj", "f d -> d f"),
    *linear(f"{LAYER}/mlp/down", f"{THEIRS}.mlp.down_proj", "d f -> f d"),
)
TWO_NORMS = (
    *norm(f"{LAYER}/attention_norm", f"{THEIRS}.input_layernorm"),
    *norm(f"{LAYER}/mlp_norm", f"{THEIRS}.post_attention_layernorm"),
)
FOUR_NORMS = (
    *norm(f"{LAYER}/attention_norm", f"{THEIRS}.input_layernorm"),
    *norm(f"{LAYER}/attention_norm_after", f"{THEIRS}.post_attention_layernorm"),
    *norm(f"{LAYER}/mlp_norm", f"{THEIRS}.pre_feedforward_layernorm"),
    *norm(f"{LAYER}/mlp_norm_after", f"{THEIRS}.post_feedforward_layernorm"),
)
FUSED = (
    Row(
        (
            f"{LAYER}/attention/query/kernel",
            f"{LAYER}/attention/key/kernel",
            f"{LAYER}/attention/value/kernel",
        ),
        f"{THEIRS}.self_attn.qkv_proj.weight",
        (Q, K, K),
    ),  # fmt: skip
    *linear(f"{LAYER}/attention/out", f"{THEIRS}.self_attn.o_proj", "d (n h) -> n h d"),
    Row(
        (f"{LAYER}/mlp/gate/kernel", f"{LAYER}/mlp/up/kernel"),
        f"{THEIRS}.mlp.gate_up_proj.weight",
        ("f d -> d f", "f d -> d f"),
    ),
    *linear(f"{LAYER}/mlp/down", f"{THEIRS}.mlp.down_proj", "d f -> f d"),
)

FIXED = {"norm": "rms", "norm_position": "pre", "position": "rotary", "gated": True}
COMMON = (
    Field("vocab_size", "vocab_size"),
    Field("d_model", "hidden_size"),
    Field("d_ff", "intermediate_size"),
    Field("n_decoder_layers", "num_hidden_layers"),
    Field("n_heads", "num_attention_heads"),
    Field("norm_eps", "rms_norm_eps", 1e-6),
    Field("attention_dropout", "attention_dropout", 0.0),
)
LENGTH = Field("max_length", "max_position_embeddings", 2048)
ACT = Field("activation", "hidden_act", "silu", ACTIVATIONS)
UNTIED = Field("tie_embeddings", "tie_word_embeddings", False)
TIED = Field("tie_embeddings", "tie_word_embeddings", True)
BIASES = (
    Field("qkv_bias", "attention_bias", False),
    Field("out_bias", "attention_bias", False),
)


def _mistral(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {"window": [theirs.get("sliding_window", 4096) or 0]}


def _qwen(theirs: Mapping[str, Any]) -> dict[str, Any]:
    layers, first = numbers(theirs, "num_hidden_layers"), theirs.get("max_window_layers", 28)
    if not theirs.get("use_sliding_window"):
        return {}
    types = layer_types(theirs, [SLIDING if i >= first else FULL for i in layers])
    return {"window": windows(types, theirs.get("sliding_window") or 4096)}


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": any(config.window), **write_windows(config)}


def _gemma2(theirs: Mapping[str, Any]) -> dict[str, Any]:
    usual = [FULL if i % 2 else SLIDING for i in numbers(theirs, "num_hidden_layers")]
    return {"window": windows(layer_types(theirs, usual), theirs.get("sliding_window") or 4096)}


def _gemma3(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that slide a window have a rotary base of their own, and are not stretched."""
    every = theirs.get("sliding_window_pattern") or 6
    usual = [SLIDING if (i + 1) % every else FULL for i in numbers(theirs, "num_hidden_layers")]
    types = layer_types(theirs, usual)
    given = theirs.get("rope_parameters") or {}
    near = {"rope_theta": theirs.get("rope_local_base_freq", 10000.0)}
    ours = {
        FULL: rope({**theirs, "rope_parameters": given.get(FULL)}, 1e6),
        SLIDING: rope({"rope_parameters": given.get(SLIDING) or near}),
    }
    return {
        "window": windows(types, theirs.get("sliding_window") or 4096),
        "rope_theta": [ours[kind]["rope_theta"][0] for kind in types],
        "rope_factor": [ours[kind].get("rope_factor", [1.0])[0] for kind in types],
    }


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    theirs = write_windows(config)
    theta, factor = config.rope_theta, config.rope_factor
    for i, kind in enumerate(theirs["layer_types"]):
        own, stretch = theta[i % len(theta)], factor[i % len(factor)]
        theirs["rope_theta" if kind == FULL else "rope_local_base_freq"] = own
        if kind == FULL and stretch != 1.0:
            theirs["rope_scaling"] = {"rope_type": "linear", "factor": stretch}
    return theirs


def _phi3(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """LongRoPE has two sets of divisors, for contexts within the original length and beyond it;
    the model is read as it is within."""
    length = theirs.get("max_position_embeddings", 4096)
    given = theirs.get("rope_parameters") or {}
    fraction = given.get("partial_rotary_factor") or theirs.get("partial_rotary_factor") or 1.0
    width = int(heads(theirs)["head_dim"] * fraction)
    scaling = given or theirs.get("rope_scaling") or {}
    ours = {"window": [theirs.get("sliding_window") or 0], "rotary_dim": width}
    if (scaling.get("rope_type") or scaling.get("type")) not in ("longrope", "su"):
        return ours | rope(theirs) | {"max_length": length}
    first = (
        scaling.get("original_max_position_embeddings")
        or theirs.get("original_max_position_embeddings")
        or length
    )
    stretch = length / first
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(first)) if stretch > 1 else 1.0
    return ours | {
        "max_length": first,
        "rope_theta": [float(scaling.get("rope_theta") or theirs.get("rope_theta") or 10000.0)],
        "rope_divisors": scaling["short_factor"],
        "rope_magnitude": scaling.get("attention_factor") or magnitude,
    }


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    theirs: dict[str, Any] = {
        **write_rope(config),
        "sliding_window": config.window[0] or None,
        "partial_rotary_factor": config.rotated / config.dim_per_head,
        "max_position_embeddings": config.max_length,
        "original_max_position_embeddings": config.max_length,
    }
    if config.rope_divisors:
        factors = list(config.rope_divisors)
        theirs["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": config.rope_magnitude,
        }
    return theirs


LLAMA = Family(
    name="Llama",
    model_type="llama",
    architectures={"LlamaForCausalLM": {}},
    fields=(*COMMON, LENGTH, ACT, UNTIED, *BIASES, Field("mlp_bias", "mlp_bias", False)),
    rows=(*SHELL, *ATTENTION, *MLP, *TWO_NORMS),
    fixed=FIXED,
    derived=(HEADS, ROPE),
    prefix="model.",
    ignored=("lm_head.weight", "*.rotary_emb.inv_freq"),
    about="Llama 1, 2, 3 (linear and llama3 rope scaling), SmolLM, and others of that type",
)
MISTRAL = LLAMA._replace(
    name="Mistral",
    model_type="mistral",
    architectures={"MistralForCausalLM": {}},
    fields=(*COMMON, LENGTH, ACT, UNTIED),
    derived=(HEADS, ROPE, Derived(_mistral, lambda c: {"sliding_window": c.window[0] or None})),
    about="sliding window",
)
QWEN2 = LLAMA._replace(
    name="Qwen2",
    model_type="qwen2",
    architectures={"Qwen2ForCausalLM": {}},
    fields=(*COMMON, LENGTH, ACT, UNTIED),
    fixed=FIXED | {"qkv_bias": True},
    derived=(HEADS, ROPE, Derived(_qwen, _write_qwen)),
    about="Qwen2 and 2.5: biases on queries, keys and values",
)
QWEN3 = LLAMA._replace(
    name="Qwen3",
    model_type="qwen3",
    architectures={"Qwen3ForCausalLM": {}},
    fields=(*COMMON, LENGTH, ACT, UNTIED, *BIASES),
    fixed=FIXED | {"qk_norm": True},
    derived=(HEADS, ROPE, Derived(_qwen, _write_qwen)),
    about="norms on queries and keys",
)
GEMMA = LLAMA._replace(
    name="Gemma",
    model_type="gemma",
    architectures={"GemmaForCausalLM": {}},
    fields=(
        *COMMON,
        Field("max_length", "max_position_embeddings", 8192),
        # An old config says gelu and means this (its hidden_activation is null).
        Field(
            "activation",
            "hidden_act",
            "gelu_pytorch_tanh",
            (("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu_tanh")),
        ),
        TIED,
        *BIASES,
    ),  # fmt: skip
    fixed=FIXED | {"norm_unit_offset": True},
    derived=(
        HEADS,
        ROPE,
        Derived(lambda theirs: {"embed_scale": math.sqrt(theirs["hidden_size"])}, lambda c: {}),
    ),
    about="norms by 1 + weight, scaled embeddings",
)
GEMMA_ACT = Field(
    "activation", "hidden_activation", "gelu_pytorch_tanh", (("gelu_pytorch_tanh", "gelu_tanh"),)
)
GEMMA2 = GEMMA._replace(
    name="Gemma 2",
    model_type="gemma2",
    architectures={"Gemma2ForCausalLM": {}},
    fields=(
        *COMMON,
        Field("max_length", "max_position_embeddings", 8192),
        GEMMA_ACT,
        TIED,
        *BIASES,
        Field("attention_softcap", "attn_logit_softcapping", 50.0, ((None, 0.0),)),
        Field("logit_softcap", "final_logit_softcapping", 30.0, ((None, 0.0),)),
    ),
    rows=(*SHELL, *ATTENTION, *MLP, *FOUR_NORMS),
    fixed=GEMMA.fixed | {"norm_position": "both"},
    derived=(*GEMMA.derived, QUERY_SCALE, Derived(_gemma2, write_windows)),
    about="soft-caps, alternating windows, four norms",
)
GEMMA3 = GEMMA2._replace(
    name="Gemma 3 (text)",
    model_type="gemma3_text",
    architectures={"Gemma3ForCausalLM": {}},
    fields=(
        *COMMON,
        Field("max_length", "max_position_embeddings", 131072),
        GEMMA_ACT,
        TIED,
        *BIASES,
        Field("attention_softcap", "attn_logit_softcapping", None, ((None, 0.0),)),
        Field("logit_softcap", "final_logit_softcapping", None, ((None, 0.0),)),
    ),
    fixed=GEMMA2.fixed | {"qk_norm": True},
    demands={"use_bidirectional_attention": False},
    derived=(
        HEADS,
        GEMMA.derived[-1],
        QUERY_SCALE,
        Derived(_gemma3, _write_gemma3),
    ),
    about="norms on queries and keys, five windowed layers to one, two rotary bases",
)
PHI3 = LLAMA._replace(
    name="Phi-3",
    model_type="phi3",
    architectures={"Phi3ForCausalLM": {}},
    fields=(
        *(field for field in COMMON if field.ours != "norm_eps"),
        Field("norm_eps", "rms_norm_eps", 1e-5),
        ACT,
        UNTIED,
        Field("dropout", "resid_pdrop", 0.0),
    ),
    rows=(*SHELL, *FUSED, *TWO_NORMS),
    derived=(HEADS, Derived(_phi3, _write_phi3)),
    about="joined projections, LongRoPE within the original context",
)
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3)
