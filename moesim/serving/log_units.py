"""Units that a request log does not state: of its times, and of the blocks its ids stand for.

Several tools write the same keys (`timestamp`, `input_length`, `output_length`, `hash_ids`).
Mooncake's times are whole milliseconds and its blocks 512 tokens (github.com/kvcache-ai/Mooncake);
Alibaba's Bailian logs, known by `chat_id` and `turn`, have seconds and blocks of 16 tokens
(github.com/alibaba-edu/qwen-bailian-usagetraces-anon); other generators take any block size. So
the block size follows from the rows themselves, and a time unit that nothing tells is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError, InputError, UnknownNameError

TIME_UNITS: Mapping[str, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
BAILIAN_KEYS = frozenset({"chat_id", "turn"})
MAX_BLOCK_TOKENS = 1 << 20
ABSURD_PER_S = 100.0
ABSURD_TOKENS_PER_S = 1e6
ABSURD_GAP_S = 60.0
"""Rates at which a wrong unit is likelier than such a service: more than 100 requests/s or a
million prompt tokens/s (about 50 GPUs that do nothing but prefill), or a minute from one request
to the next. Public logs have 0.1 to 30 requests/s."""

Array = npt.NDArray[Any]


def seconds_per_tick(
    path: Path, ticks: Array, numbers: Sequence[int], *, bailian: bool, unit: str | None
) -> float:
    """Seconds of one unit of `timestamp`: as asked, Bailian's seconds, or Mooncake's whole ms.

    Raises UnknownNameError for another unit, and FormatError for times with fractions in a log
    that does not say its unit: Mooncake's are whole, others write seconds.
    """
    if unit is not None:
        return unit_seconds(unit)
    if bailian:
        return TIME_UNITS["s"]
    parts = ticks != np.floor(ticks)
    if parts.any():
        row = int(parts.argmax())
        raise FormatError(
            f"{path} line {numbers[row]}: timestamp {ticks[row]:g} is no whole number, so it is not"
            " Mooncake's milliseconds, and nothing says what it is",
            "name the unit with `time_unit`: s or ms",
        )
    return TIME_UNITS["ms"]


def unit_seconds(unit: str) -> float:
    """Seconds of a named unit. Raises UnknownNameError."""
    if unit not in TIME_UNITS:
        raise UnknownNameError("time unit", unit, TIME_UNITS)
    return TIME_UNITS[unit]


def block_size(
    path: Path,
    prompt: Array,
    blocks: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    usual: int,
    asked: int | None,
) -> int:
    """Tokens of a block, such that every row with ids has one for each begun block of its prompt.

    n ids for p tokens mean p / n <= size < p / (n - 1). Where no size fits all rows, ids may stand
    for whole blocks alone: p / (n + 1) < size <= p / n. Of the sizes that fit all rows, `usual`
    comes first, then the only power of two, then the only one.
    Raises FormatError for a row with more ids than tokens, for rows that no one size fits, and
    where several fit; InputError for an `asked` size that rows contradict.
    """
    count = np.array([len(ids) for ids in blocks], np.int64)
    rows = np.flatnonzero((count > 0) & (prompt > 0))
    if not len(rows):
        return asked or usual
    tokens, held = np.minimum(prompt[rows], 1 << 40).astype(np.int64), count[rows]
    over = held > tokens
    if over.any():
        row = int(over.argmax())
        raise FormatError(
            f"{path} line {numbers[rows[row]]}: {held[row]} hash_ids for a prompt of"
            f" {tokens[row]} tokens ({int(over.sum())} such rows)",
            "a block has at least one token: repair the lines, or remove hash_ids from them",
        )
    if asked is not None:
        return _checked(path, asked, tokens, held, [numbers[int(i)] for i in rows])
    begun = (-(-tokens // held), np.where(held > 1, -(-tokens // np.maximum(held - 1, 1)) - 1,
                                          MAX_BLOCK_TOKENS))  # fmt: skip
    whole = (tokens // (held + 1) + 1, tokens // held)
    for low, high in (begun, whole):
        least, most = int(low.max()), int(high.min())
        if least <= most:
            return _chosen(path, least, most, usual)
    at, other = int(begun[0].argmax()), int(begun[1].argmin())
    raise FormatError(
        f"{path} line {numbers[rows[at]]} has {held[at]} hash_ids for {tokens[at]} prompt tokens,"
        f" line {numbers[rows[other]]} {held[other]} for {tokens[other]}: no one block size fits",
        "the ids are not of blocks of one size: name it with `block_tokens` if rows are cut, or"
        " remove hash_ids",
    )


def _checked(path: Path, asked: int, tokens: Array, held: Array, numbers: Sequence[int]) -> int:
    if not 1 <= asked <= MAX_BLOCK_TOKENS:
        raise InputError(f"blocks of {asked} tokens", f"give 1 to {MAX_BLOCK_TOKENS:,}")
    over = held > -(-tokens // asked)
    if over.any():
        row = int(over.argmax())
        raise InputError(
            f"{path} line {numbers[row]}: {held[row]} hash_ids for {tokens[row]} prompt tokens are"
            f" more than blocks of {asked} tokens give ({int(over.sum())} such rows)",
            "give the block size that the log was made with",
        )
    return asked


def _chosen(path: Path, least: int, most: int, usual: int) -> int:
    if least <= usual <= most:
        return usual
    powers = [1 << k for k in range(21) if least <= 1 << k <= most]
    if len(powers) == 1:
        return powers[0]
    if least == most:
        return least
    raise FormatError(
        f"{path}: its hash_ids fit blocks of {least} to {most} tokens, so nothing says which",
        "name the block size that the log was made with: `block_tokens`",
    )


def absurd_rate(arrival_s: Array, prompt: Array, unit: str) -> list[str]:
    """A notice where the log's rate is one that no service has, as a wrong unit makes it."""
    span = float(arrival_s[-1] - arrival_s[0]) if len(arrival_s) > 1 else 0.0
    if span <= 0:
        return []
    rate = (len(arrival_s) - 1) / span
    tokens = float(prompt.sum()) / span
    if rate <= ABSURD_PER_S and tokens <= ABSURD_TOKENS_PER_S and rate * ABSURD_GAP_S >= 1:
        return []
    return [
        f"{rate:,.4g} requests/s and {tokens:,.4g} prompt tokens/s over {span:,.4g} s: times were"
        f" read as {unit}; is that their unit?"
    ]
