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
torch.set_num_threads(1)  # for models this small, more only wait for each other


def make(checkpoint: Checkpoint, lively: bool = False) -> Any:
    """A model with random parameters: calm to compare numbers by, lively to compare texts."""
    torch.manual_seed(checkpoint.seed)
    config = transformers.AutoConfig.for_model(checkpoint.model_type, **checkpoint.config)
    model = getattr(transformers, checkpoint.architecture)(config).eval()
    if checkpoint.untied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(config.vocab_size, config.d_model))
    sinusoidal = config.model_type in ("marian", "pegasus")
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("weight", "bias")) and not (sinusoidal and "embed_pos" in name):
                middle, spread = parameter(name, x.ndim, config, lively)
                x.copy_(torch.randn_like(x) * spread + middle)
    return model


def parameter(name: str, ndim: int, config: Any, lively: bool) -> tuple[float, float]:
    """Mean and deviation of a parameter, far from what models begin with: each has its effect.

    Lively ones make texts that do not repeat one token. Their attention is all but hard, though,
    so that rounding grows: transformers itself is then off by 1e-3 from what it is in float64.
    """
    width = config.hidden_size**-0.5
    gemma = "gemma" in config.model_type
    if name.endswith("bias") or ndim == 1:  # Gemma adds the 1 itself
        return float(name.endswith("weight") and not gemma), 0.2
    if "pos" in name or "wpe" in name:
        return 0.0, 1.0
    if any(part in name for part in ("embed", "shared", "wte", "lm_head")):
        scaled = gemma or getattr(config, "scale_embedding", False)
        return 0.0, 0.12 if scaled else 0.5 if lively else 0.4
    if not lively:  # T5 has no scale of attention but this one
        return 0.0, (0.4 if name.endswith(".q.weight") else 1.0) * width
    if name.endswith("q_proj.weight"):
        return 0.0, 5 * width
    return 0.0, (0.5 if name.endswith("attn.out_proj.weight") else 2.0) * width


def save(checkpoint: Checkpoint, model: Any, folder: Path) -> None:
    """Write a model, with a tokenizer that reads what `spell` writes."""
    if checkpoint.generates:
        settings = {"num_beams": BEAMS, "max_new_tokens": NEW_TOKENS, "do_sample": False,
                    "early_stopping": "never"}  # fmt: skip
        model.generation_config.update(**settings, **checkpoint.generation)
        model.generation_config.eos_token_id = end(model)
    model.save_pretrained(folder)
    vocabulary = {spell([i]): i for i in range(99)}
    if checkpoint.model_type == "mbart":  # which writes the language beside a text
        vocabulary["en_XX"] = vocabulary.pop(spell([5]))
    words = tokenizers.models.WordLevel(vocabulary, unk_token=spell([3]))
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": spell([2])}))
    if checkpoint.pooling:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"path": path, "type": f"sentence_transformers.models.{kind}"}
            for path, kind in kinds.items()
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(checkpoint.pooling))


def spell(ids: list[int]) -> str:
    """Ids as a text for the tokenizer of `save`; no token is part of another."""
    return " ".join(f"<{i}>" for i in ids)


def prompts() -> list[list[int]]:
    """Ragged ids of texts to be continued or translated."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 58, (3, 16)).tolist()
    return [row[:n] for row, n in zip(ids, (16, 12, 9), strict=True)]


def end(model: Any) -> int:
    """An id that some greedy text reaches, but not at once: the end of texts."""
    model.generation_config.eos_token_id = None
    for (ids,) in generate(model, prompts(), 1)[0]:
        for late in ids[6:] + ids[1:]:
            if late > 2 and late != model.config.pad_token_id and late != ids[0]:
                return late
    raise AssertionError("all texts repeat what they begin with")


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
    model: Any, rows: list[list[int]], beams: int, settings: Mapping[str, Any] | None = None
) -> tuple[list[list[tuple[int, ...]]], np.ndarray]:
    """What is generated of each row, best first, ends included; and the scores.

    `settings` come before those of the model's own generation config.
    """
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
        num_return_sequences=beams,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **{"num_beams": beams, **(settings or {})},
    )
    before = 1 if model.config.is_encoder_decoder else length
    stop = model.generation_config.eos_token_id
    texts = [
        tuple(ids[: ids.index(stop) + 1] if stop in ids else ids)
        for ids in out.sequences[:, before:].tolist()
    ]
    if beams == 1:
        steps = torch.stack(out.logits, 1).log_softmax(-1)
        steps = steps.gather(-1, out.sequences[:, before:, None])[..., 0]
        scores = torch.stack([s[: len(t)].sum() for s, t in zip(steps, texts, strict=True)])
    else:
        scores = out.sequences_scores
    return [texts[i : i + beams] for i in range(0, len(texts), beams)], scores.view(
        -1, beams
    ).numpy()
