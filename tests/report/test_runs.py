"""Run files: recognised, or refused with a cause and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import FormatError, InputError, MismatchError, MoesimError
from moesim.report.html.fields import Fields
from moesim.report.html.runs import FORMATS, MAX_RUN_BYTES, load_runs

SIMULATION = {"format": "moesim-simulation", "version": 1, "model": "m", "plans": {}}


def write(folder: Path, name: str, data: Any) -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def refused(path: Path, kind: type[MoesimError]) -> MoesimError:
    with pytest.raises(kind) as caught:
        load_runs([path])
    assert caught.value.cause
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.cause
    return caught.value


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_recognised_and_its_newer_version_refused(
    kind: str, tmp_path: Path
) -> None:
    newest = FORMATS[kind][0]
    data = {"format": kind, "version": newest, "model": "m", "fixed": {"model": "m"}}
    (run,), passed = load_runs([write(tmp_path, "a.json", data)])
    assert run.format == kind
    assert run.model == "m"
    assert not passed
    newer = write(tmp_path, "b.json", data | {"version": newest + 1})
    assert f"version {newest + 1}" in refused(newer, FormatError).cause


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("{", "not JSON"),
        ('{"format": "moesim-simulation", "vers', "not JSON"),
        ('{"a": NaN}', "not JSON of finite numbers"),
        ('{"a": 1e999}', "not JSON of finite numbers"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "no format"),
        ("17", "no format"),
        ('{"format": null}', "no format"),
        ('{"format": 3}', "not a result of moesim"),
        ('{"format": "<script>"}', "not a result of moesim"),
        ('{"format": "moesim-trace", "version": 1}', "not a result of moesim"),
        ('{"format": "moesim-simulation"}', "no version"),
        ('{"format": "moesim-simulation", "version": "1"}', "no version"),
        ('{"format": "moesim-simulation", "version": true}', "no version"),
        ('{"format": "moesim-simulation", "version": 0}', "no version"),
    ],
)
def test_what_is_no_run_is_refused(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(write(tmp_path, "a.json", text), FormatError).cause


def test_binary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\x80\x03\xff\x00pickle")
    assert "not JSON" in refused(path, FormatError).cause


def test_a_missing_file_an_empty_folder_a_device_and_a_huge_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.json", InputError).cause
    (tmp_path / "empty").mkdir()
    assert "holds no .json" in refused(tmp_path / "empty", InputError).cause
    assert "not a file" in refused(Path("/dev/null"), InputError).cause
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MAX_RUN_BYTES + 1)
    assert "67 MB" in refused(huge, InputError).cause


def test_a_folder_gives_its_runs_and_says_what_it_passes_over(tmp_path: Path) -> None:
    write(tmp_path, "b.json", SIMULATION)
    write(tmp_path, "a.json", SIMULATION | {"seed": 1})
    write(tmp_path, "again.json", SIMULATION)
    write(tmp_path, "timeline.json", {"traceEvents": []})
    write(tmp_path, "notes.txt", "{")
    runs, passed = load_runs([tmp_path])
    assert [r.name for r in runs] == ["a.json", "again.json"]
    assert passed == [
        "timeline.json: not a file of moesim's results",
        "b.json: the same as again.json",
    ]
    write(tmp_path, "broken.json", "{")
    assert "broken.json" in refused(tmp_path, FormatError).cause


def test_runs_of_several_models_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path, "a.json", SIMULATION)
    b = write(tmp_path, "b.json", SIMULATION | {"model": "other"})
    with pytest.raises(MismatchError, match=r"m \(a.json\), other \(b.json\)"):
        load_runs([a, b])


def test_names_of_one_preset_are_one_model(tmp_path: Path) -> None:
    names = ("Qwen3-30B-A3B", "qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B")
    paths = [
        write(tmp_path, f"{i}.json", SIMULATION | {"model": name}) for i, name in enumerate(names)
    ]
    assert len(load_runs(paths)[0]) == 3
    several = {"format": "moesim-study", "version": 1, "axes": {"model": ["a", "b"]}, "fixed": {}}
    assert len(load_runs([*paths, write(tmp_path, "study.json", several)])[0]) == 4


def test_a_model_s_name_is_never_opened_as_a_file(tmp_path: Path) -> None:
    named = SIMULATION | {"model": str(write(tmp_path, "config.json", "{"))}
    (run,), _ = load_runs([write(tmp_path, "a.json", named)])
    assert run.model.endswith("config.json")


@pytest.mark.parametrize("value", ["x", True, None, [], {}, 1e301])
def test_fields_name_what_is_wrong(value: Any) -> None:
    fields = Fields({"a": {"b": value}}, "run.json")
    with pytest.raises(FormatError, match=r"run\.json: a\.b must be a finite number"):
        fields.child("a").number("b")


def test_fields_have_defaults_and_lists() -> None:
    fields = Fields({"n": None, "xs": [1, 2.5], "ys": [{"z": 3}], "bad": [1, "x"]}, "f")
    assert fields.number("n", 4.0) == 4.0
    assert fields.text("t", "d") == "d"
    assert fields.numbers("xs") == [1.0, 2.5]
    assert fields.children("ys")[0].whole("z") == 3
    with pytest.raises(FormatError, match="bad must be a list of finite numbers"):
        fields.numbers("bad")
    with pytest.raises(FormatError, match="xs must be an object"):
        fields.child("xs")
    with pytest.raises(FormatError, match=r"xs must be a whole number|finite"):
        Fields({"xs": 1.5}, "f").whole("xs")
    assert Fields({"t": "a\nb\x1b[31m"}, "f").text("t") == "a b [31m"
