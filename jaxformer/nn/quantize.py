"""Weights in eight bits: a quarter of the memory of float32, and of what a token has to read.

Each output of a kernel has a scale of its own; inputs are rounded to eight bits row by row as they
come, so that the product is one of integers (Dettmers et al. 2022, equation 2, without outliers).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TABLES = ("embed", "source_embed")
"""Tables of vectors that are output heads too, or as large as one."""


@partial(jax.jit, donate_argnums=0)
def quantize(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with `int8` "... O I" and its `scale` "... O" for every kernel and the tables of
    tokens: all inputs of a kernel in one axis, all outputs in another. What was given is used up.
    """

    def part(name: str, tree: Any, layers: int = 0) -> Any:
        if not isinstance(tree, dict):
            return tree
        if name == "layers":  # stacked on a leading axis
            layers = 1
        tree = {key: part(key, value, layers) for key, value in tree.items()}
        if "kernel" in tree:
            kernel = tree.pop("kernel")
            stack, shape = kernel.shape[:layers], kernel.shape[layers:]
            inputs = math.prod(shape[: 2 if name == "out" else 1])
            tree |= _rounded(kernel.reshape(*stack, inputs, -1).swapaxes(-1, -2))
        elif "embedding" in tree and name in TABLES:
            tree |= _rounded(tree.pop("embedding"))
        return tree

    return part("", params)


def project_int8(
    x: Float[Array, "*B I"], weight: Int[Array, "O I"], scale: Float[Array, "O"], dtype: Any
) -> Float[Array, "*B O"]:
    """x W^T, in `dtype`, where W is `weight` times the `scale` of each row."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    size = _scale(rows)
    rounded = jnp.round(rows / size).astype(jnp.int8)
    if len(rows) == 1:  # of one row, XLA makes a slow loop on CPUs
        rounded = jnp.concatenate([rounded, rounded])
    y = jax.lax.dot_general(
        rounded, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    y = y[: len(rows)].astype(jnp.float32) * size * scale
    return y.astype(dtype).reshape(*x.shape[:-1], -1)


def _rounded(weight: Float[Array, "*S O I"]) -> dict[str, Array]:
    weight = weight.astype(jnp.float32)
    scale = _scale(weight)
    return {"int8": jnp.round(weight / scale).astype(jnp.int8), "scale": scale[..., 0]}


def _scale(x: Float[Array, "... I"]) -> Float[Array, "... 1"]:
    """What makes 127 of the largest entry."""
    return jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-30) / 127
