"""`moesim trace`: the commands on traces, one file each."""

from __future__ import annotations

import typer

from moesim.cli.trace_capture import capture
from moesim.cli.trace_check import check
from moesim.cli.trace_import import import_trace
from moesim.cli.trace_info import info
from moesim.cli.trace_reroute import reroute
from moesim.cli.trace_slice import merge, slice_
from moesim.cli.trace_synth import synth

app = typer.Typer(
    help="Routing traces: look at, check, capture, make, cut, join, import.", no_args_is_help=True
)
app.command("info")(info)
app.command("check")(check)
app.command("capture")(capture)
app.command("synth")(synth)
app.command("slice")(slice_)
app.command("merge")(merge)
app.command("reroute")(reroute)
app.command("import")(import_trace)
