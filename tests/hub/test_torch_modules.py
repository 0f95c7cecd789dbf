"""Models around torch.nn.Transformer: read from archives made by hand, and computed as by torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pickles import save

import jaxformer
from jaxformer.config import ModelConfig
from jaxformer.errors import CheckpointError, ConfigError
from jaxformer.types import Batch, Tokens

D, HEADS, F, V, LAYERS = 12, 3, 20, 17, 2
BIASED = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_bias": True}
CONFIG = ModelConfig(
    vocab_size=V, n_encoder_layers=LAYERS, n_decoder_layers=LAYERS, d_model=D, d_ff=F,
    n_heads=HEADS, max_length=10, norm_eps=1e-5, norm_position="post", position="sinusoidal",
    activation="relu", tie_embeddings=False, **BIASED,
)  # fmt: skip
MODULES = {"embed": "emb.chars", "encoder": "t.encoder", "decoder": "t.decoder", "head": "out"}


def attention(name: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.in_proj_weight": (3 * D, D),
        f"{name}.in_proj_bias": (3 * D,),
        f"{name}.out_proj.weight": (D, D),
        f"{name}.out_proj.bias": (D,),
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """What a state dict of that model holds, written down from PyTorch's documentation."""
    found: dict[str, tuple[int, ...]] = {"emb.chars.weight": (V, D), "out.weight": (V, D)}
    found |= {"out.bias": (V,)}
    for side, norms in (("encoder", 2), ("decoder", 3)):
        names = [f"t.{side}.norm"]
        for i in range(LAYERS):
            layer = f"t.{side}.layers.{i}"
            found |= attention(f"{layer}.self_attn")
            if side == "decoder":
                found |= attention(f"{layer}.multihead_attn")
            found |= {f"{layer}.linear1.weight": (F, D), f"{layer}.linear1.bias": (F,)}
            found |= {f"{layer}.linear2.weight": (D, F), f"{layer}.linear2.bias": (D,)}
            names += [f"{layer}.norm{n + 1}" for n in range(norms)]
        found |= {f"{name}.{part}": (D,) for name in names for part in ("weight", "bias")}
    return found


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes().items()}


def test_every_number_has_its_place(tmp_path, arrays):
    save(tmp_path / "m.pt", arrays)
    config, params = jaxformer.load_torch(tmp_path / "m.pt", CONFIG, MODULES)
    assert config == CONFIG
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in arrays.values())
    layers, h = params["decoder"]["layers"], D // HEADS
    for i in range(LAYERS):
        for ours, theirs in (("attention", "self_attn"), ("cross", "multihead_attn")):
            kernel = arrays[f"t.decoder.layers.{i}.{theirs}.in_proj_weight"]
            bias = arrays[f"t.decoder.layers.{i}.{theirs}.in_proj_bias"]
            for j, part in enumerate(("query", "key", "value")):
                for n in range(HEADS):
                    rows = slice(j * D + n * h, j * D + (n + 1) * h)
                    found = layers[ours][part]
                    np.testing.assert_array_equal(found["kernel"][i, :, n], kernel[rows].T)
                    np.testing.assert_array_equal(found["bias"][i, n], bias[rows])
            out = arrays[f"t.decoder.layers.{i}.{theirs}.out_proj.weight"]
            np.testing.assert_array_equal(layers[ours]["out"]["kernel"][i].reshape(D, D), out.T)
        for ours, theirs in (("attention", 1), ("cross", 2), ("mlp", 3)):
            scale = arrays[f"t.decoder.layers.{i}.norm{theirs}.weight"]
            np.testing.assert_array_equal(layers[f"{ours}_norm"]["scale"][i], scale)
    np.testing.assert_array_equal(params["head"]["kernel"], arrays["out.weight"].T)
    np.testing.assert_array_equal(params["embed"]["embedding"], arrays["emb.chars.weight"])


def test_all_that_does_not_fit_is_listed(tmp_path, arrays):
    path = tmp_path / "m.pt"
    arrays |= {"emb.table": np.zeros((1, 10, D), np.float32), "t.q": np.zeros(2, np.float32)}
    del arrays["t.encoder.norm.bias"]
    arrays["t.decoder.layers.1.linear1.weight"] = np.zeros((F, 5), np.float32)
    save(path, arrays)
    with pytest.raises(CheckpointError) as caught:
        jaxformer.load_torch(path, CONFIG, MODULES, ignored=["emb.tab*"])
    text = str(caught.value)
    assert "m.pt does not fit its config" in text and "emb.table" not in text
    for line in (
        "missing:\n    t.encoder.norm.bias [12]",
        "unexpected:\n    t.q [2]",
        "t.decoder.layers.1.linear1.weight: [20, 5] there, [20, 12] wanted",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 4, "n_kv_heads": 2}, r"in_proj_weight: \[36, 12\] there, \[24, 12\] wanted"),
        ({"gated": True}, "encoder/layers/mlp/gate/kernel"),
        ({"n_decoder_layers": 1}, r"unexpected:\n    t.decoder.layers.1"),
        ({"n_decoder_layers": 3}, r"missing:\n    t.decoder.layers.2"),
        ({"vocab_size": 16}, r"emb.chars.weight: \[17, 12\] there, \[16, 12\] wanted"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_other_configs_are_refused(tmp_path, arrays, change, words):
    save(tmp_path / "m.pt", arrays)
    with pytest.raises(CheckpointError, match=words):
        jaxformer.load_torch(tmp_path / "m.pt", replace(CONFIG, **change), MODULES)


def test_modules_that_are_not_there(tmp_path, arrays):
    save(tmp_path / "m.pt", arrays)
    with pytest.raises(ConfigError, match="Did you mean 'encoder'"):
        jaxformer.load_torch(tmp_path / "m.pt", CONFIG, MODULES | {"encode": "t.encoder"})
    with pytest.raises(CheckpointError, match=r"out.weight \[17, 12\](.|\n)*head/kernel"):
        modules = {ours: theirs for ours, theirs in MODULES.items() if ours != "head"}
        jaxformer.load_torch(tmp_path / "m.pt", CONFIG, modules)


def test_another_dtype(tmp_path, arrays):
    save(tmp_path / "m.pt", {name: a.astype(np.float16) for name, a in arrays.items()})
    config, params = jaxformer.load_torch(tmp_path / "m.pt", CONFIG, MODULES)
    assert config.param_dtype == config.compute_dtype == "float16"
    config, again = jaxformer.load_torch(tmp_path / "m.pt", CONFIG, MODULES, dtype="float32")
    assert config.param_dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, params, again)


# What PyTorch makes of it


def theirs_of(torch: Any, config: ModelConfig) -> Any:
    """A model as people write them, its embeddings and head by hand."""
    act, first = config.activation, config.norm_position == "pre"
    kinds: dict[str, Any] = {
        "nhead": HEADS, "dim_feedforward": F, "dropout": 0.0, "activation": act,
        "batch_first": True, "norm_first": first, "bias": config.qkv_bias,
    }  # fmt: skip
    torch.manual_seed(0)
    modules = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(V, D)})
    if config.source_vocab_size:
        modules["source"] = torch.nn.Embedding(config.source_vocab_size, D)
    if config.position == "learned":
        modules["positions"] = torch.nn.Embedding(config.max_length, D)
    if config.kind == "encoder-decoder":
        modules["transformer"] = torch.nn.Transformer(
            D, num_encoder_layers=LAYERS, num_decoder_layers=LAYERS, **kinds
        )
    else:
        layer = torch.nn.TransformerEncoderLayer(D, **kinds)
        modules["transformer"] = torch.nn.TransformerEncoder(
            layer, LAYERS, enable_nested_tensor=False
        )
    if not config.tie_embeddings:
        modules["generator"] = torch.nn.Linear(D, V, bias=config.head_bias)
    with torch.no_grad():  # norms and biases that say nothing would hide mistakes
        for p in modules.parameters():
            p.copy_(torch.randn(p.shape) * 0.4)
    return modules.eval()


def forward(torch: Any, modules: Any, config: ModelConfig, source: Any, target: Any) -> np.ndarray:
    def embed(ids: Any, name: str) -> Any:
        x = modules[name](ids) * config.embed_scale
        if config.position == "learned":
            return x + modules["positions"](torch.arange(ids.shape[1]))
        angle = np.arange(ids.shape[1])[:, None] / 10000 ** (np.arange(0, D, 2) / D)
        waves = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(-1, D)
        return x + torch.tensor(waves, dtype=torch.float32)

    n = target.shape[1]
    causal = torch.triu(torch.full((n, n), float("-inf")), 1)
    y = embed(target, "embedding")
    if config.kind == "encoder-decoder":
        x = embed(source, "source" if config.source_vocab_size else "embedding")
        hidden = modules["transformer"](x, y, tgt_mask=causal)
    else:
        mask = causal if config.kind == "decoder-only" else None
        hidden = modules["transformer"](y, mask=mask)
    table = modules["embedding"].weight
    return (hidden @ table.T if config.tie_embeddings else modules["generator"](hidden)).numpy()


def tokens(ids: np.ndarray) -> Tokens:
    pos = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return Tokens(jnp.asarray(ids), jnp.asarray(pos), jnp.ones_like(ids))


BARE = {name: False for name in BIASED}
NAMES = {"embed": "embedding", "head": "generator"}
BOTH = {"encoder": "transformer.encoder", "decoder": "transformer.decoder"}
PLACES = {"encoder/positions": "positions", "decoder/positions": "positions"}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"embed_scale": D**0.5}, BOTH),
        ({"norm_position": "pre", "activation": "gelu", "position": "learned"}, BOTH | PLACES),
        ({"source_vocab_size": 23}, BOTH | {"source_embed": "source"}),
        ({"norm_bias": False, "norm_position": "pre", **BARE}, BOTH),
        ({"n_encoder_layers": 0, "final_norm": False}, {"decoder": "transformer"}),
        (
            {"n_decoder_layers": 0, "final_norm": False, "tie_embeddings": True,
             "head_bias": False},
            {"encoder": "transformer"},
        ),
    ],
    ids=["post", "pre", "two vocabularies", "no biases", "decoder only", "encoder only"],
)  # fmt: skip
def test_numbers_are_torch(tmp_path: Path, change: dict[str, Any], names: dict[str, str]):
    torch: Any = pytest.importorskip("torch")
    config = replace(CONFIG, **change)
    modules = theirs_of(torch, config)
    torch.save(modules.state_dict(), tmp_path / "m.pt")
    rng = np.random.default_rng(1)
    source = rng.integers(0, config.source_vocab_size or V, (3, 7), np.int32)
    target = rng.integers(0, V, (3, 10), np.int32)
    with torch.no_grad():
        wanted = forward(torch, modules, config, torch.tensor(source), torch.tensor(target))

    named = {k: v for k, v in NAMES.items() if k == "embed" or not config.tie_embeddings}
    config, params = jaxformer.load_torch(tmp_path / "m.pt", config, named | names)
    read, written = tokens(source), tokens(target)
    if config.kind == "encoder-only":
        batch = Batch(written, None, written.ids, jnp.ones(target.shape))
    else:
        crossed = config.kind == "encoder-decoder"
        batch = Batch(read if crossed else None, written, written.ids, jnp.ones(target.shape))
    found = jaxformer.Transformer(config).apply({"params": params}, batch)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(wanted).max() > 1
