"""From a model to a run directory, or to a directory that other libraries read."""

import dataclasses
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jaxformer import run, sharding
from jaxformer.config import TrainConfig, hint
from jaxformer.data.foreign import ForeignTokenizer
from jaxformer.data.tokenizer import SentencePieceTokenizer, Tokenizer
from jaxformer.errors import CheckpointError, ConfigError
from jaxformer.hub import engine, folder
from jaxformer.hub.families import FAMILIES
from jaxformer.hub.family import Family, differences, read_config, resolved, write_config
from jaxformer.hub.tensors import Stored, write_safetensors
from jaxformer.loading import load
from jaxformer.model import Model
from jaxformer.training.checkpoint import Checkpoints


def convert(source: Path, target: Path, *, family: str = "") -> str:
    """Make a run directory of another library's checkpoint, or the reverse; says which it was.

    Raises `CheckpointError` or `ConfigError` if either cannot be.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already and not empty; choose another folder.")
    model = load(source)
    if run.exists(source):
        name = export(model, target, family=family)
        return f"{target}: a {name} model in Hugging Face's layout"
    save(model, target)
    return f"{target}: a run directory"


def save(model: Model, run_dir: Path) -> None:
    """Write a model as a run directory, which `load`, `--run` and `--init_from` take."""
    config = TrainConfig(
        model=model.config, data=model.data, decode=model.defaults, run_dir=str(run_dir)
    )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if model.origin is not None:
            run.write_atomically(run_dir / run.ORIGIN, json.dumps(model.origin._asdict()) + "\n")
        run.create(run_dir, config, model.tokenizer)
    except OSError as e:
        raise CheckpointError(f"cannot write to {run_dir}: {e.strerror}.") from None
    with Checkpoints(run_dir, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(0, {"params": model.params}, {}, loss=None)


def export(model: Model, path: Path, *, family: str = "") -> str:
    """Write a model as a Hugging Face directory: the family that it came from, the one named, or
    the first that has such models; returns its name.

    What is read from one and not changed is written as it was, tensors byte for byte. Raises
    `CheckpointError` if the family has no such model, naming what it lacks.
    """
    chosen, theirs = _their_config(model, family)
    params: dict[str, Any] = flatten_dict(model.params, sep="/")
    fetch = lru_cache(maxsize=4)(lambda path: sharding.fetch(params[path]))  # once for all layers
    leaves = {
        path: Stored(leaf.shape, np.dtype(leaf.dtype), partial(fetch, path))
        for path, leaf in params.items()
    }
    prefixed = model.origin.prefixed if model.origin else model.config.head != "none"
    tensors = engine.export(chosen, model.config, leaves, prefixed=prefixed)
    files = _tokenizer_files(model.tokenizer) | {folder.CONFIG: _json(theirs)}
    if model.config.n_decoder_layers:
        files[folder.GENERATION] = _json(_generation(model))
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (path / name).write_bytes(data)
    except OSError as e:
        raise CheckpointError(f"cannot write to {path}: {e.strerror}.") from None
    write_safetensors(path, tensors)
    return chosen.name


def _their_config(model: Model, name: str) -> tuple[Family, dict[str, Any]]:
    """The family to write a model as, and its config.json there."""
    config, origin = model.config, model.origin
    if name and name not in FAMILIES:
        raise ConfigError(
            f"there is no family {name!r}.{hint(name, FAMILIES)} Known are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    own = str(origin.config["model_type"]) if origin else ""
    if origin and name in ("", own):
        read = folder.find_family(origin.config, run.ORIGIN)
        before = read_config(read, origin.config, run.ORIGIN)
        same = dataclasses.replace(before, tie_embeddings=config.tie_embeddings)
        if resolved(same) == resolved(config):
            return read, dict(origin.config) | {"dtype": config.param_dtype}
    tried = [name or own] if name or own else list(FAMILIES)
    lacks = {each: differences(FAMILIES[each], config) for each in tried}
    fitting = [each for each in tried if not lacks[each]]
    if not fitting:
        nearest = min(tried, key=lambda each: len(lacks[each]))
        raise CheckpointError(
            f"no such model in Hugging Face's layout; nearest is {FAMILIES[nearest].name}, but\n  "
            + "\n  ".join(lacks[nearest])
        )
    family, tokenizer = FAMILIES[fitting[0]], model.tokenizer
    ids = {
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.eos_id,
        "decoder_start_token_id": tokenizer.start_id,
        "is_encoder_decoder": config.kind == "encoder-decoder",
        "dtype": config.param_dtype,
    }
    return family, ids | write_config(family, config)


def _generation(model: Model) -> dict[str, Any]:
    """Their generation_config.json: as it was, or what the run's own defaults come to."""
    if model.origin and model.origin.generation:
        return dict(model.origin.generation)
    options, tokenizer = model.defaults, model.tokenizer
    theirs: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "num_beams": options.beams,
        "do_sample": options.sampling,
    }
    if model.config.kind == "encoder-decoder":
        theirs["decoder_start_token_id"] = tokenizer.start_id
    if options.max_length:
        theirs["max_new_tokens"] = options.max_length
    if options.beams > 1:
        theirs["length_penalty"] = options.length_penalty
    return theirs


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Files that other libraries read the tokenizer from; none, if it is of a kind they lack."""
    if isinstance(tokenizer, ForeignTokenizer):
        return tokenizer.original_files()
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {"spiece.model": tokenizer.model}
    return {}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
