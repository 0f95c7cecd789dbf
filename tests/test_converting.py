"""From run directories to those of other libraries and back, whole or not at all."""

import dataclasses
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign
import jax
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from toy_models import toy_params

import jaxformer
from jaxformer import converting, run
from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.converting import convert, export, save, their_generation
from jaxformer.data.tokenizer import ByteTokenizer, SymbolTokenizer, Tokenizer
from jaxformer.errors import CheckpointError, ConfigError, DataError
from jaxformer.hub import folder
from jaxformer.model import Model

pytestmark = pytest.mark.slow  # each trains or writes models, seconds at a time


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


LETTERS = SymbolTokenizer(tuple("abcde "), "")
GPT2 = ModelConfig(n_decoder_layers=2, position="learned", activation="gelu_tanh", qkv_bias=True,
                   out_bias=True, mlp_bias=True, norm_eps=1e-5, **foreign.SIZE)  # fmt: skip
replace = dataclasses.replace
NATIVE: dict[str, tuple[str, ModelConfig]] = {
    "llama": ("Llama", foreign.LLAMA),
    "llama, tied": ("Llama", replace(foreign.LLAMA, tie_embeddings=True, n_kv_heads=0)),
    "mistral": ("Mistral", replace(foreign.LLAMA, window=(5,))),
    "qwen2": ("Qwen2", replace(foreign.LLAMA, qkv_bias=True)),
    "qwen3": ("Qwen3", replace(foreign.LLAMA, qk_norm=True)),
    "gpt2": ("GPT-2", GPT2),
    "t5": ("T5", foreign.T5),
    "t5, gated": ("T5", replace(foreign.T5, gated=True, activation="gelu_tanh", logit_scale=1.0,
                                tie_embeddings=False)),
    "bert": ("BERT", foreign.BERT),
}  # fmt: skip


def native(config: ModelConfig, tokenizer: Tokenizer = LETTERS, **options: Any) -> Model:
    """A model as training makes it here."""
    config = replace(config, vocab_size=tokenizer.vocab_size, **options)
    data = DataConfig(task=config.task, buckets=(8,))
    return Model(config, toy_params(config), tokenizer, data, DecodeConfig(max_length=5))


def resolved(config: ModelConfig) -> dict[str, Any]:
    """All of a config but what is only of training."""
    return converting.resolved(config) | {"param_dtype": config.param_dtype}


@pytest.mark.parametrize("kind", NATIVE)
def test_a_run_goes_there_and_back(kind: str, tmp_path: Path):
    family, config = NATIVE[kind]
    model = native(config)
    save(model, tmp_path / "run")
    said = convert(tmp_path / "run", tmp_path / "theirs")
    assert said == f"{tmp_path / 'theirs'}: a {family} model in Hugging Face's layout"
    assert (
        convert(tmp_path / "theirs", tmp_path / "back") == f"{tmp_path / 'back'}: a run directory"
    )
    for path in (tmp_path / "run", tmp_path / "theirs", tmp_path / "back"):
        found = jaxformer.load(path)
        assert foreign.same_params(found.params, model.params)
        assert resolved(found.config) == resolved(model.config)
        read, wanted = found.tokenizer, LETTERS
        assert read.target("ab e") == wanted.target("ab e")
        if config.n_encoder_layers:
            assert read.source("ab e") == wanted.source("ab e")
        else:
            assert read.prompt("ab e") == wanted.prompt("ab e")
    convert(tmp_path / "back", tmp_path / "theirs again")
    files = [path.name for path in (tmp_path / "theirs").iterdir()]
    assert len(files) >= 4
    for name in files:
        again = tmp_path / "theirs again" / name
        assert again.read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_came_back_says_the_same(kind: str, tmp_path: Path):
    model = native(NATIVE[kind][1])
    export(model, tmp_path)
    texts = ["ab", "", "cab e"]
    wanted = [r.hypotheses[0].ids for r in model.hypotheses(texts)]
    assert [r.hypotheses[0].ids for r in jaxformer.load(tmp_path).hypotheses(texts)] == wanted


def test_what_no_family_has_is_named(tmp_path: Path):
    model = native(foreign.LLAMA, position="alibi", head_bias=True)
    with pytest.raises(CheckpointError) as caught:
        export(model, tmp_path / "there")
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0].startswith("no such model in Hugging Face's layout; nearest is ")
    assert "position is 'alibi', not 'rotary'" in lines and "head_bias is True, not False" in lines
    assert not (tmp_path / "there").exists()


def test_a_family_can_be_named(tmp_path: Path):
    model = native(foreign.LLAMA)
    assert export(model, tmp_path / "mistral", family="mistral") == "Mistral"
    found = jaxformer.load(tmp_path / "mistral")
    assert foreign.same_params(found.params, model.params) and found.origin
    assert found.origin.config["architectures"] == ["MistralForCausalLM"]
    with pytest.raises(ConfigError, match="no family 'lama'. Did you mean 'llama'?"):
        export(model, tmp_path / "other", family="lama")
    with pytest.raises(
        CheckpointError, match="(?s)nearest is GPT-2, but\n.*norm is 'rms', not 'lay"
    ):
        export(model, tmp_path / "other", family="gpt2")
    with pytest.raises(CheckpointError, match="there are no decoder-only models of family bert"):
        export(model, tmp_path / "other", family="bert")
    save(model, tmp_path / "run")
    with pytest.raises(ConfigError, match="family t5 is for run directories"):
        convert(tmp_path / "mistral", tmp_path / "other", family="t5")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_kept_or_asked_for(dtype: Any, tmp_path: Path):
    theirs = foreign.directory("t5", tmp_path / "theirs", param_dtype=dtype)
    convert(theirs, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    same = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert same == (theirs / "model.safetensors").read_bytes()
    assert json.loads((theirs / "config.json").read_text())["dtype"] == dtype
    for source in (theirs, tmp_path / "run"):
        convert(source, tmp_path / "asked" / source.name, dtype="bfloat16")
        found = jaxformer.load(tmp_path / "asked" / source.name)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(found.params)} == {"bfloat16"}
        assert found.config.param_dtype == "bfloat16"
    config = json.loads((tmp_path / "asked" / "run" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_the_dtype_has_the_name_it_had(tmp_path: Path):
    theirs = foreign.directory("llama", tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (theirs / "config.json").write_text(json.dumps(config))
    export(jaxformer.load(theirs, dtype="float16"), tmp_path / "back")
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert again == config | {"torch_dtype": "float16"}


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("normalised", [True, False])
def test_pooling_is_kept(pooling: str, normalised: bool, tmp_path: Path):
    model = foreign.model("bare", pooling=pooling, pooling_norm=normalised, pooling_length=5)
    export(model, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    for name in ("theirs", "run", "back"):
        assert jaxformer.load(tmp_path / name).config == model.config


def decodes() -> st.SearchStrategy[DecodeConfig]:
    ids = st.lists(st.integers(0, 99), max_size=3).map(tuple)
    common = dict(
        max_length=st.integers(9, 99), min_length=st.integers(0, 9), suppress=ids,
        suppress_first=ids, forced_first=st.integers(-1, 9), forced_last=st.integers(-1, 9),
        length_norm=st.just("plain"), repetition_penalty=st.floats(0.5, 2),
        no_repeat_ngram=st.integers(0, 4), encoder_no_repeat_ngram=st.integers(0, 4),
        bad_ids=st.lists(st.lists(st.integers(0, 99), min_size=1).map(tuple)).map(tuple),
        logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-9, 9)).map(
            lambda found: tuple(found.items())
        ),
    )  # fmt: skip
    usual = dict(length_penalty=st.just(1.0), early_stopping=st.just("heuristic"))
    return st.one_of(
        st.builds(DecodeConfig, **usual, **common),
        st.builds(
            DecodeConfig, beams=st.integers(2, 9), length_penalty=st.floats(0, 2),
            early_stopping=st.sampled_from(["exact", "heuristic", "full"]),
            length_decay=st.floats(1.1, 2), length_decay_start=st.integers(0, 9), **common,
        ),
        st.builds(
            DecodeConfig, samples=st.just(1), **usual, typical_p=st.floats(0.1, 1),
            epsilon=st.floats(0, 0.9), eta=st.floats(0, 0.9),
            temperature=st.floats(0.1, 2), top_k=st.integers(0, 9), top_p=st.floats(0.1, 1),
            min_p=st.floats(0, 1), **common,
        ),
    )  # fmt: skip


@given(decode=decodes())
def test_ways_to_generate_are_kept(decode: DecodeConfig):
    for config in (foreign.T5, foreign.LLAMA):
        theirs = json.loads(json.dumps(their_generation(decode)))
        assert folder.decode_config(config, {}, theirs, "here") == decode


def test_the_way_to_generate_is_as_it_was_until_it_changes(tmp_path: Path):
    theirs = foreign.directory("t5", tmp_path / "theirs")
    stated = {"max_length": 7, "num_beams": 2, "length_penalty": 0.5, "of_theirs": "only"}
    (theirs / "generation_config.json").write_text(json.dumps(stated))
    model = jaxformer.load(theirs)
    export(model, tmp_path / "same")
    assert json.loads((tmp_path / "same" / "generation_config.json").read_text()) == stated
    other = replace(model.defaults, beams=3, min_length=2)
    export(replace(model, defaults=other), tmp_path / "other")
    assert jaxformer.load(tmp_path / "other").defaults == other
    (theirs / "generation_config.json").unlink()
    export(jaxformer.load(theirs), tmp_path / "none")
    assert not (tmp_path / "none" / "generation_config.json").exists()


# Targets.


def test_a_target_in_use_is_left_alone(tmp_path: Path):
    source = foreign.directory("llama", tmp_path / "theirs")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("full", "file"):
        with pytest.raises(ConfigError, match=f"{target} is there already and not empty"):
            convert(source, tmp_path / target)
    assert (tmp_path / "full" / "note").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert foreign.same_params(
        jaxformer.load(tmp_path / "empty").params, jaxformer.load(source).params
    )


def test_a_target_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(converting, "load", lambda *_, **__: pytest.fail("before it is loaded"))
    with pytest.raises(CheckpointError, match="cannot write to .*Not a directory"):
        convert(tmp_path, tmp_path / "file" / "there")


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt("SIGTERM")


@pytest.mark.parametrize(("fault", "error"), [(full, CheckpointError), (stopped, BaseException)])
def test_a_conversion_that_fails_leaves_nothing(
    fault: Any, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    theirs = foreign.directory("llama", tmp_path / "theirs")
    convert(theirs, tmp_path / "run")
    for source, (module, name) in (
        (theirs, (run, "write_atomically")),
        (tmp_path / "run", (converting, "write_safetensors")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(error):
                convert(source, tmp_path / "there")
        assert not (tmp_path / "there").exists()
    convert(theirs, tmp_path / "there")


def test_half_a_conversion_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As after kill -9: whatever is written last makes it one."""
    model = foreign.model("llama")
    with monkeypatch.context() as patch:
        patch.setattr(run, "create", stopped)
        with pytest.raises(KeyboardInterrupt):
            save(model, tmp_path / "run")
    with monkeypatch.context() as patch:
        written = Path.write_bytes

        def write(path: Path, data: bytes) -> int:
            return stopped() or 0 if path.name == "config.json" else written(path, data)

        patch.setattr(Path, "write_bytes", write)
        with pytest.raises(KeyboardInterrupt):
            export(model, tmp_path / "theirs")
    for half in (tmp_path / "run", tmp_path / "theirs"):
        assert any(half.iterdir())
        with pytest.raises(CheckpointError, match="is no run directory"):
            jaxformer.load(half)


def test_a_source_that_is_nothing(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere is no run directory"):
        convert(tmp_path / "nowhere", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_model_without_a_tokenizer_for_others(tmp_path: Path):
    pieces = SymbolTokenizer(("a", "<pad>"), " ")  # whose words look like special tokens
    export(native(foreign.LLAMA, pieces), tmp_path)
    assert jaxformer.load_weights(tmp_path)[0].vocab_size == pieces.vocab_size
    with pytest.raises(DataError, match="tokenizer.json is missing"):
        jaxformer.load(tmp_path)


def test_a_damaged_origin_is_refused(tmp_path: Path):
    save(foreign.model("llama"), tmp_path / "native")
    convert(foreign.directory("llama", tmp_path / "theirs"), tmp_path / "run")
    for damaged in (
        "",
        "[]",
        '{"config": {}}',
        '{"config": {}, "generation": {}, "prefixed": true}',
        '{"config": 1, "generation": {}, "prefixed": true}',
    ):
        (tmp_path / "run" / "origin.json").write_text(damaged)
        with pytest.raises(
            CheckpointError, match="origin.json is damaged; convert the model again"
        ):
            jaxformer.load(tmp_path / "run")
    assert jaxformer.load(tmp_path / "native").origin is None


# Against transformers.


@pytest.mark.parity
@pytest.mark.parametrize("tokenizer", ["pieces", "letters", "bytes"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_transformers_reads_what_was_trained_here(kind: str, tokenizer: str, tmp_path: Path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from jaxformer.data.tokenizer import train_sentencepiece

    ours = {
        "pieces": lambda: train_sentencepiece(["abc bead cab dab ace dace " * 9], 300),
        "letters": lambda: LETTERS,
        "bytes": ByteTokenizer,
    }[tokenizer]()
    model = native(NATIVE[kind][1], ours)
    model = replace(model, params=jax.tree.map(lambda x: 2 * x - 0.2, model.params))
    export(model, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "bead  ace é"
    wanted = ours.source(text) if kind == "t5" else ours.prompt(text)
    assert theirs(text)["input_ids"] == wanted
    ids = ours.encode(text)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    auto = "AutoModelForSeq2SeqLM" if kind == "t5" else "AutoModelForCausalLM"
    other = getattr(transformers, auto).from_pretrained(tmp_path)
    prompt = torch.tensor([wanted])  # whose start is the padding id, which they would pass over
    written = other.generate(prompt, attention_mask=torch.ones_like(prompt))[0].tolist()
    found = model.hypotheses([text])[0].hypotheses[0].ids
    assert written == [*([0] if kind == "t5" else wanted), *found]
    assert len(set(found)) > 1 or tokenizer == "letters"


def test_positions_without_end_may_be_more_in_a_run_too(tmp_path: Path):
    for kind in ("llama", "bert"):
        save(foreign.model(kind), tmp_path / kind)
    assert jaxformer.load(tmp_path / "llama", max_length=99).config.max_length == 99
    with pytest.raises(ConfigError, match="max_length cannot be 99: the model has learned"):
        jaxformer.load(tmp_path / "bert", max_length=99)
