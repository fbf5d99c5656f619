"""Process every notebook as the documentation site does, up to the point where Quarto takes over, and check all its links."""
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs


def markdown_of(page: Path) -> str:
    """What Quarto reads of a processed page: its text and the Markdown that its cells put out, without code."""
    if page.suffix != ".ipynb": return page.read_text(encoding="utf-8")
    parts = []
    for cell in nbformat.read(page, as_version=4).cells:
        if cell.cell_type != "code": parts.append(cell.source)
        parts += [o.data["text/markdown"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
    return re.sub(r"^```.*?^```", "", "\n\n".join(parts), flags=re.M | re.S)


def anchors(text: str) -> set:
    """The ids that Pandoc gives to headings, and those written out."""
    found = set(re.findall(r"\{#([^\s}]+)", text)) | set(re.findall(r'\bid="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|\{[^}]*\}", r"\1", heading).strip().lower()
        found.add(re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain))))
    return found


def dead_links(root: Path = Path()) -> list:
    """Links of processed pages and of the README that lead to no file, no page or no heading."""
    config = get_config()
    site, code = f"{config.doc_host}{config.doc_baseurl}/", f"{config.git_url}/blob/{config.branch}/"
    texts = {page: markdown_of(page) for page in sorted((root/"_proc").glob("*.[iq]*")) if page.suffix in (".ipynb", ".qmd")}
    written = {}    # name of the page that Quarto writes, or that a notebook names: its text
    for page, text in texts.items():
        name = re.search(r"^output-file: (\S+)", text, re.M)
        written[page.name] = written[name.group(1) if name else f"{page.stem}.html"] = text
    dead = []
    for page, text in [*texts.items(), (root/"README.md", (root/"README.md").read_text(encoding="utf-8"))]:
        plain = re.sub(r"`[^`\n]*`", "", text)
        links = re.findall(r"\]\(([^)\s]+)[^)]*\)", plain) + re.findall(r'\b(?:href|src)="([^"]+)"', plain)
        for link in dict.fromkeys(links):
            target, _, anchor = unquote(link.removeprefix(site) if link.startswith(site) else link).partition("#")
            if target.startswith(code): found = (root/target.removeprefix(code)).exists()
            elif re.match(r"[a-z]+:", target): continue
            elif not target or target in written: found = not anchor or anchor in anchors(written[target] if target else text)
            else: found = (root/("" if page.name == "README.md" else "nbs")/target).exists()
            if not found: dead.append(f"{page.name}: {link}")
    return dead


def main():
    """Build _proc/, say which pages are missing from it and which links are dead."""
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(file_re=r"\.(?:ipynb|qmd|html)$")
    proc_nbs()
    notebooks = {p.name for p in Path("nbs").glob("*.ipynb")}
    pages = {p.name for p in Path("_proc").glob("*.ipynb")}
    if missing := sorted(notebooks - pages): raise SystemExit(f"the documentation pipeline lost {', '.join(missing)}")
    if dead := dead_links(): raise SystemExit("dead links:\n" + "\n".join(dead))
    print(f"{len(pages)} pages processed, no dead link")


if __name__ == "__main__":  # the pages are processed by a pool of processes, which import this file
    main()
