"""The site's settings, the tutorials, and that every public name is documented."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import moesim

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.ipynb"))
MODULES = (
    "moesim.solvers.base",
    "moesim.placement",
    "moesim.trace.format",
    *(f"moesim.jobs.{p.stem}" for p in sorted((ROOT / "moesim" / "jobs").glob("[a-z]*.py"))),
)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorials_run(path: Path, tmp_path: Path) -> None:
    """Every cell runs in an empty folder; what is kept of its outputs is small and from a run."""
    book = nbformat.read(path, as_version=4)
    kept = [len(cell.outputs) for cell in book.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 40_000
    assert sum(kept) >= 3
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=280, kernel_name="python3", resources=place).execute()
    assert [len(cell.outputs) for cell in book.cells if cell.cell_type == "code"] == kept


def test_three_tutorials_are_listed() -> None:
    listed = re.findall(r"\]\(([\w-]+)\.ipynb\)", (DOCS / "tutorials" / "README.md").read_text())
    assert sorted(listed) == [path.stem for path in TUTORIALS]
    assert len(listed) >= 3


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert re.search(rf"[ :]{re.escape(page.relative_to(DOCS).as_posix())}$", nav, re.M), page
    config = yaml.safe_load(nav)
    assert config["strict"] is True


def test_the_api_reference_has_every_function_of_the_front_door() -> None:
    page = (DOCS / "api.md").read_text()
    for name in set(moesim.__all__) - {"__version__"}:
        function = getattr(moesim, name)
        assert f"::: {function.__module__}.{function.__name__}\n" in page, name


def public(module: ModuleType) -> list[object]:
    """Functions and classes that `module` defines, and their public methods."""
    found: list[object] = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            found.append(value)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_docstrings(name: str) -> None:
    """Of dataclasses too, where Python writes a docstring of the fields if there is none."""
    for value in public(import_module(name)):
        text = inspect.getdoc(value) or ""
        made = f"{getattr(value, '__name__', '')}("
        made_by_python = dataclasses.is_dataclass(value) and text.startswith(made)
        assert bool(text) > made_by_python, value


def test_the_front_door_is_documented() -> None:
    for name in set(moesim.__all__) - {"__version__"}:
        assert len(inspect.getdoc(getattr(moesim, name)) or "") > 40, name
