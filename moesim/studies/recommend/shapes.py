"""Engines of one model on one cluster that a serving engine can run: its parallelism and exchange.

vLLM takes any tensor times data parallelism and cuts or places experts over all of it
(`--enable-expert-parallel`); SGLang the same (`--dp-size` within `--tp-size`, `--ep-size`);
TensorRT-LLM either tensor or data parallelism in attention (`enable_attention_dp`). All three have
pipeline stages; they are tried in engines that do both, and in SGLang and TensorRT-LLM in those for
prompts, without data-parallel attention and without speculation. vLLM's usual connector does not
take caches from stages (vllm-project/vllm issue 52913; its push mode does since pull 45880).
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
    from moesim.serving.speculative import Speculation

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
"""Tokens of a step of one rank to try; 0 is the engine's default. Mixed engines are also tried with
the largest step that is replayed as a CUDA graph."""
OVERLAPS: Mapping[Role, Overlap] = {"mixed": "both", "prefill": "prefill", "decode": "decode"}
"""Two-batch overlap of each role: vLLM's --enable-dbo, SGLang's --enable-two-batch-overlap."""
NVLINK_DOMAIN = 8
"""GPUs of a node beyond which its own all-to-all over NVLink is tried."""
STAGES = (2, 4, 8)
"""Pipeline stages to try."""
STAGED_PREFILL = ("sglang", "trtllm")
"""Engines whose prompt engines may have stages where decoding is apart."""
APART = 4
"""With experts on GPUs of their own, at most so many times as many GPUs in one pool as in the
other."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Parallelism of one engine; `budget` tokens of a step of one rank, 0 for the default;
    redundant: experts beyond one each, placed by the engine's EPLB, 0 without it; expert_gpus:
    GPUs that hold routed experts alone, 0 where attention's do; cluster: where it is, "" for the
    first of its `Place`."""

    tp: int
    dp: int
    ep: int
    moe_comm: MoeComm
    budget: int
    overlap: Overlap = "off"
    redundant: int = 0
    pp: int = 1
    expert_gpus: int = 0
    cluster: str = ""

    @property
    def num_gpus(self) -> int:
        return self.tp * self.dp * self.pp + self.expert_gpus

    @property
    def parallelism(self) -> str:
        """As "tp1 dp8 ep8"; what is 1 is left out but for tp."""
        parts = [f"tp{self.tp}"]
        parts += [f"dp{self.dp}"] if self.dp > 1 else []
        parts += ["+"] if self.expert_gpus else []
        parts += [f"ep{self.ep}"] if self.ep > 1 or self.expert_gpus else []
        return " ".join([*parts, *([f"pp{self.pp}"] if self.pp > 1 else [])])


@dataclass(frozen=True, slots=True)
class Place:
    """What engines are made of: the model, a cluster by name or file, the serving engine, and what
    is the same for all of them (arguments of `deploy`).

    decode_cluster: where decoding engines are, "" where the others are; with it prompts and
    decoding are always apart. speculation: how engines that decode draft. redundancy: whether
    redundant experts are tried. apart: decoding engines have their experts on GPUs of their own.
    """

    model: ModelSpec
    cluster: str
    profile: EngineProfile
    options: Mapping[str, Any]
    decode_cluster: str = ""
    speculation: Speculation | None = None
    redundancy: bool = False
    apart: bool = False

    @property
    def engine(self) -> str:
        """Name of the serving engine."""
        return self.profile.name

    @property
    def clusters(self) -> tuple[str, ...]:
        """All clusters that engines are on."""
        return (self.cluster, self.decode_cluster) if self.decode_cluster else (self.cluster,)

    def cluster_of(self, shape: Shape) -> str:
        """Name or file of the cluster that an engine is on."""
        return shape.cluster or self.cluster

    def deployment(self, shape: Shape) -> Deployment:
        """Raises what `deploy` raises where the shape is none."""
        given = dict(self.options)
        if shape.budget:
            given["max_batch_tokens"] = shape.budget
        return deploy(
            self.model,
            sized(self.cluster_of(shape), shape.num_gpus),
            engine=self.profile,
            tp=shape.tp,
            dp=shape.dp,
            pp=shape.pp,
            ep=shape.ep,
            expert_gpus=shape.expert_gpus or None,
            moe_comm=shape.moe_comm,
            two_batch_overlap=shape.overlap,
            redundant_experts=shape.redundant or None,
            mtp=self.speculation is not None,
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
    cluster = place.decode_cluster if role == "decode" else ""
    if place.decode_cluster and role == "mixed":
        return
    if place.apart and role != "prefill":
        plain = _apart(place, max_gpus) if role == "decode" else iter(())
    else:
        plain = _together(place, role, max_gpus)
    for shape in plain:
        graphs = place.profile.graph_rows if role == "mixed" else 0
        budgets = (*((graphs,) if graphs else ()), *BUDGETS[role])
        yield from (replace(shape, budget=n, cluster=cluster) for n in budgets)


def _together(place: Place, role: Role, max_gpus: int) -> Iterator[Shape]:
    """Experts on attention's GPUs."""
    node, most = _node_of(place, role), min(max_gpus, MAX_ENGINE_GPUS)
    staged = role == "mixed" or (role == "prefill" and place.engine in STAGED_PREFILL)
    for tp, dp in _attention(place, role, most):
        size = tp * dp
        for ep in dict.fromkeys((size, 1)):
            cut = size // ep
            if ep > place.model.num_experts or cut > node:
                continue
            if place.model.moe_intermediate_size % cut:
                continue
            for comm in _exchanges(place, role, dp, cut):
                shape = Shape(tp, dp, ep, comm, 0)
                yield from _variants(place, role, shape)
                if staged and dp == 1 and place.speculation is None:
                    fit = [n for n in STAGES if n * size <= most]
                    fit = [n for n in fit if n <= place.model.num_hidden_layers]
                    yield from (replace(shape, pp=stages) for stages in fit)


def _apart(place: Place, max_gpus: int) -> Iterator[Shape]:
    """Attention and experts each on GPUs of their own, in decoding engines."""
    comm: MoeComm = "nvlink" if _node_of(place, "decode") > NVLINK_DOMAIN else "deepep_ll"
    most = min(max_gpus, MAX_ENGINE_GPUS)
    for tp, dp in _attention(place, "decode", most - 1):
        for experts in (2**i for i in range(most.bit_length())):
            few, many = sorted((tp * dp, experts))
            if few + many > most or many > APART * few or experts > place.model.num_experts:
                continue
            yield Shape(tp, dp, experts, comm, 0, expert_gpus=experts)


def _attention(place: Place, role: Role, most: int) -> Iterator[tuple[int, int]]:
    """Tensor and data parallelism of attention on up to `most` GPUs, fewest first."""
    for size in (2**i for i in range(most.bit_length())):
        for tp in (2**i for i in range(size.bit_length())):
            if tp > _node_of(place, role) or place.model.attention.num_heads % tp:
                continue
            if place.engine != "trtllm" or tp in (1, size):
                yield tp, size // tp


def _node_of(place: Place, role: Role) -> int:
    return node_gpus((place.decode_cluster if role == "decode" else "") or place.cluster)


def _exchanges(place: Place, role: Role, dp: int, cut: int) -> tuple[MoeComm, ...]:
    if dp == 1:
        return ("all_reduce",)
    if cut > 1:
        return ("all_gather",)
    found = EXCHANGES[role]
    if place.engine == "sglang" and role == "mixed":
        found = tuple(AUTO.get(comm, comm) for comm in found)
    if _node_of(place, role) > NVLINK_DOMAIN and place.engine != "sglang":
        found = (*found, "nvlink")
        if place.engine == "vllm":
            found = (*found, "nvlink_one_sided")
    return found


def _variants(place: Place, role: Role, shape: Shape) -> Iterator[Shape]:
    """The shape as it is; with two-batch overlap where the engine has it for its exchange; with a
    redundant expert per GPU where those are tried."""
    yield shape
    if shape.moe_comm.startswith("deepep") and place.engine != "trtllm":
        yield replace(shape, overlap=OVERLAPS[role])
    if shape.ep > 1 and place.redundancy:
        yield replace(shape, redundant=shape.ep)


def fits(deployment: Deployment, longest: int) -> bool:
    """Whether a rank's KV cache holds the longest request."""
    return gpu_memory(deployment).kv_token_capacity >= longest
