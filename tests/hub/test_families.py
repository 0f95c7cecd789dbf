"""Every family's table, both ways, without the library it comes from."""

import dataclasses
import json
import tracemalloc
from functools import cache
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import ModelConfig
from jaxformer.errors import CheckpointError
from jaxformer.hub import engine, folder
from jaxformer.hub.families import FAMILIES
from jaxformer.hub.family import Family, read_config, resolved, write_config
from jaxformer.hub.tensors import Stored, in_memory, write_safetensors
from jaxformer.loading import abstract_params, load_weights, shapes

SMALL = dict(vocab_size=31, d_model=12, d_ff=14, n_encoder_layers=2, n_decoder_layers=2, n_heads=3,
             head_dim=4, max_length=16)  # fmt: skip
EVERY = [(family, kind) for family in FAMILIES.values() for kind in family.architectures]
every = pytest.mark.parametrize(("family", "kind"), EVERY, ids=[kind for _, kind in EVERY])


def small(family: Family, kind: str) -> dict[str, Any]:
    """A small config of theirs."""
    sizes = {f.theirs: SMALL[f.ours] for f in family.fields if f.ours in SMALL}
    return {"model_type": family.model_type, "architectures": [kind], "vocab_size": 31, **sizes}


@cache
def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter."""
    return shapes(abstract_params(config, None))


def random_leaves(config: ModelConfig, seed: int = 0) -> dict[str, Stored]:
    rng = np.random.default_rng(seed)
    return {
        path: in_memory(rng.normal(size=shape).astype(np.float32))
        for path, shape in shapes_of(config).items()
    }


def whole(leaf: engine.Leaf) -> np.ndarray:
    return leaf.read((slice(None),) * len(leaf.shape), np.dtype(np.float32))


@pytest.mark.slow
@every
def test_export_and_import_are_each_others_inverse(family, kind, tmp_path):
    theirs = small(family, kind)
    config = read_config(family, theirs, "config.json")
    assert resolved(read_config(family, write_config(family, config), "")) == resolved(config)
    leaves = random_leaves(config)
    for prefixed in (True, False):
        path = tmp_path / str(prefixed)
        tensors = engine.export(family, config, leaves, prefixed=prefixed)
        write_safetensors(path, tensors)
        (path / "config.json").write_text(json.dumps(theirs))
        read, params = load_weights(path)
        assert resolved(read) == resolved(config)
        found = flatten_dict(params, sep="/")
        assert found.keys() == leaves.keys()
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(found[name], leaf.read(), err_msg=name)


@every
def test_padding_of_the_vocabulary_is_undone(family, kind):
    config = read_config(family, small(family, kind), "config.json")
    padded = dataclasses.replace(config, vocab_size=config.vocab_size + 5, vocab_padding=5)
    leaves = random_leaves(config)
    tensors = engine.export(family, config, leaves, prefixed=True)
    wanted = shapes_of(padded)
    bound = engine.bind(family, padded, wanted, tensors, "here")
    more = {path: whole(leaf) for path, leaf in bound.items()}
    table = more["embed/embedding"]
    assert table.shape[0] == config.vocab_size + 5 and not table[-5:].any()
    again = engine.export(family, padded, {p: in_memory(x) for p, x in more.items()}, prefixed=True)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name].read(), tensor.read(), err_msg=name)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=40)
def test_any_part_of_a_leaf_can_be_read(data):
    family = data.draw(st.sampled_from(list(FAMILIES.values())), label="family")
    config = read_config(family, small(family, next(iter(family.architectures))), "")
    leaves = random_leaves(config)
    tensors = engine.export(family, config, leaves, prefixed=True)
    wanted = {path: leaf.shape for path, leaf in leaves.items()}
    bound = engine.bind(family, config, wanted, tensors, "here")
    name = data.draw(st.sampled_from(sorted(bound)))
    index = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
        for n in wanted[name]
    )
    part = bound[name].read(index, np.dtype(np.float32))
    np.testing.assert_array_equal(part, leaves[name].read()[index])


@every
def test_all_that_does_not_fit_is_listed_at_once(family, kind):
    config = read_config(family, small(family, kind), "config.json")
    tensors = engine.export(family, config, random_leaves(config), prefixed=True)
    one, other, *_ = sorted(tensors.keys() - {"final_logits_bias"})  # which may be missing
    shape = tensors[other].shape
    broken = {name: tensor for name, tensor in tensors.items() if name != one}
    broken[other] = in_memory(np.zeros((*shape, 2), np.float32))
    broken[f"{family.prefix}surprise"] = in_memory(np.zeros(3, np.float32))
    with pytest.raises(CheckpointError) as caught:
        engine.bind(family, config, shapes_of(config), broken, "the folder")
    message = str(caught.value)
    assert f"missing:\n    {one}" in message
    assert "surprise [3]" in message
    assert f"{other}: {[*shape, 2]} there, {list(shape)} wanted" in message


JUNK = st.sampled_from([None, -1, 0, 3, 0.5, 1e300, float("nan"), 10**30, 2**40, True, "x", "gelu",
                        [], [1], ["x"] * 3, {}, {"rope_type": "yarn"}, {"0": 1}])  # fmt: skip


@given(st.sampled_from(EVERY), st.data())
@settings(max_examples=400)
def test_no_config_is_believed(choice, data):
    family, kind = choice
    theirs = small(family, kind)
    extra = ["rope_scaling", "rope_parameters", "layer_types", "sliding_window", "id2label",
             "tie_word_embeddings", "head_dim", "num_key_value_heads", "feed_forward_proj",
             "pad_token_id", "query_pre_attn_scalar", "scale_embedding", "num_decoder_layers",
             "use_sliding_window", "architectures"]  # fmt: skip
    keys = st.sampled_from([*theirs, *extra, *(field.theirs for field in family.fields)])
    theirs |= data.draw(st.dictionaries(keys, JUNK, min_size=1, max_size=3))
    try:
        found = folder.find_family(theirs, "config.json")
        config = read_config(found, theirs, "config.json")
    except CheckpointError as e:
        assert "config.json" in str(e)
        return
    assert max(config.d_model, config.d_ff, config.vocab_size, config.max_length) <= 2**26


@pytest.mark.parametrize("kind", ["Gemma2ForCausalLM", "Gemma3ForCausalLM", "Qwen2ForCausalLM",
                                  "BertForSequenceClassification"])  # fmt: skip
def test_sizes_are_checked_before_anything_is_made_of_them(kind):
    (family,) = (family for family, name in EVERY if name == kind)
    huge = {"num_hidden_layers": 10**12, "use_sliding_window": True}
    if kind.startswith("Bert"):
        huge = {"num_labels": 10**12}
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="it must lie between 0 and"):
        read_config(family, small(family, kind) | huge, "config.json")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("key", "value"), [("num_beams", 10**24), ("length_penalty", 10**400)])
def test_sizes_of_generation_are_bounded(key, value):
    family = FAMILIES["bart"]
    config = read_config(family, small(family, "BartForConditionalGeneration"), "")
    with pytest.raises(CheckpointError, match="generation_config.json"):
        folder.decode_config(config, {}, {key: value}, "generation_config.json")


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(
    ["max_new_tokens", "max_length", "min_length", "num_beams", "length_penalty", "do_sample",
     "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
     "bad_words_ids", "temperature", "top_k", "top_p", "sequence_bias", "early_stopping",
     "repetition_penalty", "no_repeat_ngram_size", "exponential_decay_length_penalty"]), JUNK,
    max_size=4))  # fmt: skip
@settings(max_examples=300)
def test_no_generation_config_is_believed(generation):
    family = FAMILIES["bart"]
    config = read_config(family, small(family, "BartForConditionalGeneration"), "")
    try:
        decode = folder.decode_config(config, {}, generation, "generation_config.json")
    except CheckpointError as e:
        assert "generation_config.json" in str(e)
    else:
        assert decode.beams >= 1 and decode.max_length >= 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"model_type": None}, "model type None"),
        ({"architectures": ["LlamaForEverything"]}, "'LlamaForEverything' is not known"),
        ({"num_hidden_layers": "many"}, "n_decoder_layers must be of type int"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not known"),
        ({"hidden_act": "xielu"}, "activation is 'xielu'"),
    ],
)
def test_what_is_wrong_is_named(change, said):
    theirs = small(FAMILIES["llama"], "LlamaForCausalLM") | change
    with pytest.raises(CheckpointError, match=said):
        read_config(folder.find_family(theirs, "config.json"), theirs, "config.json")


def test_a_setting_that_must_be_there_is_named():
    theirs = small(FAMILIES["gpt2"], "GPT2LMHeadModel")
    del theirs["n_embd"]
    with pytest.raises(CheckpointError, match="has no n_embd"):
        read_config(FAMILIES["gpt2"], theirs, "config.json")
    theirs = small(FAMILIES["gpt2"], "GPT2LMHeadModel") | {"scale_attn_by_inverse_layer_idx": True}
    with pytest.raises(CheckpointError, match="scale_attn_by_inverse_layer_idx is True"):
        read_config(FAMILIES["gpt2"], theirs, "config.json")
