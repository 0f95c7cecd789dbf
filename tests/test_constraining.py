"""Constraints end to end: whatever the strategy and tokenizer, the texts are as they were asked."""

import dataclasses
import json
import re
from functools import cache
from typing import Any

import jax
import pytest
import tiny
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.constraining import Constraints, alternatives, compile_table, constraints, read_files
from jaxformer.data.foreign import from_files
from jaxformer.data.tokenizer import ByteTokenizer, SymbolTokenizer, Tokenizer, train_sentencepiece
from jaxformer.errors import ConfigError, DataError
from jaxformer.generate import _decode
from jaxformer.model import Hypothesis, Model
from jaxformer.nn import transformer

LONGEST = 32
CORPUS = ["abc cab bead", 'a 12, b: 305 [7] {"a": true}', "été é日本 ab"]
KINDS = ("byte", "character", "sentencepiece", "byte-level")


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation():
    with tiny.shared_compilation():
        yield


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "byte":
        return ByteTokenizer()
    if kind == "character":
        return SymbolTokenizer(tuple(sorted(set("".join(CORPUS)))), "")
    if kind == "sentencepiece":
        return train_sentencepiece(CORPUS * 9, 300)
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # pyright: ignore
    backend.train_from_iterator(CORPUS * 9, trainer)
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}',
    }
    return from_files(files, {"model_type": "gpt2"}, {})


@cache
def model(kind: str) -> Model:
    """A model that writes at random, and seldom ends by itself."""
    made = tokenizer(kind)
    config = ModelConfig(
        vocab_size=made.vocab_size + 3,  # a few ids are no token's
        n_decoder_layers=1,
        d_model=8,
        d_ff=8,
        n_heads=2,
        max_length=LONGEST,
        embed_init_std=1.0,
        tie_embeddings=False,
        initializer="normal",
        init_std=1.0,
        scan_layers=False,
    )
    params: Any = jax.jit(lambda: nn.unbox(transformer.init(config, jax.random.key(0))))()
    return Model(config, params, made, DataConfig(task="lm"), DecodeConfig())


WAYS = {
    "greedy": DecodeConfig(),
    "beam": DecodeConfig(beams=4, n_best=4),
    "sample": DecodeConfig(samples=3, n_best=3, temperature=1.5, top_k=20),
}
QUICK = [("byte-level", "greedy")]
pairs = pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=() if (kind, way) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for way in WAYS
    ],
)


def generated(kind: str, way: str, **wanted: Any) -> list[Hypothesis]:
    """What is generated from two prompts, without the beams that found nothing."""
    options = dataclasses.replace(WAYS[way], **wanted)
    results = model(kind).hypotheses(["a", "é"], options)
    assert all(r.hypotheses[0].finish != "dead_end" for r in results)
    found = [h for r in results for h in r.hypotheses if h.finish != "dead_end"]
    assert all(h.score == h.score and abs(h.score) < 1e6 for h in found)
    return found


PATTERNS = [
    "[ab]*c", "(?:ab|cé|日本)+", r"\d{1,3}(?:\.\d)?", "", " a b ", "(?i)BEAD|cab", "[^a]{2,4}",
    ".{3}é", "(?:été ?)+",
]  # fmt: skip


@pairs
@pytest.mark.slow
def test_any_text_matches_the_pattern_thoroughly(kind, way):
    inner = st.sampled_from(["a", "b", "é", "[ab1]", "日", "c?", "(?:ab|a|é2)", "[0-9]{1,2}"])
    random_pattern = st.lists(inner, max_size=4).map("".join)

    @given(random_pattern, st.sampled_from(["", "(?:{})+", "(?:{})|b", "(?:{}){{2}}"]))
    @settings(max_examples=25, deadline=None)
    def check(pattern, around):
        pattern = around.format(pattern) if around else pattern
        if kind == "character" and "2" in pattern:
            return
        for h in generated(kind, way, regex=pattern or "a"):
            assert re.fullmatch(pattern or "a", h.text), (pattern, h)

    check()


@pairs
def test_any_text_matches_the_pattern(kind, way):
    for pattern in PATTERNS[: 4 if way == "sample" else None]:
        if pattern == " a b " and kind == "sentencepiece" or not pattern:
            continue
        for h in generated(kind, way, regex=pattern):
            assert re.fullmatch(pattern, h.text), (pattern, h)


@pairs
def test_phrases_are_included_and_prefixes_begin(kind, way):
    for h in generated(kind, way, include=("bead|ad", "é", "ab"), prefix="ca"):
        assert h.text.startswith("ca") and "ad" in h.text and "é" in h.text and "ab" in h.text
    for h in generated(kind, way, include=("12",), regex="[a-c 0-9]{4,9}"):
        assert "12" in h.text and re.fullmatch("[a-c 0-9]{4,9}", h.text)


@pytest.mark.slow
def test_beams_write_a_phrase_before_the_room_ends():
    best, *_, last = generated("byte-level", "beam", include=("bead",))
    for h in generated("byte-level", "beam", include=("bead", "ab|é"), groups=2, stop=("1",)):
        assert h.finish == "stop" or "bead" in h.text and ("ab" in h.text or "é" in h.text)
    alone = generated("byte-level", "greedy", include=("bead",))
    assert all(h.text.endswith("bead") for h in alone)  # where nothing else would do
    assert not best.text.endswith("bead") and not last.text.endswith("bead")


@pairs
def test_only_what_is_allowed(kind, way):
    allowed = ("ab", "a", "abc é", "日本", "cab bead")
    texts = [h.text for h in generated(kind, way, allowed=allowed)]
    assert set(texts) <= set(allowed)
    if way == "beam":  # each once
        assert len(set(texts[:4])) == 4
    assert {h.text for h in generated(kind, way, allowed=allowed, prefix="ab")} <= {"ab", "abc é"}


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"type": "array", "items": {"enum": [1, 2, "é"]},
                                                   "maxItems": 2}},
    "required": ["b"],
}  # fmt: skip


@pairs
def test_texts_are_json_of_the_schema(kind, way):
    for h in generated(kind, way, json_schema=json.dumps(SCHEMA)):
        found = json.loads(h.text)
        assert {"b"} <= found.keys() <= {"a", "b"} and found.get("a", True) in (True, False)
        assert len(found["b"]) <= 2 and set(found["b"]) <= {1, 2, "é"}


def test_constraints_are_scored_as_the_model_scores():
    """They only narrow the choice: the log-probability is the model's own."""
    lively = model("byte")
    [result] = lively.hypotheses(["a"], dataclasses.replace(WAYS["beam"], regex="[ab]{2,4}c"))
    ended = [h for h in result.hypotheses if h.finish == "eos"]
    scores = lively.score(["a"] * len(ended), [h.text for h in ended])
    assert ended and scores == pytest.approx([h.log_prob for h in ended], abs=1e-4)


@pytest.mark.slow
def test_without_room_it_ends_dead_and_finite():
    for way in WAYS.values():
        options = dataclasses.replace(way, regex="a{20}", max_length=5)
        for h in model("byte").hypotheses(["a"], options)[0].hypotheses:
            assert (h.finish, h.text) == ("dead_end", "") and h.score == h.score
    exactly = DecodeConfig(regex="a{20}", max_length=20)
    [h] = model("byte").hypotheses(["a"], exactly)[0].hypotheses
    assert (h.finish, h.text) == ("limit", "a" * 20)


@pytest.mark.slow
def test_forced_and_suppressed_ids_take_part():
    byte = tokenizer("byte")
    first, a = byte.mask_id, byte.encode("a")[0]
    options = DecodeConfig(forced_first=first, forced_last=byte.eos_id, regex="a+|b{3}")
    [h] = model("byte").hypotheses(["a"], options)[0].hypotheses
    assert h.ids[0] == first and h.ids[-1] == byte.eos_id and re.fullmatch("a+|b{3}", h.text)
    options = dataclasses.replace(options, suppress=(a,))
    assert model("byte").generate(["a"], options) == ["bbb"]
    options = dataclasses.replace(options, max_length=5)
    assert model("byte").generate(["a"], options) == ["bbb"]  # first, three, last
    no_room = dataclasses.replace(options, regex="b{4}")
    [h] = model("byte").hypotheses(["a"], no_room)[0].hypotheses
    assert (h.finish, h.ids) == ("dead_end", ())  # known before anything is written
    allowed = dataclasses.replace(options, regex="", allowed=("bbb", "a"))
    assert model("byte").generate(["a"], allowed) == ["bbb"]


def test_another_pattern_compiles_nothing():
    made = model("byte")
    function: Any = _decode
    made.generate(["a"], DecodeConfig(regex="[ab]+c"))
    before = function._cache_size()
    for options in (
        {"regex": r"\d+"}, {"prefix": "ab"}, {"include": ("a", "b|c")}, {"allowed": ("a", "é")},
        {"json_schema": '{"type": "boolean"}'},
    ):  # fmt: skip
        made.generate(["a"], DecodeConfig(**options))
    assert function._cache_size() == before
    made.generate(["a"], DecodeConfig())  # without any, another program
    assert function._cache_size() == before + 1


def test_tables_are_cached_and_bounded():
    byte = tokenizer("byte")
    wanted = Constraints((), "", (), "(?:a|b)+")
    table = compile_table(wanted, byte, byte.vocab_size)
    assert compile_table(wanted, byte, byte.vocab_size) is table
    assert table.following.shape == (64, 64)
    many = tuple(f"{i:05}" + chr(0x4E00 + i) * 30 for i in range(9000))
    letters = SymbolTokenizer(tuple(sorted(set("".join(many)))), "")
    with pytest.raises(ConfigError, match="the most; allow fewer or shorter"):
        compile_table(Constraints((), "", many, ""), letters, letters.vocab_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "z"}, "no text that this tokenizer can write"),
        ({"regex": "a", "include": ("b",)}, "no text that this tokenizer can write"),
        ({"allowed": ("a",), "prefix": "b"}, "no text that this tokenizer can write"),
        ({"regex": "("}, "regex"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": "{}", "regex": "a"}, "give one"),
        ({"include": ("a|",)}, "empty phrase"),
        ({"include": ("",)}, "empty phrase"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(ConfigError, match=message):
        model("character").generate(["a"], DecodeConfig(**options))


def test_files_and_bars(tmp_path):
    (tmp_path / "allowed.txt").write_bytes("a\r\né\n\n".encode())
    (tmp_path / "schema.json").write_text('{"const": 1}')
    (tmp_path / "empty").touch()
    none = DecodeConfig()
    options = DecodeConfig(allowed=("b", f"@{tmp_path}/allowed.txt"), include=(r"a\|b",),
                           json_schema=f"@{tmp_path}/schema.json")  # fmt: skip
    wanted = Constraints((r"a\|b",), "", ("b", "a", "é"), "(?:1)")
    assert constraints(read_files(options, none)) == wanted
    assert read_files(options, options) == options  # a model's own defaults read nothing
    assert constraints(none) is None
    assert alternatives(r"a\|b|c") == ["a|b", "c"]
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name, message in (("none", "cannot read"), ("latin", "not UTF-8"), ("empty", "no text")):
        with pytest.raises(DataError, match=message):
            read_files(DecodeConfig(allowed=(f"@{tmp_path}/{name}",)), none)
