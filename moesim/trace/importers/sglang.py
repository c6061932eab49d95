"""SGLang's `return_routed_experts`: bare int32 ids in a response.

A server started with `--enable-return-routed-experts` answers a request that sets
`return_routed_experts` with the base64 of int32 values [rows, layers, K] without any header, in
`meta_info.routed_experts` (native API) or `sglext.routed_experts` (OpenAI API). Ids are logical,
layers are all hidden layers with dense ones zero, and fused shared experts are cut off. Rows are
prompt + completion - 1, less the first `routed_experts_start_len`. The shape is not in the
response: it follows from the model (`--model`), or from `--top-k` and the token counts.

Source: sglang 0.5.23 (python/sglang/srt/state_capturer/routed_experts.py and base.py,
srt/managers/scheduler_components/batch_result_processor.py, srt/entrypoints/openai/protocol.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.trace.format import Trace
from moesim.trace.importers.base import DAMAGED, ImportOptions, require_top_k
from moesim.trace.importers.build import Segment, assemble
from moesim.trace.importers.choices import constant_slots
from moesim.trace.importers.records import (
    JSON_SUFFIXES,
    count_of,
    decode_base64,
    first_record,
    iter_records,
)
from moesim.trace.importers.rows import RowReader
from moesim.trace.importers.vllm import NPY_BASE64
from moesim.types import Array

NAME = "sglang"
START = "routed_experts_start_len"
MAX_EXTRA = 8
Counts = tuple[int | None, int | None, int | None]
TITLE = "SGLang return_routed_experts: responses (.json, .jsonl), raw int32 (.bin)"


def detect(path: Path) -> bool:
    """Responses with `meta_info.routed_experts` or `sglext.routed_experts`."""
    if path.suffix not in JSON_SUFFIXES:
        return False
    return any(
        isinstance(value, str) and not value.startswith(NPY_BASE64)
        for _, value, _ in _answers(first_record(path), "")
    )


def read(paths: Sequence[Path], options: ImportOptions) -> Trace:
    """All answers in all files, one request each, in order."""
    top_k = require_top_k(options, "SGLang returns ids without their shape")
    segments: list[Segment] = []
    reader = RowReader(options)
    for path in paths:
        for where, data, counts in _values(path, reader):
            if len(data) % 4:
                raise FormatError(
                    f"{where}: {len(data)} bytes are no whole number of int32 values", DAMAGED
                )
            flat = np.frombuffer(data, "<i4")
            segments.append(_segment(flat, top_k, counts, where, len(segments), reader))
    reader.report()
    return assemble(segments, options, {"format": NAME, "files": [p.name for p in paths]})


def _values(path: Path, reader: RowReader) -> Iterator[tuple[str, bytes, Counts]]:
    """(where, bytes, (prompt tokens, output tokens, first position))."""
    if path.suffix not in JSON_SUFFIXES:
        try:
            yield str(path), path.read_bytes(), (None, None, None)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}", "check the path") from None
        return
    found, without = False, 0
    for where, record in iter_records(path):
        answers = list(_answers(record, f"{where}: "))
        found = found or bool(answers)
        without += not answers
        for name, value, facts in answers:
            if not isinstance(value, str):
                raise FormatError(f"{name}: must be base64 text", DAMAGED)
            counts = (
                count_of(facts, "prompt_tokens", name),
                count_of(facts, "completion_tokens", name),
                count_of(facts, START, name),
            )
            reader.several += bool(facts.get("several"))
            yield name, decode_base64(value, name), counts
    if not found:
        raise FormatError(
            f"{path}: no answer holds routed_experts",
            "start the server with --enable-return-routed-experts and set return_routed_experts"
            " in the request",
        )
    if without:
        reader.options.notify(f"{path}: passed over {without} answers without routed_experts")


def _answers(record: Any, where: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(where, routed_experts, token counts) for the answers in one record."""
    if isinstance(record, list):
        for index, item in enumerate(record):
            yield from _answers(item, f"{where}[{index}]: ")
        return
    if not isinstance(record, dict):
        return
    meta = record.get("meta_info")
    if isinstance(meta, dict) and meta.get("routed_experts") is not None:
        yield f"{where}meta_info.routed_experts", meta["routed_experts"], meta
        return
    usage = record.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    choices = record.get("choices")
    owners = [("", record)]
    if isinstance(choices, list):
        owners += [(f"choices[{i}].", c) for i, c in enumerate(choices)]
        if len(choices) > 1:
            usage = _usage_of_one(usage, record, choices)
    for name, owner in owners:
        extra = owner.get("sglext") if isinstance(owner, dict) else None
        if isinstance(extra, dict) and extra.get("routed_experts") is not None:
            yield f"{where}{name}sglext.routed_experts", extra["routed_experts"], usage
            usage = {**usage, "several": False}


def _usage_of_one(
    usage: dict[str, Any], record: dict[str, Any], choices: list[Any]
) -> dict[str, Any]:
    """What the usage of several choices says of one: nothing of its output, which is the sum over
    all, and of its prompt only where that was one (a chat's)."""
    texts = record.get("object") == "text_completion" or any(
        isinstance(choice, dict) and "text" in choice for choice in choices
    )
    known = {} if texts else {"prompt_tokens": usage.get("prompt_tokens")}
    return {**known, "several": True}


def _segment(
    flat: Array, top_k: int, counts: Counts, where: str, request: int, reader: RowReader
) -> Segment:
    num_prompt, num_output, start = counts
    total = None if num_prompt is None or num_output is None else num_prompt + num_output
    num_layers = _num_layers(len(flat), top_k, total, where, reader.options)
    top_k = _with_extra(flat, num_layers, top_k, total, reader.options.num_experts)
    rows = len(flat) // (num_layers * top_k)
    if rows * num_layers * top_k != len(flat):
        raise FormatError(
            f"{where}: {len(flat)} ids are no whole number of tokens of {num_layers} layers x"
            f" {top_k} experts",
            "name the model that was served with `model`",
        )
    positions, phases = reader.place(rows, num_prompt, num_output, where, start)
    ids = flat.reshape(rows, num_layers, top_k)
    return Segment(ids, where, request, positions, phases)


def _with_extra(
    flat: Array, num_layers: int, top_k: int, total: int | None, num_experts: int | None
) -> int:
    """Ids per token and layer: `top_k`, or up to MAX_EXTRA more where only that fits the request:
    slots of fused shared experts, which `assemble` takes away (sgl-project/sglang issue 9499)."""
    if total is None or total < 2:
        return top_k
    each, rest = divmod(len(flat), (total - 1) * num_layers)
    if rest or not top_k < each <= top_k + MAX_EXTRA:
        return top_k
    constant = constant_slots([flat.reshape(total - 1, num_layers, each)], num_experts)
    return each if len(constant) == each - top_k else top_k


def _num_layers(
    num_ids: int, top_k: int, total: int | None, where: str, options: ImportOptions
) -> int:
    """Layers in the record: from the model, else from the request's length if it fits exactly."""
    if options.num_hidden_layers is not None:
        return options.num_hidden_layers
    if options.layer_ids is not None:
        return max(options.layer_ids) + 1
    if total is not None and total > 1 and num_ids % ((total - 1) * top_k) == 0:
        return max(1, num_ids // ((total - 1) * top_k))
    raise InputError(
        f"{where}: the number of layers is not known and does not follow from the request",
        "give `model`, or `num_hidden_layers`",
    )
