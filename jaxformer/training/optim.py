"""The optimiser: AdamW with a schedule, clipping and a decay mask, all from optax."""

from typing import Any

import jax
import optax

from jaxformer.config import ModelConfig, OptimConfig
from jaxformer.nn import lora


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: a linear rise over `warmup`, then as configured until `steps`."""
    peak, warmup = config.learning_rate, config.warmup
    rest = max(steps - warmup, 1)
    falls = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        # Vaswani et al. 2017, equation 3, with the peak at the end of the warm-up.
        "rsqrt": lambda: lambda step: peak * (max(warmup, 1) / (step + max(warmup, 1))) ** 0.5,
    }
    fall = falls[config.schedule]()
    if warmup == 0:
        return fall
    # The first update uses peak / warmup: a rate of 0 would waste it.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, fall], [warmup])


def decayed(params: Any) -> Any:
    """A tree of booleans like `params`: decay kernels, embeddings and adapters, nothing else."""

    def decay(path: tuple[Any, ...], _: Any) -> bool:
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        return names[-1] in ("kernel", "embedding", "lora_a", "lora_b")

    return jax.tree_util.tree_map_with_path(decay, params)


def make_optimizer(
    model: ModelConfig, config: OptimConfig, steps: int
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) after clipping; with LoRA, on the adapters alone."""
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    tx = optax.chain(clip, adamw)
    if not model.lora_rank:
        return tx

    def label(params: Any) -> Any:
        names = {True: "train", False: "freeze"}
        return jax.tree.map(lambda train: names[train], lora.trainable(model, params))

    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, label)
