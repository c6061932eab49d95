"""INV-8: with nothing else on the network, the event simulation is the analytic cost."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.routing import home_ranks, route
from moesim.sim.analytic import run_analytic
from moesim.sim.engine import Engine, Program
from moesim.sim.event import run_event
from moesim.sim.schedules.sequential import Sequential
from moesim.trace.batches import Batches

CASES = [
    ("h100-sxm-ib", 8, "nccl"),
    ("h100-sxm-ib", 16, "nccl"),
    ("h100-sxm-ib", 16, "deepep"),
    ("h100-sxm-ib", 32, "deepep_ll"),
    ("h100-sxm-roce-leafspine", 16, "nccl"),
    ("gb200-nvl72", 8, "nvlink"),
    ("l40s-pcie", 4, "nccl"),
    ("mixed-h100-a100", 16, "nccl"),
    ("h100-sxm-ib", 16, "two-level"),
    ("h100-sxm-ib", 16, "bi-level"),
]


@pytest.mark.parametrize(("cluster", "gpus", "library"), CASES)
def test_whole_steps(cluster, gpus, library, trace, batches, models_of, linear_of) -> None:
    """Steps with attention, gate and dense layers: every part, link and GPU."""
    models = models_of(gpus, all_to_all=library, cluster=cluster)
    placement = linear_of(models)
    closed = run_analytic(models, trace, batches, placement)
    event = run_event(models, Sequential(), trace, batches, placement)
    np.testing.assert_allclose(event.step_us, closed.step_us, rtol=1e-12)
    np.testing.assert_allclose(event.parts_us, closed.parts_us, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(event.waiting_us, closed.waiting_us, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(event.gpu_busy, closed.gpu_busy, rtol=1e-12)
    np.testing.assert_allclose(event.link_bytes, closed.link_bytes, rtol=1e-12)
    np.testing.assert_allclose(event.link_busy_us, closed.link_busy_us, rtol=1e-9)


@pytest.mark.parametrize("model_name", ["Qwen2-57B-A14B", "deepseek-v2-lite", "gpt-oss-20b"])
def test_shared_experts_and_windows(model_name, trace, batches, models_of, linear_of) -> None:
    """Models with shared experts, latent attention, dense first layers, sliding windows, and home
    ranks of unequal numbers of tokens."""
    models = models_of(8, model_name=model_name)
    uneven = Batches(
        batches.token_idx[:250], np.array([0, 250], np.int64), batches.phase, batches.batch_tokens
    )
    closed = run_analytic(models, trace, uneven, linear_of(models))
    event = run_event(models, Sequential(), trace, uneven, linear_of(models))
    np.testing.assert_allclose(event.step_us, closed.step_us, rtol=1e-12)
    np.testing.assert_allclose(event.parts_us, closed.parts_us, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("cluster", "gpus", "library"), CASES[:8])
def test_moe_part_is_the_step_models(
    cluster, gpus, library, trace, batches, models_of, linear_of
) -> None:
    """Without home ranks a step is `StepModel.cost`, and each collective by itself its share."""
    models = models_of(gpus, all_to_all=library, cluster=cluster, home=False)
    placement = linear_of(models)
    routed = route(
        trace, batches, placement, dedup=models.step.dedup,
        home=home_ranks(trace, batches, gpus),
    )  # fmt: skip
    cost = models.step.cost(routed)
    event = run_event(models, Sequential(), trace, batches, placement)
    np.testing.assert_allclose(event.step_us, cost.step_us, rtol=1e-12)
    np.testing.assert_allclose(event.link_bytes, cost.link_bytes.sum(axis=(0, 1)), rtol=1e-12)
    for stage, expected in (
        (models.exchange.dispatch(routed)[0], cost.dispatch_us),
        (models.exchange.combine(routed)[0], cost.combine_us),
    ):
        for batch, layer in ((0, 0), (2, 1)):
            engine = Engine(models.links.num_links)
            program = Program(gpus)
            program.collective(stage.flow(batch, layer, "dispatch"))
            assert engine.run(program).us == pytest.approx(expected[batch, layer], rel=1e-12)
            assert engine.network.peak_used.max() <= 1 + 1e-9


def test_no_link_above_its_line_rate(trace, batches, models_of, linear_of) -> None:
    """INV-3 at the level of the cluster: bytes over time alone is at most the datasheet rate."""
    models = models_of(16, all_to_all="deepep")
    routed = route(trace, batches, linear_of(models), dedup="node")
    for stage in (*models.exchange.dispatch(routed), *models.exchange.combine(routed)):
        flow = stage.flow(0, 0, "dispatch")
        rate = flow.bytes / flow.alone_us / 1e3
        assert (rate <= models.links.line_gb_per_s[flow.link_idx]).all()
