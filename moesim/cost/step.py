"""The closed-form cost of a forward step (C1 to C7 of the design).

A `StepModel` holds what does not depend on the placement: link tables, collective curves and
expert time tables of a model on a cluster. `StepModel.cost` turns a `Routed` batch set into
microseconds for every batch and layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.choices import AllToAll as AllToAll
from moesim.cost.calibration import Calibration, calibration_names, load_calibration
from moesim.cost.collective import CollectiveCurve
from moesim.cost.curves import Basis, weakest
from moesim.cost.datasheet import GpuFigures, datasheet_models
from moesim.cost.expert_gemm import ExpertGemmModel
from moesim.cost.library import (
    DEDUP_OF,
    KINDS_OF,
    check_library,
    check_one_domain,
    default_library,
    dispatch_dtype_of,
)
from moesim.cost.routing import DEDUP_CODES, Dedup, Routed
from moesim.errors import MismatchError, UnknownNameError
from moesim.kernels import kernel
from moesim.trace.batches import Phase
from moesim.types import Array, FloatArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster, GpuSpec
    from moesim.model.spec import ModelSpec


BYTES_PER_ELEMENT = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0 + 4.0 / 128}
"""Bytes of one element of a message; fp8 carries one float32 scale per 128 elements, as DeepEP."""

OTHER_LINK_EFFICIENCY = 0.85
NVLINK, NIC, OTHER = 0, 1, 2
TILE_ROWS, TILE_GPUS = 16, 32
_EXPERT_DTYPES: dict[str, tuple[str, ...]] = {
    "bf16": ("bfloat16", "bf16"),
    "fp8": ("fp8_block", "fp8"),
    "mxfp4": ("mxfp4", "w4a16_mxfp4", "fp4"),
    "int4": ("int4",),
}


@dataclass(frozen=True, slots=True, eq=False)
class StepCost:
    """Microseconds of the MoE part of a step.

    dispatch_us, combine_us: [B, L]; compute_us: [B, L, G]; layer_us: [B, L], dispatch then the
    slowest GPU's compute then combine (C5); link_bytes: [B, L, links] of dispatch and combine
    together.
    """

    dispatch_us: FloatArray
    compute_us: FloatArray
    combine_us: FloatArray
    link_bytes: FloatArray

    @property
    def layer_us(self) -> FloatArray:
        return self.dispatch_us + self.compute_us.max(axis=2) + self.combine_us

    @property
    def layer_parts_us(self) -> FloatArray:
        """[B, L, 3]: dispatch, the slowest GPU's compute, combine; they add up to layer_us."""
        slowest = self.compute_us.max(axis=2)
        return np.stack([self.dispatch_us, slowest, self.combine_us], axis=2)

    @property
    def step_us(self) -> FloatArray:
        """[B]: all MoE layers of one forward step, one after the other."""
        return self.layer_us.sum(axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class StepModel:
    """What a step costs on one cluster for one model, whatever the placement.

    link_group: [links] int8, 0 NVLink, 1 NIC, 2 other (PCIe, leaf to spine), -1 never used by
    messages. link_scale: [links], the rate of the group's reference link over the link's own.
    gpu_type: [G], index into `experts`; speed: [G].
    basis: the weakest kind of figure the predictions rest on; `notes` say which part is which.
    """

    hidden_size: int
    intermediate_size: int
    all_to_all: AllToAll
    dedup: Dedup
    dispatch_bytes: float
    combine_bytes: float
    dispatch: CollectiveCurve
    combine: CollectiveCurve
    experts: tuple[ExpertGemmModel, ...]
    gpu_type: npt.NDArray[np.int64]
    speed: FloatArray
    route_indptr: npt.NDArray[np.int64]
    route_links: npt.NDArray[np.int32]
    link_group: npt.NDArray[np.int8]
    link_scale: FloatArray
    other_gb_per_s: float
    basis: Basis
    ffn_matrices: int = 3
    eager: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def num_gpus(self) -> int:
        return len(self.speed)

    def collective_us(self, curve: CollectiveCurve, group_bytes: FloatArray) -> FloatArray:
        """Time of a collective whose busiest link of each group carries `group_bytes` [..., 3]
        (scaled to the group's reference link); zero where nothing is sent."""
        nvlink, nic, other = np.moveaxis(group_bytes, -1, 0)
        time = curve.time_us(nvlink, nic)
        if self.other_gb_per_s > 0:
            rate = self.other_gb_per_s * OTHER_LINK_EFFICIENCY * 1e3
            time = np.maximum(time, np.where(other > 0, curve.latency_us + other / rate, 0.0))
        return np.where(group_bytes.max(axis=-1) > 0, time, 0.0)

    def link_messages(self, messages: npt.NDArray[Any]) -> FloatArray:
        """[..., links]: messages that cross each link, for `messages` [..., G, G]."""
        return self.both_ways(messages)[0]

    def both_ways(self, messages: npt.NDArray[Any]) -> FloatArray:
        """[2, ..., links]: messages that cross each link, for `messages` [..., G, G], and for as
        many the other way. Counts are whole, so the sums are exact in any order."""
        flat = np.ascontiguousarray(messages).reshape(-1, self.num_gpus**2)
        out = np.zeros((2, len(flat), len(self.link_group)))
        cross_kernel(flat, self.num_gpus, self.route_indptr, self.route_links, out)
        return out.reshape(2, *messages.shape[:-2], -1)

    def group_max(self, link_load: FloatArray) -> FloatArray:
        """[..., 3]: the largest scaled load over the links of each group."""
        scaled = link_load * self.link_scale
        out = np.zeros((*link_load.shape[:-1], 3))
        for group in (NVLINK, NIC, OTHER):
            picked = self.link_group == group
            if picked.any():
                out[..., group] = scaled[..., picked].max(axis=-1)
        return out

    def expert_tables_us(self, max_tokens: int) -> FloatArray:
        """[types, max_tokens + 1]: time of one expert by its tokens, launch excluded, whatever the
        other experts of the layer have."""
        return np.stack(
            [
                model.time_table_us(
                    max_tokens, self.hidden_size, self.intermediate_size, self.ffn_matrices
                )
                for model in self.experts
            ]
        )

    def message_tables_us(self, max_messages: int) -> FloatArray:
        """[2, 3, max_messages + 1]: dispatch and combine time when the busiest link of one group
        carries m messages and the other groups none."""
        tables = np.zeros((2, 3, max_messages + 1))
        count = np.arange(max_messages + 1, dtype=np.float64)
        for i, (curve, size) in enumerate(
            ((self.dispatch, self.dispatch_bytes), (self.combine, self.combine_bytes))
        ):
            for group in (NVLINK, NIC, OTHER):
                group_bytes = np.zeros((max_messages + 1, 3))
                group_bytes[:, group] = count * size
                tables[i, group] = self.collective_us(curve, group_bytes)
        return tables

    def cost(self, routed: Routed) -> StepCost:
        """Cost of every batch and layer of `routed`, which must come from `route` with this
        model's `dedup`. Raises MismatchError when the numbers of GPUs differ."""
        if routed.messages.shape[-1] != self.num_gpus:
            raise MismatchError(
                f"the plan has {routed.messages.shape[-1]} GPUs, the cluster {self.num_gpus}",
                "use the cluster that the plan was made for, or make a new plan",
            )
        out, back = self.both_ways(routed.messages)
        dispatch = self.collective_us(self.dispatch, self.group_max(out) * self.dispatch_bytes)
        combine = self.collective_us(self.combine, self.group_max(back) * self.combine_bytes)
        link_bytes = out * self.dispatch_bytes + back * self.combine_bytes
        return StepCost(dispatch, self.compute_us(routed), combine, link_bytes)

    def compute_us(self, routed: Routed) -> FloatArray:
        """[B, L, G]: the routed experts of every GPU, launch included; 0 where it has no token."""
        batches, layers = routed.slot_tokens.shape[:2]
        tokens = routed.slot_tokens.reshape(batches, layers, self.num_gpus, -1)
        most = int(tokens.max(initial=0))
        sizes = (self.hidden_size, self.intermediate_size, self.ffn_matrices)
        tables = [m.time_table_us(most, *sizes) if m.waves is None else None for m in self.experts]
        out = np.empty((batches, layers, self.num_gpus))
        for gpu in range(self.num_gpus):
            kind, own = int(self.gpu_type[gpu]), tokens[:, :, gpu]
            model, table = self.experts[kind], tables[kind]
            work = model.slots_time_us(own, *sizes) if table is None else table[own].sum(axis=2)
            launch = model.layer_launch_us(eager=self.eager)
            out[:, :, gpu] = np.where(own.any(axis=2), work / self.speed[gpu] + launch, 0.0)
        return out


@kernel
def cross_kernel(messages: Array, num_gpus: int, indptr: Array, links: Array, out: Array) -> None:
    """Add into out [2, N, links] what crosses each link of `messages` [N, G * G], and of as many
    back; links[indptr[p] : indptr[p + 1]] are the route of pair p.

    In tiles, so that the routes of a pair and of its way back stay in cache for several messages.
    """
    for first in range(0, len(messages), TILE_ROWS):
        last = min(first + TILE_ROWS, len(messages))
        for tile in range(0, num_gpus, TILE_GPUS):
            sources = min(tile + TILE_GPUS, num_gpus)
            for across in range(0, num_gpus, TILE_GPUS):
                targets = min(across + TILE_GPUS, num_gpus)
                for source in range(tile, sources):
                    for target in range(across, targets):
                        pair, back = source * num_gpus + target, target * num_gpus + source
                        for i in range(first, last):
                            count = messages[i, pair]
                            if count != 0:
                                for j in range(indptr[pair], indptr[pair + 1]):
                                    out[0, i, links[j]] += count
                                for j in range(indptr[back], indptr[back + 1]):
                                    out[1, i, links[j]] += count


def build_step_model(
    cluster: Cluster,
    model: ModelSpec,
    *,
    phase: Phase = "prefill",
    all_to_all: AllToAll | None = None,
    dedup: Dedup | None = None,
    dispatch_dtype: str | None = None,
    combine_dtype: str = "bf16",
    expert_dtype: str | None = None,
    calibration: Calibration | None = None,
    eager: bool = False,
) -> StepModel:
    """The step model of `model` on `cluster`.

    all_to_all: default nccl within a node; across nodes deepep for prefill and deepep_ll for
    decode, where they are calibrated; nvlink within one where its own kernels are.
    dedup: default as the library does it (C2): nccl gpu, deepep node, deepep_ll none.
    dispatch_dtype: default as engines call the library (`dispatch_dtype_of`).
    calibration: default the bundled one of each GPU type, datasheet figures where there is none.
    Ignored: routing metadata bytes (ids and weights), gate, permutation, shared experts,
    attention and dense layers; they do not depend on the placement.
    Raises UnknownNameError for a dtype, library or deduplication that is not known.
    """
    if all_to_all is not None:
        check_library(all_to_all)
    if dedup is not None and dedup not in DEDUP_CODES:
        raise UnknownNameError("deduplication", dedup, DEDUP_CODES)
    for dtype in (dispatch_dtype or combine_dtype, combine_dtype):
        if dtype not in BYTES_PER_ELEMENT:
            raise UnknownNameError("message dtype", dtype, BYTES_PER_ELEMENT)
    notes: list[str] = []
    types = list(dict.fromkeys(gpu.name for gpu in cluster.gpus))
    specs = {gpu.name: gpu for gpu in cluster.gpus}
    of_type = {
        name: calibration or calibration_of_gpu(specs[name], cluster.calibration, len(types) == 1)
        for name in types
    }
    slowest = min(types, key=lambda n: specs[n].nvlink_gb_per_s)
    first = of_type[slowest]
    library = all_to_all or default_library(first, cluster.num_nodes, phase)
    check_one_domain(library, cluster.num_nodes)
    curves = [_curve(first, kind, cluster, eager=eager) for kind in KINDS_OF[library]]
    shape = (model.expert_hidden, model.moe_intermediate_size)
    dtype = expert_dtype or model.expert_dtype
    dispatched = dispatch_dtype or dispatch_dtype_of(library, dtype)
    experts = tuple(_expert_model(of_type[name], dtype, shape) for name in types)
    routes = cluster.routes()
    group = _link_groups(routes)
    nvlink = specs[slowest].nvlink_gb_per_s or specs[slowest].pcie_gb_per_s
    scale, other = _link_scales(routes, group, nvlink)
    basis: Basis = weakest(*(c.basis for c in curves), *(m.basis for m in experts))
    rows = ", rows dispatched in fp8" if dispatched == "fp8" else ""
    source = curves[0].source or first.name
    notes.append(f"collectives: {library}, {curves[0].basis} ({source}{rows})")
    notes += [
        f"experts on {n}: {m.basis} ({m.source or m.kernel})"
        for n, m in zip(types, experts, strict=True)
    ]
    token = model.expert_hidden
    return StepModel(
        hidden_size=model.expert_hidden,
        intermediate_size=model.moe_intermediate_size,
        all_to_all=library,
        dedup=dedup or DEDUP_OF[library],
        dispatch_bytes=token * BYTES_PER_ELEMENT[dispatched],
        combine_bytes=token * BYTES_PER_ELEMENT[combine_dtype],
        dispatch=curves[0],
        combine=curves[1],
        experts=experts,
        gpu_type=np.array([types.index(gpu.name) for gpu in cluster.gpus], np.int64),
        speed=np.asarray(cluster.speed_factor, np.float64),
        route_indptr=routes.indptr,
        route_links=routes.link_idx,
        link_group=group,
        link_scale=scale,
        other_gb_per_s=other,
        basis=basis,
        ffn_matrices=model.ffn_matrices,
        eager=eager,
        notes=tuple(notes),
    )


def calibration_of_gpu(gpu: GpuSpec, named: str | None, only_type: bool) -> Calibration:
    """The calibration of one GPU type: the cluster's if it has one type, else by family name.

    What it lacks, or all of it where there is none, comes from the GPU's datasheet figures.
    """
    datasheet = datasheet_models(
        GpuFigures(
            name=gpu.name,
            hbm_gb_per_s=gpu.hbm_gb_per_s,
            tflops=gpu.tflops,
            nvlink_gb_per_s=gpu.nvlink_gb_per_s,
            pcie_gb_per_s=gpu.pcie_gb_per_s,
            kernel_launch_us=gpu.kernel_launch_us,
        )
    )
    family = family_of(gpu)
    if named is not None and only_type:
        return load_calibration(named).completed_by(datasheet)
    if family in calibration_names():
        return load_calibration(family).completed_by(datasheet)
    return datasheet


def family_of(gpu: GpuSpec) -> str:
    """The name of a GPU's calibration: "h200" of an h200-sxm."""
    return gpu.name.removesuffix("-sxm")


def _curve(
    calibration: Calibration,
    kind: str,
    cluster: Cluster,
    *,
    eager: bool,
) -> CollectiveCurve:
    routes = cluster.routes()
    nics = routes.link_gb_per_s[routes.link_class == routes.link_class_names.index("nic")]
    return calibration.collective(
        kind,
        cluster.num_gpus,
        cluster.num_nodes,
        nic_gb_per_s=float(nics.min()) if len(nics) else None,
        eager=eager,
    )


def _expert_model(calibration: Calibration, dtype: str, shape: tuple[int, int]) -> ExpertGemmModel:
    known = {key[0] for key in calibration.experts}
    names = (name for name in _EXPERT_DTYPES.get(dtype, (dtype,)) if name in known)
    return calibration.expert_ffn(next(names, dtype), shape=shape)


def _link_groups(routes: Any) -> npt.NDArray[np.int8]:
    names = routes.link_class_names
    of_class = {"nvlink": NVLINK, "nic": NIC}
    used = np.zeros(routes.num_links, bool)
    used[routes.link_idx] = True
    group = np.array([of_class.get(names[c], OTHER) for c in routes.link_class], np.int8)
    return np.where(used, group, -1).astype(np.int8)


def _link_scales(
    routes: Any, group: npt.NDArray[np.int8], nvlink_gb_per_s: float
) -> tuple[FloatArray, float]:
    """[links]: rate of the group's reference link over the link's own; and OTHER's reference.

    References are the links that the curves are of: NVLink of the calibrated GPU type and the
    slowest NIC (see `_curve`); for group OTHER, which has no curve, its fastest link.
    """
    scale = np.zeros(routes.num_links)
    reference = {NVLINK: nvlink_gb_per_s, NIC: 0.0, OTHER: 0.0}
    for g in reference:
        picked = group == g
        if picked.any():
            own = routes.link_gb_per_s[picked]
            if g != NVLINK:
                reference[g] = float(own.min() if g == NIC else own.max())
            scale[picked] = reference[g] / own
    return scale, reference[OTHER]
