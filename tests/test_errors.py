"""Errors: two lines, an exit code, the nearest name, and a safe way through workers."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import (
    FormatError,
    InfeasibleError,
    InputError,
    MismatchError,
    MoesimError,
    UnknownNameError,
)


def test_exit_codes() -> None:
    """1 for a negative verdict, 2 for bad input."""
    assert InfeasibleError("x").exit_code == 1
    assert not issubclass(InfeasibleError, InputError)
    for kind in (InputError, FormatError, MismatchError):
        assert kind("x").exit_code == 2
        assert issubclass(kind, InputError)
    assert UnknownNameError("solver", "x", []).exit_code == 2


def test_text_is_cause_then_remedy() -> None:
    error = InputError("no such file", "name another")
    assert (error.cause, error.remedy) == ("no such file", "name another")
    assert str(error) == "no such file\nname another"
    assert str(InputError("no such file")) == "no such file"


@given(st.text(), st.text())
def test_hostile_text_cannot_forge_lines(cause: str, remedy: str) -> None:
    error = InputError(f"a{cause}b", f"c{remedy}d")
    for line in (error.cause, error.remedy):
        assert line == "".join(ch for ch in line if ch.isprintable())
    assert len(str(error).splitlines()) == 2
    assert error.cause.startswith("a")
    assert error.cause.endswith("b")


def test_escape_codes_are_dropped() -> None:
    error = InputError("name \x1b[31mred\x07\nmoesim: all is well")
    assert error.cause == "name [31mred moesim: all is well"


def test_unknown_name_proposes_the_nearest() -> None:
    error = UnknownNameError("solver", "local_serach", ["linear", "eplb", "local_search"])
    assert error.cause == "unknown solver 'local_serach'"
    assert error.nearest == "local_search"
    assert error.remedy == "did you mean 'local_search'? known: eplb, linear, local_search"
    far = UnknownNameError("solver", "zzzz", ["linear", "eplb"])
    assert far.nearest is None
    assert far.remedy == "known: eplb, linear"
    assert UnknownNameError("solver", "x", ["a"], "ask me").remedy == "ask me"


def test_long_lists_are_cut() -> None:
    error = UnknownNameError("model", "m", [f"name{i:02}" for i in range(40)])
    assert error.remedy.endswith("name15, ...")
    assert "name16" not in error.remedy


@pytest.mark.parametrize(
    "error",
    [
        InputError("cause", "remedy"),
        InfeasibleError("cause"),
        UnknownNameError("solver", "eplp", ["eplb"]),
    ],
)
def test_errors_survive_worker_processes(error: MoesimError) -> None:
    """A worker's error is pickled on its way back; losing it hangs or hides the cause."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
