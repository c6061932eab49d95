"""Read a folder of config.json files and print their sizes beside what makers publish.

    git clone https://github.com/ai-dynamo/aiconfigurator && git -C aiconfigurator checkout 095f58a
    python verification/models/check_configs.py \
        aiconfigurator/aic-core/src/aiconfigurator_core/model_configs

The folder holds NAME_config.json, with NAME_hf_quant_config.json beside it where a checkpoint says
there how its weights are stored, or folders with a config.json. Figures that makers publish are in
published.yaml; a model without an entry is printed without them. Exit code 1 if a MoE file is
refused, if a total or an active count is 2% off (or off the printed digits), or a KV cache differs.
"""

from __future__ import annotations

import ast
import json
import operator
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moesim.errors import MoesimError
from moesim.model.hf.reader import Reading, read_config
from moesim.model.hf_config import with_quantisation
from moesim.model.spec import ModelSpec

PUBLISHED = Path(__file__).with_name("published.yaml")
OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(frozen=True)
class Figures:
    """What a maker publishes: billions as printed, and the KV cache by hand."""

    total: str
    active: str
    tables: str
    kv: int
    source: str


def published() -> dict[str, Figures]:
    """Figures by file name."""
    return {
        name: Figures(
            entry["total"], entry["active"], entry["tables"], value(entry["kv"]), entry["source"]
        )
        for entry in yaml.safe_load(PUBLISHED.read_text())
        for name in entry["files"]
    }


def value(formula: str | int) -> int:
    """A sum of products of whole numbers."""

    def of(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        assert isinstance(node, ast.Constant)
        return node.value

    return round(of(ast.parse(str(formula), mode="eval").body))


def agrees(mine: float, printed: str) -> bool:
    """Within 2%, or the same when rounded or cut to the printed digits (2.451 as 2.4)."""
    digits = len(printed.partition(".")[2])
    above = mine - float(printed)
    return abs(above) <= max(0.02 * float(printed), 0.5 * 10**-digits) or 0 <= above < 10**-digits


def counted(spec: ModelSpec, tables: str) -> float:
    """Active parameters in billions, with the tables that the published figure contains."""
    active = spec.active_params
    if tables == "head":
        active -= spec.lookup_params
    if tables == "none":
        active -= spec.embedding_params + spec.lm_head_params
    return active / 1e9


def files(folder: Path) -> dict[str, Path]:
    """config.json files by model name."""
    found = {
        path.name.removesuffix("_config.json"): path
        for path in sorted(folder.glob("*_config.json"))
        if not path.name.endswith("_hf_quant_config.json")
    }
    return found | {path.parent.name: path for path in sorted(folder.glob("*/config.json"))}


def read(name: str, path: Path) -> Reading:
    config: dict[str, Any] = json.loads(path.read_text())
    beside = path.with_name(path.name.replace("config.json", "hf_quant_config.json"))
    return read_config(with_quantisation(config, beside), str(path), name, path.name)


def kb(count: float) -> str:
    return f"{count / 1e3:,.2f} kB"


def row(name: str, reading: Reading, figures: Figures | None) -> tuple[list[str], bool]:
    """One line of the table, and whether it agrees with what is published."""
    spec = reading.spec
    good = not reading.noted
    total, active = f"{spec.total_params / 1e9:,.2f}", f"{spec.active_params / 1e9:,.2f}"
    kv = kb(spec.kv_bytes_per_token())
    beyond = spec.kv_bytes_per_token_beyond_windows()
    if beyond != spec.kv_bytes_per_token():
        kv += f", {kb(beyond)} beyond windows"
    source = ""
    if figures is not None:
        mine = counted(spec, figures.tables)
        active = f"{mine:,.2f}"
        good &= agrees(spec.total_params / 1e9, figures.total) and agrees(mine, figures.active)
        good &= spec.kv_bytes_per_token() == figures.kv
        total += f" / {figures.total}"
        active += f" / {figures.active} ({figures.tables})"
        source = figures.source
    state = f"{spec.state_bytes / 1e6:,.1f} MB" if spec.state_bytes else ""
    mtp = f"{spec.mtp_params / 1e9:.2f}" if spec.mtp_params else ""
    stored = f"{spec.expert_dtype}, {spec.dense_dtype}: {spec.weight_bytes() / 1e9:,.0f} GB"
    return [name, total, active, kv, state, mtp, stored, source, "" if good else "DIFFERS"], good


def main(folder: Path) -> int:
    figures = published()
    bad = count = 0
    heads = ("file", "total", "active", "KV cache per token", "state", "further tokens", "stored")
    heads += ("source", "")
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name, path in files(folder).items():
        try:
            cells, good = row(name, read(name, path), figures.get(name))
        except MoesimError as error:
            if "not a Mixture-of-Experts model" in error.cause:
                continue
            cells, good = [name, f"REFUSED: {error.cause}"], False
        count += 1
        bad += not good
        print("| " + " | ".join(cells) + " |")
    print(f"\n{count} MoE files, {count - bad} read and in agreement", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
