"""What fits: memory of a GPU that is left for expert slots, and of a host for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesim.errors import InfeasibleError, InputError
from moesim.model.names import ModelSpec

MAX_GB = 1e9
MAX_COUNT = 10**9
WORKSPACE_BYTES = 1_000_000_000
"""Assumed for the CUDA context, activations and library workspaces."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of HBM by use. `slot_bytes` is one slot, the size of the largest expert;
    `num_slots` is how many fit beside the rest, at most all experts."""

    hbm_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    slot_bytes: int
    num_slots: int
    num_experts: int

    @property
    def everything_fits(self) -> bool:
        return self.num_slots == self.num_experts

    def to_dict(self) -> dict[str, Any]:
        return {
            "hbm_bytes": self.hbm_bytes,
            "dense_bytes": self.dense_bytes,
            "kv_bytes": self.kv_bytes,
            "workspace_bytes": self.workspace_bytes,
            "slot_bytes": self.slot_bytes,
            "num_slots": self.num_slots,
        }


def memory_budget(
    model: ModelSpec,
    hbm_gb: float,
    batch_size: int,
    context_tokens: int,
    slot_bytes: float,
    num_experts: int | None = None,
) -> MemoryBudget:
    """Slots that fit into `hbm_gb` beside dense weights, KV cache and workspace.

    num_experts: experts that the GPU is responsible for, over all layers; default all.

    Raises InputError for sizes that are not positive or absurd, InfeasibleError where not even the
    experts that one token needs in one layer fit.
    """
    check_sizes(hbm_gb, batch_size, context_tokens)
    hbm = round(hbm_gb * 1e9)
    dense = model.non_expert_bytes()
    kv = batch_size * model.kv_bytes(context_tokens)
    slot = round(slot_bytes)
    left = hbm - dense - kv - WORKSPACE_BYTES
    if left < model.top_k * slot:
        need = dense + kv + WORKSPACE_BYTES + model.top_k * slot
        raise InfeasibleError(
            f"{hbm_gb:g} GB of HBM do not hold {model.name}: dense weights {dense / 1e9:.1f} GB,"
            f" KV cache {kv / 1e9:.1f} GB, workspace {WORKSPACE_BYTES / 1e9:.1f} GB and the"
            f" {model.top_k} experts of one token in one layer {model.top_k * slot / 1e9:.1f} GB"
            f" need {need / 1e9:.1f} GB",
            "give more HBM, a shorter context, a smaller batch, or fewer bits per expert",
        )
    total = model.num_moe_layers * model.num_experts if num_experts is None else num_experts
    return MemoryBudget(hbm, dense, kv, WORKSPACE_BYTES, slot, min(total, left // slot), total)


def check_sizes(hbm_gb: float, batch_size: int, context_tokens: int) -> None:
    """Raise InputError unless the sizes are positive and such as there may be."""
    if (
        not 0 < hbm_gb <= MAX_GB
        or not 1 <= batch_size <= MAX_COUNT
        or not 0 <= context_tokens <= MAX_COUNT
    ):
        raise InputError(
            f"memory of {hbm_gb:g} GB, a batch of {batch_size:.6g} or {context_tokens:.6g} tokens"
            " of context is out of range",
            f"give memory above 0 and up to {MAX_GB:g} GB, a batch from 1 and a context from 0, up"
            f" to {MAX_COUNT:g}",
        )


def check_host(total: int, dram_gb: float, nvme_gb: float, expert_bytes: float) -> int:
    """How many of `total` experts fit in host memory, at most all.

    Raises InfeasibleError where DRAM and NVMe together do not hold all experts.
    """
    in_dram = min(total, int(dram_gb * 1e9 // expert_bytes))
    if in_dram < total and dram_gb + nvme_gb < total * expert_bytes / 1e9:
        raise InfeasibleError(
            f"{total} experts of {expert_bytes / 1e6:.1f} MB ({total * expert_bytes / 1e9:.1f} GB)"
            f" do not fit {dram_gb:g} GB of DRAM and {nvme_gb:g} GB of NVMe",
            "give more DRAM or NVMe, or fewer bits per expert",
        )
    return in_dram
