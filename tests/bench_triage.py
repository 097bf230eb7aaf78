"""How fast `harness triage` reads NCCL's INFO logs, beside `grep -c` over the same files.

usage: python tests/bench_triage.py [MEGABYTES=200] [RANKS=512] [FILES=8]
The logs are made up in a temporary folder: the lines that NCCL prints at INFO for set-up and for each collective, of
all ranks, spread over some files, with one failure among them. Figures for 1 GB follow by scaling.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LINES = (
    "{at} NCCL INFO Channel {c:02d}/0 : {r}[{g}] -> {n}[{g}] via P2P/CUMEM/read\n",
    "{at} NCCL INFO Channel {c:02d}/16 : 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15\n",
    "{at} NCCL INFO Trees [0] {r}/-1/-1->{n}->-1 [1] {r}/-1/-1->{n}->-1\n",
    "{at} NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.{g}<0>\n",
    "{at} NCCL INFO AllReduce: opCount {c:x} sendbuff 0x7f{r:08x} recvbuff 0x7f{n:08x} count 1048576 datatype 9 "
    "op 0 root 0 comm 0x{r:x} [nranks=512] stream 0x{n:x}\n",
)
FAILURE = (
    "node-003:1030:5030 [6] transport/net_ib.cc:2100 NCCL WARN NET/IB: Got completion from peer 10.0.0.9<55000> "
    "with status=12 opcode=0 len=0 vendor err 129 (Recv)\n"
)


def write(folder: Path, megabytes: int, ranks: int, files: int) -> int:
    """The logs; returns their size in bytes."""
    chance = random.Random(7)
    total = 0
    for index in range(files):
        with open(folder / f"nccl.{index}.log", "w", encoding="utf-8") as out:
            size = 0
            while size < megabytes * 1_000_000 // files:
                lines = "".join(_line(chance, ranks) for _ in range(5_000))
                out.write(lines)
                size += len(lines)
            out.write(FAILURE if index == files // 2 else "")
            total += size
    return total


def _line(chance: random.Random, ranks: int) -> str:
    rank = chance.randrange(ranks)
    at = f"node-{rank // 8:03d}:{1000 + rank}:{5000 + rank} [{rank % 8}]"
    return chance.choice(LINES).format(at=at, c=chance.randrange(32), r=rank, n=(rank + 1) % ranks, g=rank % 8)


def main() -> None:
    """Prints the figures."""
    megabytes, ranks, files = (int(value) for value in [*sys.argv[1:], *("200", "512", "8")[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name), megabytes, ranks, files)
        triage_s, code = _timed([sys.executable, "-m", "harness", "triage", "--json", name])
        memory_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
        grep_s, _ = _timed(["grep", "-rc", "Error", name])
    rate = size / 1e6 / triage_s
    given = f"{size / 1e6:.0f} MB, {ranks} ranks, {files} files"
    print(f"{given}: {triage_s:.1f} s, exit {code}, {memory_mb:.0f} MB of memory")
    ratio = triage_s / grep_s
    print(f"{rate:.0f} MB/s, so 1 GB in {1000 / rate:.1f} s; grep -c takes {grep_s:.2f} s, a ratio of {ratio:.0f}")


def _timed(command: list[str]) -> tuple[float, int]:
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    return time.monotonic() - start, done.returncode


if __name__ == "__main__":
    main()
