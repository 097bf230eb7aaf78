"""NCCL's log lines, made up in its wording, to facts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from harness.observe import nccl

HEAD = "node1:100:200 [0] NCCL INFO "
INIT = HEAD + "ncclCommInitRankConfig comm 0x55e0 rank 0 nranks {} cudaDev 0 nvmlDev 2 busId c8000 commId 0x9f - Init "
TWO_RANKS = [
    HEAD + "NCCL_DEBUG_SUBSYS set by environment to INIT,ENV,NET,GRAPH",
    HEAD + "NCCL_P2P_DISABLE set by environment to 0.",
    HEAD + "Bootstrap: Using eth0:10.0.0.1<0>",
    HEAD + "NCCL version 2.28.3+cuda13.0",
    HEAD + "NET/IB : No device found.",
    HEAD + "NET/Socket : Using [0]eth0:10.0.0.1<0> [1]eth1:10.0.1.1<0>",
    HEAD + "Using network Socket",
    INIT.format(2) + "START",
    HEAD + " Pattern 4, crossNic 0, nChannels 12, bw 20.000000/20.000000, type NVL/PIX, sameChannels 1",
    HEAD + "comm 0x55e0 rank 0 nRanks 2 nNodes 1 localRanks 2 localRank 0 MNNVL 0",
    HEAD + "24 coll channels, 24 collnet channels, 16 nvls channels, 32 p2p channels, 32 p2p channels per peer",
    INIT.format(2) + "COMPLETE",
    HEAD + "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM",
    HEAD + "Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM",
    HEAD + "Channel 00/0 : 1[1] -> 0[0] via P2P/CUMEM/read",
    HEAD + "Connected all rings, use ring PXN 0 GDR 1",
    HEAD + "Connected NVLS tree",
]


def test_two_ranks_over_nvlink() -> None:
    facts = nccl.parse(TWO_RANKS)
    assert (facts.version, facts.ranks, facts.nodes, facts.network) == ("2.28.3+cuda13.0", 2, 1, "Socket")
    assert facts.transports == {"P2P/CUMEM": 2, "P2P/CUMEM/read": 1}
    assert [(one.source, one.target, one.transport, one.channels) for one in facts.links] == [
        (0, 1, "P2P/CUMEM", 2), (1, 0, "P2P/CUMEM/read", 1)]  # fmt: skip
    assert facts.paths == ("NVL",)
    assert facts.algorithms == ("nvls", "ring")
    assert facts.interfaces == ("eth0", "eth1")
    assert facts.environment == {"NCCL_DEBUG_SUBSYS": "INIT,ENV,NET,GRAPH", "NCCL_P2P_DISABLE": "0"}
    assert facts.warnings == ()


def test_both_ends_of_a_connection_count_once() -> None:
    facts = nccl.parse([
        HEAD + "Channel 00/0 : 1[1] -> 2[0] [send] via NET/IB/3/GDRDMA",
        "node2:9:9 [0] NCCL INFO Channel 00/0 : 1[1] -> 2[0] [receive] via NET/IB/5/GDRDMA",
        HEAD + "Channel 01/0 : 1[1] -> 2[0] [send] via NET/Socket/0(1)/Shared",
        HEAD + "Channel 00 : 2[1] -> 0[0] via SHM/direct/direct",
        HEAD + "NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_2:1/RoCE [RO]; OOB ib0:10.0.0.1<0>",
    ])  # fmt: skip
    assert facts.transports == {"NET/IB/GDRDMA": 1, "NET/Socket/Shared": 1, "SHM/direct/direct": 1}
    assert facts.interfaces == ("mlx5_0", "mlx5_2")


def test_what_nccl_chose_for_each_size_is_kept_once() -> None:
    line = HEAD + "AllReduce: {} Bytes -> Algo {} proto {} channel{{Lo..Hi}}={{{}}}"
    facts = nccl.parse([
        line.format(1024, "TREE", "LL", "0..0"),
        line.format(1024, "TREE", "LL", "0..0"),
        line.format(67108864, "RING", "SIMPLE", "0..23"),
        HEAD + "Broadcast: 4096 Bytes -> Algo RING proto LL128 channel{Lo..Hi}={2..3}",
        HEAD + "AllReduce: 4096 Bytes -> Algo RI",
    ])  # fmt: skip
    assert [(one.collective, one.size_bytes, one.algorithm, one.protocol, one.channels) for one in facts.choices] == [
        ("AllReduce", 1024, "TREE", "LL", 1),
        ("AllReduce", 67108864, "RING", "SIMPLE", 24),
        ("Broadcast", 4096, "RING", "LL128", 2),
    ]
    many = nccl.parse([line.format(size, "RING", "LL", "0..1") for size in range(4, 4000, 4)])
    assert len(many.choices) == nccl.MAX_CHOICES


def test_no_nvls_channels_is_no_nvls() -> None:
    assert nccl.parse([HEAD + "2 coll channels, 0 nvls channels, 2 p2p channels"]).algorithms == ()


def test_warnings_are_kept_once_each_and_few() -> None:
    lines = ["[2026-11-21 10:00:00] node1:1:2 [0] misc/socket.cc:93 NCCL WARN socketProgress: closed by peer<4>"] * 3
    lines += [f"node1:1:2 [0] NCCL WARN number {i}" for i in range(50)]
    found = nccl.parse(lines).warnings
    assert found[0] == "socketProgress: closed by peer<4>"
    assert len(found) == nccl.MAX_WARNINGS


def test_the_largest_communicator_gives_the_ranks() -> None:
    assert nccl.parse([INIT.format(ranks) + "COMPLETE" for ranks in (1, 8, 2)]).ranks == 8


def test_each_processs_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "nccl.node1.100.log").write_text("\n".join(TWO_RANKS))
    (tmp_path / "nccl.node1.101.log").write_text("n:101:9 [1] NCCL INFO Channel 02/0 : 1[1] -> 0[0] via P2P/CUMEM\n")
    facts = nccl.read([tmp_path])
    assert facts
    assert facts.files == 2
    assert facts.transports["P2P/CUMEM"] == 3


def test_without_a_file_there_are_no_facts(tmp_path: Path) -> None:
    assert nccl.read([tmp_path]) is None


WHOLE = "\n".join([*TWO_RANKS, "é NCCL WARN \x1b[31m"]).encode()


@given(cut=st.integers(0, len(WHOLE)), noise=st.binary(max_size=40))
def test_a_log_cut_at_any_byte_is_read(cut: int, noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "nccl.a.1.log").write_bytes(WHOLE[:cut] + noise)
        facts = nccl.read([Path(folder)])
    assert facts
    assert facts.ranks in (None, 2)
    facts.model_dump_json()
