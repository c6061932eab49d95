"""Exchanges by the name that `--all-to-all` takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moesim.cost.library import KINDS_OF, check_library
from moesim.cost.scaled import faster_collective, faster_step
from moesim.cost.step import StepModel, build_step_model, calibration_of_gpu
from moesim.errors import InputError
from moesim.sim.collectives.base import Exchange
from moesim.sim.collectives.bi_level import BiLevel
from moesim.sim.collectives.flat import Flat
from moesim.sim.collectives.two_level import TwoLevel
from moesim.sim.links import LinkTable, link_table

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec

HIERARCHICAL: dict[str, type[TwoLevel] | type[BiLevel]] = {
    "two-level": TwoLevel,
    "bi-level": BiLevel,
}
NAMES = (*KINDS_OF, *HIERARCHICAL)


def build_exchange(
    name: str | None,
    cluster: Cluster,
    model: ModelSpec,
    *,
    reduce: float = 1.0,
    network_scale: float = 1.0,
    **options: Any,
) -> tuple[StepModel, LinkTable, Exchange]:
    """The step model, the links and the exchange called `name`; None takes the step model's own
    default. reduce: share of the hidden size that messages carry and experts take, which are wider
    by as much (BigMac, arXiv:2502.16927, abstract read: experts of another shape, about as many
    parameters). network_scale: links taken as so
    many times faster. `options` go to `build_step_model`.

    Raises UnknownNameError for another name, InputError for a hierarchical exchange on one node.
    """
    if name is not None:
        check_library(name, NAMES)
    if not 0 < reduce <= 1:
        raise InputError(f"messages reduced to {reduce} of the hidden size", "give above 0 to 1")
    if name is None or name in KINDS_OF:
        step = build_step_model(cluster, model, all_to_all=name, **options)  # type: ignore[arg-type]
        step = faster_step(_reduced(step, reduce), network_scale)
        links = link_table(cluster, step)
        return step, links, Flat(step, links)
    if cluster.num_nodes < 2:
        raise InputError(
            f"{name} all-to-all on one node of {cluster.num_gpus} GPUs",
            "it has a stage between nodes: use more GPUs, or `all_to_all` nccl",
        )
    kind = HIERARCHICAL[name]
    step = build_step_model(cluster, model, all_to_all="nccl", dedup=kind.dedup, **options)
    step = faster_step(_reduced(step, reduce), network_scale)
    links = link_table(cluster, step)
    slowest = min(cluster.gpus, key=lambda gpu: gpu.nvlink_gb_per_s)
    same = len({gpu.name for gpu in cluster.gpus}) == 1
    calibration = calibration_of_gpu(slowest, cluster.calibration, same)
    nics = links.line_gb_per_s[[c == "nic" for c in links.classes]]
    per_node = cluster.gpus_per_node
    intra = calibration.collective("all_to_all_v", per_node, 1)
    inter = calibration.collective(
        "all_to_all_v",
        cluster.num_nodes,
        cluster.num_nodes,
        nic_gb_per_s=float(nics.min()) if len(nics) else None,
    )
    if network_scale != 1.0:
        intra, inter = (faster_collective(curve, network_scale) for curve in (intra, inter))
    return step, links, kind(step, links, intra, inter, cluster.num_nodes)


def _reduced(step: StepModel, share: float) -> StepModel:
    return replace(
        step,
        dispatch_bytes=step.dispatch_bytes * share,
        combine_bytes=step.combine_bytes * share,
        hidden_size=max(1, round(step.hidden_size * share)),
        intermediate_size=max(1, round(step.intermediate_size / share)),
    )
