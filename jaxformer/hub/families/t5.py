"""T5 (Raffel et al. 2020) and its successors: T5 v1.1, FLAN-T5, mT5, UL2."""

from collections.abc import Mapping
from typing import Any

from jaxformer.config import ModelConfig
from jaxformer.hub.family import Derived, Family, Field, Row, norm, row


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        row(f"{ours}/query/kernel", f"{theirs}.q.weight", "(n h) d -> d n h"),
        row(f"{ours}/key/kernel", f"{theirs}.k.weight", "(n h) d -> d n h"),
        row(f"{ours}/value/kernel", f"{theirs}.v.weight", "(n h) d -> d n h"),
        row(f"{ours}/out/kernel", f"{theirs}.o.weight", "d (n h) -> n h d"),
    )


def _stack(side: str, mlp: int) -> tuple[Row, ...]:
    """One side; its feed-forward layer is number `mlp` of the sublayers."""
    ours, theirs = f"{side}/layers", f"{side}.block.*.layer"
    dense = f"{theirs}.{mlp}.DenseReluDense"
    gated, plain = (("gated", True),), (("gated", False),)
    return (
        row(
            f"{side}/relative_bias",
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "b n -> b n",
        ),
        *_attention(f"{ours}/attention", f"{theirs}.0.SelfAttention"),
        *norm(f"{ours}/attention_norm", f"{theirs}.0.layer_norm"),
        row(f"{ours}/mlp/up/kernel", f"{dense}.wi.weight", "f d -> d f", only=plain),
        row(f"{ours}/mlp/gate/kernel", f"{dense}.wi_0.weight", "f d -> d f", only=gated),
        row(f"{ours}/mlp/up/kernel", f"{dense}.wi_1.weight", "f d -> d f", only=gated),
        row(f"{ours}/mlp/down/kernel", f"{dense}.wo.weight", "d f -> f d"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.{mlp}.layer_norm"),
        *norm(f"{side}/final_norm", f"{side}.final_layer_norm"),
    )


def _settings(theirs: Mapping[str, Any]) -> dict[str, Any]:
    gate, _, act = theirs.get("feed_forward_proj", "relu").rpartition("-")
    # "gated-gelu" has always meant the tanh approximation.
    act = "gelu_tanh" if (gate, act) == ("gated", "gelu") or act == "gelu_new" else act
    # Whether the head is tied came to mean whether it is scaled; newer configs have a word for it.
    scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
    return {
        "head_dim": theirs.get("d_kv", 64),
        "activation": act,
        "gated": gate == "gated",
        "n_decoder_layers": theirs.get("num_decoder_layers") or theirs["num_layers"],
        "logit_scale": theirs["d_model"] ** -0.5 if scaled else 1.0,
    }


def _write_settings(config: ModelConfig) -> dict[str, Any]:
    act = {"gelu_tanh": "gelu" if config.gated else "gelu_new"}.get(
        config.activation, config.activation
    )
    return {
        "d_kv": config.dim_per_head,
        "feed_forward_proj": f"gated-{act}" if config.gated else act,
        "num_decoder_layers": config.n_decoder_layers,
        "scale_decoder_outputs": config.logit_scale != 1.0,
    }


T5 = Family(
    name="T5",
    model_type="t5",
    architectures={"T5ForConditionalGeneration": {}, "T5WithLMHeadModel": {}},
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "d_model"),
        Field("d_ff", "d_ff"),
        Field("n_encoder_layers", "num_layers"),
        Field("n_heads", "num_heads"),
        Field("relative_buckets", "relative_attention_num_buckets", 32),
        Field("relative_max_distance", "relative_attention_max_distance", 128),
        Field("norm_eps", "layer_norm_epsilon", 1e-6),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Field("max_length", "n_positions", 512),
        Field("dropout", "dropout_rate", 0.1),
    ),
    fixed={
        "norm": "rms",
        "norm_position": "pre",
        "position": "relative",
        "attention_scale": 1.0,
    },
    derived=(Derived(_settings, _write_settings),),
    rows=(
        row("embed/embedding", "shared.weight", "v d -> v d"),
        *_stack("encoder", mlp=1),
        *_stack("decoder", mlp=2),
        *_attention("decoder/layers/cross", "decoder.block.*.layer.1.EncDecAttention"),
        *norm("decoder/layers/cross_norm", "decoder.block.*.layer.1.layer_norm"),
        row("head/kernel", "lm_head.weight", "v d -> d v"),
    ),
    ignored=(
        "lm_head.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
    tied_if_absent=True,
    about="v1.0, v1.1, FLAN-T5, UL2: gated or not, head tied (and scaled) or not",
)
MT5 = T5._replace(
    name="mT5",
    model_type="mt5",
    architectures={"MT5ForConditionalGeneration": {}},
    derived=(Derived(lambda theirs: _settings(theirs) | {"logit_scale": 1.0}, _write_settings),),
    about="gated, head of its own",
)
FAMILIES = (T5, MT5)
