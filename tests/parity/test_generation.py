"""Random ways to generate, token for token as transformers does, scores and order of all beams."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import reference  # noqa: E402
from checkpoints import CHECKPOINTS  # noqa: E402

import jaxformer  # noqa: E402
from jaxformer.config import DecodeConfig  # noqa: E402
from jaxformer.converting import their_generation  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

BEAMS, DRAWS = 4, 9
KINDS = {"encoder-decoder": "T5 v1.0", "decoder-only": "SmolLM, tied"}
# What is compiled for each; the numbers are drawn. "words", "bias" and "first" stand for the ids of
# what the model says of itself.
GREEDY: tuple[dict[str, Any], ...] = (
    dict(repetition_penalty=True),
    dict(no_repeat_ngram=1, repetition_penalty=True),
    dict(no_repeat_ngram=3, encoder_no_repeat_ngram=2, bias=True),
    dict(words=True, length_decay=True, last=True),
)
SEARCHES: tuple[dict[str, Any], ...] = (
    dict(early_stopping="exact"),
    dict(early_stopping="heuristic"),
    dict(early_stopping="full"),
    dict(early_stopping="exact", repetition_penalty=True, length_decay=True),
    dict(early_stopping="heuristic", no_repeat_ngram=2, repetition_penalty=True, last=True),
    dict(early_stopping="full", no_repeat_ngram=3, encoder_no_repeat_ngram=1, words=True),
    dict(early_stopping="heuristic", words=True, bias=True, first=True),
    dict(early_stopping="full", length_decay=True, bias=True, first=True, last=True),
)


class Pair(NamedTuple):
    """One model in two libraries, what both read, and what it says when nothing is asked of it."""

    theirs: Any
    ours: jaxformer.Model
    rows: list[list[int]]
    said: list[tuple[int, ...]]


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def pair(request, tmp_path_factory) -> Pair:
    transformers.logging.set_verbosity_error()
    (checkpoint,) = (each for each in CHECKPOINTS if each.name == request.param)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    theirs = reference.make(checkpoint)
    reference.save(checkpoint, theirs, folder)
    ours = jaxformer.load(folder)
    rng = np.random.default_rng(1)
    rows = [rng.integers(3, 58, n).tolist() for n in (16, 12, 9, 2)]
    greedy = dataclasses.replace(ours.defaults, beams=1, max_length=12)
    said = [each.hypotheses[0].ids for each in ours.complete(rows, greedy)]
    return Pair(theirs, ours, rows, said)


def drawn(pair: Pair, beams: int, asked: dict[str, Any], seed: int) -> DecodeConfig:
    """A way to generate with what is asked for on; only the numbers depend on the seed."""
    rng = np.random.default_rng(seed)
    asked = dict(asked)
    options: dict[str, Any] = dict(
        beams=beams, n_best=beams, suppress=(pair.theirs.config.pad_token_id,),
        length_norm="plain", length_penalty=float(rng.choice([-1.5, -0.3, 0, 0.6, 1, 2.5])),
        max_length=int(rng.integers(8, 13)), min_length=int(rng.choice([0, 2, 7])),
    )  # fmt: skip
    flat = [i for ids in pair.said for i in ids]
    pairs = [tuple(ids[i : i + 2]) for ids in pair.said for i in (1, 3)]
    if asked.pop("words", False):
        options |= dict(bad_ids=(*pairs, (flat[0],), tuple(pair.said[2][:3]), (90, 91, 92, 93)))
    if asked.pop("bias", False):
        options |= dict(logit_bias=tuple((i, float(rng.normal(0, 2))) for i in {*flat[:9], 60, 61}))
    if asked.pop("first", False) and pair.theirs.config.is_encoder_decoder:
        options |= dict(forced_first=61)
    if asked.pop("last", False):
        options |= dict(forced_last=pair.theirs.generation_config.eos_token_id)
    if asked.pop("repetition_penalty", False):
        options |= dict(repetition_penalty=float(rng.choice([0.7, 1.2, 2.0])))
    if asked.pop("length_decay", False):
        options |= dict(length_decay=float(rng.choice([0.9, 1.05, 1.3])),
                        length_decay_start=int(rng.integers(0, 6)))  # fmt: skip
    return DecodeConfig(**options, **asked)


@pytest.mark.parametrize(
    ("beams", "asked"),
    [*((1, asked) for asked in GREEDY), *((BEAMS, asked) for asked in SEARCHES)],
    ids=lambda x: (
        "-".join(str(k if v is True else v) for k, v in x.items())
        if isinstance(x, dict)
        else str(x)
    ),
)
def test_generates_the_same(pair: Pair, beams: int, asked: dict[str, Any]):
    found = set()
    for seed in range(DRAWS):
        options = drawn(pair, beams, asked, seed)
        wanted, scores = reference.generate(
            pair.theirs, pair.rows, beams, their_generation(options)
        )
        results = [each.hypotheses for each in pair.ours.complete(pair.rows, options)]
        assert [[h.ids for h in row] for row in results] == wanted, options
        np.testing.assert_allclose(
            [[h.score for h in row] for row in results], scores, rtol=0, atol=1e-4
        )
        found.add(tuple(row[0].ids for row in results))
    assert len(found) > 1 and tuple(pair.said) not in found  # what is asked for has its effect
