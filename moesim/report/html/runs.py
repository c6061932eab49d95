"""Run files: which of moesim's JSON formats each one is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import FormatError, InputError, MismatchError
from moesim.report.html.fields import Fields, printable

MAX_RUN_BYTES = 64 << 20
FORMATS: dict[str, tuple[int, str]] = {
    "moesim-plan": (1, "plan file"),
    "moesim-plan-run": (1, "moesim plan --json"),
    "moesim-simulation": (1, "moesim simulate --json"),
    "moesim-serving-run": (1, "moesim simulate --requests --json"),
    "moesim-study": (1, "moesim whatif --json"),
    "moesim-recommendation": (1, "moesim recommend --json"),
    "moesim-cache-plan": (1, "cache plan file"),
    "moesim-cache-run": (1, "moesim cache --json"),
    "moesim-validation": (1, "moesim validate --json"),
    "moesim-cache-validation": (1, "moesim validate --cache-plan --json"),
}
"""Format: newest version that is read, and what writes it."""
REMEDY = (
    "give a plan file, or what plan, simulate, cache, validate, whatif or recommend write with"
    " --json"
)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One file: its parsed JSON and where it is from."""

    path: Path
    name: str
    format: str
    data: Fields
    sha256: str
    num_bytes: int

    @property
    def made_by(self) -> str:
        return FORMATS[self.format][1]

    @property
    def model(self) -> str:
        """The model's name, empty where the file does not say."""
        if self.format == "moesim-study":
            fixed = self.data.maybe("fixed")
            return fixed.text("model", "") if fixed is not None else ""
        origin = self.data.maybe("provenance") if self.format == "moesim-plan" else None
        named = origin.text("model", "") if origin is not None else ""
        return named or self.data.text("model", "")


def load_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs of files and folders, in order, and what was passed over, with the reason.

    Of a folder, its .json files in order of name; JSON of other programs is passed over, damaged
    files and newer versions are refused as they are when named. Raises InputError or FormatError
    with the file's name, MismatchError for runs of several models.
    """
    runs: list[Run] = []
    passed: list[str] = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix == ".json" and p.is_file())
            if not found:
                raise InputError(f"{path} holds no .json file", REMEDY)
            for file in found:
                run = _load(file, strict=False)
                if run is None:
                    passed.append(f"{file.name}: not a file of moesim's results")
                else:
                    runs.append(run)
        else:
            run = _load(path, strict=True)
            if run is not None:
                runs.append(run)
    unique: dict[str, Run] = {}
    for run in runs:
        if run.sha256 in unique:
            passed.append(f"{run.name}: the same as {unique[run.sha256].name}")
        unique.setdefault(run.sha256, run)
    kept = list(unique.values())
    if not kept:
        raise InputError("there is no run to report", REMEDY)
    _one_model(kept)
    return kept, passed


def _load(path: Path, *, strict: bool) -> Run | None:
    """The run in `path`; None for JSON that is no run, unless `strict`."""
    name = printable(path.name)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path} is not a file", REMEDY)
        if size > MAX_RUN_BYTES:
            raise InputError(
                f"{path}: {size / 1e6:.0f} MB, a run may have {MAX_RUN_BYTES / 1e6:.0f} MB",
                "report a shorter run, or fewer time steps of it",
            )
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}", "check the file's name"
        ) from None
    if not raw.strip():
        raise FormatError(f"{path}: the file is empty", "run the command that writes it again")
    try:
        data = json.loads(raw, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: not JSON of finite numbers ({_reason(error)})",
            "run the command that writes it again; --json prints JSON and nothing else",
        ) from None
    kind = data.get("format") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in FORMATS:
        if not strict:
            return None
        said = f"format {printable(str(kind))[:60]!r}" if kind is not None else "no format"
        raise FormatError(f"{path}: {said}, not a result of moesim", REMEDY)
    version = data.get("version")
    newest = FORMATS[kind][0]
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: {kind} names no version", "write it again with moesim")
    if version > newest:
        raise FormatError(
            f"{path}: {kind} version {version}, this moesim reads up to {newest}",
            "make the report with the newer moesim that wrote the file",
        )
    digest = hashlib.sha256(raw).hexdigest()
    return Run(path, name, kind, Fields(data, name), digest, len(raw))


def _one_model(runs: Iterable[Run]) -> None:
    first: dict[str, Run] = {}
    for run in runs:
        if run.model:
            first.setdefault(_known_as(run.model), run)
    if len(first) > 1:
        said = ", ".join(f"{run.model[:60]} ({run.name})" for run in first.values())
        raise MismatchError(f"the runs are of different models: {said}", "make one report a model")


def _known_as(model: str) -> str:
    """The preset that `model` is a name of, or `model` itself; a run cannot name a file."""
    from moesim.errors import UnknownNameError
    from moesim.model.names import load_model, preset_aliases

    try:
        preset_aliases(model)
    except UnknownNameError:
        return model.casefold()
    return load_model(model).name.casefold()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return str(error)[:80]
