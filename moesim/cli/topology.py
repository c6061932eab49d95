"""`moesim topology list`, `show` and `check`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.output import echo
from moesim.errors import plain
from moesim.figures import count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moesim.cluster import Machine

app = typer.Typer(help="Clusters: GPUs, links and memory tiers.", no_args_is_help=True)

_NIC = {"infiniband": "IB", "roce": "RoCE", "infiniband+roce": "IB and RoCE", "none": ""}

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command("list")
def list_topologies(as_json: JsonOption = False) -> None:
    """List the shipped clusters, GPUs and hosts; a GPU and a host make a machine.

    Example: moesim topology list
    """
    from moesim.cluster import cluster_names, gpu_names, host_names, load_cluster, load_gpu
    from moesim.cluster.summary import vertex_counts

    rows: list[dict[str, Any]] = []
    for name in cluster_names():
        cluster = load_cluster(name)
        rows.append(
            {
                "name": name,
                "default_num_gpus": cluster.num_gpus,
                "num_nodes": cluster.num_nodes,
                "gpus": sorted({gpu.name for gpu in cluster.gpus}),
                "fabric": "NVSwitch" if "nvswitch" in vertex_counts(cluster) else "PCIe",
                "network_type": cluster.network_type,
                "nic_type": cluster.nic_type,
                "calibration": cluster.calibration,
                "description": cluster.description,
            }
        )
    if as_json:
        listing = {"clusters": rows, "gpus": list(gpu_names()), "hosts": list(host_names())}
        echo(json.dumps(listing, indent=2))
        return
    from rich.table import Table

    console = _console()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("cluster", "GPUs", "nodes", "GPU", "fabric", "network", "calibration"):
        table.add_column(
            title, justify="right" if title in ("GPUs", "nodes") else "left", no_wrap=True
        )
    for row in rows:
        network = f"{row['network_type']} {_NIC[row['nic_type']]}" if row["num_nodes"] > 1 else "-"
        table.add_row(
            row["name"],
            str(row["default_num_gpus"]),
            str(row["num_nodes"]),
            " + ".join(row["gpus"]),
            row["fabric"],
            network,
            row["calibration"] or "-",
        )
    console.print(table)
    specs = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    specs.add_column("GPU")
    for title in ("HBM GB", "GB/s", "bf16", "fp8", "fp4", "NVLink GB/s", "host GB/s"):
        specs.add_column(title, justify="right")
    for name in gpu_names():
        gpu = load_gpu(name)
        rates = (f"{gpu.tflops[d]:g}" if d in gpu.tflops else "-" for d in ("bf16", "fp8", "fp4"))
        nvlink = f"{gpu.nvlink_gb_per_s:g}" if gpu.nvlink_gb_per_s else "-"
        specs.add_row(
            name,
            f"{gpu.hbm_gb:g}",
            f"{gpu.hbm_gb_per_s:g}",
            *rates,
            nvlink,
            f"{gpu.pcie_gb_per_s:g}",
        )
    console.print()
    console.print(specs)
    console.print()
    console.print(_host_table())
    console.print(
        "\nRates are dense TFLOPS, links per direction. --gpus N resizes any cluster. A machine is"
        " a GPU and a host: rtx-4090+ddr5-2ch, 2xrtx-3090+ddr4-4ch."
    )


def _host_table() -> Table:
    from rich.table import Table

    from moesim.cluster import host_names, load_host

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("host")
    for title in ("DRAM GB", "GB/s", "sockets", "cores", "slot GB/s"):
        table.add_column(title, justify="right")
    table.add_column("vectors")
    for name in host_names():
        host = load_host(name)
        table.add_row(
            name,
            f"{host.dram_gb:g}" + (" unified" if host.unified else ""),
            f"{host.dram_gb_per_s:g}",
            str(host.sockets),
            str(host.cores),
            f"{host.pcie_gb_per_s:g}",
            host.vectors,
        )
    return table


@app.command("show")
def show_topology(
    name: Annotated[
        str,
        typer.Argument(help="A shipped cluster, a machine (rtx-4090+ddr5-2ch), or a YAML file."),
    ],
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="Number of GPUs (default: the file's own).")
    ] = None,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the graph into this file (png, svg, pdf).")
    ] = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print the cluster's file, to start your own from.")
    ] = False,
) -> None:
    """Show what a cluster is made of, its links and routes, and what its figures rest on.

    Examples:
      moesim topology show h100-sxm-ib --gpus 32
      moesim topology show gb200-nvl72 --plot nvl72.png
      moesim topology show h100-sxm-ib --yaml > mine.yaml
    """
    from moesim.cluster import find_cluster_file, is_machine, load_cluster, load_machine
    from moesim.cluster.summary import describe
    from moesim.draw import check_target
    from moesim.errors import InputError

    if as_yaml and as_json:
        raise InputError("--yaml and --json together", "choose one")
    check_target(plot)
    if is_machine(name):
        if plot is not None or gpus is not None or as_yaml:
            raise InputError("--plot, --gpus and --yaml are for clusters", "leave them out")
        machine = load_machine(name)
        echo(json.dumps(asdict(machine), indent=2) if as_json else _machine_text(machine))
        return
    cluster = load_cluster(name, gpus)
    if plot is not None:
        from moesim.draw.topology import topology as drawn

        drawn(cluster).save(plot)
        echo(f"wrote {plot}", err=True)
    if as_yaml:
        echo(find_cluster_file(name).read_text(encoding="utf-8"), nl=False)
    elif as_json:
        echo(json.dumps(describe(cluster), indent=2, allow_nan=False))
    else:
        _print_cluster(describe(cluster), _console())


@app.command("check")
def check_topology(
    file: Annotated[Path, typer.Argument(help="YAML file of a cluster or of a machine.")],
    as_json: JsonOption = False,
) -> None:
    """Check a cluster file (schema, units, connectivity, routes) or a machine file (schema).

    Exit code 0 if it can be used, 2 with one line of cause (the field and its line) and one of
    remedy if not. Example: moesim topology check mine.yaml
    """
    from moesim.cluster import check_cluster_file, is_machine, load_machine

    if is_machine(file.resolve()):
        machine = load_machine(file.resolve())
        if as_json:
            echo(json.dumps({"name": machine.name, "num_gpus": len(machine.gpus)}, indent=2))
        else:
            gpus = ", ".join(gpu.name for gpu in machine.gpus)
            echo(f"{machine.name}: valid machine, {gpus} beside {machine.host.name}")
        return
    cluster = check_cluster_file(file)
    basis = cluster.basis()
    if as_json:
        report = {
            "name": cluster.name,
            "num_gpus": cluster.num_gpus,
            "num_nodes": cluster.num_nodes,
            "basis": basis.kind,
            "cluster_hash": cluster.cluster_hash(),
        }
        echo(json.dumps(report, indent=2))
        return
    nodes = "1 node" if cluster.num_nodes == 1 else f"{cluster.num_nodes} nodes"
    echo(f"{cluster.name}: valid, {cluster.num_gpus} GPUs in {nodes}, figures {basis.kind}")


def _machine_text(machine: Machine) -> str:
    host = machine.host
    lines = [machine.name]
    for gpu, number in Counter(machine.gpus).items():
        rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in gpu.tflops.items())
        lines.append(
            f"  {number} x {gpu.title}: {gpu.hbm_gb:g} GB at {gpu.hbm_gb_per_s:g} GB/s, dense"
            f" TFLOPS {rates}, host link {gpu.pcie_gb_per_s:g} GB/s"
        )
    memory = "the same memory" if host.unified else f"{host.dram_gb:g} GB of DRAM"
    lines.append(
        f"  {host.title}: {memory} at {host.dram_gb_per_s:g} GB/s, {host.cores} cores with"
        f" {host.vectors} in {count(host.sockets, 'socket')}"
    )
    lines.append(f"figures: {machine.basis} at the weakest")
    lines += [f"  {block.where}: {block.kind} ({block.source})" for block in machine.blocks]
    return "\n".join(lines)


def _print_cluster(info: dict[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

    nodes = "1 node" if info["num_nodes"] == 1 else f"{info['num_nodes']} nodes"
    tree = Tree(Text(f"{plain(info['name'])}: {info['num_gpus']} GPUs in {nodes}"))
    tree.add(Text(plain(info["description"], 1000)))
    for gpu in info["gpu_types"]:
        rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in gpu["tflops"].items())
        branch = tree.add(Text(f"{gpu['num_gpus']} x {plain(gpu['title'])} ({plain(gpu['name'])})"))
        branch.add(f"HBM {gpu['hbm_gb']:g} GB at {gpu['hbm_gb_per_s']:g} GB/s")
        branch.add(f"dense TFLOPS: {rates}")
        branch.add(f"${gpu['price_usd_per_hour']:g} an hour (assumed)")
    for gpu_idx, factor in info["speed_factors"].items():
        tree.add(f"GPU {gpu_idx} runs at {factor:g} of its nominal speed")
    hosts = info["hosts"]
    branch = tree.add(f"{hosts['num_hosts']} hosts (NUMA domains)")
    branch.add(
        f"DRAM {_values(hosts['dram_gb'])} GB each, "
        f"to a GPU at {_values(hosts['dram_to_gpu_gb_per_s'])} GB/s"
    )
    if hosts["nvme_to_gpu_gb_per_s"]:
        branch.add(
            f"NVMe {_values(hosts['nvme_gb'])} GB each, "
            f"to a GPU at {_values(hosts['nvme_to_gpu_gb_per_s'])} GB/s"
        )
    vertices = info["vertices"]
    if "leaf" in vertices:
        branch = tree.add(f"network {info['network_type']}, {info['nic_type']}")
        for kind, label in (
            ("nic", "NICs"),
            ("leaf", "leaf switches"),
            ("spine", "spine switches"),
        ):
            if kind in vertices:
                branch.add(f"{vertices[kind]} {label}")
    tree.add(f"calibration table: {info['calibration'] or 'none, datasheet formulas'}")
    console.print(tree)

    console.print("\nLinks (directed)")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column("class")
    for title in ("links", "GB/s", "latency us"):
        table.add_column(title, justify="right")
    table.add_column("example")
    for link in info["links"]:
        table.add_row(
            link["link_class"],
            str(link["num_links"]),
            f"{link['gb_per_s']:g}",
            f"{link['latency_us']:g}",
            link["example"],
        )
    console.print(table)
    if info["routes"]:
        console.print("\nRoutes between GPUs (one flow alone)")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
        for title in ("GPU pairs", "hops", "GB/s", "latency us"):
            table.add_column(title, justify="right")
        table.add_column("example", overflow="fold")
        for route in info["routes"]:
            table.add_row(
                str(route["num_pairs"]),
                str(route["hops"]),
                f"{route['gb_per_s']:g}",
                f"{route['latency_us']:.2f}",
                " ".join(route["example"]),
            )
        console.print(table)
    console.print(f"\nFigures: {info['basis']['kind']} at the weakest")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for title in ("block", "kind", "source"):
        table.add_column(title, overflow="fold")
    for block in info["basis"]["blocks"]:
        table.add_row(
            Text(plain(block["where"])), block["kind"], Text(plain(block["source"], 1000))
        )
    console.print(table)


@app.command("admit")
def admit(
    flows: Annotated[
        str,
        typer.Argument(
            metavar="FLOWS",
            help="CSV with source, target, gb_per_s and priority, or"
            " random:count=200,gb_per_s=10,priorities=3.",
        ),
    ],
    cluster: Annotated[
        str, typer.Option("--cluster", help="Cluster name or YAML file; resized to --gpus.")
    ] = "h100-sxm-roce-leafspine",
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="GPUs.", show_default="the cluster's", min=1)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Admit flows on the paths of a leaf-spine network: exact, genetic, and one path each.

    Example: moesim topology admit random:count=200,gb_per_s=10
    """
    from moesim.jobs.admit import admit as run

    result = run(flows, cluster=cluster, gpus=gpus, seed=seed)
    echo(json.dumps(result.to_json(), indent=2) if as_json else result.summary())


def _values(values: list[float]) -> str:
    return " or ".join(f"{value:g}" for value in values)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.width >= 100 else Console(width=100, highlight=False)
