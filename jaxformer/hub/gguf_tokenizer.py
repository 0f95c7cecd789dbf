"""The tokenizer in a GGUF file, as the files Hugging Face has for it."""

import itertools
import json
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.data.codec import LLAMA_SPLIT, QWEN_SPLIT
from jaxformer.hub.gguf_file import Header, read_header

MAX_PIECE = 256
"""Characters of a SentencePiece piece that is put together from two; its trainer stops at 16."""
MERGES_PER_PIECE = 16
"""On average; those of Llama 2 and Gemma have two."""
SPACE = "\u2581"


class Type(IntEnum):
    """Of a token (`tokenizer.ggml.token_type`)."""

    UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# How text is split before bytes are merged, by `tokenizer.ggml.pre`.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = [BYTES | {"use_regex": True}]
SMOLLM = [{"type": "Digits", "individual_digits": True}, *GPT2]
LLAMA3 = [_split(LLAMA_SPLIT), BYTES]
QWEN2 = [_split(QWEN_SPLIT), BYTES]
PRE_TOKENIZERS = {
    "gpt-2": GPT2, "default": GPT2, "smollm": SMOLLM, "llama-bpe": LLAMA3, "qwen2": QWEN2,
}  # fmt: skip


def gguf_tokenizer_files(path: Path) -> dict[str, bytes]:
    """What Hugging Face's files of the tokenizer in a GGUF file would hold, by file name.

    Raises `CheckpointError` if the file is damaged, or the tokenizer is of no kind known here.
    """
    header = read_header(path)
    kind = header.get("tokenizer.ggml.model", str)
    tokens = _tokens(header)
    types = _types(header, len(tokens))
    special = {
        name: _token_id(header, key, len(tokens))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    if kind == "gpt2":
        pre = header.get("tokenizer.ggml.pre", str, "default")
        tokenizer, add_bos = _byte_level(header, tokens, pre), pre == "llama-bpe"
    elif kind == "llama":
        unk = None if special["unk"] is None else tokens[special["unk"]]
        tokenizer, add_bos = _sentencepiece(header, tokens, types, unk), True
    else:
        raise header.error(f"its tokenizer {kind!r} is not one of those known here (gpt2, llama)")
    add = {
        "bos": header.get("tokenizer.ggml.add_bos_token", bool, add_bos),
        "eos": header.get("tokenizer.ggml.add_eos_token", bool, False),
    }
    if missing := [name for name, wanted in add.items() if wanted and special[name] is None]:
        raise header.error(
            f"its tokenizer adds {missing[0]} to texts, but does not say which it is"
        )

    named = {i for i in special.values() if i is not None}
    tokenizer |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, token, special=i in named or types[i] == Type.CONTROL)
            for i, token in enumerate(tokens)
            if i in named or types[i] in (Type.CONTROL, Type.USER_DEFINED)
        ],
        "post_processor": _template(tokens, *(special[end] if add[end] else None for end in add)),
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"add_{end}_token": wanted for end, wanted in add.items()},
        **{f"{name}_token": tokens[i] for name, i in special.items() if i is not None},
    }
    if "tokenizer.chat_template" in header.fields:
        config["chat_template"] = header.get("tokenizer.chat_template", str)
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1).encode(),
    }


def _tokens(header: Header) -> list[str]:
    tokens = header.get("tokenizer.ggml.tokens", list)
    if "" in tokens or len(set(tokens)) < len(tokens):
        raise header.error("its tokenizer has a token twice, or an empty one")
    return tokens


def _types(header: Header, n_tokens: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in header.fields:
        return [Type.NORMAL] * n_tokens
    types = header.get("tokenizer.ggml.token_type", np.ndarray)
    if len(types) != n_tokens or not np.isin(types, list(Type)).all():
        raise header.error(
            f"it has {len(types)} token types for {n_tokens} tokens, or unknown ones"
        )
    return types.tolist()


def _token_id(header: Header, name: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in header.fields:
        return None
    if not 0 <= (number := header.get(key, int)) < n_tokens:
        raise header.error(f"{key} is {number}, and it has {n_tokens} tokens")
    return number


def _byte_level(header: Header, tokens: list[str], pre: str) -> dict[str, Any]:
    """Byte-pair encoding (Sennrich et al. 2016) of bytes, each written as a letter, as in GPT-2."""
    if pre not in PRE_TOKENIZERS:
        raise header.error(
            f"its tokenizer splits text as {pre!r}, which is not known here "
            f"({', '.join(PRE_TOKENIZERS)})"
        )
    merges = [merge.split(" ") for merge in header.get("tokenizer.ggml.merges", list)]
    known = set(tokens)
    for merge in merges:
        if len(merge) != 2 or not known.issuperset([*merge, "".join(merge)]):
            raise header.error(f"it merges {' '.join(merge)!r}, which are not two tokens to one")
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "decoder": BYTES,
        # Llama 3 looks a whole word up before it merges.
        "model": _bpe(tokens, merges, ignore_merges=pre == "llama-bpe"),
    }


def _sentencepiece(
    header: Header, tokens: list[str], types: list[int], unk: str | None
) -> dict[str, Any]:
    """SentencePiece's byte-pair encoding (Kudo and Richardson 2018), without normalisation."""
    if header.get("tokenizer.ggml.remove_extra_whitespaces", bool, False):
        raise header.error("its tokenizer removes white space, which is not known here")
    scores = header.get("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(tokens) or not np.all(np.isfinite(scores)):
        raise header.error(f"it has {len(scores)} scores for {len(tokens)} tokens, or one is NaN")
    pieces = {
        token: score
        for token, kind, score in zip(tokens, types, scores.tolist(), strict=True)
        if kind not in (Type.UNKNOWN, Type.CONTROL, Type.BYTE)
    }
    prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    space = {"String": " "}, {"String": SPACE}
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": space[0], "content": SPACE}]
    decoders = [
        {"type": "Replace", "pattern": space[1], "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, _merges(header, pieces))
        | {"unk_token": unk, "fuse_unk": True, "byte_fallback": True},
    }


def _merges(header: Header, pieces: dict[str, float]) -> list[list[str]]:
    """The pairs of pieces that make a third, those of the best scores first."""
    pairs = (
        (-score, -i, [piece[:i], piece[i:]])
        for piece, score in pieces.items()
        if len(piece) <= MAX_PIECE
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    )
    limit = MERGES_PER_PIECE * len(pieces)
    found = list(itertools.islice(pairs, limit + 1))
    if len(found) > limit:
        raise header.error(f"its {len(pieces)} pieces can be made in over {limit} ways")
    return [pair for *_, pair in sorted(found)]


def _bpe(tokens: list[str], merges: list[list[str]], ignore_merges: bool = False) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    """A token that is found in text before anything is split."""
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _template(tokens: list[str], bos: int | None, eos: int | None) -> dict[str, Any] | None:
    """Each text between the begin and end tokens that are added to it, or None."""

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": kind}}
        first, last = (
            [] if end is None else [{"SpecialToken": {"id": tokens[end], "type_id": kind}}]
            for end in (bos, eos)
        )
        return [*first, text, *last]

    ends = {end for end in (bos, eos) if end is not None}
    if not ends:
        return None
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            tokens[end]: {"id": tokens[end], "ids": [end], "tokens": [tokens[end]]} for end in ends
        },
    }
