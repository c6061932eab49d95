"""The answer as files: launch lines and settings of its first option, its benchmark, and with a
trace the placement of its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesim.exporters.base import ExportOptions, filled
from moesim.exporters.launch import sglang, trtllm, vllm
from moesim.exporters.launch.base import Role, Service
from moesim.exporters.registry import exporter
from moesim.jobs.plan import plan
from moesim.studies.recommend.shapes import node_gpus

if TYPE_CHECKING:
    from moesim.studies.recommend.need import Need
    from moesim.studies.recommend.shapes import Place

WRITERS = {"vllm": vllm.files, "sglang": sglang.files, "trtllm": trtllm.files}
SHARED = ("tp", "dp", "ep", "moe_tp", "moe_comm", "kv_dtype", "max_batch_tokens")
MORE = ("max_sequences", "memory_fraction", "two_batch_overlap", "redundant_experts", "pp", "gpu")
PLACED = {"sglang": ("sglang", ".json"), "trtllm": ("tensorrt-llm", ".yaml")}
"""Engines that load a placement, as the exporters call them, and the ending of their file."""
NO_LIMIT_S = 1e6
"""The planner ends by the work that it counts, not by the clock."""


def launch_files(
    answer: Mapping[str, Any], need: Need, model: str, place: Place
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Text by file name, and what the user should know of it. model: what the engine calls it."""
    best, traced = answer["options"][0], place.options["trace"] is not None
    roles: list[Role] = []
    out: dict[str, str] = {}
    notices: dict[str, None] = {}
    for name, role in best["roles"].items():
        placement = _placement(answer, name, role, place, notices) if traced else {}
        out |= placement
        roles.append(
            Role(
                name,
                role["engines"],
                gpus_per_node=node_gpus(_cluster(answer, name)),
                placement=next(iter(placement), ""),
                unplaced=traced and role["ep"] > 1 and not placement,
                **{key: role[key] for key in (*SHARED, *MORE)},
            )
        )
    drafts = 0 if answer["speculation"] is None else answer["speculation"]["drafts"]
    load = best["requests_per_s"], need.prompt, need.output
    service = Service(model, roles, *load, place.model.num_experts, drafts)
    return {**WRITERS[answer["engine"]](service), **out}, tuple(notices)


def _placement(
    answer: Mapping[str, Any],
    name: str,
    role: Mapping[str, Any],
    place: Place,
    notices: dict[str, None],
) -> dict[str, str]:
    """The role's experts placed from the trace, for its expert-parallel ranks, by file name; none
    where experts are not whole or the engine loads none."""
    if answer["engine"] not in PLACED or role["ep"] == 1 or role["moe_tp"] > 1 or role["pp"] > 1:
        return {}
    engine, ending = PLACED[answer["engine"]]
    made = plan(
        place.options["trace"],
        gpus=role["ep"],
        cluster=_cluster(answer, name),
        model=place.model,
        redundant_experts=role["redundant_experts"],
        ignore_memory=True,
        time_limit=NO_LIMIT_S,
    )
    layers = place.model.moe_layer_ids
    options = ExportOptions(place.model, fill_layers=layers, notify=notices.setdefault)
    text = exporter(engine).encode(filled(made.plan, options), options)
    return {f"placement-{name}{ending}": text.decode()}


def _cluster(answer: Mapping[str, Any], role: str) -> str:
    name: str = answer["cluster"]
    return answer["decode_cluster"] or name if role == "decode" else name
