"""Training and decoding go through the real TPU compiler, on a machine that has no TPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.tpu_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'jaxformer[tpu]'",
    ),
]

# Four chips that are only described; the compiler is libtpu's own.
SETUP = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jaxformer import sharding
from jaxformer.config import MeshConfig, ModelConfig, OptimConfig
from jaxformer.training.optim import make_optimizer
from jaxformer.training.state import abstract_state
from jaxformer.types import Batch, Tokens

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
model = ModelConfig(
    vocab_size=512, n_encoder_layers=2, n_decoder_layers=2, d_model=256, d_ff=512, n_heads=4,
    head_dim=128, max_length=64, compute_dtype="bfloat16", dropout=0.1, remat="dots",
)
optim = OptimConfig()
tx = make_optimizer(model, optim, 100)
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), topology.devices)
state = abstract_state(model, tx, mesh)

def array(*shape, dtype="int32", sharding=sharding.batch_sharding(mesh)):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def compile(function, *args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), \\
            sharding.nn.logical_axis_rules(sharding.RULES):
        lowered = function.trace(*args).lower(lowering_platforms=("tpu",))
    return lowered.compile()

def whole(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
"""

TRAIN = """
from jaxformer.training.step import train_step
side = Tokens(*[array(8, 32)] * 3)
batch = Batch(side, side, array(8, 32), array(8, 32, dtype="float32"))
places = jax.tree.map(lambda leaf: leaf.sharding, state)
step = jax.jit(
    partial(train_step, model, optim, tx, 2),
    donate_argnums=0,
    out_shardings=(places, sharding.replicated(mesh)),
)
compiled = compile(step, state, batch)
memory = compiled.memory_analysis()
# A quarter of the state on each chip (norms and biases a half), and its buffers given back.
taken = memory.argument_size_in_bytes, memory.alias_size_in_bytes
size = whole(state.params) + whole(state.opt_state)
assert size / 4 < taken[1] <= taken[0] < 0.3 * size, (taken, size)
assert "all-reduce" in compiled.as_text()
"""

DECODE = """
from types import SimpleNamespace
from jaxformer.config import DecodeConfig
from jaxformer.generate import _decode
from jaxformer.method import method_of, numbers_of
from jaxformer.nn.transformer import unstack
side = Tokens(*[array(4, 16)] * 3)
options = DecodeConfig(WAY, suppress=(3,), forced_first=4, forced_last=2)
ids = SimpleNamespace(start_id=1, stop_ids=(2,), pad_id=0)
method, numbers = method_of(model, ids, options, 16), numbers_of(options)
one = array(dtype="int32", sharding=sharding.replicated(mesh))
decode = jax.jit(lambda params, *rest: _decode(model, method, unstack(params), *rest))
compiled = compile(decode, state.params, side, array(4), numbers, one, array(4))
tokens = compiled.output_shardings.tokens
assert tokens.device_set <= set(topology.devices), tokens
assert "while" in compiled.as_text()
"""


@pytest.mark.parametrize(
    "program",
    [TRAIN, DECODE.replace("WAY", "beams=4"), DECODE.replace("WAY", "samples=4, top_p=0.9")],
    ids=["train", "beam", "sample"],
)
def test_compiles_for_a_tpu(program):
    # These must be set before jax starts.
    env = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SETUP + program],
        env=os.environ | env,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
