"""Hook of MkDocs: pages of the repository outside docs/, and notebooks, as pages of the site.

README.md is its start page. Files that pages link to come along; links lead to where they are.
"""

import json
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "reports/*/README.md", "traces/*.md")
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files, config):
    """Add the pages outside docs/, what any page links to, and notebooks as text."""
    outside = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
    wanted = set(outside)
    for page in [*outside, *sorted((ROOT / "docs").rglob("*.md"))]:
        targets = (target_of(page, found[2]) for found in LINK.finditer(page.read_text()))
        wanted |= {t for t in targets if t and t.is_file() and not t.is_relative_to(ROOT / "docs")}
    for path in sorted(wanted):
        files.append(File.generated(config, uri_of(path), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        files.append(File.generated(config, uri_of(path), content=notebook(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the site has them."""
    source = ROOT / "README.md" if page.file.src_uri == "index.md" else ROOT / page.file.src_uri
    if (ROOT / "docs" / page.file.src_uri).exists():
        source = ROOT / "docs" / page.file.src_uri

    def moved(found):
        target = target_of(source, found[2])
        if target is None or not target.exists():
            return found[0]
        here = Path(page.file.src_uri).parent
        return f"{found[1]}{os.path.relpath(uri_of(target), here)}{found[3]}"

    return LINK.sub(moved, markdown)


def target_of(page, link):
    """The file that `link` of `page` leads to; None for one outside the repository."""
    path = (page.parent / link).resolve()
    if "://" in link or not path.is_relative_to(ROOT):
        return None
    return path / "README.md" if path.is_dir() else path


def uri_of(path):
    """Where the site has a file of the repository."""
    uri = path.relative_to(ROOT).as_posix()
    uri = re.sub(r"\.ipynb$", ".md", uri.removeprefix("docs/"))
    return "index.md" if uri == "README.md" else uri


def notebook(path):
    """A notebook as Markdown: its text, its code, and the text of its outputs."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            if text:
                parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
