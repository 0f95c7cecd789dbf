"""GGUF files give back what was written, in Hugging Face's terms; damaged ones are refused."""

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

from jaxformer.data.tokenizer import train_sentencepiece
from jaxformer.errors import CheckpointError
from jaxformer.hub import gguf_file
from jaxformer.hub.gguf_file import FLOATS, KINDS, Kind, read_header
from jaxformer.hub.gguf_model import LAYER_TENSORS, TENSORS, llama3_factors, open_gguf
from jaxformer.hub.gguf_tokenizer import gguf_tokenizer_files

HEADS, KV_HEADS, HEAD, WIDTH, FF, VOCAB, LAYERS = 3, 1, 8, 16, 40, 300, 2
BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
"""The letters of GPT-2's bytes, in the order of its vocabulary."""


def write(path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A GGUF file by the gguf package; ints become uint32, floats float32."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for key, value in fields.items():
        match value:
            case _ if key == "general.architecture":
                pass
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, tensor in tensors.items():
        bf16 = tensor.dtype == ml_dtypes.bfloat16
        writer.add_tensor(name, tensor.view(np.uint8) if bf16 else tensor,
                          raw_dtype=Kind.BF16 if bf16 else None)  # fmt: skip
    return finished(writer, path)


def write_blocks(path: Path, data: np.ndarray, kind: Kind) -> Path:
    """A GGUF file with the tensor "x" of these rows of blocks."""
    writer = gguf.GGUFWriter(path, "any")
    writer.add_tensor("x", data, raw_dtype=kind)
    return finished(writer, path)


def finished(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(arch: str = "llama") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and random tensors of a small model, by llama.cpp's names, its tokenizer with it."""
    rng = np.random.default_rng(0)
    tokens = ["<s>", "</s>", *BYTES, *(f"[PAD{i}]" for i in range(VOCAB - 258))]
    fields = {
        "general.architecture": arch,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": WIDTH,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": FF,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": HEAD,
        f"{arch}.attention.layer_norm_rms_epsilon": 2.0**-20,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * 256, *[5] * (VOCAB - 258)],
        "tokenizer.ggml.merges": ["a b", "Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    fields["tokenizer.ggml.tokens"][258:260] = ["ab", "ĠĠ"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (WIDTH,),
            f"blk.{i}.attn_q.weight": (HEADS * HEAD, WIDTH),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD, WIDTH),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD, WIDTH),
            f"blk.{i}.attn_output.weight": (WIDTH, HEADS * HEAD),
            f"blk.{i}.ffn_norm.weight": (WIDTH,),
            f"blk.{i}.ffn_gate.weight": (FF, WIDTH),
            f"blk.{i}.ffn_up.weight": (FF, WIDTH),
            f"blk.{i}.ffn_down.weight": (WIDTH, FF),
        }
        if arch == "qwen2":
            shapes |= {f"blk.{i}.attn_q.bias": (HEADS * HEAD,)}
        if arch == "qwen3":
            shapes |= {f"blk.{i}.attn_q_norm.weight": (HEAD,)}
    return fields, {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def their_name(name: str) -> str:
    """Hugging Face's name for llama.cpp's."""
    *layer, part, suffix = name.split(".")
    if not layer:
        return f"{TENSORS[part]}.{suffix}"
    return f"model.layers.{layer[1]}.{LAYER_TENSORS[part]}.{suffix}"


def read_all(path: Path) -> dict[str, np.ndarray]:
    return {name: stored.read() for name, stored in open_gguf(path)[1].items()}


# Tensors


def nibbles(data: np.ndarray) -> np.ndarray:
    return np.array([b & 15 for b in data.tolist()] + [b >> 4 for b in data.tolist()])


def half(data: np.ndarray) -> float:
    return float(data.view(np.float16)[0])


def scale_and_min(scales: list[int], j: int) -> tuple[int, int]:
    """The six bits of scale and of minimum of sub-block j, of 12 bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return (
        scales[j + 4] & 15 | scales[j - 4] >> 6 << 4,
        scales[j + 4] >> 4 | scales[j] >> 6 << 4,
    )


def block_of_k(b: np.ndarray, fifth: np.ndarray | None, q: np.ndarray) -> list[float]:
    """Q4_K and Q5_K: eight sub-blocks of 32, two to each 32 bytes, low halves first."""
    out = []
    for j in range(8):
        scale, low = scale_and_min(b[4:16].tolist(), j)
        for i in range(32):
            n = int(q[32 * (j // 2) + i]) >> 4 * (j % 2) & 15
            if fifth is not None:
                n += (int(fifth[i]) >> j & 1) << 4
            out.append(half(b[:2]) * scale * n - half(b[2:4]) * low)
    return out


def block_of_q6(b: np.ndarray) -> list[float]:
    """Q6_K: twice 128 numbers, low four bits in 64 bytes and high two in 32."""
    out = [0.0] * 256
    for n in range(2):
        low, high = b[64 * n : 64 * n + 64].tolist(), b[128 + 32 * n : 160 + 32 * n].tolist()
        scales = b[192 + 8 * n : 200 + 8 * n].view(np.int8).tolist()
        for i in range(32):
            for quarter in range(4):
                four = low[i + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
                q = (four | (high[i] >> 2 * quarter & 3) << 4) - 32
                out[128 * n + 32 * quarter + i] = half(b[208:]) * scales[2 * quarter + i // 16] * q
    return out


def fifth_bits(data: np.ndarray) -> np.ndarray:
    return np.array([int(data.view("<u4")[0]) >> i & 1 for i in range(32)]) << 4


# What a block stands for, from the structs and comments in ggml-common.h, ggml-quants.c.
MEANING: dict[Kind, Callable[[np.ndarray], Any]] = {
    Kind.Q8_0: lambda b: half(b[:2]) * b[2:].view(np.int8),
    Kind.Q4_0: lambda b: half(b[:2]) * (nibbles(b[2:]) - 8),
    Kind.Q4_1: lambda b: half(b[:2]) * nibbles(b[4:]) + half(b[2:4]),
    Kind.Q5_0: lambda b: half(b[:2]) * ((nibbles(b[6:]) | fifth_bits(b[2:6])) - 16),
    Kind.Q5_1: lambda b: half(b[:2]) * (nibbles(b[8:]) | fifth_bits(b[4:8])) + half(b[2:4]),
    Kind.Q4_K: lambda b: block_of_k(b, None, b[16:]),
    Kind.Q5_K: lambda b: block_of_k(b, b[16:48], b[48:]),
    Kind.Q6_K: block_of_q6,
}


def blocks(kind: Kind, rows: int, n: int) -> np.ndarray:
    """Random blocks, whose scales are random half floats near 1."""
    size = GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(int(kind))
    data = rng.integers(0, 256, (rows, n, size), np.uint8)
    at = (
        [208] if kind == Kind.Q6_K else [0] if kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q5_0) else [0, 2]
    )
    for i in at:
        scales = rng.uniform(-2, 2, (rows, n, 1)).astype(np.float16)
        data[..., i : i + 2] = scales.view(np.uint8)
    return data


@pytest.mark.parametrize("kind", MEANING, ids=lambda kind: kind.name)
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_blocks_become_the_numbers_they_stand_for(
    kind: Kind, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gguf_file, "CHUNK", chunk)
    data = blocks(kind, 5, 2)
    path = write_blocks(tmp_path / "a.gguf", data.reshape(5, -1), kind)
    stored = read_header(path).stored("x")
    found = stored.read()
    expected = np.array([[MEANING[kind](block) for block in row] for row in data]).reshape(5, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
    assert (
        (found.dtype, found.shape)
        == (stored.dtype, stored.shape)
        == (np.float32, (5, found.shape[1]))
    )
    assert not found.flags.writeable


def test_every_kind_is_tested_and_has_a_size():
    assert {*MEANING, *FLOATS} == {*KINDS}
    assert set(GGML_QUANT_SIZES) == set(Kind)


@pytest.mark.parametrize(
    "kind", [k for k in MEANING if not k.name.endswith("K")], ids=lambda k: k.name
)
def test_what_is_quantised_comes_back_nearly(kind: Kind, tmp_path: Path):
    x = np.random.default_rng(1).normal(size=(7, 64)).astype(np.float32)
    path = write_blocks(tmp_path / "a.gguf", gguf.quants.quantize(x, kind), kind)
    found = read_header(path).stored("x").read()
    bits = int(kind.name[1])
    assert 0 < np.abs(found - x).max() < 1.1 * np.abs(x).max() / 2 ** (bits - 1)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_tensors_come_back_in_hugging_faces_order(arch: str, dtype: np.dtype, tmp_path: Path):
    fields, tensors = model(arch)
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    found = read_all(write(tmp_path / "a.gguf", fields, tensors))
    assert found.keys() == {their_name(name) for name in tensors}
    for name, tensor in tensors.items():
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            # Row 2i of a head is its row i there, and row 2i + 1 its row i + H/2.
            heads = tensor.reshape(-1, HEAD, WIDTH)
            there = np.empty_like(heads)
            for i in range(HEAD // 2):
                there[:, i], there[:, i + HEAD // 2] = heads[:, 2 * i], heads[:, 2 * i + 1]
            tensor = there.reshape(tensor.shape)
        assert found[their_name(name)].dtype == dtype
        assert np.array_equal(found[their_name(name)], tensor)
        assert not found[their_name(name)].flags.writeable


def test_header_is_what_the_gguf_package_reads(tmp_path: Path):
    fields, tensors = model()
    fields |= {"general.x": 1.5, "general.y": True, "general.z": [1, -2], "general.alignment": 64}
    path = write(tmp_path / "a.gguf", fields, tensors)
    header, theirs = read_header(path), gguf.GGUFReader(path)
    assert header.fields.keys() == {k for k in theirs.fields if not k.startswith("GGUF.")}
    for key, value in header.fields.items():
        assert np.array_equal(value, theirs.fields[key].contents()), key
    assert list(header.places) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert header.places[tensor.name].begin == tensor.data_offset
        assert np.array_equal(header.stored(tensor.name).read(), tensor.data)


# Config


def test_config_is_hugging_faces(tmp_path: Path):
    config, _ = open_gguf(write(tmp_path / "a.gguf", *model()))
    assert config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "intermediate_size": FF,
        "hidden_act": "silu", "rms_norm_eps": 2.0**-20, "rope_theta": 10000.0,
        "rope_scaling": None, "max_position_embeddings": 128, "vocab_size": VOCAB,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"rope.freq_base": 5e5}, {"rope_theta": 5e5}),
        ({"rope.scaling.factor": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {"rope_scaling": None}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 64},
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 64}},
        ),
        ({"attention.sliding_window": 32}, {"model_type": "mistral", "sliding_window": 32,
                                            "architectures": ["MistralForCausalLM"]}),
        ({"expert_count": 0, "rope.dimension_count": HEAD, "vocab_size": VOCAB}, {}),
    ],
)  # fmt: skip
def test_settings_become_theirs(fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path):
    base, tensors = model()
    tensors["output.weight"] = tensors["token_embd.weight"] + 1
    given = base | {f"llama.{key}": value for key, value in fields.items()}
    config, found = open_gguf(write(tmp_path / "a.gguf", given, tensors))
    assert config | expected == config
    assert not config["tie_word_embeddings"]
    assert np.array_equal(found["lm_head.weight"].read(), tensors["output.weight"])


def stretched(factor: float, head_dim: int = HEAD, theta: float = 5e5) -> np.ndarray:
    """Llama 3.1's factors, one by one, from wave lengths as in Meta's code."""
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * theta ** (i / head_dim)
        if wave < 8192 / 4:
            factors.append(1.0)
        elif wave > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_factors_become_its_rope_scaling(factor: float, tmp_path: Path):
    fields, tensors = model()
    fields["llama.rope.freq_base"] = 5e5
    tensors["rope_freqs.weight"] = stretched(factor)
    config, found = open_gguf(write(tmp_path / "a.gguf", fields, tensors))
    assert config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert len(found) == len(tensors) - 1
    np.testing.assert_allclose(
        llama3_factors(factor, 8192, 128, 5e5), stretched(factor, 128), rtol=1e-6
    )
    tensors["rope_freqs.weight"] = np.ones(HEAD // 2, np.float32)
    assert open_gguf(write(tmp_path / "b.gguf", fields, tensors))[0]["rope_scaling"] is None


FACTORS = np.array([1, 2, 3, 8], np.float32)
SMALL = np.zeros((2, WIDTH), np.float32)


@pytest.mark.parametrize(
    "fields, tensors, message",
    [
        ({"general.architecture": "gemma"}, {}, "'gemma'"),
        ({"split.count": 2}, {}, "split"),
        ({"llama.attention.scale": 0.5}, {}, "'attention.scale'"),
        ({"llama.expert_count": 8}, {}, "'expert_count'"),
        ({"llama.block_count": 3}, {}, "block_count"),
        ({"llama.block_count": 2**31 - 1}, {}, "block_count"),
        ({"llama.attention.head_count": 0}, {}, "head_count"),
        ({"llama.attention.head_count": [3, 3]}, {}, "head_count"),
        ({"llama.attention.head_count": 5}, {}, "5 heads of 8"),
        ({"llama.attention.value_length": 4}, {}, "value_length"),
        ({"llama.rope.dimension_count": 4}, {}, "dimension_count"),
        ({"llama.rope.freq_base": float("nan")}, {}, "freq_base"),
        ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, {}, "epsilon is inf"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "longrope"),
        ({"llama.rope.scaling.factor": float("inf")}, {}, "inf"),
        ({"llama.vocab_size": 7}, {}, "vocab_size"),
        ({"tokenizer.ggml.eos_token_id": VOCAB}, {}, "eos_token_id"),
        ({}, {"blk.0.ffn_gate_exps.weight": SMALL, "blk.00.ffn_up.weight": SMALL},
         "'blk.0.ffn_gate_exps.weight', 'blk.00.ffn_up.weight'"),
        ({}, {"evil\x1b[2J": SMALL}, "'evil\\x1b[2J'"),
        ({}, {"rope_freqs.weight": FACTORS}, "rope_freqs"),
        ({"llama.rope.freq_base": 5e5}, {"rope_freqs.weight": FACTORS * np.inf}, "rope_freqs"),
        ({"llama.rope.freq_base": 5e5, "llama.rope.scaling.factor": 2.0},
         {"rope_freqs.weight": stretched(8.0)}, "rope_freqs"),
        ({}, {"rope_freqs.weight": FACTORS[:3]}, "rope_freqs"),
        ({}, {"blk.1.attn_k.weight": SMALL}, "attn_k"),
        ({}, {"blk.4.ffn_up.weight": SMALL}, "block_count"),
        ({"llama.block_count": 3}, {"blk.4.ffn_up.weight": SMALL}, "block_count"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(
    fields: dict[str, Any], tensors: dict[str, np.ndarray], message: str, tmp_path: Path
):
    base, weights = model()
    path = write(tmp_path / "a.gguf", base | fields, weights | tensors)
    with pytest.raises(CheckpointError) as e:
        open_gguf(path)
    assert str(path) in str(e.value) and message in str(e.value)


@pytest.mark.parametrize("key", ["general.architecture", "llama.block_count", "token_embd.weight"])
def test_what_is_missing_is_named(key: str, tmp_path: Path):
    fields, tensors = model()
    path = write(tmp_path / "a.gguf", fields, tensors)
    data = path.read_bytes()
    path.write_bytes(data.replace(key.encode(), key.upper().encode()))
    with pytest.raises(CheckpointError, match=rf"a\.gguf.*{key}"):
        open_gguf(path)


def test_blocks_of_unknown_kinds_are_refused(tmp_path: Path):
    size = GGML_QUANT_SIZES[Kind.IQ4_NL][1]
    path = write_blocks(tmp_path / "a.gguf", np.zeros((2, size), np.uint8), Kind.IQ4_NL)
    with pytest.raises(CheckpointError, match="IQ4_NL"):
        read_header(path)


# Hostile files

HUGE = 2**64 - 1


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def start(n_tensors: int, n_fields: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields)


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ONE = start(1, 0) + tensor("x", [4], 0, 0)
PADDING = bytes(-len(ONE) % 32)
BAD = {
    "empty": (b"", "byte 0"),
    "magic": (b"GGML" + start(0, 0)[4:], "b'GGML'"),
    "version 1": (start(0, 0, version=1), "version 0x1 "),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 0x3000000 "),
    "fields": (start(0, HUGE) + bytes(1000), "comes twice"),
    "tensors": (start(HUGE, 0) + bytes(1000), "0 dimensions"),
    "key length": (start(0, 1) + struct.pack("<Q", HUGE), "header would end"),
    "string length": (start(0, 1) + string("k") + struct.pack("<IQ", 8, 2**40), "would end"),
    "array length": (start(0, 1) + string("k") + struct.pack("<IIQ", 9, 0, HUGE), "would end"),
    "array of strings": (
        start(0, 1) + string("k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(1000), "would end"
    ),
    "array of arrays": (
        start(0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 1000) + bytes(9000), "of arrays"
    ),
    "type": (start(0, 1) + string("k") + struct.pack("<I", 13), "13 is not a valid"),
    "array type": (start(0, 1) + string("k") + struct.pack("<IIQ", 9, 77, 1), "77 is not a valid"),
    "not UTF-8": (start(0, 1) + string("k") + struct.pack("<IQ", 8, 2) + b"\xff\xff", "decode"),
    "field twice": (start(0, 2) + 2 * (string("k") + struct.pack("<IB", 0, 0)), "'k' comes twice"),
    "alignment": (start(0, 1) + string("general.alignment") + struct.pack("<II", 4, 0), "is 0"),
    "alignment type": (
        start(0, 1) + string("general.alignment") + struct.pack("<If", 6, 32.0), "is 32.0"
    ),
    "no dimensions": (start(1, 0) + tensor("x", [], 0, 0), "0 dimensions"),
    "dimensions": (start(1, 0) + string("x") + struct.pack("<I", 2**32 - 1), "4294967295 dim"),
    "zero": (start(1, 0) + tensor("x", [0], 0, 0), "shape (0,)"),
    "overflow": (start(1, 0) + tensor("x", [2**32, 2**32], 0, 0) + bytes(99), "file's end"),
    "not whole blocks": (start(1, 0) + tensor("x", [16], 8, 0), "in blocks of 32"),
    "kind": (start(1, 0) + tensor("x", [16], 4, 0), "4 is not a valid"),
    "offset": (start(1, 0) + tensor("x", [4], 0, 2**63) + bytes(99), "file's end"),
    "one byte short": (ONE + PADDING + bytes(15), "file's end"),
    "tensor twice": (start(2, 0) + 2 * tensor("x", [4], 0, 0) + bytes(99), "'x' comes twice"),
    "overlap": (
        start(2, 0) + tensor("x", [8], 0, 0) + tensor("y", [8], 0, 16) + bytes(99), "overlaps"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_refused_before_memory_is_taken(name: str, tmp_path: Path):
    path = tmp_path / "bad.gguf"
    data, message = BAD[name]
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as e:
            read_header(path)
        assert str(path) in str(e.value) and message in str(e.value)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_without_a_byte_to_spare_is_read(tmp_path: Path):
    path = tmp_path / "good.gguf"
    path.write_bytes(ONE + PADDING + bytes(16))
    assert read_header(path).stored("x").read().tolist() == [0, 0, 0, 0]


def test_a_header_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.gguf", *model())
    monkeypatch.setattr(gguf_file, "MAX_HEADER", 2000)
    with pytest.raises(CheckpointError, match="header"):
        read_header(path)


def test_only_regular_files_and_links_to_them_are_read(tmp_path: Path):
    path = write(tmp_path / "a.gguf", *model())
    (tmp_path / "link.gguf").symlink_to(path)
    assert read_all(tmp_path / "link.gguf").keys() == read_all(path).keys()
    os.mkfifo(tmp_path / "pipe.gguf")  # which a reader would wait for without an end
    (tmp_path / "folder.gguf").mkdir()
    for name in ("pipe.gguf", "folder.gguf", "none.gguf"):
        with pytest.raises(CheckpointError, match=name):
            read_header(tmp_path / name)


def test_a_file_that_shrank_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.gguf", *model())
    _, tensors = open_gguf(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        for stored in tensors.values():
            stored.read()


def test_mutations_are_refused_or_sound(tmp_path: Path):
    """One to eight bytes changed, a cut, or a stretch left out, mostly in the header."""
    fields, tensors = model()
    good = write(tmp_path / "good.gguf", fields, tensors).read_bytes()
    data_begins = min(place.begin for place in read_header(tmp_path / "good.gguf").places.values())
    rng = random.Random(0)
    path, refused = tmp_path / "bad.gguf", 0
    for _ in range(1500):
        data = bytearray(good)
        match rng.randrange(6):
            case 0:
                del data[rng.randrange(len(data)) :]
            case 1:
                at = rng.randrange(len(data))
                del data[at : at + rng.randint(1, 64)]
            case _:
                for _ in range(rng.randint(1, 8)):
                    at = rng.randrange(data_begins if rng.random() < 0.9 else len(data))
                    data[at] = rng.choice((0, 255, data[at] ^ 1 << rng.randrange(8)))
        path.write_bytes(data)
        try:
            _, found = open_gguf(path)
            for name, stored in found.items():
                array = stored.read()
                assert (array.shape, array.dtype) == (stored.shape, stored.dtype), name
            files = gguf_tokenizer_files(path)
            ids = Tokenizer.from_str(files["tokenizer.json"].decode()).encode("ab  12").ids
            assert all(i < VOCAB for i in ids)
        except CheckpointError as e:
            assert str(path) in str(e)
            refused += 1
    assert 500 < refused < 1450


# Tokenizers


def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_str(gguf_tokenizer_files(path)["tokenizer.json"].decode())


TOKENS = [*BYTES, "12", "34", "1234", "ĠĠ", "ĠĠĠ", "Ġa", "Ġ1", "ab", "aĠ", "!Ċ", "'s", "'S", "abab",
          "<|end|>", "<think>", "<｜x｜>"]  # fmt: skip
MERGES = ["1 2", "3 4", "12 34", "Ġ Ġ", "ĠĠ Ġ", "Ġ a", "Ġ 1", "a b", "a Ġ", "! Ċ", "' s", "' S"]
TYPES = [1] * (len(TOKENS) - 3) + [3, 4, 3]


def byte_level(path: Path, fields: dict[str, Any]) -> Path:
    base = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": TOKENS.index("<|end|>"),
        "tokenizer.ggml.eos_token_id": TOKENS.index("<|end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }
    merged = {key: value for key, value in (base | fields).items() if value is not None}
    return write(path, merged, {})


@pytest.mark.parametrize(
    "pre, expected",
    [
        # Digits are split off one by one, and only then white space is looked at.
        ("smollm", "1 2 3 4 | ĠĠĠ | 1 2 | Ġa b | ĠĠ Ġa b | ' S | 's | ! | Ċ"),
        # The last of several spaces goes with what follows, digits too.
        ("gpt-2", "1234 | ĠĠ | Ġ 12 | Ġa b | ĠĠ Ġa b | ' S | 's | ! | Ċ"),
        # Up to three digits make a word, without a space, and a line's end goes with a sign.
        ("llama-bpe", "12 3 4 | ĠĠ | Ġ | 12 | Ġa b | ĠĠ Ġa b | 'S | 's | !Ċ"),
        ("qwen2", "1 2 3 4 | ĠĠ | Ġ | 1 2 | Ġa b | ĠĠ Ġa b | 'S | 's | !Ċ"),
    ],
)
def test_text_is_split_as_the_model_learnt_it(pre: str, expected: str, tmp_path: Path):
    path = byte_level(tmp_path / "a.gguf", {"tokenizer.ggml.pre": pre})
    text = "1234   12 ab   ab'S's!\n"
    found = tokenizer(path).encode(text)
    assert found.tokens == expected.replace("| ", "").split()
    assert tokenizer(path).decode(found.ids) == text


@pytest.fixture(scope="module")
def splitters(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("splitters")
    return [
        tokenizer(byte_level(folder / pre, {"tokenizer.ggml.pre": pre}))
        for pre in ("gpt-2", "smollm", "llama-bpe")
    ]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_give_back_any_text(splitters: list[Tokenizer], text: str):
    for splitter in splitters:
        assert splitter.decode(splitter.encode(text).ids) == text


def test_special_tokens_are_whole_and_only_control_ones_are_special(tmp_path: Path):
    made = tokenizer(byte_level(tmp_path / "a.gguf", {}))
    found = made.encode("ab<|end|><think>ab<｜x｜>")
    assert found.tokens == ["ab", "<|end|>", "<think>", "ab", "<｜x｜>"]
    assert found.ids == [TOKENS.index(token) for token in found.tokens]
    assert made.decode(found.ids) == "ab<think>ab"


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, "ab"),
        ({"add_bos_token": True}, "<|end|> ab"),
        ({"add_eos_token": True, "eos_token_id": 0}, "ab !"),
        ({"add_bos_token": True, "add_eos_token": True}, "<|end|> ab <|end|>"),
        ({"add_bos_token": None}, "ab"),
        ({"add_bos_token": None, "pre": "llama-bpe"}, "<|end|> ab"),
    ],
)
def test_ends_are_added_as_the_file_says(fields: dict[str, Any], expected: str, tmp_path: Path):
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    made = tokenizer(byte_level(tmp_path / "a.gguf", fields))
    assert made.encode("ab").tokens == expected.split()
    pair, n = made.encode("ab", "ab"), len(expected.split())
    assert pair.tokens == 2 * expected.split() and pair.type_ids == [0] * n + [1] * n


def test_llama_3_looks_whole_words_up_first(tmp_path: Path):
    """No merges lead to "abab"."""
    for pre, expected in (("llama-bpe", ["abab"]), ("qwen2", ["ab", "ab"])):
        path = byte_level(tmp_path / pre, {"tokenizer.ggml.pre": pre})
        assert tokenizer(path).encode("abab", add_special_tokens=False).tokens == expected


def test_qwen_composes_characters(tmp_path: Path):
    path = byte_level(tmp_path / "a.gguf", {"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer(path).encode("e\u0301").ids == tokenizer(path).encode("é").ids


def test_config_names_tokens_and_chat_template(tmp_path: Path):
    path = byte_level(tmp_path / "a.gguf", {"tokenizer.chat_template": "{{ messages }}"})
    assert json.loads(gguf_tokenizer_files(path)["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model": "bert"}, "'bert'"),
        ({"model": None}, "tokenizer.ggml.model"),
        ({"pre": "tekken"}, "'tekken'"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "twice"),
        ({"tokens": [*TOKENS[:-1], ""]}, "empty"),
        ({"tokens": [1, 2, 3]}, "of type list"),
        ({"token_type": [1, 2]}, "token types"),
        ({"token_type": [*TYPES[1:], 9]}, "token types"),
        ({"merges": ["a b", "1 2 34"]}, "'1 2 34'"),
        ({"merges": ["a  b"]}, "'a  b'"),
        ({"merges": ["a c"]}, "'a c'"),
        ({"bos_token_id": len(TOKENS)}, "bos_token_id"),
        ({"bos_token_id": None, "add_bos_token": True}, "adds bos"),
        ({"chat_template": 1}, "chat_template"),
        ({"model": "llama"}, "scores"),
        ({"model": "llama", "scores": [0.0]}, "scores"),
        ({"model": "llama", "scores": [float("nan")] * len(TOKENS)}, "scores"),
        ({"model": "llama", "remove_extra_whitespaces": True}, "white space"),
    ],
)
def test_tokenizers_not_known_are_refused(fields: dict[str, Any], message: str, tmp_path: Path):
    where = {"chat_template": "tokenizer.chat_template"}
    given = {where.get(key, f"tokenizer.ggml.{key}"): value for key, value in fields.items()}
    path = byte_level(tmp_path / "bad.gguf", given)
    with pytest.raises(CheckpointError) as e:
        gguf_tokenizer_files(path)
    assert str(path) in str(e.value) and message in str(e.value)


LINES = ["the cat sat on the mat, the cat that sat", "a  dog and   a log", "naïve café in 1984"]


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "plain"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SentencePiece model, and the tokenizer of a GGUF file with its pieces."""
    proto = ModelProto()
    proto.ParseFromString(train_sentencepiece(LINES * 5, 340).model)
    proto.normalizer_spec.add_dummy_prefix = request.param
    theirs = SentencePieceProcessor(model_proto=proto.SerializeToString())
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [int(piece.type) for piece in proto.pieces],
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": request.param,
    }
    path = write(tmp_path_factory.mktemp("pieces") / "a.gguf", fields, {})
    return theirs, tokenizer(path)


letters = st.sampled_from(sorted(set("".join(LINES))))
words = st.sampled_from(sorted({word for line in LINES for word in line.split()} | {" ", "  "}))


@given(text=st.text(letters) | st.lists(words).map("".join) | st.text(st.characters(
    exclude_categories=["Cs"], exclude_characters="\0")))  # fmt: skip
def test_pieces_are_sentencepieces(pieces: Any, text: str):
    theirs, ours = pieces
    assert ours.encode(text).ids == theirs.encode(text)
    assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def test_pieces_that_can_be_made_in_too_many_ways_are_refused(tmp_path: Path):
    """A small file could otherwise ask for merges a thousand times its size."""
    many = ["a" * i + "b" * j for i in range(60) for j in range(60) if i + j]
    with pytest.raises(CheckpointError, match="57584 ways"):
        gguf_tokenizer_files(unscored(tmp_path / "a.gguf", many))


def test_a_very_long_piece_takes_no_time(tmp_path: Path):
    """Cutting it in two everywhere would take minutes."""
    tokens = ["a", "aa", "a" * 10**6]
    path = unscored(tmp_path / "a.gguf", tokens)
    assert tokenizer(path).encode("aa", add_special_tokens=False).tokens == ["aa"]


def unscored(path: Path, tokens: list[str]) -> Path:
    """A file of SentencePiece pieces."""
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return write(path, fields, {})
