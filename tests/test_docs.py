"""The documents hold: links, commands, options, names, examples, generated pages."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.cli.reference import command_tree, help_text, main, reference_pages, walk
from moesim.errors import FormatError
from moesim.figures import PLACEMENT_FIGURES, figure
from moesim.jobs.plan_result import BETWEEN_NODES, PARTS_OF_STEP
from moesim.placement import Placement, parse_plan
from moesim.planning.evaluate import STATISTICS
from moesim.solvers.base import Problem
from moesim.solvers.registry import SOLVERS
from moesim.studies.file import StudyFile, check_study
from moesim.studies.registry import EVALUATORS, get_evaluator
from moesim.trace.format import TOKEN_DTYPES, load_token_trace

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
WHERE = ("*.md", "docs/**/*.md", "traces/*.md", "reports/**/*.md")
PAGES = sorted(page for pattern in WHERE for page in ROOT.glob(pattern))
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".json", ".csv", ".txt", ""}
SKIPPED_FOLDERS = {".git", ".venv", "build", "dist", "out", "__pycache__", ".hypothesis"}
SHELL_WORDS = {">", ">>", "<", "|", "&", "&&", "||", ";", "2>"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of `page` in one of the languages ('' for unnamed ones)."""
    return [body for language, body in FENCE.findall(text_of(page)) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", text_of(page))


# Links


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub makes them."""
    found = set()
    for line in prose(page).splitlines():
        if line.startswith("#"):
            title = line.lstrip("#").strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


def test_every_document_is_reachable_from_the_readme() -> None:
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = re.findall(r"\]\(([^)#\s]+)", prose(page))
        todo += [(page.parent / t).resolve() for t in targets if "://" not in t]
    assert {name_of(p) for p in PAGES if p.is_relative_to(ROOT / "docs")} <= {
        name_of(p) for p in seen
    }


def test_pictures_are_small() -> None:
    for picture in (ROOT / "docs").rglob("*.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size < 200_000, picture.name


# Commands


def commands_in(text: str) -> list[str]:
    """`moesim ...` command lines of a block, continued lines joined."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^\s*(?:\$ )?((?:\S*/)?moesim [^\n]*)", joined, re.MULTILINE)
    return [line for line in found if "/moesim/" not in line.split()[0]]


@cache
def tree() -> Any:
    return command_tree()


def leaf(words: list[str]) -> tuple[Any, list[str], list[str]]:
    """The command that `words` (after moesim) call, the words to it, and the rest."""
    command, path = tree(), ["moesim"]
    while words and words[0] in getattr(command, "commands", {}):
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    return command, path, words


def options_of(command: Any) -> set[str]:
    named = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    return {o for o in named if o.startswith("-")} | {"--help", "-h", "--debug"}


def check_parses(line: str) -> None:
    """Parse a command line without running it; files that a reader would have need not exist."""
    words = shlex.split(line, comments=True)[1:]
    end = next((i for i, word in enumerate(words) if word in SHELL_WORDS), len(words))
    command, path, rest = leaf([w for w in words[:end] if w != "--debug"])
    assert not hasattr(command, "commands") or not rest, f"no such command: {line}"
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            command.make_context(" ".join(path), rest, help_option_names=["-h", "--help"])
        except Exception as error:
            missing_file = "does not exist" in str(getattr(error, "message", ""))
            if type(error).__name__ not in ("Exit", "NoArgsIsHelpError") and not missing_file:
                shown = getattr(error, "message", error)
                raise AssertionError(f"{line}: {shown}") from error


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_blocks_parse(page: Path) -> None:
    for block in fences(page, "", "sh", "bash", "console", "shell"):
        for line in commands_in(block):
            check_parses(line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_exist(page: Path) -> None:
    """`moesim x --option` in a sentence: the command exists and has the options."""
    for span in re.findall(r"`(moesim [^`]+)`", prose(page)):
        for line in [span] if "|" not in span else []:
            words = line.split()[1:]
            command, _, rest = leaf(words)
            assert not hasattr(command, "commands") or not rest or rest[0].isupper(), line
            for word in rest:
                if word.startswith("-"):
                    assert word.split("=")[0] in options_of(command), f"{line}: {word}"


def test_options_in_sentences_exist() -> None:
    """Options named alone in the README and in pages about the command line are real ones."""
    known = {o for _, command in walk(tree(), ("moesim",)) for o in options_of(command)}
    for name in ("quick-start.md", "how-to-choose-a-solver.md", "evaluation.md", "cost-model.md"):
        for option in re.findall(r"`(--[a-z-]+)", prose(ROOT / "docs" / name)):
            assert option in known, f"{name}: {option}"


def test_examples_in_help_texts_parse() -> None:
    tried = 0
    for path, command in walk(tree(), ("moesim",)):
        text = re.sub(r"\s*\n(?!\n)\s*", " ", (command.help or "").replace("\n\n", "\0"))
        for paragraph in text.split("\0"):
            found = re.match(r"\s*Examples?: (moesim .*)", paragraph)
            if found:
                for line in re.split(r"\s+(?=moesim )", found.group(1)):
                    check_parses(line)
                    assert line.startswith(" ".join(path)), line
                    tried += 1
    assert tried >= 5


def test_the_demo_block_is_what_plan_prints() -> None:
    """Structure only: the lines and rows of `moesim plan` in their order, of the demo's command."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = re.findall(r"^\t\S*(moesim plan .*)$", makefile, re.MULTILINE)
    assert len(demo) == 1
    check_parses(demo[0])
    block = fences(ROOT / "README.md", "text")[0].splitlines()
    starts = [
        "note: the trace is narrow",
        "defaults taken: ",
        "debian-moe: ",
        "held-out: ",
        "held-out figure ",
    ]
    shown = [name for name in PLACEMENT_FIGURES if name not in BETWEEN_NODES]
    starts += [f"{'  ' * (name in PARTS_OF_STEP)}{figure(name).heading}" for name in shown]
    starts += [
        "local_search against eplb: ",
        "better: ",
        "on a domain that tuning has not seen: ",
        "what the search minimised: ",
        "predicted times rest on ",
        "wrote ",
    ]
    assert [line[: len(start)] for line, start in zip(block, starts, strict=True)] == starts
    out, plot = re.findall(r"--(?:out|plot) (\S+)", demo[0])
    assert block[-1] == f"wrote {out} and {plot}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = re.findall(r"^\s*make ([a-z]+)\s*$", text_of(ROOT / "README.md"), re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= targets


def test_scripts_named_with_python_exist() -> None:
    for page in PAGES:
        for script in re.findall(
            r"python ((?:benchmarks|verification)/[\w/$]+\.py)", text_of(page)
        ):
            if "$" not in script:
                assert (ROOT / script).is_file(), f"{name_of(page)}: {script}"


# Python


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_import_what_exists(page: Path) -> None:
    for block in fences(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moesim"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_solver_of_the_guide_works() -> None:
    """Four experts of load 4, 3, 2, 1 on two GPUs: 4 and 1 on the one, 3 and 2 on the other."""
    space: dict[str, Any] = {}
    exec(fences(ROOT / "docs" / "add-a-solver.md", "python")[0], space)
    counts = np.tile(np.array([4, 3, 2, 1], np.float32), (3, 2, 1))
    problem = Problem(counts, np.array([2, 2]), 1)
    seen = []
    solution = space["Snake"]().solve(problem, progress=lambda done, of: seen.append((done, of)))
    assert solution.placement.physical_to_logical.tolist() == [[0, 3, 1, 2]] * 2
    assert seen == [(1, 2), (2, 2)]


def test_the_guide_names_every_field_of_a_problem() -> None:
    guide = text_of(ROOT / "docs" / "add-a-solver.md")
    for name in Problem.__dataclass_fields__:
        assert f"`{name}`" in guide, name


def test_the_example_plan_is_valid() -> None:
    """docs/plan-format.md: its JSON loads and says what the text says of it."""
    page = ROOT / "docs" / "plan-format.md"
    raw = json.loads(fences(page, "json")[0])
    placement = parse_plan(raw).placement
    assert placement.slots_per_gpu == 3
    assert placement.logical_to_physical()[0, 0].tolist() == [0, 3]
    assert (placement.physical_to_logical[:, 2] == -1).all()
    for field in raw:
        if field != "placement":
            assert f"`{field}`" in prose(page), field
    raw["placement"]["physical_to_logical"][0][0] = 3
    with pytest.raises(FormatError, match="holds expert"):
        parse_plan({**raw, "num_gpus": 1, "num_nodes": 1})


def test_the_trace_of_the_guide_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/trace-format.md: what its numpy block writes is a trace; its tables have every array."""
    page = ROOT / "docs" / "trace-format.md"
    monkeypatch.chdir(tmp_path)
    exec(fences(page, "python")[0], {})
    trace = load_token_trace("trace.npz", "this test")
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (640, 3, 2, 16)
    assert trace.meta.layer_ids == (1, 2, 3)
    for name in ("expert_ids", "gate_weights", "expert_load", *TOKEN_DTYPES):
        assert f"`{name}`" in text_of(page), name
    for name in json.loads(trace.meta.to_json()):
        assert f"`{name}`" in text_of(page), name


# Names


def table_terms(section: str) -> list[str]:
    glossary = text_of(ROOT / "docs" / "glossary.md")
    body = glossary.split(f"## {section}", 1)[1].split("\n## ", 1)[0]
    rows = [r for r in body.splitlines() if r.startswith("|") and not r.startswith("|---")]
    return [row.split("|")[1].strip() for row in rows[1:]]


def test_the_page_on_studies_names_every_key_parameter_and_figure() -> None:
    text = (ROOT / "docs" / "whatif.md").read_text()
    example = yaml.safe_load(fences(ROOT / "docs" / "whatif.md", "yaml")[0])
    check_study(example, "docs/whatif.md")
    assert {*example, "maximize"} == set(StudyFile.model_fields)
    # `ttft_` and the like stand for each statistic.
    for name in EVALUATORS:
        evaluator = get_evaluator(name)
        figures = {re.sub(r"^(ttft|tpot|e2e)_.*", r"\1_", f.name) for f in evaluator.figures}
        for word in {*evaluator.params.model_fields, *figures}:
            assert f"`{word}`" in text, word


def test_glossary_is_sorted_and_complete() -> None:
    terms = table_terms("Terms")
    assert [t.casefold() for t in terms] == sorted({t.casefold() for t in terms})
    for term in (
        "logical expert",
        "slot",
        "redundant expert",
        "replica",
        "placement",
        "home rank",
        "dispatch",
        "combine",
        "fan-out",
        "balancedness",
        "imbalance",
        "hop",
        "TTFT",
        "TPOT",
        "analytic cost",
        "event simulation",
        "plan",
        "routing trace",
        "EPLB",
        "held-out",
        "basis",
        "excess imbalance",
        "replica policy",
    ):
        assert term in terms, term


def test_glossary_has_every_axis_and_every_figure() -> None:
    glossary = text_of(ROOT / "docs" / "glossary.md")
    for letter in "TBLEPGNK":
        assert re.search(rf"\| `{letter}` \|", glossary), letter
    printed = table_terms("Figures of a plan")
    for name in PLACEMENT_FIGURES:
        assert figure(name).heading in printed, name
    for name in STATISTICS:
        assert f"`{name}`" in glossary, name


def test_every_solver_is_in_the_choice_guide() -> None:
    guide = text_of(ROOT / "docs" / "how-to-choose-a-solver.md")
    for name in SOLVERS.own:
        assert f"| `{name}` |" in guide, name
        assert f"- **`{name}`**" in guide, name


def test_invariants_name_their_tests() -> None:
    """Every INV-n has a row; the tests that the row names cite it."""
    rows = re.findall(
        r"^\| (INV-\d+) \|.*\| (.*) \|$", text_of(ROOT / "docs" / "invariants.md"), re.MULTILINE
    )
    assert [name for name, _ in rows] == [f"INV-{n}" for n in range(1, 13)]
    for name, cell in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", cell)
        assert files, f"{name} names no test"
        for file in files:
            cited = re.search(rf"{name}\b", (ROOT / file).read_text(encoding="utf-8"))
            assert cited, f"{file} does not cite {name}"


def test_changelog_format() -> None:
    """Keep a Changelog: newest first, known sections, this version on top."""
    text = text_of(ROOT / "CHANGELOG.md")
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", text, re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert versions[0] == re.findall(r'^version = "(.*)"', project, re.MULTILINE)[0]
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)", text, re.MULTILINE)) <= allowed


def test_no_path_of_a_machine() -> None:
    """No file of the project names a place on the machine that it was written on."""
    private = re.compile(r"(?<![\w.])/(?:work|root|home|Users|workspace)/\w")
    for file in ROOT.rglob("*"):
        parts = set(file.relative_to(ROOT).parts)
        hidden = any(p.startswith(".") and p not in (".ci", ".gitignore") for p in parts)
        if hidden or parts & SKIPPED_FOLDERS or any(p.endswith(".egg-info") for p in parts):
            continue
        if file.is_file() and file.suffix in TEXT_SUFFIXES and file.stat().st_size < 5_000_000:
            found = private.search(file.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{name_of(file)}: {found.group() if found else ''}"


# Generated pages


def test_reference_is_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/reference is what the module writes; after a change run it again:
    python -m moesim.cli.reference --out docs/reference"""
    assert main(["--out", str(REFERENCE), "--check"]) == 0, capsys.readouterr().err
    assert main(["--out", str(tmp_path)]) == 0
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == reference_pages()
    changed = tmp_path / "plan.md"
    changed.write_text(changed.read_text().replace("--gpus", "--gpu", 1))
    (tmp_path / "old.md").write_text("of a command that is gone")
    assert main(["--out", str(tmp_path), "--check"]) == 1
    assert re.findall(r"(\w+)\.md$", capsys.readouterr().err, re.MULTILINE) == ["old", "plan"]


def test_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = reference_pages()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert reference_pages() == pages
    assert "\x1b" not in "".join(pages.values())
    for line in "\n".join(pages.values()).splitlines():
        assert len(line) <= 80 or line.startswith(("|", "<!--")), line


def test_reference_shows_what_help_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moesim.cli.main import run

    monkeypatch.setenv("COLUMNS", "80")
    assert run(["solver", "list", "--help"]) == 0
    command, path, _ = leaf(["solver", "list"])
    assert capsys.readouterr().out.rstrip() == help_text(command, tuple(path))


def test_placement_of_the_glossary() -> None:
    """Slot p is on GPU p // (P // G): 6 slots on 2 GPUs."""
    placement = Placement(np.array([[0, 1, 2, 3, 0, 1]], np.int32), 2, 1, 4)
    assert placement.gpu_of_slot.tolist() == [p // (6 // 2) for p in range(6)]
