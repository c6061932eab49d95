"""Prompt files for capture: one prompt a line (.txt), or JSON lines with `prompt` and `domain`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import FormatError, InputError

MAX_LINE_BYTES = 64 << 20
MAX_DOMAINS = 32_767
NO_DOMAIN = "other"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its text, and the name of its domain ("" when the file gives none)."""

    text: str
    domain: str = ""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """What one pass over a prompt file finds; `domains` is empty when no prompt names one."""

    path: Path
    num_prompts: int
    domains: tuple[str, ...]
    sha256: str


def scan_prompts(path: str | os.PathLike[str]) -> PromptFile:
    """Read a prompt file once, checking every line, holding one line at a time.

    Raises InputError when it cannot be read, FormatError naming the line when one is wrong.
    """
    digest = hashlib.sha256()
    names: dict[str, None] = {}
    number = 0
    for prompt in iter_prompts(path):
        number += 1
        digest.update(f"{len(prompt.domain)}:{prompt.domain}:{prompt.text}\0".encode())
        names[prompt.domain] = None
        if len(names) > MAX_DOMAINS:
            raise FormatError(f"{path}: more than {MAX_DOMAINS} domains", "merge some of them")
    if not number:
        raise FormatError(f"{path}: there are no prompts in it", "write one prompt a line")
    domains = () if set(names) == {""} else tuple(sorted(name or NO_DOMAIN for name in names))
    return PromptFile(Path(path), number, tuple(dict.fromkeys(domains)), digest.hexdigest())


def iter_prompts(path: str | os.PathLike[str]) -> Iterator[Prompt]:
    """The prompts of a file, one at a time; blank lines are skipped. Errors as `scan_prompts`."""
    as_json = Path(path).suffix in (".jsonl", ".ndjson")
    try:
        with Path(path).open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}: line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise FormatError(f"{where} is longer than {MAX_LINE_BYTES} bytes", "cut it")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
                except UnicodeDecodeError:
                    raise FormatError(f"{where} is not UTF-8", "convert the file") from None
                if text.strip():
                    yield _from_json(text, where) if as_json else Prompt(text)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", "name a .txt or .jsonl file of prompts"
        ) from None


def _from_json(text: str, where: str) -> Prompt:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(f"{where} is not JSON", 'write {"prompt": "..."}') from None
    if not isinstance(record, dict):
        raise FormatError(f"{where} is not a JSON object", 'write {"prompt": "..."}')
    prompt, domain = record.get("prompt"), record.get("domain")
    if not isinstance(prompt, str) or not prompt.strip():
        raise FormatError(f"{where}: prompt is not a text", 'write {"prompt": "..."}')
    if domain is not None and not isinstance(domain, str):
        raise FormatError(f"{where}: domain is not a text", "write a name, or leave it out")
    for name, value in (("prompt", prompt), ("domain", domain or "")):
        if any("\ud800" <= ch <= "\udfff" for ch in value):
            raise FormatError(f"{where}: {name} has half a surrogate pair", "write valid Unicode")
    return Prompt(prompt, domain or "")
