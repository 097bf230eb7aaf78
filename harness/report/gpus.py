"""What the sampler and NCCL's log said of a job's GPUs, as sections of a record's detail."""

from __future__ import annotations

from collections.abc import Sequence

from harness.report.parts import Section, facts_section, plain_json, table_section, word, words
from harness.report.words import Cell, digits, duration, gib, missing, number, one_line, percent
from harness.schema import GpuSeries, NcclFacts
from harness.summary.energy import GpuSummary

HEAD = ("role", "GPU", "name", "peak GiB", "power W", "peak W", "SM MHz", "least MHz", "in use", "hottest °C",
        "held back")  # fmt: skip


def gpu_sections(
    halves: Sequence[GpuSummary], series: Sequence[GpuSeries], nccl: NcclFacts | None
) -> list[Section | None]:
    """Energy and power over the measured time, a row per GPU, and how NCCL connected the ranks."""
    return [*map(_together, halves), table_section("GPUs as sampled", HEAD, [_row(one) for one in series]), _nccl(nccl)]


def _together(part: GpuSummary) -> Section | None:
    source = {"counter": "the GPUs' own counters", "power": "sampled power", "both": "counters and sampled power"}
    why = source.get(part.energy_from or "", "not every GPU stated its part")
    return facts_section(
        "GPU energy and power over the measured time",
        [
            ("GPUs", word(part.gpus)),
            ("Energy, J", number(part.energy_j, why)._replace(why=why)),
            ("Joules per token", number(part.joules_per_token, why)._replace(why=why)),
            ("Mean power of all, W", number(part.power_mean_w)),
            ("Peak power of one, W", number(part.power_max_w)),
            ("Kernel running", percent(part.utilisation_mean)),
            ("Peak memory of one, GiB", gib(part.memory_max_bytes)),
            ("Hottest, °C", number(part.temperature_max_c)),
            ("Held back", _throttle(part.throttle)),
            ("Measured for", duration(part.duration_s)),
        ],
    )


def _row(one: GpuSeries) -> tuple[Cell, ...]:
    steady = one.steady
    return (
        word(one.role), word(f"{one.node}:{one.ordinal}", one_line(one.uuid or "")), word(one.name or ""),
        gib(one.memory_max_bytes), number(steady.power_mean_w if steady else None),
        number(steady.power_max_w if steady else None), number(steady.sm_clock_mean_mhz if steady else None),
        number(steady.sm_clock_min_mhz if steady else None), percent(steady.utilisation_mean if steady else None),
        number(one.temperature_max_c), _throttle(one.throttle),
    )  # fmt: skip


def _throttle(shares: dict[str, float]) -> Cell:
    """Why GPUs were held back, and for which share of the samples."""
    reasons = [f"{words(name)} {digits(share * 100)} %" for name, share in shares.items() if share > 0]
    return word(", ".join(reasons)) if reasons else missing("no sample says that it was held back")


def _nccl(facts: NcclFacts | None) -> Section | None:
    if facts is None:
        return None
    shown = {name: value for name, value in facts.model_dump(mode="json").items() if value not in (None, [], {})}
    elsewhere = ("links", "warnings", "choices")
    rows = [(words(name), word(plain_json(value))) for name, value in shown.items() if name not in elsewhere]
    return facts_section("How NCCL connected the ranks", rows)
