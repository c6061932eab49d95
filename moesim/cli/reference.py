"""Reference pages from the help texts: `python -m moesim.cli.reference --out docs/reference`.

One page a command and an index, as an 80-column terminal without colours shows them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from moesim.cli.main import COMMANDS, build_app
from moesim.files import atomic_write

TEXT_WIDTH = 78
"""What an 80-column terminal leaves for help texts."""
MARK = "<!-- Written by python -m moesim.cli.reference: edit the command's docstring instead. -->"


def available_commands() -> list[str]:
    """Names of the commands whose module exists."""
    return [n for n, (module, _, _) in COMMANDS.items() if find_spec(f"moesim.cli.{module}")]


def command_tree(*, loaded: bool = True) -> Any:
    """The command line as a click group, with the available commands alone; not `loaded`, as
    `moesim --help` has it, with the commands' names and help lines only."""
    names = available_commands()
    root: Any = get_command(build_app(names if loaded else ()))
    for name in set(root.commands) - set(names):
        del root.commands[name]
    return root


def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """`command` and everything under it, each with the words that call it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


def help_text(command: Any, path: tuple[str, ...]) -> str:
    """What `path --help` prints on an 80-column terminal."""
    context = typer.Context(
        command,
        info_name=" ".join(path),
        terminal_width=TEXT_WIDTH,
        color=False,
        help_option_names=["-h", "--help"],
    )
    return str(command.get_help(context)).rstrip()


def reference_pages() -> dict[str, str]:
    """File name: text, for the index (README.md) and every command."""
    root = command_tree()
    index = ["# Command line", "", MARK, "", _block(command_tree(loaded=False), ("moesim",)), ""]
    rows = [f"| [`moesim {name}`]({name}.md) | {COMMANDS[name][2]} |" for name in root.commands]
    pages = {"README.md": "\n".join([*index, "| command | |", "|---|---|", *rows, ""])}
    for name, command in root.commands.items():
        parts = [f"# moesim {name}", "", MARK, "", _block(command, ("moesim", name)), ""]
        for path, child in walk(command, ("moesim", name)):
            if child is not command:
                parts += [f"## {' '.join(path)}", "", _block(child, path), ""]
        pages[f"{name}.md"] = "\n".join(parts)
    return pages


def stale_pages(folder: Path) -> list[str]:
    """Pages of `folder` that are missing, differ, or belong to no command."""
    pages = reference_pages()
    found = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")}
    return sorted(name for name in pages | found if pages.get(name) != found.get(name))


def write_pages(folder: Path) -> None:
    """Write every page to `folder` and remove pages that this module wrote for past commands."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = reference_pages()
    for name, text in pages.items():
        atomic_write(folder / name, text)
    for file in folder.glob("*.md"):
        if file.name not in pages and MARK in file.read_text(encoding="utf-8"):
            file.unlink()


def _block(command: Any, path: tuple[str, ...]) -> str:
    return f"```text\n{help_text(command, path)}\n```"


def main(args: Sequence[str] | None = None) -> int:
    """Write the pages, or with --check exit with 1 when they are not up to date."""
    parser = argparse.ArgumentParser(prog="python -m moesim.cli.reference", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pages")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(args)
    if not options.check:
        write_pages(options.out)
        return 0
    stale = stale_pages(options.out)
    for name in stale:
        print(f"stale: {options.out / name}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
