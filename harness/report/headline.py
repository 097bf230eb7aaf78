"""What a reader wants first: what ran where, the few answers, what failed, the environments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from harness.frontier import is_answer
from harness.report import probes
from harness.report.cards import Fit, tells_of_size, what_fits
from harness.report.chain import answer, conclusion
from harness.report.compare import NEWLY_FAILED, Compared, without_repeat
from harness.report.entry import Entry, ReportRun, fits, full_label, number_label, peak_row, verdict
from harness.report.parts import when
from harness.report.sections import environment_row
from harness.report.setups import gpu_name, options, place
from harness.report.words import MISSING, TIMES, Cell, digits, ms, one_line, plural, size
from harness.schema import Provenance
from harness.summary import spread
from harness.summary.gpu_time import gpu_time

MAX_FAILURES = 12
MAX_ANSWERS = 16
_MEASURES = {"allocated": "allocated", "rss_growth": "resident growth"}


class Answer(NamedTuple):
    """One question that the measured cases answer."""

    question: str
    value: str
    because: str
    """The case, and the n behind the value."""
    href: str
    """Where it stands on the page."""


def run_facts(run: ReportRun) -> dict[str, object]:
    """A run's name, and label and value of each fact of it."""
    known = [record.provenance for record in run.records if record.provenance]
    ends = [record.finished_at for record in run.records if record.attempts]
    ended = f", last case ended {when(max(ends))}" if ends else ""
    facts = [("Begun", when(run.created) + ended), *_gpu_time(run), *_provenance_facts(known)]
    return {"name": one_line(run.name, 80), "facts": facts}


def _gpu_time(run: ReportRun) -> list[tuple[str, str]]:
    """What the GPUs were held for, load, compilation and saving included."""
    spent = gpu_time(run.records)
    if spent is None:
        return []
    each = f"{digits(spent.per_case_s)} per decided case (n = {spent.cases})"
    return [("GPU time", f"{digits(spent.gpu_seconds)} GPU-seconds in jobs from start to end, {each}")]


def _provenance_facts(known: Sequence[Provenance]) -> list[tuple[str, str]]:
    if not known:
        return [("Provenance", "no record states any")]
    environments = {env.name: env for of in known for env in of.environments}.values()
    return [
        ("Numbers", _some(f"{of.number_kind}, {of.weights} weights" for of in known)),
        ("Matrix", _some(f"SHA-256 {of.matrix_sha256[:12]}" for of in known)),
        ("Harness", _some(f"{of.harness_version}, commit {(of.commit or 'unknown')[:18]}" for of in known)),
        ("Host", _some(f"{', '.join(of.hosts)}: {of.cpu}, {plural(of.cpu_count, 'core')}, {size(of.memory_bytes).text}"
                       for of in known)),
        ("GPUs", _some(_gpus(of) for of in known)),
        ("Backend, box", _some(f"{of.backend}, {', '.join(sorted({e.box for e in of.environments}))}" for of in known)),
        ("Environments", "; ".join(_environment(env.name, env.digest, env.pinned) for env in environments)),
    ]  # fmt: skip


def _environment(name: str, digest: str, pinned: bool) -> str:
    return one_line(f"{name} {digest[:19]}{'' if pinned else ' (UNPINNED)'}", 80)


def _gpus(of: Provenance) -> str:
    cards = Counter(f"{gpu.name}, {size(gpu.total_bytes).text}" for gpu in of.gpus)
    found = "; ".join(f"{amount} {TIMES} {name}" for name, amount in cards.items())
    return f"{found}, driver {of.driver}" if found else "none"


def _some(values: Iterable[str]) -> str:
    """The different values, the most frequent first, at most three of them."""
    known = Counter(values).most_common()
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return one_line("; ".join(value for value, _ in known[:3]), 300) + more


# ---------------------------------------------------------------- answers


def answers(rows: Sequence[Entry]) -> list[Answer]:
    """The few things that a reader of these cases asks first, per variant and GPU."""
    indexed = list(enumerate(rows))
    found: list[Answer | None] = []
    for variant, device in dict.fromkeys((row.subject, gpu_name(row.record)) for row in rows):
        mine = [(i, row) for i, row in indexed if (row.subject, gpu_name(row.record)) == (variant, device)]
        name = f"{variant} on {device}"
        found += [_fastest(mine, name), _longest(mine, name), _leanest(mine, name), _most_served(mine, name),
                  _widest(mine)]  # fmt: skip
    found.append(_chains(indexed))
    return [answer for answer in found if answer][:MAX_ANSWERS]


def _answer(question: str, value: str, because: str, of: tuple[int, Entry]) -> Answer:
    """An answer that one case gives, with the kind of its number."""
    return Answer(question, value, f"{because}; {number_label(of[1])}", f"#case-{of[0]}")


def _best(rows: Sequence[tuple[int, Entry]], value: Callable[[Entry], float | None]) -> tuple[int, Entry] | None:
    known = [(score, item) for item in rows if (score := value(item[1])) is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def _trained(rows: Sequence[tuple[int, Entry]]) -> list[tuple[int, Entry]]:
    return [(i, row) for i, row in rows if row.case.kind == "train" and row.train]


def _fastest(rows: Sequence[tuple[int, Entry]], name: str) -> Answer | None:
    best = _best(_trained(rows), lambda row: row.train.tokens_per_s if row.train else None)
    if best is None or best[1].train is None:
        return None
    train = best[1].train
    because = f"{_how(best[1])}; n = {plural(train.throughput_n, 'step')}"
    variation = train.step_time_s.coefficient_of_variation
    because += f", CV {digits(variation * 100)} %" if variation is not None else ""
    if best[1].case.devices > 1:
        because += f"; {digits(train.tokens_per_s_per_device or 0)} a device"
    return _answer(f"Fastest training, {name}", f"{digits(train.tokens_per_s or 0)} tokens/s", because, best)


def _longest(rows: Sequence[tuple[int, Entry]], name: str) -> Answer | None:
    trained = _trained(rows)
    if len({row.training.seq_len for _, row in trained if row.training}) < 2:
        return None
    best = _best(trained, lambda row: row.training.seq_len if row.training else None)
    if best is None or best[1].training is None:
        return None
    value = f"{best[1].training.seq_len:,} tokens"
    return _answer(f"Longest sample that trained, {name}", value, _how(best[1]), best)


def _leanest(rows: Sequence[tuple[int, Entry]], name: str) -> Answer | None:
    """The case with the smallest peak, where several methods were tried."""
    trained = _trained(rows)
    if len({row.training.method for _, row in trained if row.training}) < 2:
        return None
    best = _best(trained, lambda row: -_peak(row) if _peak(row) else None)
    if best is None or best[1].train is None:
        return None
    kind = _MEASURES.get(best[1].train.memory_measure or "", "resident")
    return _answer(f"Least memory, {name}", f"{size(_peak(best[1])).text} {kind}", _how(best[1]), best)


def _peak(row: Entry) -> int:
    peak = peak_row(row.train.memory, "peak_bytes") if row.train else None
    return (peak.peak_bytes or 0) if peak else 0


def _most_served(rows: Sequence[tuple[int, Entry]], name: str) -> Answer | None:
    served = [(i, row) for i, row in rows if row.case.kind == "serve" and row.serve and row.serve.load]
    best = _best(served, lambda row: row.serve.load.output_tokens_per_s if row.serve and row.serve.load else None)
    if best is None or best[1].serve is None or best[1].serve.load is None:
        return None
    load = best[1].serve.load
    because = (f"{load.concurrency} requests at once; TTFT p95 {ms(load.ttft.p95_s).text} ms, "
               f"TPOT p95 {ms(load.tpot.p95_s).text} ms; n = {plural(load.completed, 'request')}")  # fmt: skip
    return _answer(f"Most served, {name}", f"{digits(load.output_tokens_per_s or 0)} output tokens/s", because, best)


def _widest(rows: Sequence[tuple[int, Entry]]) -> Answer | None:
    best = _best(rows, lambda row: row.probe.bus_bytes_per_s if row.probe else None)
    if best is None or best[1].probe is None:
        return None
    probe = best[1].probe
    because = f"all-reduce of {size(probe.bus_size_bytes).text}, {full_label(best[1])}"
    return _answer(f"Widest between ranks, {best[1].subject}", f"{probes.bus(probe).text} GB/s bus", because, best)


def _chains(rows: Sequence[tuple[int, Entry]]) -> Answer | None:
    chains = [(i, row) for i, row in rows if row.case.kind == "chain" and row.record.status != "skipped"]
    if not chains:
        return None
    good = [row for _, row in chains if row.serve and row.serve.smoke and row.serve.smoke.ok]
    served = ", ".join(sorted({row.serving.adapter for row in good if row.serving}))
    because = f"trained, reloaded, served and smoke-tested: {one_line(served, 80)}" if good else "see their rows"
    value = f"{len(good)} of {plural(len(chains), 'chain')} passed"
    return Answer("Train to served model", value, because, f"#case-{chains[0][0]}")


def _how(row: Entry) -> str:
    case = row.training
    assert case is not None
    held = "" if row.cap_gib is None else f", {fits(row.cap_gib)}"
    return ", ".join(filter(None, (case.method, f"seq {case.seq_len:,}", place(case), options(case)))) + held


MAIN_MEASURES = ("training throughput", "peak allocated", "output throughput", "TTFT p50", "TPOT p50", "energy",
                 "bus bandwidth")  # fmt: skip
"""Measures whose ratios over all cases stand above the comparison."""


def changes(compared: Sequence[Compared]) -> list[Answer]:
    """What a later run did against the first: by the spread of the repeats, and each measure over all cases."""
    return [answer for one in compared for answer in (_judged(one), *_ratios(one))]


def _judged(one: Compared) -> Answer:
    readings = Counter(row.judgement for row in one.rows)
    failed = len({row.case_id for row in one.rows if row.judgement == NEWLY_FAILED})
    counted = {f"{plural(failed, 'case')} newly failed": failed, f"{readings['worse']} worse": readings["worse"],
               f"{readings['better']} better": readings["better"]}  # fmt: skip
    said = [words for words, amount in counted.items() if amount]
    judged = readings["within the spread"] or said
    rest = [f"{amount} {reading}" for reading, amount in readings.items() if reading not in ("better", "worse")]
    alone = f"{len(one.only_base)} only in {one.base}, {len(one.only_other)} only in {one.other}"
    because = one_line("; ".join([f"of {plural(len(one.rows), 'number')}", *rest, alone]), 300)
    value = ", ".join(said) or ("nothing changed" if judged else "no repeats to judge by")
    return Answer(one_line(f"{one.other} against {one.base}", 160), value, because, "#compared")


def _ratios(one: Compared) -> list[Answer]:
    """Each main measure's ratio, the median over the cases that both runs measured."""
    found = []
    for name in MAIN_MEASURES:
        rows = [row for row in one.rows if row.measure.name == name and row.ratio is not None]
        ratios = spread([row.ratio for row in rows if row.ratio is not None])
        if ratios.p50 is not None:
            better = "higher" if rows[0].measure.higher_is_better else "lower"
            because = (f"{TIMES} {ratios.min:.3f} to {TIMES} {ratios.max:.3f} over {plural(ratios.n, 'case')}; "
                       f"{better} is better")  # fmt: skip
            question = one_line(f"{name[0].upper()}{name[1:]}, {one.other} over {one.base}", 160)
            found.append(Answer(question, f"{TIMES} {ratios.p50:.3f}", because, "#compared"))
    return found


def differences(runs: Sequence[ReportRun]) -> list[tuple[str, tuple[str, ...]]]:
    """In what the runs differ besides their numbers: each fact with its value in every run."""
    facts = [dict(_provenance_facts([r.provenance for r in run.records if r.provenance])) for run in runs]
    libraries = [_libraries(run) for run in runs]
    found = []
    for of in (facts, libraries):
        for name in dict.fromkeys(name for one in of for name in one):
            values = tuple(one.get(name, MISSING) for one in of)
            if len(set(values)) > 1:
                found.append((name, values))
    return found


def _libraries(run: ReportRun) -> dict[str, str]:
    """Versions by environment and library; several where the records do not agree."""
    known: dict[str, set[str]] = {}
    for record in run.records:
        for env in record.provenance.environments if record.provenance else ():
            for name, version in env.libraries.items():
                known.setdefault(one_line(f"{env.name}: {name}", 80), set()).add(one_line(version, 40))
    return {name: ", ".join(sorted(versions)) for name, versions in known.items()}


# ---------------------------------------------------------------- failures and environments


def failures(rows: Sequence[Entry], compared: Sequence[Compared] = ()) -> dict[str, object]:
    """The planned cases that failed, the newly failed first, with verdict, next step and what their ladders came to.

    What a search found too large is its answer, and stands there.
    """
    new = {(one.other, row.case_id): one.base for one in compared for row in one.rows if row.judgement == NEWLY_FAILED}
    failed = [(new.get((row.run, without_repeat(row.case)), ""), i, row) for i, row in enumerate(rows)
              if row.record.status == "failed" and not row.record.parent and not is_answer(row.record)]  # fmt: skip
    failed.sort(key=lambda one: not one[0])
    shown = [_failure(*one) for one in failed[:MAX_FAILURES]]
    return {"n": len(failed), "shown": shown, "more": len(failed) - len(shown)}


def _failure(measured_in: str, index: int, row: Entry) -> dict[str, object]:
    diagnosis = row.record.last.diagnosis if row.record.last else None
    return {"index": index, "label": full_label(row), "summary": verdict(row)[1],
            "new": f"Newly failed: did not fail in {one_line(measured_in, 60)}." if measured_in else "",
            "class": one_line(diagnosis.failure_class, 80) if diagnosis else "undiagnosed",
            "next": one_line(diagnosis.next_step) if diagnosis else "",
            "ladder": conclusion(row.chain) if row.chain else ""}  # fmt: skip


def searches(rows: Sequence[Entry]) -> list[dict[str, object]]:
    """What each search found, with the case that is its answer."""
    found: dict[int, tuple[int, Entry]] = {}
    for index, row in enumerate(rows):
        if row.search and (id(row.search) not in found or _is_best(row)):
            found[id(row.search)] = (index, row)
    return [{"index": index, "axis": row.search.axis, "label": full_label(row), "answer": answer(row.search)}
            for index, row in found.values() if row.search]  # fmt: skip


def cards(rows: Sequence[Entry]) -> dict[str, object]:
    """What fits which card, a row per set-up of several cards or a want of memory; the others say nothing of size."""
    known = what_fits((index, row.record) for index, row in enumerate(rows))
    found = {name: of for name, of in known.items() if len(of) > 1 or tells_of_size(of)}
    sizes = sorted({card for of in found.values() for card in of})
    body = [{"name": name, "cells": [_fit_words(of.get(size)) for size in sizes]} for name, of in found.items()]
    return {"head": [f"as {size.name}" if size.capped else size.name for size in sizes], "rows": body}


def _fit_words(fit: Fit[int] | None) -> list[tuple[str, str]]:
    """Words with the address of the case that they are about."""
    if fit is None:
        return []
    parts = ((fit.fits, "fits"), (fit.fails, "does not"), (fit.otherwise, "failed otherwise"))
    return [(f"{found[0]:,} {words}", f"#case-{found[1]}") for found, words in parts if found]


def _is_best(row: Entry) -> bool:
    best = row.search.fits if row.search else None
    return best is not None and best.case_id == row.record.case_id


def environments(runs: Sequence[ReportRun]) -> list[tuple[Cell, ...]]:
    """A row for each environment that any record names."""
    known = {(env.name, env.box, env.digest): env for run in runs for record in run.records if record.provenance
             for env in record.provenance.environments}  # fmt: skip
    return [environment_row(env) for env in known.values()]
