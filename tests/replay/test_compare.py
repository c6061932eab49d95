"""Predictions by phase, error figures and verdicts, worked by hand."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from moesim.cluster import load_cluster
from moesim.cost.calibration import parse_calibration
from moesim.errors import FormatError, InputError, MismatchError, UnknownNameError
from moesim.replay.compare import Tolerance, compare, distinct, load_measured, spearman
from moesim.replay.predict import build_predictor
from moesim.replay.shape import ExpertShape
from moesim.replay.tables import calibration_data, load_raw, merge_raw

# Row of 1000 x 2 = 2000 bytes; collective 5 us + bytes / (2 GB/s); gather 1 us + bytes / 4 GB/s;
# row sums 2 us + bytes / 8 GB/s; experts 10 us + 0.5 us an active expert (weights 6e5 bytes at
# 1200 GB/s = 0.5 us; 6 * 1000 * 100 flops a row at 1e9 TFLOP/s are nothing; sharpness 64: a max).
CALIBRATION = """
format: moesim-calibration
version: 1
name: toy
gpu: toy
overheads: {issue_us: {collective: 20, ffn: 60, permute: 8, reduce: 12}}
collectives:
- {kind: all_to_all_v, group_size: 2, nvlink: [[5, 2]]}
expert_ffn:
- {dtype: bf16, kernel: toy, weight_bytes_per_param: 2, launch_us: 10, weight_gb_per_s: 1200,
   tflops: 1.0e+9, sharpness: 64}
copies:
- {direction: permute, latency_us: 1, gb_per_s: 4}
- {direction: reduce, latency_us: 2, gb_per_s: 8}
"""
SHAPE = ExpertShape("toy", 1000, 100, 4, 2)
# 6 tokens per rank. Rank 0 holds slots 0, 1, keeps 4 rows and sends 2; rank 1 keeps 5 and sends 3.
RESULT = {
    "plan": "linear",
    "tokens_per_rank": 6,
    "mode": "graph",
    "batch": 0,
    "slot_rows": [[8, 4, 12, 0]],
    "messages": [[[4, 2], [3, 5]]],
}


def predictor():
    cluster = load_cluster("h100-sxm-ib", num_gpus=2)
    return build_predictor(SHAPE, parse_calibration(CALIBRATION), cluster, "gpu")


def test_graph_phases_by_hand() -> None:
    got = predictor().predict(RESULT, "graph")
    # Gathered rows: rank 0 packs 6 from its 6 tokens (24,000 bytes read and written: 6 us + 1),
    # rank 1 packs 8 from 6 (28,000: 7 + 1).
    # Dispatch: the busiest direction carries 3 rows, 6000 bytes: 5 + 3 us; combine the same.
    # Compute of rank 0: 7 received + 12 GEMM rows gathered, 38,000 bytes: 1 + 9.5; experts
    # 10 + 2 x 0.5; sums of the same rows: 2 + 4.75; own 4 rows copied, 16,000 bytes: 1 + 4. = 33.25
    # Rank 1: the same 7 and 12 rows: 10.5; experts 10 + 0.5; 6.75; own 5: 1 + 5 = 6. = 33.75
    # Unpermute of rank 0: 6 returned + 6 tokens, 24,000 bytes: 2 + 3; rank 1: 8 + 6: 2 + 3.5.
    want = [[7, 8, 33.25, 8, 5], [8, 8, 33.75, 8, 5.5]]
    np.testing.assert_allclose(got.phase_us[0], want, rtol=1e-6)
    np.testing.assert_allclose(got.layer_us, [8 + 8 + 33.75 + 8 + 5.5], rtol=1e-6)


def test_eager_waits_for_the_host() -> None:
    got = predictor().predict({**RESULT, "mode": "eager"}, "eager")
    # A first step's calls are enqueued up to 148 us; rank 1's last sum runs from 148 to 153.5.
    # The second step's at 156 (gather), 176 (collective), 184 (gather), 244 (ffn), 256 (sums),
    # 264 (copy), 284 (collective), 296 (sums). Rank 1: gather 156-164, dispatch 176-184, gather
    # 184-194.5, experts 244-254.5, sums 256-262.75, copy 264-270, combine 284-292, sums 296-301.5.
    np.testing.assert_allclose(got.phase_us[0, 1], [10.5, 20, 86, 22, 9.5], rtol=1e-6)
    np.testing.assert_allclose(got.layer_us, [148], rtol=1e-6)


def test_eager_with_the_whole_layers_host_time() -> None:
    """The host's 148 us a layer are stretched to the 296 that were measured; a GPU slower than
    the host is not held up by it."""
    slow = CALIBRATION.replace("reduce: 12}", "reduce: 12, layer: 296}")
    fast = CALIBRATION.replace(
        "{collective: 20, ffn: 60, permute: 8, reduce: 12}", "{collective: 1, ffn: 1}"
    )
    cluster = load_cluster("h100-sxm-ib", num_gpus=2)
    for text, mode, want in (
        (slow, "eager", 296.0),
        (fast, "eager", 63.25),
        (fast, "graph", 63.25),
    ):
        found = build_predictor(SHAPE, parse_calibration(text), cluster, "gpu")
        got = found.predict({**RESULT, "mode": mode}, mode)
        np.testing.assert_allclose(got.layer_us, [want], rtol=0.01)


def test_an_entry_for_the_shape_is_preferred() -> None:
    extra = (
        "- {dtype: bf16, kernel: toy 1000x100, shape: [1000, 100], weight_bytes_per_param: 2,"
        " launch_us: 30, weight_gb_per_s: 1200, tflops: 1.0e+9, sharpness: 64}\ncopies:"
    )
    calibration = parse_calibration(CALIBRATION.replace("copies:", extra))
    cluster = load_cluster("h100-sxm-ib", num_gpus=2)
    own = build_predictor(SHAPE, calibration, cluster, "gpu").predict(RESULT, "graph")
    np.testing.assert_allclose(own.phase_us[0, :, 2], [53.25, 53.75], rtol=1e-6)
    other = replace(SHAPE, moe_intermediate_size=101)
    not_own = build_predictor(other, calibration, cluster, "gpu").predict(RESULT, "graph")
    assert (not_own.phase_us[0, :, 2] < 35).all()


def test_missing_tables_are_named() -> None:
    cluster = load_cluster("h100-sxm-ib", num_gpus=2)
    text = CALIBRATION.split("- {direction: reduce")[0]
    with pytest.raises(InputError, match="no reduce times"):
        build_predictor(SHAPE, parse_calibration(text), cluster, "gpu")
    with pytest.raises(UnknownNameError, match="fp32"):
        build_predictor(
            replace(SHAPE, dtype="fp32"), parse_calibration(CALIBRATION), cluster, "gpu"
        )


def test_spearman_and_distinct() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 0 1 2 3 against 0 2 1 3: 1 - 6 * 2 / (4 * 15) = 0.8.
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    # A tie shares rank 1.5: covariance 4.5, variances 5 and 4.5.
    assert spearman([1, 2, 3, 4], [1, 2, 2, 4]) == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert distinct([100, 101, 110, 104, 111], 0.03) == [0, 3, 2]


def record(factors: dict[str, float]) -> dict:
    """Measured = predicted x factor, spread over the phases as predicted."""
    results = []
    for i, (plan, factor) in enumerate(factors.items()):
        result = {**RESULT, "plan": plan, "slot_rows": [[8 + i, 4, 12 + i, 0]]}
        guess = predictor().predict(result, "graph")
        layer = (guess.layer_us * factor).tolist()
        step = {"median": layer, "p10": [0.99 * layer[0]], "p90": [1.01 * layer[0]]}
        phases = (guess.phase_us * factor).tolist()
        results.append({**result, "phase_us": phases, "layer_us": step, "step_us": step})
    return {
        "format": "moesim-measured",
        "version": 1,
        "environment": {"device": "toy", "backend": "gloo", "num_ranks": 2},
        "options": {"dedup": "gpu"},
        "model": SHAPE.to_json(),
        "phases": ["permute", "dispatch", "compute", "combine", "unpermute"],
        "notes": [],
        "results": results,
    }


def test_verdicts() -> None:
    good = compare(record({"linear": 1.0, "a": 1.02, "b": 1.05, "c": 1.08}), predictor())
    assert good.failures() == []
    group = good.groups[0]
    assert (group.num_plans, group.noise) == (4, pytest.approx(0.01))
    assert group.spearman == pytest.approx(1)
    compute = group.phases["compute"]
    assert compute.measured_us == pytest.approx(compute.predicted_us * 1.035, rel=0.01)
    assert compute.median_of_layer == pytest.approx(33.75 / 63.25 * (1 - 1 / 1.035), abs=0.003)
    assert group.speedup["linear"] == (1.0, 1.0)
    slow = compare(record({"linear": 1.0, "a": 1.5, "b": 1.3}), predictor())
    assert [line.split()[1] for line in slow.failures()] == ["median", "p90", "order"]
    assert all(line.startswith("graph: ") for line in slow.failures())
    both = record({"linear": 1.0, "a": 1.02})
    both["results"] += [{**r, "mode": "eager"} for r in both["results"]]
    assert [line[:6] for line in compare(both, predictor()).failures()] == ["eager:", "eager:"]
    assert compare(both, predictor(), modes=("graph",)).failures() == []
    with pytest.raises(InputError, match="nothing in mode eager"):
        compare(record({"linear": 1.0}), predictor(), modes=("eager",))
    assert (
        compare(record({"linear": 1.3, "a": 1.3}), predictor(), Tolerance(0.5, 0.5)).failures()
        == []
    )


def test_marks_are_taken_out() -> None:
    """Ten us of marks a layer: the layers add up to the step without, the phases to the layer."""
    marked = record({"linear": 1.0})
    result = marked["results"][0]
    result["layer_us"] = {**result["layer_us"], "median": [result["layer_us"]["median"][0] + 10]}
    result["phase_us"] = (np.array(result["phase_us"]) + 2).tolist()
    found = compare(marked, predictor())
    assert found.cases[0].mark_us == pytest.approx(10)
    assert found.groups[0].mark_us == pytest.approx(10)
    np.testing.assert_allclose(found.cases[0].measured_us, found.cases[0].predicted_us)
    np.testing.assert_allclose(found.cases[0].measured_phases, found.cases[0].predicted_phases)
    assert found.failures() == []


def test_marks_longer_than_a_layer_are_taken_out_in_proportion() -> None:
    """Two layers of 30 and 90 us with marks of which 20 us are left without them: 5 and 15."""
    one = record({"linear": 1.0})["results"][0]
    made = record({"linear": 1.0})
    made["results"] = [
        {
            **one,
            "slot_rows": one["slot_rows"] * 2,
            "messages": one["messages"] * 2,
            "phase_us": one["phase_us"] * 2,
            "layer_us": {"median": [30.0, 90.0], "p10": [30.0, 90.0], "p90": [30.0, 90.0]},
            "step_us": {"median": [20.0], "p10": [20.0], "p90": [20.0]},
        }
    ]
    case = compare(made, predictor()).cases[0]
    assert case.mark_us == pytest.approx(50)
    np.testing.assert_allclose(case.measured_us, [5, 15])


def test_operations_take_less_in_a_layer() -> None:
    """3 us less for each row move and collective, never below nothing; the experts as they were."""
    text = CALIBRATION.replace("overheads: {", "overheads: {in_layer_saves_us: 3, ")
    cluster = load_cluster("h100-sxm-ib", num_gpus=2)
    got = build_predictor(SHAPE, parse_calibration(text), cluster, "gpu").predict(RESULT, "graph")
    # Pack 7 and 8, exchanges 8, compute has three moves, unpermute 5 and 5.5.
    want = [[4, 5, 33.25 - 9, 5, 2], [5, 5, 33.75 - 9, 5, 2.5]]
    np.testing.assert_allclose(got.phase_us[0], want, rtol=1e-6)


def test_noise_from_a_repeated_run() -> None:
    first, second = record({"linear": 1.0, "a": 1.1}), record({"linear": 1.04, "a": 1.1 * 1.04})
    assert compare(first, predictor(), repeat=second).groups[0].noise == pytest.approx(0.04)
    with pytest.raises(MismatchError, match="another model"):
        compare(first, predictor(), repeat={**second, "model": {}})


def test_plot(tmp_path) -> None:
    from moesim.jobs.pictures import validation_picture

    found = compare(record({"linear": 1.0, "a": 1.1}), predictor())
    validation_picture([found]).save(tmp_path / "v.png")
    assert (tmp_path / "v.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="nothing to plot"):
        validation_picture([replace(found, cases=[])])
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "moesim-plan"}'])
def test_wrong_records(tmp_path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    for load in (load_measured, load_raw):
        with pytest.raises(FormatError, match=r"x\.json"):
            load(path)
        with pytest.raises(InputError, match="cannot read"):
            load(tmp_path / "none.json")


def test_gzipped_records(tmp_path) -> None:
    packed = tmp_path / "m.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(record({"linear": 1.0})).encode()))
    assert len(load_measured(packed)["results"]) == 1
    incomplete = record({"linear": 1.0})
    del incomplete["results"][0]["step_us"]
    packed.write_bytes(gzip.compress(json.dumps(incomplete).encode()))
    with pytest.raises(FormatError, match=r"results\[0\]\.step_us is missing"):
        load_measured(packed)
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(FormatError, match="not readable as gzip"):
        load_measured(packed)
    packed.write_bytes(gzip.compress(b" " * (1 << 20)))
    with pytest.raises(FormatError, match="not JSON"):
        load_measured(packed)


def test_empty_record_holds_nothing_to_calibrate() -> None:
    raw = {"environment": {"num_ranks": 2, "device": "x", "torch": "2", "date": ""}, "tables": {}}
    with pytest.raises(FormatError, match="no measured table"):
        calibration_data(raw, "x")


def test_a_section_measured_again_replaces_the_first() -> None:
    one = {"environment": {"device": "x", "num_ranks": 2}, "tables": {"a": [1], "b": [2]}}
    two = {**one, "tables": {"b": [3]}, "notes": ["n"]}
    merged = merge_raw([one, two])
    assert merged["tables"] == {"a": [1], "b": [3]}
    assert merged["notes"] == ["n"]
    with pytest.raises(MismatchError, match="differ in device: 'x' and 'y'"):
        merge_raw([one, {**two, "environment": {"device": "y", "num_ranks": 2}}])


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("environment", "num_ranks"), "2", "environment.num_ranks"),
        (("environment", "num_ranks"), 3, "results[0] is not of 3 ranks"),
        (("options", "dedup"), [], "options.dedup"),
        (("model", "top_k"), 9, "top_k 9 exceeds 4 experts"),
        (("notes",), {}, "notes"),
        (("results",), {"a": 1}, "results"),
        (("results", 0, "mode"), "fast", "results[0].mode"),
        (("results", 0, "tokens_per_rank"), 0, "results[0].tokens_per_rank"),
        (("results", 0, "phase_us", 0, 0, 2), float("nan"), "results[0].phase_us[0][0][2]"),
        (("results", 0, "phase_us", 0, 0), [1.0], "results[0].phase_us[0][0]"),
        (("results", 0, "step_us", "median"), [0.0], "results[0].step_us.median[0]"),
        (("results", 0, "step_us", "p90"), [], "step_us is not of 1 values"),
        (("results", 0, "layer_us", "p10"), None, "results[0].layer_us.p10"),
        (("results", 0, "slot_rows"), [[1, 2, 3]], "do not share out among 2 ranks"),
        (("results", 0, "slot_rows", 0, 1), 1 << 70, "results[0].slot_rows[0][1]"),
        (("results", 0, "messages", 0), [[1, 2]], "messages are not 2 by 2"),
        (("results", 0, "messages", 0, 0, 0), -1, "results[0].messages[0][0][0]"),
    ],
)
def test_fields_of_a_record_are_typed_and_finite(tmp_path, path, value, named: str) -> None:
    made = json.loads(json.dumps(record({"linear": 1.0})))
    place = made
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    file = tmp_path / "m.json"
    file.write_text(json.dumps(made))
    with pytest.raises(FormatError, match=re.escape(named)):
        load_measured(file)


def test_a_run_that_did_not_come_to_its_end_is_refused(tmp_path) -> None:
    """Marked so; or, in records without the mark, 1 of 2 batches without a note that says why."""
    file = tmp_path / "m.json"

    def load(**changed) -> dict:
        file.write_text(json.dumps({**record({"linear": 1.0}), **changed}))
        return load_measured(file)

    asked = {"dedup": "gpu", "num_batches": 2, "tokens_per_rank": [6]}
    for broken in ({"complete": False}, {"options": asked}):
        with pytest.raises(FormatError, match="did not come to its end"):
            load(**broken)
    load(complete=True)
    load(options={**asked, "num_batches": 1})
    load(options=asked, notes=["time limit: stopped before toy batch 1"])


@pytest.mark.parametrize(
    ("section", "row", "named"),
    [
        ("ffn", {"us": 1.0, "mode": "eager"}, "tables.ffn[0].hidden"),
        ("fetch", {"us": float("inf")}, "tables.fetch[0].us"),
        ("fetch", 3, "tables.fetch[0]"),
        ("copies", {"us": 1, "direction": "up"}, "tables.copies[0]"),
        ("unheard_of", None, "tables.unheard_of is not a list"),
    ],
)
def test_rows_of_a_calibration_are_typed(tmp_path, section: str, row, named: str) -> None:
    raw = {
        "format": "moesim-calibration-raw",
        "version": 1,
        "environment": {
            "device": "toy",
            "backend": "gloo",
            "num_ranks": 2,
            "torch": "2",
            "date": "",
        },
        "kernels": {"ffn": "loop", "reduce": "sum", "graphs": False},
        "tables": {section: [row] if row is not None else 1},
    }
    file = tmp_path / "r.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(FormatError, match=re.escape(named)):
        load_raw(file)
