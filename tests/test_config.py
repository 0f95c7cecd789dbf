"""Options: read from JSON, from a file and from the command line, and refused by name."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from jaxformer.config import (
    DataConfig,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    from_json,
    load,
    to_json,
)
from jaxformer.data.sources import check
from jaxformer.errors import ConfigError

CLASSES = (ModelConfig, DataConfig, OptimConfig, MeshConfig, DecodeConfig)
DEFAULT = TrainConfig()


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type, small enough to be valid now and then."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and args[-1] is not Ellipsis:
        return st.tuples(*map(values, args))
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is Literal:
        return st.sampled_from(args)
    simple = {
        bool: st.booleans(),
        int: st.integers(-1, 9) | st.sampled_from([64, 4096]),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=5),
    }
    return simple[kind]


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    """The default with a few options changed, in each of its parts."""
    parts: dict[str, Any] = {}
    for name, part in [*((k, v) for k, v in vars(DEFAULT).items()), ("", DEFAULT)]:
        if name and not dataclasses.is_dataclass(part):
            continue
        hints = typing.get_type_hints(type(part))
        simple = [k for k in hints if not dataclasses.is_dataclass(hints[k])]
        chosen = draw(st.lists(st.sampled_from(simple), max_size=2, unique=True))
        changes: dict[str, Any] = {k: draw(values(hints[k])) for k in chosen}
        try:
            replace: Any = dataclasses.replace
            parts[name] = replace(part, **(changes if name else parts | changes))
        except ConfigError:
            if not name:
                reject()
            parts[name] = part
    return parts[""]


@given(configs())
@settings(max_examples=60)
def test_json_there_and_back(config: TrainConfig):
    assert from_json(TrainConfig, to_json(config)) == config


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every option."""
    if not isinstance(value, dict):
        return [path]
    return [leaf for k, v in value.items() for leaf in leaves(v, (*path, k))]


PATHS = leaves(json.loads(to_json(DEFAULT)))


def holder(options: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path[:-1]:
        options = options[name]
    return options


@pytest.mark.slow
def test_every_option_of_another_type_is_named():
    for path in PATHS:
        options = json.loads(to_json(DEFAULT))
        holder(options, path)[path[-1]] = None
        with pytest.raises(ConfigError) as caught:
            from_json(TrainConfig, json.dumps(options), "config.json")
        assert str(caught.value).startswith(f"config.json.{'.'.join(path)}")


def test_every_misspelt_option_is_named_with_the_nearest():
    for path in PATHS:
        options = json.loads(to_json(DEFAULT))
        place = holder(options, path)
        wrong = path[-1] + "z"
        place[wrong] = place.pop(path[-1])
        with pytest.raises(ConfigError) as caught:
            from_json(TrainConfig, json.dumps(options), "config.json")
        message = str(caught.value)
        assert f"no field {wrong!r}" in message and f"Did you mean {path[-1]!r}?" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "config is not JSON"),
        ("[]", "config must be an object"),
        ('{"steps": true}', "config.steps must be of type int, not True"),
        ('{"steps": 1.0}', "config.steps must be of type int, not 1.0"),
        ('{"model": {"norm": "lyer"}}', "config.model.norm is 'lyer'; .* 'layer', 'rms'"),
        ('{"metrics": ["blue"]}', r"config.metrics\[0\] is 'blue'"),
        ('{"decode": {"logit_bias": [[1]]}}', r"logit_bias\[0\] must have 2 parts"),
        ('{"decode": {"logit_bias": [[1.5, 1]]}}', r"logit_bias\[0\]\[0\] must be of type int"),
        ('{"data": {"buckets": 8}}', "config.data.buckets must be a list"),
        ('{"optim": {"clip": NaN}}', "clip is nan"),
    ],
)
def test_what_is_no_config(text: str, says: str):
    with pytest.raises(ConfigError, match=says):
        from_json(TrainConfig, text)


def test_a_whole_number_may_stand_for_a_float():
    config = from_json(OptimConfig, '{"learning_rate": 1}')
    assert type(config.learning_rate) is float


DECODER = {"n_decoder_layers": 1}
WRONG: list[tuple[type, dict[str, Any], str]] = [
    (ModelConfig, {}, "no layers"),
    (ModelConfig, DECODER | {"d_model": 0}, "d_model is 0; it must lie between 1"),
    (ModelConfig, DECODER | {"window": (4, -1)}, "window is -1"),
    (ModelConfig, DECODER | {"dropout": 1.0}, "dropout is 1.0"),
    (ModelConfig, DECODER | {"norm_eps": float("nan")}, "norm_eps is nan"),
    (ModelConfig, DECODER | {"d_model": 10, "n_heads": 4}, "d_model 10 is not a multiple"),
    (ModelConfig, DECODER | {"n_heads": 4, "n_kv_heads": 3}, "not a multiple of n_kv_heads 3"),
    (ModelConfig, DECODER | {"head_dim": 3}, "even head_dim and rotary_dim, not 3"),
    (ModelConfig, DECODER | {"window": ()}, "window is empty"),
    (ModelConfig, DECODER | {"rope_theta": ()}, "rope_theta is empty"),
    (ModelConfig, DECODER | {"position": "relative", "relative_buckets": 3}, "relative_buckets is"),
    (ModelConfig, DECODER | {"lora_targets": ("quary",)}, "'quary'. Did you mean 'query'"),
    (ModelConfig, DECODER | {"lora_rank": 1, "lora_targets": ("head",)}, "head is tied"),
    (DataConfig, {"mask_rate": 0.0}, "mask_rate is 0.0"),
    (DataConfig, {"buckets": ()}, "buckets is empty"),
    (DataConfig, {"buckets": (8, 8)}, "must rise"),
    (DataConfig, {"buckets": (16, 8)}, "must rise"),
    (DataConfig, {"batch_tokens": 100}, "less than one row of the longest bucket"),
    (OptimConfig, {"learning_rate": 1001.0}, "learning_rate is 1001.0"),
    (OptimConfig, {"learning_rate": float("nan")}, "learning_rate is nan"),
    (OptimConfig, {"beta1": 1.0}, "beta1 is 1.0"),
    (MeshConfig, {"data": 0}, "mesh.data is 0"),
    (MeshConfig, {"tensor": 0}, "tensor is 0"),
    (DecodeConfig, {"beams": 0}, "beams is 0"),
    (DecodeConfig, {"beams": -2}, "beams is -2"),
    (DecodeConfig, {"temperature": -1.0}, "temperature is -1.0"),
    (DecodeConfig, {"temperature": float("nan")}, "temperature is nan"),
    (DecodeConfig, {"top_p": 0.0}, "top_p is 0.0; it must be over 0"),
    (DecodeConfig, {"top_p": 1.5}, "top_p is 1.5"),
    (DecodeConfig, {"top_p": float("nan")}, "top_p is nan"),
    (DecodeConfig, {"top_k": -1}, "top_k is -1"),
    (DecodeConfig, {"min_p": 1.1}, "min_p is 1.1"),
    (DecodeConfig, {"typical_p": 0.0}, "typical_p is 0.0"),
    (DecodeConfig, {"epsilon": 1.0}, "epsilon is 1.0"),
    (DecodeConfig, {"eta": float("nan")}, "eta is nan"),
    (DecodeConfig, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    (DecodeConfig, {"presence_penalty": float("inf")}, "presence_penalty is inf"),
    (DecodeConfig, {"length_decay": -1.0}, "length_decay is -1.0"),
    (DecodeConfig, {"no_repeat_ngram": 65}, "no_repeat_ngram is 65"),
    (DecodeConfig, {"bad_words": ("a", "")}, "bad_words has an empty text"),
    (DecodeConfig, {"bad_ids": ((1,), ())}, r"bad_ids has \(\)"),
    (DecodeConfig, {"bad_ids": ((-1,),)}, "bad_ids has"),
    (DecodeConfig, {"bad_ids": ((1,),) * 4097}, "bad_ids has 4097 entries"),
    (DecodeConfig, {"logit_bias": ((3, float("nan")),)}, "logit_bias has"),
    (DecodeConfig, {"logit_bias": ((3, 1.0), (3, 2.0))}, "an id twice"),
    (DecodeConfig, {"min_length": -1}, "min_length is -1"),
    (DecodeConfig, {"min_length": 5, "max_length": 4}, "min_length 5 is more than max_length 4"),
    (DecodeConfig, {"beams": 2, "samples": 3}, "not both"),
    (DecodeConfig, {"beams": 4, "groups": 3}, "4 beams make no 3 equal groups"),
    (DecodeConfig, {"groups": 2}, "1 beams make no 2 equal groups"),
    (DecodeConfig, {"beams": 4, "groups": 0}, "groups is 0"),
    (DecodeConfig, {"beams": 4, "groups": 2, "top_p": 0.5}, "give groups or those, not both"),
    (DecodeConfig, {"diversity": float("inf")}, "diversity is inf"),
    (DecodeConfig, {"contrastive": -1}, "contrastive is -1"),
    (DecodeConfig, {"contrastive": 4, "beams": 2}, "neither beams nor options of sampling"),
    (DecodeConfig, {"contrastive": 4, "top_k": 4}, "neither beams nor options of sampling"),
    (DecodeConfig, {"contrastive": 4, "n_best": 2}, "n_best 2 is more than the 1"),
    (DecodeConfig, {"penalty_alpha": 1.5}, "penalty_alpha is 1.5"),
    (DecodeConfig, {"lookup": -1}, "lookup is -1"),
    (DecodeConfig, {"lookup": 4, "beams": 2}, "lookup speeds up greedy decoding and one sample"),
    (DecodeConfig, {"lookup": 4, "samples": 2}, "lookup speeds up greedy decoding and one sample"),
    (DecodeConfig, {"mbr": True}, "mbr ranks samples, and samples is 0"),
    (DecodeConfig, {"beams": 2, "n_best": 3}, "n_best 3 is more than the 2"),
    (DecodeConfig, {"samples": 2, "n_best": 3}, "n_best 3 is more than the 2"),
    (TrainConfig, {"steps": 0}, "steps is 0"),
    (TrainConfig, {"seed": -1}, "seed is -1"),
    (TrainConfig, {"data": DataConfig(task="mlm")}, "data.task is mlm, but the decoder-only"),
    (TrainConfig, {"model": ModelConfig(n_decoder_layers=1, max_length=64)}, "over model.max_len"),
    (TrainConfig, {"metrics": ("bleu",)}, "only data.task seq2seq has"),
]


@pytest.mark.parametrize(("kind", "options", "says"), WRONG)
def test_what_cannot_be_is_refused(kind: type, options: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says) as caught:
        kind(**options)
    assert caught.value.exit_code == 2


def test_what_follows_from_other_options():
    model = ModelConfig(n_encoder_layers=1, d_model=64, n_heads=4)
    assert (model.kind, model.kv_heads, model.dim_per_head) == ("encoder-only", 4, 16)
    assert model.query_scale == 0.25
    both = dataclasses.replace(model, n_decoder_layers=2, n_kv_heads=2, head_dim=8)
    assert (both.kind, both.kv_heads, both.dim_per_head) == ("encoder-decoder", 2, 8)
    assert not DecodeConfig(beams=4).sampling and DecodeConfig(beams=4).width == 4
    ways: list[dict[str, Any]] = [
        {"temperature": 0.5},
        {"top_k": 1},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"epsilon": 0.1},
        {"eta": 0.1},
    ]
    for option in ways:
        assert DecodeConfig(**option).sampling
    assert DecodeConfig(samples=3).width == 3


RECIPES = [path for path in sorted((tiny.ROOT / "configs").glob("*.py")) if path.stem != "finetune"]
"""That one needs a model to begin with: see test_finetune.py."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path):
    config = load(["--config", str(path)])
    assert config.run_dir.startswith("runs/") and config.model.vocab_size == 0
    if config.data.source in ("cmudict", "docstrings"):  # the others are told their files
        check(config.data)


def test_the_command_line_overrides_the_file(tmp_path: Path):
    file = tiny.config_file(tmp_path / "config.py", tiny.reverse(tmp_path))
    given = ["--steps", "3", "--model.d_model", "16", "--data.buckets", "4", "8", "--metrics"]
    for at_front in (["--config", file, *given], [*given, f"--config={file}"]):
        config = load(at_front)
        was = tiny.reverse(tmp_path)
        assert config == dataclasses.replace(
            was,
            steps=3,
            metrics=(),
            model=dataclasses.replace(was.model, d_model=16),
            data=dataclasses.replace(was.data, buckets=(4, 8)),
        )
    assert load([]) == DEFAULT


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        (["--stepz", "3"], "Perhaps you meant"),
        (["--model.n_head", "3"], "--model.n-heads"),
        (["--steps", "many"], "--steps"),
        (["--model.norm", "lyer"], "'layer', 'rms'"),
        (["--optim.clip", "much"], "--optim.clip"),
    ],
)
def test_a_wrong_argument_exits_with_2(argument: list[str], says: str, capsys: Any):
    with pytest.raises(SystemExit) as caught:
        load(argument)
    assert caught.value.code == 2
    shown = capsys.readouterr().err.replace("│", " ").replace("_", "-")
    assert says in " ".join(shown.split())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (None, "no config file .*/config.py. Did you mean '.*/konfig.py'"),
        ("get_config = 3", "defines no function get_config"),
        ("def get_config():\n    return 3", "returned no TrainConfig"),
        ("def get_config():\n    return TrainConfig(stepz=3)", "stepz.* Did you mean 'steps'"),
        ("def get_config():\n    return TrainConfig(steps='3')", "steps is '3'"),
        ("def get_config():\n    return TrainConfig(steps=3.5)", "steps must be of type int"),
        (
            "def get_config():\n    return TrainConfig(model=ModelConfig("
            "n_decoder_layers=1, norm='lyer'))",
            "config.py.model.norm is 'lyer'",
        ),
    ],
)
def test_a_wrong_config_file(tmp_path: Path, body: str | None, says: str):
    path = tmp_path / ("konfig.py" if body is None else "config.py")
    path.write_text(f"from jaxformer.config import ModelConfig, TrainConfig\n{body}\n")
    with pytest.raises(ConfigError, match=says):
        load(["--config", str(tmp_path / "config.py")])


def test_config_needs_a_path():
    with pytest.raises(ConfigError, match="--config needs the path"):
        load(["--config"])
