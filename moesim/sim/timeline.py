"""Chrome trace events, for Perfetto (ui.perfetto.dev) and chrome://tracing.

The format is the JSON of the "Trace Event Format" (Google, 2016): complete events (`ph` X) with
`ts` and `dur` in microseconds, metadata events (`ph` M) that name processes and threads. One
process a GPU with a thread a stream, one process for the links with a thread a link.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from moesim.sim.engine import ALL_GPUS, BACK, COMM, COMPUTE, INTRA_BACK, INTRA_OUT, StepRun
from moesim.sim.links import LinkTable
from moesim.sim.network import LinkUse, Network

LINK_PROCESS = 1_000_000
COPY, CPU = "host copies", "CPU"
_STREAMS = {COMPUTE: 0, COMM: 1, INTRA_OUT: 2, INTRA_BACK: 3, COPY: 4, CPU: 5, BACK: 6}
_MIN_SHARE = 1e-6


class StepTimeline:
    """The first `num_steps` steps of a run as trace events."""

    def __init__(self, links: LinkTable, num_gpus: int, num_steps: int = 1) -> None:
        self.links = links
        self.num_gpus = num_gpus
        self.num_steps = num_steps
        self.events: list[dict[str, Any]] = []
        self._streams: set[tuple[int, str]] = set()
        self._used_links: set[int] = set()
        self._num_seen = 0
        self._marked = False

    def add(self, run: StepRun, step: int, network: Network) -> None:
        """Add a finished step, and what the links carried since the last one."""
        history, network.history = network.history, []
        if self._num_seen >= self.num_steps:
            network.record = False
            return
        self._num_seen += 1
        for task in run.program.tasks:
            gpus = range(self.num_gpus) if task.gpu == ALL_GPUS else (task.gpu,)
            args = {"step": step, "layer": task.layer}
            for gpu in gpus:
                for name, start, end in task.spans:
                    self._add(gpu, task.stream, name, task.category, start, end, args)
        self._add_links(history, run.end_us)

    def add_spans(self, gpu: int, stream: str, spans: list[tuple[str, float, float]]) -> None:
        """Rows beside a GPU's own streams: (name, start, end) in order of time, emptied here."""
        if self._num_seen < self.num_steps:
            for name, start, end in spans:
                self._add(gpu, stream, name, "offload", start, end, {})
        spans.clear()

    def _add(
        self,
        gpu: int,
        stream: str,
        name: str,
        category: str,
        start: float,
        end: float,
        args: dict[str, Any],
    ) -> None:
        self._streams.add((gpu, stream))
        self.events.append(_slice(name, category, start, end, gpu, _STREAMS[stream], args))

    def mark(self, name: str, at_us: float) -> None:
        """An instant that concerns all GPUs: a failure, a new plan."""
        row = self.links.num_links
        self._marked = True
        self.events.append(
            {"name": name, "ph": "i", "s": "g", "ts": at_us, "pid": LINK_PROCESS, "tid": row}
        )

    def to_json(self) -> str:
        """The whole file, in order of time. The same run gives the same bytes.

        Numbered as Perfetto needs it, which takes thread 0, and a thread with its process's number,
        for the process's main thread: processes from 1, threads above all of them. Times are whole
        nanoseconds, as there, so that rounding makes no neighbours overlap.
        """
        links = self.num_gpus + 1
        first = 10 ** len(str(links))
        head = [_meta("process_name", g + 1, g + 1, f"GPU {g}") for g in range(self.num_gpus)]
        head.append(_meta("process_name", links, links, "links"))
        names = {(g, _STREAMS[s]): s for g, s in self._streams}
        names |= {(LINK_PROCESS, i): self.links.names[i] for i in self._used_links}
        if self._marked:
            names[LINK_PROCESS, self.links.num_links] = "events"
        place = {}
        for row, (pid, tid) in enumerate(sorted(names)):
            place[pid, tid] = (links if pid == LINK_PROCESS else pid + 1, first + row)
            head.append(_meta("thread_name", *place[pid, tid], names[pid, tid]))
        events = sorted(self.events, key=lambda e: (e["ts"], e["pid"], e["tid"]))
        placed = [_in_ns(e, *place[e["pid"], e["tid"]]) for e in events]
        body = {"traceEvents": [*head, *placed], "displayTimeUnit": "ns"}
        return json.dumps(body, separators=(",", ":"), allow_nan=False)

    def _add_links(self, history: list[LinkUse], end_us: float) -> None:
        """Spans of equal use of each link; neighbouring spans of equal use are one."""
        if not history:
            return
        starts = np.array([h.start_us for h in history])
        ends = np.append(starts[1:], end_us)
        used = np.array([h.used for h in history])
        for link in np.flatnonzero(used.max(axis=0) > _MIN_SHARE).tolist():
            self._used_links.add(link)
            share = np.round(used[:, link], 6)
            first = np.flatnonzero(np.append(True, share[1:] != share[:-1]))
            last = np.append(first[1:], len(share)) - 1
            for a, b in zip(first.tolist(), last.tolist(), strict=True):
                if share[a] > _MIN_SHARE and ends[b] > starts[a]:
                    self.events.append(
                        _slice(
                            f"{share[a]:.0%}", "link", starts[a], ends[b], LINK_PROCESS, link,
                            {"share": float(share[a])},
                        )
                    )  # fmt: skip


def _slice(
    name: str, category: str, start: float, end: float, pid: int, tid: int, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": float(start),
        "dur": float(end - start),
        "pid": pid,
        "tid": tid,
        "args": args,
    }


def _in_ns(event: dict[str, Any], pid: int, tid: int) -> dict[str, Any]:
    """The event in another row, its ends rounded to nanoseconds."""
    start = round(event["ts"] * 1e3)
    out = event | {"ts": start / 1e3, "pid": pid, "tid": tid}
    if "dur" in event:
        out["dur"] = (round((event["ts"] + event["dur"]) * 1e3) - start) / 1e3
    return out


def _meta(name: str, pid: int, tid: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": {"name": value}}
