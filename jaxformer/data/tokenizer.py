"""Text to ids and back: symbols (characters or words), bytes, and SentencePiece."""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jaxformer.config import DataConfig
from jaxformer.errors import DataError
from jaxformer.files import read_capped

MASK = "<mask>"
"""What stands for a mask in a text that is to be filled in."""
N_SPECIAL = 4
"""Ids below this are special: padding, end, unknown and mask."""
MAX_BYTES = 64 * 2**20
"""Largest tokenizer file that is read; SentencePiece parses it in native code."""
SETTINGS, MODEL = "settings.json", "tokenizer.model"


class Tokenizer(Protocol):
    """Text to ids and back. What is written here holds for the tokenizers trained here."""

    pad_id: int = 0
    eos_id: int = 1
    """What ends a text in training."""
    unk_id: int = 2
    mask_id: int = 3
    start_id: int = 0
    """What a decoder reads first: the padding id, as in T5 (Raffel et al. 2020)."""
    stop_ids: tuple[int, ...] = (1,)
    """Every id that ends a generated text."""
    special_ids: frozenset[int] = frozenset(range(N_SPECIAL))
    """Ids that stand for no text."""
    chat_template: str | None = None
    """How a conversation is written, in jinja2's language."""
    cleans: bool = False
    """Whether a space of a text may go, for the sake of what follows it."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone, with none put before or after it."""
        ...

    def source(self, text: str) -> list[int]:
        """What an encoder reads for `text`."""
        return [*self.encode(text), self.eos_id]

    def masked(self, text: str) -> list[int]:
        """What an encoder reads for `text`, some of whose tokens are masks, written as such."""
        first, *others = map(self.encode, text.split(MASK))
        return [*first, *(i for part in others for i in (self.mask_id, *part)), self.eos_id]

    def target(self, text: str) -> list[int]:
        """What a decoder learns to write for `text`, after `start_id`."""
        return [*self.encode(text), self.eos_id]

    def prompt(self, text: str) -> list[int]:
        """What a decoder without an encoder reads, to continue `text`."""
        return [self.start_id, *self.encode(text)]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """What a chat model continues with its answer: `messages` have a "role" and "content".

        Raises `DataError` if there is no chat template, or it refuses the messages.
        """
        raise DataError(
            "this tokenizer has no chat template (a file chat_template.jinja, or chat_template in "
            "tokenizer_config.json), so the model may be none for chats; use prompts."
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids before the first of `stop_ids`, without special ones."""
        ...

    def decode_token(self, token_id: int) -> str:
        """How one id is written, special or not."""
        if token_id in self.special_ids:
            return ("<pad>", "</s>", "<unk>", "<mask>")[token_id]
        return self.decode([token_id])

    def token_text(self, token_id: int, *, source: bool = False) -> str:
        """The text of one id of a target (or of a source, whose ids may be others'); of one that
        has none, its name."""
        return self.decode([token_id]) or self.decode_token(token_id)

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by file name."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of what `save` writes, in hexadecimal."""
        return hashlib.sha256(b"".join(self.files().values())).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder`, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (folder / name).write_bytes(data)


def content(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """The ids that stand for text: those before the first stop, without special and foreign ones.

    >>> content([5, 0, 999, 6, 1, 7], ByteTokenizer())
    [5, 6]
    """
    kept = []
    for i in map(int, ids):
        if i in tokenizer.stop_ids:
            break
        if 0 <= i < tokenizer.vocab_size and i not in tokenizer.special_ids:
            kept.append(i)
    return kept


def settings(kind: str, **fields: Any) -> bytes:
    """The settings file of a tokenizer of type `kind`."""
    return (json.dumps({"type": kind, **fields}, indent=1) + "\n").encode()


@dataclass(frozen=True)
class SymbolTokenizer(Tokenizer):
    """Characters (separator "") or words between white space (separator " ")."""

    symbols: tuple[str, ...]
    separator: str

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols, N_SPECIAL)}

    @property
    def vocab_size(self) -> int:
        return len(self.symbols) + N_SPECIAL

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(symbol, self.unk_id) for symbol in split(text, self.separator)]

    def decode(self, ids: Iterable[int]) -> str:
        known = content(ids, self)
        return self.separator.join(self.symbols[i - N_SPECIAL] for i in known)

    def files(self) -> dict[str, bytes]:
        return {
            SETTINGS: settings("symbols", symbols=self.symbols, separator=self.separator),
        }


def split(text: str, separator: str) -> Sequence[str]:
    """The words of `text`, or its characters when `separator` is empty."""
    return text.split() if separator else text


@dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, each moved up past the special ids (ByT5, Xue et al. 2022)."""

    @property
    def vocab_size(self) -> int:
        return 256 + N_SPECIAL

    def encode(self, text: str) -> list[int]:
        return [byte + N_SPECIAL for byte in text.encode(errors="replace")]

    def decode(self, ids: Iterable[int]) -> str:
        known = content(ids, self)
        return bytes(i - N_SPECIAL for i in known).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        return {SETTINGS: settings("byte")}


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """Subword pieces with bytes for what they do not cover (Kudo and Richardson 2018).

    Raises `DataError` if `model` is no SentencePiece model with the special ids used here.
    """

    model: bytes

    def __post_init__(self) -> None:
        try:
            processor = self._processor
        except RuntimeError:
            raise DataError("this is not a SentencePiece model.") from None
        found = processor.pad_id(), processor.eos_id(), processor.unk_id()
        if found != (0, 1, 2) or not processor.is_control(self.mask_id):
            raise DataError(
                f"this SentencePiece model has pad, eos, unk at {found}; they must be 0, 1, 2, and "
                "a control symbol for masks at 3. Train one with `jaxformer tokenizer`."
            )

    @cached_property
    def _processor(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def masked(self, text: str) -> list[int]:
        """A mask takes the spaces around it: a piece that begins a word has one in it."""
        return super().masked(re.sub(f" ?{MASK} ?", MASK, text))

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(content(ids, self))

    def files(self) -> dict[str, bytes]:
        return {SETTINGS: settings("sentencepiece"), MODEL: self.model}


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train byte-pair pieces (Sennrich et al. 2016): about ten times faster than unigram ones.

    Text is not normalised, so that it comes back as it was. One thread, since the number of
    threads is written into the model and so changes its hash.
    """
    import sentencepiece

    # The trainer passes over long sentences without a word, so it gets lines in short stretches.
    stretches = (
        line[i : i + 1000]
        for text in texts
        for line in text.split("\n")
        for i in range(0, len(line), 1000)
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=stretches,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            control_symbols=["<mask>"],
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as e:
        raise DataError(
            f"SentencePiece could not train {vocab_size} pieces on this text: {e}. It needs text, "
            "and a data.vocab_size over 260 and the number of different characters."
        ) from None
    return SentencePieceTokenizer(model.getvalue())


def train_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """Make the kind of tokenizer that `config.tokenizer` names, from `texts`.

    Raises `DataError` if there is no text.
    """
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "sentencepiece":
        return train_sentencepiece(texts, config.vocab_size)
    separator = " " if config.tokenizer == "word" else ""
    symbols = tuple(sorted({symbol for text in texts for symbol in split(text, separator)}))
    if not symbols:
        raise DataError("there is no text to make a tokenizer from; is the training file empty?")
    return SymbolTokenizer(symbols, separator)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`.

    Raises `DataError`, naming the file, if one is missing, too large or malformed.
    """
    path = Path(folder) / SETTINGS
    try:
        fields = json.loads(read_capped(path, MAX_BYTES, DataError))
    except (ValueError, RecursionError) as e:
        raise DataError(
            f"{path} is not JSON ({e}); write it again with `jaxformer tokenizer`."
        ) from None
    match fields:
        case {"type": "byte", **rest} if not rest:
            return ByteTokenizer()
        case {"type": "sentencepiece", **rest} if not rest:
            try:
                return SentencePieceTokenizer(
                    read_capped(path.with_name(MODEL), MAX_BYTES, DataError)
                )
            except DataError as e:
                raise DataError(f"{path.with_name(MODEL)}: {e}") from None
        case {
            "type": "symbols",
            "symbols": list(symbols),
            "separator": "" | " " as separator,
            **rest,
        }:
            # Each symbol must be what splitting can yield, or it could never be encoded.
            if (
                not rest
                and all(isinstance(s, str) and [*split(s, separator)] == [s] for s in symbols)
                and len(set(symbols)) == len(symbols) > 0
            ):
                return SymbolTokenizer(tuple(symbols), separator)
        case {
            "type": "foreign",
            "config": dict(config),
            "generation": dict(generation),
            **rest,
        } if not rest:
            from jaxformer.data.foreign import read_tokenizer

            return read_tokenizer(path.parent, config, generation)
    raise DataError(
        f"{path} describes no tokenizer: it needs a type (as byte or sentencepiece) and, for "
        "symbols, a list of different ones and a separator; run `jaxformer tokenizer` again."
    )
