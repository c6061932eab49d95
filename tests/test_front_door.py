"""Functions of the front door and their commands: the same names, the same defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import moesim
from moesim.cli.balance import balance
from moesim.cli.cache import cache
from moesim.cli.elastic import elastic
from moesim.cli.plan import plan
from moesim.cli.serve import serve
from moesim.cli.simulate import simulate

OUTPUT = {"out", "plot", "as_json", "timeline", "timeline_steps"}
"""What a command writes or prints, which a result's methods do."""
OTHER_JOBS = {"context", "pool", "whole_models", "skew", "by"}
"""Of `moesim serve`: what goes to `serve_pools` and `serve_composition`."""
CALLBACKS = {"progress", "stop", "notify", "sweep"}


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (plan, moesim.plan),
        (simulate, moesim.simulate),
        (serve, moesim.serve),
        (cache, moesim.cache),
        (balance, moesim.balance),
        (elastic, moesim.elastic),
    ],
    ids=["plan", "simulate", "serve", "cache", "balance", "elastic"],
)
def test_names_and_defaults_agree(
    command: Callable[..., Any], function: Callable[..., Any]
) -> None:
    """An option left out has the function's default, or none, and then the function chooses."""
    options = inspect.signature(command).parameters
    names = inspect.signature(function).parameters
    assert set(options) - OUTPUT - (OTHER_JOBS - set(names)) == set(names) - CALLBACKS - OUTPUT
    for name, parameter in names.items():
        if name in options and options[name].default is not inspect.Parameter.empty:
            given = options[name].default
            assert name in OUTPUT or given in (parameter.default, None), name
