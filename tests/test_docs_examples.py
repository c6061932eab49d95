"""The examples of the pages that add something run, and fit in as the pages say."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moesim
from moesim import plugins
from moesim.errors import FormatError, InputError, MismatchError, MoesimError
from moesim.exporters.base import ExportOptions, ReadOptions
from moesim.exporters.registry import EXPORTERS, exporter
from moesim.jobs.import_trace import import_files
from moesim.placement import Placement, Plan
from moesim.sim.collectives.base import Stage
from moesim.sim.engine import Engine
from moesim.sim.event import run_step
from moesim.sim.schedules.registry import SCHEDULES, get_schedule
from moesim.sim.work import Chunk, HomeWork, StepWork
from moesim.solvers.base import Problem, run_solver
from moesim.solvers.registry import about, find_solver, solver_names
from moesim.trace.format import Trace
from moesim.trace.importers.base import ImportOptions
from moesim.trace.importers.registry import IMPORTERS, detect_format

DOCS = Path(__file__).parents[1] / "docs"
Installer = Callable[[str, str, str], None]


def block(page: str, language: str = "python", number: int = 0) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[number]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    """Install a page's code as a package with the page's entry point: what pip leaves behind."""

    def put(page: str, module: str, table: str) -> None:
        package = tmp_path / "site" / "my_package"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / f"{module}.py").write_text(block(page))
        info = tmp_path / "site" / "my_package-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
        group, name, value = re.fullmatch(
            r'\[project\.entry-points\."([\w.]+)"\]\n([\w-]+) = "([\w.:]+)"\n', table
        ).groups()  # type: ignore[union-attr]
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        plugins._offered.cache_clear()

    yield put
    plugins._offered.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_the_solver_of_the_page_is_found_and_checked(install: Installer) -> None:
    """Loads 4, 3, 2, 1 on two GPUs, there and back: 4 and 1 on the one, 3 and 2 on the other; a
    replica too many is refused by what the class declares."""
    install("add-a-solver.md", "snake", block("add-a-solver.md", "toml"))
    assert "snake" in solver_names()
    assert about("snake").startswith("experts by load")
    counts = np.tile(np.array([4, 3, 2, 1], np.float32), (3, 2, 1))
    solution = run_solver(find_solver("snake"), Problem(counts, np.array([2, 2]), 1))
    assert solution.placement.physical_to_logical.tolist() == [[0, 3, 1, 2]] * 2
    with pytest.raises(InputError, match="places every expert once"):
        run_solver(find_solver("snake"), Problem(counts, np.array([3, 3]), 1))
    with pytest.raises(InputError, match="same number of slots"):
        run_solver(find_solver("snake"), Problem(counts, np.array([3, 1]), 1))


def test_the_importer_of_the_page_is_found_by_its_files(install: Installer, tmp_path: Path) -> None:
    """Two requests, three tokens, top-2 of one layer; a line that is short is named."""
    install("add-an-importer.md", "routes_txt", block("add-an-importer.md", "toml"))
    file = tmp_path / "a.routes"
    file.write_text("7 0 3,1\n7 1 0,2\n9 0 1,0\n")
    assert detect_format([file]) == "routes-txt"
    trace = import_files([file], ImportOptions(num_experts=4))
    assert isinstance(trace, Trace)
    assert trace.expert_ids.tolist() == [[[3, 1]], [[0, 2]], [[1, 0]]]
    assert len(set(np.asarray(trace.request_ids).tolist())) == 2
    assert IMPORTERS.names()[-1] == "routes-txt"
    file.write_text("7 0 3,1\n7 1\n")
    with pytest.raises(FormatError, match=r"a\.routes: line 2"):
        import_files([file], ImportOptions(num_experts=4))


def test_the_exporter_of_the_page_goes_there_and_back(install: Installer) -> None:
    install("add-an-exporter.md", "rows", block("add-an-exporter.md", "toml"))
    assert "rows" in EXPORTERS.names()
    rows = exporter("rows")
    placement = Placement(np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.int32), 2, 1, 4)
    plan = Plan("m", (0, 1), placement)
    data = rows.encode(plan, ExportOptions())
    assert data == b"[[0, 1, 2, 3], [3, 2, 1, 0]]"
    back = rows.decode(data, ReadOptions("x.json", num_gpus=2))
    assert (back.placement.physical_to_logical == placement.physical_to_logical).all()
    with pytest.raises(FormatError, match="not rows of experts"):
        rows.decode(b"{", ReadOptions("x.json", num_gpus=2))
    holes = Placement(np.array([[0, 1, 2, -1]], np.int32), 2, 1, 3)
    with pytest.raises(MismatchError, match="empty slots"):
        rows.encode(Plan("m", (0,), holes), ExportOptions())


def one_layer(shared: float) -> StepWork:
    """Gate 1 us, collectives 5, routed experts 6, and shared experts, on two GPUs."""
    every = np.ones((1, 2))
    home = HomeWork(every * 0, every, every * shared, every[0] * 0, every * 0, every * 0)

    def stage() -> list[Stage]:
        return [Stage("", np.full((1, 1), 5.0), 0.0, np.full((1, 1, 1), 5.0), np.ones(1), False)]

    chunk = Chunk(0, every * 6, stage(), stage(), home)
    return StepWork(1, 2, 1, home, (chunk,))


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        pytest.param(4, 1 + 5 + 6 + 5, id="hidden under the combine"),
        pytest.param(9, 1 + 5 + 6 + 9, id="longer than the combine"),
    ],
)
def test_the_schedule_of_the_page(
    monkeypatch: pytest.MonkeyPatch, shared: float, expected: float
) -> None:
    space: dict[str, Any] = {}
    exec(block("add-a-schedule.md"), space)
    maker = space["SharedUnderCombine"]
    monkeypatch.setitem(SCHEDULES, maker.name, ("shared experts under combine", lambda _: maker()))
    schedule = get_schedule("shared-under-combine")
    assert run_step(Engine(1), schedule, one_layer(shared)).us == expected
    plain = run_step(Engine(1), get_schedule("sequential"), one_layer(shared)).us
    assert plain == 1 + shared + 5 + 6 + 5


def test_the_policy_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """More slots serve more, and with a slot for each of 64 experts only first uses miss: at most
    64 of 400 x 8 accesses."""
    space: dict[str, Any] = {}
    exec(block("add-a-cache-policy.md"), space)
    rates = space["rates"]
    assert rates == sorted(rates)
    assert 1 - 64 / 3200 <= rates[-1] < 1
    assert capsys.readouterr().out.startswith("[0.")


def test_the_api_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks one after another, as a reader would; every public name is in one of them."""
    text = (DOCS / "python-api.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(code, module.__dict__)
    assert {"plan.json", "load.svg", "plan.npz"} <= {p.name for p in tmp_path.iterdir()}
    assert module.study.answered
    assert not module.served.missed
    assert module.seen[-1][0] == module.seen[-1][1]
    for name in moesim.__all__:
        assert re.search(rf"\bmoesim\.{name}\b", text), name
    assert issubclass(MoesimError, Exception)
