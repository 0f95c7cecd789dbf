"""BERT and the encoders built like it: RoBERTa, XLM-RoBERTa, DistilBERT, MiniLM."""

from collections.abc import Mapping
from typing import Any

from jaxformer.hub.families.derived import LABELS
from jaxformer.hub.family import Derived, Family, Field, Row, linear, norm, row

LAYER = "encoder/layers"
FIXED = {
    "norm": "layer",
    "norm_position": "post",
    "final_norm": False,
    "embed_norm": True,
    "position": "learned",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}
TOKENS = {"head": "tokens", "head_transform": True, "head_bias": True}
SEQUENCE, EACH = {"head": "sequence", "pooler": "tanh"}, {"head": "each"}
BARE = {"head": "none", "pooler": "tanh"}
ACTIVATION = (("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"))
FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("d_model", "hidden_size"),
    Field("d_ff", "intermediate_size"),
    Field("n_encoder_layers", "num_hidden_layers"),
    Field("n_heads", "num_attention_heads"),
    Field("n_token_types", "type_vocab_size", 2),
    Field("norm_eps", "layer_norm_eps", 1e-12),
    Field("activation", "hidden_act", "gelu", ACTIVATION),
    Field("dropout", "hidden_dropout_prob", 0.1),
    Field("attention_dropout", "attention_probs_dropout_prob", 0.1),
)


def _linear(ours: str, theirs: str) -> tuple[Row, ...]:
    """A dense layer of the model's own width."""
    return (
        row(f"{ours}/kernel", f"{theirs}.weight", "e d -> d e"),
        row(f"{ours}/bias", f"{theirs}.bias", "d -> d"),
    )


def _body(prefix: str) -> tuple[Row, ...]:
    embeddings, theirs = f"{prefix}.embeddings", f"{prefix}.encoder.layer.*"
    heads, out = "(n h) d -> d n h", "d (n h) -> n h d"
    return (
        row("embed/embedding", f"{embeddings}.word_embeddings.weight", "v d -> v d"),
        row(
            "encoder/positions/embedding", f"{embeddings}.position_embeddings.weight", "p d -> p d"
        ),
        row(
            "encoder/token_types/embedding",
            f"{embeddings}.token_type_embeddings.weight",
            "t d -> t d",
        ),
        *norm("encoder/embed_norm", f"{embeddings}.LayerNorm"),
        *linear(f"{LAYER}/attention/query", f"{theirs}.attention.self.query", heads),
        *linear(f"{LAYER}/attention/key", f"{theirs}.attention.self.key", heads),
        *linear(f"{LAYER}/attention/value", f"{theirs}.attention.self.value", heads),
        *linear(f"{LAYER}/attention/out", f"{theirs}.attention.output.dense", out),
        *norm(f"{LAYER}/attention_norm", f"{theirs}.attention.output.LayerNorm"),
        *linear(f"{LAYER}/mlp/up", f"{theirs}.intermediate.dense", "f d -> d f"),
        *linear(f"{LAYER}/mlp/down", f"{theirs}.output.dense", "d f -> f d"),
        *norm(f"{LAYER}/mlp_norm", f"{theirs}.output.LayerNorm"),
    )


BERT = Family(
    name="BERT",
    model_type="bert",
    architectures={
        "BertModel": BARE,
        "BertForMaskedLM": TOKENS,
        "BertForPreTraining": TOKENS,
        "BertForSequenceClassification": SEQUENCE,
        "BertForTokenClassification": EACH,
    },
    fields=(*FIELDS, Field("max_length", "max_position_embeddings", 512)),
    fixed=FIXED,
    demands={"position_embedding_type": "absolute", "is_decoder": False},
    derived=(LABELS,),
    rows=(
        *_body("bert"),
        *_linear("pooler", "bert.pooler.dense"),
        *_linear("transform", "cls.predictions.transform.dense"),
        *norm("transform_norm", "cls.predictions.transform.LayerNorm"),
        row("head_bias", "cls.predictions.bias", "v -> v"),
        *linear("head", "classifier", "c d -> d c"),
    ),
    prefix="bert.",
    ignored=(
        "bert.embeddings.position_ids",
        "bert.pooler.dense.*",
        "cls.predictions.decoder.*",
        "cls.seq_relationship.*",
    ),
    renames=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    about="and MiniLM, and sentence-transformers of both",
)


def _past_padding(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Positions are counted from the row after the padding id's."""
    offset = theirs.get("pad_token_id", 1) + 1
    length = theirs.get("max_position_embeddings", 512)
    return {"position_offset": offset, "max_length": length - offset}


POSITIONS = Derived(
    _past_padding,
    lambda c: {
        "pad_token_id": c.position_offset - 1,
        "max_position_embeddings": c.max_length + c.position_offset,
    },
)
SENTENCE, BASE = (("head", "sequence"),), (("head", "none"),)
ROBERTA = Family(
    name="RoBERTa",
    model_type="roberta",
    architectures={
        "RobertaModel": BARE,
        "RobertaForMaskedLM": TOKENS,
        "RobertaForSequenceClassification": SEQUENCE,
        "RobertaForTokenClassification": EACH,
    },
    fields=FIELDS,
    fixed=FIXED,
    demands=BERT.demands,
    derived=(LABELS, POSITIONS),
    rows=(
        *_body("roberta"),
        *(r._replace(only=BASE) for r in _linear("pooler", "roberta.pooler.dense")),
        *(r._replace(only=SENTENCE) for r in _linear("pooler", "classifier.dense")),
        *(r._replace(only=SENTENCE) for r in linear("head", "classifier.out_proj", "c d -> d c")),
        *(r._replace(only=(("head", "each"),)) for r in linear("head", "classifier", "c d -> d c")),
        *_linear("transform", "lm_head.dense"),
        *norm("transform_norm", "lm_head.layer_norm"),
        row("head_bias", "lm_head.bias", "v -> v"),
    ),
    prefix="roberta.",
    ignored=("roberta.embeddings.position_ids", "roberta.pooler.dense.*", "lm_head.decoder.*"),
    about="byte-level BPE, positions from the padding id on",
)
XLM_ROBERTA = ROBERTA._replace(
    name="XLM-RoBERTa",
    model_type="xlm-roberta",
    architectures={f"XLM{name}": fields for name, fields in ROBERTA.architectures.items()},
    about="RoBERTa in a hundred languages",
)
DISTILBERT = Family(
    name="DistilBERT",
    model_type="distilbert",
    architectures={
        "DistilBertModel": {"head": "none"},
        "DistilBertForMaskedLM": TOKENS,
        "DistilBertForSequenceClassification": {"head": "sequence", "pooler": "relu"},
        "DistilBertForTokenClassification": EACH,
    },
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "dim"),
        Field("d_ff", "hidden_dim"),
        Field("n_encoder_layers", "n_layers"),
        Field("n_heads", "n_heads"),
        Field("max_length", "max_position_embeddings", 512),
        Field("activation", "activation", "gelu", ACTIVATION),
        Field("dropout", "dropout", 0.1),
        Field("attention_dropout", "attention_dropout", 0.1),
    ),
    fixed=FIXED | {"norm_eps": 1e-12},
    derived=(LABELS,),
    rows=(
        row("embed/embedding", "distilbert.embeddings.word_embeddings.weight", "v d -> v d"),
        row(
            "encoder/positions/embedding",
            "distilbert.embeddings.position_embeddings.weight",
            "p d -> p d",
        ),
        *norm("encoder/embed_norm", "distilbert.embeddings.LayerNorm"),
        *(
            r
            for ours, name in (("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin"))
            for r in linear(
                f"{LAYER}/attention/{ours}",
                f"distilbert.transformer.layer.*.attention.{name}",
                "(n h) d -> d n h",
            )
        ),
        *linear(
            f"{LAYER}/attention/out",
            "distilbert.transformer.layer.*.attention.out_lin",
            "d (n h) -> n h d",
        ),
        *norm(f"{LAYER}/attention_norm", "distilbert.transformer.layer.*.sa_layer_norm"),
        *linear(f"{LAYER}/mlp/up", "distilbert.transformer.layer.*.ffn.lin1", "f d -> d f"),
        *linear(f"{LAYER}/mlp/down", "distilbert.transformer.layer.*.ffn.lin2", "d f -> f d"),
        *norm(f"{LAYER}/mlp_norm", "distilbert.transformer.layer.*.output_layer_norm"),
        *_linear("transform", "vocab_transform"),
        *norm("transform_norm", "vocab_layer_norm"),
        row("head_bias", "vocab_projector.bias", "v -> v"),
        *_linear("pooler", "pre_classifier"),
        *linear("head", "classifier", "c d -> d c"),
    ),
    prefix="distilbert.",
    ignored=("vocab_projector.weight",),
    about="no token types, a pooler of its own",
)
FAMILIES = (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT)
