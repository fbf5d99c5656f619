"""What a user writes passes a type checker, and mistakes in it are found."""
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_typical_code_has_the_types_that_signatures_say():
    """Every unused `type: ignore` of the example is an error, so that its three mistakes are known to be found."""
    mypy = pytest.importorskip("mypy.api", reason="pip install -e '.[dev]' brings mypy")
    found, errors, status = mypy.run(["--config-file", str(ROOT/"mypy.ini"), str(ROOT/"tests/typing_example.py")])
    assert status == 0, found + errors
