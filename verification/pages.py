"""Run the commands of pages and compare what they print with the `text` blocks of the page.

    python -m verification.pages README.md docs/plan-options.md docs/tutorials/plan-and-look.ipynb

Commands of a page run one after another in an empty folder, or in the one of --folder, where files
that the page takes for granted can lie (traces, checkpoints). Each line of a `text` block must be
printed by the commands of the block before it; `...` stands for lines left out. Cells of a notebook
must print what the notebook keeps. For README.md the demo of the Makefile runs. Exit code 1 where
something differs. Takes minutes, so it is run by hand and is no test.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\s*(moesim [^\n]*)", re.MULTILINE)


def blocks_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(language, lines) of fenced blocks; commands alone of those without a language."""
    text = page.read_text(encoding="utf-8")
    if page.name == "README.md" and page.parent == ROOT:
        recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
        yield "", re.findall(r"^\t\S*(moesim plan .*)$", recipe, re.MULTILINE)
    for language, body in FENCE.findall(text):
        if language == "text":
            yield language, [line.rstrip() for line in body.splitlines()]
        elif language in ("", "sh", "python"):
            code = [body] if language == "python" else COMMAND.findall(body.replace("\\\n", " "))
            if code:
                yield language, code


def printed(command: str, folder: Path) -> list[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "80"},
    )
    print(f"  {command}: exit code {done.returncode}", flush=True)
    if done.returncode > 1:
        print(done.stderr)
    return (done.stderr + done.stdout).splitlines()


def missing(shown: list[str], lines: list[str]) -> list[str]:
    """Each line of `shown` that is not among `lines`, and behind it the most alike one that is."""
    known = [line.rstrip() for line in lines]
    gone = [line for line in shown if line.strip() not in ("", "...") and line not in known]
    return [f"{line}\n  + {''.join(get_close_matches(line, known, 1))}" for line in gone]


def text_of(cell: dict[str, Any]) -> list[str]:
    """Lines that a cell prints or shows as plain text, pictures and HTML left out."""
    parts = [
        out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell["outputs"]
    ]
    return "\n".join(parts).splitlines()


def run_cells(book: NotebookNode, folder: Path) -> list[list[str]]:
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(
        book, timeout=1200, kernel_name="python3", resources=place, record_timing=False
    ).execute()
    return [text_of(cell) for cell in book.cells if cell.cell_type == "code"]


def check_notebook(path: Path, folder: Path, keep: bool) -> list[str]:
    book = nbformat.read(path, as_version=4)
    kept = [text_of(cell) for cell in book.cells if cell.cell_type == "code"]
    now = run_cells(book, folder)
    if keep:
        nbformat.write(book, path)
    return [line for old, new in zip(kept, now, strict=True) for line in missing(old, new)]


def check_page(page: Path, folder: Path) -> list[str]:
    """Lines that the page shows and that its commands or its Python blocks do not print."""
    found: list[str] = []
    last: list[str] | None = None
    cells: list[NotebookNode] = []
    shown: dict[int, list[str]] = {}
    for language, lines in blocks_of(page):
        if language == "python":
            cells.append(nbformat.v4.new_code_cell(lines[0]))
            last = None
        elif language == "text":
            if last is not None:
                found += missing(lines, last)
            elif cells:
                shown[len(cells) - 1] = lines
        else:
            last = [line for command in lines for line in printed(command, folder)]
    if shown:
        now = run_cells(nbformat.v4.new_notebook(cells=cells), folder)
        found += [line for i, lines in shown.items() for line in missing(lines, now[i])]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, help="run there instead of in an empty folder")
    parser.add_argument("--keep", action="store_true", help="write notebooks with what they print")
    args = parser.parse_args()
    bad = False
    for page in args.pages:
        with tempfile.TemporaryDirectory() as empty:
            folder = args.folder or Path(empty)
            (folder / "out").mkdir(exist_ok=True)
            if page.suffix == ".ipynb":
                found = check_notebook(page.resolve(), folder, args.keep)
            else:
                found = check_page(page.resolve(), folder)
        bad |= bool(found)
        print(f"{page}: " + ("as printed" if not found else f"{len(found)} lines not printed:"))
        print("".join(f"  - {line}\n" for line in found), end="", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
