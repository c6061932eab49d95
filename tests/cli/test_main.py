"""The command line as a whole: exit codes, two-line errors, what `--help` may import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from moesim.cli import main as main_module
from moesim.cli.main import COMMANDS, main, run
from moesim.cli.reference import available_commands, command_tree, walk
from moesim.errors import FormatError, InfeasibleError, UnknownNameError

HEAVY = ("numpy", "numba", "vl_convert", "networkx", "pandas", "scipy", "torch", "simpy", "pulp")
JSON_LISTS = (["solver", "list"], ["model", "list"], ["topology", "list"])
Capture = pytest.CaptureFixture[str]


def test_import_and_help_stay_light() -> None:
    """Importing the entry point and `moesim --help` load nothing heavy, nor pydantic; the help of
    a command loads nothing heavy."""
    code = f"""
import contextlib, io, sys
import moesim.cli.main as m
def loaded(names): return sorted(set(names) & set(sys.modules))
out = io.StringIO()
found = {{"import": loaded({(*HEAVY, "pydantic")!r})}}
with contextlib.redirect_stdout(out):
    assert m.run(["--help"]) == 0
    found["--help"] = loaded({(*HEAVY, "pydantic")!r})
    for name in {available_commands()!r}:
        assert m.run([name, "--help"]) == 0
        found[name] = loaded({HEAVY!r})
print({{n: x for n, x in found.items() if x}})
print(out.getvalue().count("Usage: moesim"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[0] == "{}"
    assert int(done.stdout.split("\n")[1]) == 1 + len(available_commands())


def test_root_help_names_every_command(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, _, text) in COMMANDS.items():
        assert f"  {name} " in shown
        assert text in shown


def test_every_command_has_help_for_itself_and_its_options() -> None:
    for path, command in walk(command_tree(), ("moesim",)):
        assert command.help, path
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, (path, parameter.name)


def test_version(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    word, number = capsys.readouterr().out.split()
    assert word == "moesim"
    assert [part.isdigit() for part in number.split(".")] == [True] * 3


@pytest.mark.parametrize("args", JSON_LISTS, ids=" ".join)
def test_json_is_json_and_nothing_else(args: list[str], capsys: Capture) -> None:
    assert run([*args, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert captured.err == ""


def test_solver_list_is_the_registry(capsys: Capture) -> None:
    from moesim.solvers.registry import solver_names

    assert run(["solver", "list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == solver_names()
    assert run(["solver", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == solver_names()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["plam"], "Did you mean 'plan'?"),
        (["solver", "lst"], "Did you mean 'list'?"),
        (["plan"], "Missing option"),
        (["plan", "--tracee", "x"], "--trace"),
        (["plan", "--trace", "x", "--gpus", "many"], "--gpus"),
        (["plan", "--trace", "x", "--gpus", "0"], "--gpus"),
        (["plan", "--trace", "x", "--gpus", "2", "--batch-tokens", "99999999999"], "--batch"),
        (["plan", "--trace", "x", "--gpus", "2", "--seed", "-1"], "--seed"),
        (["plan", "stray", "--trace", "x", "--gpus", "2"], "stray"),
    ],
)
def test_usage_errors_exit_2_and_point_to_help(args: list[str], said: str, capsys: Capture) -> None:
    assert run(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.splitlines()[-1].startswith("remedy: ")
    assert "--help" in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


def raising(error: BaseException) -> Callable[[object, object], typer.Typer]:
    """A stand-in for `build_app` whose only command raises `error`."""

    def build(load: object) -> typer.Typer:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.command()
        def fail() -> None:
            raise error

        return app

    return build


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (FormatError("the cause", "the remedy"), 2, ["error: the cause", "remedy: the remedy"]),
        (InfeasibleError("no", "more GPUs"), 1, ["error: no", "remedy: more GPUs"]),
        (FormatError("only a cause"), 2, ["error: only a cause"]),
        (
            UnknownNameError("solver", "eplbb", ["eplb", "linear"]),
            2,
            ["error: unknown solver 'eplbb'", "remedy: did you mean 'eplb'? known: eplb, linear"],
        ),
        (
            FormatError("bad\nerror: forged\x1b[31m", "a\tb\x07"),
            2,
            ["error: bad error: forged[31m", "remedy: a b"],
        ),
        (
            ZeroDivisionError("a\nb"),
            2,
            [
                "error: internal: ZeroDivisionError: a b",
                "remedy: run again with --debug and report what it shows",
            ],
        ),
        (KeyboardInterrupt(), 130, []),
        (typer.Exit(1), 1, []),
    ],
)
def test_errors_become_two_lines_and_an_exit_code(
    error: BaseException,
    code: int,
    lines: list[str],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main_module, "build_app", raising(error))
    assert run([]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line for line in captured.err.splitlines() if line != "interrupted"] == lines


@pytest.mark.parametrize("error", [FormatError("cause", "remedy"), ValueError("cause")])
def test_debug_adds_the_traceback_and_keeps_the_code(
    error: Exception, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_module, "build_app", raising(error))
    assert run([], debug=True) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "in fail\n    raise error" in shown
    assert shown.splitlines()[-2].startswith("error: ")


@pytest.mark.parametrize("where", ["front", "end", "environment"])
def test_debug_is_accepted_anywhere(
    where: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["model", "show", "no-such-model"]
    if where == "environment":
        monkeypatch.setenv("MOESIM_DEBUG", "1")
    else:
        args.insert(0 if where == "front" else 3, "--debug")
    monkeypatch.setattr(sys, "argv", ["moesim", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "Traceback" in capsys.readouterr().err


def test_without_debug_no_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESIM_DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", ["moesim", "model", "show", "mixtral-8x77b"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == "error: unknown model 'mixtral-8x77b'"
    assert "did you mean 'mixtral-8x7b'?" in remedy.casefold()


def test_a_reader_that_goes_away_causes_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import moesim.cli.main as m; m.main()", "model", "list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) in (0, 1)


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (["t.npz"], "write --trace t.npz"),
        (["sample:debian-moe"], "write --trace sample:debian-moe"),
        (["log.jsonl"], "a request log goes to moesim serve --requests"),
        (["log.csv"], "a dump of routing through moesim trace import"),
        ([], "write moesim plan --trace sample:debian-moe to try"),
    ],
)
def test_a_plan_without_trace_says_what_to_type(
    capsys: Capture, given: list[str], remedy: str
) -> None:
    assert run(["plan", *given, "--gpus", "2"]) == 2
    cause, said = capsys.readouterr().err.splitlines()
    assert cause == "error: Missing option '--trace'"
    assert remedy in said


def test_a_full_output_says_so() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    code = "from moesim.cli.main import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "solver", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: cannot write the output: No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["1_0", "\u0661", "nan", "inf", "1e999", "0x10", ""])
@pytest.mark.parametrize(
    "args",
    [
        ["plan", "--trace", "sample:debian-moe", "--gpus", "{}"],
        ["plan", "--trace", "sample:debian-moe", "--gpus", "8", "--time-limit", "{}"],
        ["plan", "--trace", "sample:debian-moe", "--gpus", "8", "--slots", "{}"],
        ["validate", "--trace", "sample:debian-moe", "--plan", "x", "--tokens", "{}"],
        ["serve", "--model", "gpt-oss-20b", "--gpus", "1", "--requests", "poisson:rate={}"],
        ["serve", "--model", "gpt-oss-20b", "--gpus", "1", "--requests", "poisson:rate=1",
         "--slo", "ttft<{}s"],
        ["serve", "--model", "gpt-oss-20b", "--gpus", "1", "--requests", "poisson:rate=1",
         "--priorities", "0.5,{}"],
        ["trace", "reroute", "sample:debian-moe", "--as", "drop:factor={}"],
        ["whatif", "--model", "gpt-oss-20b", "--gpus", "{}"],
        ["recommend", "--model", "gpt-oss-20b", "--rate", "1", "--slo", "ttft_p99<1s",
         "--price", "{}"],
    ],
)  # fmt: skip
def test_options_take_the_numbers_that_files_take(
    args: list[str],
    text: str,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's own readers take `1_0`, digits of other scripts, NaN and what overflows."""
    monkeypatch.chdir(tmp_path)
    assert run([part.replace("{}", text) for part in args]) == 2
    assert "internal" not in capsys.readouterr().err


def test_an_option_without_its_value_points_to_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["plan", "--gpus"]) == 2
    assert "moesim plan --help" in capsys.readouterr().err
