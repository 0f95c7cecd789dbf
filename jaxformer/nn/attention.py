"""Attention, to itself or to the encoder's output, with or without a cache."""

from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxformer.config import ModelConfig
from jaxformer.nn import functional as f
from jaxformer.nn.cache import KV, write
from jaxformer.nn.layers import Linear, Norm, constrain, together
from jaxformer.nn.positions import rotate


class Attention(nn.Module):
    """Multi-head attention from `x` to `memory` (itself, in self-attention), or to the cache.

    Memory given: its keys and values are projected, and written to the cache if there is one, from
    `slot` on, and no slot after them need be read; without a `slot`, they fill it.
    Memory absent: they are read from the cache alone. `rotations` are the cosines and
    sines of rotary positions, if the model has them.

    Without a cache, the weights "B K G T S" are sown as "weights" into the collection
    "intermediates", which is nothing but where the caller makes that mutable.
    """

    config: ModelConfig
    deterministic: bool
    out_gain: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B M D"] | None,
        mask: Bool[Array, "#B T S"],
        bias: Float[Array, "#B N T S"] | None = None,
        rotations: tuple[Array, Array] | None = None,
        kv: KV | None = None,
        slot: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], KV | None]:
        cfg = self.config
        d, h = (cfg.d_model,), cfg.dim_per_head
        axes = ("embed", "heads", "head_dim")
        kv_axes = ("embed", "kv_heads", "head_dim")

        # Whatever the attention scale, logits start the same: the initial queries make up for it.
        gain = h**-0.5 / cfg.query_scale
        heads, kv_heads = (cfg.n_heads, h), (cfg.kv_heads, h)
        sizes = {"query": cfg.n_heads * h, "key": cfg.kv_heads * h, "value": cfg.kv_heads * h}
        products = together(self, x, sizes)
        query = Linear(cfg, d, heads, axes, cfg.qkv_bias, gain, name="query")(x, products["query"])
        if cfg.qk_norm:
            query = Norm(cfg, kind="rms", axis="head_dim", name="query_norm")(query)
        if rotations is not None:
            query = rotate(query, *rotations)
        query = constrain(query * cfg.query_scale, "batch", "length", "heads", "head_dim")

        cap, filled = cfg.attention_softcap, None
        key = value = None
        if memory is not None:
            key, value = (
                Linear(cfg, d, kv_heads, kv_axes, cfg.qkv_bias, name=name)(memory, products[name])
                for name in ("key", "value")
            )
            if cfg.qk_norm:
                key = Norm(cfg, kind="rms", axis="head_dim", name="key_norm")(key)
            if rotations is not None:
                key = rotate(key, *rotations)
            key = constrain(key, "batch", "length", "kv_heads", "head_dim")
            value = constrain(value, "batch", "length", "kv_heads", "head_dim")

        if kv is not None:
            if key is not None and value is not None:
                kv = write(kv, key, value, 0 if slot is None else slot)
                filled = None if slot is None else slot + x.shape[1]
            y = f.attend_cached(query, kv.k, kv.v, mask, bias, cap=cap, filled=filled)
        elif key is not None and value is not None:
            dropout = nn.Dropout(cfg.attention_dropout, deterministic=self.deterministic)

            def drop(weights: Array) -> Array:
                self.sow("intermediates", "weights", weights)
                return dropout(weights)

            y = f.attend(query, key, value, mask, bias, cap=cap, drop=drop)
        else:
            raise ValueError("attention has neither a memory nor a cache to read it from")
        out = Linear(cfg, heads, d, (*axes[1:], "embed"), cfg.out_bias, self.out_gain, name="out")
        return out(y), kv
