"""What of a raw record comes into the calibration file, and what `moesim calibrate` prints."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'moesim[torch]')")

from moesim.cost.calibration import (
    build_calibration,
    parse_calibration,
    parse_calibration_file,
)
from moesim.cost.calibration_schema import CalibrationFile
from moesim.replay.cache_schedule import calibrated_costs
from moesim.replay.calibrate_links import growing, subgroup_sizes
from moesim.replay.environment import num_nodes_of
from moesim.replay.make_schedule import lru_schedule
from moesim.replay.shape import ExpertShape
from moesim.replay.table_lines import link_lines, link_rows
from moesim.replay.tables import calibration_data, load_raw

REPORTS = Path(__file__).parents[2] / "reports"
ENVIRONMENT = {"num_ranks": 4, "device": "x", "torch": "2", "date": "", "backend": "gloo"}


def timed(us: float, **row: Any) -> dict[str, Any]:
    return {**row, "us": us, "p10_us": us - 1, "p90_us": us + 3}


def sizes(us: float, **row: Any) -> list[dict[str, Any]]:
    """1 kB takes `us`, 1 MB 1000 times as long."""
    return [timed(us * n, bytes=1000 * n, **row) for n in (1, 1000)]


def file_of(**tables: Any) -> CalibrationFile:
    raw = {"environment": ENVIRONMENT, "tables": tables}
    return CalibrationFile.model_validate(calibration_data(raw, "x"))


def test_groups_of_a_record_answer_by_size() -> None:
    two: dict[str, Any] = {"group_size": 2, "num_nodes": 1, "mode": "eager"}
    even = sizes(40.0, group_size=4, share=1.0, mode="eager")
    parsed = file_of(
        all_to_all_v=[*even, *sizes(5.0, group_size=4, share=0.5, mode="eager")],
        subgroups=[
            *sizes(10.0, kind="all_to_all_v", share=1.0, **two),
            *sizes(2.0, kind="all_to_all_v", share=0.0, **two),
            timed(9.0, kind="all_gather", share=1.0, bytes=1000, **two),
        ],
    )
    assert [(e.kind, e.group_size, e.share) for e in parsed.collectives] == [
        ("all_to_all_v", 4, 1.0),
        ("all_to_all_v", 4, 0.5),
        ("all_to_all_v", 2, 1.0),
        ("all_to_all_v", 2, 0.0),
    ]
    made = build_calibration(parsed)
    # Even entries alone answer; between 2 and 4 ranks the geometric mean in log2 of the group.
    for ranks, us in ((2, 10.0), (4, 40.0), (3, 10.0 * 4.0**0.58496)):
        curve = made.collective("all_to_all_v", ranks)
        assert curve.group_measured
        assert curve.time_us(1000) == pytest.approx(us, rel=1e-4)
    assert not made.collective("all_to_all_v", 8).group_measured


def test_host_copies_of_a_record() -> None:
    rows = []
    for pinned, gpus, direction, us in (
        (True, 1, "h2d", 1.0),
        (False, 4, "h2d", 8.0),
        (True, 4, "h2d", 2.0),
        (True, 4, "both", 3.0),
    ):
        rows += sizes(us, pinned=pinned, num_gpus_at_once=gpus, direction=direction)
    parsed = file_of(copies=rows)
    made = build_calibration(parsed)
    assert made.copy("h2d").time_us(1000) == pytest.approx(2.0)
    assert made.copy("h2d", num_gpus_at_once=1).time_us(1000) == pytest.approx(1.0)
    assert made.copy("h2d", pinned=False).time_us(1000) == pytest.approx(8.0)
    assert made.copy("both").time_us(1000) == pytest.approx(3.0)
    # 1 MB in 2000 us is 0.5 GB/s; 10th to 90th percentile 4 us, half of it 2, of 2000 0.1%.
    assert link_rows(parsed)[0] == {
        "kind": "h2d",
        "pinned": True,
        "num_gpus_at_once": 4,
        "smallest_bytes": 1000.0,
        "latency_us": 2.0,
        "latency_spread_us": 2.0,
        "largest_bytes": 1e6,
        "gb_per_s": 0.5,
        "spread_gb_per_s": 0.001,
    }
    assert [line.split("  ")[0] for line in link_lines(parsed)] == [
        "link",
        "h2d, pinned",
        "both, each way, pinned",
        "h2d, pinned",
        "h2d, unpinned",
    ]
    assert "0.5 +- 0.001 GB/s at 1 MB" in link_lines(parsed)[1]


def test_fetches_of_a_record() -> None:
    launch = [{"what": "fetch, host time to enqueue", "us": us} for us in (40.0, 44.0)]
    raw = {
        "environment": {**ENVIRONMENT, "backend": "nccl"},
        "tables": {
            "copies": sizes(1.0, pinned=True, num_gpus_at_once=1, direction="h2d"),
            "fetch": [{"bytes": 1, "us": us} for us in (7.0, 8.0, 30.0)],
            "launch": launch,
        },
    }
    made = build_calibration(CalibrationFile.model_validate(calibration_data(raw, "x")))
    assert made.hand_over_us == 8.0
    assert made.issue_us == {"fetch": 44.0}


def test_an_offloaded_step_by_hand() -> None:
    """One GPU's copy in two parts, experts in a graph's time, a gather; the host and hand-overs."""
    text = """
format: moesim-calibration
version: 1
name: x
gpu: x
sources: {s: s}
overheads: {hand_over_us: 8, issue_us: {ffn: 70, permute: 9, fetch: 40}}
copies:
- {direction: h2d, num_gpus_at_once: 1, latency_us: 1, gb_per_s: 1, source: s}
- {direction: h2d, num_gpus_at_once: 2, latency_us: 5, gb_per_s: 1, source: s}
- {direction: permute, table: [[1, 2], [1000000, 2]], source: s}
expert_ffn:
- {dtype: bf16, kernel: k, weight_bytes_per_param: 2, launch_us: 10, eager_launch_us: 15,
   weight_gb_per_s: 1, tflops: 1, sharpness: 64, source: s}
"""
    shape = ExpertShape("x", 100, 10, 4, 2)
    schedule = lru_schedule(np.array([[[0, 1]]]), 4, 2)
    costs = calibrated_costs(shape, parse_calibration(text), schedule)
    # 6,000 bytes per expert at 1 kB/us: 6 us in two parts of 1 us latency. Two experts read: 12 us.
    assert costs.copy_us == pytest.approx(8.0)
    assert costs.step_us == pytest.approx(10.0 + 12.0 + 2.0, rel=0.01)
    assert (costs.issue_us, costs.fetch_issue_us, costs.hand_over_us) == (79.0, 40.0, 8.0)


def test_sub_groups_fill_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert growing(768, 50000, 8) == [768, 6144, 49152]
    assert subgroup_sizes(4, 4) == [2]
    assert subgroup_sizes(3, 3) == [2]
    assert subgroup_sizes(2, 2) == []
    # Four hosts of six: 8 and 16 ranks would not fill whole ones.
    assert subgroup_sizes(24, 6) == [2, 4]
    assert subgroup_sizes(32, 8) == [2, 4, 8, 16]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [num_nodes_of(n) for n in (2, 8, 16)] == [1, 1, 2]


@pytest.mark.parametrize("path", ["hardware-h200x2/raw/run3", "hardware-h200x4/raw/run1"])
def test_bundled_files_hold_what_their_records_do(path: str) -> None:
    """Every uneven exchange and host copy of the record is in the file that clusters name."""
    raw = load_raw(REPORTS / path / "calibration.json.gz")
    ranks = raw["environment"]["num_ranks"]
    parsed = CalibrationFile.model_validate(calibration_data({**raw, "tables": links(raw)}, "x"))
    copies = {(c.direction, c.pinned, c.num_gpus_at_once) for c in parsed.copies}
    pageable = {(d, False, n) for d in ("h2d", "d2h") for n in (1, ranks)}
    assert copies == pageable | {(d, True, n) for d in ("h2d", "d2h", "both") for n in (1, ranks)}
    assert [e.share for e in parsed.collectives] == [1.0, 0.5, 0.125, 0.0]
    bundled = bundled_of(ranks)
    assert [e for e in bundled.copies if not e.is_row_move] == parsed.copies
    assert [e for e in bundled.collectives if e.kind == "all_to_all_v"] == parsed.collectives


def links(raw: dict[str, Any]) -> dict[str, Any]:
    return {name: raw["tables"][name] for name in ("all_to_all_v", "copies")}


def bundled_of(ranks: int) -> CalibrationFile:
    name = {2: "h200-torch", 4: "h200x4-torch"}[ranks]
    path = resources.files("moesim.topologies") / "calibration" / f"{name}.yaml"
    return parse_calibration_file(path.read_text(encoding="utf-8"))
