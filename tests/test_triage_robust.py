"""The same failure, as people's terminals, collectors and scripts pass it on: the answer does not change.

The log lines here are of our own wording around what a library prints.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes.logs import OOM, WAITED, of

TABLE = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  rank      : {other} (local_rank: {other})
  exitcode  : {code} (pid: 41)
Root Cause (first observed failure):
[0]:
  rank      : {rank} (local_rank: {rank})
  exitcode  : 1 (pid: 42)
"""
LATE = """Traceback (most recent call last):
  File "/w/train.py", line 5, in main
    trainer.evaluate()
  File "/w/loops.py", line 9, in evaluate
    return self.loop()
{oom}
"""


def test_what_torchrun_ended_itself_was_not_ended_from_outside(tmp_path: Path) -> None:
    found = of(tmp_path, log="step 4/9 loss 1.0\n" + TABLE.format(other=0, code=-15, rank=1))
    assert found.failure_class == "app_exception"
    assert found.culprit
    assert found.culprit.rank == 1


def test_torchrun_that_was_itself_ended_from_outside_is_so(tmp_path: Path) -> None:
    table = TABLE.format(other=0, code=-15, rank=1).replace("exitcode  : 1 ", "exitcode  : -15 ")
    assert of(tmp_path, log="step 4/9 loss 1.0\n" + table).failure_class == "terminated_external"


@pytest.mark.parametrize("said", ["Training complete!", "Run finished", "Job finished at noon, model saved to /out"])
def test_a_script_that_says_it_is_done_does_not_undo_a_rank_s_error(tmp_path: Path, said: str) -> None:
    log = f"[rank1]: Traceback (most recent call last):\n[rank1]: MemoryError\n[rank0] step 3/8 loss 1.0\n{said}\n"
    assert of(tmp_path, log=log).failure_class == "oom_host"


@pytest.mark.parametrize("said", ["Training complete!", "Upload of the logs finished with exit code 0"])
def test_a_bar_that_an_error_closes_is_no_progress(tmp_path: Path, said: str) -> None:
    log = LATE.format(oom=OOM.format(gpu=0)) + f"\n  8%|8         | 1/12 [00:00<00:03,  3.33it/s]\n{said}\n"
    assert of(tmp_path, log=log).failure_class == "oom_gpu_save_eval"


def test_a_chore_around_the_run_that_ends_well_is_no_good_end(tmp_path: Path) -> None:
    log = (
        "Traceback (most recent call last):\n  File \"/w/a.py\", line 3, in main\nKeyError: 'x'\n"
        "Cleanup finished with exit code 0\n"
    )
    assert of(tmp_path, log=log).failure_class == "app_exception"


def test_steps_after_a_launcher_gave_up_are_of_another_job(tmp_path: Path) -> None:
    failed = f"[rank1]: {OOM.format(gpu=1)}\n" + TABLE.format(other=0, code=-15, rank=1)
    other = "50%|#####     | 5/10 [00:05<00:05,  1.00s/it]\n{'train_runtime': 9.5, 'train_loss': 1.0}\n"
    found = of(tmp_path, log=failed + other)
    assert found.failure_class == "oom_gpu_forward"
    assert found.culprit
    assert found.culprit.rank == 1


@pytest.mark.parametrize("own", ["[rank{}]", "[default{}]:", "(VllmWorker rank={} pid=7)"])
@pytest.mark.parametrize("label", ["0: ", "[1,0]<stderr>:"])
def test_the_rank_that_a_program_names_comes_before_the_label_of_a_launcher(
    tmp_path: Path, label: str, own: str
) -> None:
    lines = [
        f"{own.format(0)} step 1 loss 1.0",
        f"{own.format(3)} Traceback (most recent call last):",
        f"{own.format(3)} ValueError: odd row",
    ]
    found = of(tmp_path, log="".join(f"{label}{line}\n" for line in lines))
    assert found.failure_class == "app_exception"
    assert found.culprit
    assert found.culprit.rank == 3


def test_a_frame_of_c_plus_plus_after_a_timestamp_is_no_error(tmp_path: Path) -> None:
    lines = [
        "[rank0]:[E301 10:00:00.0 socket.cpp:1019] [c10d] The client socket has timed out after 30000ms while trying",
        "frame #1: c10::DistError::DistError(c10::SourceLocation, std::string) + 0x10 (0x1 in libc10.so)",
    ]
    for index in range(2):
        log = "".join(f"2026-03-04T05:06:07.123Z {line}\n" for line in lines[index:])
        assert of(tmp_path, log=log).failure_class == ("unknown" if index else "rdzv_timeout")


def test_json_records_and_html_hold_the_same_frames(tmp_path: Path) -> None:
    log = LATE.format(oom=OOM.format(gpu=0))
    forms = {
        "docker": "".join(json.dumps({"log": f"{line}\n", "stream": "stderr"}) + "\n" for line in log.splitlines()),
        "record": json.dumps({"severity": "ERROR", "message": log}) + "\n",
        "html": log.replace('"', "&quot;"),
    }
    for name, text in forms.items():
        folder = tmp_path / name
        folder.mkdir()
        found = of(folder, log=text)
        assert found.failure_class == "oom_gpu_save_eval", name
        assert all(line.text in text for line in found.evidence)


def test_what_passes_an_error_on_may_quote_it(tmp_path: Path) -> None:
    log = f"(APIServer pid=7) Exception: Call to load_model method failed: {OOM.format(gpu=0)}\n"
    assert of(tmp_path, log=log).failure_class.startswith(("oom_gpu", "serve_oom"))
    assert of(tmp_path, log="Exception: Call to load_model method failed: see above\n").class_status == "hypothesis"


def test_out_of_memory_without_a_phase_is_only_supposed_to_be_in_forward(tmp_path: Path) -> None:
    bare = of(tmp_path, log=OOM.format(gpu=0) + "\n")
    assert (bare.failure_class, bare.class_status) == ("oom_gpu_forward", "hypothesis")
    assert "does not say" in bare.summary
    framed = 'Traceback (most recent call last):\n  File "/w/m.py", line 4, in forward\n' + OOM.format(gpu=0)
    sure = of(tmp_path, log=framed + "\n")
    assert (sure.failure_class, sure.class_status) == ("oom_gpu_forward", "established")


def test_a_sentence_of_success_does_not_make_up_for_silence(tmp_path: Path) -> None:
    steps = [
        f"[rank{rank}] step {step}/90 loss 1.0" for step in range(1, 9) for rank in range(4) if rank != 2 or step < 4
    ]
    quiet = of(tmp_path, log="\n".join([*steps, "Training complete!", ""]))
    assert (quiet.failure_class, quiet.class_status) == ("coll_timeout", "hypothesis")
    assert quiet.culprit
    assert quiet.culprit.rank == 2
    own = of(tmp_path, log="\n".join([*steps, "{'train_runtime': 9.5, 'train_loss': 1.0}", ""]))
    assert own.failure_class == "no_failure"


def test_a_sentence_of_success_before_the_last_step_is_only_a_guess(tmp_path: Path) -> None:
    short = of(tmp_path, log="step 40/90 loss 1.0\nTraining complete!\n")
    assert (short.failure_class, short.class_status) == ("no_failure", "hypothesis")
    whole = of(tmp_path, log="step 90/90 loss 1.0\nTraining complete!\n")
    assert (whole.failure_class, whole.class_status) == ("no_failure", "established")


def test_a_wait_that_is_told_stays_one_under_any_collector(tmp_path: Path) -> None:
    for index, head in enumerate(("", "2026-03-04T05:06:07.1Z stderr F ", "[pod/w-0/main] ", "w-1  | ")):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert of(folder, log=head + WAITED.format(rank=1) + "\n").failure_class == "coll_timeout"
