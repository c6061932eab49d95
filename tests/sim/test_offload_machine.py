"""Caching plans on a machine of one's own: planned, simulated and studied with the same rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moesim
from moesim.caching.group import plan_group
from moesim.caching.workload import Request
from moesim.cluster import load_cluster, load_machine
from moesim.errors import InputError, MismatchError
from moesim.jobs.cache import CacheOptions, run_cache
from moesim.jobs.cache_result import CacheJob
from moesim.model.names import load_model
from moesim.offloading.rates import gpu_rates
from moesim.placement import Placement
from moesim.studies.registry import get_evaluator
from moesim.trace.format import Trace, load_token_trace

SAMPLE = "sample:debian-moe"
MACHINE = "rtx-4090+ddr5-2ch"
QUICK = {"policy": "lru", "prefetch": "none", "cpu": "on"}


@pytest.fixture(scope="module")
def trace() -> Trace:
    return load_token_trace(SAMPLE, "a test")


@pytest.fixture(scope="module")
def job(trace: Trace) -> CacheJob:
    return run_cache(
        trace, CacheOptions(MACHINE, hbm_gb=1.3, max_steps=48, prompt=1024, output=256, **QUICK)
    )


def test_plan_has_what_cache_has(trace: Trace, job: CacheJob) -> None:
    """One GPU with all experts: `plan --offload` asks the planner what `cache` asks it."""
    placement = Placement(np.tile(np.arange(64, dtype=np.int32), (12, 1)), 1, 1, 64)
    machine = load_machine(MACHINE)
    asked = Request(1.3, max_steps=48, **QUICK)
    made = plan_group(trace, placement, load_model("debian-moe"), machine.gpus, asked, machine)
    assert made.results[0].tokens_per_s == job.own.tokens_per_s
    assert made.plans[0].slots == job.plan.slots
    assert made.plans[0].provenance["kernels"] == "engine"


def test_simulate_finds_the_machine_and_the_prediction(
    trace: Trace, job: CacheJob, tmp_path: Path
) -> None:
    """INV-8 with engines' kernels: the event simulation of the same steps has the same speed where
    only the link reads DRAM, and is a little slower where the CPU reads it at the same time."""
    options = CacheOptions(MACHINE, hbm_gb=1.3, max_steps=48, prompt=1024, output=256)
    alone = run_cache(trace, replace(options, policy="lru", prefetch="none", cpu="off"))
    fetched = moesim.simulate(trace, plan=alone.save(tmp_path / "link.json"), steps=48)
    speed = fetched.to_json()["plans"]["plan"]["tokens_per_s"]
    assert speed == pytest.approx(alone.own.tokens_per_s, rel=1e-9)
    path = job.save(tmp_path / "cache.json")
    found = moesim.simulate(trace, plan=path, steps=48)
    assert found.defaults["cluster"] == MACHINE
    tokens_per_s = found.to_json()["plans"]["plan"]["tokens_per_s"]
    assert 0.97 * job.own.tokens_per_s < tokens_per_s <= job.own.tokens_per_s
    with pytest.raises(MismatchError, match="kernels of engines"):
        moesim.simulate(trace, plan=path, cluster="l40s-pcie", gpus=1)


def test_a_machine_that_is_not_shipped_is_not_looked_for(job: CacheJob, tmp_path: Path) -> None:
    """A name out of a file never leads to another file."""
    path = tmp_path / "cache.json"
    replace(job.plan, provenance=job.plan.provenance | {"machine": "/etc/box.yaml"}).save(path)
    with pytest.raises(InputError, match="not one of moesim's"):
        moesim.simulate(SAMPLE, plan=path)


def test_a_study_has_what_cache_has(job: CacheJob) -> None:
    """Engines leave a margin that 1.3 GB does not have: none runs here."""
    evaluator = get_evaluator("cache")
    common = {"trace": SAMPLE, "machine": MACHINE, "hbm_gb": 1.3, "max_steps": 48, **QUICK}
    found = evaluator.evaluate(evaluator.check(common)).figures
    assert found["tokens_per_s"] == job.own.tokens_per_s
    assert (found["engine_tokens_per_s"], job.best_engine) == (None, None)
    slow = evaluator.evaluate(evaluator.check(common | {"cpu_scale": 0.5})).figures
    assert slow["tokens_per_s"] < found["tokens_per_s"]  # type: ignore[operator]
    with pytest.raises(MismatchError, match="scales do not reach"):
        evaluator.evaluate(evaluator.check(common | {"machine": "l40s", "cpu_scale": 0.5}))


def test_a_machine_is_a_cluster_of_one_node() -> None:
    """Cards meet in the PCIe tree, a card of 32 GB/s in a slot of 64; two cards of NVLink bridges
    are not joined by them; four GPUs cut to two keep their host."""
    four = load_cluster("4xrtx-4090+ddr5-8ch")
    assert (four.num_gpus, four.num_nodes, four.host_dram_gb.tolist()) == (4, 1, [512.0])
    assert four.bandwidth_matrix()[0, 1] == 32
    assert load_cluster("2xrtx-3090+ddr4-4ch").bandwidth_matrix()[0, 1] == 32
    two = load_cluster("4xrtx-4090+ddr5-8ch", 2)
    assert two.machine is not None
    assert (two.num_gpus, len(two.machine.gpus)) == (2, 2)
    other = load_cluster("2xrtx-4090+ddr5-4ch")
    assert other.cluster_hash() != two.cluster_hash()
    with pytest.raises(InputError, match="4 GPUs, 8 are asked for"):
        load_cluster("4xrtx-4090+ddr5-8ch", 8)


def test_memory_that_engines_fill() -> None:
    """24 GiB of a card are 25.8 GB, of which an engine leaves 1 GiB free."""
    gpu = load_machine(MACHINE).gpus[0]
    assert gpu_rates(gpu, False).memory == 23 * 2**30
