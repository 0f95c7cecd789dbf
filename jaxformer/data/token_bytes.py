"""The bytes that each token adds to a text, for every kind of tokenizer here."""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from jaxformer.data.codec import BackendCodec
from jaxformer.data.foreign import ForeignTokenizer
from jaxformer.data.marian import MarianCodec
from jaxformer.data.pieces import PieceCodec
from jaxformer.data.tiktoken_ranks import byte_letters
from jaxformer.data.tokenizer import (
    N_SPECIAL,
    ByteTokenizer,
    SentencePieceTokenizer,
    SymbolTokenizer,
    Tokenizer,
)
from jaxformer.errors import ConfigError

SPACE = "\u2581"
"""How SentencePiece writes a space."""


class TokenBytes(NamedTuple):
    """The bytes of each id, None if it is no text."""

    first: tuple[bytes | None, ...]
    """Where a text begins: many tokenizers take a space off there."""
    later: tuple[bytes | None, ...]


@lru_cache(8)
def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """What each id of `tokenizer` adds to a text.

    Raises `ConfigError` if its texts are not made by joining what tokens stand for.
    """
    ids = range(tokenizer.vocab_size)
    match tokenizer:
        case ByteTokenizer():
            return _whole([bytes([i - N_SPECIAL]) if i >= N_SPECIAL else None for i in ids])
        case SymbolTokenizer(symbols=symbols, separator=separator):
            special = (None,) * N_SPECIAL
            words = tuple(s.encode(errors="replace") for s in symbols)
            return TokenBytes(
                special + words, special + tuple(separator.encode() + w for w in words)
            )
        case SentencePieceTokenizer():
            return _spaced(_pieces(tokenizer._processor, ids), True)
        case ForeignTokenizer(writer=writer):
            found = _foreign(writer)
            return TokenBytes(
                *(
                    tuple(None if i in tokenizer.special_ids else b for i, b in enumerate(side))
                    + (None,) * (len(ids) - len(side))
                    for side in found
                )
            )
    raise ConfigError(f"a {type(tokenizer).__name__} cannot be constrained.")


def _foreign(writer: object) -> TokenBytes:
    if getattr(writer, "clean", False):
        raise ConfigError(
            "this tokenizer cleans up spaces in its texts, so no constraint could hold; set "
            "clean_up_tokenization_spaces to false in its tokenizer_config.json."
        )
    match writer:
        case BackendCodec():
            return _backend(writer)
        case PieceCodec():
            pieces = _pieces(writer.processor, range(writer.end - writer.offset))
            by_id: list[bytes | None] = [None] * writer.size
            for i in range(writer.lowest, writer.end):
                # What is added to the pieces would begin the text anew, without its space.
                by_id[i] = None if i in writer.added else pieces[i - writer.offset]
            return _spaced(by_id, _takes_space(writer.processor))
        case MarianCodec():
            # Its texts lose the spaces at their end, so no token may end in one.
            texts = [writer.token(i) for i in range(writer.size)]
            unwritten = writer.special_ids
            return _spaced(
                [
                    None if not t or t.endswith(SPACE) or i in unwritten else _spelt(t)
                    for i, t in enumerate(texts)
                ],
                True,
            )
    raise ConfigError("this tokenizer cannot be constrained; its tokens stand for no bytes.")


def _backend(writer: BackendCodec) -> TokenBytes:
    """By the decoder that tokenizer.json names."""
    description = json.loads(writer.backend.to_str())
    decoder = description.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    kinds = [part.get("type") for part in parts]
    added = writer.backend.get_added_tokens_decoder()
    texts = [writer.token(i) for i in range(writer.size)]
    if kinds == ["ByteLevel"]:
        letters = {letter: byte for byte, letter in enumerate(byte_letters())}

        def spelt(i: int, text: str) -> bytes | None:
            if i in added or not all(c in letters for c in text):
                return text.encode(errors="replace") or None
            return bytes(letters[c] for c in text) or None

        return _whole([spelt(i, text) for i, text in enumerate(texts)])
    known = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    spaces = [p for p in parts if p.get("type") in ("Metaspace", "Replace")]
    written = [(p.get("replacement"), p.get("pattern"), p.get("content")) for p in spaces]
    usual = all(w in ((SPACE, None, None), (None, {"String": SPACE}, " ")) for w in written)
    if not usual or not set(kinds) <= known:
        raise ConfigError(
            f"tokenizer.json: its decoder ({', '.join(map(str, kinds))}) does more than to join "
            "the bytes of tokens, so its texts cannot be constrained."
        )
    takes = any(
        p.get("prepend_scheme", "always") != "never" if p["type"] == "Metaspace" else True
        for p in parts
        if p["type"] in ("Metaspace", "Strip")
    )
    fallback = "ByteFallback" in kinds
    found = [
        text.encode(errors="replace") or None if i in added else _spelt(text, fallback)
        for i, text in enumerate(texts)
    ]
    return _spaced(found, takes)


def _spelt(text: str, fallback: bool = False) -> bytes | None:
    if fallback and (byte := re.fullmatch("<0x([0-9A-F]{2})>", text)):
        return bytes.fromhex(byte[1])
    return text.replace(SPACE, " ").encode(errors="replace") or None


def _pieces(processor: Any, ids: Iterable[int]) -> list[bytes | None]:
    def spelt(i: int) -> bytes | None:
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            return None
        return _spelt(processor.id_to_piece(i), processor.is_byte(i))

    return [spelt(i) for i in ids]


def _takes_space(processor: Any) -> bool:
    """Whether a text loses the space that it begins with."""
    return not processor.decode_pieces([SPACE + "a"]).startswith(" ")


def _whole(tokens: list[bytes | None]) -> TokenBytes:
    return TokenBytes(tuple(tokens), tuple(tokens))


def _spaced(tokens: list[bytes | None], takes: bool) -> TokenBytes:
    """Of tokens that have their spaces, one of which is taken where a text begins.

    A text may not begin with two spaces then, of which some tokenizers take both.
    """
    first = [t[1:] if takes and t and t.startswith(b" ") else t for t in tokens]
    return TokenBytes(tuple(None if t == b"" else t for t in first), tuple(tokens))
