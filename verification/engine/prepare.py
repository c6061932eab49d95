"""Replay files and model folders that the GPU machine needs, into one folder.

    python verification/engine/prepare.py FOLDER [--data DIR]

--data holds the traces named "shared:" (this project's public data folder).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cases import MODELS, Model

from moesim.engine.content import build_content, save_content
from moesim.engine.model_folder import hf_config, spec_of, write_model_folder
from moesim.trace.format import Trace, load_token_trace

SYNTH_TOKENS = 20_000
MOST_TOKENS = 24_000


def trace_of(model: Model, data: Path, folder: Path) -> Trace:
    """The model's trace, cut to whole requests of at most MOST_TOKENS tokens."""
    kind, name = model.trace.split(":")
    if kind == "shared":
        trace = load_token_trace(data / f"{name}.npz", "this study")
    elif kind == "sample":
        trace = load_token_trace(f"sample:{name}", "this study")
    else:
        trace = load_token_trace(folder / f"{name}.npz", "this study")
    return cut(trace)


def cut(trace: Trace) -> Trace:
    """Whole requests of it, of at most MOST_TOKENS tokens."""
    if trace.num_tokens <= MOST_TOKENS:
        return trace
    request = np.asarray(trace.request_ids)
    ids, first = np.unique(request, return_index=True)
    picked = np.random.default_rng(0).permutation(ids[np.argsort(first)])
    size = np.cumsum([int((request == r).sum()) for r in picked])
    keep = picked[: max(2, int((size <= MOST_TOKENS).sum()))]
    return trace.take(np.flatnonzero(np.isin(request, keep)))


def main() -> None:
    """Everything, printed as it is made."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS.values():
        trace = trace_of(model, args.data, args.folder)
        config = hf_config(model.preset, model.layers)
        spec = spec_of(config, model.key)
        write_model_folder(config, args.folder / model.key)
        content = build_content(trace, spec.moe_layer_ids, repeat_layers=model.repeat_layers)
        save_content(content, args.folder / f"{model.key}.replay.npz")
        print(model.key, trace.num_tokens, content.table.shape, len(spec.moe_layer_ids), flush=True)


if __name__ == "__main__":
    main()
