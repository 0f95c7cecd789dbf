"""Which files a foreign tokenizer has says how it splits text."""

from jaxformer.data import codec, marian, pieces, special_tokens, tiktoken_ranks
from jaxformer.data.codec import Codec
from jaxformer.data.special_tokens import Files
from jaxformer.errors import DataError

NAMES = (
    "tokenizer.json", special_tokens.CONFIG, special_tokens.SPECIALS, special_tokens.ADDED,
    "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt", "source.spm", "target.spm",
    "target_vocab.json", *pieces.MODELS,
)  # fmt: skip
"""Files of tokenizers; besides them, any *.tiktoken."""


def read_codecs(files: Files, model_type: str) -> tuple[Codec, Codec]:
    """What reads sources, and what reads and writes targets; the same for all but Marian."""
    if "tokenizer.json" in files:
        both = codec.read_backend(files)
    elif "source.spm" in files:
        return marian.read_marian(files)
    elif ranked := [n for n, data in files.items() if n.endswith(".tiktoken") or (
        n in pieces.MODELS and tiktoken_ranks.is_ranks(data))]:  # fmt: skip
        both = tiktoken_ranks.read_tiktoken(files, ranked[0], model_type)
    elif any(name in files for name in pieces.MODELS):
        both = pieces.read_pieces(files, model_type)
    elif "vocab.txt" in files:
        both = codec.read_wordpiece(files)
    elif "vocab.json" in files and "merges.txt" in files:
        both = codec.read_byte_level(files, model_type)
    else:
        raise DataError(
            "tokenizer.json is missing, and there is no vocab.txt, vocab.json with merges.txt, "
            "SentencePiece model or tiktoken file either; download the tokenizer's files, too."
        )
    return both, both
