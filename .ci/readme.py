"""Write README.md from nbs/index.ipynb, or with --check say whether it is in step."""
import re
import sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parents[1]


def readme() -> str:
    """The README as Markdown: the cells of the index, with links that hold from the top of the repository."""
    parts = []
    for cell in nbformat.read(root / "nbs/index.ipynb", as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source.strip())
        elif not cell.source.startswith("#| hide"):
            source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
            parts.append(f"```python\n{source}\n```")
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", text)


target = root / "README.md"
if "--check" not in sys.argv[1:]:
    target.write_text(readme(), encoding="utf-8")
elif target.read_text(encoding="utf-8") != readme():
    raise SystemExit("README.md differs from nbs/index.ipynb: edit the notebook, then run python .ci/readme.py")
