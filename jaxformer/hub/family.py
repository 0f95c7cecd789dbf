"""A family of checkpoints as data: how its config and tensors are spelled, read in both directions.

A family is one table. Import reads it from right to left (their names to ours), export from left to
right; nothing in it is code for one direction only, but for the few settings that are derived.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxformer.config import ModelConfig, from_json
from jaxformer.errors import CheckpointError, ConfigError

MISSING = object()
"""Default of a setting that a config must have."""


class Row(NamedTuple):
    """Tensors of ours and the one of theirs that holds them.

    `*` in `theirs` is the layer, which in ours is the leading axis of a path with `/layers/`.
    `layouts` are einops patterns from theirs to ours, in the letters of `sizes`, one for each of
    `ours`; where there are several, they lie behind each other along `axis` of theirs. An optional
    row may be absent from a checkpoint: zeros.
    """

    ours: tuple[str, ...]
    theirs: str
    layouts: tuple[str, ...]
    axis: int = 0
    optional: bool = False
    only: tuple[tuple[str, Any], ...] = ()
    """(field, value) pairs of configs that the row is for; without, for all."""


class Field(NamedTuple):
    """One setting: our field, their key, and what its absence means.

    `values` are (theirs, ours) pairs of those values that have another name in ours; the first of
    equal ones is written at export.
    """

    ours: str
    theirs: str
    default: Any = MISSING
    values: tuple[tuple[Any, Any], ...] = ()


class Derived(NamedTuple):
    """Settings that are no one-to-one matter: from their config to our fields, and back."""

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


class Family(NamedTuple):
    """All that is known of one kind of checkpoint."""

    name: str
    model_type: str
    architectures: Mapping[str, Mapping[str, Any]]
    """What each class of theirs says of our fields; the first is meant where none is named, and
    the first that fits is written at export."""
    fields: tuple[Field, ...]
    rows: tuple[Row, ...]
    fixed: dict[str, Any] = {}
    """Our fields that are the same in all of the family."""
    demands: dict[str, Any] = {}
    """Their settings that must have this value, if they are there: we know no other."""
    derived: tuple[Derived, ...] = ()
    prefix: str = ""
    """What their names begin with in models with a head, and lack in bare ones."""
    ignored: tuple[str, ...] = ()
    """Shell patterns of tensors that hold nothing of their own: buffers, copies of tied ones."""
    renames: tuple[tuple[str, str], ...] = ()
    """(old, new) endings of names that older checkpoints have."""
    tied_if_absent: bool = False
    """Whether a checkpoint without a head has a tied one, whatever its config says."""
    about: str = ""
    """One line for the table in the documentation: what is of this family."""


def row(
    ours: str,
    theirs: str,
    layout: str,
    *,
    optional: bool = False,
    only: tuple[tuple[str, Any], ...] = (),
) -> Row:
    """One tensor of ours that is one of theirs."""
    return Row((ours,), theirs, (layout,), optional=optional, only=only)


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    """The scale and bias of a norm; a model without biases has no such leaf."""
    return (
        row(f"{ours}/scale", f"{theirs}.weight", "d -> d"),
        row(f"{ours}/bias", f"{theirs}.bias", "d -> d"),
    )


def linear(ours: str, theirs: str, layout: str) -> tuple[Row, ...]:
    """Kernel and bias of a projection; the bias has theirs' first axis."""
    out = axes(layout.split(" -> ")[0])[0]
    return (
        row(f"{ours}/kernel", f"{theirs}.weight", layout),
        row(f"{ours}/bias", f"{theirs}.bias", f"{out} -> {out.strip('()')}"),
    )


def axes(side: str) -> list[str]:
    """The axes of one side of a layout.

    >>> axes("(n h) d")
    ['(n h)', 'd']
    """
    return re.findall(r"\([^)]*\)|\S+", side)


def read_config(family: Family, theirs: Mapping[str, Any], where: str) -> ModelConfig:
    """Our config of theirs; raises `CheckpointError` naming what is missing or not supported."""
    ours: dict[str, Any] = dict(family.fixed)
    for key, value in family.demands.items():
        if theirs.get(key, value) not in (value, None):
            raise CheckpointError(
                f"{where}: {key} is {theirs[key]!r}; of {family.name} models only those with "
                f"{value!r} are known here."
            )
    try:
        ours |= _architecture(family, theirs, where)
        for field in family.fields:
            value = theirs.get(field.theirs, field.default)
            if value is MISSING:
                raise CheckpointError(f"{where} has no {field.theirs}, which a model must have.")
            ours[field.ours] = dict(field.values).get(value, value)
        for derived in family.derived:
            ours |= derived.read(theirs)
        return from_json(ModelConfig, json.dumps(ours), where)
    except ConfigError as e:
        raise CheckpointError(f"{where}: {e}") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as e:
        raise CheckpointError(
            f"{where} is malformed ({type(e).__name__}: {e}); is it the file that came with the "
            "model?"
        ) from None


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Their config of ours; raises `CheckpointError` if the family knows no such model."""
    theirs: dict[str, Any] = {"model_type": family.model_type, **family.demands}
    for architecture, fields in family.architectures.items():
        if all(getattr(config, field) == value for field, value in fields.items()):
            theirs["architectures"] = [architecture]
            break
    for field in family.fields:
        value = getattr(config, field.ours)
        names = [name for name, mine in field.values if mine == value]
        theirs[field.theirs] = names[0] if names else value
    for derived in family.derived:
        theirs |= derived.write(config)
    return theirs


TRAINING = ("dropout", "attention_dropout", "mlp_dropout", "lora_rank", "lora_alpha",
            "lora_targets", "initializer", "init_std", "embed_init_std", "init_residual_scaled",
            "param_dtype", "compute_dtype", "remat", "scan_layers", "pooling",
            "pooling_norm", "pooling_length")  # fmt: skip
"""Fields that say nothing about what a trained model computes of its tokens."""


def differences(family: Family, config: ModelConfig) -> list[str]:
    """In which fields a model of ours is not what the family's own config says of it.

    Raises `CheckpointError` if the family has no such kind of model at all.
    """
    again = resolved(read_config(family, write_config(family, config), "its config"))
    return [
        f"{name} is {value!r}, not {again[name]!r}"
        for name, value in resolved(config).items()
        if name in again and value != again[name]  # else the kind of position differs
    ]


def resolved(config: ModelConfig) -> dict[str, Any]:
    """The fields that make up the architecture, with nothing left to defaults."""
    fields = dataclasses.asdict(config)
    n = max(config.n_encoder_layers, config.n_decoder_layers)
    for name in ("window", "rope_theta", "rope_factor"):
        fields[name] = [fields[name][i % len(fields[name])] for i in range(n)]
    fields |= {
        "n_kv_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "rotary_dim": config.rotated,
        "attention_scale": round(config.query_scale, 9),
        "embed_scale": round(config.embed_scale, 6),
        "vocab_size": config.vocab_size - config.vocab_padding,
        "vocab_padding": 0,
        "norm_bias": config.norm == "layer" and config.norm_bias,
    }
    unused = {
        "rotary": ("rope_theta", "rope_factor", "rope_scaling", "rope_original_length",
                   "rope_low_freq_factor", "rope_high_freq_factor", "rope_divisors",
                   "rope_magnitude", "rotary_dim"),
        "relative": ("relative_buckets", "relative_max_distance"),
        "sinusoidal": ("sinusoid",),
    }  # fmt: skip
    idle = [name for kind, names in unused.items() if kind != config.position for name in names]
    if config.rope_scaling == "linear":
        idle += unused["rotary"][3:6]
    return {name: value for name, value in fields.items() if name not in (*TRAINING, *idle)}


def _architecture(family: Family, theirs: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What their class says of our fields."""
    names = theirs.get("architectures") or list(family.architectures)
    if names[0] not in family.architectures:
        raise CheckpointError(
            f"{where}: architecture {names[0]!r} is not known; of {family.name} models these are: "
            f"{', '.join(family.architectures)}."
        )
    return family.architectures[names[0]]
