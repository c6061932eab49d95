"""Runs commands on damaged files within this process and says what must not have happened."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from moesim.cli.main import COMMANDS, build_app, run
from verification.fuzz.mutate import mutate, mutate_options
from verification.fuzz.seeds import Seed, make_corpus

LIMIT_S = 120.0
"""Seconds of CPU time of one input, compiling kernels included; with ten times as much on the clock
it hangs too."""
MEMORY_BYTES = 1 << 30
CODES = (0, 1, 2)
LONG = frozenset(
    ("--tokens", "--solver", "--backend", "--compare", "--plot", "--time-limit", "--timeline",
     "--rebalance-solver", "--debug", "--trace", "--gpus", "--prefetch", "--ilp", "--price",
     "--out", "--save-spec", "--json", "--journal", "--replicas", "--raw", "--apply")
)  # fmt: skip
"""Options that may rightly take long or write elsewhere, and are not given at random."""


class Hang(BaseException):
    """An input took longer than the limit."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What went wrong with input `number`: `kind`, where, and how to see it again."""

    number: int
    kind: str
    file: str
    args: tuple[str, ...]
    detail: str


@dataclass(slots=True)
class Report:
    """codes: exit codes by kind of file."""

    count: int = 0
    codes: dict[str, Counter[int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Counts by kind of file, then the findings, one of each sort."""
        out = [f"{self.count:,} inputs, {len(self.findings)} findings"]
        for kind, codes in sorted(self.codes.items()):
            told = ", ".join(f"exit {code}: {n:,}" for code, n in sorted(codes.items()))
            out.append(f"  {kind:<28} {sum(codes.values()):>6,}  {told}")
        sorts: dict[tuple[str, str], list[Finding]] = {}
        for found in self.findings:
            sorts.setdefault((found.kind, found.detail[-160:]), []).append(found)
        for (kind, _), same in sorted(sorts.items()):
            first = same[0]
            out.append(f"{kind}, {len(same)} times; input {first.number}: {first.file}")
            out += [f"  moesim {' '.join(map(repr, first.args))}", f"  {first.detail}"]
        return out


def fuzz(
    count: int,
    seed: int = 0,
    first: int = 0,
    keep: Path | None = None,
    say: Callable[[Finding], None] = lambda _: None,
    kinds: str = "",
    minutes: float = math.inf,
) -> Report:
    """Try inputs `first` to `first + count`. keep: a folder for the files of findings. say: gets
    each finding as it is made. kinds: a pattern of their names. minutes: begins no input after
    so long. Linux alone tells the memory that an input took."""
    report, end = Report(), time.monotonic() + 60 * minutes
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="moesim-fuzz-") as name, _quiet(), _no_launch():
        os.chdir(name)
        try:
            seeds = [seed for seed in make_corpus(Path(name)) if re.search(kinds, seed.kind)]
            whole = {p.name for p in Path(name).iterdir()}
            for number in range(first, first + count):
                if time.monotonic() > end:
                    break
                known = len(report.findings)
                _try(number, Random(f"{seed}/{number}"), seeds, report, keep)
                for found in report.findings[known:]:
                    say(found)
                for path in Path(name).iterdir():
                    if path.name not in whole:
                        _remove(path)
        finally:
            os.chdir(before)
    return report


def _try(number: int, rng: Random, seeds: list[Seed], report: Report, keep: Path | None) -> None:
    kinds = sorted({seed.kind for seed in seeds})
    kind = rng.choice(kinds)
    seed = rng.choice([s for s in seeds if s.kind == kind])
    suffix = Path(seed.path).suffix
    bad = Path(f"bad{suffix}")
    if rng.random() < 0.85:
        mutate(Path(seed.path), bad, rng)
    elif Path(seed.path).is_dir():
        shutil.copytree(seed.path, bad)
    else:
        shutil.copy(seed.path, bad)
    args = [p.format(file=bad, out="made") if "{" in p else p for p in rng.choice(seed.commands)]
    if rng.random() < 0.25:
        args = mutate_options(args, _options(args), rng)
    names = {p.name for p in Path().iterdir()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, out, err, crash = _run(args)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    made = sorted({p.name for p in Path().iterdir()} - names)
    report.count += 1
    report.codes.setdefault(kind, Counter())[code if code is not None else -1] += 1
    wrong = list(_judge(code, out, err, crash, made, args))
    if grown > MEMORY_BYTES:
        wrong.append(("memory", f"{grown / 1e9:.1f} GB"))
    for what, detail in wrong:
        report.findings.append(Finding(number, what, seed.path, tuple(args), detail))
    if wrong and keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        target = keep / f"{number}{suffix}"
        if not target.exists():
            (shutil.copytree if bad.is_dir() else shutil.copy)(bad, target)


def _run(args: list[str]) -> tuple[int | None, str, str, str]:
    """Exit code (None after a hang or an exception that got out), output, errors, traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with _alarm():
                code = run(args, debug=True)
        except Hang:
            return (
                None,
                out.getvalue(),
                err.getvalue(),
                f"more than {LIMIT_S:.0f} s\n{traceback.format_exc()[-900:]}",
            )
        except BaseException:
            return None, out.getvalue(), err.getvalue(), traceback.format_exc()
    return code, out.getvalue(), err.getvalue(), ""


def _judge(
    code: int | None, out: str, err: str, crash: str, made: list[str], args: list[str]
) -> Iterator[tuple[str, str]]:
    if crash:
        yield ("hang" if crash.startswith("more than") else "crash"), crash[-600:]
        return
    if "error: internal" in err:
        yield "internal error", _where(err)
        return
    if code not in CODES:
        yield "exit code", str(code)
    said = re.findall(r"^(?:error|remedy): .*$", err, re.MULTILINE)
    if code == 2 and not any(line.startswith("error: ") for line in said):
        yield "no cause", err[-300:]
    bad = sorted({c for c in out + "\n".join(said) if not (c.isprintable() or c == "\n")})
    if bad:
        yield "control characters", repr(bad[:8])
    if code == 2 and any(name.startswith(("made", ".")) for name in made):
        written = [n for n in made if not n.endswith(".journal.jsonl")]
        if written:
            yield "partial output", ", ".join(written)
    if code == 0 and "--json" in args:
        yield from _nonsense(out, "standard output")
    if code == 0:
        for name in made:
            if name.startswith("made") and name.endswith(".json"):
                yield from _nonsense(Path(name).read_text(encoding="utf-8"), name)


def _nonsense(text: str, where: str) -> Iterator[tuple[str, str]]:
    """JSON that is none, or holds numbers that are none."""
    odd: list[str] = []
    try:
        data = json.loads(text, parse_constant=lambda word: odd.append(word) or 0.0)
    except ValueError as error:
        yield "not JSON", f"{where}: {error}; {text[:120]!r}"
        return
    if odd:
        yield "numbers that are none", f"{where}: {odd[0]}"
    sizes = [key for key, value in _leaves(data) if _is_size(key) and value < 0]
    if sizes:
        yield "negative sizes", f"{where}: {sizes[0]}"


def _leaves(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _leaves(value, str(name))
    elif isinstance(data, list):
        for value in data:
            yield from _leaves(value, key)
    elif isinstance(data, (int, float)) and not isinstance(data, bool) and math.isfinite(data):
        yield key, data


def _is_size(key: str) -> bool:
    return key.startswith("num_") or key.endswith(("_bytes", "_tokens", "_experts", "_params"))


def _where(err: str) -> str:
    """The innermost place of the project in a traceback, and the message."""
    places = re.findall(r'File ".*?/(moesim/[^"]+)", line (\d+)', err)
    message = re.findall(r"error: (internal.*)", err)
    at = f"{places[-1][0]}:{places[-1][1]}: " if places else ""
    return at + (message[-1] if message else err[-300:])


def _options(args: list[str]) -> list[str]:
    """Options of the command that take a value and may be given at random."""
    import typer

    command: Any = typer.main.get_command(build_app([a for a in args if a in COMMANDS][:1]))
    for word in args:
        command = getattr(command, "commands", {}).get(word, command)
    found = [o for p in command.params for o in p.opts if o.startswith("--")]
    return sorted(set(found) - LONG)


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(_number: int, _frame: Any) -> None:
        raise Hang

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, LIMIT_S),
        (signal.SIGALRM, signal.ITIMER_REAL, 10 * LIMIT_S),
    )
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _no_launch() -> Iterator[None]:
    """`moesim validate` ends, with exit code 1, where it would start the ranks."""
    from moesim.replay import launch

    def stop(*_: Any, **__: Any) -> None:
        raise launch.ReplayError("not started", "", 1)

    before = launch.launch
    launch.launch = stop
    try:
        yield
    finally:
        launch.launch = before


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
