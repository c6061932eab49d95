"""The package list is complete, so that a wheel holds what the checkout holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAPPED = {"moesim.solvers": "solvers", "moesim.topologies": "topologies", "moesim.traces": "traces"}


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = set()
    for name, folder in {"moesim": "moesim", **MAPPED}.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            if not (name == "moesim" and parts[:1] in {("solvers",), ("topologies",), ("traces",)}):
                found.add(".".join((name, *parts)))
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_every_folder_of_modules_is_a_package() -> None:
    for folder in ("moesim", *MAPPED.values()):
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module


def test_the_mapped_folders_are_installed_under_moesim() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapping = project["tool"]["setuptools"]["package-dir"]
    assert mapping == {"moesim": "moesim", **MAPPED}
    assert (ROOT / "moesim" / "solvers").resolve() == ROOT / "solvers"
