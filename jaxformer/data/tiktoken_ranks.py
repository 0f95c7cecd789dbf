"""tiktoken's files: byte-level BPE as a list of tokens in base64, each with its rank.

The rank of a token is its id, and says which pairs merge first (Sennrich et al. 2016).
"""

import base64
import binascii

from jaxformer.data import special_tokens
from jaxformer.data.codec import (
    LLAMA_SPLIT,
    QWEN_SPLIT,
    BackendCodec,
    add_tokens,
    finish,
    rust,
    surround,
)
from jaxformer.data.special_tokens import AddedToken, Files, check_id, refusing
from jaxformer.errors import DataError

MAX_TOKEN = 256
"""Bytes of the longest token; the longest of any published file has 128."""
LLAMA_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)  # fmt: skip
QWEN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
)  # fmt: skip
FAMILIES = {"llama": (LLAMA_SPLIT, LLAMA_SPECIALS), "qwen": (QWEN_SPLIT, QWEN_SPECIALS)}


def is_ranks(data: bytes) -> bool:
    """Whether a file's first line is a token in base64 and a rank.

    >>> is_ranks(b"IQ== 0\\nIg== 1\\n")
    True
    """
    token, _, rank = data[:500].partition(b"\n")[0].partition(b" ")
    return rank.strip().isdigit() and not token.strip(BASE64)


BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="


def read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """The rank of each token of a file."""
    ranks = {}
    for n, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        encoded, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
            number = int(rank) if len(rank) < 10 else -1
        except (binascii.Error, ValueError):
            token, number = b"", -1
        if not 0 < len(token) <= MAX_TOKEN or token in ranks:
            raise DataError(f"{name}:{n} is no new token in base64 with its rank; get it again.")
        ranks[token] = check_id(number, f"{name}:{n}: the rank")
    return ranks


def byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's vocabularies (Radford et al. 2019).

    >>> byte_letters()[ord("A")], byte_letters()[ord(" ")]
    ('A', 'Ġ')
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def read_tiktoken(files: Files, name: str, model_type: str) -> BackendCodec:
    """The codec of a tiktoken file, with the split and special tokens of its family.

    Tokens that tokenizer_config.json names take the place of the family's own.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if model_type not in FAMILIES:
        raise DataError(
            f"{name}: the tiktoken files of {', '.join(FAMILIES)} can be read, but this is a "
            f"{model_type!r}, which splits text in its own way; add its tokenizer.json."
        )
    pattern, specials = FAMILIES[model_type]
    ranks = read_ranks(files[name], name)
    letters = byte_letters()
    vocabulary = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    # Any two tokens that make up a third may merge, at the rank of the third.
    pairs = sorted(
        (rank, ranks[token[:i]], ranks[token[i:]], token[:i], token[i:])
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    )
    merges = [
        ("".join(letters[b] for b in left), "".join(letters[b] for b in right))
        for *_, left, right in pairs
    ]
    with refusing(name):
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        backend.decoder = decoders.ByteLevel()
        first = max(ranks.values(), default=-1) + 1
    if not special_tokens.added_tokens(files):
        backend.add_special_tokens([rust(AddedToken(t)) for t in specials])
    add_tokens(backend, files, name)
    for token in specials[:1]:
        if model_type == "llama" and backend.token_to_id(token) is not None:
            surround(backend, [token], [])
    check_id(first, f"{name}: the largest rank")
    return finish(backend, files, name)
