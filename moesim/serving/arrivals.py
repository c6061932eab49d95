"""Requests from files and from distributions.

Files: Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`; github.com/Azure/AzurePublicDataset),
BurstGPT's CSV (`Timestamp` in s, `Request tokens`, `Response tokens`; github.com/HPMLL/BurstGPT),
Vidur's (`arrived_at` in s, `num_prefill_tokens`, `num_decode_tokens`; github.com/microsoft/vidur),
Splitwise's (`arrival_timestamp` in s, `prompt_size`, `token_size`;
github.com/Mutinifni/splitwise-sim),
and JSONL with `timestamp`, `input_length`, `output_length` and `hash_ids` as Mooncake's, Bailian's
and several generators' (see log_units.py for the units of each).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.numerals import number as plain_number
from moesim.serving.log_units import (
    BAILIAN_KEYS,
    absurd_rate,
    block_size,
    seconds_per_tick,
    unit_seconds,
)
from moesim.serving.requests import Requests

_PLAIN_NUMBER = re.compile(r"^\s*[-+]?[0-9.]+(e[-+]?[0-9]+)?\s*$", re.IGNORECASE)
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURST = ("Timestamp", "Request tokens", "Response tokens")
VIDUR = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
SPLITWISE = ("arrival_timestamp", "prompt_size", "token_size")
CSV_FORMATS = (AZURE, BURST, VIDUR, SPLITWISE)
MOONCAKE = ("timestamp", "input_length", "output_length")
OPTIONAL = ("priority",)
MOONCAKE_BLOCK_TOKENS = 512
BAILIAN_BLOCK_TOKENS = 16
_REMEDY = (
    f"give a CSV with columns {' or '.join(','.join(c) for c in CSV_FORMATS)}, or JSONL with"
    f" {', '.join(MOONCAKE)} (and hash_ids)"
)


def load_requests(
    path: str | Path,
    *,
    skip_empty: bool = False,
    time_unit: str | None = None,
    block_tokens: int | None = None,
    label: str | None = None,
) -> Requests:
    """Requests of a file in one of the formats of this module, told by its first line.

    skip_empty: leave out rows whose prompt or output is 0, as failed requests in BurstGPT are,
    instead of refusing them. time_unit (s, ms, us, ns) and block_tokens: what the log does not
    say, instead of what log_units.py makes of it. A further column or key `priority` is read if
    there, and as text the one named `label`; columns and keys that are not read are named in
    `notices`.
    Raises InputError for a file that cannot be read and FormatError, which names the line, for one
    that is in none of the formats, cut off, or holds what is no number; else as `Requests.of`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}", _REMEDY) from None
    lines = text.splitlines()
    if not any(line.strip() for line in lines):
        raise FormatError(f"{path} is empty", _REMEDY)
    if lines[0].lstrip().startswith("{"):
        return _from_jsonl(path, lines, skip_empty, time_unit, block_tokens, label)
    if block_tokens is not None:
        raise InputError(
            f"{path}: a CSV has no blocks, but block_tokens is {block_tokens}", "leave it out"
        )
    return _from_csv(path, lines, skip_empty, time_unit, label)


def _from_csv(
    path: Path, lines: list[str], skip_empty: bool, time_unit: str | None, label: str | None
) -> Requests:
    header = [name.strip() for name in next(csv.reader(lines[:1]))]
    columns = next((c for c in CSV_FORMATS if all(name in header for name in c)), None)
    if columns is None:
        raise FormatError(f"{path} has the columns {','.join(header)!r:.200}", _REMEDY)
    where = [header.index(name) for name in columns]
    optional = [header.index(name) for name in OPTIONAL if name in header]
    if label is not None and label not in header:
        raise _no_label(path, label, header)
    labels: list[str] = []
    times: list[str] = []
    rows: list[list[float]] = []
    numbers: list[int] = []
    for number, row in enumerate(_rows(path, lines), start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise FormatError(
                f"{path} line {number} has {len(row)} cells, the header {len(header)}",
                "the file may be cut off: get it again, or remove the line",
            )
        times.append(row[where[0]].strip())
        rows.append([_number(path, number, row[i]) for i in (*where[1:], *optional)])
        numbers.append(number)
        if label is not None:
            labels.append(row[header.index(label)].strip())
    if not rows:
        raise FormatError(f"{path} has a header but no requests", "give at least one row")
    table = np.array(rows, np.float64)
    if columns is SPLITWISE and "batch_size" in header:
        _refuse_batches(path, lines, header.index("batch_size"))
    unread = [name for name in header if name not in (*columns, *OPTIONAL, label)]
    unit = "dates" if columns is AZURE else time_unit or "s"
    if columns is AZURE:
        if time_unit is not None:
            raise InputError(
                f"{path}: its times are dates, but time_unit is {time_unit!r:.20}", "leave it out"
            )
        arrival = _seconds(path, times, numbers)
        _check_sorted_stamps(path, arrival, numbers)
    else:
        ticks = np.array([_number(path, n, t) for n, t in zip(numbers, times, strict=True)])
        arrival = ticks * unit_seconds(unit)
    return _requests(
        path, arrival, table[:, 0], table[:, 1], table[:, 2] if optional else None, None,
        numbers, skip_empty, unread=unread, unit=unit, labels=labels,
    )  # fmt: skip


def _refuse_batches(path: Path, lines: list[str], column: int) -> None:
    """Raise FormatError for a row of several requests: each must be a row of its own."""
    for number, row in enumerate(_rows(path, lines), start=2):
        if any(cell.strip() for cell in row) and _number(path, number, row[column]) != 1:
            raise FormatError(
                f"{path} line {number}: batch_size is {row[column].strip()!r:.20}",
                "write a row for each request",
            )


def _rows(path: Path, lines: list[str]) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines[1:])
    except csv.Error as error:
        raise FormatError(f"{path}: {error}", _REMEDY) from None


def _from_jsonl(
    path: Path,
    lines: list[str],
    skip_empty: bool,
    time_unit: str | None,
    block_tokens: int | None,
    label: str | None,
) -> Requests:
    labels: list[str] = []
    rows: list[list[float]] = []
    blocks: list[list[int]] = []
    numbers: list[int] = []
    keys = (*MOONCAKE, *OPTIONAL)
    found: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise FormatError(
                f"{path} line {number} is not JSON",
                "the file may be cut off: get it again, or remove the line",
            ) from None
        if not isinstance(entry, dict) or any(key not in entry for key in MOONCAKE):
            raise FormatError(f"{path} line {number} lacks one of {', '.join(MOONCAKE)}", _REMEDY)
        found |= dict.fromkeys(entry)
        rows.append([_number(path, number, entry.get(key, 0)) for key in keys])
        blocks.append(_block_ids(path, number, entry.get("hash_ids", [])))
        numbers.append(number)
        if label is not None:
            if label not in entry:
                raise _no_label(path, label, list(entry), f" line {number}")
            labels.append(str(entry[label]))
    table = np.array(rows, np.float64)
    bailian = found.keys() >= BAILIAN_KEYS
    tick = seconds_per_tick(path, table[:, 0], numbers, bailian=bailian, unit=time_unit)
    usual = BAILIAN_BLOCK_TOKENS if bailian else MOONCAKE_BLOCK_TOKENS
    size = usual
    if any(blocks):
        size = block_size(path, table[:, 1], blocks, numbers, usual=usual, asked=block_tokens)
    return _requests(
        path,
        table[:, 0] * tick,
        table[:, 1],
        table[:, 2],
        table[:, 3] if "priority" in found else None,
        blocks if any(blocks) else None,
        numbers,
        skip_empty,
        unread=[key for key in found if key not in (*keys, "hash_ids", label)],
        unit=time_unit or ("s" if bailian else "ms"),
        block_tokens=size,
        labels=labels,
    )


def _no_label(path: Path, label: str, known: list[str], where: str = "") -> InputError:
    return InputError(
        f"{path}{where} has no column {label!r:.60}", f"it has {', '.join(known):.200}"
    )


def _block_ids(path: Path, number: int, ids: Any) -> list[int]:
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise FormatError(
            f"{path} line {number}: hash_ids is no list of whole numbers", "repair the line"
        )
    return ids


def _requests(
    path: Path,
    arrival: Any,
    prompt: Any,
    output: Any,
    priority: Any,
    blocks: list[list[int]] | None,
    numbers: list[int],
    skip_empty: bool,
    *,
    unread: list[str],
    unit: str,
    labels: list[str],
    block_tokens: int = MOONCAKE_BLOCK_TOKENS,
) -> Requests:
    notices: list[str] = []
    if unread:
        notices.append(f"not read: {', '.join(name or '(no name)' for name in unread):.160}")
    if skip_empty:
        keep = (prompt > 0) & (output > 0)
        left_out = int((~keep).sum())
        if left_out:
            notices.append(f"{left_out:,} of {len(keep):,} rows without prompt or output left out")
        arrival, prompt, output = arrival[keep], prompt[keep], output[keep]
        priority = priority[keep] if priority is not None else None
        kept = np.flatnonzero(keep).tolist()
        blocks = [blocks[i] for i in kept] if blocks is not None else None
        numbers = [numbers[i] for i in kept]
        labels = [labels[i] for i in kept] if labels else labels
    contiguous = not numbers or numbers[-1] - numbers[0] == len(numbers) - 1
    made = Requests.of(
        arrival,
        prompt,
        output,
        priority=None if priority is None else np.round(priority),
        blocks=blocks,
        block_tokens=block_tokens,
        source=path.name,
        basis="measured",
        row_name=f"{path.name} line" if contiguous else f"{path.name} request",
        first_row=numbers[0] if contiguous and numbers else 0,
    )
    notices.insert(0, _read_as(made, unit))
    notices += absurd_rate(made.arrival_s, made.prompt_tokens, unit)
    return replace(made, notices=tuple(notices), labels=tuple(labels))


def _read_as(made: Requests, unit: str) -> str:
    """One line that shows a wrong unit: what was read, over how long, in blocks of what size."""
    line = f"read {len(made):,} requests over {made.span_s:,.4g} s ({made.rate_per_s:,.3g}/s)"
    line += "" if unit == "dates" else f", times in {unit}"
    if made.block_indptr[-1]:
        line += f", hash_ids of blocks of {made.block_tokens} tokens"
    return line


def _number(path: Path, line: int, cell: Any) -> float:
    try:
        if isinstance(cell, bool) or not isinstance(cell, (int, float, str)):
            raise ValueError
        value = plain_number(cell) if isinstance(cell, str) else float(cell)
    except (ValueError, OverflowError):
        raise FormatError(
            f"{path} line {line}: {cell!r:.60} is no number", "repair or remove the line"
        ) from None
    if not math.isfinite(value):
        raise FormatError(f"{path} line {line}: {cell!r:.60} is not finite", "remove the line")
    return value


def _seconds(path: Path, times: list[str], numbers: list[int]) -> Any:
    plain = [t.removesuffix("Z").removesuffix("+00:00") for t in times]
    for text, number in zip(plain, numbers, strict=True):
        if _PLAIN_NUMBER.match(text):  # which numpy would read as a year
            raise FormatError(
                f"{path} line {number}: {text.strip()!r:.60} is no time of day with date (UTC)",
                "write times as 2023-11-16 18:15:46.680590, or seconds in a column named Timestamp"
                " beside Request tokens and Response tokens",
            )
    try:
        stamps = np.array(plain, dtype="datetime64[ns]")
    except ValueError:
        for text, number in zip(plain, numbers, strict=True):
            try:
                np.datetime64(text, "ns")
            except ValueError:
                raise FormatError(
                    f"{path} line {number}: {text!r:.60} is no time of day with date (UTC)",
                    "write times as 2023-11-16 18:15:46.680590",
                ) from None
        raise
    if np.isnat(stamps).any():
        number = numbers[int(np.isnat(stamps).argmax())]
        raise FormatError(f"{path} line {number} has no time", "repair or remove the line")
    # Seconds since 1970 as floats would be exact to 0.2 us only.
    return (stamps - stamps[0]).astype(np.int64) / 1e9


def _check_sorted_stamps(path: Path, arrival: Any, numbers: list[int]) -> None:
    back = np.flatnonzero(np.diff(arrival) < 0)
    if len(back):
        row = int(back[0]) + 1
        raise InputError(
            f"{path.name} line {numbers[row]} is {arrival[row - 1] - arrival[row]:g} s earlier than"
            f" the one above it ({len(back)} such lines)",
            "sort the file by time",
        )
