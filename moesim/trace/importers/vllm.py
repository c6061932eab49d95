"""vLLM's `routed_experts`: what a server started with `--enable-return-routed-experts` returns.

Each choice of a response holds the base64 of a `.npy` array [rows, L, K] of logical ids, taken
before load balancing maps them to slots. Rows are prompt tokens, then generated ones, less the
last (it was sampled but never run): prompt + completion - 1. `routed_experts_prompt_start` of the
request cuts rows off the front. The type has been uint8 or uint16 (by the number of experts),
int16 and int32. L is either all hidden layers, dense ones zero, or the MoE layers. Releases up to
about 0.21 put the prompt's rows into `prompt_routed_experts` of the response instead.

Source: vllm 0.33.0 (vllm/model_executor/layers/fused_moe/routed_experts_capturer.py,
vllm/entrypoints/openai/chat_completion/protocol.py, vllm/utils/serial_utils.py). Ignored: streamed
chunks (only their last one holds the array), `weight_versions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError
from moesim.trace.format import Trace
from moesim.trace.importers.base import DAMAGED, ImportOptions, bad_field
from moesim.trace.importers.build import Segment, assemble, integer_ids
from moesim.trace.importers.records import (
    JSON_SUFFIXES,
    count_of,
    decode_base64,
    first_record,
    id_list,
    iter_lines,
    iter_records,
    nested_ids,
    npy_from_bytes,
    read_npy_file,
)
from moesim.trace.importers.rows import RowReader
from moesim.trace.npyio import map_npy
from moesim.types import Array

NAME = "vllm"
TITLE = "vLLM routed_experts: responses (.json, .jsonl), base64 text, .npy"
NPY_BASE64 = "k05VTVBZ"
START = "routed_experts_prompt_start"


def detect(path: Path) -> bool:
    """A 3-D integer `.npy`, base64 text of one, or responses with `routed_experts` as such."""
    if path.suffix == ".npy":
        try:
            header = map_npy(path)
        except FormatError:
            return False
        return header.ndim == 3 and header.dtype.kind in "iu"
    if path.suffix in JSON_SUFFIXES:
        values = [v for _, v, *_ in _choices(first_record(path), "")]
        return any(isinstance(v, list) or str(v).startswith(NPY_BASE64) for v in values)
    if path.suffix in (".b64", ".txt"):
        try:
            with path.open(encoding="ascii") as text:
                return text.read(64).lstrip().startswith(NPY_BASE64)
        except (OSError, UnicodeDecodeError):
            return False
    return False


def read(paths: Sequence[Path], options: ImportOptions) -> Trace:
    """All responses in all files, one request each (one per choice), in order."""
    segments: list[Segment] = []
    reader = RowReader(options)
    for path in paths:
        for where, value, prompt, record in _values(path, options):
            ids = _array(value, f"{where}routed_experts")
            if prompt is not None:
                head = _array(prompt, f"{where}prompt_routed_experts")
                if head.shape[1:] != ids.shape[1:]:
                    raise FormatError(
                        f"{where}prompt_routed_experts has shape {head.shape},"
                        f" routed_experts {ids.shape}",
                        DAMAGED,
                    )
                ids = np.concatenate([head, ids.astype(head.dtype)])
            segments.append(_segment(ids, record, where, len(segments), reader))
    reader.report()
    return assemble(segments, options, {"format": NAME, "files": [p.name for p in paths]})


def _values(path: Path, options: ImportOptions) -> Iterator[tuple[str, Any, Any, dict[str, Any]]]:
    """(where, routed_experts, prompt_routed_experts or None, facts on the request)."""
    if path.suffix == ".npy":
        yield f"{path}: ", read_npy_file(path), None, {}
    elif path.suffix in JSON_SUFFIXES:
        found, without = False, 0
        for where, record in iter_records(path):
            items = list(_choices(record, f"{where}: "))
            found = found or bool(items)
            without += not items
            yield from items
        if not found:
            raise FormatError(
                f"{path}: no response holds routed_experts",
                "start the server with --enable-return-routed-experts",
            )
        if without:
            options.notify(f"{path}: passed over {without} responses without routed_experts")
    else:
        for number, line in iter_lines(path):
            yield f"{path}: line {number}: ", line, None, {}


def _choices(record: Any, where: str) -> Iterator[tuple[str, Any, Any, dict[str, Any]]]:
    """The choices of one record that hold `routed_experts`.

    A record is a response, a line of a batch output file (`response.body`), an offline
    RequestOutput (`outputs`), one choice by itself, or the base64 text alone.
    """
    if isinstance(record, str):
        yield where, record, None, {}
        return
    for name in ("response", "body"):
        if isinstance(record, dict) and isinstance(record.get(name), dict):
            record, where = record[name], f"{where}{name}."
    if not isinstance(record, dict):
        return
    name = "outputs" if isinstance(record.get("outputs"), list) else "choices"
    choices = record.get(name)
    shared = {k: record.get(k) for k in ("usage", "prompt_token_ids", START)}
    prompt = record.get("prompt_routed_experts")
    if not isinstance(choices, list):
        choices, name = [record], ""
        prompt = None if "routed_experts" not in record else prompt
    for index, choice in enumerate(choices):
        if not isinstance(choice, dict) or choice.get("routed_experts") is None:
            continue
        facts = {**shared, "token_ids": choice.get("token_ids"), "choices": len(choices)}
        facts["first"] = index == 0
        # A completion of several prompts counts them together; a chat has one prompt.
        facts["texts"] = record.get("object") == "text_completion" or "text" in choice
        facts["prompt_token_ids"] = choice.get("prompt_token_ids") or shared["prompt_token_ids"]
        yield (
            f"{where}{f'{name}[{index}].' if name else ''}",
            choice["routed_experts"],
            prompt,
            facts,
        )


def _array(value: Any, where: str) -> Array:
    if isinstance(value, str):
        data = decode_base64(value, where)
        if not data.startswith(b"\x93NUMPY"):
            raise FormatError(
                f"{where}: is not a .npy array",
                "SGLang returns bare int32: try --from sglang",
            )
        value = npy_from_bytes(data, where)
    elif isinstance(value, list):
        value = nested_ids(value, where)
    elif not isinstance(value, np.ndarray):
        raise bad_field(where, "it", "base64 text or nested lists")
    return integer_ids(value, where)


def _segment(
    ids: Array, record: dict[str, Any], where: str, request: int, reader: RowReader
) -> Segment:
    """The rows with their positions."""
    usage = record.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt_ids = id_list(record.get("prompt_token_ids"), f"{where}prompt_token_ids")
    output_ids = id_list(record.get("token_ids"), f"{where}token_ids")
    num_prompt = count_of(usage, "prompt_tokens", f"{where}usage")
    num_output = count_of(usage, "completion_tokens", f"{where}usage")
    if prompt_ids is not None:
        num_prompt = len(prompt_ids)
    if output_ids is not None:
        num_output = len(output_ids)
    if record.get("choices", 1) > 1:
        reader.several += bool(record["first"])
        num_output = None if output_ids is None else num_output
        num_prompt = None if prompt_ids is None and record["texts"] else num_prompt
    start = count_of(record, START, where.rstrip(": ."))
    where = f"{where}routed_experts"
    positions, phases = reader.place(len(ids), num_prompt, num_output, where, start)
    tokens = None
    if prompt_ids is not None and output_ids is not None:
        tokens = np.concatenate([prompt_ids, output_ids])[positions]
    return Segment(ids, where, request, positions, phases, token_ids=tokens)
