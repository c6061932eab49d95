"""Rules as text, and rules of other packages."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from routing_traces import scored_trace

from moesim.errors import FormatError, InputError, UnknownNameError
from moesim.routing.api import reroute
from moesim.routing.base import Choices, Rule, Work
from moesim.routing.rules.drop import Drop
from moesim.routing.spec import OWN, RULES, describe, parameters, parse_rule


def test_a_rule_with_its_parameters() -> None:
    rule = parse_rule("drop:factor=1.5,keep=last")
    assert rule == Drop(1.5, "last")
    assert describe(rule) == {"rule": "drop", "factor": 1.5, "keep": "last"}


@pytest.mark.parametrize("name", OWN)
def test_every_rule_says_what_it_is(name: str) -> None:
    kind = RULES.get(name)
    assert name == kind.NAME
    assert kind.TITLE
    assert "arXiv" in kind.PAPER
    assert kind.LEFT_OUT
    assert "Drop(" not in (kind.__doc__ or "")
    assert all(kind_text for _, kind_text, _ in parameters(kind))


@pytest.mark.parametrize(
    ("text", "error", "cause"),
    [
        ("drup:factor=1", UnknownNameError, "unknown rule 'drup'"),
        ("drop", InputError, "rule drop needs factor"),
        ("drop:factor=1,factr=2", UnknownNameError, "parameter of rule drop 'factr'"),
        ("drop:factor=1,keep=best", UnknownNameError, "'best'"),
        ("drop:factor=one", InputError, "factor='one'"),
        ("drop:factor=nan", InputError, "factor='nan'"),
        ("drop:factor=0", InputError, "capacity factor 0"),
        ("drop:factor", InputError, "factor"),
        ("drop:factor=1,factor=2", InputError, "factor"),
        ("k:k=1.5", InputError, "k='1.5'"),
        ("k:k=1,layers=x", InputError, "layers"),
        ("k:k=1,layers=7-9", InputError, "no MoE layer among 7-9"),
        ("prune:keep=9", InputError, "keep 9 of 4 experts"),
        ("skip-layer:every=3,by=random", InputError, "every 3 of 2 MoE layers is none"),
        ("random:seed=1", UnknownNameError, "parameter of rule random"),
    ],
)
def test_what_cannot_be_is_named(text: str, error: type[Exception], cause: str) -> None:
    trace = scored_trace(np.tile([[[0.4, 0.3, 0.2, 0.1]]], (4, 2, 1)), 2)
    with pytest.raises(error, match=cause):
        reroute(trace, text)


@dataclass(frozen=True)
class Twice(Rule):
    """Gives every token expert 0 twice, which no trace can have."""

    NAME = "twice"
    TITLE = PAPER = LEFT_OUT = "none"

    def apply(self, work: Work) -> Choices:
        return Choices(np.zeros_like(work.ids), work.gates)


class _Point:
    """An entry point of another package."""

    def load(self) -> type[Rule]:
        return Twice


def test_rules_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By entry point; moesim's own names cannot be taken over."""
    monkeypatch.setattr(
        "moesim.plugins._offered", lambda group: {"twice": _Point(), "drop": _Point()}
    )
    assert RULES.names()[-1] == "twice"
    assert isinstance(parse_rule("twice"), Twice)
    assert isinstance(parse_rule("drop:factor=1"), Drop)


def test_a_rule_that_breaks_a_trace_is_refused() -> None:
    trace = scored_trace(np.tile([[[0.4, 0.3, 0.2, 0.1]]], (4, 2, 1)), 2)
    with pytest.raises(FormatError, match="rule twice gave choices that no trace can have"):
        reroute(trace, Twice())
