"""From a model to a run directory, or to a directory that other libraries read."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jaxformer import run, sharding
from jaxformer.config import DecodeConfig, DType, ModelConfig, TrainConfig, hint
from jaxformer.data.foreign import ForeignTokenizer
from jaxformer.data.tokenizer_json import tokenizer_json
from jaxformer.errors import CheckpointError, ConfigError
from jaxformer.files import writing
from jaxformer.hub import engine, folder
from jaxformer.hub.families import FAMILIES
from jaxformer.hub.family import Family, differences, read_config, resolved, write_config
from jaxformer.hub.tensors import Stored, write_safetensors
from jaxformer.loading import load
from jaxformer.model import Model
from jaxformer.training.checkpoint import Checkpoints


def convert(
    source: str | Path, target: str | Path, *, family: str = "", dtype: DType | None = None
) -> str:
    """Make a run directory of another library's checkpoint, or the reverse; says which it was.

    `dtype` is that of the parameters; without it, what they have. Raises `CheckpointError` or
    `ConfigError` if it cannot be, and then leaves nothing behind.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already and not empty; choose another folder.")
    if family and not run.exists(source):
        raise ConfigError(f"family {family} is for run directories, but {source} is none.")
    with writing(target):  # found out before the work
        target.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target).close()
    try:
        model = load(source, dtype=dtype)
        if run.exists(source):
            name = export(model, target, family=family)
            return f"{target}: a {name} model in Hugging Face's layout"
        save(model, target)
        return f"{target}: a run directory"
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def save(model: Model, run_dir: str | Path) -> None:
    """Write a model as a run directory, which `load`, `--run` and `--init_from` take."""
    run_dir = Path(run_dir)
    config = TrainConfig(
        model=model.config, data=model.data, decode=model.defaults, run_dir=str(run_dir)
    )
    with Checkpoints(run_dir, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(0, {"params": model.params}, {}, loss=None)
    if model.origin is not None:
        run.write_origin(run_dir, model.origin._asdict())
    run.create(run_dir, config, model.tokenizer)  # last: with it, the run exists


def export(model: Model, path: str | Path, *, family: str = "") -> str:
    """Write a model as a Hugging Face directory: the family that it came from, the one named, or
    the first that has such models; returns its name.

    What is read from one and not changed is written as it was, tensors byte for byte. Raises
    `CheckpointError` if the family has no such model, naming what it lacks.
    """
    path = Path(path)
    chosen, theirs = _their_config(model, family)
    params: dict[str, Any] = flatten_dict(model.params, sep="/")
    fetch = lru_cache(maxsize=4)(lambda path: sharding.fetch(params[path]))  # once for all layers
    leaves = {
        path: Stored(leaf.shape, np.dtype(leaf.dtype), partial(fetch, path))
        for path, leaf in params.items()
    }
    prefixed = model.origin.prefixed if model.origin else model.config.head != "none"
    tensors = engine.export(chosen, model.config, leaves, prefixed=prefixed)
    if isinstance(model.tokenizer, ForeignTokenizer):
        files = model.tokenizer.original_files()
    else:
        encoder = model.config.n_encoder_layers > 0
        files = tokenizer_json(model.tokenizer, encoder=encoder)
    if model.config.n_decoder_layers and (generation := _generation(model)):
        files[folder.GENERATION] = _json(generation)
    if model.config.head == "none":
        files |= _sentence_files(model.config)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, tensors)
        for name, data in files.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data)
        (path / folder.CONFIG).write_bytes(_json(theirs))  # last: with it, it is a checkpoint
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
            # A class of more heads than are kept here becomes the one that has what is.
            named = {"architectures": write_config(read, config)["architectures"]}
            dtypes = {"dtype", "torch_dtype"} & origin.config.keys() or {"dtype"}
            return read, dict(origin.config) | named | dict.fromkeys(dtypes, config.param_dtype)
    tried = [name or own] if name or own else list(FAMILIES)
    lacks: dict[str, list[str]] = {}
    for each in tried:
        with contextlib.suppress(CheckpointError):
            lacks[each] = differences(FAMILIES[each], config)
    if not lacks:
        raise CheckpointError(f"there are no {config.kind} models of family {tried[0]}.")
    fitting = [each for each in lacks if not lacks[each]]
    if not fitting:
        nearest = min(lacks, key=lambda each: len(lacks[each]))
        raise CheckpointError(
            f"no such model in Hugging Face's layout; nearest is {FAMILIES[nearest].name}, but\n  "
            + "\n  ".join(lacks[nearest])
        )
    family, tokenizer = FAMILIES[fitting[0]], model.tokenizer
    ids = {
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.eos_id,
        ("bos_token_id" if config.kind == "decoder-only" else "decoder_start_token_id"): (
            tokenizer.start_id
        ),
        "is_encoder_decoder": config.kind == "encoder-decoder",
        "dtype": config.param_dtype,
    }
    return family, ids | write_config(family, config)


def _generation(model: Model) -> dict[str, Any]:
    """Their generation_config.json: as it was, if the model still generates so; else from ours."""
    options, tokenizer, origin = model.defaults, model.tokenizer, model.origin
    if origin:
        before = folder.decode_config(
            model.config, origin.config, origin.generation, folder.GENERATION
        )
        if options == before:
            return dict(origin.generation)
    theirs: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": list(tokenizer.stop_ids),
        **their_generation(options),
    }
    if model.config.kind == "encoder-decoder":
        theirs["decoder_start_token_id"] = tokenizer.start_id
    return theirs


def their_generation(options: DecodeConfig) -> dict[str, Any]:
    """What they call our options of decoding; `folder.decode_config` is the way back.

    Of seeds, batches, several results, Wu's length normalisation, bad words as texts, and penalties
    of presence and frequency they know nothing.
    """
    theirs: dict[str, Any] = {"num_beams": options.beams, "do_sample": options.sampling}
    if options.sampling:
        names = ("temperature", "top_k", "top_p", "min_p")
        theirs |= {name: getattr(options, name) for name in names}
        renamed = {"typical_p": "typical_p", "epsilon": "epsilon_cutoff", "eta": "eta_cutoff"}
        theirs |= _changed(options, renamed)
    if options.beams > 1:
        theirs["length_penalty"] = options.length_penalty
        theirs["early_stopping"] = {v: k for k, v in folder.STOPPING.items()}[
            options.early_stopping
        ]
    if options.max_length:
        theirs["max_new_tokens"] = options.max_length
    if options.min_length:
        theirs["min_new_tokens"] = options.min_length
    if options.suppress:
        theirs["suppress_tokens"] = list(options.suppress)
    if options.suppress_first:
        theirs["begin_suppress_tokens"] = list(options.suppress_first)
    if options.forced_first >= 0:
        theirs["forced_bos_token_id"] = options.forced_first
    if options.forced_last >= 0:
        theirs["forced_eos_token_id"] = options.forced_last
    if options.bad_ids:
        theirs["bad_words_ids"] = [list(ids) for ids in options.bad_ids]
    if options.logit_bias:
        theirs["sequence_bias"] = [[[i], bias] for i, bias in options.logit_bias]
    if options.length_decay != 1:
        decay = [options.length_decay_start, options.length_decay]
        theirs["exponential_decay_length_penalty"] = decay
    renamed = {
        "repetition_penalty": "repetition_penalty",
        "no_repeat_ngram": "no_repeat_ngram_size",
        "encoder_no_repeat_ngram": "encoder_no_repeat_ngram_size",
    }
    return theirs | _changed(options, renamed)


def _changed(options: DecodeConfig, theirs: dict[str, str]) -> dict[str, Any]:
    """Our options that are not as they usually are, by their names."""
    return {
        name: getattr(options, ours)
        for ours, name in theirs.items()
        if getattr(options, ours) != getattr(DecodeConfig, ours)
    }


def _sentence_files(config: ModelConfig) -> dict[str, bytes]:
    """What tells sentence-transformers, and us, how the hidden states become one vector."""
    kinds = ["Transformer", "Pooling", *["Normalize"] * config.pooling_norm]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    pooling = {
        "word_embedding_dimension": config.d_model,
        "pooling_mode_cls_token": config.pooling == "first",
        "pooling_mode_mean_tokens": config.pooling == "mean",
    }
    files = {"modules.json": _json(modules), f"{paths[1]}/{folder.CONFIG}": _json(pooling)}
    if config.pooling_length:
        settings = {"max_seq_length": config.pooling_length, "do_lower_case": False}
        files["sentence_bert_config.json"] = _json(settings)
    return files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
