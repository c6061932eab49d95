"""The folder that `moesim engine replay` writes: model, replay file and launch script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.engine.content import Content, build_content, save_content
from moesim.engine.launch import arguments, script
from moesim.engine.model_folder import hf_config, spec_of, write_model_folder
from moesim.errors import MismatchError

if TYPE_CHECKING:
    from moesim.placement import Plan
    from moesim.trace.format import Trace


@dataclass(frozen=True, eq=False)
class ReplayFolder:
    """What was written. notes: what the user should know of the model and the rows."""

    folder: Path
    content: Content
    arguments: dict[str, object]
    notes: tuple[str, ...]


def write_replay(
    trace: Trace,
    folder: Path,
    *,
    model: str,
    plan: Plan | None = None,
    num_hidden_layers: int | None = None,
    repeat_layers: bool = False,
    seed: int = 0,
) -> ReplayFolder:
    """Write `folder`/model/config.json, replay.npz and launch.sh for vLLM.

    model: preset, config.json or its folder; cut to its first `num_hidden_layers`. Raises what
    `hf_config` and `build_content` raise, and MismatchError where trace and model differ in experts
    or top-k.
    """
    config = hf_config(model, num_hidden_layers)
    spec = spec_of(config, model)
    for what, has, wanted in (
        ("experts", trace.num_experts, spec.num_experts),
        ("experts per token", trace.top_k, spec.top_k),
    ):
        if has != wanted:
            raise MismatchError(
                f"the trace has {has} {what}, {model} has {wanted}",
                "use a trace of this model, or make one like it: moesim trace synth --like T"
                " --model M",
            )
    layers = spec.moe_layer_ids
    content = build_content(trace, layers, plan=plan, repeat_layers=repeat_layers, seed=seed)
    write_model_folder(config, folder / "model")
    save_content(content, folder / "replay.npz")
    redundant = content.num_slots - content.num_experts
    values = arguments((folder / "model").resolve(), content.placement, content.num_gpus, redundant)
    from moesim.files import atomic_write

    atomic_write(folder / "launch.sh", script(folder / "replay.npz", values).encode())
    return ReplayFolder(folder, content, values, _notes(trace, content, config))


def _notes(trace: Trace, content: Content, config: dict[str, object]) -> tuple[str, ...]:
    from moesim.trace.batches import index_requests

    notes = [note for p in ("prefill", "decode") if (note := index_requests(trace, p)[1])]  # type: ignore[arg-type]
    used, has = len(content.moe_layer_ids), trace.num_layers
    if used > has:
        notes.append(f"the trace's {has} layers are repeated over the model's {used}")
    elif used < has:
        notes.append(f"the first {used} of the trace's {has} layers are used")
    if "moesim_note" in config:
        notes.append(str(config["moesim_note"]))
    return tuple(notes)
