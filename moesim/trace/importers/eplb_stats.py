"""Expert-load statistics of vLLM's proposed offline load balancing (pull request 41141).

JSONL. `eplb_load_stats` records hold `expert_load` [layers, slots] of one step and `p2l_map`
[layers, slots], the expert in each slot at that step; layers are MoE layers only. Since a later
revision the file starts with one `eplb_load_meta` record (`model`, `num_ranks`, `num_layers`,
`num_redundant_experts`, ...). Other record types, which the author's tools add, are passed over.
The result is a load trace. No released vLLM writes these files (checked up to 0.33.0).

Source: vllm-project/vllm@63727bf (vllm/distributed/eplb/eplb_state.py,
tools/eplb/generate_static_mapping.py) and the tests of the pull request's later revision
(tests/distributed/test_eplb_state.py), which reads them through `stats_loader.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError
from moesim.trace.format import LoadTrace
from moesim.trace.importers.base import DAMAGED, ImportOptions, bad_field
from moesim.trace.importers.build import assemble_load, check_map, to_logical
from moesim.trace.importers.records import iter_lines, iter_records, nested_ids, parse_json

NAME = "vllm-eplb-stats"
TITLE = "vLLM pull request 41141: eplb_load_stats records (.jsonl)"


def detect(path: Path) -> bool:
    """JSONL whose first records have a `record_type` that starts with `eplb_load`."""
    if path.suffix not in (".jsonl", ".ndjson"):
        return False
    try:
        for number, (_, line) in enumerate(iter_lines(path)):
            record = parse_json(line, "")
            if not isinstance(record, dict) or "record_type" not in record or number > 8:
                return False
            if str(record["record_type"]).startswith("eplb_load"):
                return True
    except (FormatError, OSError):
        return False
    return False


def read(paths: Sequence[Path], options: ImportOptions) -> LoadTrace:
    """The steps of all files, one after another."""
    steps: list[npt.NDArray[np.int64]] = []
    first = ""
    other: dict[str, int] = {}
    for path in paths:
        for where, record in iter_records(path):
            if not isinstance(record, dict) or not isinstance(record.get("record_type"), str):
                raise bad_field(where, "record_type", "there")
            kind = record["record_type"]
            if kind == "eplb_load_stats":
                count = _counts(record, where)
                first = first or where
                if steps and count.shape != steps[0].shape:
                    raise FormatError(
                        f"{where}: expert_load is for {count.shape} layers x experts, {first}"
                        f" for {steps[0].shape}",
                        "import runs of different models apart",
                    )
                steps.append(count)
            elif kind != "eplb_load_meta":
                other[kind] = other.get(kind, 0) + 1
    if other:
        listing = ", ".join(f"{count} {kind:.40}" for kind, count in sorted(other.items())[:4])
        options.notify(f"passed over records of other types: {listing}")
    if not steps:
        raise FormatError(f"{paths[0]}: has no eplb_load_stats record", DAMAGED)
    source = {"format": NAME, "files": [p.name for p in paths]}
    return assemble_load(np.stack(steps), options, source, first, moe_only=True)


def _counts(record: dict[str, Any], where: str) -> npt.NDArray[np.int64]:
    if record.get("version") != 1:
        raise bad_field(where, "version", f"1, not {record.get('version')!r:.20}")
    tables = {}
    for name in ("expert_load", "p2l_map"):
        value = record.get(name)
        if not isinstance(value, list) or not value:
            raise bad_field(where, name, "a list of rows, one for each layer")
        tables[name] = nested_ids(value, f"{where}: {name}").astype(np.int64)
        if tables[name].ndim != 2:
            raise bad_field(where, name, "a list of rows, one for each layer")
    load = tables["expert_load"]
    if load.min() < 0:
        layer, slot = (int(x[0]) for x in np.nonzero(load < 0))
        raise FormatError(
            f"{where}: expert_load: layer {layer}, slot {slot}: negative count", DAMAGED
        )
    check_map(tables["p2l_map"], f"{where}: p2l_map")
    return to_logical(load, tables["p2l_map"], where)
