"""The `moesim` command: registers the subcommands and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from moesim.errors import MoesimError

DEBUG_FLAG = "--debug"

COMMANDS: dict[str, tuple[str, str, str]] = {
    "plan": ("plan", "plan", "Place experts on GPUs, with held-out figures beside EPLB's."),
    "simulate": ("simulate", "simulate", "Replay a trace through a plan on a cluster."),
    "whatif": ("whatif", "whatif", "Ask a question of many deployments at once."),
    "cache": ("cache", "cache", "Plan what stays in GPU memory when not all experts fit."),
    "export": ("export", "export", "Write a plan in a serving engine's format."),
    "import-plan": ("import_plan", "import_plan", "Read an engine's placement back as a plan."),
    "calibrate": ("calibrate", "calibrate", "Measure this machine's links and GPUs."),
    "validate": ("validate", "validate", "Replay plans on real GPUs, predicted beside measured."),
    "report": ("report", "report", "Make one HTML page of what the other commands wrote."),
    "trace": ("trace", "app", "Routing traces: look at, check, make, cut, join, import."),
    "topology": ("topology", "app", "Clusters: GPUs, links and memory tiers."),
    "model": ("model", "app", "Model shapes: presets and Hugging Face config.json."),
    "solver": ("solver", "app", "Placement methods."),
}
"""Name: (module of moesim.cli, attribute, help)."""
VARIANTS: dict[str, tuple[str, str, str]] = {
    "simulate": ("--requests", "simulate_requests", "simulate_requests"),
}
"""Name: (option that makes it another command, module, attribute)."""

_ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def build_app(load: Collection[str], args: Sequence[str] = ()) -> typer.Typer:
    """The command tree, with the variants of commands that `args` call for. Only the commands named
    in `load` are imported, so that `moesim --help` and errors in the command line stay quick; the
    others show their help line alone."""
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
        if name in VARIANTS and any(a.partition("=")[0] == VARIANTS[name][0] for a in args):
            _, module, attribute = VARIANTS[name]
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
    called = [a for a in args if a in COMMANDS][:1]
    try:
        code = build_app(called, args)(list(args), standalone_mode=False, prog_name="moesim")
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except MoesimError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error.cause}", file=sys.stderr)
        if error.remedy:
            print(f"remedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, _ClickException):
            error.show()  # type: ignore[attr-defined]
            return 0 if type(error).__name__ == "NoArgsIsHelpError" else 2
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        print(f"error: internal: {type(error).__name__}: {text}", file=sys.stderr)
        print("remedy: run again with --debug and report what it shows", file=sys.stderr)
        return 2
