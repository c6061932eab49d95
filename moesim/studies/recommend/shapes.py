"""Engines of one model on one cluster that a serving engine can run: its parallelism and exchange.

vLLM takes any tensor times data parallelism and cuts or places experts over all of it
(`--enable-expert-parallel`); SGLang the same (`--dp-size` within `--tp-size`, `--ep-size`);
TensorRT-LLM either tensor or data parallelism in attention (`enable_attention_dp`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from moesim.choices import MoeComm, Overlap
from moesim.cluster import Cluster, load_cluster
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.memory import gpu_memory

if TYPE_CHECKING:
    from moesim.model.spec import ModelSpec
    from moesim.serving.engines import EngineProfile

Role = Literal["mixed", "prefill", "decode"]
MAX_ENGINE_GPUS = 64
EXCHANGES: Mapping[Role, tuple[MoeComm, ...]] = {
    "mixed": ("all_gather", "deepep"),
    "prefill": ("all_gather", "deepep"),
    "decode": ("all_gather", "deepep_ll"),
}
"""What each role may send tokens to experts by, where attention is data-parallel: DeepEP's
low-latency kernels take few tokens per rank, as decoding engines have."""
AUTO: Mapping[MoeComm, MoeComm] = {"deepep": "deepep_auto"}
"""SGLang chooses DeepEP's kernels step by step in engines that do both."""
BUDGETS: Mapping[Role, tuple[int, ...]] = {
    "mixed": (2048, 8192),
    "prefill": (8192, 16384),
    "decode": (0,),
}
"""Tokens of a step of one rank to try; 0 is the engine's default."""
OVERLAPS: Mapping[Role, Overlap] = {"mixed": "both", "prefill": "prefill", "decode": "decode"}
"""Two-batch overlap of each role: vLLM's --enable-dbo, SGLang's --enable-two-batch-overlap."""
NVLINK_DOMAIN = 8
"""GPUs of a node beyond which its own all-to-all over NVLink is tried."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Parallelism of one engine; `budget` tokens of a step of one rank, 0 for the default;
    redundant: experts beyond one each, placed by the engine's EPLB, 0 without it."""

    tp: int
    dp: int
    ep: int
    moe_comm: MoeComm
    budget: int
    overlap: Overlap = "off"
    redundant: int = 0

    @property
    def num_gpus(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True, slots=True)
class Place:
    """What engines are made of: the model, a cluster by name or file, the serving engine, and what
    is the same for all of them (arguments of `deploy`)."""

    model: ModelSpec
    cluster: str
    profile: EngineProfile
    options: Mapping[str, Any]

    @property
    def engine(self) -> str:
        """Name of the serving engine."""
        return self.profile.name

    def deployment(self, shape: Shape) -> Deployment:
        """Raises what `deploy` raises where the shape is none."""
        given = dict(self.options)
        if shape.budget:
            given["max_batch_tokens"] = shape.budget
        return deploy(
            self.model,
            sized(self.cluster, shape.num_gpus),
            engine=self.profile,
            tp=shape.tp,
            dp=shape.dp,
            ep=shape.ep,
            moe_comm=shape.moe_comm,
            two_batch_overlap=shape.overlap,
            redundant_experts=shape.redundant or None,
            **given,
        )


@cache
def sized(cluster: str, num_gpus: int) -> Cluster:
    """The cluster with as many GPUs."""
    return load_cluster(cluster, num_gpus)


@cache
def node_gpus(cluster: str) -> int:
    """GPUs of a node of the cluster."""
    return load_cluster(cluster).gpus_per_node


def shapes(place: Place, role: Role, max_gpus: int) -> Iterator[Shape]:
    """Every shape to try, sizes in powers of two; tensor parallelism and cut experts stay within a
    node."""
    model, node = place.model, node_gpus(place.cluster)
    size = 1
    while size <= min(max_gpus, MAX_ENGINE_GPUS):
        for tp in (2**i for i in range(size.bit_length())):
            if size % tp or tp > node or model.attention.num_heads % tp:
                continue
            if place.engine == "trtllm" and tp not in (1, size):
                continue
            dp = size // tp
            for ep in dict.fromkeys((size, 1)):
                cut = size // ep
                if ep > model.num_experts or cut > node or model.moe_intermediate_size % cut:
                    continue
                plain = [Shape(tp, dp, ep, c, 0) for c in _exchanges(place, role, dp, cut)]
                for shape in plain:
                    for other in _variants(place, role, shape):
                        yield from (replace(other, budget=budget) for budget in BUDGETS[role])
        size *= 2


def _exchanges(place: Place, role: Role, dp: int, cut: int) -> tuple[MoeComm, ...]:
    if dp == 1:
        return ("all_reduce",)
    if cut > 1:
        return ("all_gather",)
    found = EXCHANGES[role]
    if place.engine == "sglang" and role == "mixed":
        found = tuple(AUTO.get(comm, comm) for comm in found)
    if node_gpus(place.cluster) > NVLINK_DOMAIN and place.engine != "sglang":
        found = (*found, "nvlink")
        if place.engine == "vllm":
            found = (*found, "nvlink_one_sided")
    return found


def _variants(place: Place, role: Role, shape: Shape) -> Iterator[Shape]:
    """The shape as it is; with two-batch overlap where the engine has it for its exchange; with a
    redundant expert per GPU where a trace says how experts are loaded."""
    yield shape
    if shape.moe_comm.startswith("deepep") and place.engine != "trtllm":
        yield replace(shape, overlap=OVERLAPS[role])
    if shape.ep > 1 and place.options.get("trace") is not None:
        yield replace(shape, redundant=shape.ep)


def fits(deployment: Deployment, longest: int) -> bool:
    """Whether a rank's KV cache holds the longest request."""
    return gpu_memory(deployment).kv_token_capacity >= longest
