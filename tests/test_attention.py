"""Weights of attention on request: what they are, and that who does not ask pays nothing."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import foreign
import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from random_configs import (
    DECODERS,
    batch_for,
    examples,
    model_configs,
    random_params,
    random_tokens,
)
from toy_models import toy, toy_batch, toy_params

from jaxformer import arrays, model
from jaxformer.config import ModelConfig
from jaxformer.data.tasks import encode_target
from jaxformer.errors import ConfigError
from jaxformer.model import Attended
from jaxformer.nn.transformer import Transformer, apply
from jaxformer.picture import draw_attention
from jaxformer.types import Batch


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


SOURCES, TARGETS, LENGTH = np.array([3, 6]), np.array([5, 4]), 6
seeds = st.integers(0, 2**32 - 1)
# Without biases and rotations, which cross-attention never has, queries and keys say it all.
configs = st.one_of(
    model_configs(kinds=("encoder-decoder",)),
    model_configs(kinds=("decoder-only",), positions=("learned", "sinusoidal", "none")),
)


@partial(jax.jit, static_argnums=0)
def attended(config: ModelConfig, params: Any, batch: Batch) -> tuple[Any, Any, Any]:
    """The weights, and the queries and keys of all layers of the decoder."""
    names = ("query_norm", "key_norm") if config.qk_norm else ("query", "key")
    _, kept = Transformer(config).apply(
        {"params": params},
        batch,
        capture_intermediates=lambda module, _: module.name in names,
        mutable=["intermediates"],
    )
    layers: Any = kept["intermediates"]["decoder"]["layers"]
    part = layers["cross" if config.n_encoder_layers else "attention"]
    query, key = (part[name]["__call__"][0] for name in names)
    return arrays.attention(config, params, batch), query, key


def weights_of(config: ModelConfig, layer: int, query: Any, keys: Any, at: int, there: int) -> Any:
    """The weights of one head's query `at` over its `keys`, of which the first `there` are real."""
    logits = keys @ query * config.query_scale
    if cap := config.attention_softcap:
        logits = cap * np.tanh(logits / cap)
    seen = np.arange(len(keys)) < there
    if not config.n_encoder_layers:
        window = config.window[layer % len(config.window)] or len(keys)
        seen &= (np.arange(len(keys)) <= at) & (at - np.arange(len(keys)) < window)
    odds = np.where(seen, np.exp(logits), 0)
    return odds / odds.sum()


def check(config: ModelConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = random_params(config, seed)
    source, target = (random_tokens(rng, 2, LENGTH, each) for each in (SOURCES, TARGETS))
    batch = batch_for(config, source, target)
    found, queries, keys = map(np.asarray, attended(config, params, batch))
    assert found.shape == (2, config.n_decoder_layers, config.n_heads, LENGTH, LENGTH)
    assert found.dtype == np.float32
    group = config.n_heads // config.kv_heads
    for row, layer, head, at in np.ndindex(found.shape[:-1]):
        if at >= TARGETS[row]:
            continue
        there = (SOURCES if config.n_encoder_layers else TARGETS)[row]
        query, of_row = queries[layer, row, at, head], keys[layer, row, :, head // group]
        wanted = weights_of(config, layer, query, of_row, at, there)
        np.testing.assert_allclose(found[row, layer, head, at], wanted, atol=1e-4)
        assert not found[row, layer, head, at, there:].any()
        assert found[row, layer, head, at].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_weights_are_those_of_queries_and_keys(kind: str):
    options = dict(n_heads=4, n_kv_heads=2, window=(0, 3), attention_softcap=5.0)
    check(toy(kind, position="learned", **options), 0)


@pytest.mark.slow
@examples(20)
@given(configs, seeds)
def test_weights_are_those_of_queries_and_keys_in_many_models(config: ModelConfig, seed: int):
    check(config, seed)


def scans(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from scans(inner)


def test_who_does_not_ask_pays_nothing():
    """The loops over layers hand out what they carry, and the weights only if asked."""
    config = toy("encoder-decoder")
    params, batch = toy_params(config), toy_batch(config)

    def beside(function: Any) -> list[int]:
        made = jax.make_jaxpr(partial(function, config))(params, batch)
        return [len(eqn.outvars) - eqn.params["num_carry"] for eqn in scans(made.jaxpr)]

    assert beside(apply) == [0, 0]
    assert beside(arrays.attention) != [0, 0]


TEXTS = [("abc", "cab"), ("e", "ab ba"), ("bead cab", "d"), ("", "")]
KINDS = ("t5", "llama")


@pytest.mark.parametrize("kind", KINDS)
def test_each_pair_has_its_own_weights_and_texts(kind: str, monkeypatch: pytest.MonkeyPatch):
    it = foreign.model(kind)
    sources, targets = map(list, zip(*TEXTS, strict=True))
    found = it.attention(sources, targets)
    for (source, target), each in zip(TEXTS, found, strict=True):
        prompt, ids = it.prompt(source), encode_target(it.data, it.tokenizer, target).tolist()
        read = prompt if it.config.n_encoder_layers else prompt + ids[:-1]
        assert not each.error and each.weights.dtype == np.float32
        assert each.weights.shape == (
            it.config.n_decoder_layers, it.config.n_heads, len(ids), len(read)
        )  # fmt: skip
        np.testing.assert_allclose(each.weights.sum(-1), 1, atol=1e-5)
        if not it.config.n_encoder_layers:
            after = np.arange(len(read)) > np.arange(len(prompt) - 1, len(read))[:, None]
            assert not each.weights[..., after].any()
        assert (len(each.source), len(each.target)) == (len(read), len(ids))
        assert "".join(each.target[:-1]).replace(" ", "") == target.replace(" ", "")
        assert each.target[-1] == it.tokenizer.decode_token(ids[-1])
    # Ids are taken as they are, and batches change nothing.
    monkeypatch.setattr(model, "MAPPED", 1)
    prompts = list(map(it.prompt, sources))
    written = [encode_target(it.data, it.tokenizer, target).tolist() for target in targets]
    for one, other in zip(found, it.attention(prompts[:2], written[:2]), strict=False):
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-5)
        assert one[1:] == other[1:]


def test_what_is_refused():
    for kind in KINDS:
        it = foreign.model(kind)
        long = "a" * (foreign.SIZE["max_length"] + 1)
        found = it.attention(["ab", long, "b"], ["b", "a", long])
        assert [bool(each.error) for each in found] == [False, True, True]
        assert [each.error for each in found[1:]] == [
            each.error for each in it.score_tokens([long, "b"], ["a", long])
        ]
        assert not found[1].weights.size and not found[1].source
        with pytest.raises(ConfigError, match="there are 2 sources for 1 targets"):
            it.attention(["a", "b"], ["a"])
        assert it.attention([], []) == []
    with pytest.raises(ConfigError, match="encoder-only model has no targets that attend"):
        foreign.model("bert").attention(["a"], ["b"])


def test_any_token_can_be_drawn(tmp_path: Path):
    odd = ("$\\frac$", " ", "\n", "\x1b[31m", "", "a" * 99)
    few = Attended(np.full((1, 2, 6, 6), 1 / 6, np.float32), odd, odd)
    many = Attended(np.full((1, 1, 1, 90), 1 / 90, np.float32), ("a",) * 90, ("b",))
    draw_attention([few, many, few], tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
