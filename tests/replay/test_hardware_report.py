"""What the committed measurements of two and four H200s say of the cost model as it is now."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.cost.calibration import load_calibration
from moesim.jobs.validate import OWN_CALIBRATIONS
from moesim.replay.compare import compare, load_measured
from moesim.replay.predict import build_predictor
from moesim.replay.shape import parse_shape
from moesim.replay.tables import load_raw, merge_raw

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "reports"
COMMON = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite")
CASES = [(2, model) for model in (*COMMON, "olmoe-1b-7b")]
CASES += [(4, model) for model in (*COMMON, "deepseek-v3")]


@pytest.mark.parametrize(("num_gpus", "model"), CASES)
def test_layers_in_graphs_are_within_the_targets(num_gpus: int, model: str) -> None:
    """Median error at most 10%, 90th percentile at most 20%, and the figures that the report
    states; after a change of the model run verification/hardware/study.py again."""
    report = REPORTS / f"hardware-h200x{num_gpus}"
    record = load_measured(report / "raw" / "run1" / f"{model}.json.gz")
    predictor = build_predictor(
        parse_shape(record["model"]),
        load_calibration(OWN_CALIBRATIONS[num_gpus]),
        load_cluster("h200-sxm-ib", num_gpus=num_gpus),
        record["options"]["dedup"],
    )
    found = compare(record, predictor, modes=("graph",))
    median, p90 = np.percentile(found.errors(), [50, 90])
    assert median <= 0.10
    assert p90 <= 0.20
    stated = json.loads((report / "results.json").read_text())["models"][model]["errors"]["graph"]
    assert (median, p90) == pytest.approx((stated["median"], stated["p90"]), abs=1e-6)
    assert max(c["relative_error"] for c in record["checks"]) < 0.01


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_no_validated_case_was_calibrated(num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No load of a GPU in a layer, and no size of an exchange, is in the calibration records; and
    the check itself sees one that is."""
    monkeypatch.syspath_prepend(str(ROOT / "verification" / "hardware"))
    study = pytest.importorskip("study", reason="needs matplotlib")
    raw = REPORTS / f"hardware-h200x{num_gpus}" / "raw"
    measured = merge_raw([load_raw(p) for p in sorted(raw.glob("run*/calibration*.json.gz"))])
    found = study.disjoint(raw, measured)
    assert min(found["loads"], found["messages"]) > 2000
    assert (found["loads_in_both"], found["messages_in_both"]) == (0, 0)
    record = load_measured(raw / "run1" / "mixtral-8x7b.json.gz")
    slots = np.array(record["results"][0]["slot_rows"])[0].reshape(num_gpus, -1)[0]
    planted = {**measured["tables"]["ffn"][0], "hidden": 4096, "intermediate": 14336}
    ffn = [*measured["tables"]["ffn"], {**planted, "counts": slots[::-1].tolist()}]
    tables = {**measured["tables"], "ffn": ffn}
    monkeypatch.setattr(study, "models_of", lambda _: ["mixtral-8x7b"])
    assert study.disjoint(raw, {**measured, "tables": tables})["loads_in_both"] > 0
    for name in ("study", "study_plots", "study_tables"):
        sys.modules.pop(name, None)
