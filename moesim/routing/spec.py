"""Rules as text: `drop:factor=1,keep=score`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moesim.errors import InputError, UnknownNameError
from moesim.numerals import number, whole
from moesim.plugins import Registry
from moesim.routing.base import Rule

OWN = (
    "drop", "expanded-drop", "fill-in", "base", "expert-choice", "bias", "local", "group-limit",
    "random", "k", "top-p", "threshold", "null", "prune-tokens", "prune", "merge", "freeze",
    "steer", "skip-layer",
)  # fmt: skip
RULES = Registry(
    "rule",
    "moesim.rules",
    {name: f"moesim.routing.rules.{name.replace('-', '_')}:RULE" for name in OWN},
)
"""Rules by name. Other packages offer a subclass of `Rule`, a dataclass, in the entry points
`moesim.rules`."""


def parse_rule(text: str) -> Rule:
    """The rule that `text` names with its parameters.

    Raises UnknownNameError for a rule or parameter that there is not, InputError for a value that
    cannot be used or a parameter without one.
    """
    name, _, rest = text.partition(":")
    kind = RULES.get(name)
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in known:
            raise UnknownNameError(
                f"parameter of rule {name}", key, known, "" if known else f"{name} takes none"
            )
        if not equals or key in given:
            raise InputError(f"{text!r:.80}: {key}", f"write it once, as {key}=VALUE")
        given[key] = _value(f"{name}: {key}", value, hints[key])
    for key, one in known.items():
        if key not in given and one.default is MISSING:
            raise InputError(f"rule {name} needs {key}", f"write {name}:{key}=VALUE")
    found: Rule = kind(**given)
    return found


def parameters(kind: type[Rule]) -> list[tuple[str, str, str]]:
    """Name, type and default of each parameter, as text; no default where it must be given."""
    hints = get_type_hints(kind)
    return [
        (f.name, _type_name(hints[f.name]), "" if f.default is MISSING else str(f.default))
        for f in fields(kind)  # type: ignore[arg-type]
    ]


def describe(rule: Rule) -> dict[str, Any]:
    """Name and parameters, for `meta.source`."""
    values = {f.name: getattr(rule, f.name) for f in fields(rule)}  # type: ignore[arg-type]
    return {"rule": rule.NAME, **values}


def rule_text(rule: Rule) -> str:
    """The rule with all its parameters, as `parse_rule` reads it."""
    values = describe(rule)
    del values["rule"]
    shown = (
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items() if v != ""
    )
    return f"{rule.NAME}:{','.join(shown)}".rstrip(":")


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    return {int: "whole number", float: "number", str: "text"}.get(hint, str(hint))


def _value(where: str, text: str, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise UnknownNameError(where, text, get_args(hint))
        return text
    if hint is str:
        return text
    try:
        return {int: whole, float: number}[hint](text)
    except ValueError:
        raise InputError(f"{where}={text!r:.40}", f"give a {_type_name(hint)}") from None
