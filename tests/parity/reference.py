"""transformers' models of the checkpoints: made, saved, and run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from checkpoints import Checkpoint

NEW_TOKENS, BEAMS = 24, 4


def make(checkpoint: Checkpoint) -> Any:
    """A model with random parameters."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(checkpoint.model_type, **checkpoint.config)
    model = getattr(transformers, checkpoint.architecture)(config).eval()
    if checkpoint.untied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(config.vocab_size, config.d_model))
    sinusoidal = config.model_type in ("marian", "pegasus")
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("weight", "bias")) and not (sinusoidal and "embed_pos" in name):
                middle, spread = liveliness(name, x.ndim, config)
                x.copy_(torch.randn_like(x) * spread + middle)
    return model


def liveliness(name: str, ndim: int, config: Any) -> tuple[float, float]:
    """Mean and deviation of a parameter, far from what models begin with: each has its effect, and
    generated texts do not repeat one token."""
    width = config.hidden_size**-0.5
    if name.endswith("bias") or ndim == 1:
        return float(name.endswith("weight")), 0.2
    if "pos" in name or "wpe" in name:
        return 0.0, 1.0
    if any(part in name for part in ("embed", "shared", "wte", "lm_head")):
        scaled = "gemma" in config.model_type or getattr(config, "scale_embedding", False)
        return 0.0, 0.1 if scaled else 0.4
    # Not so far that attention is all but hard, and rounding decides: transformers itself would
    # then differ by 1e-3 from what it computes in float64.
    if name.endswith(".q.weight"):  # T5 has no other scale
        return 0.0, 0.4 * width
    return 0.0, width


def save(checkpoint: Checkpoint, model: Any, folder: Path) -> None:
    """Write a model, with a tokenizer whose tokens are the numbers of its ids."""
    if checkpoint.generates:
        settings = {"num_beams": BEAMS, "max_new_tokens": NEW_TOKENS, "do_sample": False,
                    "early_stopping": "never"}  # fmt: skip
        model.generation_config.update(**settings, **checkpoint.generation)
        model.generation_config.eos_token_id = end(model)
    model.save_pretrained(folder)
    vocabulary = {str(i): i for i in range(99)}
    if checkpoint.model_type == "mbart":  # which writes the language beside a text
        vocabulary["en_XX"] = vocabulary.pop("5")
    words = tokenizers.models.WordLevel(vocabulary, unk_token="3")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "2"}))
    if checkpoint.pooling:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"path": path, "type": f"sentence_transformers.models.{kind}"}
            for path, kind in kinds.items()
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(checkpoint.pooling))


def prompts() -> list[list[int]]:
    """Ragged ids of texts to be continued or translated."""
    rng = np.random.default_rng(0)
    return [rng.integers(6, 58, n).tolist() for n in (16, 12, 9)]


def end(model: Any) -> int:
    """An id that greedy texts reach soon, but not at once: the end of theirs."""
    found = generate(model, prompts(), 1)[0]
    first = [ids for (ids,) in found]
    late = [i for ids in first for i in ids[6:] if i not in (*ids[:6], 0, 1, 2, 5, 98)]
    return late[0]


def compute(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The last hidden states of each side and, where there is a head, logits."""
    with torch.no_grad():
        arguments = {name: torch.tensor(x, dtype=torch.long) for name, x in inputs.items()}
        out = model(**arguments, output_hidden_states=True)
    found = {}
    if model.config.is_encoder_decoder:
        found["encoder"] = out.encoder_last_hidden_state
        found["decoder"] = out.decoder_hidden_states[-1]
    else:
        found["hidden"] = out.hidden_states[-1]
    logits = out.get("logits", out.get("prediction_logits"))
    if logits is not None:
        found["logits"] = logits
    return {name: x.float().numpy() for name, x in found.items()}


def generate(
    model: Any, rows: list[list[int]], beams: int
) -> tuple[list[list[tuple[int, ...]]], np.ndarray]:
    """What is generated of each row, best first, ends included; and the scores."""
    length, pad = max(map(len, rows)), model.config.pad_token_id
    ids, mask = np.full((len(rows), length), pad), np.zeros((len(rows), length))
    for i, row in enumerate(rows):  # what a decoder continues, it continues on the right
        here = (
            slice(len(row)) if model.config.is_encoder_decoder else slice(length - len(row), None)
        )
        ids[i, here], mask[i, here] = row, 1
    out = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        num_beams=beams,
        num_return_sequences=beams,
        return_dict_in_generate=True,
        output_scores=True,
    )
    before = 1 if model.config.is_encoder_decoder else length
    stop = model.generation_config.eos_token_id
    texts = [
        tuple(ids[: ids.index(stop) + 1] if stop in ids else ids)
        for ids in out.sequences[:, before:].tolist()
    ]
    if beams == 1:
        steps = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        scores = torch.stack([s[: len(t)].sum() for s, t in zip(steps, texts, strict=True)])
    else:
        scores = out.sequences_scores
    return [texts[i : i + beams] for i in range(0, len(texts), beams)], scores.view(
        -1, beams
    ).numpy()
