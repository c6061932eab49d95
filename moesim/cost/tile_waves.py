"""Tiles of a grouped GEMM kernel, computed in waves over the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.types import FloatArray

_ROUNDING = 1e-9  # of a wave: below this a quotient counts as whole


@dataclass(frozen=True)
class Tile:
    """What one cluster of thread blocks computes at a time: `rows` x `columns` of an output.

    `up_to_mean`: the kernel takes this tile for layers of at most that many tokens per slot, idle
    included; None for the tile of all larger ones. `empty_adds`: how much longer a tile without
    rows would take, as a share of a full one's time; in between, in proportion.
    """

    rows: int
    columns: int
    up_to_mean: float | None = None
    empty_adds: float = 0.0


@dataclass(frozen=True)
class TileWaves:
    """`at_once` tiles run side by side; all tiles of a layer's experts follow in waves.

    A last wave that is not full takes its share of a wave's time, plus `wave_share` of the rest: 1
    where tiles take a fixed time, 0 where fewer of them are faster accordingly.
    `tiles` ascend in `up_to_mean`; the last has none.
    """

    at_once: int
    tiles: tuple[Tile, ...]
    wave_share: float = 1.0

    def tiles_by_mean(
        self, mean_tokens: FloatArray
    ) -> Iterator[tuple[Tile, npt.NDArray[np.bool_]]]:
        """Each tile with where the kernel takes it, for layers of these mean tokens per slot."""
        whole, left = np.floor(mean_tokens), np.ones(np.shape(mean_tokens), dtype=bool)
        for tile in self.tiles:
            taken = left if tile.up_to_mean is None else left & (whole <= tile.up_to_mean)
            yield tile, taken
            left = left & ~taken

    def waves(self, row_tiles: npt.ArrayLike, tile: Tile, columns: int) -> FloatArray:
        """Waves, in fractions, of an output of `row_tiles` tiles of rows and `columns` columns."""
        across = -(-columns // tile.columns)
        return np.asarray(row_tiles, dtype=np.float64) * across / self.at_once

    def counted(self, waves: FloatArray) -> FloatArray:
        """What so many waves count, the last one in part or whole."""
        rest = np.maximum(np.ceil(waves - _ROUNDING) - waves, 0.0)
        return waves + self.wave_share * rest
