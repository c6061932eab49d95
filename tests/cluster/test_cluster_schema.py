"""Wrong and hostile files: one line of cause with field, file and line, one of remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesim.cluster import check_cluster_file, load_cluster
from moesim.errors import FormatError, InputError, MoesimError, UnknownNameError

Edit = Callable[[dict[str, Any]], Any]


def _node(key: str, value: Any) -> Edit:
    return lambda content: content["nodes"][0].__setitem__(key, value)


def _in(block: str, key: str, value: Any) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        where = content if block in content else content["nodes"][0]
        where[block][key] = value

    return edit


WRONG: list[tuple[str, Edit, str, str]] = [
    ("zero", _in("nics", "gb_per_s", 0), "nodes[0].nics.gb_per_s", "positive"),
    ("negative", _in("pcie", "host_bridge_gb_per_s", -3), "pcie.host_bridge_gb_per_s", "positive"),
    ("nan", _in("nics", "gb_per_s", float("nan")), "must be finite", "correct the figure"),
    ("infinite", _in("network", "port_gb_per_s", float("inf")), "must be finite", "correct"),
    ("unit", _in("nics", "gb_per_s", "50 GB/s"), "must be a bare number", "the number alone"),
    ("boolean", _in("nics", "gb_per_s", True), "nics.gb_per_s: must be a number", "correct"),
    ("list", _in("host", "dram_gb", [1]), "host.dram_gb: must be a number", "correct"),
    ("latency", _in("latency", "nic_us", -1), "latency.nic_us", "positive"),
    ("unknown key", _in("nics", "gbps", 400), "unknown key nodes[0].nics.gbps", "did you mean"),
    (
        "misspelt",
        lambda c: c["nodes"][0]["nvme"].update(
            nvme_gbps=c["nodes"][0]["nvme"].pop("nvme_gb_per_s")
        ),
        "unknown key nodes[0].nvme.nvme_gbps",
        "did you mean 'nvme_gb_per_s'?",
    ),
    (
        "gpu file",
        lambda c: c.update(format="moesim-gpu", title="x"),
        "format: ",
        "'moesim-cluster'",
    ),
    ("no unit", _in("nvme", "size", 3), "unknown key nodes[0].nvme.size", "docs/topologies.md"),
    ("missing", lambda c: c["nodes"][0]["nics"].pop("gb_per_s"), "nics.gb_per_s is missing", "add"),
    ("no source", lambda c: c["latency"].pop("source"), "latency.source is missing", "add it"),
    ("kind", _in("latency", "kind", "guessed"), "latency.kind", "'measured', 'datasheet' or 'ass"),
    ("no nodes", lambda c: c.__setitem__("nodes", []), "nodes: list should have at least 1", "doc"),
    ("fabric", _node("fabric", "hyperloop"), "nodes[0].fabric", "'nvswitch', 'pcie' or 'none'"),
    ("count text", _node("count", "two"), "nodes[0].count: must be a whole number", "correct"),
    ("count fraction", _node("count", 1.5), "must be a whole number", "correct"),
    ("huge count", _node("count", 10**9), "nodes[0].count", "at most 65,536 GPUs"),
    ("huge product", _node("count", 60_000), "240,000 GPUs in all, more than 65,536", "correct"),
    ("huge node", _node("gpus_per_node", 5000), "nodes[0].gpus_per_node", "at most 65,536"),
    ("gpu list", _node("gpu", ["l40s"]), "lists 1 GPU types for 4 GPUs per node", "agree"),
    ("speeds", _node("speed_factors", [1, 1]), "lists 2 factors for 4 GPUs", "agree"),
    ("speed 0", _node("speed_factors", [1, 1, 1, 0]), "speed_factors[3]", "positive"),
    ("root", _in("pcie", "root_complexes", 3), "3 does not divide gpus_per_node 4", "agree"),
    ("hosts", _in("host", "hosts_per_node", 4), "4 does not divide pcie.root_complexes 2", "agree"),
    ("nics", _in("nics", "gpus_per_nic", 3), "3 does not divide gpus_per_node 4", "agree"),
    ("version", lambda c: c.__setitem__("version", 2), "version", "write one of 1"),
    ("format", lambda c: c.__setitem__("format", "x"), "format", "'moesim-cluster'"),
    ("name", lambda c: c.__setitem__("name", "a b"), "name", "lower-case letters"),
    ("oversubscription", _in("network", "oversubscription", 0.5), "oversubscription", "positive"),
    (
        "rails",
        lambda c: c["network"].update(type="leaf-spine", num_rails=2),
        "num_rails",
        "correct",
    ),
    ("nvlink", _node("gpu", "l40s"), "GPU l40s has no NVLink", "write fabric: pcie"),
    ("no network", lambda c: c.pop("network"), "disconnected: 2 nodes, but no network", "network:"),
    ("no nics", lambda c: c["nodes"][0].pop("nics"), "disconnected: 2 nodes", "nics:"),
    (
        "no spine",
        lambda c: c["network"].update(type="leaf-spine", num_spines=0),
        "disconnected: 2 leaf switches and no spine",
        "network.num_spines",
    ),
    (
        "sockets",
        lambda c: (
            c["nodes"][0].update(fabric="pcie"),
            c["nodes"][0]["pcie"].pop("socket_gb_per_s"),
        ),
        "on 2 hosts with no link between them",
        "socket_gb_per_s",
    ),
    (
        "nic across sockets",
        lambda c: (
            c["nodes"][0]["nics"].update(gpus_per_nic=4),
            c["nodes"][0]["pcie"].pop("socket_gb_per_s"),
        ),
        "a GPU and its NIC are on hosts with no link",
        "fewer gpus_per_nic",
    ),
]


@pytest.mark.parametrize(
    ("edit", "cause", "remedy"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_wrong_files(write: Callable[..., Path], edit: Edit, cause: str, remedy: str) -> None:
    with pytest.raises(FormatError) as error:
        check_cluster_file(write(edit))
    assert cause in error.value.cause
    assert remedy in error.value.remedy
    assert error.value.cause.startswith("small.yaml")
    assert len(error.value.cause) < 300
    assert "/" not in error.value.cause.split(":")[0]
    assert error.value.exit_code == 2


def test_the_line_is_that_of_the_field(write: Callable[..., Path]) -> None:
    path = write(_in("nics", "gb_per_s", -1))
    lines = path.read_text().splitlines()
    expected = next(i for i, line in enumerate(lines, 1) if line.strip() == "gb_per_s: -1")
    with pytest.raises(FormatError, match=rf"^small\.yaml, line {expected}: nodes\[0\]\.nics"):
        load_cluster(path)


def test_unknown_gpu_names_the_known_ones(write: Callable[..., Path]) -> None:
    for wrong in ("h100", "H100-SXM"):
        with pytest.raises(UnknownNameError, match="did you mean 'h100-sxm'") as error:
            load_cluster(write(_node("gpu", wrong)))
        assert error.value.cause == f"unknown GPU in small.yaml: {wrong!r}"


def test_inline_gpu_defined_twice(write: Callable[..., Path]) -> None:
    origin = {"kind": "assumed", "source": "t"}
    spec = {
        "name": "g",
        "title": "t",
        "memory": {"hbm_gb": 1, "hbm_gb_per_s": 1, **origin},
        "compute": {"bf16_tflops": 1, **origin},
        "links": {"pcie_gb_per_s": 1, **origin},
        "launch": {"kernel_launch_us": 1, **origin},
        "price": {"price_usd_per_hour": 0, **origin},
    }
    with pytest.raises(FormatError, match="defines g twice"):
        load_cluster(write(lambda content: content.__setitem__("gpu_specs", [spec, spec])))


def test_too_many_links_are_refused_soon(write: Callable[..., Path]) -> None:
    def wide(content: dict[str, Any]) -> None:
        content["nodes"][0]["count"] = 1000
        content["network"] |= {"type": "leaf-spine", "leaf_down_ports": 1, "num_spines": 1024}

    with pytest.raises(FormatError, match="more than 2,000,000 links"):
        load_cluster(write(wide))


def test_single_switch_runs_out_of_ports(write: Callable[..., Path]) -> None:
    path = write(lambda content: content["network"].update(type="single-switch"))
    with pytest.raises(InputError, match="8 NICs on a single switch of 4 ports"):
        load_cluster(path)
    assert load_cluster(path, 4).num_nodes == 1


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)

MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join(['*' + chr(97 + i)] * 9)}]}}\n"
    for i in range(12)
)

HOSTILE = {
    "tag": ("!!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
    "tag in a field": ("format: !!python/name:os.system x", "not valid YAML"),
    "alias bomb": (BOMB, "aliases expand to more than 100000 values"),
    "merge bomb": (MERGE_BOMB, "aliases expand to more than 100000 values"),
    "contains itself": ("a: &a [*a]\n", "aliases expand"),
    "duplicate key": ("name: a\nname: b\n", "key 'name' appears twice"),
    "deep": ("[" * 500 + "]" * 500, "nested more than 20 levels"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(400)), "nested more than 20 levels"),
    "empty": ("", "the top level is empty"),
    "list": ("- 1\n- 2\n", "the top level is a list"),
    "text": ("hello", "the top level is text"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "truncated": ('name: "abc', "not valid YAML"),
    "tab": ("a:\n\t- b\n", "not valid YAML"),
    "control characters": ("name: \x07\x1b[31m\n", "not valid YAML"),
    "huge integer": ("version: " + "9" * 5000, "version"),
    "date": ("version: 2020-99-99", "not valid YAML"),
    "unhashable key": ("? [a]\n: b\n", "not valid YAML"),
}


@pytest.mark.parametrize(("text", "cause"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "h.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError) as error:
        load_cluster(path)
    assert cause in error.value.cause
    assert len(error.value.cause) < 400
    assert error.value.remedy
    assert not (tmp_path / "pwned").exists()


def test_binary_huge_and_unreadable_files(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01" * 10)
    with pytest.raises(FormatError, match="not UTF-8"):
        load_cluster(binary)
    huge = tmp_path / "big.yaml"
    huge.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(FormatError, match="larger than 1048576 bytes"):
        load_cluster(huge)
    with pytest.raises(InputError, match=r"cannot read none\.yaml: No such file"):
        load_cluster(tmp_path / "none.yaml")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(InputError, match="directory"):
        load_cluster(folder)
    with pytest.raises(InputError, match="directory"):
        check_cluster_file(folder)


def test_text_cannot_act_on_a_terminal(write: Callable[..., Path]) -> None:
    path = write()
    path.write_text(
        path.read_text().replace(
            "name: small\n", 'name: small\ndescription: "a\\e[31m\\nb\\u202e"\n'
        )
    )
    assert load_cluster(path).description == "a[31m b"


def test_aliases_and_merge_keys_may_be_used(write: Callable[..., Path]) -> None:
    """The same node group twice, the second time as an alias, is four nodes."""
    path = write(lambda content: content.__setitem__("nodes", content["nodes"] * 2))
    assert "- *id" in path.read_text()
    by_count = write(_node("count", 4), name="count.yaml")
    assert load_cluster(path).cluster_hash() == load_cluster(by_count).cluster_hash()
    text = by_count.read_text().replace(
        "latency:\n", "latency:\n  <<: {kind: measured, source: elsewhere}\n"
    )
    by_count.write_text(
        text.replace(
            "  message_host_us: 30\n  kind: assumed\n  source: test\n", "  message_host_us: 30\n"
        )
    )
    assert load_cluster(by_count).basis(("latency",)).kind == "measured"


def test_numbers_may_be_written_with_an_exponent(write: Callable[..., Path]) -> None:
    path = write()
    path.write_text(re.sub(r"dram_gb: 100\n", "dram_gb: 1e2\n", path.read_text()))
    assert load_cluster(path).host_dram_gb.tolist() == [100.0] * 4


def test_every_error_is_a_moesim_error_whatever_is_cut_out(write: Callable[..., Path]) -> None:
    """Any one line removed leaves a valid cluster or a named error, never another exception."""
    path = write()
    lines = path.read_text().splitlines(keepends=True)
    refused = 0
    for skip in range(len(lines)):
        path.write_text("".join(lines[:skip] + lines[skip + 1 :]))
        try:
            check_cluster_file(path)
        except MoesimError as caught:
            refused += bool(caught.cause and caught.remedy)
    optional = 6  # count of a node's own block, num_spines and the like leave a valid file
    assert refused >= len(lines) - optional
