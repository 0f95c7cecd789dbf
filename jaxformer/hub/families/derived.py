"""Settings that families share and that are no one-to-one matter."""

import math
from collections.abc import Mapping
from typing import Any

from jaxformer.config import ModelConfig
from jaxformer.hub.family import Derived

FULL, SLIDING = "full_attention", "sliding_attention"
MANY = 2**16
"""More layers or classes than any model has."""


def heads(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Key/value heads and head width, which may be left out."""
    n = theirs["num_attention_heads"]
    return {
        "n_kv_heads": theirs.get("num_key_value_heads") or n,
        "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // n,
    }


HEADS = Derived(heads, lambda c: {"num_key_value_heads": c.kv_heads, "head_dim": c.dim_per_head})


def rope(theirs: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """Rotary base and scaling, as transformers 4 (rope_theta, rope_scaling) and 5 have them."""
    given = theirs.get("rope_parameters")
    scaling = given or theirs.get("rope_scaling") or {}
    ours = {"rope_theta": [float(scaling.get("rope_theta") or theirs.get("rope_theta") or theta)]}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return ours
    if kind == "linear":
        return ours | {"rope_factor": [float(scaling["factor"])]}
    if kind == "llama3":
        return ours | {
            "rope_scaling": "llama3",
            "rope_factor": [float(scaling["factor"])],
            "rope_low_freq_factor": float(scaling["low_freq_factor"]),
            "rope_high_freq_factor": float(scaling["high_freq_factor"]),
            "rope_original_length": scaling["original_max_position_embeddings"],
        }
    raise ValueError(f"rope scaling {kind!r} is not known; default, linear and llama3 are")


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The spelling of transformers 4, which 5 reads too."""
    theirs: dict[str, Any] = {"rope_theta": config.rope_theta[0]}
    if config.rope_scaling == "llama3":
        theirs["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_factor[0],
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    elif config.rope_factor != (1.0,):
        theirs["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_factor[0]}
    return theirs


ROPE = Derived(rope, write_rope)


def numbers(theirs: Mapping[str, Any], key: str, usual: int | None = None) -> range:
    """The numbers below one of theirs, which is checked before anything is made of it."""
    n = theirs.get(key, usual)
    if type(n) is not int or not 0 <= n <= MANY:
        raise ValueError(f"{key} is {n!r}; it must lie between 0 and {MANY}")
    return range(n)


def layer_types(theirs: Mapping[str, Any], usual: list[str]) -> list[str]:
    """Which layers see all and which slide a window: as they say, or as is usual."""
    return theirs.get("layer_types") or usual


def windows(types: list[str], window: int) -> list[int]:
    """Our window of each layer; one for all if they agree."""
    each = [window if kind == SLIDING else 0 for kind in types]
    return each[:1] if len(set(each)) == 1 else each


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Their window and layer types of ours."""
    n, cycle = config.n_decoder_layers, config.window
    each = [cycle[i % len(cycle)] for i in range(n)]
    return {
        "sliding_window": max(each, default=0) or None,
        "layer_types": [SLIDING if window else FULL for window in each],
    }


def query_scale(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma divides by the root of a number of its own."""
    return {"attention_scale": theirs.get("query_pre_attn_scalar", 256) ** -0.5}


QUERY_SCALE = Derived(query_scale, lambda c: {"query_pre_attn_scalar": whole(c.query_scale**-2)})


def root_scaled(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Embeddings times the root of the width, if theirs are."""
    on = theirs.get("scale_embedding", False)
    return {"embed_scale": math.sqrt(theirs["d_model"]) if on else 1.0}


ROOT_SCALED = Derived(root_scaled, lambda c: {"scale_embedding": c.embed_scale != 1.0})


def labels(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Names of classes, in the order of their numbers; every config has some, used or not."""
    if "Classification" not in str(theirs.get("architectures")):
        return {}
    names = theirs.get("id2label") or {
        str(i): f"LABEL_{i}" for i in numbers(theirs, "num_labels", 2)
    }
    return {"labels": [str(names[k]) for k in sorted(names, key=int)]}


def write_labels(config: ModelConfig) -> dict[str, Any]:
    """Their names of our classes."""
    if not config.labels:
        return {}
    return {
        "id2label": {str(i): name for i, name in enumerate(config.labels)},
        "label2id": {name: i for i, name in enumerate(config.labels)},
    }


LABELS = Derived(labels, write_labels)


def whole(x: float) -> float | int:
    """`x` without what rounding added to a whole number."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9) else x
