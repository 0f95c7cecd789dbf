"""Llama-type models in GGUF files, in the terms of Hugging Face: a config, and tensors by name."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from jaxformer.errors import listed
from jaxformer.hub.gguf_file import Header, read_header
from jaxformer.hub.tensors import Stored

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
           "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Of llama.cpp, whose "llama" is Mistral too."""

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
OTHERS = {
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "vocab_size",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length",
    # Notes, which change nothing:
    "rope.scaling.finetuned", "tensor_data_layout",
}  # fmt: skip

TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
NAME = re.compile(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?([a-z_]+)\.(weight|bias)")


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The model in a GGUF file: what its `config.json` would hold, and its tensors by name.

    Only the header is read; a tensor is made floats when it is read. Raises `CheckpointError` if
    the file is damaged, or the model is not of an architecture known here in all its fields.
    """
    header = read_header(path)
    config = _config(header)
    tensors, unknown = {}, []
    for name in header.places.keys() - {ROPE_FACTORS}:
        match = NAME.fullmatch(name)
        layer, part, suffix = match.groups() if match else (None, "", "")
        if layer is None and part in TENSORS:
            tensors[f"{TENSORS[part]}.{suffix}"] = header.stored(name)
        elif layer is not None and part in LAYER_TENSORS:
            stored = header.stored(name)
            if header.fields["general.architecture"] == "llama" and part in ("attn_q", "attn_k"):
                stored = _rotated_by_halves(header, name, stored, config)
            tensors[f"model.layers.{layer}.{LAYER_TENSORS[part]}.{suffix}"] = stored
        else:
            unknown.append(name)
    if unknown:
        raise header.error(f"these tensors are of no model known here: {listed(sorted(unknown))}")
    return config, tensors


def _config(header: Header) -> dict[str, Any]:
    arch = header.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise header.error(f"its architecture {arch!r} is not one of those known here ({known})")
    if header.get("split.count", int, 1) > 1:
        raise header.error("it is one part of a split file; join them with llama-gguf-split")
    prefix = f"{arch}."
    given = {key.removeprefix(prefix) for key in header.fields if key.startswith(prefix)}
    # Mixtures of experts have their own tensors; a dense model may say that it has none.
    given -= {key for key in ("expert_count", "expert_used_count")
              if header.fields.get(prefix + key) == 0}  # fmt: skip
    if unknown := given - SIZES.keys() - OTHERS:
        raise header.error(f"it has settings not known here: {listed(sorted(unknown))}")

    def size(key: str, default: int | None = None) -> int:
        value = header.get(prefix + key, int, default)
        if not 0 < value < 2**31:
            raise header.error(f"{prefix + key} is {value}")
        return value

    def real(key: str, default: float | None = None) -> float:
        value = header.get(prefix + key, float, default)
        if not 0 < value < math.inf:
            raise header.error(f"{prefix + key} is {value}")
        return value

    config: dict[str, Any] = {name: size(key) for key, name in SIZES.items()}
    n_heads = config["num_attention_heads"]
    head_dim = size("attention.key_length", max(1, config["hidden_size"] // n_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise header.error(f"{prefix + key} is not the size of a head, {head_dim}")
    if "token_embd.weight" not in header.places:
        raise header.error("it has no tensor 'token_embd.weight'")
    n_rows = header.places["token_embd.weight"].shape[0]
    if size("vocab_size", n_rows) != n_rows:
        raise header.error(f"{prefix}vocab_size is not {n_rows}, the rows of 'token_embd.weight'")
    layers = {int(m[1]) for m in map(NAME.fullmatch, header.places) if m and m[1]}
    if len(layers) != config["num_hidden_layers"] or max(layers, default=0) >= len(layers):
        raise header.error(f"{prefix}block_count is not {len(layers)}, the blocks it has")
    theta = real("rope.freq_base", 10000.0)
    config |= {
        "model_type": arch,
        "num_key_value_heads": size("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, prefix, head_dim, theta),
        "vocab_size": n_rows,
        "tie_word_embeddings": "output.weight" not in header.places,
    }
    if "attention.sliding_window" in given:
        if arch != "llama":
            raise header.error(f"a sliding window is not known here for {arch!r}")
        config |= {"model_type": "mistral", "sliding_window": size("attention.sliding_window")}
    if config["model_type"] == "llama":
        config["attention_bias"] = any(f"blk.0.attn_{x}.bias" in header.places for x in "qkv")
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.places
    config["architectures"] = [CLASSES[config["model_type"]]]
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if f"tokenizer.ggml.{key}_token_id" in header.fields:
            number = header.get(f"tokenizer.ggml.{key}_token_id", int)
            if not 0 <= number < n_rows:
                raise header.error(f"tokenizer.ggml.{key}_token_id is {number}")
            config[f"{name}_token_id"] = number
    return config


def _rope_scaling(
    header: Header, prefix: str, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """How positions are stretched, or None.

    Llama 3.1's way is not named in GGUF, only its factors are there (see `llama3_factors`).
    """
    # Without a type, a factor is of the linear kind (Chen et al. 2023), as in llama.cpp.
    kind = header.get(prefix + "rope.scaling.type", str, "linear")
    factor = header.get(prefix + "rope.scaling.factor", float, 1.0)
    trained = header.get(prefix + "rope.scaling.original_context_length", int, 8192)
    if not (1 <= factor < math.inf and 0 < trained < 2**31):
        raise header.error(f"its rope.scaling is by {factor} from {trained} positions")
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": trained}
    elif kind == "linear" and factor > 1:
        scaling = {"rope_type": kind, "factor": factor}
    elif kind not in ("none", "linear"):
        raise header.error(f"rope.scaling.type {kind!r} is not known here")
    if ROPE_FACTORS not in header.places:
        return scaling
    stored = header.stored(ROPE_FACTORS)
    if stored.shape != (head_dim // 2,) or stored.dtype != np.float32:
        raise header.error(f"{ROPE_FACTORS!r} is {stored.dtype}{list(stored.shape)}")
    factors = stored.read()
    if np.all(factors == 1):
        return scaling
    largest = float(factors.max())
    sound = 1 < largest < math.inf
    expected = llama3_factors(largest, trained, head_dim, theta) if sound else np.zeros(1)
    if scaling or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise header.error(f"the factors in {ROPE_FACTORS!r} are not of Llama 3.1's kind")
    return {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": trained}  # fmt: skip


def llama3_factors(
    factor: float, trained: int, head_dim: int, theta: float
) -> Float[np.ndarray, " half"]:
    """What Llama 3.1 divides the frequencies of rotary positions by (Dubey et al. 2024).

    Waves with over 4 turns in the length trained with keep their frequency, those with under one
    turn are stretched by `factor`, and between them it changes smoothly.
    """
    turns = trained * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    kept = np.clip((turns - 1) / (4 - 1), 0, 1)
    return 1 / ((1 - kept) / factor + kept)


def _rotated_by_halves(header: Header, name: str, stored: Stored, config: dict[str, Any]) -> Stored:
    """A query or key projection for rotary positions that pair rows i and i + H/2 of a head.

    llama.cpp's llama pairs neighbours: it has rows 0, H/2, 1, H/2 + 1, and so on.
    """
    which = "num_attention_heads" if ".attn_q." in name else "num_key_value_heads"
    n_heads, head_dim = config[which], config["head_dim"]
    if head_dim % 2 or stored.shape[0] != n_heads * head_dim:
        raise header.error(f"{name!r} is {list(stored.shape)}, for {n_heads} heads of {head_dim}")

    def read() -> Shaped[np.ndarray, "..."]:
        pairs = stored.read().reshape(n_heads, head_dim // 2, 2, -1)
        rows = pairs.swapaxes(1, 2).reshape(stored.shape)
        rows.flags.writeable = False
        return rows

    return Stored(stored.shape, stored.dtype, read)
