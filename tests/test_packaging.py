"""The package list is complete, so that a wheel holds what the checkout holds."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINKED = ("solvers", "topologies", "traces")
"""Top-level folders that are packages of moesim, through links in moesim/."""


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = set()
    for name, folder in {"moesim": "moesim", **{f"moesim.{x}": x for x in LINKED}}.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            if not (name == "moesim" and parts and parts[0] in LINKED):
                found.add(".".join((name, *parts)))
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_every_folder_of_modules_is_a_package() -> None:
    for folder in ("moesim", *LINKED):
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module


def test_the_linked_folders_are_packages_of_moesim() -> None:
    for name in LINKED:
        link = ROOT / "moesim" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_imports_from_the_folder_that_contains_the_checkout(tmp_path: Path) -> None:
    """A folder named moesim without an __init__.py, as a checkout is, does not stand in the way."""
    (tmp_path / "moesim").mkdir()
    code = "import moesim, moesim.model.names as n; print(len(n.preset_names()) > 5)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
