"""Training that begins from weights of another library, and their way back."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign
import jax
import numpy as np
import pytest
import tiny

import jaxformer
from jaxformer.cli import main
from jaxformer.config import MeshConfig, TrainConfig
from jaxformer.converting import convert
from jaxformer.errors import CheckpointError, ConfigError
from jaxformer.loading import abstract_params
from jaxformer.sharding import make_mesh
from jaxformer.training import loop
from jaxformer.training.loop import fit

pytestmark = pytest.mark.slow  # each trains or writes models, seconds at a time

RECIPE = str(tiny.ROOT / "configs" / "finetune.py")
QUICK = ("--steps 3 --eval_every 3 --save_every 3 --log_every 3 --data.valid_fraction 0.2 "
         "--optim.warmup 1 --data.buckets 24 --data.batch_tokens 240").split()  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    """Run the recipe: (exit code, run directory, what it said on standard error)."""

    def tune(base: Path, *options: str) -> tuple[int, Path, str]:
        monkeypatch.setenv("BASE", str(base))
        files = tiny.files() if jaxformer.read_config(base).n_decoder_layers else tiny.files()[:1]
        files = files[:1] if not jaxformer.read_config(base).n_encoder_layers else files
        run_dir = tmp_path / "run"
        code = main(
            ["train", "--config", RECIPE, "--run_dir", str(run_dir), "--data.train", *files,
             *QUICK, *options]
        )  # fmt: skip
        return code, run_dir, capfd.readouterr().err

    return tune


slow = pytest.mark.slow


@pytest.mark.parametrize("kind", ["t5", "llama", pytest.param("bert", marks=slow)])
def test_there_and_back(kind: str, tmp_path: Path, tune: Any):
    base = foreign.directory(kind, tmp_path / "base")
    stated = json.loads((base / "config.json").read_text()) | {"of_theirs": "only"}
    (base / "config.json").write_text(json.dumps(stated, indent=2) + "\n")
    code, run_dir, errors = tune(base, "--optim.learning_rate", "0.01")
    assert (code, errors) == (0, "")
    trained, before = jaxformer.load(run_dir), jaxformer.load(base)
    assert trained.tokenizer == before.tokenizer and trained.defaults == before.defaults
    assert trained.config == before.config
    assert tiny.leaves(trained.params).keys() == tiny.leaves(before.params).keys()
    assert not foreign.same_params(trained.params, before.params)
    logged = tiny.metrics(run_dir)[-1]["eval/loss"]
    assert np.isfinite(logged)

    convert(run_dir, tmp_path / "back")
    again = jaxformer.load(tmp_path / "back")
    assert foreign.same_params(again.params, trained.params)
    assert (again.config, again.tokenizer) == (trained.config, trained.tokenizer)
    for file in base.iterdir():
        same = file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()
        assert same == (file.name != "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_begins_with_the_weights_of_the_base(dtype: str, tmp_path: Path, tune: Any):
    base = foreign.directory("llama", tmp_path / "base", param_dtype=dtype)
    code, run_dir, errors = tune(base, "--optim.learning_rate", "0", "--steps", "1")
    assert (code, errors) == (0, "")
    found = jaxformer.load(run_dir)
    assert found.config.param_dtype == "float32"
    assert foreign.same_params(found.params, jaxformer.load(base, dtype="float32").params)
    shutil.rmtree(base)  # which is not needed any more
    tune_again = tiny.config_file(tmp_path / "again.py", jaxformer.run.read(run_dir)[0])
    assert main(["train", "--config", tune_again, "--steps", "2"]) == 0


@slow
def test_adapters_of_foreign_weights(tmp_path: Path, tune: Any):
    base = foreign.directory("t5", tmp_path / "base")
    options = ("--model.lora_rank", "2", "--optim.learning_rate", "0.1")
    code, run_dir, errors = tune(base, *options)
    assert (code, errors) == (0, "")
    tuned, before = jaxformer.load(run_dir), jaxformer.load(base)
    changed = {
        name
        for name, leaf in tiny.leaves(tuned.params).items()
        if leaf != tiny.leaves(before.params)[name]
    }
    assert changed and all("query" in name or "value" in name for name in changed)


@slow
def test_a_run_is_tuned_too(tmp_path: Path, tune: Any):
    code, run_dir, errors = tune(tiny.reversing_run(), "--optim.learning_rate", "0",
                                 "--data.buckets", "8", "--steps", "1")  # fmt: skip
    assert (code, errors) == (0, "")
    tuned, base = jaxformer.load(run_dir), jaxformer.load(tiny.reversing_run())
    assert foreign.same_params(tuned.params, base.params) and tuned.tokenizer == base.tokenizer
    assert tuned.defaults == base.defaults and tuned.origin is None


def test_without_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    monkeypatch.delenv("BASE", raising=False)
    assert main(["train", "--config", RECIPE, "--run_dir", str(tmp_path)]) == 2
    assert "BASE names no model" in capfd.readouterr().err
    monkeypatch.setenv("BASE", str(tmp_path / "nowhere"))
    assert main(["train", "--config", RECIPE, "--run_dir", str(tmp_path)]) == 4
    assert "nowhere is no run directory" in capfd.readouterr().err


def tuning(base: Path, run_dir: Path, **options: Any) -> TrainConfig:
    """A config of the recipe's kind."""
    model = dataclasses.replace(jaxformer.read_config(base), **options)
    config = tiny.causal(run_dir) if model.kind == "decoder-only" else tiny.masked(run_dir)
    return dataclasses.replace(config, init_from=str(base), model=model, steps=1)


def test_another_architecture_is_refused(tmp_path: Path):
    base = foreign.directory("llama", tmp_path / "base")
    config = tuning(base, tmp_path / "run", activation="relu", d_ff=16, dropout=0.1)
    with pytest.raises(ConfigError) as caught:
        fit(config)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == [
        "  model.activation: 'silu' there, 'relu' here",
        "  model.d_ff: 12 there, 16 here",
    ]
    assert lines[0] == f"init_from {base} is another model:" and len(lines) == 4
    assert (
        "model=jaxformer.read_config(init_from)" in lines[3] and "configs/finetune.py" in lines[3]
    )


def test_what_says_nothing_of_the_architecture_may_differ(tmp_path: Path):
    base = foreign.directory("llama", tmp_path / "base")
    model = jaxformer.read_config(base)
    for options in (
        {"dropout": 0.3}, {"max_length": 99}, {"lora_rank": 3}, {"compute_dtype": "bfloat16"},
        {"vocab_size": 0}, {"vocab_size": model.vocab_size + 3, "vocab_padding": 3},
    ):  # fmt: skip
        loop.require_same(dataclasses.replace(model, **options), base)
    bert = foreign.directory("bert", tmp_path / "bert")
    with pytest.raises(ConfigError, match="model.max_length: 24 there, 25 here"):
        loop.require_same(dataclasses.replace(jaxformer.read_config(bert), max_length=25), bert)


def test_onto_a_mesh_with_a_padded_vocabulary(tmp_path: Path):
    base = foreign.directory("bert", tmp_path / "base")
    plain = jaxformer.load(base)
    size = plain.config.vocab_size
    assert size % 2
    model = jaxformer.read_config(base)
    model = dataclasses.replace(model, vocab_size=size + 1, vocab_padding=1)
    abstract = abstract_params(model, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    found = loop.adopt(abstract, model, base)
    padded = 0
    for leaf, there, wanted in zip(
        *map(jax.tree.leaves, (found, plain.params, abstract)), strict=True
    ):
        assert (leaf.sharding, leaf.dtype) == (wanted.sharding, wanted.dtype)
        whole = np.array(leaf)
        inner = tuple(slice(n) for n in there.shape)
        assert np.array_equal(whole[inner], there)
        whole[inner] = 0
        assert not whole.any()
        padded += whole.size > there.size
    assert padded == 2  # the table, and the bias of the head


@pytest.mark.parametrize("kind", ["bare", "classes", "tagger"])
def test_other_heads_are_not_trained(kind: str, tmp_path: Path):
    base = foreign.directory(kind, tmp_path / "base")
    with pytest.raises(ConfigError, match="only models with head 'tokens' are trained here"):
        fit(tuning(base, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_listed(tmp_path: Path):
    base = foreign.directory("llama", tmp_path / "base")
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 16}))
    with pytest.raises(CheckpointError, match=r"mlp.up_proj.weight: \[12, 8\] there, \[16, 8\]"):
        fit(tuning(base, tmp_path / "run"))


def test_what_was_converted_is_no_run_to_resume(tmp_path: Path):
    convert(foreign.directory("llama", tmp_path / "base"), tmp_path / "run")
    config = dataclasses.replace(tuning(tmp_path / "run", tmp_path / "run"), init_from="")
    with pytest.raises(CheckpointError) as caught:
        fit(config)
    assert f"with init_from {tmp_path / 'run'}" in str(caught.value)
    fit(tuning(tmp_path / "run", tmp_path / "other"))
    origin = jaxformer.load(tmp_path / "other").origin
    assert origin is not None and origin == jaxformer.load(tmp_path / "run").origin


def test_a_run_begun_anew_has_no_origin_of_the_one_before(tmp_path: Path):
    config = tuning(foreign.directory("llama", tmp_path / "base"), tmp_path / "run")
    fit(config)
    assert jaxformer.load(tmp_path / "run").origin is not None
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # killed before the first
    fit(dataclasses.replace(config, init_from=""))
    assert jaxformer.load(tmp_path / "run").origin is None
