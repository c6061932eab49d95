"""What a service has to do: requests at a rate, and the promises to keep."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from moesim.errors import InputError
from moesim.serving.arrivals import load_requests
from moesim.serving.requests import Requests
from moesim.serving.slo import Slo, parse_slo
from moesim.serving.synthetic import synthetic_requests

SHORTEST_S = 120.0
"""A drawn load lasts at least this long, so that its p99 is one of a steady service."""
FEWEST, MOST = 2000, 20_000
UNSAID = "p99"
"""A promise without a percentile is one for this share of the requests."""


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """rate: requests/s; prompt, output: mean tokens; longest: most tokens of one request.

    log: the requests where they come from a log, else None and `lengths` says how they are drawn.
    """

    slo: Slo
    rate: float
    prompt: float
    output: float
    longest: int
    lengths: tuple[str, str]
    log: Requests | None
    seed: int

    def requests(self, rate: float) -> Requests:
        """The load at another rate: a log's arrivals closer together, or Poisson arrivals over
        SHORTEST_S or more, FEWEST to MOST of them."""
        if self.log is not None:
            return self.log if rate == self.rate else self.log.scaled(rate / self.rate)
        count = int(min(max(rate * SHORTEST_S, FEWEST), MOST))
        prompt, output = self.lengths
        text = f"poisson:rate={rate!r},requests={count},prompt={prompt},output={output}"
        return synthetic_requests(text, self.seed)

    def limit_s(self, latency: str) -> float:
        """The strictest promise about ttft or tpot, whatever its percentile; infinite without."""
        return min(
            (b.limit_s for b in self.slo.bounds if b.latency == latency), default=float("inf")
        )


def need_of(
    slo: str | None,
    rate: float | None,
    prompt: int | str | None,
    output: int | str | None,
    requests: str | os.PathLike[str] | Requests | None,
    seed: int,
) -> Need:
    """Raises InputError where it is not clear what is asked."""
    if slo is None:
        raise InputError(
            "nothing is promised, so any number of GPUs would do",
            'say what to keep with `slo`: "ttft_p99<2s,tpot_p99<50ms"',
        )
    promises = Slo(tuple(replace(b, stat=b.stat or UNSAID) for b in parse_slo(slo).bounds))
    if requests is not None:
        if prompt is not None or output is not None:
            raise InputError(
                "`requests` together with `prompt` or `output`: lengths are said twice",
                "leave out `prompt` and `output`",
            )
        log = requests if isinstance(requests, Requests) else load_requests(str(requests))
        if not log.rate_per_s > 0:
            raise InputError(
                "all requests of the log arrive at once: it has no rate", "give others"
            )
        log = log if rate is None else log.scaled(rate / log.rate_per_s)
        return _need(promises, log.rate_per_s, ("", ""), log, log, seed)
    lengths = (str(1000 if prompt is None else prompt), str(300 if output is None else output))
    asked = 1.0 if rate is None else rate
    if not asked > 0:
        raise InputError(f"`rate` {asked} requests/s", "give a number above 0")
    probe = Need(promises, asked, 0.0, 0.0, 0, lengths, None, seed).requests(asked)
    return _need(promises, asked, lengths, None, probe, seed)


def _need(
    slo: Slo,
    rate: float,
    lengths: tuple[str, str],
    log: Requests | None,
    seen: Requests,
    seed: int,
) -> Need:
    return Need(
        slo=slo,
        rate=rate,
        prompt=float(seen.prompt_tokens.mean()),
        output=float(seen.output_tokens.mean()),
        longest=int((seen.prompt_tokens + seen.output_tokens).max()),
        lengths=lengths,
        log=log,
        seed=seed,
    )
