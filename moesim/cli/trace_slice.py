"""`moesim trace slice` and `moesim trace merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli.output import echo, notice
from moesim.errors import InputError
from moesim.numerals import is_index

MAX_LISTED_REQUESTS = 1_000_000


def slice_(
    trace: Annotated[str, typer.Argument(help="Trace file, trace directory, or sample:NAME.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write: .npz, or a folder.")],
    tokens: Annotated[
        str | None, typer.Option(metavar="FIRST:STOP", help="Rows of the file, from 0.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="A random sample of so many requests.")
    ] = None,
    request_ids: Annotated[
        str | None, typer.Option(metavar="IDS", help="These requests, as 1-5 or 2,7.")
    ] = None,
    per_request: Annotated[
        int | None, typer.Option(help="The first so many tokens of each request.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="IDS", help="Layer numbers, as 1-5 or 2,7.")
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="Requests of this domain; may be given again.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help="prefill or decode.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same sample.", min=0)] = 0,
) -> None:
    """Cut a part out of a trace. Conditions hold together.

    Examples:
      moesim trace slice t.npz --requests 50 --per-request 320 --out small.npz
      moesim trace slice t.npz --domain code --layers 3-10 --out code.npz
    """
    from moesim.cli.progress import progress_bar
    from moesim.cli.trace_import import parse_layer_ids
    from moesim.trace.format import load_token_trace
    from moesim.trace.ops import SliceSpec, write_slice

    if phase not in (None, "prefill", "decode"):
        raise InputError(f"--phase {phase!r:.40}", "choose prefill or decode")
    spec = SliceSpec(
        tokens=None if tokens is None else _rows(tokens),
        request_ids=None if request_ids is None else _request_ids(request_ids),
        num_requests=requests,
        per_request=per_request,
        layer_ids=None if layers is None else parse_layer_ids(layers, "--layers"),
        domains=tuple(domain) if domain else None,
        phase=phase,  # type: ignore[arg-type]
        seed=seed,
    )
    loaded = load_token_trace(trace, "moesim trace slice")
    with progress_bar("slicing") as progress:
        num_tokens = write_slice(loaded, spec, out, progress)
    echo(f"wrote {out}: {num_tokens:,} of {loaded.num_tokens:,} tokens")


def merge(
    traces: Annotated[list[str], typer.Argument(help="Two or more traces, in this order.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write: .npz, or a folder.")],
) -> None:
    """Join traces of one model. Requests are numbered from 0 again, domains of one name become one.

    Example: moesim trace merge monday.npz tuesday.npz --out week.npz
    """
    from moesim.cli.progress import progress_bar
    from moesim.trace.format import load_token_trace
    from moesim.trace.ops import merge_traces

    loaded = [load_token_trace(trace, "moesim trace merge") for trace in traces]
    with progress_bar("merging") as progress:
        notices = merge_traces(loaded, out, progress)
    notice(*notices)
    echo(f"wrote {out}: {sum(t.num_tokens for t in loaded):,} tokens of {len(loaded)} traces")


def _rows(text: str) -> tuple[int, int]:
    first, colon, stop = text.partition(":")
    if not colon or not is_index(first or "0") or not is_index(stop) or len(text) > 40:
        raise InputError(f"--tokens {text!r:.60}", "write it as FIRST:STOP, such as 0:10000")
    return int(first or "0"), int(stop)


def _request_ids(text: str) -> tuple[int, ...]:
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (is_index(first) and (not dash or is_index(last))) or len(part) > 24:
            raise InputError(f"--request-ids {text!r:.60}", "write it as 1-5 or 2,7")
        stop = int(last or first) + 1
        if len(ids) + stop - int(first) > MAX_LISTED_REQUESTS or stop > 1 << 31:
            raise InputError(
                f"--request-ids {text!r:.60}: too many", f"list at most {MAX_LISTED_REQUESTS:,}"
            )
        ids += range(int(first), stop)
    if not ids:
        raise InputError(f"--request-ids {text!r:.60}: empty", "write it as 1-5 or 2,7")
    return tuple(ids)
