"""Module names and patterns by which quantisation says what it covers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache

from moesim.errors import FormatError
from moesim.model.hf.tensors import Named

_PREFIXES = ("", "model.", "model.language_model.", "language_model.model.", "backbone.")
_OF_LAYER = re.compile(
    r"^(?:(?:model|language_model|backbone|transformer|decoder)\.)*layers\.([0-9]{1,5})(\*|\.|$)(.*)$"
)
_NESTED_REPEAT = re.compile(r"\([^()]*[+*][^()]*\)[+*{]")
_MODULE_WORDS = re.compile(r"attn|attention|mlp|expert|ffn|mixer|moe")
_NO_MATRIX = re.compile(
    r"norm|vision|visual|audio|mtp|embed|conv|bias|score|projector|merger|patch|rotary|router"
    r"|gate$|gate_|eh_proj|shared_head|indexer|index_|talker|sinks|A_log|dt_|in_proj_[ab]"
)
MAX_PATTERN = 400


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """The regular expression of a file, refused where it could take forever or is none."""
    if len(pattern) > MAX_PATTERN or _NESTED_REPEAT.search(pattern):
        raise FormatError(
            f"{where}: pattern {pattern[:60]!r} is too long or repeats within repeats",
            "patterns name modules, such as re:.*self_attn.*",
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise FormatError(
            f"{where}: {pattern[:60]!r} is no regular expression", "check quantization_config"
        ) from None


@lru_cache(maxsize=4096)
def _full_names(layer: int, names: tuple[str, ...]) -> tuple[str, ...]:
    if layer < 0:
        outer = ("", "model.", "language_model.", "language_model.model.", "backbone.")
        return tuple(prefix + name for prefix in outer for name in names)
    return tuple(f"{prefix}layers.{layer}.{name}" for prefix in _PREFIXES for name in names)


@dataclass
class Patterns:
    """A set of names and patterns; `covers` says whether any of them names a tensor.

    "re:" begins a regular expression (matched at the start of a name), "*" and "?" make a glob, all
    else names a module: itself, and what is below it. A glob or name without a layer's number holds
    in every layer.
    """

    where: str
    exact: dict[int, set[str]] = field(default_factory=dict)
    by_layer: list[tuple[str, bool, str]] = field(default_factory=list)
    globs: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    expressions: list[tuple[str, re.Pattern[str]]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    linear: bool = False
    seen: dict[tuple[int, tuple[str, ...]], bool] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[object], where: str) -> Patterns:
        """From a file's list; FormatError for an entry that is no text."""
        out = cls(where)
        for entry in entries:
            if not isinstance(entry, str):
                raise FormatError(
                    f"{where}: the quantised modules hold {entry!r:.60}", "they must be texts"
                )
            out.add(entry)
        return out

    def add(self, entry: str) -> None:
        if not entry.startswith("re:"):
            entry = entry.removesuffix(".weight").rstrip(".") or entry
        if entry in ("Linear", "*"):
            self.linear = True
        elif entry.startswith("re:"):
            self.expressions.append((entry, compiled(entry[3:], self.where)))
        else:
            found = _OF_LAYER.search(entry)
            if found is not None:
                layer, mark, rest = found.groups()
                if mark == "*" or set("*?[") & set(rest):
                    self.by_layer.append(
                        (layer, mark == "*", ("*" + rest) if mark == "*" else rest)
                    )
                else:
                    self.exact.setdefault(int(layer), set()).add(rest)
            elif set("*?[") & set(entry):
                self.globs.append(entry)
            else:
                self.names.append(entry)

    def __bool__(self) -> bool:
        listed = self.exact or self.by_layer or self.globs or self.names or self.expressions
        return bool(listed) or self.linear

    def covers(self, tensor: Named) -> bool:
        """Whether an entry names this tensor ("Linear" does not: see `linear`)."""
        key = tensor.layer, tensor.names
        if key not in self.seen:
            self.seen[key] = self._covers(tensor)
        return self.seen[key]

    def _covers(self, tensor: Named) -> bool:
        hit = False
        listed = self.exact.get(tensor.layer, set()) if tensor.layer >= 0 else set()
        for name in tensor.names if listed else ():
            parts = name.split(".")
            for end in range(len(parts) + 1):
                rest = ".".join(parts[:end])
                if rest in listed:
                    self.used.add(f"layers.{tensor.layer}.{rest}")
                    hit = True
        number = str(tensor.layer)
        for layer, prefix, rest in self.by_layer:
            if number.startswith(layer) if prefix else number == layer:
                hit |= any(_glob(name, rest) for name in tensor.names)
        full = _full_names(tensor.layer, tensor.names)
        for pattern in self.globs:
            if any(_glob(name, pattern) for name in full):
                self.used.add(pattern)
                hit = True
        for name in self.names:
            wanted = f".{name}."
            if any(wanted in f".{mine}." for mine in full):
                self.used.add(name)
                hit = True
        for text, expression in self.expressions:
            if any(expression.match(mine) for mine in full):
                self.used.add(text)
                hit = True
        return hit

    def unused(self, num_layers: int) -> list[str]:
        """Entries that speak of attention or feed-forward parts and name no tensor known here."""
        exact = [
            f"layers.{layer}.{rest}"
            for layer, rests in self.exact.items()
            for rest in rests
            if layer < num_layers and not re.search(r"experts\.[0-9]+", rest)
        ]
        texts = [text for text, _ in self.expressions]
        return [
            entry
            for entry in (*exact, *self.globs, *self.names, *texts)
            if entry not in self.used
            and _MODULE_WORDS.search(entry)
            and not _NO_MATRIX.search(entry)
        ]


def _glob(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")
