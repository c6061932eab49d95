"""Routes worked out by hand, against a slow reference, and under relabelling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cluster import LINK_CLASSES, Cluster, cluster_names, load_cluster
from moesim.errors import FormatError, InputError


def path(cluster: Cluster, src: int, dst: int) -> list[str]:
    """Vertices from `src` to `dst`; fails unless the links join up."""
    table = cluster.routes()
    pairs = [table.link_name[link].split("->") for link in table.links(src, dst).tolist()]
    for (_, here), (there, _) in pairwise(pairs):
        assert here == there
    return [pairs[0][0], *(target for _, target in pairs)] if pairs else []


def best_by_search(cluster: Cluster, src: int, dst: int) -> tuple[int, float]:
    """Reference: fewest links, then the widest, by a search of the networkx graph.

    GPUs do not forward, and a GPU's traffic uses no NIC but those of its two ends.
    """
    graph = cluster.graph
    fabric = cluster.fabric
    own = {f"nic:{fabric.nic_of_gpu[gpu]}" for gpu in (src, dst)}
    start, goal = f"gpu:{src}", f"gpu:{dst}"
    best: dict[str, tuple[int, float]] = {start: (0, np.inf)}
    queue = deque([start])
    while queue:
        vertex = queue.popleft()
        hops, width = best[vertex]
        for near, link in graph.adj[vertex].items():
            if near.startswith("gpu:") and near != goal:
                continue
            if near.startswith("nic:") and near not in own:
                continue
            found = (hops + 1, min(width, link["gb_per_s"]))
            if near not in best:
                queue.append(near)
            if near not in best or (found[0] == best[near][0] and found[1] > best[near][1]):
                best[near] = found
    return best[goal]


def test_same_node_goes_over_nvswitch(small: Callable[..., Cluster]) -> None:
    cluster = small()
    assert path(cluster, 0, 3) == ["gpu:0", "nvswitch:0", "gpu:3"]
    table = cluster.routes()
    assert table.hops[0, 3] == 2
    assert table.latency_us[0, 3] == 10 + 1 + 1
    assert table.gb_per_s[0, 3] == 450


def test_same_rail_crosses_one_leaf(small: Callable[..., Cluster]) -> None:
    cluster = small()
    assert path(cluster, 1, 5) == [
        "gpu:1", "pcie:0:0", "nic:1", "leaf:1", "nic:5", "pcie:1:0", "gpu:5",
    ]  # fmt: skip
    table = cluster.routes()
    assert table.hops[1, 5] == 6
    # one message, four PCIe links of 2 us, two NIC links of 3 us
    assert table.latency_us[1, 5] == 20 + 4 * 2 + 2 * 3
    assert table.gb_per_s[1, 5] == 50


def test_other_rail_is_relayed_over_nvlink_by_default(small: Callable[..., Cluster]) -> None:
    cluster = small()
    assert path(cluster, 0, 6) == [
        "gpu:0", "nvswitch:0", "gpu:2", "pcie:0:1", "nic:2", "leaf:2", "nic:6", "pcie:1:1",
        "gpu:6",
    ]  # fmt: skip
    assert cluster.routes().latency_us[0, 6] == 20 + 2 * 1 + 4 * 2 + 2 * 3


def test_other_rail_crosses_a_spine_when_told_so(small: Callable[..., Cluster]) -> None:
    def spine(content: dict[str, Any]) -> None:
        content["network"]["rail_forwarding"] = "spine"

    cluster = small(spine)
    route = path(cluster, 0, 6)
    assert route[:4] == ["gpu:0", "pcie:0:0", "nic:0", "leaf:0"]
    assert route[4] in ("spine:0", "spine:1")
    assert route[5:] == ["leaf:2", "nic:6", "pcie:1:1", "gpu:6"]
    assert cluster.routes().latency_us[0, 6] == 20 + 4 * 2 + 2 * 3 + 2 * 5
    # the same rail still crosses its leaf alone
    assert cluster.routes().hops[0, 4] == 6


def test_a_second_pod_is_reached_over_a_spine_without_a_relay(
    small: Callable[..., Cluster],
) -> None:
    """Four nodes fill a leaf, so nodes 4 and 5 are on leaves 4 to 7; a relay would save nothing."""
    cluster = small(num_gpus=24)
    assert path(cluster, 0, 13)[1] == "nvswitch:0"
    route = path(cluster, 0, 17)
    assert route[:4] == ["gpu:0", "pcie:0:0", "nic:0", "leaf:0"]
    assert route[5:] == ["leaf:5", "nic:17", "pcie:4:0", "gpu:17"]


def test_uplinks_share_the_oversubscribed_capacity(small: Callable[..., Cluster]) -> None:
    def half(content: dict[str, Any]) -> None:
        content["network"] |= {"type": "leaf-spine", "oversubscription": 2, "leaf_down_ports": 4}

    cluster = small(half)
    table = cluster.routes()
    uplinks = [
        rate
        for name, rate in zip(table.link_name, table.link_gb_per_s, strict=True)
        if name.startswith("leaf:0->spine:")
    ]
    assert uplinks == [4 * 50 / 2 / 2] * 2  # 4 ports of 50 GB/s, 2 to 1, over 2 spines
    assert table.hops[0, 4] == 8


def test_pcie_node_without_nvlink(small: Callable[..., Cluster]) -> None:
    def pcie(content: dict[str, Any]) -> None:
        content["nodes"][0] |= {"gpu": "l40s", "fabric": "pcie"}

    cluster = small(pcie)
    assert path(cluster, 0, 1) == ["gpu:0", "pcie:0:0", "gpu:1"]
    assert path(cluster, 0, 2) == ["gpu:0", "pcie:0:0", "host:0", "host:1", "pcie:0:1", "gpu:2"]
    table = cluster.routes()
    assert table.latency_us[0, 2] == 10 + 2 * 2 + 3 * 7
    assert table.gb_per_s[0, 2] == 30  # the socket link
    assert table.gb_per_s[0, 1] == 32  # PCIe Gen4 of the L40S
    assert path(cluster, 0, 5)[1] == "pcie:0:0"  # no NVLink to relay over


def test_gpus_without_a_peer_path_use_their_nics(small: Callable[..., Cluster]) -> None:
    def none(content: dict[str, Any]) -> None:
        content["nodes"][0] |= {"fabric": "none", "count": 1}
        content["nodes"][0]["nics"]["gpus_per_nic"] = 2
        content["network"] |= {"type": "single-switch", "leaf_down_ports": 8}

    cluster = small(none)
    assert path(cluster, 0, 2) == [
        "gpu:0", "pcie:0:0", "nic:0", "leaf:0", "nic:1", "pcie:0:1", "gpu:2",
    ]  # fmt: skip
    # two GPUs of one NIC turn round in it
    assert path(cluster, 0, 1) == ["gpu:0", "pcie:0:0", "nic:0", "pcie:0:0", "gpu:1"]
    assert cluster.routes().latency_us[0, 2] == 20 + 4 * 2 + 2 * 3


def test_a_nic_on_the_other_socket_is_reached_across_it(small: Callable[..., Cluster]) -> None:
    def one_nic(content: dict[str, Any]) -> None:
        content["nodes"][0]["nics"]["gpus_per_nic"] = 4

    cluster = small(one_nic)
    assert path(cluster, 3, 4) == [
        "gpu:3", "pcie:0:1", "host:1", "host:0", "pcie:0:0", "nic:0", "leaf:0", "nic:1",
        "pcie:1:0", "gpu:4",
    ]  # fmt: skip


def test_rails_of_a_rack(small: Callable[..., Cluster]) -> None:
    """Four NICs on two rails: NIC i is on rail i % 2, and a relay is any GPU of that rail."""

    def rails(content: dict[str, Any]) -> None:
        content["network"]["num_rails"] = 2

    cluster = small(rails)
    assert "leaf:2" not in cluster.graph
    assert path(cluster, 0, 6)[3] == "leaf:0"  # GPU 2 of the other node is on rail 0 too
    assert path(cluster, 0, 5)[:3] == ["gpu:0", "nvswitch:0", "gpu:1"]
    assert path(cluster, 0, 7)[:3] == ["gpu:0", "nvswitch:0", "gpu:3"]


def test_host_routes(small: Callable[..., Cluster]) -> None:
    cluster = small()
    routes = cluster.host_routes()
    names = cluster.routes().link_name
    assert [names[i] for i in routes.dram_to_gpu.links(2)] == [
        "dram:1->host:1", "host:1->pcie:0:1", "pcie:0:1->gpu:2",
    ]  # fmt: skip
    assert routes.dram_to_gpu.gb_per_s[2] == 40  # the bridge, of DRAM 200, bridge 40, PCIe 64
    assert routes.dram_to_gpu.latency_us[2] == 30 + 7 + 7 + 2
    assert [names[i] for i in routes.gpu_to_dram.links(4)] == [
        "gpu:4->pcie:1:0", "pcie:1:0->host:2", "host:2->dram:2",
    ]  # fmt: skip
    assert routes.nvme_to_gpu is not None
    assert routes.nvme_to_dram is not None
    assert [names[i] for i in routes.nvme_to_dram.links(0)] == ["nvme:0->host:0", "host:0->dram:0"]
    assert routes.nvme_to_gpu.gb_per_s[0] == 10
    assert routes.nvme_to_gpu.latency_us[0] == 30 + 100 + 7 + 2


def test_no_nvme_no_route(small: Callable[..., Cluster]) -> None:
    cluster = small(lambda content: content["nodes"][0].pop("nvme"))
    assert cluster.host_routes().nvme_to_gpu is None
    assert cluster.host_nvme_gb.tolist() == [0.0] * 4


def test_diagonal_is_empty(small: Callable[..., Cluster]) -> None:
    table = small().routes()
    for gpu in range(8):
        assert len(table.links(gpu, gpu)) == 0
    assert np.all(np.diag(table.hops) == 0)
    assert np.all(np.diag(table.latency_us) == 0)
    assert np.all(np.isinf(np.diag(table.gb_per_s)))


@pytest.mark.parametrize("name", cluster_names())
def test_routes_are_shortest_and_widest(name: str) -> None:
    """Every route is as short as the search's, and as wide (a relay is as short as a spine)."""
    cluster = load_cluster(name)
    table = cluster.routes()
    for src in range(0, cluster.num_gpus, max(1, cluster.num_gpus // 8)):
        for dst in range(cluster.num_gpus):
            if src == dst:
                continue
            route = path(cluster, src, dst)
            assert route[0] == f"gpu:{src}"
            assert route[-1] == f"gpu:{dst}"
            expected = best_by_search(cluster, src, dst)
            assert (table.hops[src, dst], table.gb_per_s[src, dst]) == expected


@pytest.mark.parametrize("name", cluster_names())
def test_table_agrees_with_the_graph(name: str) -> None:
    cluster = load_cluster(name)
    table = cluster.routes()
    assert cluster.graph.number_of_edges() == table.num_links == len(set(table.link_name))
    for link, link_name in enumerate(table.link_name):
        source, target = link_name.split("->")
        edge = cluster.graph.edges[source, target]
        assert edge["link_idx"] == link
        assert edge["gb_per_s"] == table.link_gb_per_s[link]
        assert edge["latency_us"] == table.link_latency_us[link]
        assert edge["link_class"] == LINK_CLASSES[table.link_class[link]]
    assert table.indptr.dtype == np.int64
    assert table.link_idx.dtype == np.int32
    assert table.indptr[-1] == len(table.link_idx) == table.hops.sum()
    assert np.array_equal(np.diff(table.indptr).reshape(table.hops.shape), table.hops)
    assert np.all(table.link_gb_per_s > 0)


GOLDEN_HOPS = {  # GPUs: {hops: ordered pairs}
    # 2 nodes of 8: 2*8*7 in a node, 2*8 on the rail, 2*8*7 relayed
    "h100-sxm-ib": {2: 112, 6: 16, 8: 112},
    # 4 nodes of 8, two a leaf: 4*8*7 in a node, 4*8*8 on the leaf, 2*16*16 across
    "h100-sxm-roce-leafspine": {2: 224, 6: 256, 8: 512},
    # 2 servers of 2 PCIe switches of 4: 4*4*3 on a switch, 4*4*4 across sockets, 2*64 on the leaf
    "l40s-pcie": {2: 48, 5: 64, 6: 128},
    # one NVLink domain: 72*71
    "gb200-nvl72": {2: 5112},
}


@pytest.mark.parametrize("name", GOLDEN_HOPS)
def test_golden_hop_counts(name: str) -> None:
    hops, pairs = np.unique(load_cluster(name).hop_matrix(), return_counts=True)
    found = dict(zip(hops.tolist(), pairs.tolist(), strict=True))
    found.pop(0)
    assert found == GOLDEN_HOPS[name]


def loads(cluster: Cluster, traffic: np.ndarray) -> np.ndarray:
    """Bytes on every link when `traffic[s, d]` bytes go from s to d."""
    table = cluster.routes()
    per_hop = np.repeat(traffic.reshape(-1), table.hops.reshape(-1))
    return np.bincount(table.link_idx, weights=per_hop, minlength=table.num_links)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(
        ["h100-sxm-ib", "h100-sxm-roce-leafspine", "l40s-pcie", "mixed-h100-a100"]
    ),
    data=st.data(),
)
def test_inv5_relabelling_moves_routes_and_loads_with_the_gpus(
    name: str, data: st.DataObject
) -> None:
    """INV-5: whatever the permutation, the same traffic puts the same bytes on the same links."""
    cluster = load_cluster(name)
    num_gpus = cluster.num_gpus
    order = np.array(data.draw(st.permutations(range(num_gpus))))
    moved = cluster.relabel(order)
    old, new = cluster.routes(), moved.routes()
    at = np.ix_(order, order)
    assert np.array_equal(new.hops, old.hops[at])
    assert np.array_equal(new.latency_us, old.latency_us[at])
    assert np.array_equal(new.gb_per_s, old.gb_per_s[at])
    for src, dst in ((0, num_gpus - 1), (1, 2), (num_gpus // 2, 3)):
        assert np.array_equal(new.links(src, dst), old.links(order[src], order[dst]))
        if src != dst:
            assert path(moved, src, dst)[0] == f"gpu:{src}"
    traffic = np.random.default_rng(0).integers(0, 1000, (num_gpus, num_gpus)).astype(float)
    assert np.array_equal(loads(moved, traffic[at]), loads(cluster, traffic))
    hosts, moved_hosts = cluster.host_routes(), moved.host_routes()
    assert np.array_equal(moved_hosts.dram_to_gpu.gb_per_s, hosts.dram_to_gpu.gb_per_s[order])
    assert [gpu.name for gpu in moved.gpus] == [cluster.gpus[i].name for i in order]


@settings(max_examples=25, deadline=None)
@given(
    nodes=st.permutations(range(4)),
    ranks=st.permutations(range(8)),
)
def test_inv5_symmetries_leave_the_matrices_unchanged(nodes: list[int], ranks: list[int]) -> None:
    """INV-5: moving whole nodes, and the ranks of all nodes alike, is a symmetry of the rails."""
    cluster = load_cluster("h100-sxm-ib", 32)
    order = np.array([node * 8 + rank for node in nodes for rank in ranks])
    at = np.ix_(order, order)
    assert np.array_equal(cluster.hop_matrix()[at], cluster.hop_matrix())
    assert np.array_equal(cluster.bandwidth_matrix()[at], cluster.bandwidth_matrix())
    assert np.array_equal(cluster.routes().latency_us[at], cluster.routes().latency_us)


def test_relabel_refuses_what_is_no_permutation(small: Callable[..., Cluster]) -> None:
    for wrong in ([0, 1, 2], [0] * 8, list(range(1, 9))):
        with pytest.raises(InputError, match="not a permutation"):
            small().relabel(wrong)


def test_ecmp_spreads_over_the_spines_and_follows_its_seed(small: Callable[..., Cluster]) -> None:
    cluster = load_cluster("h100-sxm-roce-leafspine", 64)
    table = cluster.routes()
    loaded = loads(cluster, np.ones((64, 64)))
    into = np.array([loaded[i] for i, n in enumerate(table.link_name) if "->spine:" in n])
    # 4 leaves send 16 * 48 pairs each over 4 spines: 192 a link, binomial with deviation 12
    assert into.sum() == 4 * 16 * 48
    assert np.all(np.abs(into - 192) < 5 * 12)

    def seeded(seed: int) -> Callable[[dict[str, Any]], None]:
        def edit(content: dict[str, Any]) -> None:
            content["network"] |= {"type": "leaf-spine", "ecmp_seed": seed}

        return edit

    first, again, other = (small(seeded(seed)).routes().link_idx for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_rail_only_network_needs_no_spine(small: Callable[..., Cluster]) -> None:
    def no_spine(content: dict[str, Any]) -> None:
        content["network"]["num_spines"] = 0

    cluster = small(no_spine)
    assert cluster.routes().hops.max() == 8
    with pytest.raises(FormatError, match="8 leaf switches and no spine"):
        small(no_spine, num_gpus=24)


def test_tables_are_read_only(small: Callable[..., Cluster]) -> None:
    table = small().routes()
    with pytest.raises(ValueError, match="read-only"):
        table.hops[0, 1] = 0
    with pytest.raises(ValueError, match="read-only"):
        small().speed_factor[0] = 2
