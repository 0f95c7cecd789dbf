"""A whole layer, with what comes before and after it, written out again in plain numpy."""

import jax
import numpy as np
import pytest
from random_configs import VOCAB, batch_for, logits, random_params, random_tokens

from jaxformer.config import ModelConfig

COMMON = dict(
    vocab_size=VOCAB, n_decoder_layers=1, d_model=6, d_ff=10, n_heads=4, n_kv_heads=2, head_dim=4
)


def rms(x, p):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def layer(x, p):
    wide = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return wide * p["scale"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def turn(x, theta):
    """Rotate "T N H" by positions 0, 1, 2...; halves of H are real and imaginary parts."""
    half = x.shape[-1] // 2
    rate = theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None, None] * rate)
    return np.concatenate([z.real, z.imag], -1)


def attention(query, key, value, cap=0.0):
    """Causal, with two query heads to each key head."""
    out = np.zeros_like(query)
    for t, n in np.ndindex(query.shape[:2]):
        scores = key[: t + 1, n // 2] @ query[t, n]
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.exp(scores - scores.max())
        out[t, n] = weights / weights.sum() @ value[: t + 1, n // 2]
    return out


def project(x, p):
    """Contract all axes of "T ..." but the first."""
    return np.tensordot(x, p["kernel"], x.ndim - 1) + p.get("bias", 0)


def llama_like(ids, p):
    """Pre-norm, RMSNorm, rotary, queries and keys normalised first, gated."""
    block = p["decoder"]["layers"]
    x = p["embed"]["embedding"][ids]
    h = rms(x, block["attention_norm"])
    q, k, v = (project(h, block["attention"][n]) for n in ("query", "key", "value"))
    q = turn(rms(q, block["attention"]["query_norm"]), 50.0) / 2
    k = turn(rms(k, block["attention"]["key_norm"]), 50.0)
    x = x + project(attention(q, k, v, cap=3.0), block["attention"]["out"])
    h = rms(x, block["mlp_norm"])
    gate, up = (project(h, block["mlp"][n]) for n in ("gate", "up"))
    x = x + project(silu(gate) * up, block["mlp"]["down"])
    out = rms(x, p["decoder"]["final_norm"]) @ p["head"]["kernel"]
    return 2.0 * np.tanh(out / 2.0)


def bert_like(ids, p):
    """Post-norm, LayerNorm, learned positions, biases, a transform and a scale before the head."""
    block = p["decoder"]["layers"]
    x = 1.5 * p["embed"]["embedding"][ids] + p["decoder"]["positions"]["embedding"][: len(ids)]
    x = x + p["decoder"]["token_types"]["embedding"][0]
    x = layer(x, p["decoder"]["embed_norm"])
    q, k, v = (project(x, block["attention"][n]) for n in ("query", "key", "value"))
    y = project(attention(q / 2, k, v), block["attention"]["out"])
    x = layer(x + y, block["attention_norm"])
    y = project(np.maximum(project(x, block["mlp"]["up"]), 0), block["mlp"]["down"])
    x = layer(x + y, block["mlp_norm"])
    x = np.maximum(project(x, p["transform"]), 0)
    x = layer(x, p["transform_norm"])
    return 0.7 * x @ p["embed"]["embedding"].T + p["head_bias"]


LLAMA_LIKE = ModelConfig(
    **COMMON,
    norm="rms",
    position="rotary",
    rope_theta=(50.0,),
    qk_norm=True,
    gated=True,
    activation="silu",
    attention_softcap=3.0,
    logit_softcap=2.0,
    tie_embeddings=False,
)
BERT_LIKE = ModelConfig(
    **COMMON,
    norm_position="post",
    final_norm=False,
    embed_norm=True,
    position="learned",
    n_token_types=2,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    activation="relu",
    head_transform=True,
    head_bias=True,
    embed_scale=1.5,
    logit_scale=0.7,
)


@pytest.mark.parametrize(
    ("config", "formula"), [(LLAMA_LIKE, llama_like), (BERT_LIKE, bert_like)], ids=["pre", "post"]
)
def test_a_model_is_its_formula(config, formula):
    tokens = random_tokens(np.random.default_rng(0), 2, 6)
    params = random_params(config, 0)
    out = logits(config, params, batch_for(config, tokens, tokens))
    one = jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(x[0] if "layers" in jax.tree_util.keystr(path) else x, float),
        params,
    )
    for row in range(2):
        wanted = formula(np.asarray(tokens.ids[row]), one)
        np.testing.assert_allclose(out[row], wanted, rtol=1e-4, atol=1e-4)
