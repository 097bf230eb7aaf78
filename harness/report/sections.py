"""One record as sections of text, tables and figures: what a row opens to on the page, and what `show` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.report import case_figures
from harness.report.entry import Entry, number_label, peak_row
from harness.report.gpus import gpu_sections
from harness.report.ladders import ladder_sections, search_sections, timeline_section
from harness.report.parts import Link, Section, facts_section, no_link, plain_json, table_section, when, word, words
from harness.report.probes import probe_sections
from harness.report.sampled import sampled_sections
from harness.report.tables import mfu
from harness.report.words import (
    MISSING,
    TIMES,
    Cell,
    clean,
    clean_end,
    count,
    duration,
    gib,
    missing,
    ms,
    number,
    one_line,
    percent,
    size,
)
from harness.schema import Attempt, ChainCase, Environment, JobRun, Latency, Provenance, RankObservation
from harness.summary import ServeSummary, Spread, TrainSummary


def sections(entry: Entry, link: Link = no_link) -> list[Section]:
    """All that is known of one record, what a reader wants first in front."""
    record, attempt = entry.record, entry.record.last
    found: list[Section | None] = [_skip(entry), *search_sections(entry.search)]
    if record.status != "failed":
        found += ladder_sections(record, entry.chain, link)
    if attempt is not None:
        found += [*_failure(entry, attempt, link), *probe_sections(entry, attempt), _training_results(entry),
                  _serving_results(entry), _latencies(entry), *_figures(entry, attempt), _memory_table(entry),
                  _ranks(entry, attempt), *_gpus(entry, attempt), _proof(attempt),
                  _phases(entry, attempt), _smoke(attempt), _server(attempt)]  # fmt: skip
    found += [_case(entry)]
    found += [_provenance(record.provenance), _environments(record.provenance.environments)] if record.provenance \
        else []  # fmt: skip
    if attempt is not None:
        found += [*sampled_sections(attempt.observation.gpus), _attempts(record.attempts, link), *_said(attempt)]
    return [section for section in found if section is not None]


# ---------------------------------------------------------------- how it ended


def _skip(entry: Entry) -> Section | None:
    if entry.record.status != "skipped":
        return None
    facts = [("Reason", word(entry.record.skip_reason or "")), ("Rule", word(entry.record.skip_rule or ""))]
    return facts_section("Why it was skipped", facts, open=True)


def _failure(entry: Entry, attempt: Attempt, link: Link) -> list[Section | None]:
    diagnosis = attempt.diagnosis
    if diagnosis is None:
        return []
    culprit = diagnosis.culprit
    where = [f"{name} {value}" for name in ("rank", "host", "gpu") if culprit and
             (value := getattr(culprit, name)) is not None]  # fmt: skip
    facts = [
        ("What failed", word(diagnosis.summary)),
        ("Class", word(f"{diagnosis.failure_class} ({diagnosis.class_status})")),
        ("Phase", word(diagnosis.phase or MISSING)),
        ("Where it began", word(f"{', '.join(where)} ({diagnosis.culprit_status})") if where else missing("unknown")),
        ("Cause", word(diagnosis.cause_status, "how sure the diagnosis is of the cause")),
        *([("What reruns showed", word(diagnosis.showed))] if diagnosis.showed else []),
        ("Next step", word(diagnosis.next_step or MISSING)),
    ]
    quotes = [
        (word(quote.role), word(quote.text), _where(quote.file, quote.line, link)) for quote in diagnosis.evidence
    ]
    tail = None
    if attempt.log_tail:
        tail = Section("End of the log", text=clean_end(attempt.log_tail), open=True, from_end=True)
    return [facts_section("Diagnosis", facts, open=True),
            table_section("Evidence", ("role", "says", "file:line"), quotes, open=True),
            timeline_section(attempt, link), *ladder_sections(entry.record, entry.chain, link), tail]  # fmt: skip


def _where(file: str, line: int, link: Link) -> Cell:
    return Cell(one_line(f"{file}:{line}", 160), "", None, link(f"jobs/{file}"))


# ---------------------------------------------------------------- numbers


def _spread(of: Spread, show: Callable[[float | None], Cell]) -> Cell:
    if not of.n:
        return missing("not measured: no steady step")
    p50, p95, low, high = (show(value).text for value in (of.p50, of.p95, of.min, of.max))
    return Cell(f"{p50} median, {p95} p95, {low} to {high}, n = {of.n}")


def _training_results(entry: Entry) -> Section | None:
    train = entry.train
    if train is None:
        return None
    n = f"n = {train.throughput_n} steady steps, {train.warmup_steps} of warm-up left out"
    facts = [
        ("Tokens/s", number(train.tokens_per_s)._replace(why=n)),
        ("Tokens/s per device", number(train.tokens_per_s_per_device)._replace(why=n)),
        ("Padded tokens/s", number(train.padded_tokens_per_s)._replace(why=n)),
        ("Step time", _spread(train.step_time_s, duration)),
        ("Step time CV", percent(train.step_time_s.coefficient_of_variation, "not measured: needs two steps")),
        ("Behind these", Cell(n)),
        ("Model FLOPs utilisation (MFU)", mfu(train)),
        ("Slowest rank", _slowest(train)),
        ("Memory, largest over smallest rank", number(train.memory_imbalance, "needs two ranks")),
        ("Waiting for data", percent(train.data_wait_share)),
        ("First step", duration(train.first_step_s)),
        ("Time to the first step's end", duration(train.time_to_first_step_s)),
        ("Loss, first to last step", Cell(f"{number(train.loss_first).text} → {number(train.loss_last).text}")),
        ("Evaluation loss", number(train.eval_loss)),
        ("Checkpoint", size(train.checkpoint_bytes)),
        ("Merge", duration(train.merge_s, "nothing was merged")),
        ("Merge peak memory", size(train.merge_peak_rss_bytes, "nothing was merged")),
    ]
    return facts_section(f"Training results ({number_label(entry)})", [*facts, *_reload(entry)], open=True)


def _slowest(train: TrainSummary) -> Cell:
    if train.slowest_rank_ratio is None:
        return missing("needs two ranks")
    return Cell(
        f"rank {train.slowest_rank}, {train.slowest_rank_ratio:.2f} {TIMES} the median before its first collective"
    )


def _reload(entry: Entry) -> list[tuple[str, Cell]]:
    attempt = entry.record.last
    seen = attempt.observation.train if attempt else None
    if seen is None or seen.reload_ok is None:
        return [("Reload check", missing())]
    difference = number(seen.reload_max_abs_logit_difference).text
    word = "passed" if seen.reload_ok else "FAILED"
    return [("Reload check", Cell(f"{word}, largest logit difference {difference}"))]


def _serving_results(entry: Entry) -> Section | None:
    serve = entry.serve
    if serve is None:
        return None
    facts = [
        ("Ready after", duration(serve.ready_s)),
        ("Weights, as the server states", size(serve.weights_bytes, "the server does not state it on this device")),
        ("KV cache, as the server states", size(serve.kv_cache_bytes)),
        ("KV cache tokens", count(serve.kv_cache_tokens)),
        ("Server peak resident memory", size(serve.peak_rss_bytes)),
        *_load_facts(serve),
    ]
    return facts_section(f"Serving results ({number_label(entry)})", facts, open=True)


def _load_facts(serve: ServeSummary) -> list[tuple[str, Cell]]:
    load = serve.load
    if load is None:
        return [("Load", missing())]
    return [
        ("Load", Cell(f"{load.concurrency} at once, {load.input_len} tokens in, {load.output_len} out")),
        ("Requests", Cell(f"{load.completed} completed, {load.failed} failed, of {load.requests}")),
        ("Output tokens/s", number(load.output_tokens_per_s)),
        ("Output tokens/s per device", number(serve.output_tokens_per_s_per_device)),
        ("Tokens/s in and out", number(load.total_tokens_per_s)),
        ("Requests/s", number(load.requests_per_s)),
        ("Measured for", duration(load.duration_s)),
    ]


def _latencies(entry: Entry) -> Section | None:
    load = entry.serve.load if entry.serve else None
    if load is None:
        return None

    def row(name: str, of: Latency) -> tuple[Cell, ...]:
        return (Cell(name), ms(of.mean_s), ms(of.p50_s), ms(of.p95_s), ms(of.p99_s), Cell(str(load.completed)))

    rows = [row("Time to first token", load.ttft), row("Time per output token", load.tpot),
            row("Inter-token latency", load.itl)]  # fmt: skip
    return table_section("Latency, ms", ("", "mean", "p50", "p95", "p99", "n requests"), rows, open=True)


def _figures(entry: Entry, attempt: Attempt) -> list[Section | None]:
    train, ranks = entry.summary.train if entry.summary else None, attempt.observation.ranks
    if train is None:
        return []
    drawn = [
        ("Step time over steps", None if train.no_speed else case_figures.case_steps(ranks, train.warmup_steps), True),
        ("Loss over steps", case_figures.case_loss(ranks, train.warmup_steps), False),
        ("Memory by phase and rank", case_figures.case_memory(train), False),
    ]
    return [Section(title, figure=one.figure, note=one.note, open=shown) for title, one, shown in drawn if one]


def _memory_table(entry: Entry) -> Section | None:
    train = entry.summary.train if entry.summary else None
    rows = [(Cell(str(row.rank)), Cell(words(row.phase)), gib(row.allocated_bytes, "a CPU has none"),
             gib(row.reserved_bytes, "a CPU has none"), gib(row.device_used_bytes, "a CPU has none"),
             gib(row.rss_growth_bytes), gib(row.rss_bytes)) for row in (train.memory if train else ())]  # fmt: skip
    head = ("rank", "phase", "allocated", "reserved", "device used", "RSS growth", "RSS")
    return table_section("Memory peaks, GiB", head, rows)


def _ranks(entry: Entry, attempt: Attempt) -> Section | None:
    train = entry.summary.train if entry.summary else None
    rows = [_rank_row(rank, train) for rank in attempt.observation.ranks]
    head = ("rank", "host", "pid", "device", "steps", "before collective", "peak", "last phase", "ended")
    return table_section("Ranks", head, rows)


def _rank_row(rank: RankObservation, train: TrainSummary | None) -> tuple[Cell, ...]:
    peak = peak_row([row for row in train.memory if row.rank == rank.rank], "peak_bytes") if train else None
    before = train.before_collective_s.get(rank.rank) if train else None
    measure = (train.memory_measure or "").replace("_", " ") if train else ""
    return (
        Cell(str(rank.rank)), word(rank.host or MISSING), word(rank.pid or MISSING),
        word(rank.device_name or MISSING), count(len(rank.steps.step)), duration(before),
        size(peak.peak_bytes)._replace(why=f"{measure}, phase {peak.phase}") if peak else missing(),
        word(rank.last_phase or MISSING), Cell("yes" if rank.ended else "no"),
    )  # fmt: skip


def _gpus(entry: Entry, attempt: Attempt) -> list[Section | None]:
    halves = [half.gpu for half in (entry.train, entry.serve) if half and half.gpu]
    return gpu_sections(halves, attempt.observation.gpus, attempt.observation.nccl)


# ---------------------------------------------------------------- what ran


def _proof(attempt: Attempt) -> Section | None:
    """What was set as used, of a training job or a probe."""
    seen = attempt.observation.train or attempt.observation.probe
    if seen is None or not seen.proof:
        return None
    wrong = [("Differs from what was asked", word(text)) for text in seen.proof_mismatches]
    facts = [(words(key), word(plain_json(value))) for key, value in seen.proof.items()]
    note = "Differs from what was asked." if wrong else "What ran is what was asked."
    return facts_section("Proof of what ran", [*wrong, *facts], note=note)


def _phases(entry: Entry, attempt: Attempt) -> Section | None:
    """How long each took; not of a capped case, which says nothing of speed."""
    seen = attempt.observation.train if entry.cap_gib is None else None
    rows = [(word(name), duration(value)) for name, value in (seen.phases_s if seen else {}).items()]
    return table_section("Phases", ("phase", "took"), rows)


def _smoke(attempt: Attempt) -> Section | None:
    smoke = attempt.observation.serve.smoke if attempt.observation.serve else None
    if smoke is None:
        return None
    checks = [(words(name), Cell("yes" if right else "NO")) for name, right in smoke.checks.items()]
    facts = [("passed", Cell("yes" if smoke.ok else "NO")), *checks, ("latency", duration(smoke.latency_s)),
             ("generated tokens", count(smoke.generated_tokens)), ("answer", word(smoke.text))]  # fmt: skip
    return facts_section("Smoke request", facts)


def _server(attempt: Attempt) -> Section | None:
    serve = attempt.observation.serve
    return facts_section("The server", [(one_line(key, 80), word(plain_json(value))) for key, value in
                                 (serve.facts if serve else {}).items()])  # fmt: skip


def _case(entry: Entry) -> Section | None:
    case = entry.case
    halves = [("train ", case.train), ("serve ", case.serve)] if isinstance(case, ChainCase) else [("", case)]
    facts = [(f"{half}{name}", word(plain_json(value))) for half, of in halves
             for name, value in of.model_dump(mode="json").items()]  # fmt: skip
    more = [("made from", word(entry.record.parent))] if entry.record.parent else []
    return facts_section("The case", [("id", word(entry.record.case_id)), *more, *facts])


# ---------------------------------------------------------------- where it comes from


def _provenance(of: Provenance | None) -> Section | None:
    if of is None:
        return None
    cards = [f"{gpu.index}: {gpu.name}, {size(gpu.total_bytes).text}, {gpu.uuid}" for gpu in of.gpus]
    facts = [
        ("Numbers are", word(of.number_kind)), ("Weights", word(of.weights)),
        ("harness", word(of.harness_version)), ("Commit", word(of.commit) if of.commit else missing("unknown")),
        ("Payload SHA-256", word(of.payload_sha256)), ("Matrix SHA-256", word(of.matrix_sha256)),
        ("Backend", word(of.backend)), ("Hosts", word(", ".join(of.hosts))),
        ("CPU", word(f"{of.cpu}, {of.cpu_count} cores")), ("Memory", size(of.memory_bytes)),
        ("GPUs", word("; ".join(cards) or "none")), ("Driver", word(of.driver) if of.driver else missing("no GPU")),
    ]  # fmt: skip
    return facts_section("Provenance", facts)


def environment_row(of: Environment) -> tuple[Cell, ...]:
    """An environment in a table: name, box, pinned, digest, Python, libraries."""
    digest = one_line(of.digest, 80)
    libraries = ", ".join(f"{name} {version}" for name, version in of.libraries.items())
    return (word(of.name), word(of.box), Cell("pinned" if of.pinned else "UNPINNED"), Cell(digest[:19], digest),
            word(of.python), word(libraries))  # fmt: skip


_ENDINGS = ("timed_out", "stalled", "host_oom_killed", "interrupted", "lost", "node_failed", "preempted", "cancelled")
ENVIRONMENT_HEAD = ("environment", "box", "pinned", "digest", "Python", "libraries")


def _environments(found: Sequence[Environment]) -> Section | None:
    return table_section("Environments", ENVIRONMENT_HEAD, [environment_row(of) for of in found])


def _job_row(attempt: Attempt, job: JobRun, link: Link) -> tuple[Cell, ...]:
    out = job.outcome
    how = [f"signal {out.signal}" if out.signal is not None else f"exit code {out.exit_code}"]
    how += [words(name) for name in _ENDINGS if getattr(out, name)] + ([out.detail] if out.detail else [])
    came_to = attempt.diagnosis.failure_class if attempt.diagnosis else "measured"
    return (Cell(str(attempt.number)), Cell(one_line(job.dir, 120), "", None, link(job.dir)), word(", ".join(how)),
            Cell(when(out.start)), duration(out.end - out.start), word(came_to))  # fmt: skip


def _attempts(attempts: Sequence[Attempt], link: Link) -> Section | None:
    rows = [_job_row(attempt, job, link) for attempt in attempts for job in attempt.jobs]
    return table_section("Attempts", ("attempt", "folder", "ended with", "began", "took", "came to"), rows)


def _said(attempt: Attempt) -> list[Section | None]:
    """What the payload said in words, and what could not be read of it."""
    seen = attempt.observation
    errors = "\n\n".join(_error_text(error) for error in seen.errors)
    parts = [("Errors the payload reported", errors), ("Notes", "\n".join(seen.notes)),
             ("Unreadable in the run files", "\n".join(seen.problems))]  # fmt: skip
    libraries = facts_section("Libraries as the payload found them", [(one_line(k, 60), word(v)) for k, v in
                                                              seen.libraries.items()])  # fmt: skip
    return [*(Section(title, text=clean(text)) for title, text in parts if text), libraries]


def _error_text(error: dict[str, Any]) -> str:
    head = f"rank {error.get('rank')}, phase {error.get('phase')}: {error.get('type')}: {error.get('message')}"
    return f"{head}\n{error.get('traceback') or ''}".rstrip()
