"""The whole page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from moesim.draw.colours import DARK
from moesim.errors import InputError
from moesim.report.html.cache_section import cache_section
from moesim.report.html.inline import dark_style, inline
from moesim.report.html.map_section import busiest_figure, map_blocks
from moesim.report.html.parts import BASES, Figure, Figures, Note, Section
from moesim.report.html.plan_section import plan_section, plan_views
from moesim.report.html.provenance_section import provenance_section
from moesim.report.html.recommend_section import recommend_section
from moesim.report.html.runs import Run
from moesim.report.html.serving_section import serving_section
from moesim.report.html.simulation_section import simulation_section
from moesim.report.html.study_section import study_section
from moesim.report.html.traces import maps_of
from moesim.report.html.validation_section import cache_validation_section, validation_section

if TYPE_CHECKING:
    from moesim.trace.format import Trace

MAX_PAGE_BYTES = 5_000_000
SECTIONS: dict[str, Callable[[Run], Section]] = {
    "moesim-simulation": simulation_section,
    "moesim-serving-run": serving_section,
    "moesim-recommendation": recommend_section,
    "moesim-study": study_section,
    "moesim-cache-run": cache_section,
    "moesim-cache-plan": cache_section,
    "moesim-validation": validation_section,
    "moesim-cache-validation": cache_validation_section,
}
"""Formats whose section is made from one file alone, in the order of the page."""


@dataclass(frozen=True, slots=True)
class Page:
    """HTML text, the titles of its sections, and what was left out with the reason."""

    html: str
    sections: tuple[str, ...]
    left_out: tuple[str, ...]


def make_page(runs: Sequence[Run], passed: Sequence[str], trace: Trace | None = None) -> Page:
    """The page of `runs`. `trace`: what the maps of plans are made from, default the trace that
    each plan names. The same files give the same bytes.

    Raises FormatError where a run lacks what its format demands, MismatchError where the trace does
    not go with a plan, InputError where the page would be larger than 5 MB.
    """
    left_out: list[str] = []
    sections = []
    for view in plan_views(runs):
        section = plan_section(view)
        if view.plan is None:
            reason = "the placement is in the plan file, which moesim plan writes with --out"
        else:
            found = maps_of(view.plan, trace)
            reason = found if isinstance(found, str) else ""
            if not isinstance(found, str):
                _first_figures(section).append(busiest_figure(found))
                section.blocks += map_blocks(view.plan, found, view.basis)
        if reason:
            text = f"Maps of load and traffic are left out: {reason}."
            section.blocks.append(Note(text, left_out=True))
        sections.append(section)
    for kind, make in SECTIONS.items():
        sections += [make(run) for run in runs if run.format == kind]
    _tell_apart(sections)
    sections.append(provenance_section(runs, passed))
    for i, section in enumerate(sections, 1):
        section.anchor = f"s{i}"
        left_out += [
            f"{section.title}: {b.text}"
            for b in section.blocks
            if isinstance(b, Note) and b.left_out
        ]
        section.blocks = [b for b in section.blocks if not isinstance(b, Figures) or b.items]
    html = _render(runs, sections)
    size = len(html.encode("utf-8", "replace"))
    if size > MAX_PAGE_BYTES:
        raise InputError(
            f"the report would have {size / 1e6:.1f} MB, more than {MAX_PAGE_BYTES / 1e6:.0f}",
            "report fewer runs at once",
        )
    return Page(html, tuple(s.title for s in sections), tuple(left_out))


def _tell_apart(sections: Sequence[Section]) -> None:
    """Where two sections have one title, each names its files in it."""
    seen = [section.title for section in sections]
    for section in sections:
        if seen.count(section.title) > 1:
            section.title += f" ({', '.join(section.sources)})"


def _first_figures(section: Section) -> list[Figure]:
    """The section's first group of charts, made where it has none, to add to."""
    for i, block in enumerate(section.blocks):
        if isinstance(block, Figures):
            items = list(block.items)
            section.blocks[i] = Figures(items)
            return items
    items = []
    section.blocks.append(Figures(items))
    return items


def _render(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    from importlib.metadata import version

    from jinja2 import Environment, StrictUndefined

    folder = files("moesim.report.html")
    style = _squeezed(folder.joinpath("style.css").read_text(encoding="utf-8"))
    style += dark_style(DARK.items())
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    model = next((r.model for r in runs if r.model), "") or "Mixture-of-Experts model"
    text = template.render(
        title=model,
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        sections=sections,
        has_headline=any(section.headline for section in sections),
        bases=BASES,
        inline=inline,
        version=version("moesim"),
        num_files=len(runs),
    )
    return text.encode("utf-8", "replace").decode("utf-8")


def _squeezed(style: str) -> str:
    """The style sheet without comments and indentation."""
    bare = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    return "\n".join(line.strip() for line in bare.splitlines() if line.strip())
