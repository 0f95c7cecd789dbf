"""The tokenizers trained here as a `tokenizer.json`, which other libraries read."""

import json
from typing import Any

from jaxformer.data.tiktoken_ranks import byte_letters
from jaxformer.data.tokenizer import (
    N_SPECIAL,
    ByteTokenizer,
    SentencePieceTokenizer,
    SymbolTokenizer,
    Tokenizer,
)

SPACE = "\u2581"
ROLES = ("pad", "eos", "unk", "mask")


def tokenizer_json(tokenizer: Tokenizer, *, encoder: bool) -> dict[str, bytes]:
    """Its files, by name; what they make of a text is what an encoder reads, or else a prompt.

    Special tokens that stand in a text are read as such there. None, if one of them is a symbol.
    """
    from tokenizers import AddedToken, processors

    backend = _backend(tokenizer)
    if backend is None:
        return {}
    names = {role: tokenizer.decode_token(i) for i, role in enumerate(ROLES)}
    # A mask takes the spaces around it where pieces have one in them, as in Tokenizer.masked.
    greedy = isinstance(tokenizer, SentencePieceTokenizer)
    strip = {role: greedy and role == "mask" for role in ROLES}
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, lstrip=strip[role], rstrip=strip[role])
            for role, token in names.items()
        ]
    )
    end = tokenizer.eos_id if encoder else tokenizer.start_id
    token = names[ROLES[end]]
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {token}" if encoder else f"{token} $A",
        pair=f"$A {token} $B:1 {token}:1" if encoder else f"{token} $A $B:1",
        special_tokens=[(token, end)],
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in names.items()},
    }
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def _backend(tokenizer: Tokenizer) -> Any:
    """The same in the `tokenizers` package, but for special tokens."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    special = {tokenizer.decode_token(i): i for i in range(N_SPECIAL)}
    match tokenizer:
        case SentencePieceTokenizer():
            backend = Backend(_pieces(tokenizer))
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
            )
            backend.decoder = decoders.Sequence(
                [
                    decoders.Replace(SPACE, " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            )
        case ByteTokenizer():
            letters = {letter: i for i, letter in enumerate(byte_letters(), N_SPECIAL)}
            backend = Backend(models.BPE(special | letters, [], unk_token="<unk>"))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
            backend.decoder = decoders.ByteLevel()
        case SymbolTokenizer(symbols, separator) if special.keys().isdisjoint(symbols):
            vocabulary = special | {symbol: i for i, symbol in enumerate(symbols, N_SPECIAL)}
            backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
            if separator:
                backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            else:
                backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
                backend.decoder = decoders.Fuse()
        case _:
            return None
    return backend


def _pieces(tokenizer: SentencePieceTokenizer) -> Any:
    """Byte-pair encoding whose merges are all pairs of pieces that make a third, best score
    first."""
    import sentencepiece
    from tokenizers import models

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    score = {
        piece: processor.get_score(i)
        for piece, i in vocabulary.items()
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    }
    merges = [
        (-score[piece], -i, (piece[:i], piece[i:]))
        for piece in score
        for i in range(1, len(piece))
        if piece[:i] in score and piece[i:] in score
    ]
    pairs = [pair for *_, pair in sorted(merges)]
    return models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
