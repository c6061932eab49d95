"""Requests of a job: a log by its path, or arrivals drawn."""

from __future__ import annotations

import os

from moesim.errors import InputError
from moesim.serving.arrivals import load_requests
from moesim.serving.requests import Requests
from moesim.serving.synthetic import is_synthetic, synthetic_requests


def arriving_requests(
    requests: Requests | str | os.PathLike[str],
    *,
    seed: int,
    skip_empty: bool = False,
    time_unit: str | None = None,
    block_tokens: int | None = None,
    first: int | None = None,
    rate_scale: float = 1.0,
    label: str | None = None,
) -> Requests:
    """The requests, the `first` of them, arriving `rate_scale` times as fast, with a log's column
    `label` if one is named. Raises InputError for
    `time_unit` and `block_tokens` of requests that are no log, and what the readers raise."""
    log = not isinstance(requests, Requests) and not is_synthetic(str(requests))
    if not log and (time_unit is not None or block_tokens is not None):
        raise InputError(
            "`time_unit` and `block_tokens` are for request logs, not for drawn requests",
            "leave them out",
        )
    if label is not None and not log and not isinstance(requests, Requests):
        raise InputError(
            f"the column {label!r:.60} of drawn requests, which have none", "give a log that has it"
        )
    if isinstance(requests, Requests):
        found = requests
    elif log:
        found = load_requests(
            str(requests),
            skip_empty=skip_empty,
            time_unit=time_unit,
            block_tokens=block_tokens,
            label=label,
        )
    else:
        found = synthetic_requests(str(requests), seed)
    if first is not None:
        found = found.first(first)
    return found if rate_scale == 1.0 else found.scaled(rate_scale)
