"""`admit`: which flows a leaf-spine network takes, and by which of its paths."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cluster.multipath import paths
from moesim.errors import FormatError, InputError
from moesim.figures import text_table
from moesim.jobs import inputs
from moesim.jobs.result import Result
from moesim.solvers.admission import Admission, Flows, exact, first_path, genetic
from moesim.types import stream

if TYPE_CHECKING:
    import pandas as pd

    from moesim.cluster import Cluster
    from moesim.jobs.inputs import ClusterLike

COLUMNS = ("source", "target", "gb_per_s", "priority")
RANDOM = {"count": 200.0, "gb_per_s": 10.0, "priorities": 3.0}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AdmitResult(Result):
    """cluster, source: what of; flows and the three ways to admit them, `found` by name."""

    cluster: str
    source: str
    flows: Flows
    found: dict[str, Admission]

    def line(self) -> str:
        share = self.found["genetic"].worth / max(self.found["exact"].worth, 1e-12)
        return f"{len(self.flows):,} flows on {self.cluster}; genetic {share:.1%} of exact"

    def summary(self) -> str:
        several = sum(len(p) > 1 for p in self.flows.paths)
        most = max((len(p) for p in self.flows.paths), default=0)
        head = ["", "admitted", "GB/s", "worth", "of exact", "busiest link"]
        rows = []
        for row in self._rows():
            share = f"{row['worth'] / max(self.found['exact'].worth, 1e-12):.1%}"
            admitted, rate = f"{row['admitted']:,}", f"{row['gb_per_s']:,.0f}"
            busy = f"{row['busiest_link']:.1%}"
            rows.append([row["method"], admitted, rate, f"{row['worth']:,.0f}", share, busy])
        proven = "proven" if self.found["exact"].proven else "the best that was found"
        return "\n".join(
            [
                f"{len(self.flows):,} flows of {self.source} on {self.cluster},"
                f" {several:,} of them with up to {most} paths",
                text_table(head, rows),
                f"worth: sum of the admitted flows' priorities; exact is {proven}",
            ]
        )

    def _rows(self) -> list[dict[str, Any]]:
        capacity = self.flows.capacity_gb_per_s
        return [
            {
                "method": name,
                "admitted": int((one.chosen >= 0).sum()),
                "gb_per_s": float(self.flows.gb_per_s[one.chosen >= 0].sum()),
                "worth": one.worth,
                "busiest_link": float((self.flows.load(one.chosen) / capacity).max(initial=0.0)),
                "proven": one.proven,
            }
            for name, one in self.found.items()
        ]

    def to_json(self) -> dict[str, Any]:
        chosen = {name: one.chosen.tolist() for name, one in self.found.items()}
        return {
            "cluster": self.cluster,
            "flows": self.source,
            "num_flows": len(self.flows),
            "methods": self._rows(),
            "path_of_flow": chosen,
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per method."""
        import pandas as pd

        return pd.DataFrame(self._rows()).set_index("method")


def admit(
    flows: str | os.PathLike[str],
    *,
    cluster: ClusterLike | None = None,
    gpus: int | None = None,
    seed: int = 0,
) -> AdmitResult:
    """Admit flows between GPUs on the paths of a network: exact, genetic, and each flow on the path
    that the network's hash takes.

    flows: a CSV with columns source, target (GPU numbers), gb_per_s and priority (its worth), or
    "random:count=200,gb_per_s=10,priorities=3": that many between different nodes, with rates
    uniform up to twice the mean and priorities 1 to 3 as often. Bandwidths are the cluster file's.
    Raises InputError and FormatError for flows that cannot be.
    """
    chosen = inputs.cluster_of("h100-sxm-roce-leafspine" if cluster is None else cluster, gpus)
    text = str(flows)
    table = _drawn(text, chosen, seed) if text.startswith("random") else _read(Path(text), chosen)
    ends = table[:, :2].astype(int)
    made = Flows(
        table[:, 2],
        table[:, 3],
        [paths(chosen, source, target) for source, target in ends.tolist()],
        np.asarray(chosen.fabric.link_gb_per_s, np.float64),
    )
    found = {
        "one path each": first_path(made),
        "genetic": genetic(made, seed=seed),
        "exact": exact(made),
    }
    source = text if text.startswith("random") else Path(text).name
    return AdmitResult(f"{chosen.num_gpus} GPUs of {chosen.name}", source, made, found)


def _drawn(text: str, cluster: Cluster, seed: int) -> np.ndarray:
    """[F, 4] as the columns."""
    given = dict(RANDOM)
    for part in filter(None, text.partition(":")[2].split(",")):
        name, _, value = part.partition("=")
        try:
            given[name] = float(value) if name in RANDOM else np.nan
        except ValueError:
            given[name] = np.nan
    count, priorities = given["count"], given["priorities"]
    whole = all(x == int(x) and 1 <= x <= 100_000 for x in (count, priorities) if np.isfinite(x))
    if set(given) != set(RANDOM) or not whole or not all(0 < x < 1e6 for x in given.values()):
        raise InputError(
            f"flows {text!r:.80}", "write them as random:count=200,gb_per_s=10,priorities=3"
        )
    node = cluster.node_of_gpu
    if cluster.num_nodes < 2:
        raise InputError(f"{cluster.name} with one node has one path each", "give more GPUs")
    rng = stream(seed, 0xF1)
    out = np.zeros((int(count), 4))
    for row in out:
        row[0] = rng.integers(cluster.num_gpus)
        row[1] = rng.choice(np.flatnonzero(node != node[int(row[0])]))
    out[:, 2] = given["gb_per_s"] * 2.0 * (1.0 - rng.random(len(out)))
    out[:, 3] = 1 + rng.integers(int(priorities), size=len(out))
    return out


def _read(path: Path, cluster: Cluster) -> np.ndarray:
    remedy = f"give a CSV with columns {', '.join(COLUMNS)}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise InputError(f"cannot read {path}", remedy) from None
    if not rows or any(name not in rows[0] for name in COLUMNS):
        raise FormatError(f"{path} has no rows or lacks one of the columns", remedy)
    out = np.zeros((len(rows), 4))
    for number, row in enumerate(rows):
        try:
            out[number] = [float(row[name]) for name in COLUMNS]
        except (TypeError, ValueError):
            raise FormatError(f"{path} line {number + 2} holds what is no number", remedy) from None
        gpus, good = out[number, :2], np.isfinite(out[number]).all()
        inside = good and ((gpus >= 0) & (gpus < cluster.num_gpus) & (gpus == np.floor(gpus))).all()
        if not inside or gpus[0] == gpus[1] or (out[number, 2:] <= 0).any():
            raise FormatError(
                f"{path} line {number + 2}: no flow between two of {cluster.num_gpus} GPUs with a"
                " rate and a priority above 0",
                "repair or remove the line",
            )
    return out
