"""Another number of GPUs for an expert-parallel group that runs: as few experts moved as can be.

Elastic expert parallelism adds GPUs when load rises and gives them back when it falls. The first
GPUs stay. A wider group's GPUs keep as many of their experts as they have slots, and the further
GPUs take the rest; in a narrower one the GPUs that stay take what the others held. Both move as
few experts as any placement does that fills the new GPUs (`least_moves`); which ones is chosen for
an even load. One slot an expert; the engine's own work, as forming groups anew, is not counted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError, MismatchError
from moesim.placement import EMPTY, Placement
from moesim.types import FloatArray


def resize(old: Placement, load: FloatArray, num_gpus: int, num_nodes: int) -> Placement:
    """`old` on `num_gpus` GPUs of `num_nodes` nodes; load: [L, E] tokens of each expert.

    Raises MismatchError where `old` has redundant or empty slots or `load` is of other sizes,
    InputError where experts do not divide over the GPUs.
    """
    if old.num_slots != old.num_experts:
        raise MismatchError(
            f"{old.num_experts} experts in {old.num_slots} slots: resizing is for one slot each",
            "start from a plan without redundant experts",
        )
    if load.shape != (old.num_layers, old.num_experts):
        raise MismatchError(
            f"loads of {load.shape} for {old.num_layers} layers and {old.num_experts} experts",
            "give one number for each expert of each layer",
        )
    if num_gpus < 1 or old.num_experts % num_gpus:
        raise InputError(
            f"{old.num_experts} experts do not divide over {num_gpus} GPUs",
            "choose a number of GPUs that divides them",
        )
    room = old.num_experts // num_gpus
    table = np.full((old.num_layers, num_gpus, room), EMPTY, np.int32)
    held = old.physical_to_logical.reshape(old.num_layers, old.num_gpus, -1)
    for layer in range(old.num_layers):
        homeless = _keep(held[layer], load[layer], table[layer])
        _place(homeless, load[layer], table[layer])
    return Placement(table.reshape(old.num_layers, -1), num_gpus, num_nodes, old.num_experts)


def least_moves(old: Placement, num_gpus: int) -> int:
    """Experts that any placement on `num_gpus` full GPUs fetches, the first GPUs staying: those
    beyond the slots of the ones that stay, and all of the ones that go."""
    room = old.num_experts // num_gpus
    stays = min(old.num_gpus, num_gpus)
    return old.num_layers * (old.num_experts - stays * min(room, old.slots_per_gpu))


def _keep(held: npt.NDArray[np.int32], load: FloatArray, table: npt.NDArray[np.int32]) -> list[int]:
    """Fill `table` [G', S'] with what the first GPUs of `held` [G, S] keep; returns the rest. A GPU
    gives away, one by one, the expert that leaves its load nearest to an even share."""
    share = float(load.sum()) / len(table)
    homeless: list[int] = []
    for gpu, row in enumerate(held):
        own = row.tolist()
        if gpu >= len(table):
            homeless += own
            continue
        while len(own) > table.shape[1]:
            left = len(own) - table.shape[1]
            total = float(load[own].sum())
            wanted = max(0.0, total - share) / left
            own.remove(min(own, key=lambda e: (abs(float(load[e]) - wanted), e)))
        table[gpu, : len(own)] = own
        homeless += sorted(set(row.tolist()) - set(own))
    return homeless


def _place(homeless: list[int], load: FloatArray, table: npt.NDArray[np.int32]) -> None:
    """The heaviest first to the GPU with least load that has a free slot."""
    total = np.array([load[row[row != EMPTY]].sum() for row in table])
    for expert in sorted(homeless, key=lambda e: (-float(load[e]), e)):
        free = (table == EMPTY).any(axis=1)
        gpu = int(np.argmin(np.where(free, total, np.inf)))
        table[gpu, int(np.argmax(table[gpu] == EMPTY))] = expert
        total[gpu] += load[expert]
