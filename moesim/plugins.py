"""Parts that are found by name: those of moesim, and those that other packages bring in.

A package offers a part by an entry point in one of the groups `moesim.solvers`, `moesim.importers`,
`moesim.exporters`, `moesim.rules`; its name is what the command line takes. Names of moesim's own
parts cannot be taken over. Modules are imported when a part is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from moesim.errors import UnknownNameError


class Registry:
    """Parts of one kind. kind: as errors call it; own: name to "module" or "module:attribute"."""

    def __init__(self, kind: str, group: str, own: Mapping[str, str]) -> None:
        self.kind, self.group, self.own = kind, group, own

    def names(self) -> list[str]:
        """All names, moesim's own first."""
        return [*self.own, *(name for name in sorted(_offered(self.group)) if name not in self.own)]

    def get(self, name: str) -> Any:
        """The part called `name`. UnknownNameError proposes the nearest name."""
        if name in self.own:
            module, _, attribute = self.own[name].partition(":")
            found = import_module(module)
            return getattr(found, attribute) if attribute else found
        offered = _offered(self.group)
        if name not in offered:
            raise UnknownNameError(self.kind, name, self.names())
        return offered[name].load()


@cache
def _offered(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
