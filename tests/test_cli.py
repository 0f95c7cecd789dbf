"""The command line: what it writes, what it refuses, and how it exits."""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import tiny

import jaxformer
from jaxformer import cli, converting, loading, picture, run
from jaxformer.cli import main
from jaxformer.config import DecodeConfig
from jaxformer.data import sources
from jaxformer.data.tokenizer import ByteTokenizer, load_tokenizer
from jaxformer.model import Model
from jaxformer.training import loop


@pytest.fixture(autouse=True, scope="module")
def _shared_compilation() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: Any):
    """Run a command with bytes on its standard input: (exit code, output, errors)."""

    def command(*arguments: str, given: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        monkeypatch.setattr("sys.argv", ["jaxformer", *arguments])
        try:
            code = main()
        except SystemExit as e:  # from the parser of options
            assert isinstance(e.code, int)
            code = e.code
        out, errors = capfd.readouterr()
        assert "Traceback" not in errors
        return code, out, errors

    return command


RUN = ("--run", "reversing")
TEXTS = [b"abc", b"", b"e", b"dcba", b"c d"]


@pytest.fixture(autouse=True)
def _beside_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.reversing_run().parent)


def test_one_line_for_each_line_in_order(command: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jaxformer.picture", None)  # read only if one is drawn
    wanted = jaxformer.load("reversing").hypotheses([text.decode() for text in TEXTS])
    code, out, errors = command("generate", *RUN, given=b"\n".join(TEXTS))
    assert (code, errors) == (0, "")
    assert out == "".join(result.hypotheses[0].text + "\n" for result in wanted)
    _, out, _ = command("generate", *RUN, "--json", given=b"\r\n".join(TEXTS))
    scores = [json.loads(line)["hypotheses"][0]["score"] for line in out.splitlines()]
    assert scores == [result.hypotheses[0].score for result in wanted]
    assert len(set(scores)) > 1
    assert command("generate", *RUN, given=b"") == (0, "", "")


@pytest.mark.slow
def test_chunks_neither_change_samples_nor_order(command: Any, monkeypatch: pytest.MonkeyPatch):
    given, options = b"\n".join(TEXTS), ("--samples", "2", "--max_length", "8", "--json")
    whole = command("generate", *RUN, *options, given=given)
    assert whole[0] == 0 and len(set(whole[1].splitlines())) == len(TEXTS)
    monkeypatch.setattr("jaxformer.cli.AT_ONCE", 2)
    for a, b in zip(
        whole[1].splitlines(),
        command("generate", *RUN, *options, given=given)[1].splitlines(),
        strict=True,
    ):
        one, other = json.loads(a), json.loads(b)
        assert one["text"] == other["text"]
        assert [h["ids"] for h in one["hypotheses"]] == [h["ids"] for h in other["hypotheses"]]


@pytest.mark.slow
def test_constraints_hold(command: Any):
    for options, pattern in (
        (("--regex", "[ab]{2}c?"), "[ab]{2}c?"),
        (("--allowed", "ab", "cd", "--beams", "2"), "ab|cd"),
        (("--include", "bb|ee", "d", "--prefix", "c"), "c(?=.*(bb|ee))(?=.*d).*"),
    ):
        code, out, errors = command("generate", *RUN, *options, given=b"abc\nde")
        assert (code, errors) == (0, "")
        assert len(lines := out.splitlines()) == 2
        assert all(re.fullmatch(pattern, line) for line in lines), lines
    for bad in (("--regex", "("), ("--regex", "7"), ("--json_schema", "{")):
        code, out, errors = command("generate", *RUN, *bad, given=b"abc")
        assert (code, out) == (2, "") and errors.startswith("jaxformer: ")


def test_json_has_the_best_and_their_scores(command: Any):
    options = ("--json", "--samples", "2", "--n_best", "2", "--seed", "5")
    code, out, _ = command("generate", *RUN, *options, given=b"abc\nde")
    assert code == 0
    decode = dataclasses.replace(jaxformer.load("reversing").defaults, samples=2, n_best=2, seed=5)
    wanted = jaxformer.load("reversing").hypotheses(["abc", "de"], decode)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [set(row) for row in rows] == [{"text", "hypotheses"}] * 2
    for row, result in zip(rows, wanted, strict=True):
        assert row["text"] == row["hypotheses"][0]["text"] == result.hypotheses[0].text
        for found, hypothesis in zip(row["hypotheses"], result.hypotheses, strict=True):
            assert found == json.loads(json.dumps(hypothesis.record()))


def test_a_line_too_long_fails_alone(command: Any):
    given = b"ab\n" + b"a" * 16 + b"\nde"
    code, out, errors = command("generate", *RUN, given=given)
    lines = out.split("\n")
    assert code == 0 and len(lines) == 4 and lines[1] == "" and lines[0] and lines[2]
    assert errors.startswith("jaxformer: line 2: the text has 17 tokens, but the model reads")
    code, out, errors = command("generate", *RUN, "--json", given=given)
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, errors) == (0, "")
    assert [list(row) for row in rows] == [
        ["text", "hypotheses"],
        ["error"],
        ["text", "hypotheses"],
    ]
    assert [rows[0]["text"], rows[2]["text"]] == [lines[0], lines[2]]


def test_control_characters_never_reach_a_terminal(command: Any, monkeypatch: pytest.MonkeyPatch):
    text = "a\n\x1b[31m\t\u2028é"
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: text)
    monkeypatch.setattr(type(jaxformer.load("reversing").tokenizer), "decode", lambda *_: text)
    code, out, _ = command("generate", *RUN, given=b"abc")
    assert (code, out) == (0, "a\\n\\x1b[31m\\t\\u2028é\n")
    code, out, _ = command("generate", *RUN, "--json", given=b"abc")
    assert code == 0 and json.loads(out)["text"] == text and out.count("\n") == 1


def test_what_is_not_utf_8_is_named_by_line(command: Any):
    code, _, errors = command("generate", *RUN, given=b"ab\ncd\nx\xff\n")
    assert code == 3
    assert "line 3" in errors and "not UTF-8" in errors and "byte 1" in errors


@pytest.mark.parametrize(
    "ways",
    [
        (),
        pytest.param(("--beams", "2"), marks=pytest.mark.slow),
        pytest.param(("--samples", "2"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_attention_is_drawn_of_what_was_generated(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...]
):
    monkeypatch.setattr("jaxformer.cli.DRAWN", 2)
    given = b"a" * 16 + b"\nabc\n\nde"
    file, drawn, draw = tmp_path / "map.png", [], picture.draw_attention

    def watched(attended: Any, path: Path) -> None:
        drawn.extend(attended)
        draw(attended, path)

    monkeypatch.setattr(picture, "draw_attention", watched)
    code, out, _ = command(
        "generate", *RUN, *ways, "--json", "--plot_attention", str(file), given=given
    )
    assert code == 0 and file.read_bytes().startswith(b"\x89PNG")
    rows = list(map(json.loads, out.splitlines()))
    text_of = load_tokenizer("reversing/tokenizer").token_text
    for text, row, panel in zip(("abc", ""), rows[1:3], drawn, strict=True):
        assert panel.source == (*text, "</s>")
        assert panel.target == tuple(map(text_of, row["hypotheses"][0]["ids"]))


def test_no_picture_is_begun_that_cannot_be_drawn(
    command: Any, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(*options: str, run: str = "reversing", given: bytes = b"a") -> tuple[int, str]:
        code, out, errors = command(
            "generate", "--run", run, "--plot_attention", *options, given=given
        )
        assert out == "" and not list(tmp_path.glob("*.png"))
        return code, errors

    good = str(tmp_path / "map.png")
    code, errors = refused(good, run=str(elsewhere / "bert"))
    assert code == 2 and "an encoder-only model generates no text" in errors
    code, errors = refused(good, given=b"")
    assert code == 3 and "nothing was generated" in errors
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "texts").write_text("a\n")
    bulk = ("--input", str(tmp_path / "texts"), "--output", str(tmp_path / "out"))
    for options, wanted, says in (
        ((good, "--stream"), 2, "leave out stream and output"),
        ((good, *bulk), 2, "leave out stream and output"),
        ((str(tmp_path),), 2, "is no file that ends in .png"),
        ((str(tmp_path / "map.pdf"),), 2, "map.pdf is no file that ends in .png"),
        ((str(tmp_path / "none" / "map.png"),), 4, "map.png: No such file or directory"),
        ((str(tmp_path / ("a" * 300 + ".png")),), 4, "File name too long"),
    ):
        code, errors = refused(*options)
        assert code == wanted and says in errors, (options, errors)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.slow
def test_scores_are_those_of_decoding(command: Any, tmp_path: Path):
    decode = DecodeConfig(samples=4, n_best=4, max_length=8)
    model = jaxformer.load("reversing")
    results = model.hypotheses([t.decode() for t in TEXTS], decode)
    pairs = [  # but for those with ids that stand for no text
        (text.decode(), h)
        for text, result in zip(TEXTS, results, strict=True)
        for h in result.hypotheses
        if list(h.ids) == model.tokenizer.target(h.text)
    ]
    assert len(pairs) > 3
    given = "".join(json.dumps({"source": s, "target": h.text, "id": 1}) + "\n" for s, h in pairs)
    code, out, errors = command("score", *RUN, "--token_log_probs", given=given.encode())
    assert (code, errors) == (0, "")
    for (_, h), line in zip(pairs, out.splitlines(), strict=True):
        row = json.loads(line)
        assert row["log_prob"] == pytest.approx(h.log_prob, abs=1e-4)
        assert row["tokens"] == len(h.ids) == len(row["token_log_probs"])
        assert sum(row["token_log_probs"]) == pytest.approx(row["log_prob"], abs=1e-9)
        assert row["perplexity"] == pytest.approx(math.exp(-h.log_prob / len(h.ids)), rel=1e-4)
    for name, texts in (("s", [s for s, _ in pairs]), ("t", [h.text for _, h in pairs])):
        (tmp_path / name).write_text("".join(text + "\n" for text in texts))
    files = ("--sources", str(tmp_path / "s"), "--targets", str(tmp_path / "t"))
    _, same, _ = command("score", *RUN, "--token_log_probs", *files)
    assert same == out
    (tmp_path / "t").write_text("a\n")
    code, _, errors = command("score", *RUN, *files)
    assert code == 3 and "have not as many lines" in errors
    for given, says in (
        (b"{", "not JSON"),
        (b"[]", "no pair"),
        (b'{"target": 1}', "'target' is 1"),
    ):
        code, out, errors = command("score", *RUN, given=b'{"target": "a"}\n' + given)
        assert (code, out) == (3, "") and f"standard input, line 2: {says}" in errors.replace(
            "field ", ""
        )
    long = json.dumps({"source": "a", "target": "a" * 20}).encode()
    code, out, _ = command("score", *RUN, given=long + b'\n{"source": "a", "target": "b"}')
    one, other = map(json.loads, out.splitlines())
    assert (
        code == 0 and one["error"].startswith("the pair has 21 tokens, over") and "tokens" in other
    )


def test_no_json_drives_a_terminal(command: Any, monkeypatch: pytest.MonkeyPatch):
    text = "\x9b31m\u202e\x7f\u2028é"
    monkeypatch.setattr(type(jaxformer.load("reversing").tokenizer), "decode", lambda *_: text)
    code, out, _ = command("generate", *RUN, "--json", given=b"abc")
    assert code == 0 and json.loads(out)["text"] == text
    assert not set(text[:-1]) & set(out) - set("31m") and "é" in out


def test_evaluate_agrees_with_training(command: Any):
    code, out, errors = command("evaluate", *RUN)
    assert (code, errors) == (0, "")
    scores, logged = json.loads(out), tiny.metrics(tiny.reversing_run())[-1]
    assert scores.keys() == logged.keys() - {"step"}
    for name, value in scores.items():
        assert value == (value if isinstance(value, str) else pytest.approx(logged[name], rel=1e-6))
    old = json.loads(command("evaluate", *RUN, "--step", "5")[1])
    assert old["eval/loss"] != pytest.approx(scores["eval/loss"], rel=1e-6)


def test_a_step_that_is_not_there(command: Any):
    code, _, errors = command("evaluate", *RUN, "--step", "6")
    assert code == 4 and "no checkpoint of step 6, only of [5, 7]" in errors


def test_a_tokenizer_made_before_the_run(command: Any, tmp_path: Path):
    config = tiny.reverse(tmp_path / "run")
    file, output = tiny.config_file(tmp_path / "config.py", config), tmp_path / "letters"
    code, out, _ = command("tokenizer", "--config", file, "--output", str(output))
    assert code == 0 and out.startswith(f"{output}: 9 ids, SHA-256 ")
    # Other data: of its own, the run would have made another tokenizer.
    other = tmp_path / "other.txt"
    other.write_text("xyz\n" * 20)
    data = dataclasses.replace(
        config.data, tokenizer_path=str(output), train=(str(other), str(other))
    )
    resolved, prepared = loop.prepare(dataclasses.replace(config, data=data), tmp_path / "run")
    assert prepared.tokenizer.hash in out
    assert resolved.model.vocab_size == 9


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("top_p", "0", "top_p is 0.0; it must be over 0 and at most 1"),
        ("top_p", "1.5", "top_p is 1.5"),
        ("top_p", "nan", "top_p is nan"),
        ("temperature", "-1", "temperature is -1.0; it must lie between 0"),
        ("temperature", "nan", "temperature is nan"),
        ("beams", "-4", "beams is -4; it must lie between 1"),
        ("n_best", "2", "n_best 2 is more than the 1 hypotheses"),
        ("temprature", "1", "Perhaps you meant"),
        ("beams", "many", "--beams"),
    ],
)
def test_a_bad_option_is_refused_by_name(command: Any, option: str, value: str, says: str):
    for name in ("generate", "evaluate"):
        code, out, errors = command(name, *RUN, f"--{option}", value)
        assert (code, out) == (2, "") and says in errors


def test_commands_and_runs_that_are_not_there(command: Any, tmp_path: Path):
    code, _, errors = command("trian")
    assert code == 2 and "no command 'trian'. Did you mean 'train'?" in errors
    assert command()[0] == 2
    assert command("--help")[0] == 0
    code, _, errors = command("generate", "--run", str(tmp_path))
    assert code == 4 and f"{tmp_path} is no run directory" in errors
    assert command("generate")[0] == 2
    code, _, errors = command("train", "--config", "konfig.py")
    assert code == 2 and "no config file konfig.py" in errors


def test_a_swapped_tokenizer_is_refused(command: Any, tmp_path: Path):
    shutil.copytree("reversing", tmp_path / "run")
    ByteTokenizer().save(tmp_path / "run" / "tokenizer")
    for name in ("generate", "evaluate"):
        code, out, errors = command(name, "--run", str(tmp_path / "run"), given=b"a")
        assert (code, out) == (4, "") and "not the one the model was trained with" in errors


def test_a_misspelt_field_of_a_run_is_named(command: Any, tmp_path: Path):
    shutil.copytree("reversing", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"n_heads"', '"n_headz"'))
    code, _, errors = command("generate", "--run", str(tmp_path / "run"))
    assert code == 4 and f"{path}.model has no field 'n_headz'. Did you mean 'n_heads'?" in errors


def test_a_directory_that_cannot_be_written(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before anything is read, trained or compiled."""
    for module, name in ((loop, "make_train_step"), (loop, "prepare"), (sources, "read")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(name))
    (tmp_path / "file").touch()
    there = str(tmp_path / "file" / "there")
    file = tiny.config_file(tmp_path / "config.py", tiny.reverse(Path(there)))
    for name, options in (("train", ()), ("tokenizer", ("--output", there))):
        code, out, errors = command(name, "--config", file, *options)
        assert (code, out) == (4, "") and f"cannot write to {there}: Not a directory" in errors
    # There, but no file can be made in it.
    code, _, errors = command("tokenizer", "--config", file, "--output", "/proc")
    assert code == 4 and "cannot write to /proc" in errors


def test_signals_end_a_command_on_a_run(command: Any, monkeypatch: pytest.MonkeyPatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        monkeypatch.setattr(Model, "complete", lambda *_, n=number, **__: signal.raise_signal(n))
        for name in ("generate", "evaluate"):
            code, out, errors = command(name, *RUN, given=b"abc")
            assert (code, out) == (75, "")
            said = f"jaxformer: stopped by {number.name}; give the same command again.\n"
            assert errors == said
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_the_command_that_is_installed():
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["scripts"].items()
    assert name == "jaxformer"
    assert EntryPoint(name, value, "console_scripts").load() is main


def test_the_options_of_the_run_are_the_defaults(command: Any, tmp_path: Path):
    shutil.copytree("reversing", tmp_path / "run")
    options = json.loads((tmp_path / "run" / "config.json").read_text())
    options["decode"] = dataclasses.asdict(DecodeConfig(max_length=2))
    (tmp_path / "run" / "config.json").write_text(json.dumps(options))
    for options, most in (((), 2), (("--max_length", "4"), 4)):
        _, out, _ = command("generate", f"--run={tmp_path}/run", "--json", *options, given=b"abc")
        (hypothesis,) = json.loads(out)["hypotheses"]
        assert (hypothesis["finish"], len(hypothesis["ids"])) == ("limit", most)


def test_an_option_of_sampling_samples_whatever_its_value(command: Any):
    options = ("--max_length", "8")
    one, same, other = (
        command("generate", *RUN, *options, "--temperature", "1", "--seed", seed,
                given=b"abc\n" * 20)[1]
        for seed in "112"
    )  # fmt: skip
    assert one == same != other


@pytest.mark.slow
def test_a_way_of_one_hypothesis_sets_aside_a_run_s_beams(command: Any, tmp_path: Path):
    shutil.copytree("reversing", tmp_path / "run")
    options = json.loads((tmp_path / "run" / "config.json").read_text())
    decode = DecodeConfig(beams=4, groups=2, n_best=2, max_length=4)
    options["decode"] = dataclasses.asdict(decode)
    (tmp_path / "run" / "config.json").write_text(json.dumps(options))
    run, given = ("--run", str(tmp_path / "run")), b"abc\nde"
    greedy = command("generate", *RUN, "--max_length", "4", given=given)[1]
    for way in (("--stream",), ("--lookup", "2"), ("--draft", "reversing")):
        assert command("generate", *run, *way, given=given) == (0, greedy, "")
    assert "".join(jaxformer.load(run[1]).stream("abc")) == greedy.splitlines()[0]


SAVED = [dict(beams=4, groups=2, n_best=2), dict(samples=3, n_best=3, mbr=True),
         dict(temperature=0.8), dict(beams=3, typical_p=0.5), dict(contrastive=4),
         dict(lookup=3)]  # fmt: skip
GIVEN = {
    ("--beams", "1"): dict(),
    ("--beams", "4", "--groups", "2"): dict(beams=4, groups=2),
    ("--contrastive", "5"): dict(contrastive=5),
    ("--lookup", "2"): dict(lookup=2),
    ("--samples", "2"): dict(samples=2),
    ("--beams", "2", "--temperature", "0.5"): dict(beams=2, temperature=0.5, samples=1),
    ("--stream", "--temperature", "0.5"): dict(temperature=0.5, samples=1),
}


@pytest.mark.parametrize("of_the_run", SAVED, ids=str)
@pytest.mark.parametrize("given", GIVEN, ids=" ".join)
def test_a_strategy_that_is_asked_for_is_what_there_is(
    monkeypatch: Any, of_the_run: dict, given: tuple[str, ...]
):
    """Whatever the run's own is; only options of sampling add to each other."""
    monkeypatch.setattr("jaxformer.inspecting.read_decode", lambda _: DecodeConfig(**of_the_run))
    found = cli._with_run_defaults(cli.Generate, ["--run", "x", *given]).decode
    wanted = DecodeConfig(**GIVEN[given])
    for name in ("beams", "groups", "n_best", "mbr", "contrastive", "lookup"):
        assert getattr(found, name) == getattr(wanted, name)
    if not wanted.lookup:  # which goes with one sample
        assert (found.samples, found.sampling) == (wanted.samples, wanted.sampling)


def test_a_path_that_cannot_be_is_no_run(command: Any):
    code, out, errors = command("generate", "--run", "a" * 5000, given=b"abc")
    assert (code, out) == (4, "") and "Traceback" not in errors


@pytest.mark.parametrize("text", ["[" * 100_000, '{"steps": ' + "9" * 5000 + "}"])
def test_a_damaged_config_of_a_run_is_told(command: Any, text: str, tmp_path: Path):
    shutil.copytree("reversing", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    code, out, errors = command("generate", "--run", str(tmp_path / "run"), given=b"abc")
    assert (code, out) == (4, "") and "config.json is not JSON" in errors


def test_a_pipe_is_no_config(command: Any, tmp_path: Path):
    shutil.copytree("reversing", tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    os.mkfifo(tmp_path / "run" / "config.json")
    code, out, errors = command("generate", "--run", str(tmp_path / "run"), given=b"abc")
    assert (code, out) == (4, "") and "no regular file" in errors


# Checkpoints from elsewhere.


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directories of all kinds, not to be changed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for kind in foreign.CONFIGS:
        foreign.directory(kind, folder / kind)
    return folder


@pytest.mark.slow
def test_a_directory_from_elsewhere_generates(command: Any, elsewhere: Path):
    for kind in ("t5", "llama"):
        where = ("--run", str(elsewhere / kind))
        model = jaxformer.load(elsewhere / kind)
        assert model.defaults.max_length == 6  # which its generation_config.json says
        for options, decode in (
            ((), model.defaults),
            (("--max_length", "3"), dataclasses.replace(model.defaults, max_length=3)),
        ):
            code, out, errors = command("generate", *where, "--json", *options, given=b"abc\n\nd")
            assert (code, errors) == (0, "")
            found = [json.loads(line)["hypotheses"][0]["ids"] for line in out.splitlines()]
            wanted = model.hypotheses(["abc", "", "d"], decode)
            assert found == [list(r.hypotheses[0].ids) for r in wanted]
    code, _, errors = command("generate", *where, "--step", "3", given=b"a")
    assert code == 2 and "is no training run, so it has no step 3" in errors


def test_lines_are_chats(command: Any, elsewhere: Path):
    where, lines = ("--run", str(elsewhere / "llama")), ["abc", "", "e d"]
    talks = [[{"role": "user", "content": line}] for line in lines]
    given = "\n".join(lines).encode()
    code, out, errors = command("generate", *where, "--chat", given=given)
    assert (code, errors) == (0, "")
    assert out.splitlines() == jaxformer.load(elsewhere / "llama").chat(talks)
    plain = command("generate", *where, "--json", given=given)[1]
    assert command("generate", *where, "--chat", "--json", given=given)[1] != plain
    code, _, errors = command("generate", "--run", str(elsewhere / "t5"), "--chat", given=given)
    assert code == 3 and "has no chat template" in errors


@pytest.mark.slow
def test_the_dtype_asked_for(command: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    asked, really = [], loading.load

    def load(*arguments: Any, **options: Any) -> Model:
        asked.append(really(*arguments, **options).config.compute_dtype)
        return really(*arguments, **options)

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(loop, "load", load)
    assert (
        command("generate", "--run", str(elsewhere / "t5"), "--dtype", "bfloat16", given=b"a")[0]
        == 0
    )
    assert command("evaluate", *RUN, "--dtype", "float16")[0] == 0
    assert command("generate", *RUN, given=b"a")[0] == 0
    assert asked == ["bfloat16", "float16", "float32"]
    for name, *rest in (("generate", *RUN), ("evaluate", *RUN), ("convert", "a", "b")):
        code, _, errors = command(name, *rest, "--dtype", "float8")
        assert code == 2 and "float8" in errors


def test_there_is_nothing_to_evaluate_on(
    command: Any, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    converting.convert(elsewhere / "llama", tmp_path / "run")
    monkeypatch.setattr(loop, "load", lambda *_, **__: pytest.fail("loaded"))
    for where in (elsewhere / "llama", elsewhere / "bare", tmp_path / "run"):
        code, out, errors = command("evaluate", "--run", str(where))
        assert (code, out) == (2, "")
        assert f"{where} was not trained here, so it has no validation data" in errors


LINES = ["ab", "", "bead cab", "  e ", "", "d"]


@pytest.mark.parametrize("chunk", [4096, 2])
def test_embed_writes_a_row_for_each_line(
    command: Any, elsewhere: Path, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxformer.cli.AT_ONCE", chunk)
    wanted = jaxformer.load(elsewhere / "bare").embed(LINES)
    assert len(np.unique(wanted.round(5), axis=0)) == len(LINES) - 1
    given, output = "\n".join(LINES).encode() + b"\n", tmp_path / "vectors.npy"
    (tmp_path / "texts").write_bytes(given)
    for options, text in (((), given), (("--input", str(tmp_path / "texts")), b"")):
        code, out, errors = command(
            "embed", "--run", str(elsewhere / "bare"), "--output", str(output), *options, given=text
        )
        assert (code, out, errors) == (0, f"{output}: 6 vectors of 8\n", "")
        found = np.load(output, allow_pickle=False)
        assert found.dtype == np.float32 and found.flags.c_contiguous
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        output.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_embed_of_nothing(command: Any, elsewhere: Path, tmp_path: Path):
    output = str(tmp_path / "v.npy")
    code, _, _ = command("embed", "--run", str(elsewhere / "bare"), "--output", output)
    assert code == 0 and np.load(output).shape == (0, 8)


def test_embed_leaves_what_was_there_when_it_fails(
    command: Any, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxformer.cli.AT_ONCE", 2)
    output = tmp_path / "v.npy"
    output.write_bytes(b"before")
    where = ("--run", str(elsewhere / "bare"), "--output", str(output))
    code, _, errors = command("embed", *where, given=b"a\nb\nc\nd\n\xff\n")
    assert code == 3 and "standard input, line 5: not UTF-8" in errors
    (tmp_path / "bad").write_bytes(b"\n\xff")
    code, _, errors = command("embed", *where, "--input", str(tmp_path / "bad"))
    assert code == 3 and f"{tmp_path / 'bad'}, line 2: not UTF-8" in errors
    code, _, errors = command("embed", *where, "--input", str(tmp_path / "none"))
    assert code == 3 and f"cannot read {tmp_path / 'none'}: No such file" in errors
    monkeypatch.setattr(Model, "embed", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert command("embed", *where, given=b"a")[0] == 75
    assert output.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "v.npy"]


def test_embed_finds_out_first(
    command: Any, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    code, _, errors = command(
        "embed", "--run", str(elsewhere / "llama"), "--output", str(tmp_path / "v.npy"), given=b"a"
    )
    assert code == 2 and "embed is for encoder-only models; this one is decoder-only" in errors
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))
    for output, code, says in (
        (tmp_path, 2, f"output {tmp_path} is a folder"),
        (tmp_path / "file" / "v.npy", 4, "cannot write to"),
    ):
        found = command("embed", "--run", str(elsewhere / "bare"), "--output", str(output))
        assert found[0] == code and says in found[2]
    assert command("embed", "--run", str(elsewhere / "bare"))[0] == 2  # no output


@pytest.mark.slow
def test_embed_of_a_run(command: Any, tmp_path: Path):
    config = tiny.masked(tmp_path / "run")
    loop.fit(dataclasses.replace(config, steps=1, eval_every=9, save_every=9))
    where = ("--run", str(tmp_path / "run"), "--output", str(tmp_path / "v.npy"))
    assert command("embed", *where, given=b"abc\nde")[0] == 0
    wanted = jaxformer.load(tmp_path / "run").embed(["abc", "de"])
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), wanted)


@pytest.mark.slow
def test_convert_there_and_back(command: Any, elsewhere: Path, tmp_path: Path):
    run_dir, back = str(tmp_path / "run"), str(tmp_path / "back")
    code, out, errors = command("convert", str(elsewhere / "t5"), run_dir)
    assert (code, out, errors) == (0, f"{run_dir}: a run directory\n", "")
    assert run.exists(Path(run_dir))
    code, out, _ = command("convert", run_dir, back)
    assert (code, out) == (0, f"{back}: a T5 model in Hugging Face's layout\n")
    for file in (elsewhere / "t5").iterdir():
        assert file.read_bytes() == (Path(back) / file.name).read_bytes()
    generated = [command("generate", "--run", where, given=b"abc\nde")[1]
                 for where in (str(elsewhere / "t5"), run_dir, back)]  # fmt: skip
    assert len(set(generated)) == 1
    code, _, _ = command("convert", run_dir, str(tmp_path / "mt5"), "--dtype", "bfloat16")
    assert code == 0 and jaxformer.load(tmp_path / "mt5").config.param_dtype == "bfloat16"


def test_convert_refuses(command: Any, elsewhere: Path, tmp_path: Path):
    theirs, there = str(elsewhere / "t5"), str(tmp_path / "there")
    converting.convert(theirs, tmp_path / "run")
    for arguments, code, says in (
        ((theirs, theirs), 2, "is there already and not empty"),
        ((str(tmp_path / "nowhere"), there), 4, "nowhere is no run directory"),
        ((theirs, there, "--family", "t5"), 2, "family t5 is for run directories"),
        ((str(tmp_path / "run"), there, "--family", "lama"), 2, "you mean 'llama'?"),
        ((str(tmp_path / "run"), there, "--family", "llama"), 4, "nearest is Llama, but"),
        ((theirs,), 2, "TARGET"),
    ):
        found = command("convert", *arguments)
        assert found[0] == code and says in found[2], found
        assert not Path(there).exists()


@pytest.mark.parametrize("name", ["generate", "evaluate", "embed", "convert", "tokenizer", "train"])
def test_every_command_has_help(command: Any, name: str):
    code, out, errors = command(name, "--help")
    assert (code, errors) == (0, "") and "usage: " in out


# Real processes.

WAITING = """
import io, sys, threading
from jaxformer import cli
from jaxformer.model import Model

def wait(*arguments, **options):
    print("generating", flush=True)
    threading.Event().wait()

Model.complete = wait
sys.stdin = io.TextIOWrapper(io.BytesIO(b"abc"))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_process(number: signal.Signals):
    for name in ("generate", "evaluate"):
        with tiny.start("-c", WAITING, name, *RUN) as process:
            assert process.stdout is not None and process.stdout.readline() == "generating\n"
            process.send_signal(number)
            out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (75, "")
        assert errors == f"jaxformer: stopped by {number.name}; give the same command again.\n"


PROGRAM = """
import sys

class NoTorch:  # tensorboardX would import it if it could
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError(name)

sys.meta_path.insert(0, NoTorch())
from jaxformer.cli import main

code = main(sys.argv[1:])
heavy = {"tensorflow", "tensorflow_datasets"} & sys.modules.keys()
sys.exit(f"{heavy} imported" if heavy else code)
"""


@pytest.mark.slow
def test_train_py_and_no_tensorflow(tmp_path: Path):
    file = tiny.config_file(tmp_path / "config.py", tiny.reverse(tmp_path / "elsewhere"))
    here = str(tmp_path / "run")
    options = ("--config", file, "--run_dir", here, "--metrics", "--steps")
    for program, steps in (
        ([str(tiny.ROOT / "train.py")], "2"),
        (["-c", PROGRAM, "train"], "4"),
    ):
        with tiny.start(*program, *options, steps) as process:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        assert tiny.metrics(tmp_path / "run")[-1]["step"] == int(steps)
    assert not (tmp_path / "elsewhere").exists()
    assert math.isfinite(tiny.metrics(tmp_path / "run")[-1]["eval/loss"])


@pytest.mark.slow
def test_a_broken_pipe_is_quiet():
    command = [sys.executable, "-m", "jaxformer.cli", "generate", *RUN]
    with subprocess.Popen(
        command,
        env=tiny.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(b"abc\n" * 5000)
        process.stdin.close()
        errors = process.stderr.read()
        assert process.wait(60) == 141
    assert errors == b""


def test_what_was_compiled_is_kept_where_the_user_keeps_such_things(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # to be put back as it was
    assert main(["generate", "--run", "none"]) == 4
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jaxformer" / "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert main(["generate", "--run", "none"]) == 4
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


@pytest.mark.slow
def test_a_second_process_compiles_nothing_anew(tmp_path: Path):
    """It finds on disk whatever the first one compiled, however quick that was."""
    environment = tiny.environment() | {"XDG_CACHE_HOME": str(tmp_path)}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        del environment[name]
    environment |= {"JAX_LOG_COMPILES": "1", "JAX_EXPLAIN_CACHE_MISSES": "1"}
    command = [sys.executable, "-m", "jaxformer.cli", "generate"]

    def generate() -> tuple[str, set[str], str]:
        """Its output, what has been compiled by now, and what jax said."""
        done = subprocess.run(
            [*command, "--run", str(tiny.reversing_run())],
            env=environment,
            input="abc\nde\n",
            capture_output=True,
            text=True,
            check=True,
        )
        kept = (tmp_path / "jaxformer" / "compiled").glob("*-cache")
        return done.stdout, {path.name for path in kept}, done.stderr

    missed = "PERSISTENT COMPILATION CACHE MISS"
    text, compiled, log = generate()
    assert any(name.startswith("jit__decode-") for name in compiled)
    assert f"{missed} for 'jit__decode'" in log
    again, then, log = generate()
    assert (again, then) == (text, compiled)
    assert "Persistent compilation cache hit for 'jit__decode'" in log and missed not in log
