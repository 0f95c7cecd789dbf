"""Every family computes and generates what transformers does, and goes back to it as it came."""

import dataclasses
import fnmatch
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import reference  # noqa: E402
from checkpoints import CHECKPOINTS, Checkpoint  # noqa: E402

import jaxformer  # noqa: E402
from jaxformer.converting import export  # noqa: E402
from jaxformer.hub.families import FAMILIES  # noqa: E402
from jaxformer.hub.tensors import open_safetensors  # noqa: E402
from jaxformer.loading import load_weights  # noqa: E402
from jaxformer.nn.transformer import apply  # noqa: E402
from jaxformer.types import Batch, Tokens  # noqa: E402

pytestmark = pytest.mark.parity

LENGTHS = (500, 437, 3)
GENERATING = [each for each in CHECKPOINTS if each.generates]
SENTENCES = [each for each in CHECKPOINTS if each.pooling]


class Pair(NamedTuple):
    """A checkpoint, as transformers and as we have it."""

    checkpoint: Checkpoint
    folder: Path
    theirs: Any
    ours: jaxformer.Model


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make(checkpoint: Checkpoint, folder: Path, lively: bool = False) -> Pair:
    theirs = reference.make(checkpoint, lively)
    reference.save(checkpoint, theirs, folder)
    return Pair(checkpoint, folder, theirs, jaxformer.load(folder))


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda each: each.name)
def pair(request, tmp_path_factory) -> Pair:
    return make(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module", params=GENERATING, ids=lambda each: each.name)
def lively(request, tmp_path_factory) -> Pair:
    return make(request.param, tmp_path_factory.mktemp("checkpoint"), lively=True)


def of_theirs(pair: Pair, side: str) -> tuple[dict[str, np.ndarray], Batch]:
    """The same batch of ragged rows, padded on one side, for them and for us."""
    rng, config, kind = np.random.default_rng(0), pair.theirs.config, pair.ours.config.kind
    there = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    there = there if side == "right" else there[:, ::-1].copy()
    pos = np.maximum(there.cumsum(1) - 1, 0)
    if kind == "encoder-decoder":  # where theirs count the padding
        pos = np.broadcast_to(np.arange(max(LENGTHS)), there.shape)

    def tokens(vocabulary: int) -> Tokens:
        ids = np.where(there, rng.integers(3, vocabulary, there.shape), config.pad_token_id)
        return Tokens(*(x.astype(np.int32) for x in (ids, pos, there)))

    given = {"attention_mask": there}
    source = target = None
    if kind == "decoder-only":
        target = tokens(config.vocab_size)
        given |= {"input_ids": target.ids, "position_ids": pos.copy()}
    else:
        source = tokens(config.pad_token_id if pair.ours.config.source_vocab_size else 99)
        given |= {"input_ids": source.ids}
    if kind == "encoder-decoder":
        target = tokens(getattr(config, "decoder_vocab_size", None) or config.vocab_size)
        given |= {"decoder_input_ids": target.ids, "decoder_attention_mask": there}
    if kind == "encoder-only" and "roberta" not in config.model_type:  # which knows its padding
        given |= {"position_ids": pos}
    last = target or source
    assert last is not None
    return given, Batch(source, target, last.ids, np.ones(last.ids.shape, np.float32))


@partial(jax.jit, static_argnums=0)
def hidden_states(config: Any, params: Any, batch: Batch) -> dict[str, Any]:
    run = partial(apply, config, params)
    if batch.source is None:
        return {"hidden": run(batch.target, method="decode")[0]}
    memory = run(batch.source, method="encode")
    if batch.target is None:
        return {"hidden": memory}
    decoded, _ = run(batch.target, memory, batch.source.seg, method="decode")
    return {"encoder": memory, "decoder": decoded}


def divergence(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """KL divergence in nats of each row."""
    p, q = (x.astype(np.float64) for x in (theirs, ours))
    p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_computes_the_same(pair: Pair, side: str):
    given, batch = of_theirs(pair, side)
    theirs = reference.compute(pair.theirs, given)
    ours = dict(hidden_states(pair.ours.config, pair.ours.params, batch))
    head = pair.ours.config.head
    # What classes are read off of the first token says nothing where that is padding.
    assert ("logits" in theirs) == (head != "none" and pair.checkpoint.architecture != "BartModel")
    if "logits" in theirs and (head, side) != ("sequence", "left"):
        ours["logits"] = pair.ours.logits(batch)
    there = given["attention_mask"]
    for name, mine in ours.items():
        mine = np.asarray(mine)
        here = there if mine.ndim == 3 else slice(None)
        one, other = theirs[name][here], mine[here]
        assert one.std() > 0.3
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4, err_msg=name)
        if name == "logits":
            assert (one.argmax(-1) == other.argmax(-1)).all()
            assert divergence(one, other).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, reference.BEAMS], ids=["greedy", "beam"])
def test_generates_the_same(lively: Pair, beams: int):
    pair = lively
    texts = list(map(reference.spell, reference.prompts()))
    read = pair.ours.tokenizer
    rows = [
        (read.source if pair.theirs.config.is_encoder_decoder else read.prompt)(t) for t in texts
    ]
    wanted, scores = reference.generate(pair.theirs, rows, beams)
    decode = dataclasses.replace(pair.ours.defaults, beams=beams, n_best=beams)
    found = [each.hypotheses for each in pair.ours.hypotheses(texts, decode)]
    assert [[h.ids for h in row] for row in found] == wanted
    np.testing.assert_allclose([[h.score for h in row] for row in found], scores, rtol=0, atol=2e-3)
    ends = {h.finish for row in found for h in row}
    assert beams > 1 or "eos" in ends
    assert len({i for row in found for h in row for i in h.ids}) > 3  # they say something


def is_ignored(name: str, checkpoint: Checkpoint) -> bool:
    """Whether it is nothing that a model has learnt: a table of sinusoids, for one."""
    family = FAMILIES[checkpoint.model_type]
    patterns = [p.removeprefix(start) for p in family.ignored for start in ("", family.prefix)]
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def read_back(folder: Path, pair: Pair) -> Any:
    """transformers' model of what was exported, with nothing missing and nothing left over."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    report["missing_keys"] = [
        name for name in report["missing_keys"] if not is_ignored(name, pair.checkpoint)
    ]
    assert not any(report.values()), report
    return model.eval()


def assert_bitwise(model: Any, pair: Pair):
    given, _ = of_theirs(pair, "right")
    again, first = (reference.compute(m, given) for m in (model, pair.theirs))
    for name in first:
        np.testing.assert_array_equal(again[name], first[name])
        assert np.isfinite(first[name]).all()


def test_goes_back_as_it_came(pair: Pair, tmp_path: Path):
    export(pair.ours, tmp_path)
    before, after = open_safetensors(pair.folder), open_safetensors(tmp_path)
    learnt = {
        name: tensor
        for name, tensor in before.items()
        if name in after or not is_ignored(name, pair.checkpoint)
    }
    one, other = (
        {name: (t.shape, t.dtype, t.read().tobytes()) for name, t in tensors.items()}
        for tensors in (learnt, after)
    )
    assert one == other
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (pair.folder / name).exists():
            one, other = (json.loads((f / name).read_text()) for f in (pair.folder, tmp_path))
            if (name, pair.checkpoint.architecture) == ("config.json", "BertForPreTraining"):
                one["architectures"] = ["BertForMaskedLM"]  # without its second head
            assert one == other
    assert_bitwise(read_back(tmp_path, pair), pair)


@pytest.mark.slow
def test_is_written_anew(pair: Pair, tmp_path: Path):
    model = dataclasses.replace(pair.ours, origin=None)
    export(model, tmp_path, family=pair.checkpoint.model_type)
    assert_bitwise(read_back(tmp_path, pair), pair)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loads_in_its_own_dtype_or_any_other(pair: Pair, dtype: str, tmp_path: Path):
    to = reference.torch.bfloat16 if dtype == "bfloat16" else reference.torch.float16
    halved = reference.make(pair.checkpoint).to(to)
    halved.save_pretrained(tmp_path)
    for asked, expected in ((None, dtype), ("float32", "float32")):
        config, params = load_weights(tmp_path, dtype=asked)
        assert (config.param_dtype, config.compute_dtype) == (expected, expected)
        own, mine = jax.tree.leaves(pair.ours.params), jax.tree.leaves(params)
        for full, half in zip(own, mine, strict=True):
            assert half.dtype == expected
            rounded = full.astype(dtype).astype(expected)
            np.testing.assert_array_equal(np.asarray(half), np.asarray(rounded))


@pytest.mark.parametrize("pair", SENTENCES, indirect=True, ids=lambda each: each.name)
def test_embeds_the_same(pair: Pair):
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 99, n).tolist() for n in (33, 20, 2)]
    found = pair.ours.embed(list(map(reference.spell, rows)))
    for vector, row in zip(found, rows, strict=True):
        hidden = reference.compute(pair.theirs, {"input_ids": np.array([row])})["hidden"][0]
        mean = (pair.checkpoint.pooling or {})["pooling_mode_mean_tokens"]
        pooled = hidden.mean(0) if mean else hidden[0]
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), rtol=0, atol=1e-5)
