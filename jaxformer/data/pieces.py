"""Foreign SentencePiece models: each family numbers the pieces in its own way (Kudo and Richardson
2018)."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxformer.data import special_tokens
from jaxformer.data.codec import Codec, clean_up
from jaxformer.data.special_tokens import AddedToken, Files, refusing, setting
from jaxformer.errors import DataError

MODELS = ("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "tokenizer.model")
LLAMA = (
    "llama", "mistral", "mixtral", "phi3", "gemma", "gemma2", "gemma3", "gemma3_text",
)  # fmt: skip
T5 = ("t5", "mt5", "umt5", "longt5")
MBART = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT "
    "lv_LV my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
).split()
MBART_50 = (
    "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF "
    "pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
).split()
"""Languages that mBART-50 has besides."""
MAX_NAMED = 1000
"""Tokens that are no pieces, at most."""


class Numbering(NamedTuple):
    """How a family gets from the pieces of a model to its ids."""

    offset: int
    """What is added to the numbers of the pieces."""
    skipped: int
    """So many of the first pieces are not used: others have these ids."""
    named: dict[str, int]
    """Tokens that are no pieces, or other pieces."""
    before: Sequence[str] = ()
    after: Sequence[str] = ("</s>",)


def numbering(files: Files, model_type: str, size: int) -> Numbering:
    """How the family `model_type` numbers a model of `size` pieces."""
    if model_type in LLAMA:
        roles = special_tokens.role_tokens(files)
        before, after = (
            [roles.get(role, AddedToken(default)).content] if wanted else []
            for role, default, wanted in (
                ("bos", "<bos>" if model_type.startswith("gemma") else "<s>",
                 setting(files, "add_bos_token", True)),
                ("eos", "</s>", setting(files, "add_eos_token", False)),
            )
        )  # fmt: skip
        return Numbering(0, 0, {}, before, after)
    if model_type in T5:
        # Raffel et al. 2020 number the sentinels from the end.
        listed = [t.content for t in special_tokens.extra_tokens(files)]
        count = len({t for t in listed if t.startswith("<extra_id_")})
        count = count or setting(files, "extra_ids", 100)
        if not 0 <= count <= MAX_NAMED:
            raise DataError(f"{special_tokens.CONFIG}: extra_ids is {count}, out of range.")
        return Numbering(0, 0, {f"<extra_id_{i}>": size + count - 1 - i for i in range(count)})
    if model_type == "pegasus":  # Zhang et al. 2020
        offset = setting(files, "offset", 103)
        if not 3 <= offset <= MAX_NAMED:
            raise DataError(f"{special_tokens.CONFIG}: offset is {offset}, out of range.")
        named = ["<pad>", "</s>", "<mask_1>", "<mask_2>"]
        named += [f"<unk_{i}>" for i in range(2, offset)]
        return Numbering(offset, 2, {token: i for i, token in enumerate(named)})
    if model_type in ("mbart", "xlm-roberta"):  # fairseq's order
        kind = setting(files, "tokenizer_class", "MBartTokenizer")
        many = kind.startswith("MBart50")
        codes = () if model_type != "mbart" else [*MBART, *MBART_50] if many else MBART
        named = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
        named |= {token: size + 1 + i for i, token in enumerate((*codes, "<mask>"))}
        if not codes:
            return Numbering(1, 3, named, ["<s>"])
        language = [setting(files, "src_lang", "en_XX")]
        around = (language, ["</s>"]) if many else ([], ["</s>", *language])
        return Numbering(1, 3, named, *around)
    known = ", ".join((*LLAMA, *T5, "pegasus", "mbart", "xlm-roberta", "marian"))
    raise DataError(
        f"config.json: the SentencePiece models of {known} can be read, but this is a "
        f"{model_type!r}, which may number its pieces in another way; add its tokenizer.json."
    )


class PieceCodec(Codec):
    """A SentencePiece model, the file `name`, with the ids of its family."""

    def __init__(self, files: Files, name: str, model_type: str) -> None:
        self.name = name
        self.clean = setting(files, "clean_up_tokenization_spaces", False)
        self.processor = processor = load(files, name)
        pieces = processor.get_piece_size()
        rule = numbering(files, model_type, pieces)
        self.offset = rule.offset
        self.lowest, self.end = rule.offset + rule.skipped, rule.offset + pieces
        # Only the start of the text is prefixed with a space, or what follows any token is, too.
        self.prefix_once = model_type in LLAMA
        self.guard = self._pieces("\n")
        with refusing(name):
            control = [i for i in range(rule.skipped, pieces) if processor.is_control(i)]
            unk = int(processor.unk_id()) + rule.offset
            found = {processor.id_to_piece(i): i + rule.offset for i in control}
        self.unk = rule.named.get("<unk>", unk)
        self.ids = {t: i for t, i in found.items() if t} | rule.named
        tokens = {content: AddedToken(content) for content in self.ids}
        for i, token in special_tokens.added_tokens(files).items():
            self.ids[token.content], tokens[token.content] = i, token
        roles = special_tokens.role_tokens(files)
        for token in (*roles.values(), *special_tokens.extra_tokens(files)):
            if (i := self.id(token.content)) is not None:
                tokens[token.content] = token
                self.ids[token.content] = i
        self.added = {i: content for content, i in self.ids.items()}
        self.special_ids = frozenset(self.ids[t.content] for t in tokens.values() if t.special)
        self.size = max(self.end, max(self.ids.values(), default=-1) + 1)
        self.pattern = matcher(tokens.values())
        self.before = [self._must(token) for token in rule.before]
        self.after = [self._must(token) for token in rule.after]

    def id(self, token: str) -> int | None:
        if (i := self.ids.get(token)) is not None:
            return i
        with refusing(self.name):
            i = self.processor.piece_to_id(token)
            found = self.processor.id_to_piece(i) == token
        return i + self.offset if found else None

    def token(self, i: int) -> str:
        if i in self.added or not self.lowest <= i < self.end:
            return self.added.get(i, "")
        with refusing(self.name):
            return self.processor.id_to_piece(i - self.offset)

    def _must(self, token: str) -> int:
        if (i := self.id(token)) is None:
            raise DataError(f"{self.name} has no {token!r}, which begins or ends its texts.")
        return i

    def _pieces(self, text: str) -> list[int]:
        with refusing(self.name):
            return self.processor.encode(unicode(text))

    def _encode(self, text: str, first: bool) -> list[int]:
        """The ids of text without added tokens, which is the `first` of a text or not."""
        pieces = self._pieces(text if first or not self.prefix_once else "\n" + text)
        if self.prefix_once and not first:
            n = len(self.guard)
            pieces = pieces[n:] if pieces[:n] == self.guard else self._pieces(text)
        return [self._known(i + self.offset) for i in pieces]

    def _known(self, i: int) -> int:
        return i if i >= self.lowest else self.unk

    def encode(self, text: str) -> list[int]:
        ids, first = [], True
        for part, added in split(self.pattern, text):
            ids += [self.ids[part]] if added else self._encode(part, first)
            first = False
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text, run = "", []
        for i in (*ids, None):
            if i is not None and i not in self.added and self.lowest <= i < self.end:
                run.append(i - self.offset)
                continue
            if run:
                text += self._decode(run, first=not text)
                run = []
            text += self.added.get(i, "") if i is not None else ""
        return clean_up(text) if self.clean else text

    def _decode(self, pieces: list[int], first: bool) -> str:
        with refusing(self.name):
            if first or not self.prefix_once:
                return self.processor.decode(pieces)
            guard = self.processor.decode(self.guard)
            return self.processor.decode([*self.guard, *pieces]).removeprefix(guard)


def unicode(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair, which UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()


def matcher(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Finds added tokens, the longest first, each a group, with the white space that they take."""
    space = r"\s*"
    patterns = (
        space * t.lstrip + f"({re.escape(t.content)})" + space * t.rstrip
        for t in sorted(tokens, key=lambda t: -len(t.content))
        if t.content
    )
    return re.compile("|".join(patterns) or "(?!)")


def split(pattern: re.Pattern[str], text: str) -> list[tuple[str, bool]]:
    """The parts of `text`, none empty, and whether each is an added token.

    >>> split(matcher([AddedToken("[X]", lstrip=True)]), "an [X] and")
    [('an', False), ('[X]', True), (' and', False)]
    """
    parts, at = [], 0
    for found in pattern.finditer(text):
        parts += [(text[at : found.start()], False), (found[found.lastindex or 0], True)]
        at = found.end()
    return [part for part in (*parts, (text[at:], False)) if part[0]]


def load(files: Files, name: str) -> Any:
    """The SentencePiece model of a file."""
    import sentencepiece

    if not files.get(name):
        raise DataError(f"{name} is missing or empty; download it again.")
    with refusing(name):
        return sentencepiece.SentencePieceProcessor(model_proto=files[name])


def read_pieces(files: Files, model_type: str) -> PieceCodec:
    """The codec of the SentencePiece model among `files`."""
    name = next(name for name in MODELS if name in files)
    return PieceCodec(files, name, model_type)
