"""Where every figure of the page comes from: files, hashes, commands, defaults, calibrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesim.draw.study import plain
from moesim.report.html.fields import Fields
from moesim.report.html.parts import BASES, Note, Section, Table, TableBlock
from moesim.report.html.runs import Run

HASH = 16


def provenance_section(runs: Sequence[Run], passed: Sequence[str]) -> Section:
    section = Section("Provenance")
    section.lead = (
        "The files that this page was made from, and what each of them says about its own origin."
    )
    files = [
        [r.name, r.made_by, str(r.data.raw["version"]), f"{r.num_bytes:,}", r.sha256[:HASH]]
        for r in runs
    ]
    columns = ["file", "written by", "version", "bytes", "sha256 begins"]
    section.blocks.append(TableBlock("Files", Table(columns, files, frozenset({1, 4}))))
    for run in runs:
        rows = [[key, value] for key, value in _origin(run) if value]
        if rows:
            table = Table(["", "value"], rows, frozenset({1}))
            section.blocks.append(TableBlock(run.name, table))
    if passed:
        section.blocks.append(Note("Passed over: " + "; ".join(passed) + ".", left_out=True))
    meanings = [[f"{sign} {name}", meaning] for name, (sign, _, meaning) in BASES.items()]
    table = Table(["basis", "a figure so marked"], meanings, frozenset({1}))
    section.blocks.append(TableBlock("What figures rest on", table))
    return section


def _origin(run: Run) -> list[tuple[str, str]]:
    data = run.data
    sources = [data.maybe("provenance")]
    if run.format == "moesim-cache-run":
        sources.append(data.child("plan").maybe("provenance"))
    found: list[tuple[str, str]] = []
    for source in sources:
        if source is not None:
            found += _flat(source)
    evaluation = data.maybe("evaluation")
    if evaluation is not None and evaluation.has("basis"):
        found.append(("predictions rest on", evaluation.text("basis")))
    for key, name in (("basis", "predictions rest on"), ("cluster", "cluster"), ("seed", "seed")):
        if key in data.raw and data.raw[key] is not None:
            found.append((name, plain(data.raw[key])))
    for key in ("predictions", "rates", "notices", "notes"):
        if isinstance(data.raw.get(key), list):
            found.append((key, "; ".join(plain(x) for x in data.raw[key])))
    for key in ("settings", "defaults", "environment"):
        value = data.raw.get(key)
        if isinstance(value, dict):
            found.append((key, _pairs(value)))
    seen: dict[str, str] = {}
    for name, text in found:
        seen.setdefault(name, text)
    return list(seen.items())


def _flat(source: Fields) -> list[tuple[str, str]]:
    out = []
    for key, value in source.raw.items():
        if key == "run" and isinstance(value, dict):
            out += [(name, _text(x)) for name, x in value.items()]
        else:
            out.append((key, _text(value)))
    return out


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return _pairs(value)
    if isinstance(value, list):
        return "; ".join(plain(x) for x in value)
    return "" if value is None else plain(value)


def _pairs(value: dict[str, Any]) -> str:
    return "; ".join(f"{plain(k)}: {plain(x)}" for k, x in value.items() if x is not None)
