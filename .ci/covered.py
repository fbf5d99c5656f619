"""Line coverage of laser/ over notebooks and tests together: python .ci/covered.py runs all, then reports.

nbdev_test runs a notebook's definitions in the notebook's own namespace, where coverage does not look. Here each exported
cell is compiled under the name and the line numbers that it has in laser/, so that what a notebook runs of its own
definitions counts for the module; all other cells run as in nbdev_test.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.test import test_nb

root = Path(__file__).resolve().parents[1]


def first_lines() -> dict:
    """(notebook, cell id) of each exported cell: its module and the line after its marker."""
    marker = re.compile(r"# %% \.\./nbs/(\S+) #(\S+)")
    return {match.groups(): (str(path), number) for path in (root/"laser").glob("*.py")
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1) if (match := marker.match(line))}


def run_notebook(path: Path) -> bool:
    """Run a notebook as nbdev_test does; its exported cells count as lines of the module."""
    places, run = first_lines(), CaptureShell.cell

    def cell(shell, cell, **options):
        if (place := places.get((path.name, cell.id))) is None: return run(shell, cell, **options)
        module, line = place
        directives = re.match(r"(?:#\|.*\n|\s*\n)*", cell.source).group().count("\n")     # lines that the export leaves out
        code = "\n"*(line - directives) + cell.source
        shell._cell_idx = cell.idx_ + 1                      # for the traceback
        try: exec(shell.compile(code, module, "exec"), shell.user_ns)    # which keeps `from __future__` for later cells
        except Exception as error: shell.exc = error

    CaptureShell.cell = cell
    config = get_config()
    return test_nb(path, skip_flags=config.tst_flags.split(), basepath=config.config_path)[0]


def main() -> None:
    """Measure each notebook in a process of its own, then the tests, and print the report."""
    if len(sys.argv) > 1: sys.exit(not run_notebook(Path(sys.argv[1])))
    os.chdir(root)
    coverage = [sys.executable, "-m", "coverage"]
    os.environ["COVERAGE_FILE"] = str(root/".coverage")
    subprocess.run([*coverage, "erase"], check=True)
    runs = [[__file__, str(path)] for path in sorted((root/"nbs").glob("*.ipynb"))] + [["-m", "pytest", "-q"]]
    failed = [run[-2:] for run in runs if subprocess.run([*coverage, "run", *run]).returncode]
    subprocess.run([*coverage, "combine", "-q"], check=True)
    report = subprocess.run([*coverage, "report", "-m"]).returncode
    if failed: raise SystemExit(f"failed: {failed}")
    sys.exit(report)


if __name__ == "__main__":
    main()
