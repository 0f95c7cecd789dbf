"""Training and decoding go through the real TPU compiler, on a machine that has no TPU.

`pytest -m tpu_compile -s` prints what it says of a step of decoding.
"""

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

# What is compiled for `options`, and a job of so many rows and tokens.
JOB = """
from types import SimpleNamespace
from jaxformer.config import DecodeConfig
from jaxformer.generate import Request, _decode, advance, begin
from jaxformer.method import method_of, numbers_of
from jaxformer.nn.transformer import init, unstack

def put(tree, place):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=place), tree
    )

def job_of(model, options, rows, taken, length):
    ids = SimpleNamespace(start_id=1, stop_ids=(2,), pad_id=0)
    prompt = Tokens(*[array(rows, taken)] * 3)
    job = Request(prompt, array(rows), array(rows), numbers_of(options), 0, None, None)
    return method_of(model, ids, options, length), job
"""

DECODE = (
    JOB
    + """
options = DecodeConfig(WAY, suppress=(3,), forced_first=4, forced_last=2)
method, job = job_of(model, options, 4, 16, 16)
decode = jax.jit(lambda params, job: _decode(None, model, None, method, unstack(params), None, job))
compiled = compile(decode, state.params, job)
tokens = compiled.output_shardings.tokens
assert tokens.device_set <= set(topology.devices), tokens
assert "while" in compiled.as_text()
"""
)

# Rows in the places of ended ones, on four chips that each hold the model, and never talk.
REFILL = (
    JOB
    + """
from jaxformer import running

mesh = sharding.make_mesh(MeshConfig(), topology.devices)

rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
params = put(
    jax.eval_shape(lambda: unstack(sharding.nn.unbox(init(model, jax.random.key(0))))), everywhere
)
method, job = job_of(model, DecodeConfig(beams=2), 16, 16, 16)
job = Request(*(put(part, rows) for part in job[:3]), *(put(part, everywhere) for part in job[3:]))
state = put(jax.eval_shape(partial(running._begin, mesh, model, method, 16), params, job), rows)
known = mesh, model, method
for function, args in {
    running._begin: (*known, 16, params, job),
    running._advance: (*known, 16, params, job, state),
    running._slide: (mesh, 16, state),
    running._refill: (*known, params, job, state, put(np.zeros(16, np.int32), rows)),
    running._ended: (mesh, method, job, state),
}.items():
    text = function.trace(*args).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert not [op for op in ("all-gather", "all-reduce", "permute", "all-to-all") if op in text]
"""
)

# One token for each of 8 rows, from a cache of 1024 slots, by a model of the shape of Llama 3.2 1B
# on one chip: it reads the parameters and the cache once, and writes the cache where it is.
STEP = (
    JOB
    + """
import dataclasses
from jaxformer.presets import PRESETS

chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
llama = dataclasses.replace(
    PRESETS["llama-135m"], vocab_size=128256, n_decoder_layers=16, d_model=2048, d_ff=8192,
    n_heads=32, n_kv_heads=8, head_dim=64, rope_theta=(500000.0,),
    param_dtype="bfloat16", compute_dtype="bfloat16",
)

on_chip = partial(put, place=chip)
params = on_chip(jax.eval_shape(
    lambda: unstack(sharding.nn.unbox(init(llama, jax.random.key(0))))
))
method, job = job_of(llama, DecodeConfig(), 8, 512, 512)
job = on_chip(job)
state = on_chip(jax.eval_shape(partial(begin, llama, method), params, job))
step = jax.jit(partial(advance, llama, method, chunk=1, chunks=1), donate_argnums=2)
lowered = step.trace(params, job, state).lower(lowering_platforms=("tpu",))
memory = lowered.compile().memory_analysis()
cache = whole(state.cache.cache.own)
assert whole(params) > 2.4e9 and cache == 2 * 16 * 8 * 1024 * 8 * 64 * 2
assert memory.alias_size_in_bytes >= cache, memory
assert memory.temp_size_in_bytes < cache / 8, memory
# Each weight that is fetched into the chip's own memory ahead of its product counts three times
# (read, written there, read again), so what the products themselves read is counted without that.
option = {"xla_vf_vmem_memory_space_assignment": False}
read = lowered.compile(compiler_options=option).cost_analysis()["bytes accessed"]
print(f"bytes accessed {read:.0f}, parameters {whole(params)}, cache {cache}: "
      f"{read / (whole(params) + cache):.3f}")
assert read <= 1.2 * (whole(params) + cache), read
"""
)


@pytest.mark.parametrize(
    "program",
    [
        TRAIN,
        DECODE.replace("WAY", "beams=4"),
        DECODE.replace("WAY", "samples=4, top_p=0.9"),
        REFILL,
        STEP,
    ],
    ids=["train", "beam", "sample", "refill", "step"],
)
def test_compiles_for_a_tpu(program):
    # These must be set before jax starts.
    env = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SETUP + program],
        env=os.environ | env,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
