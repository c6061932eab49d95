"""Bits of each expert: MC-MoE's mixed precision under a budget.

MC-MoE (arXiv:2410.06270, section 3.2) chooses 1, 2 or 3 bits for every expert of a layer so that

    sum over experts of  frequency^alpha x weight^beta x error(bits)^gamma

is smallest while the bits add up to at most the budget and the layer has at least one expert of 3
and one of 2 bits. frequency is how often an expert is chosen, weight its mean gate weight when
chosen. Here the errors come from a file, or else from the assumption that the quantisation error
falls by 4 with every bit (uniform quantiser, 6 dB a bit); alpha, beta, gamma default to that
repository's program (1, 1.5, 1 for its errors).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.errors import InfeasibleError, InputError
from moesim.trace.batches import RequestIndex
from moesim.trace.format import Trace
from moesim.types import FloatArray

BITS = (1, 2, 3)
ALPHA, BETA, GAMMA = 1.0, 1.5, 1.0


def significance(
    trace: Trace, requests: RequestIndex, alpha: float = ALPHA, beta: float = BETA
) -> FloatArray:
    """[L, E]: frequency^alpha x weight^beta over the requests' tokens, both normalised to sum 1
    in a layer. Without gate weights in the trace all weights are equal."""
    out = np.zeros((trace.num_layers, trace.num_experts))
    for layer in range(trace.num_layers):
        ids = np.asarray(trace.expert_ids[:, layer])[requests.token_idx].astype(np.int64)
        chosen = ids[ids >= 0]
        count = np.bincount(chosen, minlength=trace.num_experts)
        weight = np.ones(trace.num_experts)
        if trace.gate_weights is not None:
            gates = np.asarray(trace.gate_weights[:, layer])[requests.token_idx][ids >= 0]
            total = np.bincount(chosen, gates.astype(np.float64), trace.num_experts)
            weight = total / np.maximum(1, count)
        share = count / max(1, count.sum())
        out[layer] = share**alpha * (weight / max(1e-300, float(weight.sum()))) ** beta
    return out


def assumed_errors(shape: tuple[int, int], bits: tuple[int, ...] = BITS) -> FloatArray:
    """[L, E, bits] error 4^-b of a b-bit expert, the same for all experts."""
    return np.broadcast_to(4.0 ** -np.array(bits, np.float64), (*shape, len(bits))).copy()


def loss_table(worth: FloatArray, errors: FloatArray, gamma: float = GAMMA) -> FloatArray:
    """[L, E, bits] loss of each choice. Raises InputError for shapes that do not match or values
    that are not finite and non-negative."""
    if errors.ndim != 3 or errors.shape[:2] != worth.shape:
        raise InputError(
            f"errors have shape {errors.shape}, wanted {worth.shape} and one entry for each of the"
            " bit-widths",
            "give the error of every layer's experts at every bit-width",
        )
    table = worth[:, :, None] * errors**gamma
    if not np.isfinite(table).all() or (table < 0).any():
        raise InputError("errors must be finite and not negative", "check the errors' file")
    return table


def choose_bits(
    loss: FloatArray, average_bits: float, bits: tuple[int, ...] = BITS
) -> npt.NDArray[np.int64]:
    """[L, E] int bits of each expert: greedy over the layer's largest gain per further bit.

    loss: [L, E, len(bits)]. Exact where a layer's losses fall convexly with the bits and no expert
    must be raised for the at-least-one rule; solvers.ilp.cache has the integer program and its
    bound. Raises InputError for an average outside of `bits`, InfeasibleError where it is below
    what the rule needs.
    """
    num_layers, num, _ = loss.shape
    out = np.zeros((num_layers, num), np.int64)
    budget = bit_budget(num, average_bits, bits)
    for layer in range(num_layers):
        out[layer] = _greedy(loss[layer], budget, bits)
    return out


def bit_budget(num_experts: int, average_bits: float, bits: tuple[int, ...] = BITS) -> int:
    """Bits in all that a layer's experts may have. Raises InputError for an average outside of
    `bits`, InfeasibleError where even the least choice (all at the fewest bits but one at each
    wider one) is more."""
    if not bits[0] <= average_bits <= bits[-1]:
        raise InputError(
            f"{average_bits:g} bits on average, where an expert has {bits[0]} to {bits[-1]}",
            f"give an average between {bits[0]} and {bits[-1]}",
        )
    budget = int(average_bits * num_experts + 1e-9)
    least = num_experts * bits[0] + sum(b - bits[0] for b in bits[1:])
    if num_experts < len(bits) or budget < least:
        raise InfeasibleError(
            f"{average_bits:g} bits on average are {budget} for {num_experts} experts; one expert"
            f" of each width in {bits} and the rest at {bits[0]} need {least}",
            f"give at least {least / max(1, num_experts):.2f} bits on average",
        )
    return budget


def _greedy(loss: FloatArray, budget: int, bits: tuple[int, ...]) -> npt.NDArray[np.int64]:
    num, most = loss.shape[0], len(bits) - 1
    level = np.zeros(num, np.int64)
    # The at-least-one rule: the experts that lose most at few bits get the wider ones first.
    order = np.argsort(-(loss[:, 0] - loss[:, most]), kind="stable")
    for step, expert in enumerate(order[:most]):
        level[expert] = most - step
    width = np.array(bits)
    spent = int(width[level].sum())
    while True:
        best, gain = -1, 0.0
        for expert in range(num):
            now = level[expert]
            if now == most or spent + bits[now + 1] - bits[now] > budget:
                continue
            if level[expert] > 0 and (level == now).sum() == 1:
                continue
            drop = (loss[expert, now] - loss[expert, now + 1]) / (bits[now + 1] - bits[now])
            if drop > gain:
                best, gain = expert, drop
        if best < 0:
            return width[level]
        spent += bits[level[best] + 1] - bits[level[best]]
        level[best] += 1
