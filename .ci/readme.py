"""Write README.md from nbs/index.ipynb, or with --check say whether it is in step."""
import re
import sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parents[1]


def rendered(cell) -> str:
    """A cell as Markdown: text as it is, code as code, and of a cell with `echo: false` the Markdown it put out."""
    if cell.cell_type == "markdown":
        return cell.source.strip()
    if re.search(r"^#\| hide", cell.source, re.M):
        return ""
    if re.search(r"^#\| echo: false", cell.source, re.M):
        return "\n\n".join(o.data["text/markdown"].strip() for o in cell.outputs if "text/markdown" in o.get("data", {}))
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
    return f"```python\n{source}\n```"


def readme() -> str:
    """The README, with links that hold from the top of the repository."""
    cells = nbformat.read(root / "nbs/index.ipynb", as_version=4).cells
    text = "\n\n".join(part for part in map(rendered, cells) if part) + "\n"
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", text)


target = root / "README.md"
if "--check" not in sys.argv[1:]:
    target.write_text(readme(), encoding="utf-8")
elif target.read_text(encoding="utf-8") != readme():
    raise SystemExit("README.md differs from nbs/index.ipynb: edit the notebook, then run python .ci/readme.py")
