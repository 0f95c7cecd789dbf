"""Low-rank adapters (Hu et al. 2022): which parameters train, and how adapters become kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.config import ModelConfig


def trainable(config: ModelConfig, params: Any) -> Any:
    """A tree of booleans like `params`: with adapters only they train, without them everything."""

    def train(path: tuple[Any, ...], _: Any) -> bool:
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        return config.lora_rank == 0 or names[-1] in ("lora_a", "lora_b")

    return jax.tree_util.tree_map_with_path(train, params)


def merge(config: ModelConfig, params: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The same model without adapters, each added to its kernel: W + s A B (equation 3)."""
    scale = config.lora_alpha / max(config.lora_rank, 1)

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "lora_a" not in node:
            return {name: walk(child) for name, child in node.items()}
        kernel, a, b = node["kernel"], node["lora_a"], node["lora_b"]
        # Kernels of a stack have a layer axis more than the product of their adapters has.
        stacked = a.ndim + b.ndim - 2 > kernel.ndim
        product = jax.vmap(_product) if stacked else _product
        rest = {name: leaf for name, leaf in node.items() if not name.startswith("lora_")}
        return {**rest, "kernel": kernel + (scale * product(a, b)).astype(kernel.dtype)}

    return dataclasses.replace(config, lora_rank=0), walk(params)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tensordot(a, b, 1)
