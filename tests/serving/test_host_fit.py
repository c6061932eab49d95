"""A machine's host from steps that it took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import FormatError, InputError
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import deploy
from moesim.serving.host_fit import HostStep, fit_host, read_step
from moesim.serving.step_cost import EngineStepCost

SIZES = ((1, 1024), (2, 1024), (4, 1024), (8, 1024), (16, 1024))


@pytest.fixture(scope="module")
def cost() -> EngineStepCost:
    return EngineStepCost(
        deploy(
            "OLMoE-1B-7B",
            "h200-sxm-ib",
            tp=1,
            expert_dtype="bf16",
            dense_dtype="bf16",
            max_batch_tokens=16384,
        )
    )


def taken(cost: EngineStepCost, around: float, each: float) -> list[HostStep]:
    """The steps of a machine with these constants."""
    engine = replace(
        cost.deployment.engine, eager_layer_us=0.0, prompt_step_us=around, enqueue_layer_us=each
    )
    model = cost.with_engine(engine)
    return [
        HostStep(
            n,
            p,
            float(
                model.step_us(
                    BatchShape.of(
                        prefill_tokens=n * p,
                        prefill_pairs=n * p * (p + 1) / 2,
                        prefill_sequences=n,
                    )
                )
            ),
        )
        for n, p in SIZES
    ]


def test_planted_constants_are_found(cost: EngineStepCost) -> None:
    """A host of 1.5 ms per layer binds OLMoE's 16 layers at 24 ms: three small steps take that,
    and the large ones the GPU's time and 4 ms. Each is then foretold by the others."""
    steps = taken(cost, 4000.0, 1500.0)
    assert [s.us for s in steps[:2]] == pytest.approx([24_000.0] * 2)
    found = fit_host(cost, steps)
    assert found.engine.prompt_step_us == pytest.approx(4000.0, abs=1.0)
    assert found.engine.enqueue_layer_us == pytest.approx(1500.0, abs=0.1)
    assert found.engine.eager_layer_us == 0.0
    assert found.bound == (True, True, False, False, False)
    times = [s.us for s in steps]
    np.testing.assert_allclose(found.predicted_us, times, rtol=1e-4)
    np.testing.assert_allclose(found.held_out_us, times, rtol=1e-4)


def test_one_stalled_step_is_seen_by_the_others(cost: EngineStepCost) -> None:
    """Of seven parts of evidence one is wrong: the constants stay, and the step is foretold as it
    would have been."""
    steps = taken(cost, 4000.0, 1500.0)
    stalled = [replace(steps[0], us=2 * steps[0].us), *steps[1:]]
    found = fit_host(cost, stalled)
    assert found.engine.enqueue_layer_us == pytest.approx(1500.0, abs=0.1)
    assert found.held_out_us[0] == pytest.approx(steps[0].us, rel=1e-4)


def test_a_fast_host_binds_nothing(cost: EngineStepCost) -> None:
    found = fit_host(cost, taken(cost, 2000.0, 0.0))
    assert found.engine.enqueue_layer_us == 0.0
    assert not any(found.bound)


def test_steps_that_tell_nothing_are_refused(cost: EngineStepCost) -> None:
    steps = taken(cost, 0.0, 1500.0)
    with pytest.raises(InputError, match="steps 1x1024, 2x1024"):
        fit_host(cost, steps[:2])
    with pytest.raises(InputError, match="4x1024, 1x1024"):
        fit_host(cost, [*steps[:3], steps[0]])
    with pytest.raises(InputError, match="replayed as CUDA graphs"):
        fit_host(cost, [HostStep(1, 512, 9000.0), *steps])


def test_steps_are_read(tmp_path: Path) -> None:
    """Milliseconds, or the median of vLLM's latencies, which are in seconds."""
    assert read_step("4x1024=41.7") == HostStep(4, 1024, pytest.approx(41_700.0))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"avg_latency": 9.0, "latencies": [0.02, 0.04, 0.03]}))
    assert read_step(f"1x512={path}") == HostStep(1, 512, pytest.approx(30_000.0))


@pytest.mark.parametrize("text", ["", "4x1024", "0x5=1", "4x1024=", "4x1024=-1", "4x1024=nan"])
def test_what_is_no_step_is_refused(text: str) -> None:
    with pytest.raises((FormatError, InputError)):
        read_step(text)


@pytest.mark.parametrize("text", ["[]", "{}", '{"latencies": []}', '{"latencies": [true]}', "x"])
def test_files_without_latencies_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(FormatError):
        read_step(f"1x600={path}")
    with pytest.raises(InputError, match="cannot read"):
        read_step(f"1x600={tmp_path / 'none.json'}")
