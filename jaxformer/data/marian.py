"""Marian's tokenizers: a SentencePiece model for each side, and ids for pieces by their names."""

import re
from collections.abc import Sequence

from jaxformer.data import special_tokens
from jaxformer.data.codec import Codec, clean_up
from jaxformer.data.pieces import load, matcher, split, unicode
from jaxformer.data.special_tokens import AddedToken, Files, refusing, setting
from jaxformer.errors import DataError


class MarianCodec(Codec):
    """One side of a Marian model (Junczys-Dowmunt et al. 2018): its pieces have their ids by name.

    A text may begin with the code of the language to translate into, as in `>>fr<< Good morning`.
    """

    before, after = (), ()

    def __init__(self, files: Files, side: str, vocabulary: str) -> None:
        self.name = f"{side}.spm"
        self.clean = setting(files, "clean_up_tokenization_spaces", False)
        self.processor = load(files, self.name)
        self.ids = special_tokens.read_vocabulary(files, vocabulary)
        roles = special_tokens.role_tokens(files)
        defaults = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
        tokens = [roles.get(role, AddedToken(default)) for role, default in defaults.items()]
        if missing := [t.content for t in tokens if t.content not in self.ids]:
            raise DataError(f"{vocabulary} lacks {', '.join(missing)}; download it again.")
        self.unk = self.ids[tokens[1].content]
        self.tokens = {i: token for token, i in self.ids.items()}
        self.special_ids = frozenset(self.ids[t.content] for t in tokens)
        self.size = max(self.ids.values()) + 1
        self.pattern = matcher(tokens)
        self.after = [self.ids[tokens[0].content]]

    def id(self, token: str) -> int | None:
        return self.ids.get(token)

    def token(self, i: int) -> str:
        return self.tokens.get(i, "")

    def encode(self, text: str) -> list[int]:
        tokens = []
        for part, added in split(self.pattern, text):
            if added:
                tokens.append(part)
                continue
            if code := re.match(r">>.*?<<", part, re.DOTALL):
                tokens.append(code[0])
                part = part[code.end() :]
            with refusing(self.name):
                tokens += self.processor.encode(unicode(part), out_type=str)
        return [self.ids.get(token, self.unk) for token in tokens]

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [self.tokens[i] for i in ids if i in self.tokens]
        with refusing(self.name):
            text = self.processor.decode_pieces(pieces).replace("\u2581", " ").strip()
        return clean_up(text) if self.clean else text


def read_marian(files: Files) -> tuple[MarianCodec, MarianCodec]:
    """The codecs of Marian's sources and targets, which may share a vocabulary."""
    separate = setting(files, "separate_vocabs", False)
    targets = "target_vocab.json" if separate else "vocab.json"
    return MarianCodec(files, "source", "vocab.json"), MarianCodec(files, "target", targets)
