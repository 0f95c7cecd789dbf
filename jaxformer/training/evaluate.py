"""Evaluation: the loss of held-out data, and scores of the text generated from it."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jax.sharding import Mesh

from jaxformer import sharding
from jaxformer.data.sources import Example
from jaxformer.model import Model
from jaxformer.training.metrics import METRICS, bleu_signature
from jaxformer.training.stopping import StopRequest
from jaxformer.types import Batch, Tokens


def evaluate_loss(
    eval_step: Callable[[Any, Batch], Any], params: Any, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float]:
    """Mean negative log-likelihood per token in nats, and perplexity, over all of `batches`."""
    sums = [eval_step(params, sharding.put_batch(batch, mesh)) for batch in batches]
    totals = sharding.fetch(sums)
    nll = math.fsum(float(total) for total, _ in totals)
    tokens = math.fsum(float(count) for _, count in totals)
    loss = nll / max(tokens, 1)
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700)), "eval/tokens": tokens}


Item = TypeVar("Item")


class Sample(NamedTuple):
    """One validation example and what the model makes of it."""

    source: str
    prediction: str
    reference: str


def spaced(items: Sequence[Item], n: int) -> Sequence[Item]:
    """At most `n` of `items`, evenly spaced: their order may mean something.

    >>> spaced("abcdefg", 3)
    'adg'
    """
    return items[:: max(1, -(-len(items) // max(n, 1)))] if n else items[:0]


def samples(model: Model, examples: Sequence[Example], predictions: Sequence[str]) -> list[Sample]:
    """Three examples and what the model makes of them: the target, more words, or masked tokens.

    `predictions` are what was generated from `examples` already, if anything was.
    """
    few = spaced(examples, 3)
    if model.data.task == "mlm":
        return [_filled(model, example.targets[0]) for example in few]
    if model.data.task == "lm":  # the first words of a document, to be continued
        words = [re.findall(r"\s*\S+", example.targets[0]) for example in few]
        sources = ["".join(w[:3]) for w in words]
        references = ["".join(w[3:20]) for w in words]
    else:
        sources = [example.source for example in few]
        references = [example.targets[0] for example in few]
    texts = spaced(predictions, 3) if predictions else model.generate(sources)
    return list(map(Sample, sources, texts, references))


def _filled(model: Model, text: str) -> Sample:
    """`text` with every fifth token hidden, and what the model puts in the gaps."""
    source, decode = model.tokenizer.source, model.tokenizer.decode
    length = min(model.data.buckets[0], model.config.max_length)
    ids = np.zeros((1, length), np.int32)
    known = source(text)[:-1][: length - 1] + [model.tokenizer.eos_id]
    ids[0, : len(known)] = known
    seg = (np.arange(length) < len(known)).astype(np.int32)[None]
    gaps = np.zeros_like(seg)
    gaps[0, 2 : len(known) - 1 : 5] = 1
    hidden = np.where(gaps, model.tokenizer.mask_id, ids)
    source = Tokens(hidden, np.arange(length, dtype=np.int32)[None] * seg, seg)
    logits = model.logits(Batch(source, None, ids, gaps.astype(np.float32)))
    best = sharding.fetch(logits).argmax(-1)
    pieces = [" ".join(decode([i]) for i in row[gaps > 0].tolist()) for row in (best, ids)]
    first, *others = np.split(ids[0], np.flatnonzero(gaps[0]))
    gapped = "_".join([decode(first), *(decode(part[1:]) for part in others)])
    return Sample(gapped, *pieces)


def evaluate_text(
    model: Model, examples: Sequence[Example], metrics: Sequence[str], stop: StopRequest
) -> tuple[dict[str, float | str], list[str]]:
    """Scores of the texts generated from `examples`, and the texts; none without `metrics`."""
    if not metrics or not examples:
        return {}, []
    some = 8 * model.defaults.batch_size  # decoded between two looks at `stop`
    predictions = []
    for start in stop.between(range(0, len(examples), some)):
        sources = [example.source for example in examples[start : start + some]]
        predictions += model.generate(sources)
    references = [example.targets for example in examples]
    scores: dict[str, float | str] = {
        f"eval/{name}": METRICS[name](predictions, references) for name in metrics
    }
    if "bleu" in metrics:
        scores["eval/bleu_signature"] = bleu_signature(predictions, references)
    return scores, predictions
