"""Hands every test the builders of small traces, placements and clusters; marks `engines` tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

settings.register_profile("moesim", deadline=None)  # a busy machine is not a failure
settings.load_profile("moesim")


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """The module `builders.py` beside this file."""
    path = Path(__file__).with_name("builders.py")
    spec = importlib.util.spec_from_file_location("builders", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "engines: run parts of serving engines' own code; downloads their wheels"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "engines" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="downloads serving engines; run with -m engines")
    for item in items:
        if "engines" in item.keywords:
            item.add_marker(skip)
