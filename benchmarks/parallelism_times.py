"""One MoE layer under different ways to spread its experts, by load: where the best way changes.

Every way starts and ends with the tokens on the GPUs whose attention they are (data-parallel
attention), so that they can be exchanged layer by layer and step by step, as Tutel does (Hwang et
al., arXiv:2206.03382: one layout of weights and inputs that several kinds of parallelism share).

- `ep`: whole experts on every GPU, tokens travel (all-to-all).
- `ep_gather`: whole experts on every GPU; tokens are gathered on all GPUs, partial sums scatter.
- `tp`: a slice of every expert on every GPU; tokens gathered and scattered in the same way.
- `dp`: every expert on every GPU; nothing travels.
- `dp_gather`: stored as `tp` or `ep`, but a layer's weights are gathered before it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.curves import Basis, weakest
from moesim.cost.library import KINDS_OF
from moesim.cost.step import BYTES_PER_ELEMENT, calibration_of_gpu
from moesim.errors import InputError, UnknownNameError
from moesim.serving.moe_load import ExpertSlots, MoeLoad, layer_us
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.cost.calibration import Calibration
    from moesim.cost.collective import CollectiveCurve
    from moesim.model.spec import ModelSpec

WAYS = ("ep", "ep_gather", "tp", "dp", "dp_gather")
LIBRARIES = ("nccl", "deepep", "deepep_ll")
ELEMENT_BYTES = 2.0
HBM_SHARE = 0.9


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """One layer, [T] over the tokens of each GPU, microseconds.

    library: [T], the all-to-all that is quickest there ("" where none is used). weight_bytes: of
    all MoE layers on one GPU; fits: whether that leaves a tenth of its memory. basis, notes: what
    the times rest on.
    """

    way: str
    communication_us: FloatArray
    experts_us: FloatArray
    library: tuple[str, ...]
    weight_bytes: float
    fits: bool
    basis: Basis
    notes: tuple[str, ...]

    @property
    def total_us(self) -> FloatArray:
        """Communication, then experts."""
        return self.communication_us + self.experts_us


def layer_times(
    way: str,
    model: ModelSpec,
    cluster: Cluster,
    load: MoeLoad,
    tokens_per_gpu: Sequence[int],
    calibration: Calibration | None = None,
) -> LayerTimes:
    """The time of one MoE layer under `way`, mean over the layers of `load`.

    tokens_per_gpu: [T] tokens that each GPU brings. calibration: by default the GPU's.

    `ep` takes the quickest of the all-to-all libraries at each load, with one copy of a token a GPU
    (nccl), a node (deepep) or an expert (deepep_ll), in bf16, destinations drawn evenly. Gathers
    move (G-1)/G of the buffer over NVLink and (N-1)/N of it through a node's NICs together. All of
    it waits for the slowest GPU.
    Ignored: gate, shared experts, routing metadata, permutation; under `dp` the difference between
    GPUs' tokens.

    Raises UnknownNameError for another way, InputError where experts do not go round.
    """
    if way not in WAYS:
        raise UnknownNameError("way to spread experts", way, WAYS)
    gpus = cluster.num_gpus
    tokens = np.asarray(tokens_per_gpu, np.float64)
    if way in ("ep", "ep_gather") and gpus > model.num_experts:
        raise InputError(
            f"{model.name} has {model.num_experts} experts for {gpus} GPUs",
            "use at most one GPU an expert, or tp",
        )
    if way == "tp" and model.moe_intermediate_size % gpus:
        raise InputError(
            f"experts of width {model.moe_intermediate_size} are not cut in {gpus}",
            "use a number of GPUs that divides the width",
        )
    slowest = min(cluster.gpus, key=lambda gpu: gpu.hbm_gb_per_s)
    same = len({gpu.name for gpu in cluster.gpus}) == 1
    used = calibration or calibration_of_gpu(slowest, cluster.calibration, same)
    layer = _Layer(model, cluster, used, load)
    experts = layer.experts(way, tokens)
    communication, library = layer.communication(way, tokens)
    total = float(model.expert_bytes()) * model.num_experts * model.num_moe_layers
    weights = total if way == "dp" else total / gpus
    if way == "dp_gather":
        weights += total / model.num_moe_layers
    memory = min(gpu.hbm_gb for gpu in cluster.gpus) * 1e9
    return LayerTimes(
        way,
        communication,
        experts,
        library,
        weights,
        weights <= memory * HBM_SHARE,
        weakest(*layer.bases),
        tuple(dict.fromkeys(layer.notes)),
    )


class _Layer:
    def __init__(
        self, model: ModelSpec, cluster: Cluster, calibration: Calibration, load: MoeLoad
    ) -> None:
        self.model, self.cluster, self.calibration, self.load = model, cluster, calibration, load
        self.gpus, self.nodes = cluster.num_gpus, cluster.num_nodes
        self.kernel = calibration.expert_ffn(
            model.expert_dtype, shape=(model.expert_hidden, model.moe_intermediate_size)
        )
        self.bases: list[Basis] = [self.kernel.basis]
        self.notes = [f"experts: {self.kernel.basis} ({self.kernel.source or self.kernel.kernel})"]

    def experts(self, way: str, tokens: FloatArray) -> FloatArray:
        model, gpus = self.model, self.gpus
        num = model.num_experts
        whole = way in ("ep", "ep_gather")
        rank_of_slot = np.arange(num) * gpus // num if whole else np.zeros(num, np.int64)
        seen = tokens if way in ("dp", "dp_gather") else tokens * gpus
        width = model.moe_intermediate_size // (gpus if way == "tp" else 1)
        layers = len(self.load.inclusion)
        expert_of_slot = np.tile(np.arange(num), (layers, 1))
        slots = ExpertSlots(rank_of_slot, expert_of_slot, np.ones(expert_of_slot.shape))
        one_kind = np.zeros(rank_of_slot[-1] + 1, np.int64)
        sizes = (model.expert_hidden, width, model.ffn_matrices)
        return np.array(
            [
                layer_us(self.load, [self.kernel], one_kind, slots, float(count), 0.0, 0, sizes)
                for count in seen
            ]
        )

    def communication(self, way: str, tokens: FloatArray) -> tuple[FloatArray, tuple[str, ...]]:
        none = ("",) * len(tokens)
        if way == "dp" or self.gpus == 1:
            return np.zeros(len(tokens)), none
        if way == "ep":
            return self._all_to_all(tokens)
        if way == "dp_gather":
            size = float(self.model.expert_bytes()) * self.model.num_experts
            return np.full(len(tokens), self._gathered("all_gather", np.array(size))), none
        buffer = tokens * self.gpus * self.model.hidden_size * ELEMENT_BYTES
        gather = self._gathered("all_gather", buffer)
        return gather + self._gathered("reduce_scatter", buffer), none

    def _gathered(self, kind: str, buffer_bytes: FloatArray) -> FloatArray:
        """All-gather to, or reduce-scatter of, a buffer of this size on every GPU."""
        per_node = self.gpus / self.nodes
        own = buffer_bytes * (self.gpus - 1) / self.gpus
        nic = buffer_bytes * (self.nodes - 1) / self.nodes / per_node
        return self._curve(kind).time_us(own, nic)

    def _all_to_all(self, tokens: FloatArray) -> tuple[FloatArray, tuple[str, ...]]:
        model, gpus, nodes = self.model, self.gpus, self.nodes
        row = model.expert_hidden * BYTES_PER_ELEMENT["bf16"]
        copies_gpu = gpus * (1.0 - (1.0 - 1.0 / gpus) ** model.real_top_k)
        copies_node = nodes * (1.0 - (1.0 - 1.0 / nodes) ** model.real_top_k)
        times = []
        names = [n for n in LIBRARIES if KINDS_OF[n][0] in self.calibration.collectives.kinds]
        names = names or ["nccl"]
        if "all_to_all" in self.calibration.collectives.kinds and "nccl" not in names:
            names.insert(0, "nccl")
        for name in names:
            copies = float(model.real_top_k) if name == "deepep_ll" else copies_gpu
            over = copies_node if name == "deepep" else copies
            sent = tokens * copies * (gpus - 1) / gpus * row
            nic = tokens * over * (nodes - 1) / nodes * row
            times.append(sum(self._curve(kind).time_us(sent, nic) for kind in KINDS_OF[name]))
        stacked = np.stack(times)
        best = stacked.argmin(axis=0)
        return stacked.min(axis=0), tuple(names[i] for i in best)

    def _curve(self, kind: str) -> CollectiveCurve:
        routes = self.cluster.routes()
        nics = routes.link_gb_per_s[routes.link_class == routes.link_class_names.index("nic")]
        rate = float(nics.min()) if len(nics) else None
        curve = self.calibration.collective(kind, self.gpus, self.nodes, nic_gb_per_s=rate)
        self.bases.append(curve.basis)
        self.notes.append(f"{kind}: {curve.basis} ({curve.source or self.calibration.name})")
        return curve


def best_way(times: Sequence[LayerTimes]) -> list[str]:
    """[T] the quickest of the ways that fit."""
    fitting = [t for t in times if t.fits]
    if not fitting:
        return []
    stacked = np.stack([t.total_us for t in fitting])
    return [fitting[i].way for i in stacked.argmin(axis=0)]


def crossovers(
    tokens_per_gpu: Sequence[int], times: Sequence[LayerTimes]
) -> list[tuple[float, str, str]]:
    """Where the quickest way changes: (tokens of each GPU, from, to).

    Between two loads the times are taken as straight lines in log tokens against log time.
    """
    names = best_way(times)
    by_name = {t.way: np.log(t.total_us) for t in times}
    x = np.log(np.asarray(tokens_per_gpu, np.float64))
    out = []
    for i in range(1, len(names)):
        if names[i] == names[i - 1]:
            continue
        old, new = by_name[names[i - 1]], by_name[names[i]]
        before, after = new[i - 1] - old[i - 1], new[i] - old[i]
        share = before / (before - after) if before != after else 0.0
        at = float(np.exp(x[i - 1] + share * (x[i] - x[i - 1])))
        out.append((at, names[i - 1], names[i]))
    return out
