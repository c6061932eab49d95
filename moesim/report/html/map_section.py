"""Maps of a plan: load of GPUs by layer, traffic from GPU to GPU, and the busiest GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesim.draw.colours import PARTS
from moesim.draw.figures import significant
from moesim.draw.heatmap import MAX_COLUMNS, MAX_ROWS, Colours, Side, heat_map
from moesim.draw.plan import STEP_PARTS, busiest_gpu, layer_times, load_maps, relative_load
from moesim.report.html.parts import Block, Figure, Figures, Note, Table

if TYPE_CHECKING:
    from moesim.placement import Plan
    from moesim.planning.maps import PlanMaps

MAX_TABLE_CELLS = 512


def map_blocks(plan: Plan, maps: PlanMaps, basis: str) -> list[Block]:
    """Load, predicted time and traffic before and after, side by side on one scale; `basis` is the
    badge of predicted times."""
    names = list(maps.maps)
    blocks: list[Block] = []
    if not maps.same_trace:
        blocks.append(
            Note(
                "The maps are of another trace than the one that the plan was made from: the"
                " figures above are not theirs."
            )
        )
    blocks += [Note(text[0].upper() + text[1:] + ".") for text in maps.notes]
    blocks.append(Figures(_loads(names, plan, maps)))
    blocks.append(Figures(_times(plan, maps, basis)))
    if plan.placement.num_gpus > 1:
        blocks.append(Figures(_traffic(names, plan, maps)))
    return blocks


def _loads(names: list[str], plan: Plan, maps: PlanMaps) -> list[Figure]:
    loads = {name: maps.maps[name].gpu_load for name in names}
    drawn = load_maps(loads, plan.layer_ids)
    gpus = [str(g) for g in range(plan.placement.num_gpus)]
    layers = [str(x) for x in plan.layer_ids]
    caption = (
        f"Load of a mean batch over the mean of all GPUs, {maps.num_batches} held-out batches. One"
        " is even; orange is above, blue below."
    )
    if plan.attention_gpus:
        caption += f" GPU 0 is the first with experts, behind {plan.attention_gpus} of attention."
    if len(gpus) > MAX_COLUMNS or len(layers) > MAX_ROWS:
        caption += " GPUs and layers are drawn in groups, each cell the largest of its group."
    return [
        Figure(
            drawn[name].title,
            drawn[name],
            _load_table(relative_load(loads[name]), layers, gpus),
            caption,
            "counted",
        )
        for name in names
    ]


def _times(plan: Plan, maps: PlanMaps, basis: str) -> list[Figure]:
    """Predicted time of each layer by its parts, where cluster and model are known."""
    parts = {
        name: own.layer_parts_us
        for name, own in maps.maps.items()
        if own.layer_parts_us is not None
    }
    if not parts:
        return []
    columns = ["layer", *(f"{PARTS[p][0]} (us)" for p in STEP_PARTS), "total (us)"]
    out = []
    for name, picture in layer_times(parts, plan.layer_ids).items():
        rows = [
            [str(layer), *(significant(us) for us in (*own, sum(own)))]
            for layer, own in zip(plan.layer_ids, parts[name].tolist(), strict=True)
        ]
        caption = "A mean batch; dispatch, then the slowest GPU's experts, then combine."
        out.append(Figure(picture.title, picture, Table(columns, rows), caption, basis))
    return out


def _load_table(relative: np.ndarray, layers: list[str], gpus: list[str]) -> Table:
    if relative.size <= MAX_TABLE_CELLS:
        return Table(
            ["layer", *(f"GPU {g}" for g in gpus)],
            [[layers[i], *(f"{x:.3f}" for x in row)] for i, row in enumerate(relative.tolist())],
        )
    return Table(
        ["layer", "largest", "on GPU", "smallest", "on GPU"],
        [
            [
                layers[i],
                f"{row.max():.3f}",
                gpus[row.argmax()],
                f"{row.min():.3f}",
                gpus[row.argmin()],
            ]
            for i, row in enumerate(relative)
        ],
    )


def _traffic(names: list[str], plan: Plan, maps: PlanMaps) -> list[Figure]:
    size, unit = 1.0, "hidden states per step"
    if maps.message_bytes is not None:
        size, unit = maps.message_bytes / 1e6, "MB per step"
    values = {name: maps.maps[name].messages * size for name in names}
    num_gpus = plan.attention_gpus + plan.placement.num_gpus
    apart = ~np.eye(num_gpus, dtype=bool)
    most = max(float(v.max()) for v in values.values())
    least = min(float(v[apart].min()) for v in values.values())
    low = least if least > most / 3 else 0.0
    colours = Colours(most if most > 0 else 1.0, low=low)
    gpus = [str(g) for g in range(num_gpus)]
    sent = {"gpu": "GPU", "node": "node", "none": "chosen expert"}.get(maps.dedup, maps.dedup)
    out = []
    for name in names:
        total = float(values[name].sum())
        caption = (
            f"Dispatch of a mean step over all layers, {significant(total)} {unit} in all; a hidden"
            f" state is sent once per {sent}. Combine sends as many back."
        )
        if low:
            caption += " The colours do not begin at 0."
        if len(gpus) > MAX_COLUMNS:
            caption += " GPUs are drawn in groups, each cell the mean of its group."
        title = f"Traffic from GPU to GPU: {name}"
        out.append(
            Figure(
                title,
                heat_map(
                    title,
                    np.where(apart, values[name], np.nan),
                    Side("from GPU", gpus),
                    Side("to GPU", gpus),
                    colours,
                    unit,
                    combine="mean",
                    square=True,
                    most=(MAX_COLUMNS, MAX_COLUMNS),
                ),
                _traffic_table(values[name], gpus, unit),
                caption,
                "counted",
            )
        )
    return out


def _traffic_table(values: np.ndarray, gpus: list[str], unit: str) -> Table:
    if values.size <= MAX_TABLE_CELLS:
        return Table(
            [f"{unit}, from", *(f"to {g}" for g in gpus)],
            [[gpus[i], *(significant(x, 3) for x in row)] for i, row in enumerate(values.tolist())],
        )
    return Table(
        ["GPU", f"sends ({unit})", f"receives ({unit})"],
        [
            [g, significant(float(values[i].sum()), 3), significant(float(values[:, i].sum()), 3)]
            for i, g in enumerate(gpus)
        ],
    )


def busiest_figure(maps: PlanMaps) -> Figure:
    """How the load of the busiest GPU is distributed over batches and layers."""
    busiest = {name: own.busiest for name, own in maps.maps.items()}
    rows = [
        [name, *(f"{q:.3f}" for q in np.percentile(values, (10, 50, 90, 99, 100)))]
        for name, values in busiest.items()
    ]
    picture = busiest_gpu(busiest)
    return Figure(
        picture.title,
        picture,
        Table(["placement", "p10", "p50", "p90", "p99", "largest"], rows),
        "A layer waits for its busiest GPU, so what counts is the batch, not the average load.",
        "counted",
    )
