"""The optimiser against a hand-written AdamW, and its schedules at the steps that matter."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_models import toy, toy_params

from jaxformer.config import OptimConfig
from jaxformer.training.optim import decayed, make_optimizer, schedule

PEAK, STEPS = 0.5, 100


def rates(kind: Any, warmup: int, *at: int) -> list[float]:
    rate = schedule(OptimConfig(learning_rate=PEAK, schedule=kind, warmup=warmup), STEPS)
    return [float(jnp.asarray(rate(jnp.int32(step)))) for step in at]


@pytest.mark.parametrize(
    "kind, middle, end",
    [
        ("constant", PEAK, PEAK),
        ("linear", PEAK / 2, 0),
        ("cosine", PEAK / 2, 0),
        ("rsqrt", PEAK * math.sqrt(20 / 60), PEAK * math.sqrt(20 / 100)),
    ],
)
def test_rises_then_falls(kind, middle, end):
    found = rates(kind, 20, 0, 9, 19, 20, 60, 100)
    expected = [PEAK / 20, PEAK / 2, PEAK, PEAK, middle, end]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_shapes_of_the_falls():
    a_quarter = rates("linear", 0, 25) + rates("cosine", 0, 25)
    expected = [PEAK * 0.75, PEAK * (1 + math.cos(math.pi / 4)) / 2]
    np.testing.assert_allclose(a_quarter, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "rsqrt"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warmup_starts_at_the_peak(kind, warmup):
    first, second, last = rates(kind, warmup, 0, 1 + warmup, STEPS - 1)
    assert first == pytest.approx(PEAK)
    assert second == first if kind == "constant" else 0 < second < first
    assert 0 < last <= second  # no update is wasted on a rate of zero


def test_warmup_longer_than_the_run():
    np.testing.assert_allclose(rates("cosine", 400, 0, 99), [PEAK / 400, PEAK / 4], rtol=1e-5)


def by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


EVERYTHING = dict(
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    head_bias=True,
    head_transform=True,
    qk_norm=True,
    n_token_types=2,
    embed_norm=True,
    lora_rank=2,
)


def test_only_kernels_embeddings_and_adapters_decay():
    names = {}
    for options in (
        dict(position="relative", tie_embeddings=True),
        dict(position="learned", tie_embeddings=False),
    ):
        params = toy_params(toy("encoder-decoder", **EVERYTHING, **options))
        names |= by_name(decayed(params))
    last = {name: name.split("/")[-1] for name in names}
    decaying = {last[name] for name in names if names[name]}
    still = {last[name] for name in names if not names[name]}
    assert decaying == {"kernel", "embedding", "lora_a", "lora_b"}
    assert still == {"scale", "bias", "head_bias", "relative_bias"}


def adamw(c: OptimConfig, params, grads, m, v, t, rate):
    """Loshchilov and Hutter 2019, algorithm 2, for a list of arrays whose first one decays."""
    norm = math.sqrt(sum((g**2).sum() for g in grads))
    grads = [g * min(1, c.clip / norm) if c.clip else g for g in grads]
    m = [c.beta1 * a + (1 - c.beta1) * g for a, g in zip(m, grads, strict=True)]
    v = [c.beta2 * a + (1 - c.beta2) * g**2 for a, g in zip(v, grads, strict=True)]
    out = []
    for i, (p, a, b) in enumerate(zip(params, m, v, strict=True)):
        step = (a / (1 - c.beta1**t)) / (np.sqrt(b / (1 - c.beta2**t)) + c.eps)
        out.append(p - rate * (step + (c.weight_decay if i == 0 else 0) * p))
    return out, m, v


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_is_adamw(clip):
    c = OptimConfig(
        learning_rate=0.1, schedule="linear", warmup=2, weight_decay=0.3, clip=clip, eps=1e-3
    )
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(3, 2)), rng.normal(size=2)]
    m = v = [np.zeros_like(p) for p in params]
    tree = {"x": {"kernel": jnp.float32(params[0]), "bias": jnp.float32(params[1])}}
    tx = make_optimizer(toy(), c, 10)
    state = tx.init(tree)
    for t, rate in enumerate([0.05, 0.1, 0.1, 0.1 * 7 / 8], 1):
        grads = [rng.normal(size=p.shape) for p in params]
        params, m, v = adamw(c, params, grads, m, v, t, rate)
        updates, state = tx.update(
            {"x": {"kernel": jnp.float32(grads[0]), "bias": jnp.float32(grads[1])}}, state, tree
        )
        tree = optax.apply_updates(tree, updates)
        for p, name in zip(params, ("kernel", "bias"), strict=True):
            np.testing.assert_allclose(tree["x"][name], p, rtol=1e-4, atol=1e-6)


def test_with_lora_only_adapters_move():
    config = toy("encoder-decoder", lora_rank=2)
    params = toy_params(config)
    # No clipping nor warm-up to hide behind; the decay alone would move what it reached.
    c = OptimConfig(learning_rate=1.0, warmup=0, weight_decay=0.5, clip=0.0)
    tx = make_optimizer(config, c, 10)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    moved = {name for name, u in by_name(updates).items() if np.any(u)}
    adapters = {name for name in by_name(params) if name.split("/")[-1] in ("lora_a", "lora_b")}
    assert adapters and moved == adapters
    # Two moments for each adapter, none for what is frozen.
    size = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert size == 2 * sum(by_name(params)[name].size for name in adapters)


def test_with_lora_the_clip_sees_only_adapters():
    config = toy(lora_rank=2)
    params = toy_params(config)
    c = OptimConfig(learning_rate=1.0, schedule="constant", warmup=0, clip=1.0, weight_decay=0.0)
    tx = make_optimizer(config, c, 10)
    small = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    huge = {**small, "embed": jax.tree.map(lambda p: jnp.full_like(p, 1e9), small["embed"])}
    state, update = tx.init(params), jax.jit(tx.update)
    a, b = (update(grads, state, params)[0] for grads in (small, huge))
    jax.tree.map(np.testing.assert_array_equal, a, b)
