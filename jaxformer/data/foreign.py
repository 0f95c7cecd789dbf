"""The tokenizer of a Hugging Face directory, read without the transformers package.

Which files there are says how text is split; the config of generation, then of the model, then of
the tokenizer, which ids begin and end it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxformer.data import special_tokens
from jaxformer.data.chat import render_chat
from jaxformer.data.codec import Codec
from jaxformer.data.codecs import NAMES, read_codecs
from jaxformer.data.pieces import MBART_50
from jaxformer.data.special_tokens import CONFIG, MAX_IDS, Files
from jaxformer.data.tokenizer import MAX_BYTES, SETTINGS, Tokenizer, content, settings
from jaxformer.errors import DataError
from jaxformer.files import read_capped

KIND = "foreign"
CONFIG_KEYS = (
    "model_type", "is_encoder_decoder", "vocab_size", "bos_token_id", "eos_token_id",
    "pad_token_id", "sep_token_id", "mask_token_id", "decoder_start_token_id",
    "forced_bos_token_id",
)  # fmt: skip
"""What of config.json and generation_config.json says something about the tokenizer."""
SEQ2SEQ = ("t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus")
"""Encoder-decoders, if config.json does not say."""
USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]", "<mask_2>"),
}
"""Tokens of each role where no file names one."""


@dataclass(frozen=True, kw_only=True)
class ForeignTokenizer(Tokenizer):
    """A foreign tokenizer: two are equal if their files and settings are.

    Special tokens that stand in a text are read as such, as by transformers: `>>fr<<`, `[MASK]`.
    """

    originals: Mapping[str, bytes] = field(repr=False)
    """The files it was made from, by name."""
    config: Mapping[str, Any]
    """What config.json says about it."""
    generation: Mapping[str, Any]
    """What generation_config.json says."""
    reader: Codec = field(repr=False, compare=False)
    writer: Codec = field(repr=False, compare=False)
    before: tuple[int, ...]
    """What comes before a source or prompt."""
    after: tuple[int, ...]
    before_target: tuple[int, ...]
    after_target: tuple[int, ...]
    pad_id: int
    eos_id: int
    unk_id: int
    mask_id: int
    start_id: int
    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]
    chat_template: str | None
    named: Mapping[str, str]
    """The special tokens that a chat template knows, as bos_token."""

    def __reduce__(self) -> tuple[Any, ...]:
        return from_files, (self.originals, self.config, self.generation)

    def __hash__(self) -> int:
        return int(self.hash, 16)

    @property
    def vocab_size(self) -> int:
        return max(self.reader.size, self.writer.size)

    @property
    def cleans(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.writer, "clean", False)

    def encode(self, text: str) -> list[int]:
        return self.reader.encode(text)

    def source(self, text: str) -> list[int]:
        return [*self.before, *self.reader.encode(text), *self.after]

    def masked(self, text: str) -> list[int]:
        return self.source(text)

    def target(self, text: str) -> list[int]:
        return [*self.before_target, *self.writer.encode(text), *self.after_target]

    def prompt(self, text: str) -> list[int]:
        return [*self.before, *self.encode(text)] or [self.start_id]

    def decode(self, ids: Iterable[int]) -> str:
        return self.writer.decode(content(ids, self))

    def decode_token(self, token_id: int) -> str:
        return self.writer.token(token_id)

    def token_text(self, token_id: int, *, source: bool = False) -> str:
        if source and self.reader is not self.writer:
            return self.reader.token(token_id)
        return super().token_text(token_id)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if self.chat_template is None:
            return super().chat(messages)
        text = render_chat(
            self.chat_template, messages, add_generation_prompt=True, specials=self.named
        )
        return self.encode(text)

    def original_files(self) -> dict[str, bytes]:
        """The files of the directory it was read from, by name."""
        return dict(self.originals)

    def files(self) -> dict[str, bytes]:
        fields = {"config": dict(self.config), "generation": dict(self.generation)}
        written = {SETTINGS: settings(KIND, **fields), **self.originals}
        return {name: written[name] for name in sorted(written)}


def read_tokenizer(
    folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> ForeignTokenizer:
    """The tokenizer of a Hugging Face directory.

    `config` and `generation` are its config.json and generation_config.json (or empty). Raises
    `DataError`, naming the file, if one is missing, too large or malformed.
    """
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as e:
        raise DataError(f"cannot read the directory {folder}: {e.strerror}.") from None
    used = [name for name in names if name in NAMES or name.endswith(".tiktoken")]
    files = {name: read_capped(folder / name, MAX_BYTES, DataError) for name in used}
    try:
        return from_files(files, config, generation)
    except DataError as e:
        raise DataError(f"{folder}/{e}") from None


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says about the tokenizer, always in one order: it is hashed."""
    return {key: config[key] for key in CONFIG_KEYS if config.get(key) is not None}


def from_files(
    files: Files, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> ForeignTokenizer:
    """The tokenizer of these files; errors begin with the name of one."""
    config, generation = _relevant(config), _relevant(generation)
    model_type = config.get("model_type", "")
    if not isinstance(model_type, str):
        raise DataError(f"config.json: model_type is {model_type!r}, no name.")
    reader, writer = read_codecs(files, model_type)
    roles = special_tokens.role_tokens(files)
    both = (("generation_config.json", generation), ("config.json", config))
    own_size = _id(config.get("vocab_size", 0), MAX_IDS, "config.json: vocab_size")
    bound = max(reader.size, writer.size, own_size)

    def stated(name: str) -> list[int]:
        """The ids that the configs give for `name`, the first that gives any."""
        for file, fields in both:
            value = fields.get(f"{name}_token_id")
            values = value if isinstance(value, list) else [value]
            if ids := [_id(v, bound, f"{file}: {name}_token_id") for v in values if v not in NONE]:
                return ids
        return []

    def own(name: str) -> list[int]:
        """The id of the tokenizer's token of a role, or of the usual one."""
        tokens = [roles[name].content] if name in roles else USUAL.get(name, ())
        return [i for t in tokens if (i := reader.id(t)) is not None][:1]

    encoder_decoder = config.get("is_encoder_decoder", model_type in SEQ2SEQ) is True
    named_eos = [i for role in ("eos", "sep") if role in roles for i in own(role)]
    stops = stated("eos") or named_eos or stated("sep") or own("eos") or list(reader.after[-1:])
    if not stops:
        raise DataError(f"{CONFIG}: no file says which token ends a text; set its eos_token.")
    eos = named_eos[0] if named_eos and named_eos[0] in stops else stops[0]
    begun = [] if encoder_decoder else list(reader.before[-1:])
    unk = (own("unk") or [eos])[0]
    pad = (stated("pad") or own("pad") or [eos])[0]
    usual = own("bos") or [pad if encoder_decoder else eos]
    start = (stated("decoder_start") or begun or stated("bos") or usual)[0]
    mask = (own("mask") or stated("mask") or [unk])[0]
    around = tuple(reader.before), tuple(reader.after)
    first, last = (tuple(writer.before), tuple(writer.after)) if encoder_decoder else ((), ())
    if model_type == "mbart":
        around, first, start = _languages(files, reader, eos, start)
        last = (eos,)
    last = last if last[-1:] == (eos,) else (*last, eos)
    special = {pad, eos, mask, start, *stops, *reader.special_ids, *writer.special_ids, unk}
    return ForeignTokenizer(
        originals=dict(files),
        config=dict(config),
        generation=dict(generation),
        reader=reader,
        writer=writer,
        before=around[0],
        after=around[1],
        before_target=first,
        after_target=last,
        pad_id=pad,
        eos_id=eos,
        unk_id=unk,
        mask_id=mask,
        start_id=start,
        stop_ids=tuple(stops),
        special_ids=frozenset(special),
        chat_template=_chat_template(files),
        named={f"{name}_token": token.content for name, token in roles.items()},
    )


NONE = (None, -1)


def _id(value: Any, bound: int, what: str) -> int:
    if type(value) is not int or not 0 <= value < bound:
        raise DataError(f"{what} is {value!r}; it must be from 0 to {bound - 1}.")
    return value


def _languages(
    files: Files, reader: Codec, eos: int, start: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...], int]:
    """What mBART (Liu et al. 2020) puts around a source and before a target, and its start.

    The language of the source follows its end, and that of the target is the start; mBART-50 has
    both come first.
    """
    codes = []
    for key, default in (("src_lang", "en_XX"), ("tgt_lang", "")):
        name = special_tokens.setting(files, key, default)
        found = reader.id(name) if name else None
        if name and found is None:
            raise DataError(f"{CONFIG}: {key} {name!r} is no language of this model, as ro_RO is.")
        codes.append(() if found is None else (found,))
    source, target = codes
    if reader.id(MBART_50[-1]) is not None:
        return (source, (eos,)), target, start
    return ((), (eos, *source)), (), target[0] if target else start


def _chat_template(files: Files) -> str | None:
    """The chat template: a file of its own, or the default one of tokenizer_config.json."""
    if "chat_template.jinja" in files:
        return special_tokens.read_text(files, "chat_template.jinja")
    match special_tokens.read_json(files, CONFIG).get("chat_template"):
        case None:
            return None
        case str(template):
            return template
        case list(templates):
            for entry in templates:
                match entry:
                    case {"name": "default", "template": str(template)}:
                        return template
            return None
    raise DataError(f"{CONFIG}: chat_template is no text.")
