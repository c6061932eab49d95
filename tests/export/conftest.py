"""Plans to export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesim.placement import EMPTY, Placement, Plan

MakePlan = Callable[..., Plan]


def random_table(
    rng: np.random.Generator, layers: int, experts: int, gpus: int, slots_per_gpu: int
) -> np.ndarray:
    """[L, P]: every expert somewhere, no GPU with one twice, spare slots filled with replicas."""
    table = np.full((layers, gpus, slots_per_gpu), EMPTY, np.int32)
    for layer in range(layers):
        used = [0] * gpus
        for place, expert in enumerate(rng.permutation(experts)):
            gpu = place % gpus
            table[layer, gpu, used[gpu]] = expert
            used[gpu] += 1
        for gpu in range(gpus):
            others = np.setdiff1d(np.arange(experts), table[layer, gpu, : used[gpu]])
            free = slots_per_gpu - used[gpu]
            table[layer, gpu, used[gpu] :] = rng.permutation(others)[:free]
        for gpu in range(gpus):
            rng.shuffle(table[layer, gpu])
    return table.reshape(layers, -1)


@pytest.fixture
def make_plan() -> MakePlan:
    """make_plan(experts, gpus, slots_per_gpu, layer_ids, seed, **fields) -> a random plan."""

    def make(
        experts: int = 8,
        gpus: int = 4,
        slots_per_gpu: int = 3,
        layer_ids: tuple[int, ...] = (1, 2, 3),
        seed: int = 0,
        num_nodes: int = 1,
        **fields: Any,
    ) -> Plan:
        table = random_table(
            np.random.default_rng(seed), len(layer_ids), experts, gpus, slots_per_gpu
        )
        return Plan(
            model=fields.pop("model", ""),
            layer_ids=layer_ids,
            placement=Placement(table, gpus, num_nodes, experts),
            **fields,
        )

    return make


@pytest.fixture
def uneven_plan() -> Plan:
    """Experts 0..4 on 2 GPUs of 3 slots, one slot empty."""
    table = np.array([[4, 1, 0, 3, 2, EMPTY]], np.int32)
    return Plan("", (0,), Placement(table, 2, 1, 5))
