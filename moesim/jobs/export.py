"""`export` and `import_plan`: plans to and from the files of serving engines."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.caching.plan import is_cache_plan
from moesim.errors import FormatError, InputError
from moesim.exporters.base import ExportOptions, ReadOptions, filled
from moesim.exporters.registry import exporter
from moesim.files import atomic_write
from moesim.jobs import inputs
from moesim.jobs.export_placement import write_placement
from moesim.jobs.result import Result
from moesim.placement import MAX_PLAN_BYTES, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from moesim.jobs.inputs import ModelLike, PlanLike

log = logging.getLogger("moesim")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Exported(Result):
    """What was written. launch: lines that start the engine with it."""

    engine: str
    file: Path
    num_bytes: int
    accepted_by: str
    launch: tuple[str, ...]

    def line(self) -> str:
        return f"{self.file} ({self.num_bytes:,} bytes) for {self.engine}"

    def summary(self) -> str:
        head = (
            f"wrote {self.file} ({self.num_bytes:,} bytes), accepted by {self.accepted_by};"
            " start with\n"
        )
        return "\n".join([head, *self.launch])

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "file": str(self.file),
            "num_bytes": self.num_bytes,
            "accepted_by": self.accepted_by,
            "launch": list(self.launch),
        }

    def to_frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame({"launch": list(self.launch)})


def export(
    plan: PlanLike,
    *,
    to: str,
    out: str | os.PathLike[str],
    model: ModelLike | None = None,
    num_hidden_layers: int | None = None,
    mtp_layers: int | None = None,
    fill_layers: Sequence[int] = (),
    notify: Callable[[str], None] = log.warning,
) -> Exported:
    """Write a plan in a serving engine's format, or a cache plan's placement for an engine on one's
    own machine (llama.cpp and others: the script that starts it, with `model` in it).

    to: engine, as `moesim export --list` has it. model: the plan's where it is a known one.
    num_hidden_layers: dense ones too, where no model says it. mtp_layers: how many layers of
    multi-token prediction to write rows for, where the engine needs them. fill_layers: MoE layers
    without routing (by token id), to be placed in order. What the engine cannot express is
    refused (MismatchError, InputError); what the user should know goes to `notify`.
    """
    if not isinstance(plan, Plan) and is_cache_plan(plan):
        name = None if model is None else str(model)
        engine, size, lines = write_placement(str(plan), to, Path(out), name, notify)
        return Exported(engine, Path(out), size, engine, lines)
    made, target = inputs.plan_of(plan, apart=True), exporter(to)
    options = ExportOptions(
        spec=inputs.model_or_named(model, made.model),
        num_hidden_layers=num_hidden_layers,
        mtp_layers=mtp_layers,
        fill_layers=tuple(fill_layers),
        model_id=inputs.model_id(model),
        notify=notify,
    )
    made, rows = made.mtp_apart()
    options = replace(options, mtp_rows=rows)
    if rows and not getattr(target, "WRITES_MTP", False):
        notify(
            f"{to} keeps its own order of experts in multi-token-prediction layers: the plan's rows"
            f" of layers {', '.join(map(str, rows))} are left out"
        )
    made = filled(made, options)
    path = Path(out)
    if path.suffix != target.SUFFIX:
        raise InputError(
            f"{to} wants a file that ends in {target.SUFFIX}",
            f"name it {path.stem}{target.SUFFIX}",
        )
    data = target.encode(made, options)
    atomic_write(path, data)
    lines = tuple(target.launch(made, path, options))
    return Exported(to, path, len(data), target.ACCEPTED_BY, lines)


def import_plan(
    file: str | os.PathLike[str],
    *,
    engine: str,
    num_gpus: int | None = None,
    num_nodes: int = 1,
    model: ModelLike | None = None,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    notify: Callable[[str], None] = log.warning,
) -> Plan:
    """Read the placement that an engine runs with back into a plan.

    num_gpus, num_experts, layer_ids: where neither file nor model says them. Raises FormatError or
    MismatchError for what the file does not say or says wrongly, InputError if it cannot be read.
    """
    source, path = exporter(engine), Path(file)
    spec = inputs.model_of(model) if model is not None else None
    options = ReadOptions(
        where=str(path),
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        num_experts=num_experts or (spec.num_experts if spec else None),
        layer_ids=(tuple(layer_ids) if layer_ids else None)
        or (spec.moe_layer_ids if spec else None),
        num_hidden_layers=spec.num_hidden_layers if spec else None,
        model=inputs.model_id(model) or (spec.name if spec else ""),
        notify=notify,
    )
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise FormatError(f"{path}: larger than {MAX_PLAN_BYTES} bytes", "no placement is")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check the path") from None
    return source.decode(data, options)
