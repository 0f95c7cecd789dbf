"""Each recipe in configs/ runs."""

import math
from pathlib import Path

import pytest
import tiny

from jaxformer.cli import main

OWN = {
    "mlm_words": ["--data.vocab_size", "400"],
    "translate_files": ["--data.train", *tiny.files(), "--data.vocab_size", "268"],
}
RECIPES = [path for path in sorted((tiny.ROOT / "configs").glob("*.py")) if path.stem != "finetune"]
"""That one needs a model to begin with: see test_finetune.py."""
SMALL = """
--steps 2 --model.d_model 8 --model.d_ff 8 --model.n_heads 2
--data.valid_fraction 0.001 --decode.beams 1 --decode.max_length 4
""".split()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs(tmp_path: Path, path: Path):
    options = [*SMALL, *OWN.get(path.stem, ()), "--run_dir", str(tmp_path)]
    with tiny.shared_compilation():
        assert main(["train", "--config", str(path), *options]) == 0
    losses = [line["eval/loss"] for line in tiny.metrics(tmp_path) if "eval/loss" in line]
    assert len(losses) == 1 and all(map(math.isfinite, losses))
