"""Run one training case with and without GPU telemetry, in interleaved pairs, and write what telemetry costs.

The measure is the ratio of the two runs' median step times, slowest rank and steady steps only, pair by pair; the
headline is the median over the pairs. Odd pairs run with telemetry first, even ones without, so that a drift of the
host favours neither. A run before the pairs warms the compile caches and counts for nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import launch, matrix, observe, schema, session, store, triage
from harness.errors import HarnessError
from harness.files import write_atomically
from harness.payload.sampler import SWITCH
from harness.schema import Frozen
from harness.summary import Spread, summarize

LIMIT = 1.01
"""Under this median ratio telemetry is called free."""
POLL_S = 0.5


class Side(Frozen):
    """One run of the case."""

    telemetry: bool
    step_time_s: Spread
    tokens_per_s: float | None
    gpus_sampled: int
    sampler_core_share: float | None
    job_dir: str


class Pair(Frozen):
    """The case with and without telemetry, one right after the other."""

    with_telemetry: Side
    without: Side
    first: str
    """`with` or `without`."""
    ratio: float
    """Median step time with telemetry over that without."""
    ratio_of_means: float


Once = Callable[[bool], Side]


def measure_pairs(once: Once, pairs: int, say: Callable[[str], None]) -> list[Pair]:
    """The pairs in the order in which they ran."""
    found = []
    for index in range(pairs):
        order = (True, False) if index % 2 == 0 else (False, True)
        sides = {telemetry: once(telemetry) for telemetry in order}
        found.append(_pair(sides[True], sides[False], "with" if order[0] else "without"))
        say(f"pair {index + 1} of {pairs}: ratio {found[-1].ratio:.4f}")
    return found


def _pair(watched: Side, bare: Side, first: str) -> Pair:
    one, other = watched.step_time_s, bare.step_time_s
    if not (one.p50 and other.p50 and one.mean and other.mean):
        raise HarnessError("a run has no steady step", "give the case more `steps` than `warmup_steps`")
    return Pair(with_telemetry=watched, without=bare, first=first, ratio=one.p50 / other.p50,
                ratio_of_means=one.mean / other.mean)  # fmt: skip


def checked(side: Side, devices: int) -> Side:
    """`side` where telemetry really ran, or really did not; HarnessError otherwise."""
    expected = devices if side.telemetry else 0
    if side.gpus_sampled != expected:
        state = "with" if side.telemetry else "without"
        raise HarnessError(
            f"the run {state} telemetry sampled {side.gpus_sampled} GPUs, not {expected}",
            f"its notes say why: {side.job_dir}/gpu.samples.node0.jsonl",
        )
    return side


# ---------------------------------------------------------------- one run


def only_case(found: session.Session) -> schema.TrainCase:
    """The one training case on a GPU that was asked for."""
    cases = [case for case in found.cases if isinstance(case, schema.TrainCase) and case.device == "cuda"]
    if len(cases) != 1:
        names = ", ".join(schema.case_id(case) for case in cases[:8]) or "none"
        raise HarnessError(
            f"not one training case on a GPU but {len(cases)}", f"name one with --only; there are: {names}"
        )
    return cases[0]


def run_once(found: session.Session, case: schema.TrainCase, number: int, telemetry: bool) -> Side:
    """Train it as `harness run` does, but for the switch; HarnessError where it measured nothing."""
    (job,) = launch.jobs((case,), number)
    env = job.env | ({} if telemetry else {SWITCH: "off"})
    folder = found.run.job_dir(job.id, number).resolve()
    folder.mkdir(parents=True)
    job = job.model_copy(update={"env": env})
    ticket = found.backend.submit(job, found.box.wrap(job, folder, found.run.payload_root.resolve()), folder)
    try:
        while job.id not in found.backend.poll([ticket]):
            time.sleep(POLL_S)
    except BaseException:
        found.backend.cancel(ticket)
        raise
    outcome = found.backend.collect(ticket)
    seen = observe.observe(case, [folder])
    if diagnosis := triage.diagnose(case, [outcome], seen, observe.log_text([folder])):
        raise HarnessError(f"a run failed: {diagnosis.summary}", f"its files are in {folder}")
    found.run.tidy(job.id, number)
    return checked(_side(case, seen, telemetry, str(folder)), case.devices)


def _side(case: schema.TrainCase, seen: schema.Observation, telemetry: bool, folder: str) -> Side:
    attempt = schema.Attempt(number=1, jobs=(), observation=seen)
    record = schema.Record(case_id=schema.case_id(case), case=case, status="measured", attempts=(attempt,),
                           finished_at=time.time())  # fmt: skip
    summary = summarize(record)
    train = summary.train if summary else None
    return Side(telemetry=telemetry, step_time_s=train.step_time_s if train else Spread(),
                tokens_per_s=train.tokens_per_s if train else None, gpus_sampled=len(seen.gpus),
                sampler_core_share=max((one.sampler_core_share or 0.0 for one in seen.gpus), default=None),
                job_dir=folder)  # fmt: skip


# ---------------------------------------------------------------- what is written


def report(case: schema.TrainCase, provenance: schema.Provenance, pairs: Sequence[Pair]) -> dict[str, Any]:
    """All of it as JSON values."""
    ratios = [pair.ratio for pair in pairs]
    shares = [share for pair in pairs if (share := pair.with_telemetry.sampler_core_share) is not None]
    return {
        "median_ratio": statistics.median(ratios), "min_ratio": min(ratios), "max_ratio": max(ratios), "limit": LIMIT,
        "median_ratio_of_means": statistics.median(pair.ratio_of_means for pair in pairs),
        "under_limit": statistics.median(ratios) < LIMIT,
        "sampler_core_share": statistics.median(shares) if shares else None,
        "case_id": schema.case_id(case), "case": case.model_dump(mode="json"),
        "pairs": [pair.model_dump(mode="json") for pair in pairs], "provenance": provenance.model_dump(mode="json"),
        "finished_at": time.time(),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The same for a person, as Markdown."""
    gpus = found["provenance"]["gpus"]
    lines = [
        f"# What telemetry costs: `{found['case_id']}`", "",
        f"On {gpus[0]['name'] if gpus else 'no GPU'}, driver {found['provenance']['driver']}; "
        f"{len(found['pairs'])} pairs, interleaved.", "",
        "| pair | first | step time with, s | without, s | n | ratio |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for index, pair in enumerate(found["pairs"], 1):
        one, other = pair["with_telemetry"]["step_time_s"], pair["without"]["step_time_s"]
        lines.append(f"| {index} | {pair['first']} | {one['p50']:.5f} | {other['p50']:.5f} | {one['n']} / {other['n']} "
                     f"| {pair['ratio']:.4f} |")  # fmt: skip
    verdict = "under" if found["under_limit"] else "NOT under"
    share = found["sampler_core_share"]
    span = f"{found['min_ratio']:.4f} to {found['max_ratio']:.4f}"
    lines += ["", f"Median ratio **{found['median_ratio']:.4f}** ({span}), {verdict} {found['limit']}."]
    lines += [f"The sampler took {share:.2%} of one core."] if share is not None else []
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 under the limit, 1 not under it, 2 where it could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("matrix", type=Path)
    parser.add_argument("--only", help="a shell pattern that names one training case")
    parser.add_argument("--box", default="venv")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"), help="a new folder")
    arguments = parser.parse_args(argv)
    try:
        found = _measure(arguments)
    except HarnessError as error:
        print(f"overhead: {error.message}\n  {error.hint}", file=sys.stderr)
        return 2
    print(table(found), end="")
    return 0 if found["under_limit"] else 1


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.pairs < 1:
        raise HarnessError("no pair is no measurement", "give --pairs 1 or more")
    directory = store.Run(arguments.out)
    if directory.jobs_dir.exists():
        raise HarnessError(f"{arguments.out} holds jobs already", "name a new folder with --out")
    plan = matrix.load(arguments.matrix)
    with directory.locked():
        found = session.begin(plan, directory, session.Options(box=arguments.box, only=arguments.only))
        case, numbers = only_case(found), iter(range(1, 10_000))
        run_once(found, case, next(numbers), True)
        say("the run that warms the caches is done")

        def once(telemetry: bool) -> Side:
            return run_once(found, case, next(numbers), telemetry)

        pairs = measure_pairs(once, arguments.pairs, say)
        result = report(case, found.provenance_of(case), pairs)
        write_atomically(arguments.out / "overhead.json", json.dumps(result, indent=1) + "\n")
        write_atomically(arguments.out / "overhead.md", table(result))
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
