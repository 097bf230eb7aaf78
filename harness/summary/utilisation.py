"""How much of a GPU's peak a training job used: model FLOPs per token, times tokens per second, over the peak."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness import catalog
from harness.schema import Frozen, RankObservation, TrainCase, TrainObservation
from harness.summary import flops


class Utilisation(Frozen):
    """Model FLOPs utilisation (MFU) of one training job, and what it is made of."""

    model_flops_per_token: float
    """What the training method needs, without recomputation: the numerator."""
    hardware_flops_per_token: float
    """With what checkpointing and the fused head compute again."""
    mean_tokens: int
    """Real tokens per sample that these hold for; where samples differ, attention has a little more to do."""
    mfu: float | None = None
    peak_flops_per_s: float | None = None
    """Dense bf16 peak of one GPU, by its data sheet."""
    gpu: str | None = None
    """Its name in the catalog."""
    why_not: str = ""
    """Why there is no `mfu` where there is none."""


def utilisation(
    case: TrainCase, ranks: Sequence[RankObservation], seen: TrainObservation, tokens_per_s_per_device: float | None
) -> Utilisation | None:
    """The MFU of `case` at that throughput; `None` for a variant that the catalog does not know."""
    known = catalog.variants().get(case.variant)
    if known is None:
        return None
    length = _mean_tokens(case, ranks)
    fused = seen.proof.get("loss_path") == "trl_fused_head"
    work = flops.training_flops(known.config, case, length, fused_head=fused)
    peak, why_not = _peak(case, ranks)
    used = None
    if peak and tokens_per_s_per_device is not None:
        used = work.model_flops_per_token * tokens_per_s_per_device / peak.bf16_flops
    return Utilisation(
        model_flops_per_token=work.model_flops_per_token,
        hardware_flops_per_token=work.hardware_flops_per_token,
        mean_tokens=length,
        mfu=used if used is not None and math.isfinite(used) else None,
        peak_flops_per_s=peak.bf16_flops if peak else None,
        gpu=peak.name if peak else None,
        why_not=why_not or ("" if used is not None else "not measured: there is no throughput"),
    )


def _mean_tokens(case: TrainCase, ranks: Sequence[RankObservation]) -> int:
    """Real tokens per sample over all steps and ranks; the case's length where no step states any."""
    counted = [tokens for rank in ranks for tokens in rank.steps.tokens if tokens is not None]
    samples = len(counted) * case.micro_batch * case.grad_accum
    return max(1, round(sum(counted) / samples)) if counted else case.seq_len


def _peak(case: TrainCase, ranks: Sequence[RankObservation]) -> tuple[catalog.GpuFacts | None, str]:
    """What the one type of GPU that all ranks ran on can do, or why that is not known."""
    if case.device == "cpu":
        return None, "a CPU has no peak in the catalog"
    names = sorted({rank.device_name or "unnamed" for rank in ranks})
    found = {facts.name: facts for name in names if (facts := catalog.gpu(name))}
    if len(names) != 1 or not found:
        return None, f"the catalog knows no one peak for {', '.join(names) or 'no rank'}"
    return next(iter(found.values())), ""
