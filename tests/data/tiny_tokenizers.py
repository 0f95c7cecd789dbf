"""Tiny tokenizers of every foreign kind, trained on the spot, as directories of files."""

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from jaxformer.data.tiktoken_ranks import byte_letters

CORPUS = """The cat sat on the mat, and the dog didn't sit on the log.
Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex!
In 2024, 1234567 people said "hello" 42 times; 3.14 was enough (wasn't it?).
Ein kleiner Frosch saß am Fluß und träumte von größeren Flüssen. Où est la bibliothèque, s'il te
plaît ? Le garçon a mangé une crème brûlée. Быть или не быть, вот в чём вопрос.
def main(args):\n    for i in range(10):\n        print(i, args[i])\n    return 0
we're here, I'm there, they've gone, you'll see, he'd know, it's fine.
Hello world, hello! 日本語のテキスト。 中文文本，没有空格。 안녕하세요 세계"""
AWKWARD = [
    "", " ", "  ", "\n", "\t", "a", " a", "a ", "  a  b  ", "a\nb", "a\n\nb\n", "\ta\t\tb", "\r\n",
    "Hello world", "hello   world", "HELLO WORLD", "don't you've we'LL I'm", "end of it .", "a , b",
    "1", "12", "123", "1234", "1 2 34 567 8901", "3.14", "-1e-5", "0x1F", "½ ² ①", "Ⅻ", "١٢٣",
    "é", "e\u0301", "naïve café", "ß ẞ ı İ", "ﬁ ligature", "ｆｕｌｌ　ｗｉｄｔｈ", "ǆ",
    "Быть или", "日本語のテキスト", "中文，没有空格。", "안녕하세요", "مرحبا بالعالم", "שלום",
    "ไทย",
    "🙂", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "a\u200bb", "a\u00a0b", "\ufeffbom",
    "x\u0000y", "\u2581", "▁a ▁",
    "...!!!???", "<>&\"'`", "{[()]}", "__init__.py", "C:\\path\\to", "https://a.b/c?d=e&f=g#h",
    "def main(args):\n    for i in range(10):\n        print(i)\n", "a" * 60, "ab" * 40,
    "𝔘𝔫𝔦", "\u0378",
]  # fmt: skip
"""Texts that tokenizers disagree on."""


@cache
def sentencepiece_model(**options: Any) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n") * 3), model_writer=model, num_threads=1,
        minloglevel=3, hard_vocab_limit=False, vocab_size=400, **options,
    )  # fmt: skip
    return model.getvalue()


def pieces_of(model: bytes) -> list[str]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


FAIRSEQ = {"unk_id": 0, "bos_id": 1, "eos_id": 2}
LLAMA = {"model_type": "bpe", "byte_fallback": True, "split_digits": True,
         "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
         "allow_whitespace_only_pieces": True}  # fmt: skip


@cache
def byte_level(*specials: str) -> tuple[dict[str, int], list[str]]:
    """The vocabulary and merges of byte-level BPE, its special tokens first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*specials], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(CORPUS.split("\n") * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return model["vocab"], merges


@cache
def wordpiece() -> list[str]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(CORPUS.split("\n") * 3, trainer)
    ids = backend.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def ranks() -> dict[bytes, int]:
    """The tokens of byte-level BPE with their ranks, as tiktoken has them."""
    vocabulary, _ = byte_level()
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {bytes(bytes_of[letter] for letter in token): i for i, token in enumerate(tokens)}


def tiktoken_file(known: dict[bytes, int]) -> bytes:
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in known.items())
    return b"".join(lines)


def bpe_files(*specials: str) -> dict[str, Any]:
    vocabulary, merges = byte_level(*specials)
    return {"vocab.json": vocabulary, "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}


SEQ2SEQ = {"is_encoder_decoder": True}
BART_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def kinds() -> dict[str, dict[str, Any]]:
    """For each kind: its files; objects stand for JSON. config.json is among them."""
    fairseq = sentencepiece_model(**FAIRSEQ)
    sides = [
        sentencepiece_model(unk_id=0, bos_id=-1, eos_id=1, model_type=model_type)
        for model_type in ("unigram", "bpe")
    ]
    pieces = ["</s>", "<unk>", *sorted({*pieces_of(sides[0]), *pieces_of(sides[1])})]
    pieces = [*dict.fromkeys(pieces), ">>fr<<", ">>de<<", "<pad>"]
    mbart = {"model_type": "mbart", "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    bart = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    n = len(byte_level()[0])
    llama3 = {"bos_token_id": n, "eos_token_id": [n + 1, n + 9]}
    return {
        "t5": {
            "spiece.model": sentencepiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
            "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "extra_ids": 100},
            "config.json": {"model_type": "t5", "decoder_start_token_id": 0, "pad_token_id": 0,
                            "eos_token_id": 1, **SEQ2SEQ},
        },
        "llama": {
            "tokenizer.model": sentencepiece_model(**LLAMA),
            "tokenizer_config.json": {
                "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False},
            "config.json": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2},
        },
        "pegasus": {
            "spiece.model": sentencepiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
            "tokenizer_config.json": {"tokenizer_class": "PegasusTokenizer"},
            "config.json": {"model_type": "pegasus", "decoder_start_token_id": 0,
                            "pad_token_id": 0, "eos_token_id": 1, **SEQ2SEQ},
        },
        "mbart": {
            "sentencepiece.bpe.model": fairseq,
            "tokenizer_config.json": {"tokenizer_class": "MBartTokenizer", "src_lang": "de_DE",
                                      "tgt_lang": "ro_RO"},
            "config.json": {**mbart, **SEQ2SEQ},
        },
        "mbart50": {
            "sentencepiece.bpe.model": fairseq,
            "tokenizer_config.json": {"tokenizer_class": "MBart50Tokenizer", "src_lang": "de_DE",
                                      "tgt_lang": "sl_SI"},
            "config.json": {**mbart, **SEQ2SEQ, "decoder_start_token_id": 2},
        },
        "xlm-roberta": {
            "sentencepiece.bpe.model": fairseq,
            "tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer"},
            "config.json": {**bart, "model_type": "xlm-roberta"},
        },
        "marian": {
            "source.spm": sides[0],
            "target.spm": sides[1],
            "vocab.json": {token: i for i, token in enumerate(pieces)},
            "tokenizer_config.json": {"tokenizer_class": "MarianTokenizer"},
            "config.json": {"model_type": "marian", "decoder_start_token_id": len(pieces) - 1,
                            "pad_token_id": len(pieces) - 1, "eos_token_id": 0, **SEQ2SEQ},
        },
        "bert": {
            "vocab.txt": "\n".join([*wordpiece(), ""]),
            "tokenizer_config.json": {"tokenizer_class": "BertTokenizer",
                                      "clean_up_tokenization_spaces": True},
            "config.json": {"model_type": "bert", "pad_token_id": 0},
        },
        "bert-cased": {
            "vocab.txt": "\n".join([*wordpiece(), ""]),
            "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": False,
                                      "tokenize_chinese_chars": False},
            "config.json": {"model_type": "bert", "pad_token_id": 0},
        },
        "gpt2": {
            **bpe_files("<|endoftext|>"),
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
            "config.json": {"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0},
        },
        "opt": {
            **bpe_files("<s>", "<pad>", "</s>", "<unk>"),
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True,
                                      "bos_token": "</s>", "eos_token": "</s>",
                                      "unk_token": "</s>", "pad_token": "<pad>"},
            "config.json": {"model_type": "opt", "bos_token_id": 2, "eos_token_id": 2,
                            "pad_token_id": 1},
        },
        "roberta": {
            **bpe_files(*BART_SPECIALS),
            "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"},
            "config.json": {**bart, "model_type": "roberta"},
        },
        "bart": {
            **bpe_files(*BART_SPECIALS),
            "tokenizer_config.json": {"tokenizer_class": "BartTokenizer"},
            "config.json": {**bart, **SEQ2SEQ, "model_type": "bart", "decoder_start_token_id": 2},
        },
        "qwen2": {
            **bpe_files("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>", "add_bos_token": False,
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
            "config.json": {"model_type": "qwen2", "bos_token_id": 0, "eos_token_id": 2},
        },
        "llama3": {
            "tokenizer.model": tiktoken_file(ranks()),
            "tokenizer_config.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            "config.json": {"model_type": "llama", **llama3},
        },
        "qwen": {
            "qwen.tiktoken": tiktoken_file(ranks()),
            "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
            "config.json": {"model_type": "qwen"},
        },
    }  # fmt: skip


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Write the files of a kind into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(as_bytes(content))
    return folder


def as_bytes(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()
