"""`moesim trace`: output, exit codes, and what bad input is answered with."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli.main import run
from moesim.trace.format import LoadTrace, Trace, TraceMeta, load_token_trace, save_trace

SAMPLE = "sample:debian-moe"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A saved trace of 40 requests of 6 tokens: 2 layers, top-2 of 8, two domains."""
    rng = np.random.default_rng(0)
    requests = np.repeat(np.arange(40), 6)
    trace = Trace(
        expert_ids=rng.random((240, 2, 8)).argsort(axis=2)[:, :, :2].astype(np.uint8),
        request_ids=requests.astype(np.int32),
        positions=np.tile(np.arange(6), 40).astype(np.int32),
        phases=np.tile([0, 0, 0, 1, 1, 1], 40).astype(np.uint8),
        domain_ids=(requests % 2).astype(np.int16),
        meta=TraceMeta("toy", 8, 2, (3, 4), ("code", "prose"), "CC0-1.0"),
    )
    save_trace(trace, tmp_path / "toy.npz")
    return tmp_path / "toy.npz"


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    load = np.arange(1, 17, dtype=np.int64).reshape(2, 2, 4)
    save_trace(LoadTrace(load, TraceMeta("toy", 4, 2, (0, 1))), tmp_path / "counts.npz")
    return tmp_path / "counts.npz"


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """call(words...) -> (exit code, stdout, stderr) of `moesim trace words...`."""
    monkeypatch.setenv("COLUMNS", "70")

    def invoke(*words: object) -> tuple[int, str, str]:
        code = run(["trace", *map(str, words)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return invoke


def refused(answer: tuple[int, str, str]) -> str:
    """The cause, of an answer that is exit code 2, one line of cause and one of remedy."""
    code, out, err = answer
    lines = err.splitlines()
    assert (code, out) == (2, "")
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("remedy: ")
    return lines[0].removeprefix("error: ")


# info


def test_info_of_the_sample(call: Call) -> None:
    code, out, err = call("info", SAMPLE)
    assert (code, err) == (0, "")
    assert "12 MoE layers (0 to 11), top-8 of 64 experts" in out
    assert "54,399 (54,399 prefill, 0 decode)" in out
    assert "173, 152 to 320 tokens long (median 320)" in out
    assert "max / mean load of 8 GPUs, experts in order, prefill batches of 4,096 tokens" in out
    assert "drift: load differs by" in out
    assert "layer 2: 8 and 10, 12.6 times as often" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:2].strip().isdigit()]
    assert [int(row[0]) for row in rows if len(row) == 11] == list(range(12))
    assert all(f"\n{name} " in out for name in ("ccode", "zh"))


def test_info_as_json_is_json_alone(call: Call, toy: Path) -> None:
    code, out, err = call("info", toy, "--json", "--gpus", "4")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["num_tokens"] == 240
    assert (report["num_prefill"], report["num_decode"]) == (120, 120)
    assert np.array(report["load"]).sum() == 240 * 2 * 2
    assert report["meta"]["layer_ids"] == [3, 4]
    assert [d["name"] for d in report["domains"]] == ["code", "prose"]
    assert [(b["num_gpus"], b["batch_tokens"]) for b in report["batch_imbalance"]] == [
        (4, 4096),
        (4, 256),
    ]
    assert report["requests"]["lengths"]["max"] == 6


def test_info_of_a_load_trace(call: Call, counts: Path) -> None:
    """Layer 0 has 1+9, 2+10, 3+11, 4+12 choices: max over mean is 16 / 13."""
    code, out, _ = call("info", counts)
    assert code == 0
    assert "counts    2 steps, 136 choices" in out
    assert f"{16 / 13:.2f}" in out
    report = json.loads(call("info", counts, "--json")[1])
    assert report["skew"]["max_over_mean"][0] == pytest.approx(16 / 13)


def png_size(path: Path) -> tuple[int, int]:
    """Width and height, after checking every chunk of the file."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, size = 8, (0, 0)
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        if kind == b"IHDR":
            size = struct.unpack(">II", body[4:12])
        at += 12 + length
    return size


def test_heat_map(call: Call, toy: Path, counts: Path, tmp_path: Path) -> None:
    """INV-6 for pictures; more layers make a taller one, more experts a wider one."""
    sizes = []
    for source in (toy, counts, SAMPLE):
        plot = tmp_path / "load.png"
        code, out, err = call("info", source, "--plot", plot, "--json")
        assert code == 0
        assert json.loads(out)
        assert err == f"wrote {plot}\n"
        sizes.append(png_size(plot))
        first = plot.read_bytes()
        call("info", source, "--plot", plot)
        assert plot.read_bytes() == first
    assert sizes[2][0] > sizes[1][0]
    assert sizes[2][1] > sizes[1][1]


def test_heat_map_of_odd_traces(tmp_path: Path, toy: Path) -> None:
    """No load, one expert, unused experts, and a name that reads as a formula."""
    from moesim.draw.trace import expert_load

    meta = replace(load_token_trace(toy, "x").meta, model="$\\frac{")
    for name, load in (
        ("empty", np.zeros((2, 8), np.int64)),
        ("unused", np.eye(2, 8, dtype=np.int64)),
        ("even", np.ones((2, 8), np.int64)),
    ):
        expert_load(load, meta, "0 tokens").save(tmp_path / f"{name}.png")
        assert png_size(tmp_path / f"{name}.png")[0] > 300
    one = replace(meta, layer_ids=(0,))
    expert_load(np.ones((1, 1), np.int64), one, "1 token").save(tmp_path / "one.svg")
    assert "$\\frac{" in (tmp_path / "one.svg").read_text()


def test_pictures_of_unknown_kinds(call: Call, toy: Path, tmp_path: Path) -> None:
    assert "cannot plot to x.docx" in refused(call("info", toy, "--plot", tmp_path / "x.docx"))
    assert list(tmp_path.iterdir()) == [toy]


def test_hostile_names_cannot_paint_the_terminal(call: Call, toy: Path, tmp_path: Path) -> None:
    trace = load_token_trace(toy, "x")
    evil = "\x1b[2J\x07[red]x[/red]\nmodel real"
    meta = replace(trace.meta, model=evil, license=evil, domains=(evil, "b"), source={"kind": evil})
    save_trace(replace(trace, meta=meta), tmp_path / "evil.npz")
    code, out, err = call("info", tmp_path / "evil.npz")
    assert code == 0
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert "[red]x[/red] model real" in out
    assert not any(line.startswith("model real") for line in out.splitlines())


# check


def test_check_of_a_good_trace(call: Call, toy: Path) -> None:
    assert call("check", toy) == (0, "0 errors, 0 warnings\n", "")
    report = json.loads(call("check", toy, "--json")[1])
    assert report == {"findings": [], "num_errors": 0, "num_warnings": 0}


def test_check_fails_on_errors_only(call: Call, toy: Path, tmp_path: Path) -> None:
    trace = load_token_trace(toy, "x")
    phases = np.array(trace.phases)
    phases[5] = 0
    save_trace(replace(trace, phases=phases), tmp_path / "odd.npz")
    code, out, _ = call("check", tmp_path / "odd.npz")
    assert code == 0
    assert out.startswith("warning: phase-order, once: ")
    assert out.endswith("0 errors, 1 warning\n")
    positions = np.array(trace.positions)
    positions[3:5] = 0
    save_trace(replace(trace, positions=positions), tmp_path / "wrong.npz")
    code, out, _ = call("check", tmp_path / "wrong.npz")
    assert code == 1
    assert "error: duplicate-position, 2 times: " in out
    code, out, _ = call("check", tmp_path / "wrong.npz", "--json")
    assert code == 1
    assert json.loads(out)["num_errors"] == 1


# slice and merge


def test_slice_and_merge(call: Call, toy: Path, tmp_path: Path) -> None:
    a, b, both = tmp_path / "a.npz", tmp_path / "b", tmp_path / "both.npz"
    code, out, _ = call("slice", toy, "--domain", "code", "--per-request", 2, "-o", a)
    assert (code, out) == (0, f"wrote {a}: 40 of 240 tokens\n")
    assert call("slice", toy, "--phase", "decode", "--request-ids", "0-3,9", "-o", b)[0] == 0
    assert load_token_trace(b, "x").num_tokens == 15
    code, out, err = call("merge", a, b, "--out", both)
    assert (code, out, err) == (0, f"wrote {both}: 55 tokens of 2 traces\n", "")
    assert len(np.unique(load_token_trace(both, "x").request_ids)) == 25
    one = tmp_path / "one.npz"
    assert call("slice", toy, "--layers", "4", "--tokens", ":100", "-o", one)[0] == 0
    assert load_token_trace(one, "x").expert_ids.shape == (100, 1, 2)
    assert "different layers" in refused(call("merge", a, one, "--out", tmp_path / "c.npz"))
    assert not (tmp_path / "c.npz").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--tokens", "5"], "--tokens '5'"),
        (["--tokens", "9:3"], "tokens 9:3"),
        (["--tokens", "a:b"], "--tokens 'a:b'"),
        (["--request-ids", "x"], "--request-ids 'x'"),
        (["--request-ids", "0-99999999"], "too many"),
        (["--request-ids", "77"], "no request 77"),
        (["--requests", "41"], "a sample of 41 requests, but there are 40"),
        (["--per-request", "0"], "0 tokens per request"),
        (["--layers", "1"], "layer 1 is not in"),
        (["--layers", "x"], "--layers 'x'"),
        (["--domain", "cod"], "unknown domain 'cod'"),
        (["--phase", "both"], "--phase 'both'"),
        (["--domain", "code", "--request-ids", "1"], "keeps no tokens"),
    ],
)
def test_slices_that_cannot_be(
    call: Call, toy: Path, tmp_path: Path, words: list[str], part: str
) -> None:
    assert part in refused(call("slice", toy, *words, "--out", tmp_path / "out.npz"))
    assert list(tmp_path.iterdir()) == [toy]


# synth


def test_synth_from_parameters(call: Call, tmp_path: Path) -> None:
    out_file = tmp_path / "z.npz"
    words = ["--layers", 3, "--experts", 16, "--top-k", 2, "--tokens", 5000, "--skew", "zipf:0.7",
             "--domains", 2, "--prompt-tokens", 40, "--output-tokens", 20]  # fmt: skip
    code, out, err = call("synth", *words, "--out", out_file)
    assert (code, err) == (0, "")
    assert f"wrote {out_file}: 5,000 tokens, 3 layers, top-2 of 16 experts (synthetic)" in out
    assert "load CV, mean over layers" in out
    trace = load_token_trace(out_file, "x")
    assert trace.expert_ids.shape == (5000, 3, 2)
    assert trace.meta.domains == ("domain-0", "domain-1")
    assert 0.2 < trace.phases.mean() < 0.5
    first = out_file.read_bytes()
    call("synth", *words, "--out", out_file)
    assert out_file.read_bytes() == first, "INV-6"
    assert call("check", out_file)[0] == 0


def test_synth_like_a_trace_through_its_specification(
    call: Call, toy: Path, tmp_path: Path
) -> None:
    spec, a, b = tmp_path / "spec.json", tmp_path / "a.npz", tmp_path / "b"
    code, out, err = call("synth", "--like", toy, "--tokens", 600, "--save-spec", spec, "-o", a)
    assert (code, err) == (0, f"wrote {spec}\n")
    assert "real  synthetic" in out
    code, out, err = call("synth", "--spec", spec, "--tokens", 600, "--out", b, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["statistics"]["synthetic"]
    one, other = load_token_trace(a, "x"), load_token_trace(b, "x")
    assert one.meta.domains == ("code", "prose")
    assert (one.expert_ids == other.expert_ids).mean() > 0.99, "float16 rounds a few scores"
    assert one.meta.source["fitted_to"] == load_token_trace(toy, "x").content_hash()


def test_synth_of_another_shape(call: Call, toy: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "m.npz"
    words = ["--like", toy, "--layers", 3, "--experts", 12, "--top-k", 3, "--tokens", 500]
    code, out, _ = call("synth", *words, "--out", out_file, "--json")
    assert code == 0
    assert json.loads(out)["source"]["kind"] == "synthetic"
    trace = load_token_trace(out_file, "x")
    assert trace.expert_ids.shape == (500, 3, 3)
    assert trace.meta.model == "toy, reshaped"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "--out is missing"),
        (["-o", "x.npz"], "no shape was given"),
        (["-o", "x.npz", "--layers", "3"], "an incomplete shape"),
        (["-o", "x.npz", "--model", "DeepSeek-V33"], "unknown model 'DeepSeek-V33'"),
        (["-o", "x.npz", "--like", "sample:debian"], "unknown sample trace 'debian'"),
        (["-o", "x.npz", "--like", SAMPLE, "--skew", "zipf:1"], "--skew has no effect"),
        (["-o", "x.npz", "--like", SAMPLE, "--domains", "2"], "--domains has no effect"),
        (["-o", "x.npz", "--like", SAMPLE, "--spec", "s.json"], "--like and --spec together"),
        (["-o", "x.npz", "--spec", "missing.json"], "cannot read missing.json"),
        (["-o", "nowhere/x", "--spec", "missing.json"], "cannot read missing.json"),
    ],
)
def test_synth_that_cannot_be(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refused(call("synth", *words))
    assert list(tmp_path.iterdir()) == []


SHAPE = ("--layers", 2, "--experts", 8, "--top-k", 2, "--tokens", 50)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--skew", "zipf"], "--skew 'zipf'"),
        (["--skew", "normal:1"], "--skew 'normal:1'"),
        (["--skew", "zipf:nan"], "--skew 'zipf:nan'"),
        (["--affinity", "2"], "affinity 2"),
        (["--domains", "0"], "number of domains 0"),
        (["--prompt-tokens", "0"], "requests of no tokens"),
        (["--top-k", "9"], "top-9 of 8 experts"),
    ],
)
def test_parameters_out_of_range(call: Call, tmp_path: Path, words: list[str], part: str) -> None:
    assert part in refused(call("synth", *SHAPE, *words, "--out", tmp_path / "x.npz"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_before_the_work(call: Call, tmp_path: Path) -> None:
    assert "exists already" in refused(call("synth", "--like", SAMPLE, "--out", tmp_path))


# Bad input to all of them


@pytest.mark.parametrize("command", ["info", "check", "slice", "merge"])
def test_files_that_are_no_traces(call: Call, tmp_path: Path, command: str) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK\x03\x04 cut short")
    more = {"slice": ["--out", tmp_path / "o.npz"], "merge": [bad, "--out", tmp_path / "o.npz"]}
    words: list[Any] = more.get(command, [])
    assert "not a readable .npz file" in refused(call(command, bad, *words))
    assert "no trace at" in refused(call(command, tmp_path / "none.npz", *words))
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize(
    ("words", "needed_by"),
    [
        (["slice", "{}", "--out", "o.npz"], "moesim trace slice"),
        (["merge", "{}", "{}", "--out", "o.npz"], "moesim trace merge"),
        (["synth", "--like", "{}", "--out", "o.npz"], "moesim trace synth --like"),
    ],
)
def test_load_traces_are_refused_by_name(
    call: Call, counts: Path, words: list[str], needed_by: str
) -> None:
    cause = refused(call(*(word.format(counts) for word in words)))
    assert cause.startswith(f"{needed_by} needs token-level routing")
    assert call("check", counts)[0] == 0


def test_an_empty_trace(call: Call, toy: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.npz"
    save_trace(load_token_trace(toy, "x").take(slice(0, 0)), empty)
    code, out, _ = call("info", empty)
    assert code == 0
    assert "tokens    0" in out
    assert json.loads(call("info", empty, "--json")[1])["num_tokens"] == 0
    code, out, _ = call("check", empty)
    assert code == 1
    assert "the trace has no tokens" in out
    assert "no tokens" in refused(call("slice", empty, "--out", tmp_path / "o.npz"))


def test_info_by_layer(call: Call, toy: Path) -> None:
    """A row per layer; against itself nothing differs and every choice is kept."""
    code, out, _ = call("info", str(toy), "--layers", "--against", str(toy), "--json")
    assert code == 0
    found = json.loads(out)["by_layer"]
    assert found["layer_ids"] == [3, 4]
    assert found["kept"] == [1.0, 1.0]
    assert found["other"] == [0.0, 0.0]
    code, out, _ = call("info", str(toy), "--layers")
    assert code == 0
    assert "max/mean of a request" in out
    code, _, err = call("info", str(toy), "--against", str(toy))
    assert code == 2
    assert "--layers" in err
