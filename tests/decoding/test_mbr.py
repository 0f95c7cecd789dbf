"""Minimum Bayes risk: the mean chrF of each sample against all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import sentence_chrf

from jaxformer.decoding.mbr import expected_chrf


@given(st.lists(st.text("ab c", min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_it_is_the_mean_over_every_pair(texts):
    wanted = [np.mean([sentence_chrf(t, [other]).score for other in texts]) for t in texts]
    assert expected_chrf(texts) == pytest.approx(wanted)


def test_the_text_in_the_middle_wins():
    texts = [
        "a dog barks",
        "the cat sat on the mat",
        "the cat sat on a mat",
        "the cat sits on a mat",
    ]
    assert int(np.argmax(expected_chrf(texts))) == 2
    # What is sampled often counts as often.
    assert int(np.argmax(expected_chrf([*texts, *["a dog barks"] * 5]))) == 0


def test_empty_texts_are_alike():
    assert expected_chrf(["", "", "abc"]) == pytest.approx([200 / 3, 200 / 3, 100 / 3])
