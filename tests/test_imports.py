"""The floors of the house: who may import whom, and what is imported when."""

import ast
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxformer

PACKAGE = Path(jaxformer.__file__).parent

# Each part of the package may import itself, every part on the floors below, and these neighbours.
FLOORS = (
    {"cli"},
    {"converting", "bulk", "picture"},
    {"training", "loading"},
    {"model"},
    {"running"},
    {"generate", "method", "constraining", "arrays", "inspecting", "vectors"},
    {"nn", "decoding", "data", "hub", "sharding", "run", "batching"},
    {"presets", "config"},
    {"shards", "progress"},
    {"types", "files"},
    {"errors"},
)
NEIGHBOURS = {("training", "loading"), ("loading", "training"), ("run", "data"),
              ("generate", "constraining"), ("generate", "method"), ("hub", "data"),
              ("presets", "config")}  # fmt: skip


def part_of(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.split(".")[1]


def imports(path: Path) -> list[tuple[str, set[str]]]:
    """The modules of this package that a file imports, each with the names it takes from it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    ]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in typed:
            found += [(alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node not in typed:
            assert node.level == 0, f"{path}: relative import"
            names = {alias.name for alias in node.names}
            if node.module == "jaxformer":
                found += [(f"jaxformer.{name}", set()) for name in names]
            else:
                found.append((node.module or "", names))
    return [(name, taken) for name, taken in found if name.split(".")[0] == "jaxformer"]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":  # of the package itself, which imports a name when it is asked for
        assert not imports(path)
        return
    (floor,) = (i for i, parts in enumerate(FLOORS) if own in parts)
    below = {own}.union(*FLOORS[floor + 1 :])
    for module, _ in imports(path):
        other = part_of(module)
        assert other in below or (own, other) in NEIGHBOURS, f"{path} imports {module}"


def test_decoding_knows_no_model_and_data_no_config_but_its_own():
    for path in (PACKAGE / "decoding").glob("*.py"):
        assert {part_of(module) for module, _ in imports(path)} <= {"decoding"}, path
    for path in (PACKAGE / "data").glob("*.py"):
        for module, names in imports(path):
            assert module != "jaxformer.config" or names <= {"DataConfig", "require"}, path


def test_modules_know_only_the_model_config():
    for path in (PACKAGE / "nn").glob("*.py"):
        for module, names in imports(path):
            if module == "jaxformer.config":
                assert names == {"ModelConfig"}, path


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_cheap_and_touches_no_device():
    out = python(
        "import sys, jaxformer\n"
        "jaxformer.TrainConfig, jaxformer.PRESETS, jaxformer.Batch, dir(jaxformer)\n"
        "print('jax' in sys.modules)\n"
        "import jaxformer.run, jaxformer.data.pipeline, jaxformer.data.sources\n"
        "import jaxformer.hub.tensors, jaxformer.hub.pickles, jaxformer.vectors\n"
        "jaxformer.read_config, jaxformer.read_decode\n"
        "print('jax' in sys.modules)\n"
        "jaxformer.fit, jaxformer.load\n"
        "from jax._src import xla_bridge\n"
        "print('jax' in sys.modules, xla_bridge.backends_are_initialized())\n"
    )
    assert out.split() == ["False", "False", "True", "False"]


def test_every_public_name_is_there():
    stated = re.findall(r" as (\w+)", Path(jaxformer.__file__).read_text(encoding="utf-8"))
    assert stated == list(jaxformer._HOME)
    for name, home in jaxformer._HOME.items():
        module = importlib.import_module(f"jaxformer.{home}")
        assert getattr(jaxformer, name) is vars(module)[name]
    assert set(stated) <= set(dir(jaxformer))
    with pytest.raises(AttributeError, match="'Modell'"):
        jaxformer.Modell  # noqa: B018  # pyright: ignore


def test_help_answers_at_once():
    begin = time.monotonic()
    out = python("import sys; from jaxformer.cli import main; sys.exit(main(['--help']))")
    assert time.monotonic() - begin < 2
    for command in ("train", "generate", "score", "evaluate", "embed", "convert", "tokenizer"):
        assert f"\n  {command} " in out
