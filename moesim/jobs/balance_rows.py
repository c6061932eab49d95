"""Every scheme of a `balance` run: its steps, its figures, and what it is worth to requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moesim.errors import MoesimError
from moesim.jobs.balance_result import Row
from moesim.jobs.balance_setup import Setup
from moesim.planning.balancing.bench import PARTS, Bench, Outcome
from moesim.planning.balancing.service import Load, Served, serve_schemes
from moesim.planning.evaluate import Interval
from moesim.serving.config import Stall
from moesim.serving.deployment import deploy
from moesim.serving.memory import gpu_memory
from moesim.trace.format import Trace

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec
    from moesim.planning.balancing.bench import Scheme
    from moesim.planning.balancing.course import Course
    from moesim.serving.requests import Requests
    from moesim.serving.slo import Slo
    from moesim.types import FloatArray, Progress


def run_schemes(setup: Setup, kv: float | None, progress: Progress | None) -> tuple[Row, ...]:
    """A row for each scheme, `none` first. kv: bytes of a GPU's KV cache without redundant slots,
    None where it is not known."""
    rows: list[Row] = []
    none: Outcome | None = None
    for scheme in setup.schemes:
        done = scheme.run(setup.bench)
        none = none or done
        rows.append(_row(setup.bench, scheme, done, none, kv, setup.phase == "decode"))
        if progress is not None:
            progress(len(rows), len(setup.schemes))
    setup.notices.extend(setup.bench.notices)
    return tuple(rows)


def kv_bytes(model: ModelSpec, cluster: Cluster, notices: list[str]) -> float | None:
    """KV cache of a GPU with attention data-parallel and no redundant slots, None with a notice
    where the model cannot be deployed so."""
    try:
        memory = gpu_memory(deploy(model, cluster, tp=1, dp=cluster.num_gpus))
    except MoesimError as error:
        notices.append(f"the KV cache is not known, redundant slots are not charged: {error.cause}")
        return None
    if memory.kv_cache_bytes <= 0:
        notices.append("no memory is left for a KV cache: redundant slots are not charged")
        return None
    return memory.kv_cache_bytes


def served(
    rows: Sequence[Row], setup: Setup, requests: Requests, slo: Slo | None
) -> dict[str, Served]:
    """What every scheme is worth to the requests, those left out whose slots leave no KV cache."""
    setting = setup.setting
    base = rows[0].step_us.value
    loads = {}
    for row in rows:
        done, share = row.outcome, row.kv_share
        if share is not None and share <= 0:
            continue
        stall = None
        if done.num_plans and done.stall_us:
            stall = Stall(
                max(1, round(row.num_steps / done.num_plans)), done.stall_us / done.num_plans
            )
        moe_us = row.step_us.value - done.stall_us / row.num_steps
        loads[row.name] = Load(moe_us / base, 1.0 if share is None else share, stall)
    trace = setting.trace if isinstance(setting.trace, Trace) else None
    deployment = deploy(
        setting.model, setting.cluster, tp=1, dp=setting.cluster.num_gpus, trace=trace
    )
    return serve_schemes(deployment, requests, loads, slo)


def _row(
    bench: Bench, scheme: Scheme, done: Outcome, none: Outcome, kv: float | None, decode: bool
) -> Row:
    course, base = bench.course, none.priced.step_us
    spread = (done.stall_us + done.slowed_us) / course.num_steps
    time = done.priced.step_us + spread
    layers = course.trace.num_layers

    def slot_bytes(outcome: Outcome) -> float:
        return bench.expert_bytes * (outcome.slots * layers + outcome.pool)

    left = None if kv is None else kv - slot_bytes(done)
    share = None
    if kv is not None and left is not None:
        share = left / max(kv - slot_bytes(none), 1e-9)
        if share <= 0:
            done = replace(done, note="its slots leave no KV cache")
    charged = time / max(share, 1e-9) if decode and share is not None else time
    saved = float((base - done.priced.step_us).mean())
    return Row(
        name=scheme.name,
        about=scheme.about,
        outcome=done,
        step_us=course.interval(time),
        against_none=_against(course, time, base),
        charged=_against(course, charged, base),
        imbalance=course.interval(done.priced.imbalance),
        parts_us={
            **{name: float(done.priced.parts_us[name].mean()) for name in PARTS},
            "stalls": spread,
        },
        kv_bytes_less=slot_bytes(done) - slot_bytes(none),
        kv_share=share,
        pays_from_steps=_pays_from(done, saved),
        switch_pays_from_steps=done.switch_us / saved if saved > 0 else None,
        num_steps=course.num_steps,
    )


def _against(course: Course, time: FloatArray, base: FloatArray) -> Interval:
    """Mean of `time` over that of `base`, less 1, paired."""
    found = course.interval(time - base)
    mean = float(base.mean())
    return Interval(found.value / mean, found.low / mean, found.high / mean)


def _pays_from(done: Outcome, saved: float) -> float | None:
    """Steps between plans from which a plan's stall is less than what its steps save, as they were
    saved at the interval that was run."""
    lost = done.stall_us + done.slowed_us
    if not done.num_plans or lost <= 0:
        return None
    return lost / done.num_plans / saved if saved > 0 else float("inf")
