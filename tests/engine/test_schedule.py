"""Rows of a step: whole prompts in prefill, one token each of many requests in decode."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesim.engine.schedule import PhaseRows, RowSchedule

PREFILL = PhaseRows(np.array([10, 11, 12, 20, 21]), np.array([0, 3]))
DECODE = PhaseRows(np.array([100, 101, 102, 103]), np.array([0, 2]))


def rows(schedule: RowSchedule, names: list[str], *numbers: list[int]) -> list[int]:
    return schedule.rows(names, *(np.array(n) for n in numbers)).tolist()


def test_a_prompt_takes_a_request_from_its_start() -> None:
    """Two requests, 3 and 2 rows: two prompts take both, each from its first row."""
    got = rows(RowSchedule(PREFILL, DECODE, 0), ["a", "b"], [2, 2], [0, 0], [2, 2])
    assert sorted([got[:2], got[2:]]) == [[10, 11], [20, 21]]


def test_a_longer_prompt_goes_on_with_the_following_request_and_wraps() -> None:
    """7 tokens from place s of an order of 5: places s, s+1, ... modulo 5."""
    got = rows(RowSchedule(PREFILL, DECODE, 0), ["a"], [7], [0], [7])
    order = PREFILL.order.tolist()
    start = order.index(got[0])
    assert got == [order[(start + i) % 5] for i in range(7)]
    assert start in PREFILL.starts


def test_chunks_are_the_whole_prompt() -> None:
    """3 + 2 tokens in two steps are the 5 of one step."""
    whole = rows(RowSchedule(PREFILL, DECODE, 4), ["a"], [5], [0], [5])
    chunked = RowSchedule(PREFILL, DECODE, 4)
    first = rows(chunked, ["a"], [3], [0], [5])
    assert first + rows(chunked, ["a"], [2], [3], [5]) == whole


def test_answers_go_on_row_by_row_from_the_decode_rows() -> None:
    """A prompt of 2: positions 2, 3, 4 are consecutive decode rows, modulo 4."""
    schedule = RowSchedule(PREFILL, DECODE, 1)
    rows(schedule, ["a"], [2], [0], [2])
    got = [rows(schedule, ["a"], [1], [at], [2])[0] for at in (2, 3, 4)]
    assert got == [100 + (got[0] - 100 + i) % 4 for i in range(3)]


def test_prompt_and_answer_in_one_step() -> None:
    """A step across a prompt's end: the last prompt row, then a decode row."""
    got = rows(RowSchedule(PREFILL, DECODE, 0), ["a"], [2], [1], [2])
    assert got[0] in (11, 21)
    assert got[1] >= 100


def test_decode_tokens_come_from_many_places() -> None:
    """200 requests of one token from 1,000 rows: over 150 different rows (expected 181)."""
    decode = PhaseRows(np.arange(1000), np.arange(0, 1000, 10))
    names = [str(i) for i in range(200)]
    ones = np.ones(200, int)
    got = RowSchedule(PREFILL, decode, 0).rows(names, ones, ones * 5, ones * 5)
    assert len(set(got.tolist())) > 150


def test_ranks_take_other_rows() -> None:
    """Seeds of two ranks; the same seed twice is the same."""
    decode = PhaseRows(np.arange(1000), np.zeros(1, int))
    names, ones = [str(i) for i in range(20)], np.ones(20, int)
    a, b, c = (RowSchedule(PREFILL, decode, s).rows(names, ones, ones, ones) for s in (1, 2, 1))
    assert a.tolist() == c.tolist() != b.tolist()


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30), st.integers(1, 30)), min_size=1),
    st.integers(0, 5),
)
def test_one_row_a_token_of_the_right_phase(steps: list[tuple[int, int, int]], seed: int) -> None:
    """Any step: a row per token; prompt positions take prefill rows, the others decode rows."""
    scheduled, computed, prompt = (np.array(x) for x in zip(*steps, strict=True))
    names = [str(i) for i in range(len(steps))]
    got = RowSchedule(PREFILL, DECODE, seed).rows(names, scheduled, computed, prompt)
    position = np.concatenate(
        [np.arange(n) + at for n, at in zip(scheduled, computed, strict=True)]
    )
    in_prompt = position < np.repeat(prompt, scheduled)
    assert ((got < 100) == in_prompt).all()
