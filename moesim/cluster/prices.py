"""Dollars of a deployment: what the user gives, else the labelled figures of the cluster files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError, UnknownNameError
from moesim.numerals import number

if TYPE_CHECKING:
    from moesim.cluster import Cluster

ANY = "*"


@dataclass(frozen=True)
class Prices:
    """Dollars a GPU-hour by GPU type; `*` for every type that is not named.

    `used`: what was used, by GPU type: dollars, kind (`given` or that of the cluster file) and
    source; filled in by `per_hour`.
    """

    given: Mapping[str, float]
    used: dict[str, dict[str, Any]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)

    def per_hour(self, cluster: Cluster) -> float | None:
        """Dollars an hour of `cluster`, None where the price of a GPU is not known."""
        each = self.each_per_hour(cluster)
        return None if each is None else sum(each)

    def each_per_hour(self, cluster: Cluster) -> list[float] | None:
        """[G]: dollars an hour of each GPU of `cluster`, None where one is not known."""
        out = []
        for gpu in cluster.gpus:
            name = gpu.name
            if name not in self.used:
                self.used[name] = self._find(cluster, name, gpu.price_usd_per_hour)
            price = self.used[name]["usd_per_gpu_hour"]
            if price is None:
                return None
            out.append(price * self.factors.get(name, 1.0))
        return out

    def scaled(self, gpu: str, factor: float) -> Prices:
        """These prices with one GPU type's times `factor`."""
        return replace(self, factors={**self.factors, gpu: factor})

    def _find(self, cluster: Cluster, name: str, listed: float | None) -> dict[str, Any]:
        found = self.given.get(name, self.given.get(ANY))
        if found is not None:
            return {"usd_per_gpu_hour": found, "kind": "given", "source": "given with the study"}
        block = next(
            (b for b in cluster.blocks if b.role == "price" and name in b.where),
            next((b for b in cluster.blocks if b.role == "price"), None),
        )
        if listed is None or block is None:
            return {"usd_per_gpu_hour": None, "kind": "unknown", "source": ""}
        return {"usd_per_gpu_hour": listed, "kind": block.kind, "source": block.source}


def parse_prices(texts: list[str]) -> dict[str, float]:
    """Prices from texts such as "h100-sxm=2.5" or "2.5" for every GPU.

    Raises InputError for text that is none, and for a GPU that is priced twice.
    """
    out: dict[str, float] = {}
    for text in texts:
        name, sign, dollars = text.rpartition("=")
        name = name.strip() if sign else ANY
        try:
            price = number(dollars)
        except ValueError:
            price = math.nan
        if not name or not 0 < price < 1e6:
            raise InputError(
                f"`price` {text[:80]} is no price",
                "write dollars per GPU-hour: h100-sxm=2.5, or 2.5",
            )
        if name in out:
            raise InputError(f"`price` names {name} twice", "keep one of the two")
        out[name] = price
    return out


def check_names(given: Mapping[str, float], known: set[str]) -> None:
    """Raise UnknownNameError for a price of a GPU that no point uses."""
    for name in given:
        if name != ANY and name not in known:
            raise UnknownNameError("GPU with a price", name, known)
