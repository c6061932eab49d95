"""`moesim.elastic`: policies of a day by hand, least moves, and what is refused."""

from __future__ import annotations

import pytest

import moesim
from moesim.cli.main import run
from moesim.errors import InputError
from moesim.studies.elastic import Change, _judged, _policies, _runs

KEPT = {(2, 1.0): 1.0, (2, 4.0): 0.5, (4, 1.0): 1.0, (4, 4.0): 1.0}
DAY = [1.0] * 12 + [4.0] * 12


def test_policies_by_hand() -> None:
    """Twelve quiet hours need 2 GPUs, twelve busy ones 4. Known a hour before, hour 11 has 4 and
    hour 23 still 4; following, hour 12 has 2 and hour 0 has 4."""
    found = _policies(DAY, KEPT, [2, 4], 0.99)
    assert found["as this and the next hour need (known)"] == [2] * 11 + [4] * 13
    assert found["as the hour before needed"] == [4] + [2] * 12 + [4] * 11
    assert _runs(found["as the hour before needed"]) == "4, 2 from 1 h, 4 from 13 h"


def test_missed_promises_and_dollars_by_hand() -> None:
    """2 GPUs all day: half of 4 requests/s is late in 12 of 24 hours, 2 of (1 + 4) / 2 x 2: 40%.
    With 36 s of stall at a change from 2 to 4, 1% of an hour of 4 requests/s: 144 of 216,000."""
    change = Change(1, 1, 0.0, 36.0)
    changes = {(2, 4): change, (4, 2): Change(1, 1, 0.0, 0.0)}
    always = _judged([2] * 24, DAY, KEPT, changes, 3.0)
    assert always.missed == pytest.approx(0.4)
    assert always.usd_per_day == 144.0
    moving = _judged([2] * 12 + [4] * 12, DAY, KEPT, changes, 3.0)
    assert moving.missed == pytest.approx(144 / 216_000)
    assert (moving.usd_per_day, moving.num_changes, moving.stalled_s) == (216.0, 2, 36.0)


def test_a_day_of_a_small_service() -> None:
    """A day with two rates: every change moves as few experts as can be, the cheapest policy that
    keeps the promises is named, and JSON has all of it."""
    result = moesim.elastic(
        "poisson:rate=1,requests=40,prompt=50,output=20",
        model="DeepSeek-V2-Lite",
        widths=(2, 4),
        slo="ttft<5s,tpot<500ms",
        peak=2.0,
        day=DAY,
    )
    assert all(c.moved == c.least for c in result.changes.values())
    assert result.best == "always 2 GPUs"
    assert not result.worth_it
    assert result.line().startswith("keep one width: always 2 GPUs: $144 per day")
    assert set(result.to_json()["policies"]) == set(result.policies)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"widths": (2, 3)}, "do not divide over 3 GPUs"),
        ({"widths": (2,)}, "at least two"),
        ({"day": [1.0] * 23}, "24 loads"),
        ({"peak": 0.0}, "peak"),
        ({"good": 1.5}, "good"),
    ],
)
def test_numbers_that_cannot_be_used(changed: dict, said: str) -> None:
    given = {"model": "DeepSeek-V2-Lite", "widths": (2, 4), "slo": "ttft<5s", "peak": 2.0}
    with pytest.raises(InputError) as error:
        moesim.elastic("poisson:rate=1,requests=4,prompt=5,output=2", **(given | changed))
    assert said in str(error.value) or said in error.value.remedy


def test_the_command_exits_with_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """One width is enough, so that nothing is to be changed: exit 1."""
    args = ["--requests", "poisson:rate=1,requests=20,prompt=50,output=20", "--peak", "1"]
    args += ["--model", "DeepSeek-V2-Lite", "--widths", "2,4", "--slo", "ttft<5s,tpot<500ms"]
    assert run(["elastic", *args, "--day", ",".join(["1"] * 24)]) == 1
    said = capsys.readouterr().out
    assert "keep one width: always 2 GPUs" in said
    assert "ms per layer that moves" in said


def test_a_service_that_is_still_filling_is_named() -> None:
    """200 requests in a second, answered within many: nothing is steady, and that is said."""
    result = moesim.elastic(
        "poisson:rate=200,requests=200,prompt=500,output=400",
        model="DeepSeek-V2-Lite",
        widths=(2, 4),
        slo="ttft<5s,tpot<500ms",
        peak=200.0,
        day=[1.0] * 24,
    )
    assert result.unsteady == ((2, 200.0), (4, 200.0))
    said = result.summary()
    assert "no steady state: 2 GPUs from 200 requests/s, 4 GPUs from 200 requests/s" in said
    assert "the requests of 120 s at each rate" in said


def test_small_steps_keep_tokens_apart_small() -> None:
    """Prompts of 2,000 tokens in one step of a rank make all ranks wait; in pieces of 512 they do
    not, so that promises between two tokens are kept which whole prompts break."""
    kept = [
        moesim.elastic(
            "poisson:rate=40,requests=400,prompt=2000,output=60",
            model="DeepSeek-V2-Lite",
            widths=(4, 8),
            slo="tpot<20ms",
            peak=40.0,
            day=[1.0] * 24,
            max_batch_tokens=tokens,
        ).kept[8, 40.0]
        for tokens in (None, 512)
    ]
    assert kept[0] < kept[1]
