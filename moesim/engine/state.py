"""The replay inside one worker process: buffers on its device and the row schedule of its rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moesim.engine.content import Content
from moesim.engine.kernels import COUNTING, FIRST, REAL, count_on_gpu, route_on_gpu
from moesim.engine.schedule import RowSchedule
from moesim.errors import MismatchError

RING = 8
"""Host buffers of rows in turn: more than the steps that an engine has in flight."""


class Replay:
    """Answers for the routers of a worker's MoE layers.

    content: what is replayed; another of the same shapes can take its place between steps (`swap`):
    buffers are filled in place, so captured graphs stay valid. max_tokens: rows of the largest
    pass, padding included. rank: data-parallel rank.
    """

    def __init__(self, content: Content, device: Any, max_tokens: int, rank: int) -> None:
        self.content, self.rank = content, rank
        self.counting = False
        with torch.inference_mode(False):
            self._table = torch.from_numpy(content.table).to(device)
            self._rows = torch.zeros(FIRST + max_tokens, dtype=torch.int32, device=device)
            self._rows[FIRST:] = torch.arange(max_tokens, device=device) % content.table.shape[1]
            shape = (len(content.moe_layer_ids), content.num_slots)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
            pinned = self._table.is_cuda
            self._ring = [
                torch.zeros(FIRST + max_tokens, dtype=torch.int32, pin_memory=pinned)
                for _ in range(RING)
            ]
        self._done = [torch.cuda.Event() for _ in range(RING)] if pinned else []
        self._turn = 0
        self.steps = self.tokens = 0
        self._start()

    def _start(self) -> None:
        self._schedule: RowSchedule = self.content.schedule(self.rank)
        self._expected = np.zeros((len(self.content.moe_layer_ids), self.content.num_slots), int)

    def swap(self, other: Content) -> None:
        """Replay `other` from now on. Raises MismatchError where its shapes, its number of slots or
        its kind of placement differ."""
        for name in ("placement", "num_slots", "moe_layer_ids", "num_gpus"):
            has, wanted = getattr(self.content, name), getattr(other, name)
            if has != wanted:
                raise MismatchError(
                    f"{name} is {wanted}, the engine was started with {has}",
                    "start the engine again with this file",
                )
        if other.table.shape != self.content.table.shape:
            raise MismatchError(
                f"routing of shape {other.table.shape}, the engine was started with "
                f"{self.content.table.shape}",
                "start the engine again with this file",
            )
        self.content = other
        with torch.inference_mode(False):
            self._table.copy_(torch.from_numpy(other.table))
        self.reset()

    def reset(self) -> None:
        """Begin again: requests are bound anew, counts are zero."""
        self._start()
        self.steps = self.tokens = 0
        with torch.inference_mode(False):
            self._counts.zero_()

    def prepare(
        self,
        requests: Sequence[str],
        scheduled: Any,
        computed: Any,
        prompt_tokens: Any,
    ) -> None:
        """Rows of the next pass (see `RowSchedule.rows`), put in order before its kernels."""
        rows = self._schedule.rows(requests, scheduled, computed, prompt_tokens)
        self.steps += 1
        self.tokens += len(rows)
        if self.counting:
            self._expect(rows)
        self._send(len(rows), rows)

    def idle(self) -> None:
        """The next pass has no real token: profiling, capture, or a rank without requests."""
        self._send(0, np.zeros(0, np.int32))

    def _send(self, real: int, rows: Any) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % RING
        if self._done:
            self._done[turn].synchronize()
        host = self._ring[turn]
        end = FIRST + real
        host[REAL], host[COUNTING] = real, int(self.counting)
        with torch.inference_mode(False):
            host[FIRST:end] = torch.from_numpy(rows)
            self._rows[:end].copy_(host[:end], non_blocking=True)
        if self._done:
            self._done[turn].record()

    def route(self, layer: int, num_tokens: int, dtype: Any) -> tuple[Any, Any]:
        """(weights, ids) [n, K] of one MoE layer; ids are slots where the placement is renumbered,
        logical experts otherwise."""
        table = self._table[int(self.content.layer_of[layer])]
        shape, device = (num_tokens, self.content.top_k), self._table.device
        if num_tokens > len(self._rows) - FIRST:
            raise MismatchError(
                f"a pass of {num_tokens} tokens, prepared for {len(self._rows) - FIRST}",
                "run without the gathering of other ranks' tokens before the router",
            )
        ids = torch.empty(shape, dtype=dtype or torch.int32, device=device)
        weights = torch.empty(shape, dtype=torch.float32, device=device)
        if not num_tokens:
            return weights, ids
        if self._table.is_cuda:
            route_on_gpu(table, self._rows, ids, weights)
        else:
            token = torch.arange(num_tokens)
            real = int(self._rows[REAL])
            token = token.clamp(max=real - 1) if real else token
            ids.copy_(table[self._rows[FIRST + token].long()])
            weights.fill_(1.0 / self.content.top_k)
        return weights, ids

    def count(self, layer: int, slots: Any) -> None:
        """Count the real tokens' slots [n, K] of one layer, where counting is on."""
        if not slots.numel():
            return
        if self._table.is_cuda:
            count_on_gpu(slots, self._rows, self._counts[layer])
        elif int(self._rows[COUNTING]):
            chosen = slots[: int(self._rows[REAL])].flatten().long()
            self._counts[layer] += torch.bincount(chosen, minlength=self._counts.shape[1]).int()

    def _expect(self, rows: Any) -> None:
        content = self.content
        for layer, source in enumerate(content.layer_of):
            chosen = content.table[source][rows].ravel()
            self._expected[layer] += np.bincount(chosen, minlength=content.num_slots)

    def check(self) -> dict[str, Any]:
        """INV-1 in the engine: what the layers' routers sent to slots, against the rows handed out.

        `choices`: real tokens x layers x K. `wrong_layers`: layers where a slot (with replicas: the
        slots of an expert together) got another number of tokens than the trace says.
        """
        counts = self._counts.cpu().numpy().astype(int)
        seen, wanted = counts, self._expected
        if self.content.placement == "eplb":
            slots = self.content.physical_to_logical
            assert slots is not None
            seen = np.stack(
                [
                    np.bincount(row, weights=count, minlength=self.content.num_slots)
                    for row, count in zip(slots, counts, strict=True)
                ]
            ).astype(int)
        wrong = np.flatnonzero((seen != wanted).any(axis=1))
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "choices": int(wanted.sum()),
            "counted": int(counts.sum()),
            "wrong_layers": [int(self.content.moe_layer_ids[layer]) for layer in wrong],
        }
