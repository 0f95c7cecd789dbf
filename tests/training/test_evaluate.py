"""What evaluation shows and scores is what the model writes."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxformer.config import DataConfig
from jaxformer.data.sources import Example
from jaxformer.data.tokenizer import N_SPECIAL, SymbolTokenizer
from jaxformer.training.evaluate import Sample, evaluate_text, samples, spaced
from jaxformer.training.stopping import StopRequest

LETTERS = SymbolTokenizer(tuple("abcdefghijklm"), "")


def echo(task: str, logits: Any = None) -> Any:
    """A model that continues any text with it in capitals."""
    return SimpleNamespace(
        config=SimpleNamespace(max_length=32),
        data=DataConfig(task=task, buckets=(16,)),
        tokenizer=LETTERS,
        generate=lambda texts: [text.upper() for text in texts],
        logits=logits,
    )


def test_each_prediction_meets_its_own_reference():
    examples = [Example(text, (text.upper(),)) for text in ("a", "b", "c", "d", "e", "f")]
    examples[4] = Example("e", ("x", "y"))
    model = echo("seq2seq")
    model.defaults = SimpleNamespace(batch_size=1)
    scores, predictions = evaluate_text(model, examples * 3, ("wer",), StopRequest())
    assert predictions == list("ABCDEF" * 3) and scores == {"eval/wer": pytest.approx(100 / 6)}
    assert evaluate_text(model, examples, (), StopRequest()) == ({}, [])


def test_three_samples_evenly_spaced():
    examples = [Example(f"s{i}", (f"t{i}", "other")) for i in range(7)]
    assert samples(echo("seq2seq"), examples, []) == [
        Sample(f"s{i}", f"S{i}", f"t{i}") for i in (0, 3, 6)
    ]
    # What was generated already is not generated again.
    shown = samples(echo("seq2seq"), examples, [f"p{i}" for i in range(7)])
    assert [sample.prediction for sample in shown] == ["p0", "p3", "p6"]
    assert spaced(examples, 0) == []


def test_a_document_is_continued():
    text = " ".join(f"w{i}" for i in range(30))
    (sample,) = samples(echo("lm"), [Example("", (text,))], [])
    words = text.split()
    assert sample.source == "w0 w1 w2" and sample.prediction == "W0 W1 W2"
    assert sample.reference.split() == words[3:20]


def test_masked_tokens_are_filled_in():
    """Every fifth token, of which the model is given all the others and says b."""
    seen = []

    def logits(batch: Any) -> np.ndarray:
        seen.append(batch)
        return np.eye(LETTERS.vocab_size)[np.full(batch.labels.shape, N_SPECIAL + 1)]

    (sample,) = samples(echo("mlm", logits), [Example("", ("abcdefghijklm",))], [])
    assert sample == Sample("ab_defg_ijkl_", "b b b", "c h m")
    (batch,) = seen
    hidden = batch.source.ids[0] == LETTERS.mask_id
    assert (
        np.flatnonzero(hidden).tolist() == np.flatnonzero(batch.weights[0]).tolist() == [2, 7, 12]
    )
    assert LETTERS.decode(batch.source.ids[0][~hidden]) == re.sub("[chm]", "", "abcdefghijklm")
    assert batch.source.seg[0].tolist() == [1] * 14 + [0, 0]
    assert batch.source.pos[0].tolist() == [*range(14), 0, 0]
