"""Logs of any origin: who began it and who only stood beside it, and what is no failure though its words are of one.

The log lines here are of our own wording around what a library prints.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.logs import OOM, of

from harness.triage import triage

# ---------------------------------------------------------------- who began it, and who only stood beside it

TABLE = "\n".join(
    [
        "W0301 10:00:07.0 70 torch/distributed/elastic/api.py:1] Sending process {other} closing signal SIGTERM",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
        "Failures:",
        "[1]:",
        "  rank      : 1 (local_rank: 1)",
        "  exitcode  : -15 (pid: {listed})  (SIGTERM)",
        "Root Cause (first observed failure):",
        "[0]:",
        "  rank      : 0 (local_rank: 0)",
        "  exitcode  : 1 (pid: 71)",
    ]
)
GLOO = "[rank0]: RuntimeError: [/x/gloo/transport/tcp/{text}"


def test_of_two_ranks_the_one_that_did_not_wait_is_behind(tmp_path: Path) -> None:
    waited = GLOO.format(text="unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete")
    found = of(tmp_path, log=f"{waited}\n{TABLE.format(other=72, listed=72)}")
    assert found.failure_class == "coll_timeout"
    assert found.culprit
    assert found.culprit.rank == 1
    (tmp_path / "log").write_text(f"{waited}\n{TABLE.format(other=72, listed=73)}")  # a third process was ended too
    assert triage([tmp_path]).culprit is None


def test_two_ranks_that_gave_up_in_different_collectives_disagree(tmp_path: Path) -> None:
    def gave_up(rank: int, name: str) -> str:
        frame = f'[rank{rank}]:   File "/x/torch/distributed/distributed_c10d.py", line 7, in {name}'
        text = "unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete"
        return (
            f"[rank{rank}]: Traceback (most recent call last):\n{frame}\n[rank{rank}]:     work.wait()\n"
            + GLOO.format(text=text).replace("rank0", f"rank{rank}")
        )

    other = "\n".join([gave_up(0, "all_reduce"), gave_up(1, "broadcast")])
    assert of(tmp_path, log=other).failure_class == "coll_mismatch"
    same = "\n".join([gave_up(0, "all_reduce"), gave_up(1, "all_reduce")])
    assert of(tmp_path, log=same).failure_class == "coll_timeout"


def test_what_every_rank_says_is_nobodys_even_where_the_launcher_saw_one_first(tmp_path: Path) -> None:
    said = "\n".join(f"[rank{rank}]: AttributeError: 'Tensor' object has no attribute 'odd'" for rank in (0, 1))
    found = of(tmp_path, log=f"{said}\n{TABLE.format(other=72, listed=72)}")
    assert (found.failure_class, found.culprit) == ("app_exception", None)
    both = "\n".join(f"[default{rank}]:Fatal Python error: Segmentation fault" for rank in (1, 0))
    (tmp_path / "log").write_text(both)
    assert triage([tmp_path]).culprit is None


def test_a_loss_that_is_nan_on_one_rank_first(tmp_path: Path) -> None:
    losses = (("0", 3, "0.9"), ("1", 3, "nan"), ("0", 4, "nan"), ("1", 4, "nan"))
    lines = [f"[rank{rank}] step {step}/8 loss {loss}" for rank, step, loss in losses]
    found = of(tmp_path, log="\n".join(lines))
    assert found.failure_class == "nan_loss"
    assert found.culprit
    assert found.culprit.rank == 1
    (tmp_path / "log").write_text("[rank0] step 3/8 loss nan\n[rank1] step 3/8 loss nan")
    assert triage([tmp_path]).culprit is None


def test_frames_of_pytorchs_own_stack_are_no_errors(tmp_path: Path) -> None:
    frames = "frame #1: c10::DistError::DistError(c10::SourceLocation, std::string) + 0x72 (0x7f in /x/libc10.so)"
    error = "torch.distributed.DistNetworkError: The client socket has timed out after 3000ms while trying to connect"
    found = of(tmp_path, log=f"{frames}\n{error} to (10.0.0.1, 29500).")
    assert (found.failure_class, found.evidence[0].line) == ("rdzv_timeout", 2)


def test_numbers_of_a_lines_head_are_no_sizes(tmp_path: Path) -> None:
    lines = [
        f"[rank{rank}]:[I0301 10:00:0{rank}.3516232{rank} reducer.cpp:2054] {rank} buckets rebuilt, size limits: 64"
        for rank in (0, 1)
    ]
    crash = "[default1]:Fatal Python error: Segmentation fault"
    found = of(tmp_path, log="\n".join([*lines, crash]))
    assert found.failure_class == "app_exception"
    assert found.culprit
    assert found.culprit.rank == 1


def test_what_a_run_warned_of_and_went_on_after_is_no_failure(tmp_path: Path) -> None:
    warned = "WARNING:data:reading shard 3 failed ([Errno 104] Connection reset by peer), trying again"
    ended = "step 7/8 loss 0.4\nstep 8/8 loss 0.3\ntraining finished in 9 s"
    assert of(tmp_path, log=f"{warned}\n{ended}").failure_class == "no_failure"
    (tmp_path / "log").write_text(f"step 7/8 loss 0.4\n{warned}")
    assert triage([tmp_path]).failure_class == "peer_lost"


def test_one_step_between_two_ranks_is_no_silence(tmp_path: Path) -> None:
    ended = "W0301 10:00:07.0 70 torch/distributed/elastic/agent/server/api.py:1] Received 15 death signal"
    files = {"rank_0.log": "step 3/9 loss 1.0", "rank_1.log": "step 4/9 loss 1.0", "torchrun.log": ended}
    assert of(tmp_path, **files).failure_class == "terminated_external"
    (tmp_path / "rank_1.log").write_text("step 6/9 loss 1.0")
    found = triage([tmp_path])
    assert (found.failure_class, found.culprit and found.culprit.rank) == ("coll_timeout", 0)


CROWDED = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 139.00 GiB "
    "of which 0.40 GiB is free. {listed}Of the allocated memory {own} GiB is allocated by PyTorch, and 0.10 GiB is "
    "reserved by PyTorch but unallocated."
)


@pytest.mark.parametrize(
    ("listed", "own", "name"),
    [
        ("Process 7 has 137.00 GiB memory in use. Process 9 has 1.60 GiB memory in use. ", "1.10", "contention"),
        ("", "1.10", "contention"),
        ("", "137.00", "forward"),
        ("Including non-PyTorch memory, this process has 1.60 GiB memory in use. ", "1.10", "contention"),
        ("Including non-PyTorch memory, this process has 138.00 GiB memory in use. ", "137.00", "forward"),
        ("Process 7 has 138.00 GiB memory in use. ", "137.00", "forward"),
    ],
)
def test_another_processs_memory_is_told_from_a_job_that_is_too_big(
    tmp_path: Path, listed: str, own: str, name: str
) -> None:
    assert of(tmp_path, log=CROWDED.format(listed=listed, own=own)).failure_class == f"oom_gpu_{name}"


def test_nccls_last_error_says_more_than_its_code(tmp_path: Path) -> None:
    code = (
        "[rank0]: torch.distributed.DistBackendError: NCCL error in: /x/NCCLUtils.cpp:94, invalid usage (run with NCCL"
    )
    last = "[rank0]: Last error:\n[rank0]: Bootstrap : no socket interface found"
    assert of(tmp_path, log=f"{code}\n{last}").failure_class == "nccl_bootstrap_net"
    (tmp_path / "log").write_text(code)
    assert triage([tmp_path]).failure_class == "nccl_invalid_usage"


def test_the_optimizers_own_frame_says_that_it_was_the_optimizer(tmp_path: Path) -> None:
    frames = [("train.py", "training_step"), ("torch/optim/optimizer.py", "wrapper"), ("torch/optim/adamw.py", "_init")]
    body = "".join(f'  File "/x/{file}", line 7, in {name}\n    do()\n' for file, name in frames)
    found = of(tmp_path, log=f"Traceback (most recent call last):\n{body}{OOM.format(gpu=0)}")
    assert found.failure_class == "oom_gpu_optimizer"


WATCHDOG = (
    "[rank{rank}]:[E1122 03:09:58.0 ProcessGroupNCCL.cpp:697] [Rank {rank}] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=4, OpType={what}, NumelIn={size}, NumelOut={size}, Timeout(ms)=6000) ran for 6001 "
    "milliseconds before timing out.\nterminate called after throwing an instance of 'c10::DistBackendError'\n"
    "Fatal Python error: Aborted"
)


def test_an_abort_after_a_time_out_is_no_crash_of_its_own(tmp_path: Path) -> None:
    waited = WATCHDOG.format(rank=0, what="ALLREDUCE", size=1024)
    found = of(tmp_path, log=f"{waited}\n{TABLE.format(other=72, listed=72)}")
    assert (found.failure_class, found.culprit and found.culprit.rank) == ("coll_timeout", 1)
    other = WATCHDOG.format(rank=1, what="ALLREDUCE", size=2048)
    (tmp_path / "log").write_text(f"{waited}\n{other}")
    assert triage([tmp_path]).failure_class == "coll_mismatch"
    (tmp_path / "log").write_text("[rank0]: step 3/9\nFatal Python error: Aborted")
    assert triage([tmp_path]).failure_class == "app_exception"


MENTIONED = """\
No valid checkpoint found in output directory, training from scratch
trust_remote_code is set; this model's custom code is used
quantization: none (bnb_4bit_compute_dtype is ignored)
adapter_config.json written to out
invalid JSON in line 17 of train.jsonl, row skipped
retrying download (Connection reset by peer), attempt 2
port 29500 is in use, using 29501
batch size 7 is not divisible by 2, last batch dropped
flash_attn is not installed, falling back to sdpa
Could not load library libcudnn_ops.so, cuDNN is not used
Permission denied while writing the cache, going on without
kv cache dtype fp8 is not supported on this device, auto is used
memory usage threshold set to 95%
time limit of this job: 01:00:00
signal handler for SIGTERM installed"""


@pytest.mark.parametrize("line", MENTIONED.splitlines())
def test_what_a_run_only_mentions_is_no_failure_even_where_the_log_is_cut(tmp_path: Path, line: str) -> None:
    cut = f"step 1/90 loss 2.1\n{line}\nstep 2/90 loss 2.0\n"
    assert of(tmp_path, log=cut).failure_class == "unknown"
    (tmp_path / "log").write_text(f"{cut}step 90/90 loss 1.0\n{{'train_runtime': 3.0}}\n")
    assert triage([tmp_path]).failure_class == "no_failure"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ValueError: Unexpected keyword argument bnb_4bit_quant_tpye", "quant_setup"),
        ("ValueError: `.half()` is not supported for quantized model.", "quant_setup"),
        ("ValueError: Can't find 'adapter_config.json' at 'out'", "peft_config"),
        ("Memory on the node was 60.1GB / 62.0GB, which exceeds the memory usage threshold of 0.95.", "oom_host"),
        ("RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests.",
         "serve_oom_profile"),
        ("harness.payload.model.TargetError: LoRA target `odd` matches nothing in this model.", "peft_config"),
    ],
)  # fmt: skip
def test_the_same_words_in_an_error_are_one(tmp_path: Path, line: str, name: str) -> None:
    assert of(tmp_path, log=f"step 1/90 loss 2.1\n{line}\n").failure_class == name


def test_the_rank_that_the_launcher_saw_fail_did_not_survive_its_error(tmp_path: Path) -> None:
    table = TABLE.replace(" 1 (local_rank: 1)", " 9 (local_rank: 9)").replace(
        " 0 (local_rank: 0)", " 1 (local_rank: 1)"
    )
    raised = "[rank1]: AssertionError: labels outside the classes"
    found = of(tmp_path, log=f"step 2/8\n{raised}\nstep 3/8\n{table.format(other=72, listed=72)}")
    assert (found.failure_class, found.culprit and found.culprit.rank) == ("app_exception", 1)
    failed = "E0301 10:11:10.139000 70 torch/x/api.py:986] failed (exitcode: -6) local_rank: 0"  # 139 is no exit code
    waited = WATCHDOG.format(rank=0, what="ALLREDUCE", size=8)
    (tmp_path / "log").write_text(f"{failed}\n{waited}")
    assert triage([tmp_path]).failure_class == "coll_timeout"


def test_a_kill_after_a_time_out_is_of_whoever_ended_the_rest_in_any_file(tmp_path: Path) -> None:
    files = {"r1.log": "[2026-03-09 00:57:15 TP1] Watchdog timeout (self.watchdog_timeout=300)\n"}
    late = "[2026-03-09 00:57:20] Received sigquit from a child process.\nKilled\n"
    assert of(tmp_path, **files, **{"launcher.log": late}).failure_class == "coll_timeout"
    early = late.replace("00:57:20", "00:50:20")
    assert of(tmp_path, **files, **{"launcher.log": early}).failure_class == "oom_host"


def test_one_file_of_a_whole_job_is_no_ranks_whatever_its_name_tells(tmp_path: Path) -> None:
    for name, rank in (("assertion-of-rank6.log", None), ("rank_6.log", 6), ("stderr.6", 6)):
        (tmp_path / name).write_text("step 4 loss 2.0\nValueError: odd\n")
        found = triage([tmp_path / name])
        assert (found.culprit.rank if found.culprit else None) == rank


def test_one_file_of_a_whole_job_is_no_hosts_whatever_its_name_tells(tmp_path: Path) -> None:
    for name, host in (("asked-for-gpus-only-1.log", None), ("node-12.log", "node-12")):
        (tmp_path / name).write_text("OSError: [Errno 98] Address already in use\n")
        found = triage([tmp_path / name])
        assert (found.culprit.host if found.culprit else None) == host
