"""Records of a run with a ladder and a search. Every number is invented."""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness import frontier
from harness.schema import (
    Attempt,
    Change,
    Diagnosis,
    Evidence,
    JobRun,
    LadderEnd,
    Observation,
    Outcome,
    PassedOver,
    RankObservation,
    Record,
    Rung,
    Steps,
    TrainCase,
    case_id,
)

from .records import measured_train, train_case
from .script import BEGAN


def failed_in_time(case: TrainCase, failure: str = "oom_gpu_backward") -> Record:
    """Rank 1 runs out of memory in its third step; rank 0 loses its peer a second later."""
    name = f"{case_id(case)}.1"
    errors = [
        {"rank": 1, "t": BEGAN + 20.0, "phase": "train", "type": "OutOfMemoryError", "line": 7,
         "message": "CUDA out of memory. Tried to allocate 4.00 GiB", "file": f"{name}/events.rank1.jsonl"},
        {"rank": 0, "t": BEGAN + 21.0, "phase": "train", "type": "RuntimeError", "line": 8,
         "message": "Connection closed by peer", "file": f"{name}/events.rank0.jsonl"},
    ]  # fmt: skip
    ranks = tuple(
        RankObservation(rank=rank, steps=Steps(step=(1, 2), start=(BEGAN + 10, BEGAN + 15), step_time_s=(5.0, 4.0),
                        data_wait_s=(None, None), before_collective_s=(None, None), tokens=(8, 8),
                        padded_tokens=(8, 8), loss=(2.0, 1.0), grad_norm=(1.0, 1.0)))
        for rank in (0, 1)
    )  # fmt: skip
    roles = ("initiating", "cascade")
    evidence = tuple(
        Evidence(file=str(error["file"]), line=int(str(error["line"])), text=str(error["message"]), role=role)
        for error, role in zip(errors, roles, strict=True)
    )
    diagnosis = Diagnosis(failure_class=failure, phase="train", summary="Memory ran out.", evidence=evidence)
    job = JobRun(job_id=case_id(case), environment="train", dir=f"jobs/{name}",
                 outcome=Outcome(exit_code=1, start=BEGAN, end=BEGAN + 25))  # fmt: skip
    seen = Observation(ranks=ranks, errors=tuple(errors))
    attempt = Attempt(number=1, jobs=(job,), observation=seen, diagnosis=diagnosis)
    return Record(case_id=case_id(case), case=case, status="failed", attempts=(attempt,), finished_at=BEGAN + 25)


def climbed() -> list[Record]:
    """A case that failed twice and fitted with half the length and half the micro batch."""
    asked = train_case(seq_len=512, micro_batch=4, devices=2, strategy="ddp", seed=77)
    shorter = asked.model_copy(update={"seq_len": 256})
    smaller = shorter.model_copy(update={"micro_batch": 2, "grad_accum": 2})
    first = failed_in_time(asked)
    rungs = [
        Rung(ladder="oom", name="seq_len", code="O1", change=(Change(field="seq_len", before=512, after=256),),
             why="it grows with length", cost="samples are cut", keeps_effective_batch=True),
        Rung(ladder="oom", name="micro_batch", code="O2+O3", why="it grows with the batch", cost="more passes",
             change=(Change(field="micro_batch", before=4, after=2), Change(field="grad_accum", before=1, after=2)),
             keeps_effective_batch=True, passed_over=(PassedOver(rung="seq_len", why="climbed often enough"),)),
    ]  # fmt: skip
    second = failed_in_time(shorter).model_copy(update={"parent": first.case_id, "rung": rungs[0]})
    with tempfile.TemporaryDirectory() as folder:
        third = measured_train(smaller, Path(folder), 3)
    end = LadderEnd(ladder="oom", reason="it ran with micro_batch")
    return [first, second, third.model_copy(update={"parent": second.case_id, "rung": rungs[1], "ladder_end": end})]


def searched() -> list[Record]:
    """A search over four lengths: the second fits, the third does not."""
    found = []
    for length in (64, 128, 192, 256):
        case = train_case(seq_len=length, seed=78)
        if length == 128:
            with tempfile.TemporaryDirectory() as folder:
                record = measured_train(case, Path(folder), 4)
        elif length == 192:
            record = failed_in_time(case, "oom_host")
        else:
            rule = frontier.BELOW if length < 128 else frontier.ABOVE
            record = Record(case_id=case_id(case), case=case, status="skipped", skip_rule=rule,
                            skip_reason="Not measured: see the search.", finished_at=BEGAN)  # fmt: skip
        found.append(record.model_copy(update={"frontier": "seq_len"}))
    return found
