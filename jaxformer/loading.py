"""From a run directory to a model that generates."""

from pathlib import Path

import jax
from flax import linen as nn

from jaxformer import run
from jaxformer.generate import Model
from jaxformer.nn import lora, transformer
from jaxformer.training.checkpoint import restore_params


def load(run_dir: str | Path, step: int | None = None) -> Model:
    """The model of a training run, at `step` or its newest sound checkpoint, adapters merged.

    Raises `CheckpointError` if there is none, or if what is there is damaged.
    """
    path = Path(run_dir)
    config, tokenizer = run.read(path)
    abstract = jax.eval_shape(lambda: nn.unbox(transformer.init(config.model, jax.random.key(0))))
    params = restore_params(path, abstract, step)
    model = config.model
    if model.lora_rank:
        model, params = lora.merge(model, params)
    return Model(model, params, tokenizer, config.data, config.decode)
