"""A deployment: one replica of a serving engine, its GPUs and how the model is spread over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from moesim.choices import MoeComm as MoeComm
from moesim.choices import Overlap as Overlap
from moesim.cluster import DEFAULT_CLUSTER, load_cluster
from moesim.cost.calibration import calibration_names, load_calibration
from moesim.cost.library import default_library
from moesim.cost.step import calibration_of_gpu, family_of
from moesim.errors import InputError
from moesim.model.names import load_model
from moesim.serving.deployment_checks import check_deployment
from moesim.serving.engines import EngineProfile, engine_profile

if TYPE_CHECKING:
    from moesim.cluster import Cluster, GpuSpec
    from moesim.cost.calibration import Calibration
    from moesim.model.spec import ModelSpec
    from moesim.placement import Plan
    from moesim.trace.format import Trace


@dataclass(frozen=True, eq=False)
class Deployment:
    """One engine replica of `num_gpus` = tp x dp x pp GPUs, and `expert_gpus` more where given.

    tp: tensor-parallel ranks of attention and dense layers. dp: data-parallel attention ranks,
    each with requests and a KV cache of its own. pp: pipeline stages. ep, moe_tp: the same tp x dp
    GPUs of a stage as seen by the routed experts: ep groups that hold different experts, each
    expert's matrices cut in moe_tp.
    expert_dtype, dense_dtype, kv_dtype: weights of routed experts, of the rest, and the KV cache.
    max_batch_tokens: rows of a step of one DP rank (the chunked-prefill budget); max_sequences:
    running sequences of one DP rank; memory_fraction: share of the GPU's memory the engine uses.
    moe_comm: how tokens reach their experts. all_reduce: every rank has all tokens, partial sums
    are added (TP and TP+EP without attention DP). all_gather: gathered over DP ranks before, reduce
    scattered after. nccl, deepep, deepep_ll, deepep_v2, nvlink, nvlink_one_sided: all-to-all.
    deepep_auto: deepep in steps with prompt tokens and deepep_ll in steps without (SGLang's
    --deepep-mode auto).
    plan, trace: placement of the experts (ep = num_gpus of the plan) and the routing it serves;
    without a trace the skew of the routing is assumed (`moesim.serving.moe_load`).
    redundant_experts: further slots per layer, filled by EPLB on the popularity of the experts, as
    if it were known; None leaves experts in their order. Not with a plan, which has its own.
    two_batch_overlap: steps with prompt tokens (prefill), without (decode), or both as two halves,
    one computing while the other communicates (`moesim.serving.overlap`); needs attention DP.
    kv_scale: bytes of the KV cache, stored, read and sent, by those of its precision, where it is
    compressed. kv_window: tokens of a sequence that are kept and attended to, the last ones, in
    every layer; None for all. What either costs in quality is not claimed.
    expert_gpus: so many GPUs hold the routed experts and nothing else (ep x moe_tp, the last of the
    cluster), the tp x dp others the rest, and a step goes back and forth between them in up to
    `micro_batches` parts (`moesim.serving.apart`). None: experts are on attention's GPUs.
    mtp: the model's multi-token-prediction layers are held, and the first drafts tokens for
    speculative decoding.
    dispatch_tokens: rows per GPU that buffers of DeepEP's low-latency kernels hold; more go in
    rounds.
    calibration: measured kernels, by default the cluster's. imbalance_scale: experts' popularity
    differs from the mean by so many times as much, for what-if studies.

    Build it with `deploy`, which fills in what is not given, or directly; both validate. Raises
    InputError or MismatchError that name the field.
    """

    model: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    tp: int
    dp: int
    pp: int
    ep: int
    moe_tp: int
    expert_dtype: str
    dense_dtype: str
    kv_dtype: str
    max_batch_tokens: int
    max_sequences: int
    memory_fraction: float
    moe_comm: MoeComm
    plan: Plan | None = None
    trace: Trace | None = None
    calibration: Calibration | None = None
    imbalance_scale: float = 1.0
    redundant_experts: int | None = None
    two_batch_overlap: Overlap = "off"
    kv_scale: float = 1.0
    kv_window: int | None = None
    expert_gpus: int | None = None
    micro_batches: int = 3
    mtp: bool = False
    dispatch_tokens: int = 256

    def __post_init__(self) -> None:
        check_deployment(self)

    @property
    def num_gpus(self) -> int:
        """GPUs of the replica."""
        return self.tp * self.dp * self.pp + (self.expert_gpus or 0)

    @property
    def attention_gpus(self) -> tuple[GpuSpec, ...]:
        """Those of all but the routed experts: all, or all but the last `expert_gpus`."""
        return self.cluster.gpus[: self.tp * self.dp * self.pp]

    def slowest_of(self, gpus: Iterable[int]) -> int:
        """The GPU of these with the lowest memory rate, its speed factor included."""
        speed = self.cluster.speed_factor
        return min(gpus, key=lambda g: self.cluster.gpus[g].hbm_gb_per_s * speed[g])

    @property
    def gpu(self) -> GpuSpec:
        """The type of attention's slowest GPU, which every step waits for."""
        return self.cluster.gpus[self._slowest]

    @property
    def speed(self) -> float:
        """The speed factor of that GPU."""
        return float(self.cluster.speed_factor[self._slowest])

    @property
    def _slowest(self) -> int:
        return self.slowest_of(range(self.tp * self.dp * self.pp))

    @property
    def link_gpu(self) -> GpuSpec:
        """The type with the slowest NVLink, whose kernels the exchange takes."""
        return min(self.cluster.gpus, key=lambda gpu: gpu.nvlink_gb_per_s)

    @property
    def expert_ranks(self) -> list[list[int]]:
        """GPUs of each expert-parallel rank: its `moe_tp` GPUs in every stage."""
        stage = self.ep * self.moe_tp
        first = self.tp * self.dp if self.expert_gpus else 0
        starts = [first + s * stage for s in range(self.pp)]
        return [
            [at + r * self.moe_tp + i for at in starts for i in range(self.moe_tp)]
            for r in range(self.ep)
        ]

    @property
    def is_mixed(self) -> bool:
        """Whether GPUs that share a role differ in type or speed."""
        every = list(zip(self.cluster.gpus, self.cluster.speed_factor.tolist(), strict=True))
        own = self.tp * self.dp * self.pp
        return len(set(every[:own])) > 1 or len(set(every[own:])) > 1

    @property
    def name(self) -> str:
        """Short label: model, GPUs and parallelism."""
        return f"{self.model.name} on {self.num_gpus} x {self.gpu_names}, {self.parallelism}"

    @property
    def gpu_names(self) -> str:
        """The GPU type, or all of them: "h100-sxm/a100-sxm"."""
        return "/".join(dict.fromkeys(gpu.name for gpu in self.cluster.gpus))

    @property
    def parallelism(self) -> str:
        """As "tp1 dp8 ep8", or "tp1 dp4 + ep4" with experts on GPUs of their own; what is 1 is left
        out but for tp."""
        parts = [f"tp{self.tp}"]
        parts += [f"dp{self.dp}"] if self.dp > 1 else []
        if self.expert_gpus is not None:
            return " ".join([*parts, "+", f"ep{self.ep}"])
        parts += [f"ep{self.ep}"] if self.ep > 1 else []
        parts += [f"pp{self.pp}"] if self.pp > 1 else []
        return " ".join(parts)


def deploy(
    model: ModelSpec | str,
    cluster: Cluster | str = DEFAULT_CLUSTER,
    *,
    engine: EngineProfile | str = "vllm",
    tp: int | None = None,
    dp: int = 1,
    pp: int = 1,
    ep: int | None = None,
    moe_tp: int | None = None,
    num_gpus: int | None = None,
    expert_dtype: str | None = None,
    dense_dtype: str | None = None,
    kv_dtype: str = "bf16",
    max_batch_tokens: int | None = None,
    max_sequences: int | None = None,
    memory_fraction: float | None = None,
    moe_comm: MoeComm | None = None,
    plan: Plan | None = None,
    trace: Trace | None = None,
    redundant_experts: int | None = None,
    two_batch_overlap: Overlap = "off",
    kv_scale: float = 1.0,
    kv_window: int | None = None,
    expert_gpus: int | None = None,
    micro_batches: int = 3,
    mtp: bool = False,
    dispatch_tokens: int | None = None,
    calibration: Calibration | None = None,
) -> Deployment:
    """A deployment with defaults for what is not given.

    model: a spec or what `load_model` takes. cluster: a cluster of the right size, or a name or
    file that is sized to the deployment. tp: what `num_gpus`, or a cluster given as an object,
    leaves after dp and pp, else 1. ep and
    moe_tp: with attention DP or a plan all experts whole (ep = tp x dp), else cut (moe_tp = tp).
    dtypes as stored in the model; the rest as the engine's profile, max_sequences at most
    max_batch_tokens where decoding shares steps with prompts. moe_comm: all_reduce without
    attention DP; all_gather where experts are cut; else what `cost.step.default_library` takes for
    prompts and for decoding: deepep_auto over several nodes where DeepEP was measured, nvlink where
    that was, nccl.

    Raises what `Deployment` raises, and InputError where the numbers do not divide.
    """
    spec = load_model(model) if isinstance(model, str) else model
    profile = engine_profile(engine) if isinstance(engine, str) else engine
    apart = expert_gpus or 0
    if num_gpus is not None and tp is None:
        if min(num_gpus - apart, dp, pp) < 1 or (num_gpus - apart) % (dp * pp):
            raise InputError(
                f"{num_gpus - apart} GPUs do not divide over dp {dp} x pp {pp}",
                "choose a number of GPUs that is a multiple of dp x pp",
            )
        tp = (num_gpus - apart) // (dp * pp)
    if tp is None and not isinstance(cluster, str):
        tp = max(1, (cluster.num_gpus - apart) // (dp * pp))
    tp = 1 if tp is None else tp
    if num_gpus is not None and num_gpus != tp * dp * pp + apart:
        raise InputError(
            f"tp {tp} x dp {dp} x pp {pp} is not {num_gpus - apart} GPUs", "leave one of them out"
        )
    stage = tp * dp
    holders = expert_gpus or stage
    if ep is None and moe_tp is None:
        ep = holders if dp > 1 or plan is not None or expert_gpus else 1
    ep = holders // max(1, moe_tp or 1) if ep is None else ep
    moe_tp = holders // max(1, ep) if moe_tp is None else moe_tp
    if isinstance(cluster, str):
        cluster = load_cluster(cluster, stage * pp + apart)
    alone = dp == 1 and expert_gpus is None
    provisional: MoeComm = "nccl" if expert_gpus else "all_reduce" if alone else "all_gather"
    comm: MoeComm = moe_comm or provisional
    rows = max_batch_tokens or profile.max_batch_tokens
    mixed = profile.prefill_policy == "mixed"
    most = min(profile.max_sequences, rows) if mixed else profile.max_sequences
    made = Deployment(
        model=spec,
        cluster=cluster,
        engine=profile,
        tp=tp,
        dp=dp,
        pp=pp,
        ep=ep,
        moe_tp=moe_tp,
        expert_dtype=expert_dtype or spec.expert_dtype,
        dense_dtype=dense_dtype or spec.dense_dtype,
        kv_dtype=kv_dtype,
        max_batch_tokens=rows,
        max_sequences=max_sequences or most,
        memory_fraction=memory_fraction or profile.memory_fraction,
        moe_comm=comm,
        plan=plan,
        trace=trace,
        redundant_experts=redundant_experts,
        two_batch_overlap=two_batch_overlap,
        kv_scale=kv_scale,
        kv_window=kv_window,
        expert_gpus=expert_gpus,
        micro_batches=micro_batches,
        mtp=mtp,
        dispatch_tokens=dispatch_tokens or profile.dispatch_tokens,
        calibration=calibration,
    )
    if moe_comm is not None or alone or moe_tp > 1:
        return made
    kernels = calibration or calibration_of(made, made.link_gpu)
    group_nodes = ceil((stage + apart) / cluster.gpus_per_node)
    of_prompts = default_library(kernels, group_nodes, "prefill")
    of_decoding = default_library(kernels, group_nodes, "decode")
    both = of_prompts == "deepep" and of_decoding == "deepep_ll"
    return replace(made, moe_comm="deepep_auto" if both else of_prompts)


def calibration_of(deployment: Deployment, gpu: GpuSpec | None = None) -> Calibration:
    """The engine's own kernels on its GPU ("h200-vllm") where they are bundled, those measured in
    the engine for a shape ("h200-vllm-engine") first, completed by the GPU's calibration and
    datasheet figures. gpu: attention's by default."""
    gpu = gpu or deployment.gpu
    types = {g.name for g in deployment.cluster.gpus}
    general = calibration_of_gpu(gpu, deployment.cluster.calibration, len(types) == 1)
    own = f"{family_of(gpu)}-{deployment.engine.name}"
    names = calibration_names()
    found = load_calibration(own).completed_by(general) if own in names else general
    measured = f"{own}-engine"
    return found.with_measured_in(load_calibration(measured)) if measured in names else found
