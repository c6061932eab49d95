"""The `moesim` command: registers the subcommands and turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from moesim.errors import MoesimError, UnknownNameError, plain
from moesim.numerals import number
from moesim.processes import Terminated

DEBUG_FLAG = "--debug"

COMMANDS: dict[str, tuple[str, str, str]] = {
    "plan": ("plan", "plan", "Place experts on GPUs, with held-out figures beside EPLB's."),
    "simulate": ("simulate", "simulate", "Replay a trace through a plan on a cluster."),
    "serve": ("serve", "serve", "Serve requests: TTFT, TPOT, throughput, goodput."),
    "prefill": ("prefill", "prefill", "Time one long prompt over many GPUs: ring attention."),
    "recommend": (
        "recommend",
        "recommend",
        "How many GPUs a service needs, and how to split them.",
    ),
    "whatif": ("whatif", "whatif", "Ask a question of many deployments at once."),
    "balance": ("balance", "balance", "Compare ways to balance experts; is it worth it?"),
    "elastic": ("elastic", "elastic", "Widen and narrow an expert-parallel group with the load."),
    "cache": ("cache", "cache", "Plan what stays in GPU memory when not all experts fit."),
    "export": ("export", "export", "Write a plan in a serving engine's format."),
    "engine": ("engine", "app", "Serving engines: replay a routing trace inside one."),
    "import-plan": ("import_plan", "import_plan", "Read an engine's placement back as a plan."),
    "calibrate": ("calibrate", "calibrate", "Measure this machine's links and GPUs."),
    "validate": ("validate", "validate", "Replay plans on real GPUs, predicted beside measured."),
    "report": ("report", "report", "Make one HTML page of what the other commands wrote."),
    "trace": ("trace", "app", "Routing traces: look at, check, make, cut, join, import."),
    "routing": ("routing", "app", "Rules of routing, for moesim trace reroute."),
    "topology": ("topology", "app", "Clusters: GPUs, links and memory tiers."),
    "model": ("model", "app", "Model shapes: presets and Hugging Face config.json."),
    "solver": ("solver", "app", "Placement methods."),
}
"""Name: (module of moesim.cli, attribute, help)."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def build_app(load: Collection[str]) -> typer.Typer:
    """The command tree. Only the commands named in `load` are imported, so that `moesim --help` and
    errors in the command line stay quick; the others show their help line alone."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Plan, simulate and validate the deployment of Mixture-of-Experts models.\n\n"
        "Start with: moesim plan --trace sample:debian-moe --gpus 8",
    )
    app.callback(invoke_without_command=True)(_root)
    for name, (module, attribute, help_text) in COMMANDS.items():
        if name not in load:
            app.command(name, help=help_text)(_not_loaded)
            continue
        target = getattr(import_module(f"moesim.cli.{module}"), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name)
        else:
            app.command(name)(target)
    return app


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG_FLAG, help="Show tracebacks; accepted anywhere.")
    ] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"moesim {installed('moesim')}")
        raise typer.Exit


def _not_loaded() -> NoReturn:
    raise RuntimeError("this command was not loaded")


def main() -> None:
    """Entry point: exits with 0, 1 (a negative verdict) or 2 (bad input or internal error)."""
    args = [a for a in sys.argv[1:] if a != DEBUG_FLAG]
    debug = len(args) < len(sys.argv) - 1 or bool(os.environ.get("MOESIM_DEBUG"))
    sys.exit(run(args, debug=debug))


def run(args: Sequence[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code; errors become two lines on stderr, after
    their traceback with `debug`."""
    args = _serve_by_its_old_name(list(args))
    called = [a for a in args if a in COMMANDS][:1]
    try:
        command: Any = typer.main.get_command(build_app(called))
        _refuse_odd_numbers(command)
        code = command(args, standalone_mode=False, prog_name="moesim")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt) as stop:
        ended = isinstance(stop, Terminated)
        print("terminated" if ended else "interrupted", file=sys.stderr)
        return 143 if ended else 130
    except MoesimError as error:
        if debug:
            traceback.print_exc()
        return _say(error.cause, error.remedy, error.exit_code, option_names(args))
    except BrokenPipeError:
        _drop_output()
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _NO_ROOM:
            _drop_output()
            cause = f"cannot write the output: {error.strerror}"
            return _say(cause, "send it to a place with room", 2, {})
        if isinstance(error, _ClickException):
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
                return 0
            return _say(*_click_error(error, args), 2, {})
        if debug:
            traceback.print_exc()
        cause = f"internal: {type(error).__name__}: {plain(error, 300)}"
        return _say(cause, "run again with --debug and report what it shows", 2, {})


def _refuse_odd_numbers(command: Any) -> None:
    """Options take the numbers that files do; typer alone takes `1_0`, Arabic digits and `nan`."""
    for child in getattr(command, "commands", {}).values():
        _refuse_odd_numbers(child)
    for param in command.params:
        param.process_value = partial(_plain_numbers, param, param.process_value)


def _plain_numbers(param: Any, process: Callable[..., Any], ctx: Any, value: Any) -> Any:
    found = process(ctx, value)
    texts, made = ([*v] if isinstance(v, (list, tuple)) else [v] for v in (value, found))
    for text in texts:
        if isinstance(text, str) and type(made[0]) in (int, float):
            try:
                number(text)
            except ValueError:
                cause = f"{plain(text, 60)!r} is no number"
                raise typer.BadParameter(cause, ctx=ctx, param=param) from None
    return found


def _drop_output() -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush succeeds."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(cause: str, remedy: str, code: int, names: Mapping[str, str]) -> int:
    """The two lines of an error on standard error; returns the exit code."""
    print(f"error: {as_options(cause, names)}", file=sys.stderr)
    if remedy:
        print(f"remedy: {as_options(remedy, names)}", file=sys.stderr)
    return code


def as_options(text: str, names: Mapping[str, str] | None = None) -> str:
    """`text` with fields of the library, written `so_many`, as options of the command line."""

    def option(found: re.Match[str]) -> str:
        return (names or {}).get(found[1]) or f"--{found[1].replace('_', '-')}"

    return re.sub(r"`([a-z][a-z0-9_]*)`", option, text)


def option_names(args: Sequence[str]) -> dict[str, str]:
    """Parameter: option, of the command that `args` call, where the two differ."""
    import click

    try:
        command: Any = typer.main.get_command(build_app([a for a in args if a in COMMANDS][:1]))
        for word in args:
            command = getattr(command, "commands", {}).get(word, command)
    except click.ClickException:
        return {}
    return {p.name: p.opts[0] for p in command.params if p.opts and p.opts[0].startswith("--")}


def _click_error(error: Exception, args: Sequence[str]) -> tuple[str, str]:
    """Cause and remedy of a wrong command line."""
    cause = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "moesim") or "moesim"
    if path == "moesim":
        path = " ".join(["moesim", *(a for a in args if a in COMMANDS)][:2])
    near = list(getattr(error, "possibilities", None) or ())
    if near:
        return cause, f"did you mean {', '.join(near[:3])}? {path} --help lists them"
    wrong = re.match(r"Invalid value for '--([\w-]+)'.*?'(.*)' is not one of (.*)", cause)
    if wrong:
        known = re.findall(r"'([^']*)'", wrong[3])
        unknown = UnknownNameError(wrong[1].replace("-", " "), wrong[2], known)
        return unknown.cause, unknown.remedy
    missing = getattr(getattr(error, "param", None), "opts", [""])[0]
    if missing == "--trace":
        for word in args:
            if (
                word.startswith("sample:")
                or word.endswith(".npz")
                or Path(word, "meta.json").exists()
            ):
                return cause, f"write --trace {plain(word)}"
        if any(word.endswith((".json", ".jsonl", ".csv", ".pt")) for word in args):
            return cause, (
                f"write {path} --trace TRACE, a .npz file or a folder; a request log goes to moesim"
                " serve --requests, a dump of routing through moesim trace import first"
            )
        return cause, f"write {path} --trace sample:debian-moe to try; {path} --help has the rest"
    return cause, f"{path} --help lists the options"


def _serve_by_its_old_name(args: list[str]) -> list[str]:
    """`simulate --requests` is `serve`; said so, for one version."""
    called = next((a for a in args if a in COMMANDS), "")
    if called != "simulate" or not any(a.partition("=")[0] == "--requests" for a in args):
        return args
    print("note: simulate --requests is moesim serve now, and goes away in 0.2", file=sys.stderr)
    return ["serve" if a == "simulate" else a for a in args]
