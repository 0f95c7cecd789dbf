"""What a folder from elsewhere holds: a config, weights, and how to generate. Nothing is executed.

Only JSON and safetensors are read; a config may name code (`auto_map`), which stays a name.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxformer.config import DecodeConfig, ModelConfig, from_json, hint
from jaxformer.errors import CheckpointError, ConfigError
from jaxformer.files import MAX_JSON, read_capped
from jaxformer.hub.engine import settle_head
from jaxformer.hub.families import FAMILIES
from jaxformer.hub.family import Family, read_config
from jaxformer.hub.gguf_model import open_gguf
from jaxformer.hub.gguf_tokenizer import gguf_tokenizer_files
from jaxformer.hub.tensors import Stored, open_safetensors

STOPPING = {"never": "exact", False: "heuristic", True: "full"}
"""Our `early_stopping` for theirs."""
CONFIG, GENERATION, GGUF = "config.json", "generation_config.json", ".gguf"
TOKENIZER = "tokenizer_config.json"
NEW_TOKENS = 128
"""Most tokens generated where a folder sets no limit of its own."""
POOLING: Mapping[str, Any] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    # As sentence-transformers 6 writes it:
    "mean": "mean",
    "cls": "first",
}


class Folder(NamedTuple):
    """A checkpoint of another library, none of whose tensors has been read yet."""

    family: Family
    config: ModelConfig
    decode: DecodeConfig
    theirs: dict[str, Any]
    """Their config.json."""
    generation: dict[str, Any]
    """Their generation_config.json."""
    tensors: dict[str, Stored]
    tokenizer_files: dict[str, bytes]
    """Files of the tokenizer, where they are no files of the folder's own (GGUF)."""


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like a checkpoint of another library."""
    return path.suffix == GGUF or os.path.isfile(path / CONFIG)


def open_checkpoint(path: Path) -> Folder:
    """Read all of a Hugging Face folder or GGUF file but its tensors (and a folder's tokenizer).

    Raises `CheckpointError` if anything is missing, malformed, or of a kind not known here.
    """
    if path.suffix == GGUF:
        theirs, tensors = open_gguf(path)
        family = find_family(theirs, str(path))
        config = settle_head(family, read_config(family, theirs, str(path)), tensors)
        decode = decode_config(config, {}, {}, str(path))
        return Folder(family, config, decode, theirs, {}, tensors, gguf_tokenizer_files(path))
    theirs = read_json(path / CONFIG)
    generation = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    family = find_family(theirs, str(path / CONFIG))
    config = read_config(family, theirs, str(path / CONFIG))
    config = sentence_config(path, config)
    decode = decode_config(config, theirs, generation, str(path / GENERATION))
    tensors = open_safetensors(path)
    config = settle_head(family, config, tensors)
    return Folder(family, config, decode, theirs, generation, tensors, {})


def find_family(theirs: Mapping[str, Any], where: str) -> Family:
    """The family of a config; raises `CheckpointError` if there is none."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model type {kind!r} is not known here.{hint(str(kind), FAMILIES)} "
            f"Known are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[kind]


def sentence_config(path: Path, config: ModelConfig) -> ModelConfig:
    """`config` with the pooling that sentence-transformers' files beside it ask for."""
    if config.kind != "encoder-only" or not (path / "modules.json").is_file():
        return config
    modules = read_json(path / "modules.json", list)
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules if isinstance(m, dict)]
    folders = [str(m.get("path", "")) for m in modules if isinstance(m, dict)]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise CheckpointError(
            f"{path / 'modules.json'} asks for {', '.join(kinds)}; known here are Transformer, "
            "Pooling and, if need be, Normalize."
        )
    if not folders[1].replace("_", "").isalnum():
        raise CheckpointError(f"{path / 'modules.json'}: {folders[1]!r} is no plain folder name.")
    where = path / folders[1] / CONFIG
    settings = read_json(where)
    asked = [key for key in settings if key.startswith("pooling_mode_") and settings[key]]
    asked += [settings["pooling_mode"]] if "pooling_mode" in settings else []
    if len(asked) != 1 or str(asked[0]) not in POOLING:
        raise CheckpointError(
            f"{where} pools by {', '.join(map(str, asked)) or 'nothing'}; known here are "
            f"{', '.join(POOLING)}, one of them."
        )
    return dataclasses.replace(
        config,
        pooling=POOLING[str(asked[0])],
        pooling_norm="Normalize" in kinds,
        pooling_length=_sentence_length(path, config.max_length),
    )


def _sentence_length(path: Path, most: int) -> int:
    """How many tokens of a text sentence-transformers reads: of its own settings or, where they
    are silent, the tokenizer's."""
    lengths = []
    for where in sorted(path.glob("sentence_*_config.json"))[:1]:
        settings = read_json(where)
        lengths.append((where, "max_seq_length", settings.get("max_seq_length")))
        if settings.get("do_lower_case"):
            raise CheckpointError(
                f"{where}: do_lower_case is not done here; set it to false there, and give texts "
                "in lower case."
            )
    if (where := path / TOKENIZER).is_file():
        lengths.append((where, "model_max_length", read_json(where).get("model_max_length")))
    for where, key, length in lengths:
        if length is not None:
            if type(length) not in (int, float) or not length >= 2:
                raise CheckpointError(f"{where}: {key} is {length!r}, no number of tokens.")
            return int(min(length, most))
    return 0


def decode_config(
    config: ModelConfig, theirs: Mapping[str, Any], generation: Mapping[str, Any], where: str
) -> DecodeConfig:
    """How the folder's model generates unless told otherwise.

    Their lengths count the decoder's start token, ours only what is generated.
    """
    if config.n_decoder_layers == 0:
        return DecodeConfig()
    start = 1 if config.n_encoder_layers else 0
    # Older folders keep these in config.json.
    given = {k: v for k, v in (generation or theirs).items() if v is not None}
    try:
        most = given.get("max_new_tokens") or start and given.get("max_length", 0) - start
        least = given.get("min_new_tokens") or start and given.get("min_length", 0) - start
        last = given.get("forced_eos_token_id", -1)
        decay_start, decay = given.get("exponential_decay_length_penalty", (0, 1.0))
        biases = {ids[0]: bias for ids, bias in given.get("sequence_bias", []) if len(ids) == 1}
        fields: dict[str, Any] = {
            "max_length": most if most > 0 else min(NEW_TOKENS, config.max_length),
            "min_length": max(least, 0),
            "beams": given.get("num_beams", 1),
            "length_penalty": given.get("length_penalty", 1.0),
            "length_norm": "plain",
            "early_stopping": STOPPING[given.get("early_stopping", False)],
            "forced_first": given.get("forced_bos_token_id", -1),
            "forced_last": last[0] if isinstance(last, list) else last,
            "suppress": given.get("suppress_tokens", []),
            "suppress_first": given.get("begin_suppress_tokens", []),
            "bad_ids": given.get("bad_words_ids", []),
            "logit_bias": list(biases.items()),
            "repetition_penalty": given.get("repetition_penalty", 1.0),
            "no_repeat_ngram": given.get("no_repeat_ngram_size", 0),
            "encoder_no_repeat_ngram": given.get("encoder_no_repeat_ngram_size", 0),
            "length_decay": decay,
            "length_decay_start": decay_start,
        }
        if given.get("do_sample"):
            fields |= {
                "beams": 1,
                "samples": 1,
                "temperature": given.get("temperature", 1.0),
                "top_k": given.get("top_k", 50),
                "top_p": given.get("top_p", 1.0),
                "min_p": given.get("min_p", 0.0),
                "typical_p": given.get("typical_p", 1.0),
                "epsilon": given.get("epsilon_cutoff", 0.0),
                "eta": given.get("eta_cutoff", 0.0),
            }
        return from_json(DecodeConfig, json.dumps(fields), where)
    except ConfigError as e:
        raise CheckpointError(f"{where}: {e}") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as e:
        raise CheckpointError(f"{where} is malformed: {e}; download it again.") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """An object, or a list, in a JSON file of bounded size; raises `CheckpointError`."""
    try:
        value = json.loads(read_capped(path, MAX_JSON))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON ({e}); download it again.") from None
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} holds no JSON {kind.__name__}; download it again.")
    return value
