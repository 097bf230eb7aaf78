"""One readable sbatch script for each job; pure, so that a test reads it as text.

The script runs twice: as the batch script on the first node, and, started by srun, once on every node (`on-node`). It
writes into the job's directory, which all nodes share:

    started.txt          Slurm's id of the job and its nodes, before anything else
    node.<name>.txt      what the node is: processors, memory, GPUs
    logs/<name>.*.log    output of each node's launcher, as it comes
    stop.txt             why the job is to end; every node obeys it within two seconds
    ended.txt            how it ended, in the script's own words; the last line it writes
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping

from harness.backends.slurm.site import Site
from harness.schema import RENDEZVOUS, Frozen, Job

START_S = 60
"""What Slurm's own limit leaves a job beyond its time limit and the notice, for its start and its end."""
FIRST_PORT, PORTS = 20_000, 12_000
"""Rendezvous ports: below the range that Linux gives to outgoing connections (32768)."""
SHELL = dict(
    zip(RENDEZVOUS, ("$HARNESS_HEAD", "$HARNESS_PORT", "$SLURM_JOB_ID", "$SLURM_NODEID", "$node"), strict=True)
)
_WORD = re.compile("|".join(re.escape(word) for word in RENDEZVOUS))


class Order(Frozen):
    """All that a script depends on."""

    job: Job
    argv: tuple[str, ...]
    """Of the launcher on each node, its box included."""
    env: dict[str, str]
    """To export; `${PATH}` and the like may stand in a value."""
    container: tuple[str, ...] = ()
    """srun's options for the container that the launcher runs in."""
    job_dir: str
    name: str
    """Slurm's name of the job, by which a lost submission is found again."""
    site: Site
    exclude: tuple[str, ...] = ()
    keep_artifacts: bool = False


def text(order: Order) -> str:
    """The script."""
    parts = (_head(order), _shared(order), _on_node(order), _batch(order))
    return "\n".join(parts)


def launcher(argv: tuple[str, ...]) -> str:
    """`argv` as bash reads it, with the words of `RENDEZVOUS` as the variables that a node has."""
    return " ".join(_argument(argument) for argument in argv)


def _argument(argument: str) -> str:
    if not _WORD.search(argument):
        return shlex.quote(argument)
    literal = re.sub(r'(["\\$`])', r"\\\1", argument)
    return f'"{_WORD.sub(lambda found: SHELL[found[0]], literal)}"'


# ---------------------------------------------------------------- directives


def minutes(order: Order) -> int:
    """Slurm's time limit, in its unit: the job's own, which the script keeps to the second, and what surrounds it."""
    return math.ceil((order.job.time_limit_s + order.site.notice_s + START_S) / 60)


def directives(order: Order) -> Iterator[str]:
    """What is asked of the scheduler, one option each."""
    site, job = order.site, order.job
    per_node = job.devices // job.nodes
    yield f"--job-name={order.name}"
    for option in ("partition", "account", "qos", "constraint", "reservation"):
        if value := getattr(site, option):
            yield f"--{option}={value}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks={job.nodes}"
    yield "--ntasks-per-node=1"
    if site.cpus_per_device:
        yield f"--cpus-per-task={site.cpus_per_device * per_node}"
    if site.memory_per_node:
        yield f"--mem={site.memory_per_node}"
    if job.device == "cuda":
        yield from _gpus(site, per_node)
    if site.exclusive:
        yield "--exclusive"
    if excluded := tuple(dict.fromkeys((*site.exclude_nodes, *order.exclude))):
        yield f"--exclude={','.join(excluded)}"
    yield f"--time={minutes(order)}"
    yield f"--signal=B:USR1@{site.notice_s}"
    yield "--no-requeue"
    yield "--export=NIL"
    yield "--open-mode=append"
    yield f"--chdir={order.job_dir}"
    yield f"--output={order.job_dir}/slurm.log"


def _gpus(site: Site, per_node: int) -> Iterator[str]:
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    if site.gpu_request == "gres":
        yield f"--gres=gpu:{kind}{per_node}"
    elif site.gpu_request == "gpus-per-node":
        yield f"--gpus-per-node={kind}{per_node}"


def _head(order: Order) -> str:
    lines = [f"#SBATCH {option}" for option in directives(order)]
    cases = ", ".join(order.job.case_ids)
    return "\n".join(["#!/bin/bash -l", f"# {order.job.id}: measures {cases}", *lines, ""])


# ---------------------------------------------------------------- what both runs of the script do


def _shared(order: Order) -> str:
    job_dir = shlex.quote(order.job_dir)
    lines = [f"job_dir={job_dir}", 'cd "$job_dir" || exit 72', "node=${SLURMD_NODENAME:-$(hostname -s)}", ""]
    if order.site.environment:
        lines += ["# The site's own lines.", *order.site.environment, ""]
    lines += ["# The job's environment: all that its launcher gets besides Slurm's variables.", *_exports(order.env)]
    lines += _exports(order.site.network)
    if order.site.scratch:
        lines += ["", *_scratch(order)]
    return "\n".join([*lines, ""])


def _exports(env: Mapping[str, str]) -> list[str]:
    return [f"export {name}={_value(value)}" for name, value in sorted(env.items())]


def _value(value: str) -> str:
    """Quoted, but for `${PATH}` at its end, which is the node's own."""
    for name in ("PATH", "PYTHONPATH"):
        if value.endswith(f"${{{name}}}"):
            return f'{shlex.quote(value.removesuffix(f"${{{name}}}"))}"${{{name}:-}}"'
    return shlex.quote(value)


def on_scratch(order: Order) -> bool:
    """Whether the artifacts lie on the node's own disk; on several nodes the ranks read what others wrote."""
    return bool(order.site.scratch) and order.job.nodes == 1


def by_node(order: Order) -> bool:
    """Whether they lie on the disks of several nodes, because the case asks for local ones."""
    return bool(order.site.scratch) and order.job.nodes > 1 and order.job.local_artifacts


def _scratch(order: Order) -> list[str]:
    return [
        "# The node's own disk: slow shared storage looks like a hanging network. Caches stay for the next job.",
        f'scratch_root="{order.site.scratch}"',
        "scratch=$scratch_root/harness-${USER:-$(id -un)}/$SLURM_JOB_ID.$node",
        "caches=$scratch_root/harness-${USER:-$(id -un)}/caches",
        "export APPTAINER_BIND=$scratch_root",
        "export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface} # what was fetched stays where it is",
        "export TRITON_CACHE_DIR=$caches/triton TORCHINDUCTOR_CACHE_DIR=$caches/inductor",
        "# vLLM makes sockets in TMPDIR, and the kernel takes no path of one longer than 107 characters.",
        "tmp=$scratch/tmp",
        "if [ ${#tmp} -le 60 ]; then export TMPDIR=$tmp; fi",
        "export VLLM_CACHE_ROOT=$caches/vllm XDG_CACHE_HOME=$caches",
        *(_BY_NODE if by_node(order) else ()),
    ]


_BY_NODE = (
    "# Checkpoints too, under one name on every node: only the rank that writes one reads it back.",
    "artifacts=$scratch_root/harness-${USER:-$(id -un)}/$SLURM_JOB_ID.artifacts",
    'mkdir -p "$artifacts"',
)


ON_NODE = r"""
# ---------------------------------------------------------------- on every node, started by srun below
if [ "${1:-}" = on-node ]; then
  mkdir -p logs ${scratch:+"$scratch/tmp" "$scratch/artifacts" "$caches"}
  exec >>"logs/$node.stdout.log" 2>>"logs/$node.stderr.log"
  {
    echo "node $node"
    echo "cpus $(nproc)"
    echo "memory_kib $(awk '/^MemTotal/ {print $2}' /proc/meminfo)"
    echo "cpu $(awk -F': ' '/^model name/ {print $2; exit}' /proc/cpuinfo)"
    nvidia-smi --query-gpu=index,name,uuid,memory.total,driver_version --format=csv,noheader,nounits 2>/dev/null |
      sed 's/^/gpu /'
  } >"node.$node.txt"

  below() { # PID: all that descends from it
    local child
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do echo "$child"; below "$child"; done
  }
  end_launcher() { # first its ranks' Python stacks, which only processes with a handler are asked for
    local all caught
    all=$(below "$launcher")
    for pid in $all; do
      caught=$(awk '/^SigCgt/ {print $2}' "/proc/$pid/status" 2>/dev/null)
      if [ -n "$caught" ] && (( 0x$caught >> 9 & 1 )); then kill -USR1 "$pid" 2>/dev/null; fi
    done
    sleep 2
    kill -TERM "$launcher" 2>/dev/null
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ -d "/proc/$launcher" ] || break; sleep 0.5; done
    for pid in $launcher $all; do kill -KILL "$pid" 2>/dev/null; done
  }

  {address}
  {launcher} </dev/null &
  launcher=$!
  trap ': >ending.$node' TERM
  # outcome.json: the scheduler gave this node up while it lived, and the job was taken elsewhere.
  while kill -0 "$launcher" 2>/dev/null; do
    if [ -e stop.txt ] || [ -e outcome.json ] || [ -e "ending.$node" ]; then end_launcher; break; fi
    sleep 1 & wait -n "$!" "$launcher"
  done
  wait "$launcher"
  code=$?
  {tidy}
  exit "$code"
fi
"""


def _on_node(order: Order) -> str:
    alone = order.site.scratch and order.job.nodes > 1  # else the batch script still has artifacts to copy from it
    tidy = 'rm -rf "$scratch"' + (' "$artifacts"' if by_node(order) else "") if alone else ":"
    by_ip = order.site.head_address == "ip" and order.job.nodes > 1
    address = "export PET_LOCAL_ADDR=$(hostname -I | cut -d' ' -f1) # how torchrun names this node to the others"
    words = {"{launcher}": launcher(order.argv), "{tidy}": tidy, "{address}": address if by_ip else ":"}
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], ON_NODE)


BATCH = r"""
# ---------------------------------------------------------------- the batch script, on the first node alone
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then # requeued by somebody: what the earlier try wrote is moved aside
  mkdir -p "earlier.$SLURM_RESTART_COUNT"
  mv events.* logs node.*.txt stop.txt ending.* ended.txt stacks.* "earlier.$SLURM_RESTART_COUNT/" 2>/dev/null
fi
echo "$SLURM_JOB_ID ${SLURM_JOB_NODELIST} $(date +%s.%N)" >started.txt
ln -sfn "logs/$node.stdout.log" stdout.log # where every backend has them
ln -sfn "logs/$node.stderr.log" stderr.log
export HARNESS_HEAD={head}
export HARNESS_PORT=$(({first_port} + SLURM_JOB_ID % {ports}))
how=ended
trap 'how=time_limit' USR1 # Slurm announces the end of the job's time
trap 'how=terminated' TERM
{prepare}
srun --export=ALL --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 \
  {options}bash "$job_dir/job.sbatch" on-node &
step=$!
begun=$SECONDS quiet_since=$SECONDS size=-1
while kill -0 "$step" 2>/dev/null; do
  sleep 1 & wait -n "$!" "$step"
  now=$(cat events.rank*.jsonl 2>/dev/null | wc -c)
  [ "$now" = "$size" ] || { size=$now; quiet_since=$SECONDS; }
  [ "$how" = ended ] && (( SECONDS - begun > {limit_s} )) && how=time_limit
  [ "$how" = ended ] && (( SECONDS - quiet_since > {stall_s} )) && how=stalled
  if [ "$how" != ended ] && [ ! -e stop.txt ]; then
    echo "$how" >stop.txt # every node sees it, saves its stacks and ends
    ( sleep 20; kill -TERM "$step"; sleep 5; kill -KILL "$step" ) 2>/dev/null &
    last_resort=$!
  fi
done
wait "$step"
code=$?
[ -z "${last_resort:-}" ] || kill "$last_resort" 2>/dev/null
{finish}
echo "$how $code $(date +%s.%N)" >ended.new
mv ended.new ended.txt
[ "$how" = ended ] || exit 124
exit "$code"
"""

PREPARE = """\
mkdir -p "$scratch/tmp" "$scratch/artifacts" "$caches"
trap 'rm -rf "$scratch"' EXIT
[ -e artifacts ] || ln -s "$scratch/artifacts" artifacts"""

PREPARE_SHARED = """\
mkdir -p "$scratch/tmp" "$caches"
trap 'rm -rf "$scratch"' EXIT"""

COPY_BACK = """\
# What a later job of the case reads comes back, as far as the job's time allows.
rm -f artifacts
timeout "$(({allowed_s} - (SECONDS - begun)))" cp -a "$scratch/artifacts" artifacts.new && mv artifacts.new artifacts ||
  {{ echo "artifacts stayed on $node: no time to copy them back" >copy-back.txt; rm -rf artifacts.new; \
[ "$code" != 0 ] || code=75; }}"""


def _batch(order: Order) -> str:
    site, job = order.site, order.job
    values = {
        "head": '"$(hostname)"' if site.head_address == "hostname" else "\"$(hostname -I | cut -d' ' -f1)\"",
        "first_port": str(FIRST_PORT),
        "ports": str(PORTS),
        "nodes": str(job.nodes),
        "options": "".join(f"{_container_option(option, site)} " for option in order.container),
        "limit_s": str(math.ceil(job.time_limit_s)),
        "stall_s": str(math.ceil(job.stall_s)),
        "prepare": _prepare(order),
        "finish": _finish(order),
    }
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda found: values[found[1]], BATCH)


def _container_option(option: str, site: Site) -> str:
    if option.startswith("--container-mounts=") and site.scratch:
        return f'{shlex.quote(option)}",$scratch_root:$scratch_root"'
    return shlex.quote(option)


def _prepare(order: Order) -> str:
    if not order.site.scratch:
        return ":"
    if by_node(order):
        return PREPARE_SHARED + '\n[ -e artifacts ] || ln -s "$artifacts" artifacts'
    return PREPARE if on_scratch(order) else PREPARE_SHARED


def _finish(order: Order) -> str:
    if by_node(order):
        return 'rm -rf artifacts "$artifacts"'
    if not on_scratch(order):
        return ":"
    if order.site.copy_back == "needed" and order.job.payload.get("keep", "none") == "none":
        return "rm -f artifacts # nothing later reads them"
    return COPY_BACK.format(allowed_s=math.ceil(order.job.time_limit_s + START_S / 2))
