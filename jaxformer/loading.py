"""From a run directory, or a checkpoint of another library, to a model that generates."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxformer import inspecting, run, sharding
from jaxformer.config import DataConfig, DType, ModelConfig
from jaxformer.errors import CheckpointError, ConfigError
from jaxformer.hub import engine, folder
from jaxformer.hub.families.torch_modules import torch_family
from jaxformer.hub.family import Family
from jaxformer.hub.pickles import open_torch_pickle
from jaxformer.hub.tensors import Stored
from jaxformer.model import Model, Origin
from jaxformer.nn import lora, transformer
from jaxformer.nn.quantize import quantize
from jaxformer.training.checkpoint import restore_params


def load(
    path: str | Path,
    step: int | None = None,
    *,
    dtype: DType | None = None,
    mesh: Mesh | None = None,
    max_length: int | None = None,
    int8: bool = False,
) -> Model:
    """The model of a training run (at `step`, or its newest sound checkpoint; adapters merged), or
    of a Hugging Face directory or GGUF file.

    `dtype` is that of parameters and arithmetic; without it, what the checkpoint has. On a `mesh`,
    each device reads only its share; the vocabulary of what is no run is padded until the mesh
    divides it. `max_length` is for models whose positions have no end of their own. `int8` rounds
    the weights to eight bits each (see `nn.quantize`). Raises `CheckpointError`.
    """
    path = Path(path)
    if run.exists(path):
        model = _load_run(path, step, dtype, mesh, max_length)
    elif step is not None:
        raise ConfigError(f"{path} is no training run, so it has no step {step}; leave step out.")
    else:
        model = _load_folder(path, dtype, mesh, max_length)
    return dataclasses.replace(model, params=quantize(model.params)) if int8 else model


def abstract_params(config: ModelConfig, mesh: Mesh | None) -> dict[str, Any]:
    """Shape, dtype and place of every parameter: cut over the mesh, or on the first device."""
    boxed = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = nn.unbox(boxed)
    places = sharding.shardings_for(boxed, mesh) if mesh else jax.tree.map(lambda _: here, leaves)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        leaves,
        places,
    )


def _load_run(
    path: Path, step: int | None, dtype: DType | None, mesh: Mesh | None, max_length: int | None
) -> Model:
    config, tokenizer = run.read(path)
    model = config.model if max_length is None else _longer(config.model, max_length)
    if mesh is not None:
        sharding.check_fits(model, mesh)
    params = restore_params(path, abstract_params(model, mesh), step)
    if model.lora_rank:
        model, params = lora.merge(model, params)
    if dtype is not None:
        model = dataclasses.replace(model, param_dtype=dtype, compute_dtype=dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return Model(model, params, tokenizer, config.data, config.decode, read_origin(path))


def read_origin(path: Path) -> Origin | None:
    """What another library's checkpoint, or the one that a run was made from, says of itself."""
    if not run.exists(path):
        return _origin(inspecting.open_folder(path))
    fields = run.read_origin(path)
    return Origin(**fields) if fields else None


def _origin(found: folder.Folder) -> Origin:
    prefixed = engine.is_prefixed(found.family, found.tensors)
    return Origin(found.theirs, found.generation, prefixed)


def load_weights(
    path: str | Path,
    *,
    dtype: DType | None = None,
    mesh: Mesh | None = None,
    max_length: int | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and parameters of a Hugging Face directory or GGUF file, which needs no tokenizer.

    Arguments and errors are those of `load`.
    """
    return _read_weights(inspecting.open_folder(path), str(path), dtype, mesh, max_length)


def load_into(config: ModelConfig, params: dict[str, Any], path: Path) -> dict[str, Any]:
    """The weights of a Hugging Face directory or GGUF file, with the dtypes and places of `params`,
    which are a model's of this config.

    Raises `CheckpointError`.
    """
    found = inspecting.open_folder(path)
    leaves = engine.bind(found.family, config, shapes(params), found.tensors, str(path))
    return read_params(leaves, params)


def load_torch(
    path: str | Path,
    config: ModelConfig,
    modules: Mapping[str, str],
    *,
    ignored: Sequence[str] = (),
    dtype: DType | None = None,
    mesh: Mesh | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and parameters of a `torch.nn.Transformer` in a file of `torch.save`, of which nothing
    is executed.

    Such a file holds tensors and no config, so both `config` and the names of its modules are
    given: {"embed": "embedding", "encoder": "transformer.encoder", "decoder":
    "transformer.decoder", "head": "generator"}; see `torch_family`. `ignored` are shell patterns
    of tensors that hold nothing of their own, as a table of sinusoids. Raises `CheckpointError`
    listing all that do not fit.
    """
    family = torch_family(modules, ignored)
    return _bind(family, config, open_torch_pickle(Path(path)), str(path), dtype, mesh)


def _load_folder(
    path: Path, dtype: DType | None, mesh: Mesh | None, max_length: int | None
) -> Model:
    found = inspecting.open_folder(path)
    tokenizer = inspecting.folder_tokenizer(found, path)
    config, params = _read_weights(found, str(path), dtype, mesh, max_length)
    data = DataConfig(task=config.task, buckets=(min(128, config.max_length),))
    return Model(config, params, tokenizer, data, found.decode, _origin(found))


def _read_weights(
    found: folder.Folder, where: str, dtype: DType | None, mesh: Mesh | None, max_length: int | None
) -> tuple[ModelConfig, dict[str, Any]]:
    config = found.config if max_length is None else _longer(found.config, max_length)
    return _bind(found.family, config, found.tensors, where, dtype, mesh)


def _bind(
    family: Family,
    config: ModelConfig,
    tensors: Mapping[str, Stored],
    where: str,
    dtype: DType | None,
    mesh: Mesh | None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """`config` as the tensors and the mesh make it, and the parameters, each in its place."""
    if config.vocab_size == 0:
        raise CheckpointError(f"{where}: vocab_size is 0; it must be the rows of the embeddings.")
    if mesh is not None:
        rest = -config.vocab_size % mesh.shape["tensor"]
        config = dataclasses.replace(
            config, vocab_size=config.vocab_size + rest, vocab_padding=rest
        )
        sharding.check_fits(config, mesh)
    leaves = engine.bind(family, config, shapes(abstract_params(config, mesh)), tensors, where)
    dtype = dtype or _own_dtype(leaves)
    config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype)
    return config, read_params(leaves, abstract_params(config, mesh))


def read_params(leaves: Mapping[str, engine.Leaf], abstract: dict[str, Any]) -> dict[str, Any]:
    """Each leaf where and as `abstract` says, every device reading its own share of the file."""

    def make(path: str, leaf: Any) -> jax.Array:
        read: Any = partial(leaves[path].read, dtype=leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

    flat: dict[str, Any] = flatten_dict(abstract, sep="/")
    return unflatten_dict({path: make(path, leaf) for path, leaf in flat.items()}, sep="/")


def shapes(params: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path, as `decoder/final_norm/scale`."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _own_dtype(leaves: Mapping[str, engine.Leaf]) -> Any:
    """The dtype that most parameters have in the file."""
    sizes: dict[str, int] = {}
    for leaf in leaves.values():
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + int(np.prod(leaf.shape))
    common = max(sizes, key=lambda name: sizes[name])
    return common if common in ("float32", "bfloat16", "float16") else "float32"


def _longer(config: ModelConfig, max_length: int) -> ModelConfig:
    """`config` with another max_length, if its positions are no table."""
    if config.position == "learned":
        raise ConfigError(
            f"max_length cannot be {max_length}: the model has learned "
            f"{config.max_length} positions."
        )
    return dataclasses.replace(config, max_length=max_length)
