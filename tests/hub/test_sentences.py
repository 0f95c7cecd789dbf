"""What the files of sentence-transformers say of pooling, in its older and newer spelling."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from jaxformer.config import DataConfig, ModelConfig
from jaxformer.data.tokenizer import ByteTokenizer
from jaxformer.errors import CheckpointError
from jaxformer.hub.folder import sentence_config
from jaxformer.model import Model
from jaxformer.nn.transformer import init

BARE = ModelConfig(n_encoder_layers=1, max_length=512)
MODULES = ("a.models.Transformer", ""), ("a.Pooling", "1_Pooling"), ("b.c.Normalize", "2_Normalize")
OLD = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
LENGTH = {"max_seq_length": 256, "do_lower_case": False}


def read(
    folder: Path,
    pooling: dict[str, Any] = OLD,
    modules: tuple[tuple[str, str], ...] = MODULES,
    **files: dict[str, Any],
) -> tuple[str, bool, int]:
    for name, content in {
        "modules": [{"type": kind, "path": path} for kind, path in modules],
        "1_Pooling/config": pooling,
        **files,
    }.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    config = sentence_config(folder, BARE)
    return config.pooling, config.pooling_norm, config.pooling_length


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        (OLD, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode": "cls"}, "first"),
    ],
)
def test_pooling(tmp_path, pooling, kind):
    assert read(tmp_path, pooling) == (kind, True, 0)
    assert read(tmp_path, pooling, MODULES[:2]) == (kind, False, 0)


def test_length_is_their_own_then_the_tokenizers(tmp_path):
    assert read(tmp_path, tokenizer_config={"model_max_length": 384}) == ("mean", True, 384)
    assert read(tmp_path, sentence_bert_config={"max_seq_length": None})[2] == 384
    assert read(tmp_path, sentence_bert_config=LENGTH)[2] == 256
    assert read(tmp_path, sentence_bert_config={"max_seq_length": 1000})[2] == 512
    no_end = {"model_max_length": 1e30}
    assert read(tmp_path, sentence_bert_config={}, tokenizer_config=no_end)[2] == 512


def test_longer_texts_are_cut_before_their_end():
    config = ModelConfig(n_encoder_layers=1, d_model=8, d_ff=8, n_heads=2, max_length=16,
                         vocab_size=260, head="none", pooling_length=5)  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(lambda: init(config, jax.random.key(0))))
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    model = Model(config, params, ByteTokenizer(), DataConfig())
    found = model.embed(["abcdefghij", "abcd", "abcde", "abc"])
    np.testing.assert_allclose(found[:3], found[[1, 1, 1]], atol=1e-6)
    assert np.abs(found[3] - found[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pooling": {"pooling_mode_max_tokens": True}}, "pools by pooling_mode_max_tokens"),
        ({"pooling": OLD | {"pooling_mode_cls_token": True}}, "one of them"),
        ({"pooling": {"pooling_mode": ["mean", "cls"]}}, "pools by"),
        ({"pooling": {}}, "pools by nothing"),
        ({"modules": (*MODULES, ("a.Dense", "3_Dense"))}, "asks for .*Dense"),
        ({"modules": (MODULES[0], ("a.Pooling", "../1_Pooling"))}, "no plain folder name"),
        ({"sentence_bert_config": {"max_seq_length": "256"}}, "max_seq_length is '256'"),
        ({"sentence_bert_config": {"max_seq_length": float("nan")}}, "max_seq_length is nan"),
        ({"sentence_bert_config": {"max_seq_length": True}}, "max_seq_length is True"),
        ({"sentence_bert_config": LENGTH | {"do_lower_case": True}}, "do_lower_case"),
        ({"tokenizer_config": {"model_max_length": 0}}, "model_max_length is 0"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, **change)
