"""Load per GPU and layer before and after planning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moesim.files import atomic_path

if TYPE_CHECKING:
    from moesim.jobs.plan_result import PlanResult


def plot_load(result: PlanResult, path: Path) -> None:
    """Write a picture: mean load over the mean GPU for every layer and GPU of each plan, and the
    distribution over held-out batches of the slowest GPU's load."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    candidates = result.candidates
    loads = [c.measured.gpu_load for c in candidates]
    relative = [load / load.mean(axis=1, keepdims=True) for load in loads]
    reach = max(0.05, max(float(np.abs(r - 1).max()) for r in relative))
    figure = plt.figure(figsize=(4.2 * len(candidates), 7.2), layout="constrained")
    grid = figure.add_gridspec(2, len(candidates), height_ratios=[1.5, 1])
    image = None
    axes = []
    for i, (candidate, values) in enumerate(zip(candidates, relative, strict=True)):
        axis = figure.add_subplot(grid[0, i])
        axes.append(axis)
        image = axis.imshow(
            values,
            aspect="auto",
            cmap="PuOr_r",
            vmin=1 - reach,
            vmax=1 + reach,
            interpolation="nearest",
        )
        value = candidate.figures["imbalance"].value
        axis.set_title(f"{candidate.name}: batch imbalance {value:.2f}")
        axis.set_xlabel("GPU")
        axis.set_ylabel("MoE layer" if i == 0 else "")
        axis.set_xticks(_ticks(values.shape[1]))
        axis.set_yticks(_ticks(values.shape[0]))
        axis.set_yticklabels([str(result.plan.layer_ids[t]) for t in _ticks(values.shape[0])])
    if image is not None:
        figure.colorbar(image, ax=axes, label="mean load / mean of all GPUs", shrink=0.9)
    axis = figure.add_subplot(grid[1, :])
    main = [result.sample.groups(c.measured.values["imbalance"])[0].ravel() for c in candidates]
    for candidate, values, style in zip(candidates, main, ("-", "--", "-."), strict=False):
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axis.plot(ordered, share, style, label=candidate.name, linewidth=1.8)
    axis.set_xlabel("load of the busiest GPU / mean, one batch and layer (1 is perfect)")
    axis.set_ylabel("share of batches and layers")
    axis.set_xlim(left=1)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    evaluation = result.plan.evaluation
    if "phase" in evaluation:
        judged = f"held-out {evaluation['phase']} batches of {evaluation['batch_tokens']} tokens"
    else:
        judged = f"{evaluation['num_steps']} recorded steps"
        judged += ", held-out" if evaluation["held_out"] else ", tuned on"
    figure.suptitle(
        f"{result.plan.model or 'model'} on {result.plan.placement.num_gpus} GPUs, {judged}",
        parse_math=False,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _ticks(count: int) -> list[int]:
    step = max(1, -(-count // 12))
    return list(range(0, count, step))
