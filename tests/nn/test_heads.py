"""Heads besides logits of tokens, embeddings of texts, and what stands for no token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_configs import as_tokens, random_params, random_tokens
from toy_models import toy, toy_batch, toy_params

from jaxformer.nn import transformer
from jaxformer.types import Batch

apply = jax.jit(transformer.apply, static_argnums=0, static_argnames="method")
rng = np.random.default_rng(0)
LABELS = ("no", "yes", "maybe")


def source_of(lengths) -> Batch:
    source = random_tokens(rng, len(lengths), max(lengths), lengths)
    return Batch(source, None, source.ids, jnp.ones(source.ids.shape))


def encoder(**options):
    return toy("encoder-only", **options)


@pytest.mark.parametrize("pooler", ["none", "tanh", "relu"])
def test_a_sequence_head_reads_the_first_token(pooler):
    config = encoder(head="sequence", labels=LABELS, pooler=pooler)
    params, batch = toy_params(config), source_of([5, 3])
    hidden = np.asarray(apply(config, params, batch.source, method="encode"))[:, 0]
    if pooler != "none":
        dense = hidden @ params["pooler"]["kernel"] + params["pooler"]["bias"]
        hidden = np.tanh(dense) if pooler == "tanh" else np.maximum(dense, 0)
    wanted = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(apply(config, params, batch), wanted, rtol=1e-5, atol=1e-5)


def test_a_head_for_each_token():
    config = encoder(head="each", labels=LABELS)
    params, batch = toy_params(config), source_of([5, 3])
    hidden = np.asarray(apply(config, params, batch.source, method="encode"))
    wanted = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(apply(config, params, batch), wanted, rtol=1e-5, atol=1e-5)


def test_no_head_gives_hidden_states():
    config = encoder(head="none", pooler="tanh")
    params, batch = toy_params(config), source_of([4])
    assert "pooler" in params and "head" not in params
    hidden = apply(config, params, batch.source, method="encode")
    np.testing.assert_array_equal(apply(config, params, batch), hidden)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("norm", [True, False])
def test_embeddings_are_of_real_tokens_alone(pooling, norm):
    config = encoder(head="none", pooling=pooling, pooling_norm=norm)
    params, source = toy_params(config), source_of([5, 2]).source
    hidden = np.asarray(apply(config, params, source, method="encode"))
    wanted = np.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    if pooling == "first":
        wanted = hidden[:, 0]
    if norm:
        wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True)
    got = apply(config, params, source, method="embedding")
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_an_empty_row_has_a_finite_embedding():
    config = encoder(head="none")
    nothing = as_tokens(*np.zeros((3, 1, 4)))
    assert np.isfinite(apply(config, toy_params(config), nothing, method="embedding")).all()


@pytest.mark.slow
def test_each_side_has_its_own_table():
    config = toy("encoder-decoder", source_vocab_size=16)
    params, batch = toy_params(config), toy_batch(config)
    assert params["source_embed"]["embedding"].shape == (16, config.d_model)
    shared = dataclasses.replace(config, source_vocab_size=0)
    same = {**params, "source_embed": params["embed"]}
    plain = {name: leaf for name, leaf in params.items() if name != "source_embed"}
    np.testing.assert_array_equal(apply(config, same, batch), apply(shared, plain, batch))
    assert not np.array_equal(apply(config, params, batch), apply(config, same, batch))


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_never_likely(tied):
    config = toy(vocab_size=16, tie_embeddings=tied, head_bias=True)
    padded = dataclasses.replace(config, vocab_size=20, vocab_padding=4)
    params = toy_params(config)

    def pad(path, leaf):
        axis = {"embedding": 0, "head_bias": 0, "kernel": 1, "bias": 0}[path[-1].key]
        widths = [(0, 4 if i == axis else 0) for i in range(leaf.ndim)]
        return jnp.pad(leaf, widths, constant_values=50.0)

    outer = {name: params[name] for name in ("embed", "head", "head_bias") if name in params}
    more = {**params, **jax.tree_util.tree_map_with_path(pad, outer)}
    batch = toy_batch(config)
    got = apply(padded, more, batch)
    plain = apply(config, params, batch)
    np.testing.assert_allclose(got[..., :16], plain, rtol=1e-5, atol=1e-6)
    assert np.isneginf(got[..., 16:]).all()


def test_both_norms_are_the_papers():
    """Gemma 2: x + norm(sublayer(norm(x)))."""
    config = toy("encoder-only", norm="rms", norm_position="both", final_norm=False, head="none",
                 position="none")  # fmt: skip
    params = random_params(config, 0)
    names = set(params["encoder"]["layers"])
    assert {"attention_norm", "attention_norm_after", "mlp_norm", "mlp_norm_after"} <= names
    # With a scale of 0 after each sublayer, nothing is added to the embeddings.
    layers = dict(params["encoder"]["layers"])
    for name in ("attention_norm_after", "mlp_norm_after"):
        layers[name] = jax.tree.map(jnp.zeros_like, layers[name])
    silent = {**params, "encoder": {**params["encoder"], "layers": layers}}
    batch = source_of([4])
    table = params["embed"]["embedding"]
    np.testing.assert_array_equal(apply(config, silent, batch), table[batch.source.ids])
    assert not np.array_equal(apply(config, params, batch), table[batch.source.ids])


def test_a_unit_offset_is_added_to_the_scale():
    config = toy("encoder-only", norm="rms", norm_unit_offset=True, head="none")
    plain = dataclasses.replace(config, norm_unit_offset=False)
    params = random_params(plain, 0)

    def less(path, leaf):
        return leaf - 1 if path[-1].key == "scale" else leaf

    offset, batch = jax.tree_util.tree_map_with_path(less, params), source_of([4, 2])
    np.testing.assert_allclose(
        apply(config, offset, batch), apply(plain, params, batch), rtol=1e-5, atol=1e-5
    )
