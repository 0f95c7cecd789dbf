"""Scores of generated text against references, all from well-kept libraries."""

from collections.abc import Callable, Sequence

References = Sequence[Sequence[str]]


def exact(predictions: Sequence[str], references: References) -> float:
    """Percentage of predictions that equal one of their references.

    >>> exact(["a b", "c"], [["x", "a b"], ["d"]])
    50.0
    """
    hits = [
        p.strip() in {r.strip() for r in rs} for p, rs in zip(predictions, references, strict=True)
    ]
    return 100 * sum(hits) / max(len(hits), 1)


def per(predictions: Sequence[str], references: References) -> float:
    """Symbols (words, phones) inserted, deleted or replaced, per 100 of the nearest reference.

    For sentences this is the field's word error rate, for pronunciations its phone error rate.

    >>> per(["K AE T", "D AO"], [["K AE T", "K AA T S"], ["D AO G"]])
    16.666666666666668
    """
    import jiwer

    errors = length = 0
    for prediction, choices in zip(predictions, references, strict=True):
        counts = []
        for reference in choices:
            out = jiwer.process_words(reference, prediction) if reference.split() else None
            n = len(reference.split())
            wrong = (
                out.substitutions + out.deletions + out.insertions
                if out
                else len(prediction.split())
            )
            counts.append((wrong / max(n, 1), wrong, n))
        _, wrong, n = min(counts)
        errors, length = errors + wrong, length + n
    return 100 * errors / max(length, 1)


def wer(predictions: Sequence[str], references: References) -> float:
    """Percentage of examples that equal none of their references (a word, when it is one each).

    >>> wer(["a b", "c"], [["x", "a b"], ["d"]])
    50.0
    """
    return 100 - exact(predictions, references)


def bleu(predictions: Sequence[str], references: References) -> float:
    """Corpus BLEU as sacrebleu computes it (Papineni et al. 2002; Post 2018)."""
    return _sacrebleu("BLEU", predictions, references)[0]


def chrf(predictions: Sequence[str], references: References) -> float:
    """Corpus chrF as sacrebleu computes it (Popovic 2015)."""
    return _sacrebleu("CHRF", predictions, references)[0]


def rouge(predictions: Sequence[str], references: References) -> float:
    """Mean ROUGE-L F1 against the best reference, in percent (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score_multi(list(choices), prediction)["rougeL"].fmeasure
        for prediction, choices in zip(predictions, references, strict=True)
    ]
    return 100 * sum(scores) / max(len(scores), 1)


def bleu_signature(predictions: Sequence[str], references: References) -> str:
    """How that BLEU was computed, as sacrebleu writes it."""
    return _sacrebleu("BLEU", predictions, references)[1]


def _sacrebleu(name: str, predictions: Sequence[str], references: References) -> tuple[float, str]:
    from sacrebleu import metrics

    # Sacrebleu wants the references the other way round; None where an example has fewer.
    most = max(map(len, references))
    columns = [[rs[i] if i < len(rs) else None for rs in references] for i in range(most)]
    metric = getattr(metrics, name)()
    score = metric.corpus_score(list(predictions), columns).score
    return score, str(metric.get_signature())


METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "exact": exact,
    "wer": wer,
    "per": per,
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
}
