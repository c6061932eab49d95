"""SGLang's expert distribution recorder: `expert_distribution_recorder_*.pt` in all four modes.

`stat` and `stat_approx` write `logical_count` [steps, layers, experts], summed over ranks: a load
trace; so does JSON with `logical_count` [layers][experts], which `--init-expert-location` takes.
Their steps are a ring buffer as it lies in memory: once it is full, the newest steps stand before
the oldest. `per_pass` writes, for each rank, records of one forward pass with
`global_physical_count` [layers, slots]; they are summed over ranks by `forward_pass_id` and mapped
to experts through `last_physical_to_logical_map`: a load trace. `per_token` records hold
`topk_ids_of_layer` [layers, tokens, 8] of slots, -1 beyond K and in dense layers, with `input_ids`,
`positions`, `extend_seq_lens` and `forward_mode`: a token trace, mapped back in the same way.
Layers are all hidden layers. The map is the one at the end of the recording: if experts were moved
meanwhile, earlier passes are mapped wrongly, and nothing in the file tells.

Records do not name requests. They are put together from positions: a prefill sequence that starts
at 0 opens a request; one that starts later, and every decoded token at position p, continues the
oldest open request of that rank whose last position is p - 1 (in order of ties, so two requests of
equal length may swap their tails). Records of one pass with the same tokens on several ranks are of
tensor-parallel ranks: one of them is kept.

Source: sglang 0.5.23 (python/sglang/srt/eplb/expert_distribution.py, eplb_simulator/reader.py,
srt/model_executor/forward_batch_info.py for `forward_mode`). Ignored: `misc_objects`,
`average_utilization_rate_over_window`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError
from moesim.trace.format import DECODE, PREFILL, LoadTrace, Trace
from moesim.trace.importers.base import DAMAGED, ImportOptions, bad_field
from moesim.trace.importers.build import (
    Segment,
    assemble,
    assemble_load,
    check_map,
    to_logical,
    whole_counts,
)
from moesim.trace.importers.ranks import Copies, without_ranks
from moesim.trace.importers.records import first_record, iter_records
from moesim.trace.importers.torch_file import load_pt

NAME = "sglang-recorder"
TITLE = "SGLang expert distribution recorder: stat, stat_approx, per_pass, per_token (.pt, .json)"
EXTEND, MODE_DECODE, MIXED, IDLE = 1, 2, 3, 4
COUNTS = "logical_count"
LAYOUT = "logical_count_layout"
MAP = "last_physical_to_logical_map"

Map = npt.NDArray[np.int64]


def detect(path: Path) -> bool:
    """A `.pt` file with `logical_count`, or with `records` and the map of slots, or JSON with
    `logical_count`."""
    if path.suffix == ".json":
        record = first_record(path)
        return isinstance(record, dict) and COUNTS in record
    if path.suffix != ".pt":
        return False
    if path.name.startswith("expert_distribution_recorder_"):
        return True
    try:
        content = load_pt(path)
    except (InputError, FormatError):
        return False
    return isinstance(content, dict) and ("logical_count" in content or MAP in content)


def read(paths: Sequence[Path], options: ImportOptions) -> Trace | LoadTrace:
    """The recordings of all files: of several ranks, or of several runs one after another."""
    source = {"format": NAME, "files": [p.name for p in paths]}
    packs = [(str(path), _pack(path)) for path in paths]
    kinds = {_kind(pack, where) for where, pack in packs}
    if len(kinds) > 1:
        raise FormatError(
            f"the files were recorded in different modes: {', '.join(sorted(kinds))}",
            "import each mode apart",
        )
    kind = kinds.pop()
    source["mode"] = kind
    if kind == "stat":
        return assemble_load(_stat(packs, options), options, source, packs[0][0])
    if kind == "per_pass":
        return assemble_load(_per_pass(packs, options), options, source, packs[0][0])
    return _per_token(packs, options, source)


def _pack(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        content = next((record for _, record in iter_records(path)), None)
        if not isinstance(content, dict) or COUNTS not in content:
            raise FormatError(f"{path}: has no {COUNTS}", DAMAGED)
        table = _json_counts(content[COUNTS], f"{path}: {COUNTS}")
        return {COUNTS: table, LAYOUT: content.get(LAYOUT)}
    content = load_pt(path)
    if not isinstance(content, dict):
        raise FormatError(f"{path}: holds {type(content).__name__}, wanted a dict", DAMAGED)
    return content


def _json_counts(value: Any, where: str) -> npt.NDArray[Any]:
    """[S, L, E] from [L][E] or [S][L][E], as `--init-expert-location` takes it, too."""
    try:
        array = np.array(value)
    except ValueError:
        raise FormatError(f"{where}: rows of different lengths", DAMAGED) from None
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3):
        raise FormatError(f"{where}: no lists of counts by layer and expert", DAMAGED)
    return whole_counts(array if array.ndim == 3 else array[None], where)


def _kind(pack: dict[str, Any], where: str) -> str:
    if "logical_count" in pack:
        return "stat"
    records = pack.get("records")
    if not isinstance(records, list) or MAP not in pack:
        raise FormatError(f"{where}: has neither logical_count nor records and {MAP}", DAMAGED)
    if not records:
        raise FormatError(f"{where}: records is empty", "record some traffic and try again")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise FormatError(f"{where}: record {index} is no dict", DAMAGED)
    return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"


def _stat(packs: list[tuple[str, dict[str, Any]]], options: ImportOptions) -> npt.NDArray[np.int64]:
    """[steps, L, E] of all files, one after another."""
    parts = [_by_layout(pack, where, options) for where, pack in packs]
    for (where, _), part in zip(packs, parts, strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            raise FormatError(
                f"{where}: logical_count has shape {part.shape}, the first file {parts[0].shape}",
                "import runs of different models apart",
            )
        if any(other is not part and np.array_equal(other, part) for other in parts):
            raise FormatError(
                f"{where}: holds the same counts as another of the files",
                "logical_count is summed over ranks already: give one rank's file",
            )
        if len(part) > 1 and part[-1].any():
            options.notify(
                f"{where}: all {len(part)} steps of the buffer are in use, so it may have gone"
                " round and lost their order;"
                " --expert-distribution-recorder-buffer-size -1 keeps all"
            )
    return np.concatenate(parts)


def _by_layout(pack: dict[str, Any], where: str, options: ImportOptions) -> npt.NDArray[np.int64]:
    """[S, L, E] of one file. `logical_count_layout`, which forks of the recorder add, may say that
    the first axis is the ranks that tokens came from; they are added up."""
    counts = _int_array(pack, COUNTS, where, 3)
    layout = pack.get(LAYOUT)
    if layout is None:
        return counts
    if layout != "rank_layer_expert":
        raise bad_field(where, LAYOUT, f"rank_layer_expert or absent, not {layout!r:.40}")
    options.notify(f"{where}: counts of {len(counts)} ranks, added up")
    return np.asarray(counts.sum(axis=0, keepdims=True))


def _per_pass(
    packs: list[tuple[str, dict[str, Any]]], options: ImportOptions
) -> npt.NDArray[np.int64]:
    """[passes, L, E]: summed over ranks, ordered by forward_pass_id."""
    seen: set[tuple[int, int]] = set()
    passes: dict[int, npt.NDArray[np.int64]] = {}
    first: dict[int, npt.NDArray[np.int64]] = {}
    differ = False
    for where, pack in packs:
        mapping = _map(pack, where)
        for index, record in enumerate(pack["records"]):
            here = f"{where}: record {index}"
            pass_id, rank = _number(record, "forward_pass_id", here), _number(record, "rank", here)
            if (pass_id, rank) in seen:
                raise FormatError(
                    f"{here}: pass {pass_id} of rank {rank} was there already",
                    "give each rank's file once, and runs apart",
                )
            seen.add((pass_id, rank))
            count = to_logical(_int_array(record, "global_physical_count", here, 2), mapping, here)
            before = passes.get(pass_id)
            if before is not None and before.shape != count.shape:
                raise FormatError(f"{here}: counts {count.shape}, others {before.shape}", DAMAGED)
            differ = differ or (before is not None and not np.array_equal(first[pass_id], count))
            first.setdefault(pass_id, count)
            passes[pass_id] = count if before is None else before + count
    ranks = {rank for _, rank in seen}
    if len(ranks) > 1 and not differ:
        options.notify(
            f"all {len(ranks)} ranks counted the same in every pass, as tensor-parallel ranks that"
            f" run the same tokens do: counts are up to {len(ranks)} times the tokens"
        )
    partial = len(passes) - sum(all((p, r) in seen for r in ranks) for p in passes)
    if partial:
        options.notify(
            f"{partial} of {len(passes)} passes have no record of some of the {len(ranks)} ranks"
        )
    shapes = {c.shape for c in passes.values()}
    if len(shapes) > 1:
        raise FormatError(f"passes have different shapes: {sorted(shapes)}", DAMAGED)
    return np.stack([passes[pass_id] for pass_id in sorted(passes)])


def _per_token(
    packs: list[tuple[str, dict[str, Any]]], options: ImportOptions, source: dict[str, Any]
) -> Trace:
    records: list[tuple[int, int, str, dict[str, Any], Map]] = []
    for where, pack in packs:
        mapping = _map(pack, where)
        for index, record in enumerate(pack["records"]):
            here = f"{where}: record {index}"
            pass_id, rank = _number(record, "forward_pass_id", here), _number(record, "rank", here)
            records.append((pass_id, rank, here, record, mapping))
    records.sort(key=lambda item: item[:2])
    copies = Copies()
    records = [item for item in records if not _is_copy(item, copies)]
    copies.report(options)
    requests = _Requests()
    segments = [_segment(*item, requests) for item in records]
    options.notify(
        f"recorder files do not name requests: put {requests.count} together from positions"
    )
    if requests.headless:
        options.notify(
            f"{requests.headless} of {requests.count} requests begin after position 0: tokens"
            " before were not recorded, or recording drops tokens (sgl-project/sglang issue 12823)"
        )
    kept = _trim_padding([s for s in segments if s is not None], options.top_k or 1)
    kept = without_ranks(kept) if copies.count else kept
    trace = assemble(kept, options, source)
    return trace.take(np.argsort(trace.request_ids, kind="stable"))


def _is_copy(record: tuple[int, int, str, dict[str, Any], Map], copies: Copies) -> bool:
    pass_id, rank, here, fields, _ = record
    positions = _int_list(fields, "positions", here)
    tokens = _int_list(fields, "input_ids", here)
    idle = _number(fields, "forward_mode", here) == IDLE
    return bool(positions) and not idle and copies.is_copy(pass_id, rank, positions, tokens)


def _segment(
    pass_id: int, rank: int, here: str, record: dict[str, Any], mapping: Map, requests: _Requests
) -> Segment | None:
    """The tokens of one forward pass; None when it had none."""
    mode = _number(record, "forward_mode", here)
    ids = _int_array(record, "topk_ids_of_layer", here, 3)
    positions = _int_list(record, "positions", here)
    tokens = _int_list(record, "input_ids", here)
    count = len(positions)
    if len(tokens) != count or ids.shape[1] != count:
        raise FormatError(
            f"{here}: topk_ids_of_layer has {ids.shape[1]} tokens, positions {count}, input_ids"
            f" {len(tokens)}",
            DAMAGED,
        )
    if mode == IDLE or count == 0:
        return None
    if ids.shape[0] != mapping.shape[0]:
        raise FormatError(
            f"{here}: topk_ids_of_layer has {ids.shape[0]} layers, {MAP} {mapping.shape[0]}",
            DAMAGED,
        )
    if ids.min(initial=0) < -1 or ids.max(initial=0) >= mapping.shape[1]:
        raise FormatError(
            f"{here}: topk_ids_of_layer: slots from {ids.min()} to {ids.max()} are outside"
            f" 0..{mapping.shape[1] - 1}",
            "record with --disable-shared-experts-fusion, so that only routed experts are counted",
        )
    lengths = [] if mode == MODE_DECODE else _int_list(record, "extend_seq_lens", here)
    lengths = [n for n in lengths if n > 0] or [1] * count
    if sum(lengths) > count:
        raise FormatError(
            f"{here}: extend_seq_lens adds up to {sum(lengths)}, but there are {count} tokens",
            DAMAGED,
        )
    used = sum(lengths)
    stops = np.cumsum(lengths)
    request, decode = [], []
    for start, stop in zip(stops - lengths, stops, strict=True):
        request.append(requests.find(rank, positions[start], positions[stop - 1]))
        one = stop - start == 1 and positions[start] > 0
        decode.append(mode == MODE_DECODE or (mode == MIXED and one))
    logical = np.stack([np.append(mapping[layer], -1)[ids[layer]] for layer in range(len(ids))], 1)
    return Segment(
        logical[:used],
        f"{here}: topk_ids_of_layer",
        np.repeat(request, lengths),
        np.array(positions[:used]),
        np.where(np.repeat(decode, lengths), DECODE, PREFILL),
        token_ids=np.array(tokens[:used]),
        step_ids=np.full(used, pass_id),
        rank_ids=np.full(used, rank),
    )


class _Requests:
    """Numbers requests by continuity of positions, within each rank."""

    def __init__(self) -> None:
        self.count = 0
        self.headless = 0
        self._open: dict[tuple[int, int], deque[int]] = {}

    def find(self, rank: int, first: int, last: int) -> int:
        """The request of tokens at positions `first` to `last`; a new one if none fits."""
        waiting = self._open.get((rank, first - 1)) if first > 0 else None
        if waiting:
            request = waiting.popleft()
        else:
            request = self.count
            self.count += 1
            self.headless += first > 0
        self._open.setdefault((rank, last), deque()).append(request)
        return request


def _trim_padding(segments: list[Segment], used: int) -> list[Segment]:
    """Cut the columns beyond K, which hold -1 in every layer of every token; keep `used`."""
    for part in segments:
        columns = np.flatnonzero((part.expert_ids != -1).any(axis=(0, 1)))
        used = max(used, int(columns.max(initial=-1)) + 1)
    return [replace(s, expert_ids=s.expert_ids[:, :, :used]) for s in segments]


def _map(pack: dict[str, Any], where: str) -> Map:
    """[L, P]: the expert in each slot."""
    mapping = _int_array(pack, MAP, where, 2)
    check_map(mapping, f"{where}: {MAP}")
    return mapping


def _int_array(owner: dict[str, Any], name: str, where: str, num_axes: int) -> Map:
    value = owner.get(name)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.ndim != num_axes:
        raise bad_field(where, name, f"an integer tensor of {num_axes} axes")
    if 0 in value.shape[-2:] and name != "topk_ids_of_layer":
        raise bad_field(where, name, "not empty")
    return value.astype(np.int64)


def _number(record: dict[str, Any], name: str, where: str) -> int:
    value = record.get(name)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise bad_field(where, name, "a whole number")
    return value


def _int_list(record: dict[str, Any], name: str, where: str) -> list[int]:
    value = record.get(name)
    if value is None:
        return []
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list) or any(
        type(x) is not int or not 0 <= x < 1 << 31 for x in value
    ):
        raise bad_field(where, name, "a list of whole numbers")
    return value
