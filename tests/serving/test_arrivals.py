"""Requests from files and processes: what is read, what is refused and how it is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import FormatError, InputError, MoesimError, UnknownNameError
from moesim.serving.arrivals import load_requests
from moesim.serving.requests import Requests
from moesim.serving.synthetic import is_synthetic, synthetic_requests

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5.0,ChatGPT,472,18,490,Conversation log
45.5,ChatGPT,1087,230,1317,Conversation log
45.5,GPT-4,417,0,417,API log
"""


def entry(time: float, prompt: int, output: int, *blocks: int) -> str:
    row = {"timestamp": time, "input_length": prompt, "output_length": output}
    return json.dumps(row | {"hash_ids": list(blocks)})


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_azure(tmp_path: Path) -> None:
    """Times to 100 ns, from the first: 50.995169 - 46.680590 = 4.314579."""
    requests = load_requests(written(tmp_path / "a.csv", AZURE))
    np.testing.assert_allclose(requests.arrival_s, [0.0, 4.314579, 4.541877], atol=1e-12)
    assert requests.prompt_tokens.tolist() == [374, 396, 879]
    assert requests.output_tokens.tolist() == [44, 109, 55]
    assert requests.basis == "measured"
    assert requests.rate_per_s == pytest.approx(2 / 4.541877)


def test_azure_with_time_zone_and_priority(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens,priority\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5,1\n2024-05-10 00:00:01.009930+00:00,10,6,0\n"
    )
    requests = load_requests(written(tmp_path / "a.csv", text))
    assert requests.arrival_s.tolist() == [0.0, 1.0]
    assert requests.priority.tolist() == [1, 0]


def test_burstgpt(tmp_path: Path) -> None:
    """Failed requests have no response: refused, or left out on demand."""
    path = written(tmp_path / "b.csv", BURST)
    with pytest.raises(InputError, match=r"b.csv line 4: 0 output tokens \(1 such rows\)") as error:
        load_requests(path)
    assert "`skip_empty`" in error.value.remedy
    requests = load_requests(path, skip_empty=True)
    assert requests.arrival_s.tolist() == [0.0, 40.5]
    assert requests.notices == (
        "read 2 requests over 40.5 s (0.0247/s), times in s",
        "not read: Model, Total tokens, Log Type",
        "1 of 3 rows without prompt or output left out",
    )


def test_mooncake(tmp_path: Path) -> None:
    """Times in ms; block ids become 0, 1, ... in order of value."""
    lines = [entry(0, 1100, 6, 7, 8, 9), entry(40, 600, 3, 7, 100)]
    requests = load_requests(written(tmp_path / "m.jsonl", "\n".join(lines) + "\n\n"))
    assert requests.arrival_s.tolist() == [0.0, 0.04]
    assert requests.block_indptr.tolist() == [0, 3, 5]
    assert requests.block_ids.tolist() == [0, 1, 2, 0, 3]
    assert requests.block_tokens == 512
    assert requests.first(1).block_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b,c\n1,2,3\n", "has the columns 'a,b,c'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "a header but no requests"),
        (AZURE + "2023-11-16 18:16:00,12\n", "line 5 has 2 cells, the header 3"),
        (AZURE + "2023-11-16 18:16:00,12,x\n", "line 5: 'x' is no number"),
        (AZURE + "2023-11-16 18:16:00,nan,5\n", "line 5: 'nan' is no number"),
        (AZURE + "2023-11-16 18:16:00,1e999,5\n", "line 5: '1e999' is no number"),
        (AZURE + "2023-11-16 18:16:00,0,5\n", "line 5: 0 prompt tokens"),
        (AZURE + "2023-11-16 18:16:00,1.5,5\n", "line 5: 1.5 prompt tokens"),
        (AZURE + "2023-11-16 18:16:00,-3,5\n", "line 5: -3 prompt tokens"),
        (AZURE + "2023-11-16 18:16:00,9999999999999,5\n", "line 5: 1e+13 prompt tokens"),
        (AZURE + "2023-11-16 18:15:00,5,5\n", "line 5 is 51.2225 s earlier than the one above"),
        (AZURE + "yesterday,5,5\n", "line 5: 'yesterday' is no time of day"),
        (AZURE + "NaT,5,5\n", "line 5 has no time"),
        (AZURE + "12.5,5,5\n", "line 5: '12.5' is no time of day"),
        (BURST.replace("5.0,", "-5.0,", 1), "the arrival time -5 s is negative"),
        (BURST.replace("5.0,", "50,", 1), "line 3 arrives 4.5 s before the one above"),
        (BURST.replace("5.0,", "inf,", 1), "line 2: 'inf' is no number"),
        ('{"timestamp": 0, "input_length": 4}\n', "line 1 lacks one of timestamp"),
        (entry(0, 4, 4) + '\n{"timestamp": 5, "inp', "line 2 is not JSON"),
        (entry(0, 4, 4) + "\n[1]", "line 2 lacks one of"),
        (entry(0, 4, 4).replace("[]", '"x"'), "hash_ids is no list"),
        (entry(0, 4, 4).replace("[]", "[1.5]"), "hash_ids is no list"),
        (entry(0, 4, 4).replace(": 0,", ": true,"), "True is no number"),
        ("{" * 100_000, "line 1 is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, cause: str) -> None:
    """Cause with the line, a remedy, exit code 2, and no other exception."""
    path = written(tmp_path / "bad.csv", text)
    with pytest.raises(MoesimError) as error:
        load_requests(path)
    assert cause in error.value.cause
    assert error.value.remedy
    assert error.value.exit_code == 2


def test_no_text_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="not UTF-8"):
        load_requests(tmp_path / "x.npz")
    with pytest.raises(InputError, match="No such file"):
        load_requests(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot read"):
        load_requests(tmp_path)


def test_of_refuses() -> None:
    with pytest.raises(InputError, match="no requests"):
        Requests.of([], [], [])
    with pytest.raises(InputError, match="request 1: the arrival time is no number"):
        Requests.of([0.0, float("nan")], [1, 1], [1, 1])
    with pytest.raises(InputError, match="3 prompt lengths for 2 arrival times"):
        Requests.of([0.0, 1.0], [1, 1, 1], [1, 1])
    with pytest.raises(InputError, match="17 different priorities"):
        Requests.of(np.zeros(17), np.ones(17), np.ones(17), priority=np.arange(17))


def test_scaled_and_prioritised() -> None:
    requests = Requests.of([0.0, 1.0, 3.0], [1, 1, 1], [1, 1, 1])
    assert requests.scaled(2.0).arrival_s.tolist() == [0.0, 0.5, 1.5]
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="rate scale"):
            requests.scaled(bad)
    many = Requests.of(np.zeros(9000), np.ones(9000), np.ones(9000))
    shares = np.bincount(many.with_priorities([1.0, 2.0]).priority) / 9000
    np.testing.assert_allclose(shares, [1 / 3, 2 / 3], atol=0.02)
    for bad_shares in ([], [-1.0, 2.0], [0.0], [float("nan")]):
        with pytest.raises(InputError, match="priorities in shares"):
            many.with_priorities(bad_shares)


def test_poisson_and_gamma() -> None:
    """Gaps have mean 1 / rate and the asked coefficient of variation; lognormal lengths the asked
    mean; the same seed gives the same requests (INV-6)."""
    text = "gamma:rate=50,cv=3,requests=100000,prompt=lognormal(1000;0.5),output=exponential(200)"
    requests = synthetic_requests(text, 3)
    gaps = np.diff(requests.arrival_s)
    assert gaps.mean() == pytest.approx(0.02, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.03)
    assert requests.prompt_tokens.mean() == pytest.approx(1000, rel=0.01)
    assert requests.output_tokens.mean() == pytest.approx(200, rel=0.02)
    assert synthetic_requests(text, 3).content_hash() == requests.content_hash()
    assert synthetic_requests(text, 4).content_hash() != requests.content_hash()
    gaps = np.diff(synthetic_requests("poisson:rate=2,requests=50000").arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.02)
    steady = synthetic_requests("constant:rate=4,requests=3,prompt=7,output=uniform(2;4)")
    np.testing.assert_allclose(steady.arrival_s, [0.0, 0.25, 0.5])
    assert set(steady.prompt_tokens) == {7}


def test_lengths_of_a_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", AZURE)
    requests = synthetic_requests(f"poisson:rate=2,requests=500,lengths={path}")
    pairs = set(zip(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True))
    assert pairs == {(374, 44), (396, 109), (879, 55)}


@pytest.mark.parametrize(
    "text",
    [
        "poisson:",
        "poisson:rate=0",
        "poisson:rate=nan",
        "poisson:rate=5,cv=2",
        "poisson:rate=5,requests=1e12",
        "poisson:rate=5,requests=2.5",
        "poisson:rate=5,prompt=triangle(3)",
        "poisson:rate=5,prompt=uniform(3)",
        "poisson:rate=5,prompt=lognormal(3;-1)",
        "poisson:rate=5,prompt=__import__('os')",
        "poisson:rate=5,speed=3",
        "poisson:rate=5,7",
        "poisson:rate=5,lengths=none.csv",
        "poisson:rate=5,lengths=x.csv,prompt=4",
    ],
)
def test_bad_processes(text: str) -> None:
    assert is_synthetic(text)
    with pytest.raises(InputError) as error:
        synthetic_requests(text)
    assert error.value.remedy


def test_unknown_process() -> None:
    assert not is_synthetic("poison:rate=3")
    with pytest.raises(UnknownNameError, match="poison"):
        synthetic_requests("poison:rate=3")


def test_real_logs() -> None:
    """The shared logs, where they are: 19,366 and 3,993 requests."""
    folder = Path("../shared/data/requests")
    if not folder.is_dir():
        pytest.skip("../shared/data/requests is not here")
    azure = load_requests(folder / "AzureLLMInferenceTrace_conv_2023.csv")
    assert (len(azure), int(azure.prompt_tokens.sum())) == (19366, 22361870)
    mooncake = load_requests(folder / "mooncake_synthetic_trace.jsonl")
    assert len(mooncake) == 3993
    whole = mooncake.prompt_tokens // 512
    assert (np.diff(mooncake.block_indptr) >= whole).all()


def test_format_error_is_input_error() -> None:
    assert issubclass(FormatError, InputError)


BAILIAN = {"chat_id": 0, "parent_chat_id": -1, "type": "text", "turn": 1}


def log(path: Path, rows: list[tuple[float, int, int]], **more: object) -> Path:
    """JSONL of (timestamp, prompt tokens, number of hash_ids); ids are unique."""
    lines, first = [], 0
    for time, prompt, count in rows:
        ids = list(range(first, first + count))
        first += count
        row = {"timestamp": time, "input_length": prompt, "output_length": 2, "hash_ids": ids}
        lines.append(json.dumps({**more, **row}))
    return written(path, "\n".join(lines))


def test_bailian_is_told_by_its_keys(tmp_path: Path) -> None:
    """Seconds and blocks of 16: 40 tokens are 2.5 blocks, so 3 ids; 1.5 s between two requests."""
    found = load_requests(log(tmp_path / "b.jsonl", [(0.5, 40, 3), (2.0, 16, 1)], **BAILIAN))
    assert found.arrival_s.tolist() == [0.0, 1.5]
    assert found.block_tokens == 16
    assert found.notices == (
        "read 2 requests over 1.5 s (0.667/s), times in s, hash_ids of blocks of 16 tokens",
        "not read: chat_id, parent_chat_id, type, turn",
    )


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        # 1000 tokens in 16 ids: 63 to 66; 500 in 8: 63 to 71. The power of two in both is 64.
        ([(0, 1000, 16), (1, 500, 8)], 64),
        # 600 in 2 ids: 300 to 599, in which 512 lies.
        ([(0, 600, 2)], 512),
        # 130 tokens in 2 ids and 64 in 1: begun blocks would need 65 <= size <= 129 and size >= 64,
        # so 128 fits.
        ([(0, 130, 2), (1, 64, 1)], 128),
        # Whole blocks only: 130 in 2 ids and 100 in 1 as blocks of 51 to 65; begun blocks cannot
        # be, since 100 in 1 wants 100 or more, 191 in 2 allows 190 at most, 300 in 4 99 at most.
        ([(0, 130, 2), (1, 100, 1), (2, 191, 2), (3, 300, 4)], 64),
        # 100 in 4 ids: 25 to 33; 75 in 3: 25 to 37; 50 in 2: 25 to 49; 25 in 1, 51 in 3: 25 at most
        ([(0, 100, 4), (1, 51, 3)], 25),
    ],
)
def test_block_size_follows_from_the_rows(
    tmp_path: Path, rows: list[tuple[float, int, int]], size: int
) -> None:
    assert load_requests(log(tmp_path / "m.jsonl", rows)).block_tokens == size


def test_block_sizes_that_do_not_fit(tmp_path: Path) -> None:
    """1024 tokens in 2 ids want 512 or more, 600 in 8 ids want 85 at most."""
    path = log(tmp_path / "m.jsonl", [(0, 1024, 2), (1, 600, 8)])
    with pytest.raises(FormatError, match=r"line 1 has 2 hash_ids .* line 2 8 for 600") as error:
        load_requests(path)
    assert "`block_tokens`" in error.value.remedy
    with pytest.raises(InputError, match="line 2: 8 hash_ids for 600 prompt tokens are more"):
        load_requests(path, block_tokens=512)
    assert load_requests(path, block_tokens=64).block_tokens == 64
    many = log(tmp_path / "n.jsonl", [(0, 10, 1)] * 2)
    assert load_requests(many).block_tokens == 512  # of the sizes from 10 on, Mooncake's
    over = log(tmp_path / "o.jsonl", [(0, 10, 1), (1, 10, 12)])
    with pytest.raises(FormatError, match=r"line 2: 12 hash_ids for a prompt of 10 tokens \(1 "):
        load_requests(over)
    several = log(tmp_path / "p.jsonl", [(0, 600, 1), (1, 700, 1)])  # 700 or more, of any size
    with pytest.raises(FormatError, match=r"fit blocks of 700 to 1048576 tokens, so nothing says"):
        load_requests(several)


def test_time_units(tmp_path: Path) -> None:
    """Fractions are not Mooncake's whole ms, and nothing says what they are."""
    path = log(tmp_path / "g.jsonl", [(0.0, 12, 1), (0.3, 21, 2), (0.6, 16, 1)])
    with pytest.raises(FormatError, match=r"line 2: timestamp 0\.3 is no whole number") as error:
        load_requests(path)
    assert "`time_unit`" in error.value.remedy
    found = load_requests(path, time_unit="s")
    assert found.arrival_s.tolist() == [0.0, 0.3, 0.6]
    assert found.block_tokens == 16  # 12 <= b, 11 <= b <= 20, 16 <= b: 16 to 20
    assert load_requests(path, time_unit="ms").span_s == pytest.approx(0.6e-3)
    with pytest.raises(UnknownNameError, match="unknown time unit 'hours'"):
        load_requests(path, time_unit="hours")
    azure = written(tmp_path / "a.csv", AZURE)
    with pytest.raises(InputError, match="its times are dates"):
        load_requests(azure, time_unit="s")
    with pytest.raises(InputError, match="a CSV has no blocks"):
        load_requests(azure, block_tokens=16)


def test_absurd_rates_are_named(tmp_path: Path) -> None:
    """5 requests 1 ms apart: 4 / 0.004 s = 1,000/s is above the limit of 100/s, 10 ms apart are
    not. One request in 100 s is less than one a minute. 5 prompts of 300,000 tokens in 0.8 s are
    1.9 million tokens/s."""
    fast = log(tmp_path / "f.jsonl", [(i, 4, 0) for i in range(5)])
    notices = load_requests(fast).notices
    assert any("1,000 requests/s" in n and "read as ms" in n for n in notices)
    heavy = log(tmp_path / "h.jsonl", [(200 * i, 300_000, 0) for i in range(5)])
    assert any("1.875e+06 prompt tokens/s" in n for n in load_requests(heavy).notices)
    usual = load_requests(log(tmp_path / "u.jsonl", [(10 * i, 4, 0) for i in range(5)])).notices
    assert not any("is that their unit" in n for n in usual)
    slow = load_requests(log(tmp_path / "s.jsonl", [(i * 1e5, 4, 0) for i in range(5)])).notices
    assert any("0.01 requests/s" in n for n in slow)


def test_ids_beyond_64_bits_and_numbers_of_other_scripts(tmp_path: Path) -> None:
    ids = [1 << 63, (1 << 64) - 1]
    lines = [entry(0, 600, 6, *ids), entry(40, 600, 3, ids[0], 1 << 70)]
    found = load_requests(written(tmp_path / "u.jsonl", "\n".join(lines)))
    assert found.block_ids.tolist() == [0, 1, 0, 2]
    for cell in ("1_0", "\u0663", "0x10"):
        path = written(tmp_path / "a.csv", AZURE + f"2023-11-16 18:16:00,{cell},5\n")
        with pytest.raises(FormatError, match=r"line 5: .* is no number"):
            load_requests(path)


@pytest.mark.parametrize(
    "row",
    [
        {"timestamp": "2026-05-10T10:00:01", "prompt_tokens": 100, "completion_tokens": 20},
        {"id": "chatcmpl-1", "created": 1700000000, "usage": {"prompt_tokens": 100}},
        {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}},
        {"session_id": "a", "input_length": 100, "output_length": 20, "delay": 500},
        {"timestamp": 1000, "text_input": "hello", "output_length": 20},
    ],
)
def test_logs_of_other_tools_are_refused_by_what_they_lack(
    tmp_path: Path, row: dict[str, object]
) -> None:
    """SGLang's request metrics, OpenAI answers and batches, AIPerf's turns and texts."""
    with pytest.raises(FormatError, match="lacks one of timestamp, input_length, output_length"):
        load_requests(written(tmp_path / "a.jsonl", json.dumps(row) + "\n"))


def test_times_with_a_zone(tmp_path: Path) -> None:
    """Azure 2024: the zone is the same in all rows, and only differences count."""
    text = re.sub(r"(\.[0-9]{7}),", r"\1+00:00,", AZURE)
    assert text.count("+00:00") == 3
    requests = load_requests(written(tmp_path / "a.csv", text))
    assert requests.arrival_s[1] == pytest.approx(4.314579)
