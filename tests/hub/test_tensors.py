import gc
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import einops
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mutations import mutate, outcomes
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxformer.errors import CheckpointError
from jaxformer.hub import tensors
from jaxformer.hub.tensors import DTYPES, INDEX, WEIGHTS, in_memory, open_safetensors

BIT_PATTERNS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@st.composite
def arrays(draw) -> np.ndarray:
    """Any bits of any dtype in any small shape: with axes of 0 and 1, 0-dimensional, transposed."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    if dtype == np.bool_:
        array = draw(hnp.arrays(np.bool_, shape))
    else:
        array = draw(hnp.arrays(BIT_PATTERNS[dtype.itemsize], shape)).view(dtype)
    return array.T if draw(st.booleans()) else array


def write(folder: Path, arrays: dict[str, np.ndarray], max_shard_bytes: int = 2**30) -> None:
    stored = {name: in_memory(array) for name, array in arrays.items()}
    tensors.write_safetensors(folder, stored, max_shard_bytes=max_shard_bytes)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def craft(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A file with this header (JSON, or bytes as they are), and these bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shards(folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint of two shards and their index."""
    made = {name: np.full(3, i, np.float32) for i, name in enumerate("abcd")}
    write(folder, made, max_shard_bytes=24)
    assert sorted(p.name for p in folder.iterdir()) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX,
    ]  # fmt: skip
    return made


def edit_index(folder: Path, **places: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= places
    (folder / INDEX).write_text(json.dumps(index))


# Round trips


@given(st.dictionaries(st.text(max_size=8), arrays(), max_size=6), st.integers(1, 300))
def test_what_is_written_is_read(tmp_path_factory, made, limit):
    folder = tmp_path_factory.mktemp("w")
    write(folder, made, limit)
    assert not list(folder.glob("*.tmp"))
    found = open_safetensors(folder)
    assert found.keys() == made.keys()
    for name, tensor in found.items():
        array = tensor.read()
        assert same(array, made[name]) and not array.flags.writeable
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
        assert tensor.nbytes == array.nbytes
    files = [load_file(path) for path in folder.glob("*.safetensors")]  # their own reader
    theirs = {name: array for file in files for name, array in file.items()}
    assert theirs.keys() == made.keys() and sum(map(len, files)) == len(made)
    assert all(same(theirs[name], made[name]) for name in made)
    sizes = [sum(array.nbytes for array in file.values()) for file in files]
    assert all(size <= limit or len(file) == 1 for size, file in zip(sizes, files, strict=True))
    if len(files) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
        assert set(index["weight_map"].values()) == {p.name for p in folder.glob("*.safetensors")}


@given(st.dictionaries(st.text(min_size=1, max_size=8), arrays(), max_size=6))
def test_what_safetensors_writes_is_read(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("w")
    save_file({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in made.items()},
              folder / WEIGHTS)  # fmt: skip
    found = open_safetensors(folder)
    assert found.keys() == made.keys()
    assert all(same(found[name].read(), made[name]) for name in made)


def test_the_same_tensors_are_the_same_bytes_and_a_copy_too(tmp_path):
    made = shards(tmp_path / "a")
    write(tmp_path / "b", made, max_shard_bytes=24)
    tensors.write_safetensors(tmp_path / "c", open_safetensors(tmp_path / "a"), max_shard_bytes=24)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()


def test_transformers_find_the_format_they_insist_on_and_tensors_are_aligned(tmp_path):
    made = {"a": np.ones(3, np.bool_), "b": np.ones(2, np.float64), "c": np.ones(1, np.float16)}
    write(tmp_path, made)
    with safe_open(tmp_path / WEIGHTS, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(tensor.read().flags.aligned for tensor in open_safetensors(tmp_path).values())


@pytest.mark.parity
def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    made = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path, {"w": made.astype(ml_dtypes.bfloat16)})
    assert torch.equal(load_file(tmp_path / WEIGHTS)["w"], torch.tensor(made).bfloat16())


# Laziness


def maps(path: Path) -> int:
    """How many maps this process has of a file."""
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_views_stay_maps_which_go_with_them(tmp_path):
    write(tmp_path, {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "v": np.ones(5)})
    found = open_safetensors(tmp_path)
    assert maps(tmp_path / WEIGHTS) == 0
    array = found["w"].read()
    view = einops.rearrange(array[1:], "a (b c) -> b (a c)", b=2)
    assert maps(tmp_path / WEIGHTS) == 1
    np.testing.assert_array_equal(view, [[4, 5, 8, 9], [6, 7, 10, 11]])
    assert np.shares_memory(array, einops.rearrange(array, "a b -> b a"))
    del array, view
    gc.collect()
    assert maps(tmp_path / WEIGHTS) == 0


RESIDENT = """
import resource, sys
from pathlib import Path
from jaxformer.hub.tensors import open_safetensors, write_safetensors
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
found = open_safetensors(Path(sys.argv[1]))
before = peak()
for tensor in found.values():
    tensor.read().sum()
read = peak()
write_safetensors(Path(sys.argv[2]), found)
print(read - before, peak() - read, "jax" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units")
def test_memory_holds_one_tensor(tmp_path):
    big = {str(i): np.full(2**22, i, np.float32) for i in range(16)}  # 16 MiB each
    write(tmp_path / "a", big)
    assert (tmp_path / "a" / WEIGHTS).stat().st_size > 256 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, tmp_path / "a", tmp_path / "b"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    read, written, jax = done.stdout.split()
    assert float(read) < 16 + 6 and float(written) < 16 and jax == "False"
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


# Refusals: fault 33, one by one


WRONG_FILES = {
    "empty": lambda f: (f / WEIGHTS).write_bytes(b""),
    "seven bytes": lambda f: (f / WEIGHTS).write_bytes(b"\1" * 7),
    "header past the end": lambda f: craft(f, {}, length=100),
    "header of 2^64 - 1": lambda f: craft(f, {}, length=2**64 - 1),
    "header of 2^63": lambda f: craft(f, {}, length=2**63),
    "no JSON": lambda f: craft(f, b"{]"),
    "no object": lambda f: craft(f, [1]),
    "not UTF-8": lambda f: craft(f, b'{"\xff":1}'),
    "deep JSON": lambda f: craft(f, b'{"a":' + b"[" * 100_000),
    "overlap": lambda f: craft(f, {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "hole": lambda f: craft(f, {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "hole at the end": lambda f: craft(f, {"a": entry(0, 4, [1])}, bytes(8)),
    "past the end": lambda f: craft(f, {"a": entry(0, 8, [2])}, bytes(4)),
    "backwards": lambda f: craft(f, {"a": entry(4, 0, [1])}, bytes(4)),
    "negative": lambda f: craft(f, {"a": entry(-4, 0, [1])}, bytes(4)),
    "over u64": lambda f: craft(f, {"a": entry(0, 2**64, [2**62])}, bytes(4)),
    "shape over u64": lambda f: craft(f, {"a": entry(0, 0, [2**33, 2**33])}),
    "shape wraps to the span": lambda f: craft(f, {"a": entry(0, 4, [2**62 + 1])}, bytes(4)),
    "shape is not the span": lambda f: craft(f, {"a": entry(0, 8, [3])}, bytes(8)),
    "no such array": lambda f: craft(f, {"a": entry(0, 0, [0, 2**31, 2**31])}),
    "too many axes": lambda f: craft(f, {"a": entry(0, 4, [1] * 65)}, bytes(4)),
    "a name twice": lambda f: craft(
        f, b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4, [1])).encode(),) * 2), bytes(4)
    ),
    "a fraction": lambda f: craft(f, b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
                                  bytes(4)),
    "no dtype": lambda f: craft(f, {"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_refused(tmp_path, name):
    WRONG_FILES[name](tmp_path)
    # A header's length is looked at before anything reads the header.
    why = "cannot have a header of" if name.startswith("header") else ""
    with pytest.raises(CheckpointError, match=f"is damaged.*{why}"):
        open_safetensors(tmp_path)


def test_a_sound_crafted_file_is_read(tmp_path):
    """So that the tests above are refused for what they say."""
    header = {"a": entry(0, 8, [2]), "b": entry(8, 12, [1]), "__metadata__": {"x": "y"}}
    craft(tmp_path, header, np.arange(3, dtype=np.float32).tobytes())
    found = open_safetensors(tmp_path)
    assert found["a"].read().tolist() == [0, 1] and found["b"].read().tolist() == [2]
    assert found.keys() == {"a", "b"}


@pytest.mark.parametrize("dtype, size", [("F8_E4M3", 2), ("F8_E5M2", 2), ("F4", 1), ("C64", 16)])
def test_dtypes_that_are_not_read_are_all_named(tmp_path, dtype, size):
    craft(tmp_path, {"a": entry(0, size, [2], dtype), "b": entry(size, 2 * size, [2], dtype),
                     "c": entry(2 * size, 2 * size + 4, [1])}, bytes(2 * size + 4))  # fmt: skip
    with pytest.raises(CheckpointError) as error:
        open_safetensors(tmp_path)
    assert f"'a ({dtype})', 'b ({dtype})'." in str(error.value)


def test_a_large_header_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_JSON", 1000)
    craft(tmp_path, b"{}" + b" " * 998)
    assert open_safetensors(tmp_path) == {}
    craft(tmp_path, b"{}" + b" " * 1000)
    with pytest.raises(CheckpointError, match="cannot have a header of 1002"):
        open_safetensors(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a" * 1000: "b.safetensors"}}))
    with pytest.raises(CheckpointError, match="bytes, over 1000"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("name", [
    "../a.safetensors", "/etc/a.safetensors", "b/a.safetensors", "..", "", "a.bin",
    "a\n.safetensors", "a.safetensors\n", "C:\\a.safetensors", "\x1b[2J.safetensors",
    "ä.safetensors", "a\0.safetensors",
])  # fmt: skip
def test_shard_names_that_lead_elsewhere_are_refused(tmp_path, name):
    folder = tmp_path / "model"
    shards(folder)
    write(tmp_path / "x", {"a": np.zeros(3, np.float32)})
    (tmp_path / "x" / WEIGHTS).rename(tmp_path / "a.safetensors")
    edit_index(folder, a=name, b="../b.safetensors")
    with pytest.raises(CheckpointError, match="no plain file name") as error:
        open_safetensors(folder)
    assert repr(name) in str(error.value) and "'../b.safetensors'" in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["device", "fifo", "directory", "dangling", "loop"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, name, kind):
    shards(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(tmp_path / name)
    elif kind == "directory":
        (tmp_path / name).mkdir()
    else:
        target = {"device": "/dev/zero", "dangling": "/nowhere", "loop": name}[kind]
        (tmp_path / name).symlink_to(target)
    why = "cannot read" if kind in ("dangling", "loop") else "is no regular file"
    with pytest.raises(CheckpointError, match=f"{why}|{name} is no"):
        open_safetensors(tmp_path)


def test_links_to_blobs_are_followed(tmp_path):
    """As in Hugging Face's cache: snapshots/REVISION/NAME is a link to ../../blobs/DIGEST."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    made = shards(blobs)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    found = open_safetensors(snapshot)
    assert found.keys() == made.keys()
    assert all(same(found[name].read(), made[name]) for name in made)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    cases = [
        ({"a": second, "x": first, "y": second}, "lacks tensors.*'a', 'x', 'y'"),
        ({"a": "no1.safetensors", "b": "no2.safetensors"}, "lacks files.*'no1.*', 'no2"),
    ]
    for i, (places, match) in enumerate(cases):
        folder = tmp_path / str(i)
        shards(folder)
        edit_index(folder, **places)
        with pytest.raises(CheckpointError, match=match):
            open_safetensors(folder)
    folder = tmp_path / "twice"
    shards(folder)
    (folder / "third.safetensors").write_bytes((folder / first).read_bytes())
    edit_index(folder, a="third.safetensors")
    with pytest.raises(CheckpointError, match="in two shards: 'a', 'b'"):
        open_safetensors(folder)


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "b"',
    '{"weight_map": {"a": "b", "a": "c"}}', '{"weight_map": {}, "weight_map": {}}', "[" * 100_000,
])  # fmt: skip
def test_wrong_indices_are_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("names, says", [
    (["pytorch_model.bin", "a.txt"], "'pytorch_model.bin'.*never executed.*save_pretrained"),
    (["model.pt", "x.ckpt", "y.pth"], "'model.pt', 'x.ckpt', 'y.pth'.*never executed"),
    (["tf_model.h5", "flax_model.msgpack"], "'flax_model.msgpack', 'tf_model.h5'.*not read here"),
    (["other.safetensors"], f"neither {WEIGHTS} nor {INDEX}, only 'other.safetensors'"),
    (["a.txt"], f"neither {WEIGHTS} nor {INDEX}, only 'a.txt'"),
    ([], "only nothing"),
])  # fmt: skip
def test_a_folder_without_safetensors_is_told_what_it_has(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(CheckpointError, match=says):
        open_safetensors(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        open_safetensors(tmp_path / "nowhere")


def test_a_file_that_shrinks_later_is_refused(tmp_path):
    write(tmp_path, {"w": np.ones(10_000)})
    tensor = open_safetensors(tmp_path)["w"]
    os.truncate(tmp_path / WEIGHTS, 1000)
    with pytest.raises(CheckpointError, match="has changed since"):
        tensor.read()


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"'a \(complex128\)', '__metadata__ \(float64\)'"):
        write(tmp_path, {"a": np.ones(2, complex), "b": np.ones(2), "__metadata__": np.ones(2)})
    assert not list(tmp_path.iterdir())
    write(tmp_path, {"a": np.ones(2)})
    with pytest.raises(CheckpointError, match="holds weights already.*'model.safetensors'"):
        write(tmp_path, {"a": np.zeros(2)})
    assert open_safetensors(tmp_path)["a"].read().tolist() == [1, 1]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        write(tmp_path / "file" / "x", {"a": np.zeros(2)})


def test_a_failed_write_leaves_no_checkpoint(tmp_path):
    def fail() -> np.ndarray:
        raise CheckpointError("source is gone")

    broken = tensors.Stored((2,), np.dtype(np.float32), fail)
    made = {"a": in_memory(np.ones(2)), "b": broken}
    with pytest.raises(CheckpointError, match="source is gone"):
        tensors.write_safetensors(tmp_path, made)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="source is gone"):
        tensors.write_safetensors(tmp_path, made, max_shard_bytes=16)
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]
    write(tmp_path, {"a": np.ones(2), "b": np.ones(2)}, 16)
    assert open_safetensors(tmp_path).keys() == {"a", "b"}


# Mutations


@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "model-00001-of-00002.safetensors"])
def test_mutated_files_are_refused_or_sound(tmp_path, name):
    rng = random.Random(name)
    made = {f"layers.{i}.weight": np.full((3, i + 1), i, np.float32) for i in range(4)}
    write(tmp_path, made, max_shard_bytes=80 if name != WEIGHTS else 2**30)
    original = (tmp_path / name).read_bytes()
    files = ((tmp_path / name).write_bytes(mutate(rng, original)) for _ in range(600))
    sound, refused = outcomes(files, lambda: open_safetensors(tmp_path), 20_000)
    assert refused > 300 and sound > 10
