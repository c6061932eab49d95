"""Predict with a small neural network, in the place of ExpertFlow's routing-path predictor.

ExpertFlow (arXiv:2410.17954) trains a transformer on token ids to predict every layer's experts.
Here it is one network of one hidden layer for each MoE layer, on the same signals that `learned`
weighs in closed form. It needs torch, which is optional; training takes a minute or two a depth.
The only file of the package besides replay, capture and reading .pt files that imports torch
(docs/decisions/0007-neural-predictor.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.caching.events import Stream
from moesim.caching.predictors.base import Scores, check_depth, multi_hot
from moesim.caching.predictors.learned import Signals, fit_tokens
from moesim.errors import InputError
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace

HIDDEN = 256
EPOCHS = 16
BATCH = 256
DROPOUT = 0.3
PEAK_RATE = 2e-3
DECAY = 1e-4
MAX_FIT_TOKENS = 16_384


class Neural:
    """A perceptron from the signals to this layer's choices, a linear path beside its hidden layer;
    the score is its probability of each expert. Trained by AdamW on binary cross-entropy with
    dropout, one thread, a fixed seed."""

    name = "neural"

    def __init__(self, depth: int = 1) -> None:
        self.depth = check_depth(depth)

    def fit(self, trace: Trace, requests: RequestIndex) -> None:
        """Raises InputError where torch is not installed."""
        torch = _torch()
        self._signals = Signals(self.depth)
        self._signals.fit(trace, requests)
        tokens = fit_tokens(requests, MAX_FIT_TOKENS)
        self._weights: list[list[Scores]] = [[]]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for layer in range(1, trace.num_layers):
                    chosen = np.asarray(trace.expert_ids[:, layer])[tokens]
                    target = multi_hot(chosen, trace.num_experts)
                    x = self._signals.of(trace, tokens, layer, own=target)
                    self._weights.append(_train(torch, x, target))
        finally:
            torch.set_num_threads(threads)

    def scores(self, trace: Trace, stream: Stream, layer_idx: int) -> Scores:
        x = self._signals.of(trace, stream.token_idx, layer_idx)
        into, bias, out, out_bias, direct = self._weights[layer_idx]
        logits = np.maximum(x @ into + bias, 0.0) @ out + out_bias + x @ direct
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0))), np.float32)


def _train(torch: Any, x: Scores, target: Scores) -> list[Scores]:
    """Weights of one layer's network: into [F, H] and its bias [H], out [H, E] and its bias [E],
    direct [F, E]."""
    features, experts = x.shape[1], target.shape[1]
    hidden = torch.nn.Linear(features, HIDDEN)
    out = torch.nn.Linear(HIDDEN, experts)
    direct = torch.nn.Linear(features, experts, bias=False)
    drop = torch.nn.Dropout(DROPOUT)
    weights = [p for part in (hidden, out, direct) for p in part.parameters()]
    data, wanted = torch.from_numpy(x), torch.from_numpy(target)
    batches = -(-len(x) // BATCH)
    optimiser = torch.optim.AdamW(weights, lr=PEAK_RATE, weight_decay=DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_RATE, total_steps=max(2, EPOCHS * batches)
    )
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            part = data[rows]
            logits = out(drop(torch.relu(hidden(part)))) + direct(part)
            loss = loss_of(logits, wanted[rows]) * experts
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    found = (hidden.weight.T, hidden.bias, out.weight.T, out.bias, direct.weight.T)
    return [np.ascontiguousarray(p.detach().numpy()) for p in found]


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(
            "the predictor neural is trained with torch, which is not installed",
            "pip install 'moesim[torch]', or use the predictor learned",
        ) from None
    return torch
