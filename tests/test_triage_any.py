"""Logs of any origin: the class of what began it, who, evidence that stands in the log, and a next step.

The log lines here are of our own wording around what a library prints.
"""

from __future__ import annotations

import bz2
import gzip
import html
import io
import lzma
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from fakes.logs import OOM, WAITED, of
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from ruamel.yaml import YAML

from harness.errors import HarnessError
from harness.report import triage as views
from harness.scrub import plain
from harness.triage import as_json, triage
from harness.triage.signature import kinds, signatures

Cases = dict[str, list[dict[str, Any]]]
ANY: Cases = YAML(typ="safe").load(Path(__file__).parent / "signatures" / "any.yaml")
FURTHER: list[Cases] = [
    YAML(typ="safe").load(Path(__file__).parent / "signatures" / f"{name}.yaml")
    for name in ("hosts", "devices", "setup", "excerpts")
]
CASES = [
    (name, index, case)
    for name in ANY
    for index, case in enumerate([*ANY[name], *(case for cases in FURTHER for case in cases.get(name, []))])
]


@pytest.mark.parametrize(("name", "index", "case"), CASES, ids=[f"{name}-{index}" for name, index, _ in CASES])
def test_a_log_of_each_class(tmp_path: Path, name: str, index: int, case: dict[str, Any]) -> None:
    found = of(tmp_path, log=case["log"])
    assert found.failure_class == name, found.evidence
    assert found.next.step
    assert as_json(found)["class"] == name
    for line in found.evidence:
        assert line.text in case["log"].split("\n")[line.line - 1]
    if name not in ("unknown", "coll_timeout"):
        assert found.evidence
    if "rank" in case:
        assert found.culprit
        assert found.culprit.rank == case["rank"]
    if "host" in case:
        assert found.culprit
        assert found.culprit.host == case["host"]
    if name in ("no_failure", "unknown"):
        assert found.culprit is None


def test_every_class_of_the_taxonomy_has_a_log() -> None:
    assert set(ANY) == set(kinds())
    assert all(set(cases) <= set(ANY) for cases in FURTHER)
    assert {signature.failure_class for signature in signatures()} - set(kinds()) <= {"not_as_requested"}


# ---------------------------------------------------------------- places: errors that no text names


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("vllm/model_executor/layers/quantization/awq.py", "quant_setup"),
        ("peft/mapping.py", "peft_config"),
        ("vllm/lora/worker_manager.py", "peft_config"),
        ("vllm/config/parallel.py", "parallel_config"),
        ("vllm/model_executor/model_loader/weight_utils.py", "ckpt_load_mismatch"),
        ("vllm/config/model.py", "model_unsupported"),
        ("torch/distributed/fsdp/_runtime_utils.py", "shard_dtype"),
        ("datasets/arrow_dataset.py", "data_format"),
        ("huggingface_hub/file_download.py", "hub_access"),
        ("transformers/utils/import_utils.py", "dep_missing_abi"),
        ("torch/cuda/__init__.py", "driver_runtime"),
        ("torch/distributed/elastic/rendezvous/dynamic_rendezvous.py", "rdzv_timeout"),
        ("transformers/utils/quantization_config.py", "quant_setup"),
        ("transformers/utils/loading_report.py", "ckpt_load_mismatch"),
        ("transformers/tokenization_utils_base.py", "data_format"),
        ("megatron/core/dist_checkpointing/mapping.py", "ckpt_load_mismatch"),
        ("megatron/training/arguments.py", "parallel_config"),
        ("llamafactory/data/aligner.py", "data_format"),
        ("botocore/auth.py", "hub_access"),
        ("my/own/train.py", "app_exception"),
        ("my/own/data/train.py", "app_exception"),
    ],
)
def test_an_unknown_error_is_of_the_library_that_raised_it(tmp_path: Path, place: str, name: str) -> None:
    frames = "".join(f'  File "{file}", line 7, in do\n    do()\n' for file in ("/a/train.py", f"/x/{place}"))
    assert of(tmp_path, log=f"Traceback (most recent call last):\n{frames}ValueError: odd").failure_class == name


# ---------------------------------------------------------------- what is told apart


def test_one_ranks_memory_and_the_others_timeout(tmp_path: Path) -> None:
    found = of(tmp_path, **{"rank_0.log": WAITED.format(rank=0), "rank_1.log": f"[rank1]: {OOM.format(gpu=1)}"})
    assert found.failure_class == "oom_gpu_forward"
    assert found.culprit
    assert (found.culprit.rank, found.culprit.gpu) == (1, "1")
    assert {event.role for event in found.timeline} == {"initiating", "cascade"}


def test_what_all_ranks_say_has_no_culprit(tmp_path: Path) -> None:
    log = "\n".join(f"[rank{rank}]: KeyError: 'odd'" for rank in range(4))
    found = of(tmp_path, log=log)
    assert (found.failure_class, found.culprit, found.culprit_status) == ("app_exception", None, "unknown")


def test_the_last_attempt_is_judged_and_the_earlier_is_listed(tmp_path: Path) -> None:
    again = "[default] Worker group FAILED. 2/3 attempts left; will restart worker group"
    log = f"{OOM.format(gpu=0)}\n{again}\nOSError: [Errno 28] No space left on device"
    found = of(tmp_path, log=log)
    assert (found.failure_class, found.attempts, found.earlier) == ("storage_full", 2, ("oom_gpu_forward",))
    fine = of(tmp_path, log=f"{log}\nwill restart worker group\n{{'train_runtime': 3.0}}")
    assert (fine.failure_class, fine.attempts) == ("no_failure", 3)


def test_silence_is_evidence(tmp_path: Path) -> None:
    steps = [
        f"{rank}: RANK {rank}: step {step}/10" for step in (1, 2, 3) for rank in range(6) if (rank, step) != (4, 3)
    ]
    found = of(
        tmp_path,
        log="\n".join(
            [
                *steps,
                "2: slurmstepd: error: *** STEP 7.1 ON n1 CANCELLED AT 2026-03-01T10:00:00 ***",
                "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-03-01T10:00:00 DUE TO TIME LIMIT ***",
            ]
        ),
    )
    assert found.failure_class == "coll_timeout"
    assert found.class_status == "hypothesis"
    assert found.culprit
    assert found.culprit.rank == 4


def test_numbers_of_the_log_stand_in_the_next_step(tmp_path: Path) -> None:
    log = (
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (9.3 GiB). Based on the available memory, the "
        "estimated maximum model length is 76256."
    )
    assert "131072 -> 76256" in of(tmp_path, log=log).next.step
    log = 'python train.py --max_seq_length 8192\n[rank0]:   File "/x/m.py", line 1, in forward\n' + OOM.format(gpu=0)
    assert "8192 -> 4096" in of(tmp_path, log=log).next.step
    log = f"{OOM.format(gpu=0)} Process 4711 has 6.50 GiB memory in use. this process has 1.00 GiB memory in use"
    assert "process 4711 holds 6.5 GiB" in of(tmp_path, log=log).next.step


# ---------------------------------------------------------------- whatever is given


def test_compressed_logs_and_archives(tmp_path: Path) -> None:
    text = f"[rank1]: {OOM.format(gpu=1)}\n".encode()
    for name, packed in (
        ("a.log.gz", gzip.compress(text)),
        ("b.xz", lzma.compress(text)),
        ("c.bz2", bz2.compress(text)),
    ):
        (tmp_path / name).write_bytes(packed)
        found = triage([tmp_path / name])
        assert (found.failure_class, found.evidence[0].file) == ("oom_gpu_forward", name)
    (tmp_path / "torn.gz").write_bytes(gzip.compress(text * 9)[:-4])
    assert triage([tmp_path / "torn.gz"]).failure_class == "oom_gpu_forward"
    archive = tmp_path / "logs.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("attempt_0/1/stderr.log")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    found = triage([archive])
    assert found.evidence[0].file == "logs.tar.gz/attempt_0/1/stderr.log"
    assert found.culprit
    assert found.culprit.rank == 1


def dump(*sizes: int, name: str = "nccl:all_reduce") -> bytes:
    """A Flight Recorder dump of one group."""
    entries = [{"process_group": ("0", "default_pg"), "collective_seq_id": number, "profiling_name": name,
                "input_sizes": [[size]], "state": "scheduled"} for number, size in enumerate(sizes, 1)]  # fmt: skip
    return pickle.dumps({"version": "2.5", "entries": entries})


def test_flight_recorder_dumps_name_who_did_not_join_or_asked_for_something_else(tmp_path: Path) -> None:
    for rank in range(4):
        (tmp_path / f"trace_rank_{rank}").write_bytes(dump(*(8,) * (3 if rank == 2 else 5)))
    missing = triage([tmp_path])
    assert (missing.failure_class, missing.culprit and missing.culprit.rank) == ("coll_timeout", 2)
    (tmp_path / "trace_rank_2").write_bytes(dump(8, 8, 9, 8, 8))
    differs = triage([tmp_path])
    assert (differs.failure_class, differs.culprit and differs.culprit.rank) == ("coll_mismatch", 2)


class Evil:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))


def test_a_hostile_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace_rank_0").write_bytes(pickle.dumps({"entries": [Evil()]}))
    with pytest.raises(HarnessError):
        triage([tmp_path / "trace_rank_0"])
    assert not (tmp_path / "ran").exists()


def test_unusable_input_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    for path in (tmp_path / "none", tmp_path / "binary"):
        with pytest.raises(HarnessError) as error:
            triage([path])
        assert error.value.hint


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=80), st.sampled_from([case["log"].encode() for _, _, case in CASES])), max_size=4
    )
)
def test_whatever_is_read_there_is_an_answer_whose_quotes_stand_in_it(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("any") / "log"
    path.write_bytes(b"x\n" + b"\n".join(parts))
    try:
        found = triage([path])
    except HarnessError:
        return
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    for quote in found.evidence:
        assert quote.text in plain(lines[quote.line - 1]) or quote.text in lines[quote.line - 1]
    assert (found.culprit is None) == (found.culprit_status == "unknown")


def test_an_endless_line_and_many_errors_are_read_in_time(tmp_path: Path) -> None:
    found = of(
        tmp_path,
        log="KeyError loss error x" * 200_000 + "\n" + OOM.format(gpu=0) + "\n" + "RuntimeError: odd\n" * 20_000,
    )
    assert found.failure_class == "oom_gpu_forward"


def test_a_number_decides_after_many_lines_that_differ_in_it_alone(tmp_path: Path) -> None:
    calm = "\n".join(f"[ {index}.0] NVRM: Xid (PCI:0000:3b:00): 13, pid=7" for index in range(300))
    assert of(tmp_path, log=f"{calm}\n[ 999.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=7").failure_class == "hw_gpu_fault"
    tried = "\n".join(f"try {index}: os error 4, again" for index in range(300))
    assert of(tmp_path, log=f"{tried}\ntry 300: os error 28, giving up").failure_class == "storage_full"


# ---------------------------------------------------------------- what a person sees


def test_the_terminal_and_the_page_show_the_verdict_and_escape_the_log(tmp_path: Path) -> None:
    said = "[rank1]: ValueError: <script>alert(1)</script> [bold]x[/bold] \x1b[31mred"
    found = of(tmp_path, log=f"[rank0]: fine\n{said}\n{WAITED.format(rank=0)}")
    console = Console(width=80, file=io.StringIO(), highlight=False)
    for part in views.terminal(found):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    for word in ("app_exception", "rank 1", "log:2", "[bold]x[/bold]", "Timeline", "Next"):
        assert word in text
    assert "\x1b" not in text
    page = views.page(found)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in html.unescape(page)
    assert "http" not in page.replace("http-equiv", "")
