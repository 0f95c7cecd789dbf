"""The state of a training run, and how it is laid out over the mesh."""

from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxformer import sharding
from jaxformer.config import ModelConfig
from jaxformer.nn import transformer


class TrainState(NamedTuple):
    """All arrays of a run, and nothing else."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    key: Array


def _init(config: ModelConfig, tx: optax.GradientTransformation, key: Array) -> TrainState:
    init_key, dropout_key = jax.random.split(key)
    params = transformer.init(config, init_key)
    step = jax.numpy.zeros((), jax.numpy.int32)
    return TrainState(step, params, tx.init(params), dropout_key)


def abstract_state(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state: moments lie where their parameters do."""
    boxed = jax.eval_shape(lambda: _init(config, tx, jax.random.key(0)))
    places = sharding.shardings_for(boxed, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        places,
    )


def init_state(
    config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """The state before the first step, each leaf made where it will live."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, tx, mesh))
    make = jax.jit(
        lambda key: nn.unbox(_init(config, tx, key)),
        out_shardings=places,
    )
    with sharding.use(mesh):
        return make(jax.random.key(seed))
