"""Is a site file true of its cluster? Asked of Slurm's own programs; nothing is submitted."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from harness.backends.slurm import script
from harness.backends.slurm.client import Client, Silent, unfit
from harness.backends.slurm.site import Site, load
from harness.errors import HarnessError
from harness.schema import DeviceType, Job

PROBE_LIMIT_S = 60


class Said(NamedTuple):
    """One finding: `ok`, `warn` or `bad`, a sentence, and what to do."""

    topic: str
    status: str
    text: str
    mend: str = ""


def check(name: str, client: Client | None = None) -> list[Said]:
    """What is right and wrong about the site of that name or path, in the order to read it."""
    place, client = load(name), client or Client()
    found = [_runs(place), _controller(client)]
    if found[-1].status == "ok":
        found += [*_partition(place, client), _accounting(place, client), _accepted(place, client)]
    return found


def probe_matrix(name: str, run: str) -> str:
    """A matrix with one probe of a minute at most: over two nodes where the site has them, on its GPUs or CPUs."""
    place = load(name)
    nodes = min(2, place.nodes)
    per_node = place.gpus_per_node or (1 if nodes > 1 else 2)
    device = "cuda" if place.gpus_per_node else "cpu"
    spread = f"device: {device}, devices: {nodes * per_node}, nodes: {nodes}"
    return (f"version: 1\nname: {run}\nprobe:\n"
            f"  - {{{spread}, time_limit: {PROBE_LIMIT_S}s, stall: {PROBE_LIMIT_S}s, iterations: 5}}\n")  # fmt: skip


def _runs(place: Site) -> Said:
    folder = Path(place.runs)
    if not folder.is_dir():
        return Said("runs", "bad", f"{folder} is no folder here.", "Make it where every node sees it, or mend `runs:`.")
    if not os.access(folder, os.W_OK):
        return Said("runs", "bad", f"{folder} cannot be written to.", "Give another folder as `runs:`.")
    return Said("runs", "ok", f"{folder} is here and writable; the probe shows whether nodes see it.")


def _controller(client: Client) -> Said:
    try:
        text = client.call("scontrol", "ping").strip().splitlines()
    except (HarnessError, Silent) as error:
        return Said("controller", "bad", f"The controller does not answer: {error}.", "Ask the site; `scontrol ping`.")
    return Said("controller", "ok", f"{text[0].strip()}." if text else "It answers.")


def _partition(place: Site, client: Client) -> Iterator[Said]:
    """The partition by `sinfo`: does it exist, is it up, and has it what the site file says."""
    options = (f"--partition={place.partition}",) if place.partition else ()
    rows = [line.split("|") for line in client.call("sinfo", "-h", *options, "-N", "-o", "%N|%T|%c|%G|%l").splitlines()]
    nodes = {row[0]: row for row in rows if len(row) == 5}
    named = f"partition {place.partition}" if place.partition else "the cluster"
    if not nodes:
        yield Said("partition", "bad", f"{named} has no node.", "`sinfo -s` lists the partitions.")
        return
    fit = [name for name, row in nodes.items() if not unfit(row[1]) and name not in place.exclude_nodes]
    text = f"{named}: {len(fit)} of {len(nodes)} nodes fit for work."
    enough = len(fit) >= place.nodes
    yield Said("partition", "ok", text) if enough else Said(
        "partition", "bad", text, f"The site file says nodes: {place.nodes}; `sinfo -R` says why.")  # fmt: skip
    if place.gpus_per_node:
        yield _gpus(place, [nodes[name][3] for name in fit])
    yield _time(place, next(iter(nodes.values()))[4])


def _gpus(place: Site, resources: list[str]) -> Said:
    most = max(
        (sum(int(count) for count in re.findall(r"gpu(?::[\w.-]+)?:(\d+)", text)) for text in resources), default=0
    )
    if most < place.gpus_per_node:
        return Said("gpus", "bad", f"A node has at most {most} GPUs as generic resources.",
                    f"Mend gpus_per_node: {place.gpus_per_node}; `sinfo -o '%N %G'` shows them.")  # fmt: skip
    return Said("gpus", "ok", f"A node has {most} GPUs as generic resources.")


def _time(place: Site, limit: str) -> Said:
    seconds = limit_s(limit)
    wanted = place.max_time_limit_s
    if seconds is None or (wanted is not None and wanted <= seconds):
        return Said("time", "ok", f"The partition's time limit is {limit}.")
    if wanted is None:
        return Said("time", "warn", f"The partition ends jobs after {limit}.",
                    f"Write `max_time_limit_s: {seconds:.0f}`, so that longer cases are skipped.")  # fmt: skip
    return Said("time", "bad", f"The partition ends jobs after {limit}.", f"Lower max_time_limit_s to {seconds:.0f}.")


def limit_s(text: str) -> float | None:
    """Seconds of a Slurm time limit (`[days-]hours:minutes:seconds`); `None` where there is none."""
    days, _, clock = text.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")):
        return None
    found = 0
    for part in parts:
        found = 60 * found + int(part)
    return float(int(days or 0) * 86_400 + found)


def _accounting(place: Site, client: Client) -> Said:
    try:
        client.call("sacct", "--noheader", "--allocations", "--starttime=now-1minutes")
    except (HarnessError, Silent) as error:
        if not place.accounting:
            return Said("accounting", "ok", "None here, as the site file says.")
        return Said("accounting", "bad", f"sacct does not answer: {error}", "Write `accounting: false`.")
    if not place.accounting:
        return Said("accounting", "warn", "sacct answers, and the site file says that it does not.",
                    "Write `accounting: true`: it tells what the queue has forgotten.")  # fmt: skip
    return Said("accounting", "ok", "sacct answers.")


def _accepted(place: Site, client: Client) -> Said:
    """Slurm's own judgement of the directives, by `sbatch --test-only`."""
    device: DeviceType = "cuda" if place.gpus_per_node else "cpu"
    job = Job(id="harness-doctor", environment="train", case_ids=(), argv=("true",), env={}, device=device, payload={},
              devices=max(1, place.gpus_per_node) * place.nodes, nodes=place.nodes, time_limit_s=PROBE_LIMIT_S,
              stall_s=PROBE_LIMIT_S)  # fmt: skip
    order = script.Order(job=job, argv=job.argv, env={}, job_dir=place.runs, name=job.id, site=place)
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script.text(order))
        file.flush()
        try:
            client.call("sbatch", "--test-only", file.name)
        except (HarnessError, Silent) as error:
            return Said("directives", "bad", f"A job of this site is refused: {error}.",
                        "Mend partition, account, qos, constraint or the request for GPUs.")  # fmt: skip
    return Said("directives", "ok", f"Slurm takes a job of {place.nodes} nodes with these directives.")
