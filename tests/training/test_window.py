"""What a line of training metrics says of the steps since the last one."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import toy, toy_batch

from jaxformer.errors import NumericsError
from jaxformer.training.step import StepMetrics
from jaxformer.training.window import Window


def step(loss: float = 1.0, tokens: float = 1.0, norm: float = 1.0, bad: float = 0.0):
    return StepMetrics(*map(jnp.float32, (loss, tokens, norm, bad)))


BATCH = toy_batch(toy())
BAD = step(np.nan, 5, np.nan, 1)


def fill(window: Window, *steps: StepMetrics) -> Window:
    for each in steps:
        window.add(each, BATCH, begin=0.0, waited=0.0)
    return window


def test_loss_is_the_mean_over_tokens_of_what_was_learnt_from():
    window = fill(Window(), step(1, 10, 3), BAD, step(4, 30, 5))
    scores = window.close(max_bad_steps=2)
    assert scores["train/loss"] == (10 + 120) / 40
    assert scores["train/grad_norm"] == 4
    assert scores["train/skipped"] == 1
    # The next window knows nothing of it.
    scores = fill(window, step(7)).close(2)
    assert (scores["train/loss"], scores["train/skipped"]) == (7, 0)


def test_no_tokens_and_no_good_step():
    assert fill(Window(), step(0, 0)).close(2)["train/loss"] == 0
    scores = fill(Window(), BAD).close(2)
    assert scores["train/skipped"] == 1 and "train/loss" not in scores


def test_too_many_bad_steps_in_a_row():
    window = fill(Window(), BAD, BAD, step(), BAD, BAD)
    window.close(3)
    with pytest.raises(NumericsError, match="3 updates in a row") as caught:
        fill(window, BAD).close(3)  # counted on from the window before
    assert caught.value.exit_code == 5
    window = fill(Window(), BAD, BAD)
    window.close(3)
    fill(window, step(), BAD, BAD).close(3)


def test_speed_is_of_tokens_without_padding(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 12.0)
    config = toy("encoder-decoder")
    batch, window = toy_batch(config), Window()
    window.add(step(), batch, begin=10.0, waited=0.5)
    window.add(step(), batch, begin=10.0, waited=1.5)
    assert batch.source is not None and batch.target is not None
    tokens = 2 * int(batch.source.seg.sum() + batch.target.seg.sum())
    assert window.note() == f"{tokens / 4:,.0f} tokens/s  data 50%"
    scores = window.close(9)
    assert scores["train/tokens_per_second"] == tokens / 4
    assert scores["train/data_wait"] == 0.5


def test_is_kept_in_a_checkpoint():
    window = fill(Window(), step(1, 10), BAD, step(4, 30))
    kept = json.loads(json.dumps(window.to_json()))
    assert kept["steps"][0] == [1, 10, 1, 0] and kept["steps"][1][3] == 1
    again = Window.from_json(kept)
    a, b = window.close(5), again.close(5)
    for name in ("train/loss", "train/grad_norm", "train/skipped"):
        assert a[name] == b[name]


def test_bad_steps_in_a_row_are_counted_across_a_stop():
    window = fill(Window(), BAD, BAD)
    window.close(3)  # the run is stopped between two lines of metrics
    again = Window.from_json(window.to_json())
    with pytest.raises(NumericsError, match="3 updates in a row"):
        fill(again, BAD).close(3)
