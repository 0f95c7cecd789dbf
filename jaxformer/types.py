"""The shapes that flow through the library, and the letters that name their axes.

This file imports no jax, so that data workers start fast; its tuples are jax pytrees all the same.

| letter | axis              | letter | axis                        |
|--------|-------------------|--------|-----------------------------|
| B      | batch rows        | D      | model width                 |
| T      | query length      | F      | feed-forward width          |
| S      | key length        | V      | vocabulary                  |
| M      | memory length     | L      | layers                      |
| N      | heads             | W      | beams or samples per row    |
| K      | key/value heads   | G      | queries to each key, N / K  |
| H      | head dimension    | O, I   | outputs, inputs of a kernel |

They are those of `jax.nn.dot_product_attention`: the same in signatures and (lower case) einsums.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

Array: TypeAlias = Any
"""A numpy or jax array: a `Batch` is numpy in the data pipeline and jax inside a step."""

NOWHERE = int(np.iinfo(np.int32).max)
"""Position, in a cache, of padding and of empty slots: after every query, so never attended to."""


class Tokens(NamedTuple):
    """Token ids, and where each stands: the positions are the causal mask.

    `seg` is 0 for padding and numbers the examples packed into a row from 1; `pos` restarts in each
    of them. When all rows agree, `pos` and `seg` may have a batch axis of 1.
    """

    ids: Int[Array, "B T"]
    pos: Int[Array, "#B T"]
    seg: Int[Array, "#B T"]


class Batch(NamedTuple):
    """One training batch. An encoder-decoder has both sides, a decoder-only model `target`, an
    encoder `source`; `labels` and `weights` belong to the side that predicts."""

    source: Tokens | None
    target: Tokens | None
    labels: Int[Array, "B T"]
    weights: Float[Array, "B T"]
