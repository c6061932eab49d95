"""Writing fitted parameters into a calibration file, section by section."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tables import relative_errors

from moesim.cost.calibration import parse_calibration_file
from moesim.files import atomic_write

HBM_RATIO = {"h200": 4800.0 / 3350.0}  # datasheet HBM bandwidth, SXM, over the H100's
AICONFIGURATOR = "github.com/ai-dynamo/aiconfigurator @095f58a (Apache-2.0)"


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of the measured tables")
    parser.add_argument("--out", type=Path, required=True, help="calibration file to update")
    parser.add_argument("--gpu", help="which tables: h100, gb200, ...; default: the file's name")
    parsed = parser.parse_args()
    if parsed.gpu is None:
        parsed.gpu = parsed.out.stem
    return parsed


def report(predicted: Any, measured: Any, **rest: Any) -> dict[str, Any]:
    """A `fit` entry from held-out predictions."""
    median, p90 = relative_errors(predicted, measured)
    return {
        **rest,
        "points": len(measured),
        "median_error": round(median, 4),
        "p90_error": round(p90, 4),
    }


class _Dumper(yaml.SafeDumper):
    """Short lists and mappings of plain values on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _is_flat(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return not any(isinstance(item, dict | list) for item in items)


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    flat = all(not isinstance(v, dict) and (not isinstance(v, list) or _is_flat(v)) for v in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


def _represent_dict(dumper: yaml.SafeDumper, value: dict[str, Any]) -> yaml.Node:
    flat = _is_flat(value) and len(value) <= 6 and "format" not in value
    return dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=flat)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(dict, _represent_dict)


def update(
    out: Path,
    header: dict[str, Any],
    section: str,
    entries: list[dict[str, Any]] | dict[str, Any],
    sources: dict[str, str],
    replaces: Callable[[dict[str, Any]], bool] = lambda entry: True,
) -> None:
    """Replace the entries of one section that `replaces` is true for; the rest stays.

    The result is validated by the loader before it is written.
    """
    old: dict[str, Any] = yaml.safe_load(out.read_text()) if out.exists() else {}
    old = {**header, **{k: v for k, v in old.items() if k not in header}}
    old["sources"] = dict(sorted({**old.get("sources", {}), **sources}.items()))
    if isinstance(entries, dict):
        old[section] = {**old.get(section, {}), **entries}
    else:
        kept = [entry for entry in old.get(section, []) if not replaces(entry)]
        old[section] = kept + entries
    order = ["format", "version", "name", "gpu", "description", "sources", "overheads"]
    ranked = sorted(old, key=lambda k: order.index(k) if k in order else len(order))
    text = yaml.dump({key: old[key] for key in ranked}, Dumper=_Dumper, sort_keys=False, width=100)
    parse_calibration_file(text, where=str(out))
    atomic_write(out, text)
    print(f"{out}: {section}: {len(entries)} entries, file {len(text) / 1024:.1f} KiB")


HEADERS: dict[str, dict[str, Any]] = {
    "h100": {
        "format": "moesim-calibration",
        "version": 1,
        "name": "h100",
        "gpu": "NVIDIA H100 80GB HBM3",
        "description": "Parameters fitted to public tables and to an own measurement on two GPUs",
    },
    "h200": {
        "format": "moesim-calibration",
        "version": 1,
        "name": "h200",
        "gpu": "NVIDIA H200",
        "description": "NCCL measured; expert GEMM of the H100 with this GPU's memory bandwidth",
    },
    **{
        name: {
            "format": "moesim-calibration",
            "version": 1,
            "name": name,
            "gpu": f"NVIDIA {name.upper()}",
            "description": "NCCL and kernels of vLLM as it serves, fitted to public tables",
        }
        for name in ("b200", "b300", "gb200", "gb300")
    },
}
HEADERS["rtx-pro-6000"] = HEADERS["b200"] | {
    "name": "rtx-pro-6000",
    "gpu": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
}
HEADERS["gb200"]["description"] += "; TensorRT-LLM's NVLink all-to-all"
