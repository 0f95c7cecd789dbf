"""Presets have the parameter counts of the models they are named after."""

import math
from functools import partial

import jax
import pytest

from jaxformer.nn import transformer
from jaxformer.presets import PRESETS

COUNTS = {
    "transformer-base": 63_045_632,
    "transformer-big": 214_171_648,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "gpt2-small": 124_439_808,
    "llama-135m": 134_515_008,
    "bert-base": 109_514_298,
}


def test_every_preset_is_counted():
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    """Of the published checkpoints; nothing is allocated."""
    params = jax.eval_shape(partial(transformer.init, PRESETS[name]), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == COUNTS[name]
