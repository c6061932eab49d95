"""Damaged files of every kind and odd options: an answer or an error of two lines, nothing else.

A bounded run of `python -m verification.fuzz`, and tests that the harness sees what it looks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from verification.fuzz import harness
from verification.fuzz.seeds import make_corpus

COUNT = 100


@pytest.mark.timeout(900)
def test_damaged_files_give_an_answer_or_an_error() -> None:
    report = harness.fuzz(COUNT, seed=7)
    assert report.count == COUNT
    assert len(report.codes) > 20
    assert not report.findings, "\n".join(report.lines())


@pytest.mark.timeout(900)
def test_every_whole_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise damage to it would show nothing. vLLM as released takes no replicas."""
    monkeypatch.chdir(tmp_path)
    for seed in make_corpus(tmp_path):
        for command in seed.commands:
            args = [p.format(file=seed.path, out="made") if "{" in p else p for p in command]
            if not ("two.json" in args and "vllm" in args):
                with harness._no_launch():
                    code, _, err, crashed = harness._run(args)
                assert code in (0, 1), (args, err, crashed)


def test_a_seed_names_its_inputs() -> None:
    """Input 5 alone is what it is among others."""
    codes = [harness.fuzz(count, seed=3, first=first).codes for count, first in ((6, 0), (5, 0))]
    alone = harness.fuzz(1, seed=3, first=5).codes
    for kind, found in alone.items():
        codes[1].setdefault(kind, type(found)()).update(found)
    assert codes[0] == codes[1]


def bad_value(_: list[str]) -> int:
    print(json.dumps({"num_tokens": -1, "time_us": float("nan")}))
    return 0


def half_written(_: list[str]) -> int:
    Path("made.json").write_text("{")
    raise_input_error()
    return 2


def raise_input_error() -> None:
    import sys

    print("error: a name with \x1b[31m in it\nremedy: none", file=sys.stderr)


def internal(_: list[str]) -> int:
    import sys

    print("error: internal: KeyError: 'x'", file=sys.stderr)
    return 2


def crash(_: list[str]) -> int:
    raise SystemExit(3)


def never(_: list[str]) -> int:
    while True:
        pass


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        (bad_value, {"numbers that are none", "negative sizes"}),
        (half_written, {"control characters", "partial output"}),
        (internal, {"internal error"}),
        (crash, {"crash"}),
        (never, {"hang"}),
        (lambda _: 2, {"no cause"}),
        (lambda _: 7, {"exit code"}),
    ],
)
def test_the_harness_sees(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[list[str]], int],
    kinds: set[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "LIMIT_S", 0.2)
    monkeypatch.setattr(harness, "run", lambda args, debug: command(args))
    made_before = {p.name for p in tmp_path.iterdir()}
    code, out, err, crashed = harness._run(["plan", "--json"])
    made = sorted({p.name for p in tmp_path.iterdir()} - made_before)
    found = {kind for kind, _ in harness._judge(code, out, err, crashed, made, ["--json"])}
    assert found == kinds
