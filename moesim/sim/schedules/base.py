"""What a schedule is, and the pieces that they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from moesim.sim.collectives.base import Stage
from moesim.sim.engine import COMM, Program, Task
from moesim.sim.work import HomeWork, StepWork


class Schedule(Protocol):
    """An order of launch. `num_chunks`: shares that the step's tokens are cut into. `coherent`:
    tokens stay where their last expert was."""

    @property
    def name(self) -> str: ...

    @property
    def num_chunks(self) -> int: ...

    @property
    def coherent(self) -> bool: ...

    def build(self, program: Program, work: StepWork) -> None:
        """Add the tasks of one step to `program`."""
        ...


def exchange(
    program: Program,
    stages: Sequence[Stage],
    batch: int,
    layer: int,
    category: str,
    after: Iterable[Task],
    *,
    note: str = "",
    intra_stream: str | None = None,
    stream: str = COMM,
) -> list[Task]:
    """The collectives of one dispatch or combine, in order; returns the last one.

    Stages within a node go on `intra_stream`, where there is one, the others on `stream`.
    """
    last = list(after)
    for stage in stages:
        own = intra_stream or stream if stage.within_node else stream
        flow = stage.flow(batch, layer, category, note)
        last = [program.collective(flow, layer=layer, after=last, stream=own)]
    return last


def attention_and_gate(
    program: Program, home: HomeWork, layer: int, after: Iterable[Task], note: str = ""
) -> list[Task]:
    """Attention, then the gate, on every GPU that has tokens; returns the last task of each.

    With reduced dimensions, first the ascent of the layer before, and last the descent.
    """
    after = list(after)
    name = f"layer {layer} "
    up = home.ascend_us[layer - 1].tolist() if layer else []
    parts = [
        ("dense", up, "ascend"),
        ("attention", home.attention_us[layer].tolist(), "attention"),
        ("gate", home.gate_us[layer].tolist(), "gate"),
        ("dense", home.descend_us[layer].tolist(), "descend"),
    ]
    groups = [
        program.kernels(category, work, layer=layer, after=after, name=f"{name}{label}{note}")
        for category, work, label in parts
    ]
    return _joined(after, *groups)


def shared_experts(program: Program, home: HomeWork, layer: int, note: str = "") -> list[Task]:
    """Shared experts on every GPU that has tokens, after what its stream holds already."""
    return program.kernels(
        "shared",
        home.shared_us[layer].tolist(),
        layer=layer,
        name=f"layer {layer} shared{note}",
    )


def finish(program: Program, home: HomeWork, after: Iterable[Task]) -> None:
    """What follows the last combine: the ascent of the last layer, with reduced dimensions."""
    last = len(home.ascend_us) - 1
    program.kernels(
        "dense", home.ascend_us[last].tolist(), layer=last, after=after, name="last ascend"
    )


def _joined(before: list[Task], *groups: list[Task]) -> list[Task]:
    """The last task of every GPU, or `before` where no GPU had one."""
    last: dict[int, Task] = {}
    for group in groups:
        for task in group:
            last[task.gpu] = task
    return list(last.values()) or before
