"""Every option has its effect: parameters of its own, or other logits from the same ones."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
from random_configs import VOCAB, abstract_params, batch_for, logits, random_params, random_tokens

from jaxformer.config import ModelConfig

BASE = ModelConfig(
    vocab_size=VOCAB, n_decoder_layers=1, d_model=8, d_ff=8, n_heads=2, max_length=16
)


def names(config):
    """The last two parts of the path of each parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: 0, abstract_params(config)))
    paths = ([part.key for part in path if hasattr(part, "key")] for path, _ in leaves)
    return {"/".join(path[-2:]) for path in paths}


@pytest.mark.parametrize(
    ("option", "added", "removed"),
    [
        (dict(), "", ""),
        (dict(norm="rms"), "", "attention_norm/bias mlp_norm/bias final_norm/bias"),
        (dict(norm_bias=False), "", "attention_norm/bias mlp_norm/bias final_norm/bias"),
        (dict(final_norm=False), "", "final_norm/scale final_norm/bias"),
        (dict(qkv_bias=True), "query/bias key/bias value/bias", ""),
        (dict(out_bias=True), "out/bias", ""),
        (dict(mlp_bias=True), "up/bias down/bias", ""),
        (dict(mlp_bias=True, gated=True), "up/bias down/bias gate/bias gate/kernel", ""),
        (dict(qk_norm=True), "query_norm/scale key_norm/scale", ""),
        (dict(embed_norm=True), "embed_norm/scale embed_norm/bias", ""),
        (dict(n_token_types=2), "token_types/embedding", ""),
        (dict(position="learned"), "positions/embedding", ""),
        (dict(position="relative"), "decoder/relative_bias", ""),
        (dict(head_bias=True), "head_bias", ""),
        (dict(tie_embeddings=False), "head/kernel", ""),
        (dict(tie_embeddings=False, head_bias=True), "head/kernel head/bias", ""),
        (
            dict(head_transform=True),
            "transform/kernel transform/bias transform_norm/scale transform_norm/bias",
            "",
        ),
        (dict(lora_rank=2), "query/lora_a query/lora_b value/lora_a value/lora_b", ""),
        (dict(lora_rank=2, lora_targets=("down",)), "down/lora_a down/lora_b", ""),
    ],
)
def test_an_option_has_the_parameters_it_should(option, added, removed):
    before, after = names(BASE), names(dataclasses.replace(BASE, **option))
    assert after - before == set(added.split())
    assert before - after == set(removed.split())


def test_each_kind_has_its_stacks():
    both = abstract_params(dataclasses.replace(BASE, n_encoder_layers=1))
    assert set(both) == {"embed", "encoder", "decoder"}
    self_only = {"attention", "attention_norm", "mlp", "mlp_norm"}
    assert set(both["encoder"]["layers"]) == self_only
    assert set(both["decoder"]["layers"]) == self_only | {"cross", "cross_norm"}
    encoder = abstract_params(dataclasses.replace(BASE, n_encoder_layers=1, n_decoder_layers=0))
    assert set(encoder) == {"embed", "encoder"}
    decoder = abstract_params(BASE)
    assert set(decoder) == {"embed", "decoder"}
    assert set(decoder["decoder"]["layers"]) == self_only


@pytest.mark.parametrize(
    "option",
    [
        dict(norm="rms"),
        dict(norm_position="post"),
        dict(norm_eps=0.5),
        dict(position="none"),
        dict(position="alibi"),
        dict(position="sinusoidal"),
        dict(rope_theta=(10.0,)),
        dict(window=(2,)),
        dict(activation="relu"),
        dict(activation="gelu_tanh"),
        dict(activation="silu"),
        dict(attention_scale=1.0),
        dict(attention_softcap=0.5),
        dict(embed_scale=2.0),
        dict(logit_scale=2.0),
        dict(logit_softcap=1.0),
    ],
    ids=lambda option: "-".join(map(str, *option.items())),
)
def test_an_option_without_parameters_has_its_effect(option):
    assert abs(out(dataclasses.replace(BASE, **option)) - out(BASE)).max() > 1e-4


@cache
def out(config):
    tokens = random_tokens(np.random.default_rng(0), 2, 6)
    return logits(config, random_params(BASE, 0), batch_for(BASE, tokens, tokens))
