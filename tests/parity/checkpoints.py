"""Small checkpoints of every family: one row each, of the sizes that expose mistakes.

Widths of heads that are not the model's over their number, fewer key/value heads, odd numbers of
layers, another depth on each side. Nothing here needs torch: the documentation's table is made of
these rows, too.
"""

from typing import Any, NamedTuple

from jaxformer.hub.families import FAMILIES


class Checkpoint(NamedTuple):
    """A model of transformers with random parameters, as its class and config make it."""

    name: str
    architecture: str
    config: dict[str, Any]
    seed: int = 0
    """One with which generated texts do not repeat one token."""
    generation: dict[str, Any] = {}
    """What its generation_config.json says besides the usual."""
    untied: bool = False
    """A T5 whose head is its own: its config has no word for that."""
    pooling: dict[str, Any] | None = None
    """sentence-transformers' config of pooling, in files beside it."""

    @property
    def model_type(self) -> str:
        known = [t for t, f in FAMILIES.items() if self.architecture in f.architectures]
        return known[0]

    @property
    def generates(self) -> bool:
        return self.architecture.endswith(("ForConditionalGeneration", "MTModel", "ForCausalLM",
                                           "LMHeadModel"))  # fmt: skip


VOCAB, LENGTH = 99, 512
T5 = dict(vocab_size=VOCAB, d_model=40, d_kv=9, d_ff=56, num_layers=3, num_decoder_layers=2,
          num_heads=5, decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
BART = dict(vocab_size=VOCAB, d_model=40, encoder_layers=3, decoder_layers=2,
            encoder_attention_heads=5, decoder_attention_heads=5, encoder_ffn_dim=56,
            decoder_ffn_dim=56, max_position_embeddings=LENGTH, pad_token_id=1, bos_token_id=0,
            decoder_start_token_id=2)  # fmt: skip
MARIAN = BART | dict(pad_token_id=98, decoder_start_token_id=98, activation_function="swish",
                     scale_embedding=True)  # fmt: skip
DECODER = dict(vocab_size=VOCAB, hidden_size=42, intermediate_size=56, num_hidden_layers=3,
               num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=LENGTH,
               pad_token_id=0, bos_token_id=1)  # fmt: skip
HEAD = dict(head_dim=10)  # not 42 / 6
EVEN = DECODER | dict(hidden_size=48)  # for those that have no head_dim
GEMMA = DECODER | HEAD | dict(sliding_window=6, query_pre_attn_scalar=11)
GPT2 = dict(vocab_size=VOCAB, n_embd=40, n_layer=3, n_head=5, n_positions=LENGTH, n_inner=56,
            pad_token_id=0, bos_token_id=1)  # fmt: skip
OPT = dict(vocab_size=VOCAB, hidden_size=40, word_embed_proj_dim=40, ffn_dim=56, bos_token_id=2,
           num_hidden_layers=3, num_attention_heads=5, max_position_embeddings=LENGTH,
           pad_token_id=1)  # fmt: skip
BERT = dict(vocab_size=VOCAB, hidden_size=40, num_hidden_layers=3, num_attention_heads=5,
            intermediate_size=56, max_position_embeddings=LENGTH, pad_token_id=0)  # fmt: skip
ROBERTA = BERT | dict(max_position_embeddings=LENGTH + 2, type_vocab_size=1, pad_token_id=1)
DISTILBERT = dict(vocab_size=VOCAB, dim=40, hidden_dim=56, n_layers=3, n_heads=5,
                  max_position_embeddings=LENGTH, pad_token_id=0)  # fmt: skip
CLASSES = dict(id2label={0: "sun", 1: "rain", 2: "snow"})
FORCED = dict(forced_bos_token_id=7,  suppress_tokens=[11, 12, 13],
              begin_suppress_tokens=[21, 22], min_length=5)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64, rope_theta=500.0)  # fmt: skip
LONGROPE = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 1.6], rope_theta=5000.0,
                long_factor=[1.0, 2.0, 4.0, 8.0])  # fmt: skip

CHECKPOINTS = (
    Checkpoint("T5 v1.0", "T5ForConditionalGeneration", T5),
    Checkpoint(
        "T5 v1.1, FLAN-T5",
        "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        untied=True,
    ),
    Checkpoint(
        "UL2",
        "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-silu", tie_word_embeddings=False),
        untied=True,
    ),
    Checkpoint(
        "UL2, scaled head",
        "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-silu"),
    ),
    Checkpoint(
        "mT5",
        "MT5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        untied=True,
    ),
    Checkpoint(
        "BART",
        "BartForConditionalGeneration",
        BART,
        generation=FORCED | dict(forced_eos_token_id=43),
    ),
    Checkpoint("BART, bare", "BartModel", BART | dict(scale_embedding=True)),
    Checkpoint(
        "mBART",
        "MBartForConditionalGeneration",
        BART | dict(scale_embedding=True),
        generation=FORCED | dict(forced_eos_token_id=19),
    ),
    Checkpoint(
        "Pegasus",
        "PegasusForConditionalGeneration",
        BART | dict(scale_embedding=True),
    ),
    Checkpoint("Marian, one vocabulary", "MarianMTModel", MARIAN),
    Checkpoint(
        "Marian, two vocabularies",
        "MarianMTModel",
        MARIAN
        | dict(decoder_vocab_size=60, pad_token_id=58, decoder_start_token_id=58)
        | dict(share_encoder_decoder_embeddings=False),
        seed=7,
    ),
    Checkpoint("GPT-2", "GPT2LMHeadModel", GPT2),
    Checkpoint("OPT", "OPTForCausalLM", OPT),
    Checkpoint("Llama 2", "LlamaForCausalLM", DECODER | HEAD),
    Checkpoint(
        "Llama, linear rope scaling",
        "LlamaForCausalLM",
        DECODER
        | dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=500.0))
        | dict(attention_bias=True, mlp_bias=True, hidden_size=48),
    ),
    Checkpoint("Llama 3", "LlamaForCausalLM", DECODER | HEAD | dict(rope_parameters=LLAMA3)),
    Checkpoint("SmolLM, tied", "LlamaForCausalLM", EVEN | dict(tie_word_embeddings=True)),
    Checkpoint("Mistral, window", "MistralForCausalLM", DECODER | HEAD | dict(sliding_window=7)),
    Checkpoint("Qwen2", "Qwen2ForCausalLM", EVEN),
    Checkpoint(
        "Qwen2, window layers",
        "Qwen2ForCausalLM",
        EVEN | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    Checkpoint("Qwen3", "Qwen3ForCausalLM", DECODER | HEAD),
    Checkpoint("Gemma", "GemmaForCausalLM", DECODER | HEAD),
    Checkpoint("Gemma 2", "Gemma2ForCausalLM", GEMMA),
    Checkpoint("Gemma 3", "Gemma3ForCausalLM", GEMMA | dict(num_hidden_layers=7)),
    Checkpoint(
        "Gemma 3, linear rope scaling",
        "Gemma3ForCausalLM",
        GEMMA
        | dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    Checkpoint("Phi-3", "Phi3ForCausalLM", EVEN),
    Checkpoint("Phi-3, window", "Phi3ForCausalLM", EVEN | dict(sliding_window=9)),
    Checkpoint(
        "Phi-3, LongRoPE",
        "Phi3ForCausalLM",
        EVEN
        | dict(
            rope_parameters=LONGROPE,
            max_position_embeddings=4 * LENGTH,
            original_max_position_embeddings=LENGTH,
        ),
    ),
    Checkpoint(
        "Phi-3, partly rotated",
        "Phi3ForCausalLM",
        EVEN
        | dict(
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75)
        ),
    ),
    Checkpoint("BERT, masked LM", "BertForMaskedLM", BERT),
    Checkpoint("BERT, pre-training", "BertForPreTraining", BERT),
    Checkpoint("BERT, sequence classes", "BertForSequenceClassification", BERT | CLASSES),
    Checkpoint("BERT, token classes", "BertForTokenClassification", BERT | CLASSES),
    Checkpoint("BERT, bare", "BertModel", BERT),
    Checkpoint(
        "MiniLM, mean pooling",
        "BertModel",
        BERT,
        pooling=dict(pooling_mode_mean_tokens=True, pooling_mode_cls_token=False),
    ),
    Checkpoint(
        "MiniLM, CLS pooling",
        "BertModel",
        BERT,
        pooling=dict(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True),
    ),
    Checkpoint("RoBERTa, masked LM", "RobertaForMaskedLM", ROBERTA),
    Checkpoint("RoBERTa, sequence classes", "RobertaForSequenceClassification", ROBERTA | CLASSES),
    Checkpoint("RoBERTa, token classes", "RobertaForTokenClassification", ROBERTA | CLASSES),
    Checkpoint("RoBERTa, bare", "RobertaModel", ROBERTA),
    Checkpoint("XLM-RoBERTa, masked LM", "XLMRobertaForMaskedLM", ROBERTA),
    Checkpoint(
        "XLM-RoBERTa, sequence classes",
        "XLMRobertaForSequenceClassification",
        ROBERTA | CLASSES,
        seed=1,  # with 0 its logits are all but equal
    ),
    Checkpoint("DistilBERT, masked LM", "DistilBertForMaskedLM", DISTILBERT),
    Checkpoint(
        "DistilBERT, sequence classes", "DistilBertForSequenceClassification", DISTILBERT | CLASSES
    ),
    Checkpoint(
        "DistilBERT, token classes", "DistilBertForTokenClassification", DISTILBERT | CLASSES
    ),
    Checkpoint("DistilBERT, bare", "DistilBertModel", DISTILBERT),
)
