"""Evaluation: the loss of held-out data, and scores of the text generated from it."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxformer import sharding
from jaxformer.data.sources import Example
from jaxformer.generate import Model
from jaxformer.training.metrics import METRICS, bleu_signature
from jaxformer.training.stopping import StopRequest
from jaxformer.types import Batch


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
