"""Imported first, lets a process import torch, numpy, what they require, and moesim: no more.

As in a serving engine's container, where the replay's measuring part must run.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from importlib.abc import MetaPathFinder


def required(name: str, found: set[str]) -> set[str]:
    """Adds `name` and all that it requires, by distribution, extras left out."""
    name = normal(name)
    if name not in found:
        found.add(name)
        try:
            wants = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            return found
        for want in wants:
            if "extra ==" not in want:
                required(re.split(r"[^\w.-]", want)[0], found)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class OnlyTheContainers(MetaPathFinder):
    """Refuses the modules of every other distribution that is installed here."""

    def __init__(self) -> None:
        there = required("numpy", required("torch", {"moesim"}))
        self.refused = {
            module
            for module, owners in metadata.packages_distributions().items()
            if not {normal(owner) for owner in owners} & there
        }

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] in self.refused:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


ONLY = OnlyTheContainers()
sys.meta_path.insert(0, ONLY)
