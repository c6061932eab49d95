"""The answer as files: launch lines and settings of its first option, and its benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesim.exporters.launch import sglang, trtllm, vllm
from moesim.exporters.launch.base import Role, Service
from moesim.studies.recommend.shapes import node_gpus

if TYPE_CHECKING:
    from moesim.studies.recommend.need import Need

WRITERS = {"vllm": vllm.files, "sglang": sglang.files, "trtllm": trtllm.files}
SHARED = ("tp", "dp", "ep", "moe_tp", "moe_comm", "kv_dtype", "max_batch_tokens")
MORE = ("max_sequences", "memory_fraction", "two_batch_overlap", "redundant_experts", "pp", "gpu")


def launch_files(
    answer: Mapping[str, Any], need: Need, model: str, num_experts: int
) -> Mapping[str, str]:
    """Text by file name. model: what the engine calls it."""
    best = answer["options"][0]
    roles = [
        Role(
            name,
            role["engines"],
            gpus_per_node=node_gpus(_cluster(answer, name)),
            **{key: role[key] for key in (*SHARED, *MORE)},
        )
        for name, role in best["roles"].items()
    ]
    drafts = 0 if answer["speculation"] is None else answer["speculation"]["drafts"]
    load = best["requests_per_s"], need.prompt, need.output
    return WRITERS[answer["engine"]](Service(model, roles, *load, num_experts, drafts))


def _cluster(answer: Mapping[str, Any], role: str) -> str:
    name: str = answer["cluster"]
    return answer["decode_cluster"] or name if role == "decode" else name
