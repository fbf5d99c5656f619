"""The package as a whole: light imports, notebooks that only look back, stored outputs of bearable size."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [ROOT / "nbs/tour.ipynb", ROOT / "nbs/coming_from.ipynb", *sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
HEAVY = ("lightning", "hydra", "lpips", "torchmetrics", "skimage", "wandb", "tensorboard", "sklearn", "fastcore", "nbdev")


def code_cells(path):
    """The source of every code cell of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def module_of(path):
    """The module that a notebook exports, or None."""
    found = re.search(r"#\|\s*default_exp\s+(\w+)", "\n".join(code_cells(path)))
    return found and found.group(1)


MODULES = {module_of(path): path for path in NOTEBOOKS if module_of(path)}


@pytest.mark.parametrize("module", [*MODULES])
def test_import_is_light(module):
    """Importing a module of the package brings none of the heavy or optional packages with it."""
    code = f"import sys, laser.{module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_imports_only_from_lower_numbers(path):
    """A reader who goes from 00 upward never meets a name that has not been explained."""
    for source in code_cells(path):
        for module in re.findall(r"^(?:from|import) laser\.(\w+)", source, re.M):
            if module == module_of(path):
                continue
            assert MODULES[module].stem[:2] < path.stem[:2], f"{path.name} imports laser.{module}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_shape(path):
    """A title, one line that says what the notebook gives, and outputs small enough to keep in version control."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    assert "widgets" not in notebook["metadata"], "execute with nbconvert --ExecutePreprocessor.store_widget_state=False"
    title = [line for line in "".join(cells[0]["source"]).splitlines() if line]
    assert len(title) == 2 and title[0].startswith("# ") and title[1].startswith("> ")
    stored = sum(len(json.dumps(c.get("outputs", []))) for c in cells)
    assert stored < (300_000 if module_of(path) else 1_000_000), f"{path.name} stores {stored // 1000} kB of outputs"


def test_every_notebook_has_its_place_in_the_sidebar():
    """The site shows them all, in reading order."""
    listed = re.findall(r"(\S+\.ipynb)", (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))
    assert listed == ["index.ipynb", *(path.name for path in NOTEBOOKS)]
