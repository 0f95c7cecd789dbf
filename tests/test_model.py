"""What a Model does with texts besides generating: against one text at a time, and by hand."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import foreign
import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import toy_params

from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.data.tokenizer import (
    ByteTokenizer,
    SymbolTokenizer,
    Tokenizer,
    train_sentencepiece,
)
from jaxformer.errors import ConfigError, DataError
from jaxformer.model import Model
from jaxformer.nn.transformer import apply
from jaxformer.types import Batch, Tokens


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


TEXTS = ["ab", "", "bead cab", "dd", "abc " * 9]
LONGEST = foreign.SIZE["max_length"]


def read_alone(model: Model, ids: list[int], method: str) -> np.ndarray:
    """What a method of the Transformer makes of one text that nothing is padded in."""
    row = np.array([ids], np.int32)
    tokens = Tokens(row, np.arange(len(ids), dtype=np.int32)[None], np.ones_like(row))
    batch = Batch(tokens, None, np.zeros_like(row), np.zeros(row.shape, np.float32))
    given = batch if method == "__call__" else tokens
    config = dataclasses.replace(model.config, pooling="mean", pooling_norm=True)  # not in these
    return np.asarray(applied(config, model.params, given, method=method)[0], np.float64)


applied = jax.jit(apply, static_argnums=0, static_argnames="method")


def cut(model: Model, text: str) -> list[int]:
    """What is read of a text: its ids, but of one that is too long only the first and the end."""
    ids = model.tokenizer.source(text)
    return ids if len(ids) <= LONGEST else [*ids[: LONGEST - 1], ids[-1]]


def test_there_is_a_text_to_cut():
    lengths = [len(foreign.tokenizer("bert").source(text)) for text in TEXTS]
    assert lengths == [4, 2, 9, 4, 29] and LONGEST == 24


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_embeddings_are_of_each_text_alone(pooling: str, normalised: bool):
    model = foreign.model("bare", pooling=pooling, pooling_norm=normalised)
    found = model.embed(TEXTS)
    assert found.shape == (len(TEXTS), model.config.d_model) and found.dtype == np.float32
    for row, text in zip(found, TEXTS, strict=True):
        hidden = read_alone(model, cut(model, text), "encode")
        wanted = hidden.mean(0) if pooling == "mean" else hidden[0]
        if normalised:
            wanted = wanted / np.linalg.norm(wanted)
        np.testing.assert_allclose(row, wanted, atol=1e-5)
    assert len(np.unique(found.round(5), axis=0)) == len(TEXTS)  # they do differ


@pytest.mark.slow
@settings(max_examples=4)
@given(order=st.permutations(range(len(TEXTS))), batch_size=st.sampled_from([1, 64]))
def test_neither_batch_nor_order_matters(order: list[int], batch_size: int):
    for kind in ("bare", "classes", "tagger"):
        model = foreign.model(kind)
        again = dataclasses.replace(model, defaults=DecodeConfig(batch_size=batch_size))
        shuffled = [TEXTS[i] for i in order]
        if kind == "bare":
            pairs = zip(model.embed(TEXTS)[order], again.embed(shuffled), strict=True)
            assert all(np.allclose(a, b, atol=1e-5) for a, b in pairs)
        elif kind == "classes":
            whole, rows = model.classify(TEXTS), again.classify(shuffled)
            for i, row in zip(order, rows, strict=True):
                assert row == pytest.approx(whole[i], abs=1e-5)
        else:
            whole, rows = model.tag(TEXTS), again.tag(shuffled)
            for i, row in zip(order, rows, strict=True):
                assert [t.text for t in row] == [t.text for t in whole[i]]
                probabilities = [t.probability for t in row]
                assert probabilities == pytest.approx([t.probability for t in whole[i]], abs=1e-5)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_classes_are_of_each_text_alone():
    model = foreign.model("classes")
    results = model.classify(TEXTS)
    for text, found in zip(TEXTS, results, strict=True):
        wanted = softmax(read_alone(model, cut(model, text), "__call__"))
        labels = model.config.labels
        assert found == pytest.approx(dict(zip(labels, wanted, strict=True)), abs=1e-5)
        assert list(found) == [labels[i] for i in np.argsort(-wanted)]
        assert sum(found.values()) == pytest.approx(1)


def test_tags_are_of_each_token():
    model = foreign.model("tagger")
    results = model.tag(TEXTS)
    assert [tag.text for tag in results[2]] == ["b", "##e", "##a", "##d", "c", "##a", "##b"]
    assert results[1] == []
    for text, tags in zip(TEXTS, results, strict=True):
        wanted = softmax(read_alone(model, cut(model, text), "__call__"))[1:-1]  # [CLS], [SEP]
        assert [model.config.labels[i] for i in wanted.argmax(-1)] == [t.label for t in tags]
        assert [t.probability for t in tags] == pytest.approx(wanted.max(-1), abs=1e-5)


def biased(model: Model, ids: dict[int, float]) -> Model:
    """The same model, which likes these ids so much more."""
    bias = np.array(model.params["head_bias"])
    for i, more in ids.items():
        bias[i] += more
    return dataclasses.replace(model, params=model.params | {"head_bias": bias})


def test_masks_are_filled_with_the_likeliest_text():
    model = foreign.model("bert")
    c, d, more_a = (model.tokenizer.encode(x)[-1] for x in ("c", "d", "ba"))
    texts = ["a [MASK] b", "[MASK]", "ab [MASK] [MASK] e"]
    sure = biased(model, {c: 50, model.tokenizer.eos_id: 99, model.tokenizer.pad_id: 99, d: 40})
    assert sure.fill(texts) == ["a c b", "c", "ab c c e"]  # no special token, likely as it is
    assert biased(model, {more_a: 50}).fill(["b [MASK]"]) == ["ba"]
    # By their context, too.
    lively = foreign.model("bert")
    for text, filled in zip(texts, lively.fill(texts), strict=True):
        ids = np.array(lively.tokenizer.source(text))
        logits = read_alone(lively, ids.tolist(), "__call__")
        logits[:, sorted(lively.tokenizer.special_ids)] = -np.inf
        best = np.where(ids == lively.tokenizer.mask_id, logits.argmax(-1), ids)
        assert filled == lively.tokenizer.decode(best)


def test_ids_beyond_the_tokenizer_fill_nothing():
    model = foreign.model("bert")
    size = model.config.vocab_size
    wide = dataclasses.replace(model.config, vocab_size=size + 3)
    model = dataclasses.replace(model, config=wide, params=toy_params(wide))
    (c,) = model.tokenizer.encode("c")
    assert biased(model, {size: 99, size + 2: 99, c: 50}).fill(["a [MASK] b"]) == ["a c b"]


WORDS = ["the", "cat", "sat", "on", "mat"]


def native(pieces: Tokenizer) -> Model:
    """An encoder of our own make, with a tokenizer of ours."""
    config = ModelConfig(vocab_size=pieces.vocab_size, n_encoder_layers=1, head_bias=True,
                         **foreign.SIZE)  # fmt: skip
    return Model(config, toy_params(config), pieces, DataConfig(task="mlm"))


@pytest.mark.parametrize(
    ("pieces", "text", "liked", "filled"),
    [
        (SymbolTokenizer(tuple(WORDS), " "), "the <mask> sat on", "cat", "the cat sat on"),
        (SymbolTokenizer(tuple("abcde "), ""), "a<mask>c <mask>", "b", "abc b"),
        (ByteTokenizer(), "a<mask>c", "b", "abc"),
        (
            train_sentencepiece(["the cat sat on the mat"] * 30, 300),
            "the <mask> sat on <mask>",
            "cat",
            "the cat sat on cat",
        ),
    ],
    ids=["words", "letters", "bytes", "pieces"],
)
def test_tokenizers_of_ours_have_masks(pieces: Tokenizer, text: str, liked: str, filled: str):
    (best,) = pieces.encode(liked)
    model = biased(native(pieces), {best: 99})
    assert model.fill([text]) == [filled]
    # What is read is what was learnt: the text with one of its tokens hidden.
    ids, masked = pieces.source(filled), pieces.masked(text)
    assert masked == [pieces.mask_id if i == best else i for i in ids]
    with pytest.raises(ConfigError, match="text 1 has no mask"):
        model.fill([text, filled])


def test_a_text_too_long_is_not_filled():
    model = foreign.model("bert")
    assert model.fill(["[MASK]" + "a" * (LONGEST - 3)])
    with pytest.raises(ConfigError, match=f"text 1 has {LONGEST + 1} tokens, over the model's"):
        model.fill(["[MASK]", "[MASK]" + "a" * (LONGEST - 2)])
    with pytest.raises(ConfigError, match="text 0 has no mask"):
        model.fill(["a" * 99])


def test_no_texts():
    assert foreign.model("bare").embed([]).shape == (0, foreign.SIZE["d_model"])
    assert foreign.model("classes").classify([]) == foreign.model("tagger").tag([]) == []
    assert foreign.model("bert").fill([]) == foreign.model("llama").chat([]) == []


USES: dict[str, Callable[[Model], Any]] = {
    "embed": lambda model: model.embed(["a"]),
    "classify": lambda model: model.classify(["a"]),
    "tag": lambda model: model.tag(["a"]),
    "fill": lambda model: model.fill(["a [MASK]"]),
}
ALLOWED = {"bert": {"embed", "fill"}, "bare": {"embed"}, "classes": {"embed", "classify"},
           "tagger": {"embed", "tag"}, "t5": set(), "llama": set()}  # fmt: skip


@pytest.mark.parametrize("kind", ALLOWED)
def test_other_models_are_refused(kind: str):
    model = foreign.model(kind)
    for use, call in USES.items():
        if use in ALLOWED[kind]:
            call(model)
            continue
        wrong = (
            "needs a model with head" if model.config.n_decoder_layers == 0 else "is for encoder"
        )
        with pytest.raises(ConfigError, match=f"{use} {wrong}"):
            call(model)
    if model.config.kind == "encoder-only":
        with pytest.raises(ConfigError, match="encoder-only model generates no text; use embed"):
            model.generate(["a"])


@pytest.mark.slow
def test_float16_and_bfloat16_embed_in_float32():
    full = foreign.model("bare").embed(TEXTS[:2])
    for dtype in ("bfloat16", "float16"):
        model = foreign.model("bare", param_dtype=dtype, compute_dtype=dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {dtype}
        short = model.embed(TEXTS[:2])
        assert short.dtype == np.float32
        np.testing.assert_allclose(short, full, atol=0.1)
        assert not np.array_equal(short, full)


# Chat.


def talk(*said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


def talkative() -> Model:
    """A Llama that does not stop at once."""
    model = foreign.model("llama")
    params = jax.tree.map(np.array, model.params)
    params["head"]["kernel"][:, sorted(model.tokenizer.special_ids)] = 0
    return dataclasses.replace(model, params=params)


def test_a_chat_is_its_template_continued():
    model = talkative()
    talks = [talk("abc"), talk("ab", "ba", "e e"), talk("")]
    assert model.tokenizer.chat(talks[1]) == model.tokenizer.encode(
        "<|user|>ab<|end|><|assistant|>ba<|end|><|user|>e e<|end|><|assistant|>"
    )
    found = model.chat(talks, DecodeConfig(max_length=5))
    written = ["".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in each) for each in talks]
    assert found == model.generate(
        [text + "<|assistant|>" for text in written], DecodeConfig(max_length=5)
    )
    assert all(found) and len(set(found)) > 1
    assert [len(text) for text in model.chat(talks)] == [model.defaults.max_length] * 3


def test_a_chat_too_long_fails_alone():
    with pytest.warns(UserWarning, match="chat 1: the text has 33 tokens") as caught:
        found = talkative().chat([talk("a"), talk("a" * 30)])
    assert found[0] and not found[1] and caught[0].filename == __file__


def test_a_model_without_template_chats_not():
    for kind in ("t5", "bert"):
        with pytest.raises(DataError, match="has no chat template"):
            foreign.model(kind).chat([talk("a")])


def test_prompts_may_be_ids():
    model = talkative()
    prompts = list(map(model.tokenizer.prompt, ["abc", "de"]))
    decode = DecodeConfig(samples=2, n_best=2, max_length=5)
    found = model.complete(prompts, decode, first_row=3)
    assert found == model.hypotheses(["abc", "de"], decode, first_row=3)
    assert found != model.complete(prompts, decode)
