"""The schemes that are compared, by name, with the defaults of the engines that have them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from moesim.errors import InputError, UnknownNameError
from moesim.planning.balancing.bench import Scheme
from moesim.planning.balancing.echo import Echo
from moesim.planning.balancing.epic import Epic
from moesim.planning.balancing.eplb import Eplb, Rhythm
from moesim.planning.balancing.flashlb import FlashLb
from moesim.planning.balancing.llep import Llep
from moesim.planning.balancing.moonep import MoonEp
from moesim.planning.balancing.online import Online
from moesim.planning.balancing.static import InUse, Static
from moesim.planning.balancing.swift import Swift
from moesim.planning.balancing.waterfill import Waterfill

NONE = "none"
R = "+r"
"""Ends names of schemes with redundant slots."""
VLLM = Rhythm(3000, 1000, asynchronous=True)
VLLM_SYNC = Rhythm(3000, 1000)
SGLANG = Rhythm(1000, 1000)
ASCEND = 600, 50
"""Steps of vllm-ascend's window and of its plan; layers then change over one in a step."""
OURS = Rhythm(1000, 100, asynchronous=True)
EXPORT = "moesim plan{} --out plan.json, then moesim export plan.json --to ENGINE"

CHOICE = {
    "split": "",
    "nearest": "; the engine has to choose the nearest replica",
    "lp": "; SGLang: --ep-dispatch-algorithm lp",
}
"""What else an engine needs for a policy of choosing replicas."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked of re-planning beside the engines' defaults. None: nothing."""

    interval: int | None = None
    window: int | None = None
    threshold: float | None = None
    layers_per_chunk: int | None = None
    asynchronous: bool = False

    @property
    def rhythm(self) -> Rhythm | None:
        """The rhythm asked for. Raises InputError for numbers that cannot be used."""
        given = (self.interval, self.window, self.threshold, self.layers_per_chunk)
        if all(value is None for value in given) and not self.asynchronous:
            return None
        every = 1000 if self.interval is None else self.interval
        window = min(every, 1000) if self.window is None else self.window
        for name, value in (("interval", every), ("window", window)):
            if not 1 <= value <= 1 << 30:
                raise InputError(f"`{name}` {value}", "give at least 1 step")
        threshold = float("inf") if self.threshold is None else self.threshold
        if not threshold > 0:
            raise InputError(f"`threshold` {threshold}", "give a balancedness above 0, as 0.9")
        chunk = self.layers_per_chunk or 0
        if self.layers_per_chunk is not None and chunk < 1:
            raise InputError(f"`layers_per_chunk` {chunk}", "give at least 1 layer")
        if chunk and self.asynchronous:
            raise InputError(
                "`layers_per_chunk` for moves beside the steps, which go layer by layer anyway",
                "leave out one of `layers_per_chunk` and `rebalance_async`",
            )
        return Rhythm(every, window, self.asynchronous, threshold, chunk)


def lineup(
    extra: int,
    least: int,
    layers: int,
    hierarchical: bool,
    asked: Asked,
    only: tuple[str, ...] = (),
    *,
    shared: bool = False,
    counts: bool = False,
) -> list[Scheme]:
    """The schemes: `none` first. extra: redundant slots beyond `least`, what the GPUs need to have
    equal slots; hierarchical: the model's expert groups and the nodes allow that EPLB policy.
    shared: the model has shared experts; counts: the trace has no tokens.

    only: some of them by name. Raises UnknownNameError for another name, InputError for one that
    needs tokens where there are none.
    """
    schemes = [
        *_static(extra, least),
        *_eplb(extra, least, hierarchical, asked),
        *_ascend(extra, least, layers),
        *_online(extra),
        *(MoonEp(), Llep(), Echo(), Epic()),
        *([Waterfill()] if shared else []),
    ]
    known = {scheme.name: scheme for scheme in schemes}
    for name in only:
        if name not in known:
            raise UnknownNameError("scheme", name, known)
        if counts and not _from_counts(known[name]):
            raise InputError(
                f"scheme {name} needs token-level routing, and the trace has expert counts only",
                "leave it out, or give a trace with expert_ids (moesim trace capture)",
            )
    picked = [known[name] for name in dict.fromkeys((NONE, *only))] if only else schemes
    return [scheme for scheme in picked if not counts or _from_counts(scheme)]


def _online(extra: int) -> list[Scheme]:
    slots_too = R if extra else ""
    by_hand = "moesim plan --from, and the engine's own transfer of weights"
    about = "{}, improved where moves pay, beside the steps"
    return [
        Online(f"online{slots_too}", about.format("what is in use"), OURS, extra, enable=by_hand),
        Online(
            f"plan-online{slots_too}",
            about.format("our plan for time"),
            OURS,
            extra,
            planned=True,
            enable=by_hand,
        ),
    ]


def _from_counts(scheme: Scheme) -> bool:
    return isinstance(scheme, InUse | Eplb | Swift | FlashLb) or (
        isinstance(scheme, Static) and scheme.objective == "balance" and scheme.policy is None
    )


def _static(extra: int, least: int) -> list[Scheme]:
    slots = f" --redundant-experts {least}" if least else ""
    more = f" --redundant-experts {least + extra}"
    out: list[Scheme] = [
        InUse(NONE, "experts in order, or the placement in use, never moved"),
        Static("plan", "our plan for time", "local_search", "time", enable=EXPORT.format(slots)),
        Static(
            "plan-balance",
            "our plan for balance",
            "local_search",
            enable=EXPORT.format(f" --objective balance{slots}"),
        ),
    ]
    if not extra:
        return out
    for policy, said in (("split", ""), ("nearest", "-nearest"), ("lp", "-lp")):
        out.append(
            Static(
                f"plan{R}{said}",
                f"our plan for time, {extra} more slots, replicas by {policy}",
                "local_search",
                "time",
                extra,
                policy=policy,  # type: ignore[arg-type]
                enable=EXPORT.format(more) + CHOICE[policy],
            )
        )
    out.append(
        Static(
            f"plan-balance{R}",
            f"our plan for balance, {extra} more slots",
            "local_search",
            "balance",
            extra,
            enable=EXPORT.format(f" --objective balance{more}"),
        )
    )
    out.append(
        Static(
            f"eplb-once{R}-lp",
            "EPLB from recorded loads, replicas by linear program per batch (LPLB)",
            "eplb",
            "balance",
            extra,
            policy="lp",
            enable=f"SGLang: --init-expert-location FILE --ep-num-redundant-experts {least + extra}"
            " --ep-dispatch-algorithm lp",
        )
    )
    return out


def _eplb(extra: int, least: int, hierarchical: bool, asked: Asked) -> list[Scheme]:
    policies = [(False, "global"), *([(True, "hierarchical")] if hierarchical else [])]
    slots_too = R if extra else ""
    out: list[Scheme] = []
    for grouped, policy in policies:
        tail = "-hierarchical" if grouped else ""
        out.append(
            Static(
                f"eplb-once{tail}{slots_too}",
                f"EPLB ({policy}) from recorded loads, never again",
                "eplb",
                "balance",
                extra,
                grouped,
                enable="SGLang: --init-expert-location FILE --ep-num-redundant-experts"
                f" {least + extra}",
            )
        )
        for slots in dict.fromkeys((0, extra)):
            more = R if slots else ""
            out.append(
                Eplb(
                    f"eplb-vllm{tail}{more}",
                    f"vLLM's defaults, {policy}: every 3,000 steps, window 1,000, beside the steps",
                    VLLM,
                    slots,
                    grouped,
                    _vllm(VLLM, least + slots),
                )
            )
        out.append(
            Eplb(
                f"eplb-vllm-sync{tail}{slots_too}",
                f"the same with use_async false, {policy}",
                VLLM_SYNC,
                extra,
                grouped,
                _vllm(VLLM_SYNC, least + extra),
            )
        )
        out.append(
            Eplb(
                f"eplb-sglang{tail}{slots_too}",
                f"SGLang's defaults, {policy}: every 1,000 steps, all layers at once",
                SGLANG,
                extra,
                grouped,
                _sglang(SGLANG, least + extra),
            )
        )
        rhythm = asked.rhythm
        if rhythm is not None:
            out.append(
                Eplb(
                    f"eplb-asked{tail}{slots_too}",
                    f"EPLB ({policy}) every {rhythm.every:,} steps as asked",
                    rhythm,
                    extra,
                    grouped,
                    (_vllm if rhythm.asynchronous else _sglang)(rhythm, least + extra),
                )
            )
    return out


def _ascend(extra: int, least: int, layers: int) -> list[Scheme]:
    window, delay = ASCEND
    rhythm = Rhythm(window + delay + layers, window, asynchronous=True, delay=delay)
    slots_too = R if extra else ""
    every = f"vllm-ascend's defaults, every {rhythm.every:,} steps beside them"

    def enable(policy: int) -> str:
        config = {
            "dynamic_eplb": True,
            "eplb_policy_type": policy,
            "num_redundant_experts": least + extra,
        }
        text = json.dumps({"eplb_config": config}, separators=(",", ":"))
        return f"vllm-ascend: DYNAMIC_EPLB=true, --additional-config '{text}'"

    return [
        Swift(f"eplb-swift{slots_too}", f"SwiftBalance, {every}", rhythm, extra, enable(2)),
        FlashLb(f"eplb-flashlb{slots_too}", f"FlashLB, {every}", rhythm, extra, enable(3)),
    ]


def _vllm(rhythm: Rhythm, redundant: int) -> str:
    config = {
        "window_size": rhythm.window,
        "step_interval": rhythm.every,
        "num_redundant_experts": redundant,
        "use_async": rhythm.asynchronous,
    }
    said = json.dumps(config, separators=(",", ":"))
    return f"vLLM: --enable-expert-parallel --enable-eplb --eplb-config '{said}'"


def _sglang(rhythm: Rhythm, redundant: int) -> str:
    out = (
        f"SGLang: --enable-eplb --eplb-rebalance-num-iterations {rhythm.every}"
        f" --expert-distribution-recorder-buffer-size {rhythm.window}"
        f" --ep-num-redundant-experts {redundant}"
    )
    if rhythm.chunk:
        out += f" --eplb-rebalance-layers-per-chunk {rhythm.chunk}"
    if rhythm.threshold < float("inf"):
        out += f" --eplb-min-rebalancing-utilization-threshold {rhythm.threshold:g}"
    return out
