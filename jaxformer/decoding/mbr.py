"""Minimum Bayes risk: of many samples, the text that is most like all of them."""

from collections import Counter
from collections.abc import Sequence


def expected_chrf(texts: Sequence[str]) -> list[float]:
    """The mean chrF of each text against all of `texts`, itself included, from 0 to 100.

    The samples are candidates and evidence at once (Eikema and Aziz 2020); the utility is
    sacrebleu's chrF (Popovic 2015), and of equal texts, empty ones too, 100. The time grows with
    the square of the number of different texts.
    """
    from sacrebleu.metrics.chrf import CHRF

    metric, counts = CHRF(), Counter(texts)

    def utility(text: str, reference: str) -> float:
        return 100.0 if text == reference else metric.sentence_score(text, [reference]).score

    totals = {text: sum(n * utility(text, other) for other, n in counts.items()) for text in counts}
    return [totals[text] / len(texts) for text in texts]
