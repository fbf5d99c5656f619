"""Process every notebook as the documentation site does, up to the point where Quarto takes over."""
from pathlib import Path

from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs


def main():
    """Build _proc/ and say which pages are missing from it."""
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(file_re=r"\.(?:ipynb|qmd|html)$")
    proc_nbs()
    notebooks = {p.name for p in Path("nbs").glob("*.ipynb")}
    pages = {p.name for p in Path("_proc").glob("*.ipynb")}
    if missing := sorted(notebooks - pages):
        raise SystemExit(f"the documentation pipeline lost {', '.join(missing)}")
    print(f"{len(pages)} pages processed")


if __name__ == "__main__":  # the pages are processed by a pool of processes, which import this file
    main()
