"""Scores whose values are known."""

import pytest

from jaxformer.training.metrics import METRICS, bleu, bleu_signature, chrf, exact, per, rouge, wer


def test_exact_and_wer():
    predictions = ["a b", " a b\n", "A b", ""]
    references = [["a b"], ["x", "a b"], ["a b"], ["a"]]
    assert exact(predictions, references) == 50
    assert wer(predictions, references) == 50
    assert exact([""], [[""]]) == 100


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        ("a b c d", ["a b c d"], 0),
        ("a x c d", ["a b c d"], 25),  # replaced
        ("a c d", ["a b c d"], 25),  # left out
        ("a b b c d", ["a b c d"], 25),  # put in
        ("", ["a b c d"], 100),
        ("a b c d", ["a b"], 100),
        ("x", ["a b c d", "x y"], 50),  # the nearest counts
        ("a b", [""], 200),  # what should not be there, over a length of at least 1
        ("", [""], 0),
    ],
)
def test_per_of_one(prediction, references, expected):
    assert per([prediction], [references]) == expected


def test_per_is_of_the_corpus():
    # 1 of 2 and 0 of 6: not the mean of 50% and 0%.
    assert per(["a", "a b c d e f"], [["a b"], ["z", "a b c d e f"]]) == 12.5
    # The nearest by rate, not by count: 2 of 3 rather than 1 of 1.
    assert per(["a"], [["x", "a b c"]]) == pytest.approx(200 / 3)


SENTENCE = "the cat sat on the mat today"


def test_bleu_and_chrf_of_known_values():
    assert bleu([SENTENCE], [[SENTENCE]]) == pytest.approx(100)
    assert chrf([SENTENCE], [[SENTENCE]]) == pytest.approx(100)
    # Papineni et al. 2002: precisions 6/7, 5/6, 4/5, 3/4 and no brevity penalty.
    changed = SENTENCE.replace("today", "now")
    expected = 100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    assert bleu([changed], [[SENTENCE]]) == pytest.approx(expected)
    assert bleu(["x"], [["y"]]) == chrf(["x"], [["y"]]) == 0


def test_references_may_differ_in_number():
    predictions = [SENTENCE, "a dog ran in the park"]
    references = [["nothing like it", SENTENCE], ["a dog ran in the park"]]
    assert bleu(predictions, references) == pytest.approx(100)
    assert chrf(predictions, references) == pytest.approx(100)
    more = bleu(predictions, [["nothing like it"], references[1]])
    assert more < 100
    assert "nrefs:var" in bleu_signature(predictions, references)
    assert "nrefs:1" in bleu_signature(predictions, [[SENTENCE], references[1]])


@pytest.mark.parametrize("name", METRICS)
def test_empty_predictions_score_as_badly_as_can_be(name):
    worst = {"wer": 100, "per": 100}
    assert METRICS[name](["", ""], [["a b"], ["c", "d e"]]) == worst.get(name, 0)


def test_rouge_takes_the_best_reference():
    # Longest common subsequence 3: precision 3/3, recall 3/5 for one, 3/4 for the other.
    references = [["the big cat sat down", "the cat sat down", "x"], ["a b"]]
    assert rouge(["the cat sat", "a b"], references) == pytest.approx(100 * (6 / 7 + 1) / 2)
