"""Batch inference: order, faults, and that being killed leaves no trace."""

import dataclasses
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxformer
from jaxformer import bulk, sharding, shards
from jaxformer.cli import main
from jaxformer.config import BulkConfig, DecodeConfig, MeshConfig
from jaxformer.data import records
from jaxformer.errors import CheckpointError, ConfigError, DataError
from jaxformer.files import MAX_JSON
from jaxformer.model import Hypothesis, Model

pytestmark = [
    pytest.mark.usefixtures("_compiled"),
    pytest.mark.slow,  # each trains, or decodes many texts
]
DECODE = DecodeConfig(samples=2, n_best=2, max_length=8, batch_size=2, seed=3)


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> Iterator[None]:
    with tiny.shared_compilation():
        yield


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxformer.load(tiny.reversing_run())


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch):
    """Quicker than the eight that tests have, but where a test asks for them."""
    devices = sharding.jax.local_devices()
    monkeypatch.setattr(bulk.jax, "local_devices", lambda: devices[:1])


def run(source: Path, output: Path, decode: DecodeConfig = DECODE, **options: Any) -> None:
    chosen = {"shard_rows": 3, **options}
    hypotheses = chosen.pop("hypotheses", False)
    bulk.generate(
        str(tiny.reversing_run()),
        BulkConfig(input=str(source), output=str(output), **chosen),
        decode,
        hypotheses=hypotheses,
    )


def rows(output: Path) -> list[dict[str, Any]]:
    lines = [path.read_text().splitlines() for path in sorted(output.glob("part-*.jsonl"))]
    return [json.loads(line) for part in lines for line in part]


def contents(output: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in output.iterdir() if p.name != "lock"}


WORDS = [word for word in tiny.words() if word][:11]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    lines = [f'{{"id": {i}.50, "text": "{w}",  "x": [1e999]}}' for i, w in enumerate(WORDS)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_records_in_order_and_all_that_was_in_them(model: Model, words: Path, tmp_path: Path):
    run(words, tmp_path / "out", hypotheses=True)
    wanted = model.hypotheses(WORDS, DECODE)
    assert len({r.hypotheses[0].text for r in wanted}) > 5
    found = rows(tmp_path / "out")
    assert [list(row) for row in found] == [["id", "text", "x", "output", "output_hypotheses"]] * 11
    for i, (row, result) in enumerate(zip(found, wanted, strict=True)):
        assert (row["id"], row["text"]) == (i + 0.5, WORDS[i])
        assert row["output"] == result.hypotheses[0].text
        ids = [list(h.ids) for h in result.hypotheses]
        assert [h["ids"] for h in row["output_hypotheses"]] == ids
    first = (tmp_path / "out" / "part-00000-of-00004.jsonl").read_text().splitlines()[0]
    assert first.startswith(words.read_text().splitlines()[0][:-1] + ', "output": ')
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [(s["first_row"], s["rows"]) for s in manifest["shards"]] == [
        (0, 3), (3, 3), (6, 3), (9, 2),
    ]  # fmt: skip
    assert manifest["input"]["rows"] == 11 and len(manifest["checkpoint"]["sha256"]) == 64


@settings(max_examples=30)
@given(
    texts=st.lists(st.text("ab ", max_size=40), max_size=12),
    shard_rows=st.integers(1, 5),
    batch_size=st.integers(1, 3),
    how=st.sampled_from(["truncate", "chunk", "error"]),
)
def test_any_lengths_in_any_shards_keep_their_order(
    texts: list[str], shard_rows: int, batch_size: int, how: Any
):
    """Against a model that says what it read."""

    class Echo:
        copies = 1
        prompt = staticmethod(list)
        too_long = staticmethod(lambda ids: "long" if len(ids) > 10 else "")

        @staticmethod
        def complete(prompts: Any, decode: Any, row_ids: Any, draft: Any, advance: Any):
            assert draft is None and len(row_ids) == len(prompts)
            found = [
                bulk.Generated((), "long")
                if len(ids) > 10
                else bulk.Generated((Hypothesis("".join(ids), 0.0, 0.0, (1,), "eos"),))
                for ids in prompts
            ]
            for first in range(0, len(found), batch_size):  # as they come
                advance(dict(enumerate(found[first : first + batch_size], first)))
            return found

    done: list[tuple[int, int]] = []
    options = BulkConfig(input="x", output="y", on_too_long=how, shard_rows=shard_rows)
    found = []
    for start in range(0, len(texts), shard_rows):
        some = texts[start : start + shard_rows]
        rows = [records.Record(start + i, text, "", "{}") for i, text in enumerate(some)]
        decode = DecodeConfig(batch_size=batch_size)
        found += bulk._generate(
            Echo(),  # pyright: ignore
            rows, options, decode, False, False, lambda r, t: done.append((r, t)),
        )  # fmt: skip
    assert sum(r for r, _ in done) == len(texts) == len(found)
    for text, field in zip(texts, found, strict=True):
        if not text.strip():
            assert field == {"output": ""}
        elif len(text) <= 10:
            assert field == {"output": text}
        elif how == "error":
            assert field == {"output": "", "output_error": "long"}
        elif how == "chunk":
            if len(text.strip()) > 10:
                assert field["output_note"].endswith("chunks")
            assert field["output"].replace(" ", "") == text.replace(" ", "")
        else:
            assert field["output_note"] == "truncated"
            assert text.strip().startswith(field["output"]) and 0 < len(field["output"]) <= 10


@given(text=st.text("ab \n", max_size=60), most=st.integers(1, 12))
def test_parts_fit_and_are_the_whole(text: str, most: int):
    parts = list(bulk.cut(text, lambda part: len(part) <= most))
    assert all(0 < len(part) <= most for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())
    if all(len(word) <= most for word in text.split()):
        assert " ".join(parts).split() == text.split()
    assert list(bulk.cut(text, lambda part: False)) == []


class Killed(BaseException):
    pass


def test_gone_on_with_it_is_as_if_never_stopped(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(words, tmp_path / "whole")
    complete = Model.complete
    calls = {"left": 0}

    def stopping(self: Model, *arguments: Any, **named: Any):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise Killed
        return complete(self, *arguments, **named)

    monkeypatch.setattr(Model, "complete", stopping)
    for before in (0, 1, 1, 1):
        calls["left"] = before
        with pytest.raises(Killed):
            run(words, tmp_path / "out")
        (tmp_path / "out" / ".part-00003-of-00004.jsonl.tmp").write_bytes(b"half a li")
    calls["left"] = 99
    run(words, tmp_path / "out")
    assert calls["left"] == 98  # only the shard that was not there yet
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = calls["left"]
    run(words, tmp_path / "out")  # all there
    assert calls["left"] == again


def test_another_job_is_refused(words: Path, tmp_path: Path):
    output = tmp_path / "out"
    run(words, output)
    before = contents(output)
    options: dict[str, Any]
    for options, says in (
        ({"decode": dataclasses.replace(DECODE, seed=4)}, "settings.decode.seed: 3 there, 4 now"),
        ({"shard_rows": 4}, "settings.shard_rows: 3 there, 4 now"),
        ({"on_too_long": "chunk"}, "settings.on_too_long: 'error' there, 'chunk' now"),
    ):
        with pytest.raises(CheckpointError, match=says):
            run(words, output, **options)
    words.write_text(words.read_text().replace("1.50", "1.51"))
    with pytest.raises(CheckpointError, match="input.sha256"):
        run(words, output)
    words.write_text(words.read_text().replace("1.51", "1.50"))
    run(words, output)
    with pytest.raises(CheckpointError, match="checkpoint.sha256"):
        bulk.generate(
            str(tiny.reversing_run()),
            BulkConfig(input=str(words), output=str(output), shard_rows=3),
            DECODE,
            step=5,
        )
    assert contents(output) == before
    (output / "manifest.json").write_text("[")
    with pytest.raises(CheckpointError, match="damaged"):
        run(words, output)
    (output / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no job of this command"):
        run(words, output)


def test_a_long_list_of_allowed_texts_is_kept_as_its_digest(words: Path, tmp_path: Path):
    letters = [f"{a}{b}{c}" for a in "abcde" for b in "abcde" for c in "abcde"]
    decode = DecodeConfig(max_length=8, batch_size=2, allowed=tuple(letters))
    run(words, tmp_path / "out", decode)
    assert {row["output"] for row in rows(tmp_path / "out")} <= set(letters)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["decode.allowed"].startswith("SHA-256 ")
    with pytest.raises(CheckpointError, match="settings.decode.allowed: 'SHA-256 .* now"):
        run(words, tmp_path / "out", dataclasses.replace(decode, allowed=(*letters, "e")))


def test_the_fingerprint_is_of_every_parameter(model: Model):
    whole = bulk.fingerprint(model)
    leaves, tree = sharding.jax.tree.flatten(model.params)
    for i in range(len(leaves)):
        leaf = np.array(leaves[i])
        leaf.flat[-1] = np.nextafter(leaf.flat[-1], np.float32(9))
        params = tree.unflatten([*leaves[:i], leaf, *leaves[i + 1 :]])
        assert bulk.fingerprint(dataclasses.replace(model, params=params)) != whole
    data = dataclasses.replace(model.data, prefix="x")
    assert bulk.fingerprint(dataclasses.replace(model, data=data)) != whole
    assert bulk.fingerprint(model) == whole


BAD = b"""\xef\xbb\xbf{"text": "abc"}

{"text": "ab
{"text": "\xff"}
{"text": "a\\u0000"}
{"text": 5, "id": 7}
[1]
{"txt": "a"}
{"text": "a", "output": "b"}
{"text": "abcdeabcdeabcdeabcde"}
{"text": "cde"}"""


def test_bad_records(model: Model, tmp_path: Path):
    source, output = tmp_path / "bad.jsonl", tmp_path / "out"
    source.write_bytes(BAD)
    with pytest.raises(DataError, match=r"bad.jsonl:3: not JSON .* --on_bad_record skip"):
        run(source, output)
    assert not list(output.glob("*.json*"))
    run(source, output, on_bad_record="emit")
    found = rows(output)
    says = ["", "", "not JSON", "not UTF-8", "without NUL", "must be a string", "not a JSON",
            "no field 'text', only 'txt'", "has a field 'output'", "at most 16", ""]  # fmt: skip
    assert len(found) == len(says) == 11
    for n, (row, said) in enumerate(zip(found, says, strict=True), 1):
        assert ("output_error" in row) == bool(said), row
        if said:
            assert said in row["output_error"] and row["output"] == ""
            assert n == 10 or f"{source}:{n}: " in row["output_error"]
    assert found[1] == {"output": ""} and found[5]["id"] == 7
    for i, word in ((0, "abc"), (10, "cde")):
        assert found[i]["output"] == model.hypotheses([word], DECODE, i)[0].hypotheses[0].text
    run(source, tmp_path / "skipped", on_bad_record="skip")
    kept = [row for row, said in zip(found, says, strict=True) if not said or "16" in said]
    assert rows(tmp_path / "skipped") == kept
    assert len(list((tmp_path / "skipped").glob("part*"))) == 4  # though one has no rows


def test_too_long_is_cut_as_asked(model: Model, tmp_path: Path):
    source = tmp_path / "long.txt"
    source.write_text("abc\n" + "abcde " * 5 + "\n\nde")
    for how, note in (("truncate", "truncated"), ("chunk", "in 3 chunks")):
        run(source, tmp_path / how, on_too_long=how, hypotheses=True)
        found = rows(tmp_path / how)
        assert [row.get("output_note") for row in found] == [None, note, None, None]
        parts = ["abcde abcde", "abcde abcde", "abcde"][: 1 if how == "truncate" else 3]
        best = [model.hypotheses([part], DECODE, 1)[0].hypotheses[0].text for part in parts]
        assert found[1]["output"] == " ".join(best)
        assert found[2] == {"text": "", "output": ""}
        assert ("output_hypotheses" in found[1]) == (how == "truncate")


def test_parquet_in_and_out(model: Model, tmp_path: Path, words: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [*WORDS[:5], None, "", "a" * 30]
    table = pa.table({"n": pa.array(range(8), pa.uint8()), "text": pa.array(texts, pa.string())})
    source, output = tmp_path / "words.parquet", tmp_path / "out"
    pq.write_table(table, source, row_group_size=2)
    with pytest.raises(DataError, match="row 6: field 'text' is None"):
        run(source, output)
    run(source, output, on_bad_record="emit", hypotheses=True)
    found = pa.concat_tables([pq.read_table(p) for p in sorted(output.glob("*.parquet"))])
    assert found.schema.field("n").type == pa.uint8()
    assert found.column("n").to_pylist() == list(range(8))
    assert found.column("text").to_pylist() == texts
    wanted = [r.hypotheses[0].text for r in model.hypotheses(WORDS[:5], DECODE)]
    assert found.column("output").to_pylist() == [*wanted, "", "", ""]
    errors = found.column("output_error").to_pylist()
    assert [bool(e) for e in errors] == [False] * 5 + [True, False, True]
    assert json.loads(found.column("output_hypotheses")[0].as_py())[0]["text"] == wanted[0]
    run(source, tmp_path / "skip", on_bad_record="skip", shard_rows=1)
    kept = [
        pq.read_table(p).column("n").to_pylist()
        for p in sorted((tmp_path / "skip").glob("*.parquet"))
    ]
    assert kept == [[0], [1], [2], [3], [4], [], [6], [7]]
    for damaged in (b"PAR1" + b"x" * 40 + b"PAR1", source.read_bytes()[:-9], b""):
        (tmp_path / "bad.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match="no sound Parquet"):
            run(tmp_path / "bad.parquet", tmp_path / "bad")
    with pytest.raises(DataError, match="no column 'txt', only 'n', 'text'"):
        run(source, tmp_path / "bad", field="txt")


def test_columns_that_stand_twice_are_told(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="two columns 'text'; rename one"):
        run(tmp_path / "x.parquet", tmp_path / "out")


def test_no_more_shards_than_a_manifest_holds():
    most = shards.ranges(shards.MOST, 1, ".parquet")
    assert len(json.dumps({"shards": most}, indent=1)) < MAX_JSON - 2**20
    assert len(shards.ranges(shards.MOST + 1, 2, ".jsonl")) == shards.MOST // 2 + 1
    with pytest.raises(ConfigError, match="raise it to 2 or more"):
        shards.ranges(shards.MOST + 1, 1, ".jsonl")


def test_what_is_written_does_not_cover_what_is_read():
    for field in ("output", "output_error", "output_note", "output_hypotheses"):
        with pytest.raises(ConfigError, match="would be written over"):
            BulkConfig(input="x", output="y", field=field)


def test_without_pyarrow_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[parquet\]\""):
        run(tmp_path / "x.parquet", tmp_path / "out")


def test_a_file_that_changes_meanwhile_is_refused(words: Path):
    layout = records.Layout(words, "jsonl", "text", ("output",), 3)
    found = records.survey(layout, strict=True)
    assert [r.row for r in records.read(layout, found, 3)] == [9, 10]
    words.write_text(words.read_text() + "{}\n")
    with pytest.raises(DataError, match="has changed"):
        records.read(layout, found, 3)


def test_a_line_too_long_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "MOST", 8)
    path = tmp_path / "x.txt"
    path.write_bytes(b"1234567\n" + b"a" * 8 + b"\n" + b"a" * 40 + b"\nb\n12345678")
    layout = records.Layout(path, "text", "text", (), 2)
    found = records.survey(layout, strict=False)
    read = [record for shard in range(3) for record in records.read(layout, found, shard)]
    assert [r.text for r in read] == ["1234567", "", "", "b", "12345678"]
    assert [bool(r.error) for r in read] == [False, True, True, False, False]
    with pytest.raises(DataError, match=":2: a line of over 8 bytes"):
        records.survey(layout, strict=True)


def test_devices_share_the_rows(model: Model):
    """Copies of the model on two devices find what one does, at once or one after the other."""
    mesh = sharding.make_mesh(MeshConfig(), sharding.jax.devices()[:2])
    spread = jaxformer.load(tiny.reversing_run(), mesh=mesh)
    assert (model.copies, spread.copies) == (1, 2)
    for size in (2, 4):
        way = dataclasses.replace(DECODE, batch_size=size)
        for one, other in zip(
            model.hypotheses(WORDS, way), spread.hypotheses(WORDS, way), strict=True
        ):
            assert [h.ids for h in one.hypotheses] == [h.ids for h in other.hypotheses]
            assert other.hypotheses[0].score == pytest.approx(one.hypotheses[0].score, abs=1e-4)
    assert sharding.copies(dict(a=np.zeros(3))) is None


# As a command.


def command(*arguments: str, given: bytes = b"") -> int:
    sys.stdin = io.TextIOWrapper(io.BytesIO(given))
    try:
        return main(["generate", "--run", str(tiny.reversing_run()), *arguments])
    finally:
        sys.stdin = sys.__stdin__


def test_the_command(words: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch):
    options = ("--input", str(words), "--max_length", "8", "--shard_rows", "4")
    assert command(*options, "--output", str(tmp_path / "out")) == 0
    out, errors = capfd.readouterr()
    assert out == "" and "11 rows in 3 shards" in errors and "rows/s" in errors
    assert len(rows(tmp_path / "out")) == 11
    assert command("--shard_rows", "3", given=b"") == 2
    assert "name one" in capfd.readouterr()[1]
    assert command("--output", str(tmp_path / "x")) == 2
    assert command("--input", str(tmp_path), "--output", str(tmp_path / "x")) == 3
    assert command(*options, "--output", "/proc/x") == 4
    assert "cannot write to /proc/x" in capfd.readouterr()[1]
    text = tmp_path / "words.txt"
    text.write_text("ab\nde\n")
    assert command("--input", str(text)) == 0
    assert len(capfd.readouterr()[0].splitlines()) == 2
    for number in (signal.SIGTERM, signal.SIGINT):
        monkeypatch.setattr(Model, "complete", lambda *_, n=number, **__: signal.raise_signal(n))
        assert command(*options, "--output", str(tmp_path / number.name)) == 75
        assert f"stopped by {number.name}; give the same command" in capfd.readouterr()[1]


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path):
    source = tmp_path / "words.txt"
    source.write_text("\n".join(tiny.words() * 8))
    options = ["-m", "jaxformer.cli", "generate", "--run", str(tiny.reversing_run()),
               "--input", str(source), "--max_length", "8", "--samples", "2", "--json",
               "--shard_rows", "10", "--batch_size", "2", "--output"]  # fmt: skip

    def finished(process: "subprocess.Popen[str]") -> int:
        process.communicate(timeout=240)
        return process.returncode

    assert finished(tiny.start(*options, str(tmp_path / "whole"))) == 0
    draw, kills, code = np.random.default_rng(0), 0, -9
    while code:
        process = tiny.start(*options, str(tmp_path / "out"))
        begun = len(list((tmp_path / "out").glob("part*")))
        while process.poll() is None and len(list((tmp_path / "out").glob("part*"))) < begun + 15:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        code = finished(process)
        kills += code != 0
    assert kills >= 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_shards(tmp_path: Path):
    source = tmp_path / "words.txt"
    source.write_text("\n".join(tiny.words()))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = ["-m", "jaxformer.cli", "generate", "--run", str(tiny.reversing_run()),
               "--input", str(source), "--max_length", "8", "--shard_rows", "7"]  # fmt: skip
    slurm = {"JAX_COORDINATOR_ADDRESS": address, "SLURM_JOB_ID": "1", "SLURM_NTASKS": "2",
             "SLURM_STEP_NODELIST": "localhost"}  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, *options, "--output", str(tmp_path / "two"), "--distributed"],
            env=tiny.environment() | slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "8 shards, 4 of them here" in said[0]
    run(source, tmp_path / "one", DecodeConfig(max_length=8, batch_size=1), shard_rows=7)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
