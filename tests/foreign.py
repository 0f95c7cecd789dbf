"""Tiny checkpoints as other libraries have them: a T5, a Llama that chats, and BERTs."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from toy_models import toy_params

from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.converting import export
from jaxformer.data.foreign import ForeignTokenizer, from_files
from jaxformer.data.tokenizer import train_sentencepiece
from jaxformer.model import Model

SIZE: dict[str, Any] = dict(d_model=8, d_ff=12, n_heads=2, max_length=24)
LLAMA = ModelConfig(n_decoder_layers=2, norm="rms", activation="silu", gated=True,
                    n_kv_heads=1, tie_embeddings=False, **SIZE)  # fmt: skip
T5 = ModelConfig(n_encoder_layers=2, n_decoder_layers=1, norm="rms", position="relative",
                 activation="relu", attention_scale=1.0, relative_buckets=8,
                 relative_max_distance=16, logit_scale=8**-0.5, **SIZE)  # fmt: skip
BERT = ModelConfig(n_encoder_layers=2, norm_position="post", final_norm=False, embed_norm=True,
                   position="learned", qkv_bias=True, out_bias=True, mlp_bias=True, norm_eps=1e-12,
                   n_token_types=2, head_transform=True, head_bias=True, **SIZE)  # fmt: skip
BARE = dataclasses.replace(BERT, head="none", head_transform=False, head_bias=False, pooler="tanh")
CLASSES = dataclasses.replace(BARE, head="sequence", labels=("bad", "good", "odd"))
TAGGER = dataclasses.replace(CLASSES, head="each", pooler="none")
CONFIGS = {"t5": T5, "llama": LLAMA, "bert": BERT, "bare": BARE,
           "classes": CLASSES, "tagger": TAGGER}  # fmt: skip

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = ["<|end|>", "<|user|>", "<|assistant|>"]


@cache
def tokenizer(kind: str) -> ForeignTokenizer:
    """Of pieces (t5), of letters with a chat template (llama), or of letters and their like after
    the first of a word (the BERTs)."""
    if kind == "t5":
        pieces = train_sentencepiece(["abcde bead cab dab ace dace " * 9], 300)
        files = {"spiece.model": pieces.model,
                 "tokenizer_config.json": as_json({"extra_ids": 0})}  # fmt: skip
        ids = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
        return from_files(files, {"model_type": "t5", "is_encoder_decoder": True, **ids}, {})
    if kind == "llama":
        letters = [*ROLES, "<unk>", *"abcde "]
        vocab = {letter: i for i, letter in enumerate(letters)}
        plain = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        added = [
            {"id": i, "content": token, "special": True, **plain} for i, token in enumerate(ROLES)
        ]
        backend = {
            "version": "1.0", "added_tokens": added, "normalizer": None, "truncation": None,
            "padding": None, "post_processor": None, "decoder": {"type": "Fuse"},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated",
                              "invert": False},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        }  # fmt: skip
        names = {"eos_token": "<|end|>", "bos_token": "<|user|>"}
        files = {"tokenizer.json": as_json(backend), "chat_template.jinja": TEMPLATE.encode(),
                 "tokenizer_config.json": as_json(names)}  # fmt: skip
        return from_files(files, {"model_type": "llama", "eos_token_id": 0, "bos_token_id": 1}, {})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde", *(f"##{x}" for x in "abcde")]
    files = {"vocab.txt": "\n".join([*words, ""]).encode()}
    return from_files(files, {"model_type": "bert", "pad_token_id": 0}, {})


def model(kind: str, **options: Any) -> Model:
    """A model with lively parameters, in nothing but its tokenizer from elsewhere."""
    pieces = tokenizer(kind)
    config = dataclasses.replace(CONFIGS[kind], vocab_size=pieces.vocab_size, **options)
    data = DataConfig(task=config.task, buckets=(config.max_length,))
    # Without what they have in common, so that what is read changes what is said.
    params = jax.tree.map(lambda leaf: (2 * leaf - 0.2).astype(leaf.dtype), toy_params(config))
    return Model(config, params, pieces, data, DecodeConfig(max_length=6, batch_size=4))


def directory(kind: str, path: Path, **options: Any) -> Path:
    """The same as a Hugging Face directory."""
    export(model(kind, **options), path)
    return path


def same_params(a: Any, b: Any) -> bool:
    """Whether two trees of parameters are the same to the bit."""
    flat_a, flat_b = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    return len(flat_a) == len(flat_b) and all(
        x[0] == y[0] and x[1].dtype == y[1].dtype and np.array_equal(x[1], y[1])
        for x, y in zip(flat_a, flat_b, strict=True)
    )


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
