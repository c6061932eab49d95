"""Hands the tests of served requests the small services of `engines.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """The module `engines.py` beside this file."""
    path = Path(__file__).with_name("engines.py")
    spec = importlib.util.spec_from_file_location("serving_engines", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
