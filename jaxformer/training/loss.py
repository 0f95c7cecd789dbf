"""The loss of a batch: weighted cross-entropy, with label smoothing and z-loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"],
    labels: Int[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_padding: int = 0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """What is minimised at each position, and the plain negative log-likelihood, in nats.

    Smoothing spreads that share of the target evenly over the vocabulary (Szegedy et al. 2016,
    section 7) but for its last `vocab_padding` ids, whose logits are -inf; z-loss adds
    z_loss * log(Z)**2 (Chowdhery et al. 2022, section 5).
    """
    # logsumexp - gather never writes the normalised [B, T, V] array that log_softmax does.
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    objective = nll
    if label_smoothing:
        real = logits.shape[-1] - vocab_padding
        mean = jnp.where(jnp.arange(logits.shape[-1]) < real, logits, 0).sum(-1) / real
        uniform = log_z - mean
        objective = (1 - label_smoothing) * nll + label_smoothing * uniform
    if z_loss:
        objective = objective + z_loss * jnp.square(log_z)
    return objective, nll
