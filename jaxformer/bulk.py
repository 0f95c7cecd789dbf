"""Batch inference: a file of records in, a folder of shards out, whatever happens in between.

A shard is computed from its own rows alone, so that a job which was killed goes on where it was,
and no one can tell. Several processes share the shards, and need not talk.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxformer import sharding, shards
from jaxformer.config import BulkConfig, DecodeConfig, DType, MeshConfig, to_json
from jaxformer.data import records
from jaxformer.data.records import Layout, Record, Survey
from jaxformer.files import replacing, writing
from jaxformer.loading import load
from jaxformer.model import Generated, Model
from jaxformer.progress import Progress
from jaxformer.training.checkpoint import lock


class Piece(NamedTuple):
    """A prompt, and the record of the shard that it is of."""

    record: int
    ids: list[int]


def generate(
    run: str,
    bulk: BulkConfig,
    decode: DecodeConfig,
    *,
    step: int | None = None,
    dtype: DType | None = None,
    chat: bool = False,
    hypotheses: bool = False,
    draft: str = "",
    int8: bool = False,
) -> None:
    """Write what the model of `run` generates from `bulk.input` to the folder `bulk.output`, or go
    on with it where it stopped, on all devices of this process.

    `hypotheses` writes all n_best with their scores; the model of `draft` guesses ahead. `step` and
    `dtype` and `int8` are those of `load`. Raises
    `DataError` for the input, and `CheckpointError` if the folder is of another job.
    """
    if bulk.distributed:
        jax.distributed.initialize()
    index, processes = jax.process_index(), jax.process_count()
    output, name = Path(bulk.output), bulk.output_field
    with contextlib.ExitStack() as stack:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        if index == 0:
            stack.enter_context(lock(output))
        layout = _layout(bulk, hypotheses)
        found = records.survey(layout, strict=bulk.on_bad_record == "fail")
        plan = _plan(layout, found, bulk, decode, chat, hypotheses)
        shards.check_same(output, plan)
        devices = jax.local_devices()
        mesh = sharding.make_mesh(MeshConfig(), devices) if len(devices) > 1 else None
        model = load(run, step, dtype=dtype, mesh=mesh, int8=int8)
        small = load(draft, dtype=dtype, mesh=mesh, int8=int8) if draft else None
        plan = {"checkpoint": fingerprint(model), **plan}
        shards.check_same(output, plan)
        shards.claim(output, plan, index)

        paths = [output / shard["file"] for shard in plan["shards"]]
        own = range(index, len(paths), processes)
        sizes = {n: plan["shards"][n]["rows"] for n in own}
        there = [n for n in own if paths[n].exists()]
        progress = Progress(sum(sizes.values()), sum(sizes[n] for n in there))
        stack.enter_context(progress)
        progress.say(
            f"{bulk.input!r}: {found.rows:,} rows in {len(paths)} shards"
            + (f", {len(own)} of them here" if processes > 1 else "")
            + (f", {len(there)} written already" if there else "")
        )
        wrong = skipped = 0
        for n in own:
            if n in there:
                continue
            rows = records.read(layout, found, n)
            kept = [r for r in rows if not (r.error and bulk.on_bad_record == "skip")]
            skipped += len(rows) - len(kept)
            fields = _generate(model, kept, bulk, decode, chat, hypotheses, progress.advance, small)
            wrong += sum(f"{name}_error" in each for each in fields)
            progress.advance(len(rows) - len(kept), 0)
            with writing(output), replacing(paths[n]) as file:
                records.write(layout, file, kept, fields)
        while not all(path.exists() for path in paths):
            time.sleep(0.5)  # whoever leaves first would take the others' coordinator along
        progress.say(
            f"{bulk.output!r}: {progress.note()}; {wrong:,} with an error, {skipped:,} left out"
        )


def _layout(bulk: BulkConfig, hypotheses: bool) -> Layout:
    source, name = Path(bulk.input), bulk.output_field
    added = [name, *([f"{name}_hypotheses"] if hypotheses else []), f"{name}_error", f"{name}_note"]
    return Layout(source, records.kind_of(source), bulk.field, tuple(added), bulk.shard_rows)


def _plan(
    layout: Layout,
    found: Survey,
    bulk: BulkConfig,
    decode: DecodeConfig,
    chat: bool,
    hypotheses: bool,
) -> dict[str, Any]:
    """What the shards are made of, and which rows each is of."""
    settings = {
        **dataclasses.asdict(bulk),
        **{f"decode.{key}": value for key, value in dataclasses.asdict(decode).items()},
        "kind": layout.kind,
        "chat": chat,
        "hypotheses": hypotheses,
    }
    for where in ("input", "output", "distributed"):  # these may change
        del settings[where]
    suffix = ".parquet" if layout.kind == "parquet" else ".jsonl"
    return {
        "input": {"sha256": found.sha256, "bytes": found.size, "rows": found.rows},
        "settings": {key: _short(value) for key, value in settings.items()},
        "shards": shards.ranges(found.rows, bulk.shard_rows, suffix),
    }


def _short(value: Any) -> Any:
    """A setting as JSON has it; of one as long as a list of allowed texts, only its digest."""
    text = json.dumps(value)
    if len(text) <= 500:
        return json.loads(text)
    return f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"


def _generate(
    model: Model,
    rows: Sequence[Record],
    bulk: BulkConfig,
    decode: DecodeConfig,
    chat: bool,
    hypotheses: bool,
    advance: Callable[[int, int], None],
    draft: Model | None = None,
) -> list[dict[str, Any]]:
    """The fields to be added to each record; `advance` is told of rows and tokens."""
    name = bulk.output_field
    fields: list[dict[str, Any]] = [{name: ""} for _ in rows]
    pieces: list[Piece] = []
    for i, record in enumerate(rows):
        if record.error:
            fields[i][f"{name}_error"] = record.error
        elif record.text.strip():  # an empty line keeps its row, empty
            mine, note = _fitted(model, record.text, bulk.on_too_long, chat)
            pieces += [Piece(i, ids) for ids in mine]
            if note:
                fields[i][f"{name}_note"] = note
    left = [0] * len(rows)
    for piece in pieces:
        left[piece.record] += 1
    advance(left.count(0), 0)

    def count(found: dict[int, Generated]) -> None:
        finished = tokens = 0
        for at, result in found.items():
            record = pieces[at].record
            left[record] -= 1
            finished += left[record] == 0
            tokens += sum(len(h.ids) for h in result.hypotheses)
        advance(finished, tokens)

    keys = [rows[piece.record].row for piece in pieces]
    prompts = [piece.ids for piece in pieces]
    results = model.complete(prompts, decode, row_ids=keys, draft=draft, advance=count)
    parts: list[list[Generated]] = [[] for _ in rows]
    for piece, result in zip(pieces, results, strict=True):
        parts[piece.record].append(result)
    for mine, field in zip(parts, fields, strict=True):
        if mine and mine[0].error:
            field[f"{name}_error"] = mine[0].error
        elif mine:
            field[name] = " ".join(r.hypotheses[0].text for r in mine)
            if hypotheses and len(mine) == 1:
                field[f"{name}_hypotheses"] = [h.record() for h in mine[0].hypotheses]
    return fields


def _fitted(model: Model, text: str, how: str, chat: bool) -> tuple[list[list[int]], str]:
    """What the model is given of a text, and a note if that is not the whole at once."""

    def encode(text: str) -> list[int]:
        if chat:
            return list(model.tokenizer.chat([{"role": "user", "content": text}]))
        return list(model.prompt(text))

    whole = encode(text)
    if how == "error" or not model.too_long(whole):
        return [whole], ""  # of one that is too long, its error comes back
    parts = [encode(part) for part in cut(text, lambda part: not model.too_long(encode(part)))]
    if not parts:  # nothing of it fits
        return [whole], ""
    if how == "truncate":
        return parts[:1], "truncated"
    return parts, f"in {len(parts)} chunks"


def cut(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """`text` in parts that fit, each as long as may be, at white space where there is some.

    Ends early where not even one character fits.

    >>> list(cut("to be or not", lambda part: len(part) <= 5))
    ['to be', 'or', 'not']
    """
    text = text.strip()
    while text:
        low, high = 0, 16  # the longest known to fit, the shortest known not to
        while high < len(text) and fits(text[:high]):
            low, high = high, 2 * high
        if high >= len(text) and fits(text):
            yield text
            return
        high = min(high, len(text))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(text[:middle]) else (low, middle)
        if low == 0:
            return
        part = text[:low]
        whole = text[low - 1].isspace() or text[low].isspace()
        if not whole and (words := part.rsplit(None, 1))[1:] and fits(words[0]):
            part = words[0]
        yield part.rstrip()
        text = text[len(part) :].lstrip()


def fingerprint(model: Model) -> dict[str, str]:
    """A SHA-256 digest of all that the model computes with: its architecture, every byte of its
    parameters as they were loaded, its tokenizer, and how its texts are written."""
    digest = hashlib.sha256()
    for part in (to_json(model.config), to_json(model.data), model.tokenizer.hash):
        digest.update(part.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(sharding.fetch(leaf).tobytes())
    return {"sha256": digest.hexdigest(), "of": "config, parameters, tokenizer, data options"}
