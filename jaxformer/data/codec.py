"""Text to ids and back as a foreign tokenizer does it, by the `tokenizers` package.

It reads tokenizer.json as it is; older vocabularies (vocab.txt of WordPiece, Wu et al. 2016;
vocab.json and merges.txt of byte-level BPE, Radford et al. 2019) are built into one.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

from jaxformer.data import special_tokens
from jaxformer.data.special_tokens import AddedToken, Files, check_id, refusing, setting
from jaxformer.errors import DataError

GPT2 = ("gpt2", "gpt_neo", "opt")
ROBERTA = ("bart", "roberta")
QWEN = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
MAX_GAP = 1000
"""Ids without a token that may lie before an added one."""
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_SPLIT.replace("{1,3}", "")  # digits one by one


class Codec(Protocol):
    """Text to ids and back, without what begins and ends a text."""

    size: int
    """All ids are below this."""
    special_ids: frozenset[int]
    """Ids that the tokenizer's own files call special."""
    before: Sequence[int]
    """Ids that the tokenizer puts before a text, if nothing else is said."""
    after: Sequence[int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def id(self, token: str) -> int | None:
        """The id of a token, if it has one."""
        ...

    def token(self, i: int) -> str:
        """The token of an id, as the vocabulary has it; empty if there is none."""
        ...


class BackendCodec(Codec):
    """A `tokenizers.Tokenizer`, read from the file `name`."""

    def __init__(self, backend: Any, name: str, clean: bool) -> None:
        self.backend, self.name = backend, name
        with refusing(name):
            backend.no_padding()
            backend.no_truncation()
            ids = backend.get_vocab(with_added_tokens=True)
            model = type(backend.model).__name__
            added = backend.get_added_tokens_decoder()
        self.clean = clean and model != "BPE"  # the spaces in BPE's tokens are the text's
        self.size = check_id(max(ids.values(), default=-1), f"{name}: the largest id") + 1
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.before, self.after = self._around(ids)

    def _around(self, vocabulary: Iterable[str]) -> tuple[list[int], list[int]]:
        """What the template puts before and after a text: seen at the first that has tokens."""
        for text in ("a", *islice(vocabulary, 100)):
            with refusing(self.name):
                encoding = self.backend.encode(text)
                ids, special = encoding.ids, encoding.special_tokens_mask
            if 0 in special:
                first, last = special.index(0), len(special) - special[::-1].index(0)
                around = ids[:first], ids[last:]
                if max(*around[0], *around[1], -1, -1) >= self.size:
                    raise DataError(f"{self.name}: its template has ids that are no token's.")
                return around
        raise DataError(f"{self.name} makes no tokens of text.")

    def encode(self, text: str) -> list[int]:
        with refusing(self.name):
            return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        with refusing(self.name):
            text = self.backend.decode(ids, skip_special_tokens=True)
        return clean_up(text) if self.clean else text

    def id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def token(self, i: int) -> str:
        return self.backend.id_to_token(i) or ""


def clean_up(text: str) -> str:
    """`text` without the spaces that word pieces leave before English punctuation.

    >>> clean_up("I do n't know , he said .")
    "I don't know, he said."
    """
    text = re.sub(r" ([.?!,])", r"\1", text).replace(" ' ", "'")
    return re.sub(r" (n't|'m|'s|'ve|'re)", r"\1", text)


def read_backend(files: Files) -> BackendCodec:
    """The codec that tokenizer.json describes."""
    import tokenizers

    name = "tokenizer.json"
    with refusing(name):
        backend = tokenizers.Tokenizer.from_str(special_tokens.read_text(files, name))
    add_tokens(backend, files, name)
    return finish(backend, files, name)


def read_wordpiece(files: Files) -> BackendCodec:
    """The codec of BERT's vocab.txt (Devlin et al. 2019)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = "vocab.txt"
    lines = special_tokens.read_text(files, name).removesuffix("\n").split("\n")
    vocabulary = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    strip = setting(files, "strip_accents", False) if has(files, "strip_accents") else None
    named = special_tokens.role_tokens(files)
    roles = {role: named.get(role, AddedToken(f"[{role.upper()}]")) for role in WORDPIECE_ROLES}
    missing = [t.content for t in roles.values() if t.content not in vocabulary]
    if missing:
        raise DataError(f"{name} lacks {', '.join(missing)}; download it again.")
    with refusing(name):
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token=roles["unk"].content))
        backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=setting(files, "tokenize_chinese_chars", True),
            strip_accents=strip,
            lowercase=setting(files, "do_lower_case", True),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.add_special_tokens([rust(token) for token in roles.values()])
        surround(backend, [roles["cls"].content], [roles["sep"].content])
    add_tokens(backend, files, name)
    return finish(backend, files, name)


WORDPIECE_ROLES = ("unk", "sep", "pad", "cls", "mask")


def read_byte_level(files: Files, model_type: str) -> BackendCodec:
    """The codec of vocab.json and merges.txt, as GPT-2, RoBERTa, BART or Qwen split their text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = "merges.txt"
    vocabulary = special_tokens.read_vocabulary(files, "vocab.json")
    lines = special_tokens.read_text(files, name).replace("\r\n", "\n").split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    if any(line.count(" ") != 1 for line in lines):
        raise DataError(f"{name} needs two tokens a line; download it again.")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    prefix = setting(files, "add_prefix_space", False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=model_type not in QWEN)
    with refusing(f"vocab.json with {name}"):
        backend = Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer = level
        backend.decoder = decoders.ByteLevel()
    usual = ["<|endoftext|>"]
    if model_type in QWEN:
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    elif model_type in ROBERTA:
        usual = ["<s>", "</s>", "<unk>", "<pad>", "<mask>"]
    elif model_type not in GPT2:
        raise DataError(
            f"vocab.json and merges.txt can be read for {', '.join(GPT2 + ROBERTA + QWEN)}, but "
            f"this is a {model_type!r}, which splits text in its own way; add its tokenizer.json."
        )
    found = [AddedToken(t, lstrip=t == "<mask>") for t in usual if t in vocabulary]
    with refusing(name):
        backend.add_special_tokens([rust(token) for token in found])
        if model_type in ROBERTA:
            surround(backend, [role(files, "cls", "<s>")], [role(files, "sep", "</s>")])
    add_tokens(backend, files, name)
    return finish(backend, files, name)


def has(files: Files, name: str) -> bool:
    """Whether the tokenizer's config sets `name`."""
    return special_tokens.read_json(files, special_tokens.CONFIG).get(name) is not None


def role(files: Files, name: str, default: str) -> str:
    """The token of a role."""
    return special_tokens.role_tokens(files).get(name, AddedToken(default)).content


def rust(token: AddedToken) -> Any:
    """The token as the `tokenizers` package has it."""
    import tokenizers

    return tokenizers.AddedToken(**token._asdict())


def add_tokens(backend: Any, files: Files, name: str) -> None:
    """Add the tokens that other files name, under the ids that they give.

    Gaps in the ids are filled with tokens that no text has, as a backend has no gaps.
    """
    with refusing(name):
        known = backend.get_vocab(with_added_tokens=True)
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        size = max(known.values(), default=-1) + 1
    new = []
    for i, token in special_tokens.added_tokens(files).items():
        what = f"{special_tokens.CONFIG} or {special_tokens.ADDED}: {token.content!r} has id {i}"
        if token.content in known:
            if known[token.content] != i:
                raise DataError(f"{what}, but {known[token.content]} in {name}.")
            new += [token] if token.content not in added else []
        elif not size <= i <= size + MAX_GAP:
            raise DataError(f"{what}, but {name} has ids below {size}, and none is free there.")
        else:
            new += [*(AddedToken(f"<|reserved_token_{n}|>") for n in range(size, i)), token]
            known[token.content], size = i, i + 1
    named = [*special_tokens.role_tokens(files).values(), *special_tokens.extra_tokens(files)]
    done = added | {token.content for token in new}
    new += [t for t in named if t.content in known and t.content not in done]
    with refusing(name):
        backend.add_tokens([rust(token) for token in new])
    for token, i in known.items():
        if backend.token_to_id(token) != i:
            raise DataError(f"{special_tokens.CONFIG}: {token!r} cannot have the id {i} in {name}.")


def surround(backend: Any, before: Sequence[str], after: Sequence[str]) -> None:
    """Have these tokens put before and after each text."""
    from tokenizers import processors

    used = {*before, *after}
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B", *after],
        special_tokens=[(token, backend.token_to_id(token)) for token in used],
    )


def finish(backend: Any, files: Files, name: str) -> BackendCodec:
    """The codec of a backend, with the bos and eos that tokenizer_config.json may ask for."""
    if has(files, "add_bos_token") or has(files, "add_eos_token"):
        named = special_tokens.role_tokens(files)
        around = []
        for key in ("bos", "eos"):
            wanted = setting(files, f"add_{key}_token", False) and key in named
            around.append([named[key].content] if wanted else [])
        with refusing(name):
            surround(backend, *around)
    clean = setting(files, "clean_up_tokenization_spaces", False)
    return BackendCodec(backend, name, clean)
