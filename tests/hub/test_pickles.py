import io
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mutations import mutate, outcomes

from jaxformer.errors import CheckpointError
from jaxformer.hub import pickles
from jaxformer.hub.pickles import STORAGES, open_torch_pickle

KINDS = {dtype: name for name, dtype in STORAGES.items()}


# What torch.save does, with neither torch nor its names: pickle writes a global for these.


class Global:
    """Pickled as the bare name MODULE.NAME."""

    def __init__(self, name: str) -> None:
        self.name = name


class Call:
    """Pickled as NAME(*arguments)."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.name, self.arguments = Global(name), arguments


class View:
    """Pickled as a tensor of a storage."""

    def __init__(
        self, key: object, dtype: np.dtype, size: int, offset: int, shape: tuple, strides: tuple
    ) -> None:
        self.key, self.dtype, self.size = key, dtype, size
        self.rest = offset, shape, strides, False, OrderedDict()


class Storage:
    def __init__(self, view: View) -> None:
        self.identity = "storage", Global(KINDS[view.dtype]), view.key, "cpu", view.size


class Pickler(pickle._Pickler):
    """The pickler in Python, whose `save` can be told how to write the classes above."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            module, _, name = obj.name.rpartition(".")
            if self.proto >= 4:
                self.save(module)
                self.save(name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.name)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Storage):
            self.save(obj.identity, save_persistent_id=False)
            self.write(pickle.BINPERSID)
        elif isinstance(obj, View):
            self.save(Call("torch._utils._rebuild_tensor_v2", Storage(obj), *obj.rest))
        else:
            super().save(obj, save_persistent_id)


def program(value: object, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol).dump(value)
    return out.getvalue()


def archive(
    path: Path, data_pkl: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    members = {"data.pkl": data_pkl, "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{key}": data for key, data in storages.items()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)


def save(path: Path, arrays: dict[str, np.ndarray], protocol: int = 2) -> None:
    """As torch.save of a state dict: each array whole, in a storage of its own."""
    state: OrderedDict = OrderedDict()
    for i, (name, array) in enumerate(arrays.items()):
        steps = tuple(n // array.itemsize for n in array.strides)
        state[name] = View(str(i), array.dtype, array.size, 0, array.shape, steps)
    state._metadata = OrderedDict({"": {"version": 1}})
    data = {str(i): array.tobytes("A") for i, array in enumerate(arrays.values())}
    archive(path, program(state, protocol), data)


# Sound files


@st.composite
def arrays(draw) -> np.ndarray:
    dtype = draw(st.sampled_from(list(KINDS)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    array = draw(hnp.arrays(np.uint8, (*shape, dtype.itemsize)))
    array = (array % 2 if dtype == np.bool_ else array).view(dtype).reshape(shape)
    return array.copy().T if draw(st.booleans()) else array.copy()


@given(st.dictionaries(st.text(min_size=1, max_size=8), arrays(), min_size=1, max_size=5),
       st.sampled_from([2, 3, 4, 5]))  # fmt: skip
def test_what_is_saved_is_read(tmp_path_factory, made, protocol):
    path = tmp_path_factory.mktemp("p") / "model.pt"
    save(path, made, protocol)
    found = open_torch_pickle(path)
    assert list(found) == list(made)
    for name, tensor in found.items():
        array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
        assert (array.shape, array.dtype) == (made[name].shape, made[name].dtype)
        assert array.tobytes() == made[name].tobytes() and not array.flags.writeable


def test_views_of_one_storage(tmp_path):
    f32 = np.dtype(np.float32)
    state = {
        "embed": View("0", f32, 12, 0, (3, 4), (4, 1)),
        "tied": View("0", f32, 12, 0, (3, 4), (4, 1)),
        "turned": View("0", f32, 12, 0, (4, 3), (1, 4)),
        "part": View("0", f32, 12, 5, (2, 2), (4, 2)),
        "one": View("0", f32, 12, 11, (), ()),
        "none": View("0", f32, 12, 12, (0, 3), (3, 1)),
    }
    base = np.arange(12, dtype=np.float32)
    archive(tmp_path / "m.pt", program(state), {"0": base.tobytes()})
    found = {name: t.read() for name, t in open_torch_pickle(tmp_path / "m.pt").items()}
    grid = base.reshape(3, 4)
    wanted = {"embed": grid, "tied": grid, "turned": grid.T, "part": grid[1:, 1::2],
              "one": base[11], "none": np.zeros((0, 3))}  # fmt: skip
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], name)


def test_dicts_in_dicts_and_what_else_checkpoints_hold(tmp_path):
    weight = View("0", np.dtype(np.int64), 2, 0, (2,), (1,))
    state = {
        "epoch": 7, "loss": 0.5, "name": "x", "best": None, "done": True, "steps": [1, (2, 3), {}],
        "model": {"w": Call("torch._utils._rebuild_parameter", weight, True, OrderedDict())},
        "shape": Call("torch.Size", (1, 2)), "optimizer": {"state": {0: {"step": weight}}},
        "big": 2**70,
    }  # fmt: skip
    archive(tmp_path / "m.ckpt", program(state), {"0": np.array([3, 4]).tobytes()})
    found = open_torch_pickle(tmp_path / "m.ckpt")
    assert {k: t.read().tolist() for k, t in found.items()} == {
        "model.w": [3, 4], "optimizer.state.0.step": [3, 4],
    }  # fmt: skip


@pytest.mark.parity
def test_what_torch_saves_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    base = torch.arange(24)
    more = {
        str(dtype): base.reshape(2, 12).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
                      torch.float16, torch.float64, torch.bfloat16)
    }  # fmt: skip
    views = {"turned": base.reshape(4, 6).T, "part": base[3:20:4], "zero": base[:0], "of": base[5]}
    state = {"model": model.state_dict(), "more": more, "views": views, "parameters": {
        "p": torch.nn.Parameter(torch.ones(2, 2))}, "size": base.shape, "epoch": 3}  # fmt: skip
    torch.save(state, tmp_path / "m.pt")
    theirs = torch.load(tmp_path / "m.pt", weights_only=True)
    theirs = {f"{part}.{name}": tensor for part in ("model", "more", "views", "parameters")
              for name, tensor in theirs[part].items()}  # fmt: skip
    found = open_torch_pickle(tmp_path / "m.pt")
    assert list(found) == list(theirs)
    for name, tensor in found.items():
        array = tensor.read()
        assert str(theirs[name].dtype) == f"torch.{array.dtype}" and array.shape == tensor.shape
        np.testing.assert_array_equal(array.astype(float), theirs[name].detach().double(), name)
    for wrong in (model, torch.zeros(2), [torch.zeros(2)]):
        torch.save(wrong, tmp_path / "m.pt")
        with pytest.raises(CheckpointError, match="allowed|no dict of tensors"):
            open_torch_pickle(tmp_path / "m.pt")
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="not a zip"):
        open_torch_pickle(tmp_path / "m.pt")


def test_reading_imports_neither_torch_nor_jax(tmp_path):
    save(tmp_path / "m.pt", {"w": np.ones(2, np.float32)})
    code = ("import sys; from pathlib import Path\n"
            "from jaxformer.hub.pickles import open_torch_pickle\n"
            "assert open_torch_pickle(Path(sys.argv[1]))['w'].read().tolist() == [1, 1]\n"
            "print(sorted({'jax', 'torch'} & set(sys.modules)))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.pt"], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout == "[]\n"


# Malicious pickles


class Reduce:
    def __init__(self, *how: object) -> None:
        self.how = how

    def __reduce__(self):
        return self.how


def attacks(mark: str) -> dict[str, bytes]:
    """Pickles that make the file `mark` when they are loaded."""
    code, touch = f"open({mark!r}, 'w').close()", f"touch {mark}"
    a = {
        "os.system": f"cos\nsystem\n(S'{touch}'\ntR.".encode(),
        "posix.system": f"cposix\nsystem\n(V{touch}\ntR.".encode(),
        "inst": f"(S'{touch}'\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nS'{touch}'\no.".encode(),
        "newobj": f"csubprocess\nPopen\n((lS'{touch}'\natt\x81.".encode(),
        "eval": pickle.dumps(Reduce(eval, (code,))),
        "exec": pickle.dumps(Reduce(exec, (code,)), protocol=2),
        "getattr": program(Call("builtins.getattr", Global("os.path"), "os"), 4),
        "dotted": b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93\x8c" + bytes([len(touch)])
        + touch.encode() + b"\x85R.",
        "subprocess": pickle.dumps(Reduce(subprocess.check_call, (["touch", mark],))),
        "nested": program({"w": [({"x": Call("os.system", touch)},)]}),
        "in a call": program(Call("torch.Size", (Call("os.system", touch),))),
        "in a name": program(Call("torch._utils._rebuild_tensor_v2.__globals__.get", "os")),
        "in a state": program(OrderedDict()).removesuffix(b".") + program(
            {"x": Call("os.system", touch)})[2:-1] + b"b.",
        "as persistent id": program(Call("os.system", touch)).removesuffix(b".") + b"Q.",
        "import": program(Call("builtins.__import__", "antigravity")),
        "torch.load": program(Call("torch.storage._load_from_bytes",
                                   pickle.dumps(Reduce(eval, (code,))).decode("latin1"))),
        "extension": b"\x80\x02\x82\x01.",
        "class": program(Call("torch.nn.modules.container.Sequential")),
        "call of a value": b"\x80\x02X\1\0\0\0x)R.",
        "call of a storage": program(Call("torch.FloatStorage", 2**40)),
        "setitems of a class": b"ccollections\nOrderedDict\nX\1\0\0\0xK\1s.",
        "build a class": b"ccollections\nOrderedDict\n}X\1\0\0\0xK\1sb.",
        "append to a class": b"ctorch\nSize\nK\1a.",
        "state of slots": b"ctorch\nSize\n(N}X\1\0\0\0xK\1stb.",
        "huge memo": b"\x80\x02}r\xff\xff\xff\xff.",
        "huge memo without value": b"\x80\x02r\xff\xff\xff\x7f.",
        "huge string": b"\x80\x02X\xff\xff\xff\x7fa.",
        "huge bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fa.",
        "huge frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",
        "buffer": b"\x80\x05\x97.",
        "deep": b"(" * 1000 + b"t" * 1000 + b".",
        "no end": b"\x80\x02}",
        "nothing": b"",
        "no pickle": b"hello",
        "odd escape": b"cos\\d\nsystem\n.",
        "unset memo": b"h\1.",
        "no mark": b"K\1t.",
        "odd items": b"}(K\1u.",
        "key of a list": b"}]K\1s.",
    }  # fmt: skip
    return a


@pytest.mark.parametrize("name", attacks("x"))
def test_nothing_is_executed(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = attacks("mark")[name]
    archive(tmp_path / "m.pt", data, {"0": bytes(4)})
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is not read") as error:
        open_torch_pickle(tmp_path / "m.pt")
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    assert "antigravity" not in sys.modules
    if b"system" in data and name not in ("inst", "obj", "newobj"):
        assert "system" in str(error.value) and "not allowed" in str(error.value)


def test_attacks_would_work(tmp_path, monkeypatch):
    """So that the test above can fail."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "posix.system", "inst", "obj", "eval", "exec", "subprocess",
                 "nested"):  # fmt: skip
        pickle.loads(attacks("mark")[name])
        assert (tmp_path / "mark").exists(), name
        (tmp_path / "mark").unlink()


# Archives and tensors that do not fit


F32 = np.dtype(np.float32)
WRONG_VIEWS = {
    "key": View("1", F32, 4, 0, (4,), (1,)),
    "path": View("../data.pkl", F32, 4, 0, (4,), (1,)),
    "too large a storage": View("0", F32, 5, 0, (4,), (1,)),
    "too small a storage": View("0", F32, 3, 0, (3,), (1,)),
    "negative storage": View("0", F32, -4, 0, (4,), (1,)),
    "shape": View("0", F32, 4, 0, (5,), (1,)),
    "offset": View("0", F32, 4, 1, (4,), (1,)),
    "offset alone": View("0", F32, 4, 4, (), ()),
    "negative offset": View("0", F32, 4, -1, (4,), (1,)),
    "stride": View("0", F32, 4, 0, (2, 2), (3, 1)),
    "negative stride": View("0", F32, 4, 3, (4,), (-1,)),
    "strides": View("0", F32, 4, 0, (4,), (1, 1)),
    "repeated": View("0", F32, 4, 0, (2**40,), (0,)),
    "huge": View("0", F32, 4, 0, (2**64 + 1,), (1,)),
    "huge and empty": View("0", F32, 4, 0, (0, 2**47, 2**47), (1, 1, 1)),
    "negative": View("0", F32, 4, 0, (-1, -4), (4, 1)),
    "a fraction": View("0", F32, 4, 0, (4.0,), (1,)),
    "a truth": View("0", F32, 4, 0, (True,), (1,)),
    "axes": View("0", F32, 4, 0, (1,) * 65, (1,) * 65),
}


@pytest.mark.parametrize("view", WRONG_VIEWS.values(), ids=WRONG_VIEWS)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, view):
    archive(tmp_path / "m.pt", program({"w\x1b": view}), {"0": bytes(16)})
    with pytest.raises(CheckpointError, match="does not fit its storage") as error:
        open_torch_pickle(tmp_path / "m.pt")
    assert "\x1b" not in str(error.value)


def test_storages_of_unknown_types_are_refused(tmp_path):
    for identity in (("storage", Global("torch.Size"), "0", "cpu", 4), ("module", 1), 5, "0",
                     ("storage", Global("torch.FloatStorage"), 0, "cpu", 4)):  # fmt: skip
        storage = Storage(View("0", F32, 4, 0, (4,), (1,)))
        storage.identity = identity
        archive(tmp_path / "m.pt", program({"w": storage}), {"0": bytes(16)})
        with pytest.raises(CheckpointError, match="storage of an unknown type"):
            open_torch_pickle(tmp_path / "m.pt")
    archive(tmp_path / "m.pt", program({"w": Global("torch.UntypedStorage")}), {})
    with pytest.raises(CheckpointError, match="'torch.UntypedStorage', which is not allowed"):
        open_torch_pickle(tmp_path / "m.pt")


def test_names_that_are_twins_long_or_none_are_refused(tmp_path):
    view = View("0", F32, 4, 0, (4,), (1,))
    shared: dict = {"w": view}
    for _ in range(60):  # 2**60 names
        shared = {"a": shared, "b": shared}
    cyclic: dict = {"w": view}
    cyclic["x"] = cyclic
    cases = [
        ({"a": {"b": view}, "a.b": view}, "two tensors 'a.b'"),
        ({1: view, "1": view}, "two tensors '1'"),
        (shared, "same dict in two places"),
        (cyclic, "same dict in two places"),
        ({"a" * 300: view}, "name over 256"),
        ({"a": 1}, "no dict of tensors"),
        (view, "no dict of tensors"),
        ([view], "no dict of tensors"),
    ]
    for state, match in cases:
        archive(tmp_path / "m.pt", program(state), {"0": bytes(16)})
        with pytest.raises(CheckpointError, match=match):
            open_torch_pickle(tmp_path / "m.pt")


def test_archives_that_are_not_plain_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    good = program({"w": View("0", F32, 4, 0, (4,), (1,))})

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            open_torch_pickle(path)

    archive(path, good, {"0": bytes(16)}, zipfile.ZIP_DEFLATED)
    refused("compressed")
    path.write_bytes(good)
    refused("not a zip")
    path.write_bytes(b"")
    refused("not a zip")
    path.unlink()
    refused("No such file")
    path.mkdir()
    refused("no regular file")
    path.rmdir()

    def written(*members: tuple[str, bytes]) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members:
                file.writestr(name, data)

    data = "a/data/0", bytes(16)
    written(("a/data.pkl", good), data)
    assert open_torch_pickle(path)["w"].shape == (4,)  # older ones name no byte order
    written(("a/data.pkl", good), data, ("a/byteorder", b"big"))
    refused("big-endian")
    written(("a/other.pkl", good), data)
    refused("no data.pkl")
    written(("a/data.pkl", good), data, ("b/version", b"3"))
    refused("one folder")
    with pytest.warns(UserWarning, match="Duplicate"):
        written(("a/data.pkl", good), data, data)
    refused("there twice")
    written(("a/data.pkl", good), data)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"cpu", b"gpu", 1))
    refused("checksum")
    entry = whole.index(b"PK\1\2")
    path.write_bytes(whole[: entry + 8] + b"\1" + whole[entry + 9 :])
    refused("compressed, encrypted")
    written(("a/data.pkl", program({"w": View("0", F32, 1000, 0, (4,), (1,))})), data)
    ends = path.read_bytes()
    entry = ends.rindex(b"PK\1\2")  # whose sizes are not those of the file
    path.write_bytes(ends[: entry + 20] + struct.pack("<LL", 4000, 4000) + ends[entry + 28 :])
    refused("misplaced")
    monkeypatch.setattr(pickles, "MAX_READ", len(good) - 1)
    path.write_bytes(whole)
    refused("over")


def test_a_directory_of_any_size_is_not_read(tmp_path):
    """The end of an archive says how large its directory is, and how much to believe."""
    path = tmp_path / "m.pt"
    size = 2**26
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="over 4194304"):
        open_torch_pickle(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("part", ["pickle", "archive"])
def test_mutated_files_are_refused_or_sound(tmp_path, part):
    rng = random.Random(part)
    path = tmp_path / "m.pt"
    made = {f"layers.{i}.weight": np.full((3, i + 1), i, np.float32) for i in range(3)}
    made["head"] = np.ones(5, ml_dtypes.bfloat16)
    save(path, made)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        inner = file.read("archive/data.pkl")
        storages = {str(i): file.read(f"archive/data/{i}") for i in range(4)}

    def files():
        for _ in range(800):
            if part == "archive":
                yield path.write_bytes(mutate(rng, whole))
            else:
                yield archive(path, mutate(rng, inner), storages)

    sound, refused = outcomes(files(), lambda: open_torch_pickle(path), 2000)
    assert refused > 200 and sound > 20, (refused, sound)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
