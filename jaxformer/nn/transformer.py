"""Block, Stack, Transformer: one set of modules for all three kinds of model.

A decoder has three uses. Training and scoring: memory given, no cache, the whole target at once.
Prefill: the prompt into the cache, whole or in pieces, with the memory if there is one. Step:
memory absent, a filled cache, one token for each hypothesis or, where tokens are guessed, several
of one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import ModelConfig
from jaxformer.nn import functional as f
from jaxformer.nn import positions
from jaxformer.nn.attention import Attention
from jaxformer.nn.cache import KV, Cache
from jaxformer.nn.layers import MLP, Embed, Linear, Norm, constrain, named
from jaxformer.types import NOWHERE, Batch, Tokens


class Context(NamedTuple):
    """What all layers of a stack share; U counts the distinct windows, or rotations."""

    masks: Bool[Array, "U #B T S"]
    bias: Float[Array, "#B N T S"] | None
    rotations: tuple[Float[Array, "U #B T 1 h"], Float[Array, "U #B T 1 h"]] | None
    memory: Float[Array, "B M D"] | None
    cross_mask: Bool[Array, "#B T M"] | None
    slot: Int[Array, ""]


class Layer(NamedTuple):
    """What differs between the layers of a stack: which mask and which rotation it uses."""

    mask: Any
    rotation: Any


class Block(nn.Module):
    """One layer: self-attention, cross-attention in a decoder with memory, feed-forward."""

    config: ModelConfig
    cross: bool
    gain: float
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Layer,
        context: Context,
        self_kv: KV | None = None,
        cross_kv: KV | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KV | None, KV | None] | None]:
        cfg, gain, det = self.config, self.gain, self.deterministic
        caching = self_kv is not None

        def before(x, name):
            return x if cfg.norm_position == "post" else Norm(cfg, name=name)(x)

        def after(x, y, name):
            y = Norm(cfg, name=f"{name}_after")(y) if cfg.norm_position == "both" else y
            x = x + nn.Dropout(cfg.dropout)(y, deterministic=det)
            x = Norm(cfg, name=name)(x) if cfg.norm_position == "post" else x
            return constrain(x, "batch", "length", None)

        rotations = None
        if context.rotations is not None:
            cos, sin = context.rotations
            rotations = (cos[layer.rotation], sin[layer.rotation])
        h = before(x, "attention_norm")
        y, self_kv = Attention(cfg, det, gain, name="attention")(
            h, h, context.masks[layer.mask], context.bias, rotations, self_kv, context.slot
        )
        x = after(x, y, "attention_norm")
        if self.cross and context.cross_mask is not None:
            y, cross_kv = Attention(cfg, det, gain, name="cross")(
                before(x, "cross_norm"), context.memory, context.cross_mask, kv=cross_kv
            )
            x = after(x, y, "cross_norm")
        y = MLP(cfg, det, gain, name="mlp")(before(x, "mlp_norm"))
        return after(x, y, "mlp_norm"), (self_kv, cross_kv) if caching else None


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nn.Module):
    """The layers of an encoder or decoder, and how positions enter it.

    Parameters are stacked on a leading layer axis; with a cache the layers run unrolled, on
    parameters that `unstack` took apart.
    """

    config: ModelConfig
    n_layers: int
    causal: bool
    cross: bool
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        memory: Float[Array, "B M D"] | None = None,
        memory_seg: Int[Array, "#B M"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        cfg = self.config
        x = self._embed(x, tokens.pos)
        if cache is not None:
            cache = _advance(cache, tokens, memory_seg)
            memory_seg = cache.cross_seg
        layers, context = self._context(tokens, memory, memory_seg, cache)
        gain = (2 * self.n_layers) ** -0.5 if cfg.init_residual_scaled else 1.0
        args = (cfg, self.cross, gain, self.deterministic)
        if cache is None:
            x, _ = self._scanned()(*args, name="layers")(
                x, jax.tree.map(jnp.asarray, layers), context
            )
        else:
            kvs = []
            for i in range(self.n_layers):
                block = Block(*args, name=f"layers_{i}")
                cross_kv = cache.cross[i] if self.cross else None
                layer = Layer(*(int(part[i]) for part in layers))
                x, kv = block(x, layer, context, cache.own[i], cross_kv)
                kvs.append(kv)
            own, crossed = zip(*kvs, strict=True)
            cache = cache._replace(
                own=own,
                cross=crossed if self.cross else (),
                filled=cache.filled + tokens.ids.shape[1],
            )
        return (Norm(cfg, name="final_norm")(x) if cfg.final_norm else x), cache

    def _scanned(self) -> Any:
        cfg, block = self.config, Block
        if cfg.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[cfg.remat])
        scan: Any = nn.scan  # its own annotation knows no tuple of in_axes
        return scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=self.n_layers,
            unroll=1 if cfg.scan_layers else self.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )

    def _embed(self, x: Float[Array, "B T D"], pos: Int[Array, "#B T"]) -> Float[Array, "B T D"]:
        """Add positions and the token type to the embeddings; norm and dropout as configured."""
        cfg = self.config
        if cfg.position == "sinusoidal":
            halves = cfg.sinusoid == "halves"
            x = x + positions.sinusoid(pos, cfg.d_model, halves=halves).astype(x.dtype)
        if cfg.position == "learned":
            size = cfg.max_length + cfg.position_offset
            x = x + Embed(cfg, size, "length", name="positions")(pos + cfg.position_offset)
        if cfg.n_token_types:
            x = x + Embed(cfg, cfg.n_token_types, "types", name="token_types")(jnp.zeros_like(pos))
        if cfg.embed_norm:
            x = Norm(cfg, name="embed_norm")(x)
        x = nn.Dropout(cfg.dropout)(x, deterministic=self.deterministic)
        return constrain(x, "batch", "length", None)

    def _context(
        self,
        tokens: Tokens,
        memory: Float[Array, "B M D"] | None,
        memory_seg: Int[Array, "#B M"] | None,
        cache: Cache | None,
    ) -> tuple[Layer, Context]:
        """Masks, biases and rotations, each once; and which of them each layer takes."""
        cfg = self.config
        q_pos, kv_pos = tokens.pos, tokens.pos if cache is None else cache.pos
        segs = (tokens.seg, tokens.seg) if cache is None else (None, None)
        cycle = range(self.n_layers)
        window = [cfg.window[i % len(cfg.window)] for i in cycle]
        theta = [cfg.rope_theta[i % len(cfg.rope_theta)] for i in cycle]
        stretch = [cfg.rope_factor[i % len(cfg.rope_factor)] for i in cycle]
        rope = list(zip(theta, stretch, strict=True))
        windows, ropes = sorted(set(window)), sorted(set(rope))
        masks = jnp.stack(
            [
                f.attention_mask(q_pos, kv_pos, *segs, causal=self.causal, window=each)
                for each in windows
            ]
        )
        if cache is not None and cache.seen is not None:
            masks &= cache.seen
        rotations = None
        if cfg.position == "rotary":
            tables = [
                positions.rotation(q_pos, positions.rotary_rates(cfg, *each), cfg.rope_magnitude)
                for each in ropes
            ]
            cos, sin = zip(*tables, strict=True)
            rotations = (jnp.stack(cos), jnp.stack(sin))
        cross_mask = None
        if memory_seg is not None:
            cross_mask = tokens.seg[:, :, None] == memory_seg[:, None, :]
        layers = Layer(
            np.array([windows.index(each) for each in window]),
            np.array([ropes.index(each) for each in rope]),
        )
        slot = jnp.int32(0) if cache is None else cache.filled
        bias = self._bias(q_pos, kv_pos)
        return layers, Context(masks, bias, rotations, memory, cross_mask, slot)

    def _bias(self, q_pos: Int[Array, "#B T"], kv_pos: Int[Array, "#B S"]) -> Array | None:
        cfg = self.config
        if cfg.position == "alibi":
            return positions.alibi_bias(q_pos, kv_pos, cfg.n_heads)
        if cfg.position != "relative":
            return None
        bucket = positions.relative_bucket(
            kv_pos[:, None, :] - q_pos[:, :, None],
            bidirectional=not self.causal,
            buckets=cfg.relative_buckets,
            max_distance=cfg.relative_max_distance,
        )
        init = named(jax.nn.initializers.normal(cfg.d_model**-0.5), ("buckets", "heads"))
        shape = (cfg.relative_buckets, cfg.n_heads)
        table = self.param("relative_bias", init, shape, jnp.dtype(cfg.param_dtype))
        return table.astype(jnp.float32)[bucket].transpose(0, 3, 1, 2)


def _advance(cache: Cache, tokens: Tokens, memory_seg: Int[Array, "#B M"] | None) -> Cache:
    """The cache with the positions of `tokens`, and the segments of the memory if there is one."""
    rows = cache.pos.shape[0]
    pos = jnp.where(tokens.seg > 0, tokens.pos, NOWHERE)
    pos = jnp.broadcast_to(pos, (rows, pos.shape[1]))
    if memory_seg is not None and cache.cross_seg is not None:
        cache = cache._replace(cross_seg=jnp.broadcast_to(memory_seg, cache.cross_seg.shape))
    return cache._replace(pos=jax.lax.dynamic_update_slice(cache.pos, pos, (0, cache.filled)))


class Transformer(nn.Module):
    """An encoder-decoder, decoder-only or encoder-only Transformer, as `config` says.

    `apply({"params": params}, batch)` gives the logits of a batch; `encode`, `decode` and `unembed`
    are its parts. With `deterministic=False` dropout draws from the rng named "dropout".
    """

    config: ModelConfig
    deterministic: bool = True

    def setup(self) -> None:
        cfg, det = self.config, self.deterministic
        self.embed = Embed(cfg, cfg.vocab_size, "vocab")
        if cfg.n_encoder_layers:
            self.encoder = Stack(cfg, cfg.n_encoder_layers, False, False, det)
        if cfg.n_decoder_layers:
            crossed = cfg.n_encoder_layers > 0
            self.decoder = Stack(cfg, cfg.n_decoder_layers, True, crossed, det)
        if cfg.source_vocab_size:
            self.source_embed = Embed(cfg, cfg.source_vocab_size, "vocab")
        width = (cfg.d_model,)
        if cfg.pooler != "none":
            self.pooler = Linear(cfg, width, width, ("embed", "mlp"), bias=True)
        if cfg.head in ("sequence", "each"):
            self.head_dropout = nn.Dropout(cfg.dropout, deterministic=det)
            self.head = Linear(cfg, width, (len(cfg.labels),), ("embed", "labels"), bias=True)
        if cfg.head != "tokens":
            return
        if cfg.head_transform:
            self.transform = Linear(cfg, width, width, ("embed", "mlp"), bias=True)
            self.transform_norm = Norm(cfg)
        if not cfg.tie_embeddings:
            axes = ("embed", "vocab")
            self.head = Linear(cfg, width, (cfg.vocab_size,), axes, cfg.head_bias)
        elif cfg.head_bias:
            zeros = named(jax.nn.initializers.zeros, ("vocab",))
            self.head_bias = self.param(
                "head_bias", zeros, (cfg.vocab_size,), jnp.dtype(cfg.param_dtype)
            )

    def __call__(self, batch: Batch) -> Float[Array, "B *T V"]:
        """What the head makes of a batch, in float32: logits of the next target token, or of the
        source itself; of the classes of each row, or of each token; or hidden states."""
        hidden = memory_seg = None
        if batch.source is not None:
            hidden, memory_seg = self.encode(batch.source), batch.source.seg
        if batch.target is not None:
            hidden, _ = self.decode(batch.target, hidden, memory_seg)
        if hidden is None:
            raise ValueError("the batch has neither a source nor a target")
        if self.config.head == "tokens":
            return self.unembed(hidden)
        if self.config.head == "each":
            return self.head(self.head_dropout(hidden)).astype(jnp.float32)
        pooled = self.pool(hidden)  # without a head too, for `init` makes the pooler here
        if self.config.head == "sequence":
            return self.head(self.head_dropout(pooled)).astype(jnp.float32)
        return hidden.astype(jnp.float32)

    def encode(self, source: Tokens) -> Float[Array, "B M D"]:
        """The encoder's output for a source."""
        embed = self.source_embed if self.config.source_vocab_size else self.embed
        return self.encoder(self._embed(embed, source.ids), source)[0]

    def decode(
        self,
        target: Tokens,
        memory: Float[Array, "B M D"] | None = None,
        memory_seg: Int[Array, "#B M"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The decoder's output for a target, and the cache with the target in it.

        With a cache, the parameters must have gone through `unstack`; `memory` is needed only by
        the first call, which puts its keys and values into the cache.
        """
        x = self._embed(self.embed, target.ids)
        return self.decoder(x, target, memory, memory_seg, cache)

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits, in float32."""
        cfg = self.config
        if cfg.head_transform:
            hidden = f.ACTIVATIONS[cfg.activation](self.transform(hidden))
            hidden = self.transform_norm(hidden)
        hidden = hidden * cfg.logit_scale
        if cfg.tie_embeddings:
            logits = self.embed.attend(hidden)
            logits = logits + self.head_bias.astype(jnp.float32) if cfg.head_bias else logits
        else:
            logits = self.head(hidden).astype(jnp.float32)
        if logits.ndim == 3:
            logits = constrain(logits, "batch", "length", "vocab")
        logits = f.softcap(logits, cfg.logit_softcap)
        if cfg.vocab_padding:
            real = jnp.arange(cfg.vocab_size) < cfg.vocab_size - cfg.vocab_padding
            logits = jnp.where(real, logits, -jnp.inf)
        return logits

    def pool(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """The first token's hidden state, through the pooler if there is one."""
        first = hidden[:, 0]
        if self.config.pooler == "none":
            return first
        return {"tanh": jnp.tanh, "relu": jax.nn.relu}[self.config.pooler](self.pooler(first))

    def embedding(self, source: Tokens) -> Float[Array, "B D"]:
        """One vector for each text, in float32: see `ModelConfig.pooling` and `pooling_norm`.

        Reimers and Gurevych 2019.
        """
        hidden = self.encode(source).astype(jnp.float32)
        there = (source.seg > 0)[..., None].astype(jnp.float32)
        mean = (hidden * there).sum(1) / jnp.maximum(there.sum(1), 1)
        vector = mean if self.config.pooling == "mean" else hidden[:, 0]
        if self.config.pooling_norm:
            norm = jnp.linalg.norm(vector, axis=-1, keepdims=True)
            vector = vector / jnp.maximum(norm, 1e-12)
        return vector

    def _embed(self, embed: Embed, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return embed(ids) * self.config.embed_scale


def apply(config: ModelConfig, params: Any, *args: Any, method: str = "__call__") -> Any:
    """A method of the Transformer of `config`, without dropout, as a pure function of `params`."""
    return Transformer(config).apply({"params": params}, *args, method=method)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters for decoding with a cache: the decoder's layers apart, `layers_0`, `layers_1`...

    Done once, outside the token loop, for a loop over layers inside it would copy every weight.
    """
    decoder = dict(params["decoder"])
    layers = decoder.pop("layers")
    n = jax.tree.leaves(layers)[0].shape[0]
    apart = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(n)}
    return {**params, "decoder": {**decoder, **apart}}


TOGETHER = {"attention": ("query", "key", "value"), "mlp": ("up", "gate")}
"""What is multiplied by the same input, in each module."""


def pack(params: dict[str, Any]) -> dict[str, Any]:
    """Unstacked parameters with the kernels that decode a token laid out as a CPU reads them best:
    `packed` "O I" for every `kernel`, all inputs in one axis and all outputs in another; and those
    that are multiplied by the same input one below the other, quantised or not."""

    def packed(name: str, part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        part = {key: packed(key, value) for key, value in part.items()}
        if "kernel" in part:
            kernel = part.pop("kernel")
            inputs = math.prod(kernel.shape[: 2 if name == "out" else 1])
            part["packed"] = kernel.reshape(inputs, -1).T
        alike = [part[each] for each in TOGETHER.get(name, ()) if each in part]
        for key in ("packed", "int8", "scale"):
            if len(alike) > 1 and key in alike[0]:
                part[key] = jnp.concatenate([each.pop(key) for each in alike])
        return part

    of_tokens = {name: params[name] for name in ("decoder", "head") if name in params}
    return {**params, **packed("", of_tokens)}


def init(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Initial parameters, each leaf boxed with its logical axis names (`flax.linen.unbox` them)."""
    tokens = Tokens(*(jnp.ones((1, 2), jnp.int32),) * 3)
    batch = Batch(
        source=tokens if config.n_encoder_layers else None,
        target=tokens if config.n_decoder_layers else None,
        labels=tokens.ids,
        weights=jnp.ones((1, 2)),
    )
    return dict(Transformer(config).init(key, batch)["params"])
