"""One update, and one evaluation of the loss: the jitted functions of training."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxformer import sharding
from jaxformer.config import ModelConfig, OptimConfig
from jaxformer.nn import lora
from jaxformer.nn.transformer import Transformer
from jaxformer.training.loss import cross_entropy
from jaxformer.training.state import TrainState
from jaxformer.types import Batch


class StepMetrics(NamedTuple):
    """What one update reports; `loss` is the mean negative log-likelihood in nats."""

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    grad_norm: Float[Array, ""]
    skipped: Float[Array, ""]


def loss_sums(
    config: ModelConfig,
    optim: OptimConfig,
    params: Any,
    batch: Batch,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is minimised and the negative log-likelihood, both summed over the weighted tokens."""
    model = Transformer(config, deterministic=dropout_key is None)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    logits = model.apply({"params": params}, batch, rngs=rngs)
    assert isinstance(logits, jax.Array)
    objective, nll = cross_entropy(
        logits,
        batch.labels,
        label_smoothing=optim.label_smoothing,
        z_loss=optim.z_loss,
        vocab_padding=config.vocab_padding,
    )
    return jnp.vdot(objective, batch.weights), jnp.vdot(nll, batch.weights)


def train_step(
    config: ModelConfig,
    optim: OptimConfig,
    tx: optax.GradientTransformation,
    accumulate: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    """One update from a batch, its gradient computed in `accumulate` parts.

    Parts are weighted by their tokens, so the result is that of the whole batch. An update whose
    loss or gradient is not finite is skipped: only `step` advances.
    """
    tokens = batch.weights.sum()
    scale = 1 / jnp.maximum(tokens, 1)
    key = jax.random.fold_in(state.key, state.step)

    def gradient(part: Batch, part_key: Array) -> tuple[Any, Array]:
        def objective(params: Any) -> tuple[Array, Array]:
            # What is frozen needs no gradient.
            params = jax.tree.map(
                lambda train, leaf: leaf if train else jax.lax.stop_gradient(leaf),
                lora.trainable(config, params),
                params,
            )
            total, nll = loss_sums(config, optim, params, part, part_key)
            return total * scale, nll * scale

        grads, nll = jax.grad(objective, has_aux=True)(state.params)
        return grads, nll

    if accumulate == 1:
        grads, loss = gradient(batch, key)
    else:
        # Part i takes rows i, i + n, ...: each device keeps the rows it has.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(*part)), None

        zeros = jax.tree.map(jnp.zeros_like, (state.params, scale))
        (grads, loss), _ = jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulate)))

    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(updates))
    params, opt_state = jax.tree.map(
        partial(jnp.where, finite), (params, opt_state), (state.params, state.opt_state)
    )
    new = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    return new, StepMetrics(loss, tokens, norm, (~finite).astype(jnp.float32))


def make_train_step(
    config: ModelConfig,
    optim: OptimConfig,
    tx: optax.GradientTransformation,
    accumulate: int,
    mesh: Mesh,
    abstract: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """`train_step` jitted for a mesh; the state given to it is donated, not to be used again."""
    step = jax.jit(
        partial(train_step, config, optim, tx, accumulate),
        donate_argnums=0,
        out_shardings=(
            jax.tree.map(lambda leaf: leaf.sharding, abstract),
            sharding.replicated(mesh),
        ),
    )

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with sharding.use(mesh):
            return step(state, batch)

    return run


def make_eval_step(
    config: ModelConfig, mesh: Mesh
) -> Callable[[Any, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """A jitted function from parameters and a batch to (summed negative log-likelihood, tokens)."""

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def evaluate(params: Any, batch: Batch) -> tuple[Array, Array]:
        return loss_sums(config, OptimConfig(), params, batch)[1], batch.weights.sum()

    def run(params: Any, batch: Batch) -> tuple[Array, Array]:
        with sharding.use(mesh):
            return evaluate(params, batch)

    return run
