"""The documentation's table of families is that of the code."""

import sys
from pathlib import Path

from jaxformer.hub.families import FAMILIES

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "parity"))

from checkpoints import CHECKPOINTS  # noqa: E402
from table import table  # noqa: E402


def test_the_table_is_up_to_date():
    written = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert written == table(), "run python tests/parity/table.py > docs/families.md"


def test_every_family_is_compared():
    assert {each.model_type for each in CHECKPOINTS} == set(FAMILIES)
