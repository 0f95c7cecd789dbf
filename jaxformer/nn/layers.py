"""The parts that hold parameters: Linear, Embed, Norm, MLP. Each names its axes for sharding."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
from jaxtyping import Array, Float, Int

from jaxformer.config import ModelConfig
from jaxformer.nn import functional as f
from jaxformer.nn.quantize import project_int8

Initializer = Callable[..., Any]


def named(init: Initializer, axes: tuple[str, ...]) -> Initializer:
    """`init`, its result labelled with the logical names of its axes."""
    return nn.with_logical_partitioning(init, axes)


def constrain(x: Float[Array, "..."], *axes: str | None) -> Float[Array, "..."]:
    """Ask that `x` be sharded along these logical axes; outside a mesh it is a no-op."""
    return with_logical_constraint(x, axes)


def kernel_init(config: ModelConfig, n_in: int, n_out: int, gain: float) -> Initializer:
    """The configured initialiser of a kernel whose first n_in axes are contracted, times `gain`."""
    fans = dict(in_axis=tuple(range(n_in)), out_axis=tuple(range(n_in, n_in + n_out)))
    scaling = jax.nn.initializers.variance_scaling
    init: Initializer = {
        "normal": jax.nn.initializers.normal(config.init_std),
        "truncated_normal": jax.nn.initializers.truncated_normal(config.init_std),
        "xavier": scaling(1.0, "fan_avg", "uniform", **fans),
        "lecun": scaling(1.0, "fan_in", "normal", **fans),
    }[config.initializer]
    return lambda *args: gain * init(*args)


def packed_product(module: nn.Module, x: Float[Array, "*B I"]) -> Float[Array, "*B O"] | None:
    """`x` times what `module` has in place of a kernel, packed or quantised; None if nothing."""
    if module.has_variable("params", "packed"):
        packed = module.get_variable("params", "packed").astype(x.dtype)
        return f.project(x, packed, x.dtype, on_cpu=True)  # for which alone `prepare` packs
    if module.has_variable("params", "int8"):
        int8, scale = (module.get_variable("params", name) for name in ("int8", "scale"))
        return project_int8(x, int8, scale, x.dtype)
    return None


def together(module: Any, x: Float[Array, "*B I"], sizes: dict[str, int]) -> dict[str, Any]:
    """For each of a module's `Linear`s of one input its product, so many values wide, if `pack` put
    their kernels together; else None."""
    y = packed_product(module, x.astype(module.config.compute_dtype))
    if y is None:
        return dict.fromkeys(sizes)
    *ends, _ = itertools.accumulate(sizes.values())
    return dict(zip(sizes, jnp.split(y, ends, -1), strict=True))


class Linear(nn.Module):
    """Contract the last axes of x with the first of a kernel, and add a bias and a LoRA if there.

    The kernel has shape `d_in` + `d_out` and axis names `axes`. With adapters it is W + s A B,
    s = lora_alpha / lora_rank, where B starts at zero (Hu et al. 2022, equation 3). In place
    of a kernel there may be one that was packed for decoding, or quantised, or the `product` of x
    and the kernel that `together` made.
    """

    config: ModelConfig
    d_in: tuple[int, ...]
    d_out: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False
    gain: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "..."], product: Float[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        cfg, n_in = self.config, len(self.d_in)
        dtype, param_dtype = jnp.dtype(cfg.compute_dtype), jnp.dtype(cfg.param_dtype)
        x = x.astype(dtype)
        before = x.shape[: x.ndim - n_in]
        if product is None:
            product = packed_product(self, x.reshape(*before, -1))
        if product is not None:
            y = product.reshape(*before, *self.d_out)
        else:
            init = kernel_init(cfg, n_in, len(self.d_out), self.gain)
            shape = self.d_in + self.d_out
            kernel = self.param("kernel", named(init, self.axes), shape, param_dtype)
            y = jnp.tensordot(x, kernel.astype(dtype), n_in)
        if cfg.lora_rank and self.name in cfg.lora_targets:
            rank = (cfg.lora_rank,)
            std = 1 / math.sqrt(math.prod(self.d_in))
            a_init = named(jax.nn.initializers.normal(std), (*self.axes[:n_in], "lora"))
            b_init = named(jax.nn.initializers.zeros, ("lora", *self.axes[n_in:]))
            a = self.param("lora_a", a_init, self.d_in + rank, param_dtype)
            b = self.param("lora_b", b_init, rank + self.d_out, param_dtype)
            delta = jnp.tensordot(jnp.tensordot(x, a.astype(dtype), n_in), b.astype(dtype), 1)
            y = y + (cfg.lora_alpha / cfg.lora_rank) * delta
        if self.bias:
            zeros = named(jax.nn.initializers.zeros, self.axes[n_in:])
            y = y + self.param("bias", zeros, self.d_out, param_dtype).astype(dtype)
        return y


class Embed(nn.Module):
    """A table of vectors, quantised or not, looked up by id, or used as the output head."""

    config: ModelConfig
    size: int
    axis: str

    def setup(self) -> None:
        cfg = self.config
        if self.has_variable("params", "int8"):
            self.int8, self.scale = (self.get_variable("params", n) for n in ("int8", "scale"))
            return
        init = named(jax.nn.initializers.normal(cfg.embed_init_std), (self.axis, "embed"))
        shape = (self.size, cfg.d_model)
        self.embedding = self.param("embedding", init, shape, jnp.dtype(cfg.param_dtype))

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        dtype = jnp.dtype(self.config.compute_dtype)
        if self.has_variable("params", "int8"):
            scale = jnp.take(self.scale, ids, axis=0)[..., None]
            return (jnp.take(self.int8, ids, axis=0) * scale).astype(dtype)
        # Rows of a table cut along its width would have to be cut anew for the batch.
        table = constrain(self.embedding, self.axis, None)
        return jnp.take(table, ids, axis=0).astype(dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of `x` against every row of the table, in float32."""
        if self.has_variable("params", "int8"):
            return project_int8(x, self.int8, self.scale, jnp.float32)
        table = self.embedding.astype(self.config.compute_dtype)
        return f.project(x, table, jnp.float32)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, as configured."""

    config: ModelConfig
    kind: str = ""
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        cfg = self.config
        dtype, shape = jnp.dtype(cfg.param_dtype), x.shape[-1:]
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        start = zeros if cfg.norm_unit_offset else ones
        scale = self.param("scale", named(start, (self.axis,)), shape, dtype)
        if cfg.norm_unit_offset:
            scale = 1 + scale.astype(jnp.float32)
        if (self.kind or cfg.norm) == "rms":
            return f.rms_norm(x, scale, cfg.norm_eps)
        bias = None
        if cfg.norm_bias:
            bias = self.param("bias", named(zeros, (self.axis,)), shape, dtype)
        return f.layer_norm(x, scale, bias, cfg.norm_eps)


class MLP(nn.Module):
    """Position-wise feed-forward layer, gated or not (Vaswani et al. 2017; Shazeer 2020)."""

    config: ModelConfig
    deterministic: bool
    out_gain: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.config
        d, ff = (cfg.d_model,), (cfg.d_ff,)
        axes = ("embed", "mlp")
        products = together(self, x, {"up": cfg.d_ff, "gate": cfg.d_ff})
        up = Linear(cfg, d, ff, axes, cfg.mlp_bias, name="up")(x, products["up"])
        if cfg.gated:
            gate = Linear(cfg, d, ff, axes, cfg.mlp_bias, name="gate")(x, products["gate"])
            y = f.ACTIVATIONS[cfg.activation](gate) * up
        else:
            y = f.ACTIVATIONS[cfg.activation](up)
        y = constrain(y, "batch", "length", "mlp")
        y = nn.Dropout(cfg.mlp_dropout)(y, deterministic=self.deterministic)
        return Linear(cfg, ff, d, axes[::-1], cfg.mlp_bias, self.out_gain, name="down")(y)
