"""Requests drawn from distributions: Poisson, Gamma or regular arrivals, lengths by formula."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError, UnknownNameError
from moesim.numerals import number
from moesim.serving.arrivals import load_requests
from moesim.serving.requests import MAX_TOKENS, Requests
from moesim.types import stream

PROCESSES = ("poisson", "gamma", "constant")
LENGTHS = ("fixed", "uniform", "lognormal", "exponential")
DEFAULTS = {"requests": "1000", "prompt": "1024", "output": "256"}
MAX_REQUESTS = 10_000_000
_KEYS = ("rate", "cv", "requests", "prompt", "output", "lengths")
_LENGTH = re.compile(r"^([a-z]+)\(([^()]*)\)$")
_REMEDY = (
    'write as "poisson:rate=8,requests=2000,prompt=lognormal(1000;0.8),output=200";'
    " prompt and output: N, fixed(N), uniform(LOW;HIGH), lognormal(MEAN;SIGMA), exponential(MEAN)"
)


def is_synthetic(text: str) -> bool:
    """Whether `text` names an arrival process and no file."""
    return text.partition(":")[0] in PROCESSES


def split_processes(text: str) -> list[str]:
    """Files and processes with commas between them, one by one: a KEY=VALUE behind a process is
    its own."""
    out: list[str] = []
    for part in text.split(","):
        own = part.partition("=")[0].strip() in _KEYS
        if own and out and is_synthetic(out[-1]):
            out[-1] += f",{part}"
        else:
            out.append(part)
    return out


def synthetic_requests(text: str, seed: int = 0) -> Requests:
    """Requests of a process such as "gamma:rate=8,cv=2,requests=2000,prompt=1024,output=256".

    rate: arrivals a second. cv: coefficient of variation of the gaps of "gamma" (Poisson has 1).
    lengths=FILE draws pairs of prompt and output, with replacement, from a file of requests.
    The clock starts with the first request. Lognormal lengths are given by their mean and the sigma
    of the logarithm. Same text and seed, same requests.
    Raises InputError or UnknownNameError for text that is no such thing.
    """
    process, _, rest = text.partition(":")
    if process not in PROCESSES:
        raise UnknownNameError("arrival process", process, PROCESSES)
    given: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, sign, value = part.partition("=")
        if not sign:
            raise InputError(f"{part!r:.80} is no KEY=VALUE", _REMEDY)
        if key not in _KEYS:
            raise UnknownNameError(f"key of {process}", key, _KEYS)
        given[key] = value
    if "cv" in given and process != "gamma":
        raise InputError(f"cv with {process} arrivals", "use gamma arrivals")
    settings = DEFAULTS | given
    rate = _positive("rate", given.get("rate", ""))
    count = _positive("requests", settings["requests"])
    if count != int(count) or count > MAX_REQUESTS:
        raise InputError(f"requests={settings['requests']}", f"give 1 to {MAX_REQUESTS:,}")
    rng = stream(seed)
    gaps = _gaps(process, rate, _positive("cv", given.get("cv", "1")), int(count), rng)
    if "lengths" in given:
        if "prompt" in given or "output" in given:
            raise InputError("lengths=FILE together with prompt or output", "keep one of them")
        log = load_requests(Path(given["lengths"]), skip_empty=True)
        row = rng.integers(0, len(log), int(count))
        prompt, output = log.prompt_tokens[row], log.output_tokens[row]
    else:
        prompt = _draw("prompt", settings["prompt"], int(count), rng)
        output = _draw("output", settings["output"], int(count), rng)
    return Requests.of(np.cumsum(gaps), prompt, output, source=text, basis="assumed")


def _gaps(
    process: str, rate: float, cv: float, count: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    if process == "constant":
        return np.full(count, 1.0 / rate)
    shape = 1.0 / cv**2
    return rng.gamma(shape, 1.0 / (rate * shape), count)


def _draw(what: str, text: str, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    found = _LENGTH.match(text.strip())
    kind, inner = found.groups() if found else ("fixed", text)
    if kind not in LENGTHS:
        raise UnknownNameError("distribution of lengths", kind, LENGTHS)
    values = [_positive(what, part) for part in inner.split(";")]
    if len(values) != (2 if kind in ("uniform", "lognormal") else 1):
        raise InputError(f"{what}={text!r:.80}: {kind} takes another number of values", _REMEDY)
    mean = values[0]
    if kind == "fixed":
        drawn = np.full(count, mean)
    elif kind == "uniform":
        drawn = np.floor(rng.uniform(mean, values[1] + 1, count))
    elif kind == "lognormal":
        drawn = rng.lognormal(math.log(mean) - values[1] ** 2 / 2, values[1], count)
    else:
        drawn = rng.exponential(mean, count)
    return np.clip(np.round(drawn), 1, MAX_TOKENS).astype(np.int64)


def _positive(key: str, text: str) -> float:
    try:
        value = number(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        shown = f"{key}={text!r:.60}" if text else f"no {key} is given"
        raise InputError(f"{shown}: a number above 0 is needed", _REMEDY)
    return value
