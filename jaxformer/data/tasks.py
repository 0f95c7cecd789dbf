"""Text to ids: what a model reads and what it learns to write."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxformer.config import DataConfig
from jaxformer.data.sources import Example
from jaxformer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rows:
    """Tokenised examples, flat: example i is `ids[offsets[i]:offsets[i + 1]]`, its end included.

    For lm and mlm all sources are empty (without an end, too) and the text is the target.
    """

    source_ids: Int[np.ndarray, "source_tokens"]
    source_offsets: Int[np.ndarray, "examples+1"]
    target_ids: Int[np.ndarray, "target_tokens"]
    target_offsets: Int[np.ndarray, "examples+1"]

    def __len__(self) -> int:
        return len(self.target_offsets) - 1


def source_text(config: DataConfig, text: str) -> str:
    """What the model reads for `text`: the prefix, then the text, spelled out if so configured.

    >>> source_text(DataConfig(spell=True), "Ab")
    'a b'
    """
    return config.prefix + (" ".join(text.lower()) if config.spell else text)


def encode_source(config: DataConfig, tokenizer: Tokenizer, text: str) -> Int[np.ndarray, "S"]:
    """What the encoder reads for the source `text`."""
    return np.array(tokenizer.source(source_text(config, text)), np.int32)


def encode_target(config: DataConfig, tokenizer: Tokenizer, text: str) -> Int[np.ndarray, "T"]:
    """What is to be learnt of the target `text`: what a decoder writes or, for mlm, reads, too."""
    ids = tokenizer.source(text) if config.task == "mlm" else tokenizer.target(text)
    return np.array(ids, np.int32)


def texts(config: DataConfig, examples: Iterable[Example]) -> Iterator[str]:
    """Every text that the model will read or write, to train a tokenizer on."""
    for example in examples:
        if config.task == "seq2seq":
            yield source_text(config, example.source)
        yield from example.targets


def tokenise(
    config: DataConfig, tokenizer: Tokenizer, examples: Iterable[Example], one_per_target: bool
) -> Rows:
    """Tokenise `examples`, each as one row (its first target) or as one for each target."""
    source, target = array("i"), array("i")
    source_offsets, target_offsets = array("q", [0]), array("q", [0])
    for example in examples:
        ids = []
        if config.task == "seq2seq":
            ids = encode_source(config, tokenizer, example.source).tolist()
        for text in example.targets if one_per_target else example.targets[:1]:
            source.extend(ids)
            source_offsets.append(len(source))
            target.extend(encode_target(config, tokenizer, text).tolist())
            target_offsets.append(len(target))
    return Rows(
        np.array(source, np.int32),
        np.array(source_offsets, np.int64),
        np.array(target, np.int32),
        np.array(target_offsets, np.int64),
    )
