from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from moesim.placement import Placement, Plan
from moesim.replay.shape import ExpertShape
from moesim.trace.format import Trace, TraceMeta, save_trace

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2


@dataclass
class Inputs:
    """A small trace (some tokens choose one expert only), a model shape, and plans on disk."""

    folder: Path
    trace: Path
    shape: ExpertShape
    plans: dict[str, Path] = field(default_factory=dict)

    def add_plan(self, name: str, table: list[int], num_gpus: int, **changes: object) -> Path:
        rows = np.tile(np.array(table, np.int32), (NUM_LAYERS, 1))
        num_experts = int(changes.pop("num_experts", NUM_EXPERTS))
        layer_ids = changes.pop("layer_ids", tuple(range(NUM_LAYERS)))
        plan = Plan("tiny", layer_ids, Placement(rows, num_gpus, 1, num_experts), **changes)
        self.plans[name] = self.folder / f"{name}.json"
        plan.save(self.plans[name])
        return self.plans[name]


def make_trace(num_tokens: int = 600, gates: bool = True) -> Trace:
    rng = np.random.default_rng(0)
    popularity = 1.0 / np.arange(1, NUM_EXPERTS + 1)
    noise = rng.gumbel(size=(num_tokens, NUM_LAYERS, NUM_EXPERTS))
    ids = np.argsort(-(np.log(popularity) + noise), axis=2)[:, :, :TOP_K].astype(np.int16)
    ids[::17, :, 1] = -1
    token = np.arange(num_tokens, dtype=np.int32)
    weights = rng.random(ids.shape).astype(np.float16) if gates else None
    meta = TraceMeta("tiny", NUM_EXPERTS, TOP_K, tuple(range(NUM_LAYERS)))
    phases = (token % 2).astype(np.uint8)
    return Trace(ids, token // 20, token % 20, phases, meta, gate_weights=weights)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("replay")
    save_trace(make_trace(), folder / "trace.npz")
    shape = ExpertShape("tiny", 64, 32, NUM_EXPERTS, TOP_K, "fp32")
    made = Inputs(folder, folder / "trace.npz", shape)
    made.add_plan("linear", list(range(8)), 2)
    made.add_plan("round_robin", [0, 2, 4, 6, 1, 3, 5, 7], 2)
    made.add_plan("replicas", [0, 2, 4, 6, 1, 0, 1, 3, 5, 7], 2)
    made.add_plan("empty_slots", [0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1], 2)
    made.add_plan("idle_rank", [*range(8), -1, -1, -1, -1], 4)
    made.add_plan("four", list(range(8)), 4)
    return made


@dataclass
class Forked:
    """How ranks.py ended, and the records of a calibration and a validation that it wrote."""

    returncode: int
    stderr: str
    raw: Path
    measured: Path


@pytest.fixture(scope="session")
def forked(inputs: Inputs) -> Forked:
    """ranks.py, run once: four ranks."""
    raw, measured = inputs.folder / "raw.json", inputs.folder / "four-ranks.json"
    script = Path(__file__).with_name("ranks.py")
    command = [sys.executable, str(script), str(inputs.trace), str(inputs.plans["idle_rank"])]
    command += [str(raw), str(measured)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return Forked(done.returncode, done.stderr, raw, measured)
