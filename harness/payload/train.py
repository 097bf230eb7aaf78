"""Trains one case: data -> load -> adapter -> proof -> steps -> checkpoint -> evaluation -> reload check -> merge.

Started once per rank in the job directory, with the path of job.json. All that it says goes into its event file; any
exception ends it with an `error` event and exit code 1.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.events import EventLog
from harness.payload import data, sampler, versions
from harness.payload.journal import Journal, describe, host_name

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "triton", "mamba_ssm",
             "causal_conv1d", "flash_attn")  # fmt: skip


def main(argv: list[str]) -> int:
    """Run job.json; 0, or 1 after an `error` event."""
    rank = int(os.environ.get("RANK", "0"))
    stacks = open(f"stacks.rank{rank}.txt", "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    journal = Journal(EventLog(".", rank), rank)
    journal.write("alive", what="payload started, importing its libraries")
    # Threads that spin while they wait make a busy host 10 times slower (seen, 2 cores); before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return attempt(Path(argv[0]), journal)


def attempt(order: Path, journal: Journal) -> int:
    """Measure the case of the file `order` in the present directory; 0, or 1 after an `error` event."""
    telemetry = None
    try:
        job = json.loads(order.read_text(encoding="utf-8"))
        keep_to_own_gpu(job["case"])
        telemetry = watch_gpus(job["case"])
        run(job, journal)
    except Exception as error:
        journal.error(error)
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    finally:
        sampler.stop(telemetry)
    journal.write("end", ok=True)
    return 0


def keep_to_own_gpu(case: dict[str, Any]) -> None:
    """Hide the host's other GPUs from a single process, before torch looks: transformers' Trainer spreads a model over
    all that it sees."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if case["device"] == "cuda" and case["devices"] == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = shown.split(",")[0]


def watch_gpus(case: dict[str, Any]) -> subprocess.Popen[bytes] | None:
    """The sampler of this node's GPUs, which the first rank on each node starts; None on a CPU and in other ranks."""
    if case["device"] != "cuda" or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    devices, node = (int(os.environ.get(name) or default) for name, default in
                     (("LOCAL_WORLD_SIZE", "1"), ("GROUP_RANK", "0")))  # fmt: skip
    return sampler.start(devices, node, os.getppid())


def run(job: dict[str, Any], journal: Journal) -> None:
    """All phases of a training job; see the module's first line for their order."""
    case, variant, keep = job["case"], job["variant"], job["keep"]
    with journal.during("data"):
        conversations = None if case["data"] == "synthetic" else data.read_conversations(case["data"])
    earlier_cases = job.get("earlier_cases", 0)
    device, world_size = start(case, journal, earlier_cases)

    from harness.payload import artifacts, cap, room
    from harness.payload.meter import MemoryMeter
    from harness.payload.trainer import checkpoint

    with journal.during("load"):
        room.check_disk(case, variant, keep)
        if device != "cpu" and case["memory_cap_gib"] is None:  # a cap looks for itself
            room.check_gpu(device)
        memory = MemoryMeter(journal, device, cap.impose(case, device, journal), warm=earlier_cases > 0)
        memory.restart()
        tokenizer = load_tokenizer(case, variant)
        base = base_path(case, variant, keep, tokenizer, device, journal.rank)
        model = load_model(case, variant, base, device)
        memory.record("load")
    journal.enter("prepare")
    rows, texts = prepare_data(case, variant, tokenizer, conversations, world_size, journal)
    trainer = make_trainer(model, case, variant, tokenizer, rows, journal, memory, world_size)
    del model
    trainer.train()
    trainer.evaluate()

    with journal.during("reload"):
        sharded, trained = case["strategy"] == "fsdp", trainer.model
        before = artifacts.logits(trained, rows, case, device) if sharded or journal.rank == 0 else None
        shapes = artifacts.trained_shapes(trained, case)
        del trainer, trained
        release(device)
        if sharded or journal.rank == 0:  # what does not fit on one device is read back by all
            check_reload(case, variant, base, tokenizer, texts, rows, before, shapes, device, journal)
    if keep != "none" and journal.rank == 0:
        saved = checkpoint(case)
        if case["method"] != "full":
            artifacts.keep_adapter(saved, tokenizer)
        if keep == "merged":
            with journal.during("merge"):
                journal.write("merge", **artifacts.merge(case, variant, base, saved, tokenizer, memory))
    finish(world_size)


def start(case: dict[str, Any], journal: Journal, earlier_cases: int = 0) -> tuple[str, int]:
    """Join the other ranks and say who this one is: its device and the number of ranks."""
    import torch

    from harness.payload.meter import rss_bytes

    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world_size == 1 and case["strategy"] == "none":
        forget_launcher()
    device = "cpu"
    if case["device"] == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    if world_size > 1:
        torch.distributed.init_process_group(communication(case))
    import harness.payload.trainer  # noqa: F401 - imported here, so that the baseline holds the libraries

    installed = versions.versions()
    journal.write("start", rank=journal.rank, world_size=world_size, local_rank=local_rank, pid=os.getpid(),
                  host=host_name(), python=platform.python_version(), libraries=libraries(),
                  versions_sha256=versions.digest(installed),
                  device=describe_device(device), earlier_cases=earlier_cases,
                  baseline_rss_bytes=None if earlier_cases else rss_bytes())  # fmt: skip
    versions.require_same(installed, journal.rank, world_size, host_name())
    return device, world_size


def communication(case: dict[str, Any]) -> str:
    """PyTorch's name of what connects the ranks; gradients that are offloaded to the host are reduced there."""
    if case["device"] == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if case["cpu_offload"] else "nccl"


def forget_launcher() -> None:
    """Hide torchrun from accelerate, which wraps even a single rank on a CPU in DDP."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def libraries() -> dict[str, str]:
    """Versions of what is installed and matters for a number."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            continue
    return found


def describe_device(device: str) -> dict[str, Any]:
    """Type, name and memory of the device."""
    import torch

    if device == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"type": "cpu", "name": cpu_name(), "total_bytes": total}
    properties = torch.cuda.get_device_properties(device)
    return {"type": "cuda", "name": properties.name, "total_bytes": properties.total_memory}


def cpu_name() -> str:
    """The processor's model name, as /proc states it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def source(case: dict[str, Any], variant: dict[str, Any]) -> str | None:
    """Where the weights are: None (random), a hub id, or a directory."""
    return {"random": None, "hub": variant["checkpoint"]}.get(case["weights"], case["weights"])


def load_tokenizer(case: dict[str, Any], variant: dict[str, Any]) -> Any:
    """The checkpoint's tokenizer, or, for random weights, one trained on the spot."""
    from harness.payload import tokenizer

    path = source(case, variant)
    if path is None:
        return tokenizer.build(variant)
    from transformers import AutoTokenizer

    revision = variant["revision"] if path == variant["checkpoint"] else None
    found = AutoTokenizer.from_pretrained(path, revision=revision)
    if found.chat_template is None:
        found.chat_template = tokenizer.chat_template_text(variant["chat_template"])
    return found


def base_path(case: dict[str, Any], variant: dict[str, Any], keep: str, tokenizer: Any, device: str,
              rank: int) -> str | None:  # fmt: skip
    """The directory or hub id to load the model from; None to build it in place.

    Random weights are saved first where something else must read them: serving in a chain.
    """
    from harness.payload import artifacts

    path = source(case, variant)
    if path is not None or keep == "none":
        return path
    if rank == 0:
        artifacts.save_base(case, variant, tokenizer, device)
        release(device)
    barrier()
    return str(artifacts.BASE)


def load_model(case: dict[str, Any], variant: dict[str, Any], base: str | None, device: str) -> Any:
    """The model with what is to be trained of it."""
    from harness.payload import model

    if case["strategy"] == "fsdp":
        from harness.payload import shard

        return shard.load(case, variant, base, device)
    found = model.build(case, variant, device) if base is None else model.load(case, variant, base, device)
    return model.adapt(found, case)


def prepare_data(case: dict[str, Any], variant: dict[str, Any], tokenizer: Any, conversations: Any, world_size: int,
                 journal: Journal) -> tuple[list[list[int]], list[str]]:  # fmt: skip
    """Rows of token ids, those for evaluation first, and the rendered samples, which rank 0 leaves on disk."""
    switch = variant["serving"]["thinking"]
    count = (case["steps"] * case["grad_accum"] + 1) * case["micro_batch"] * world_size
    rows, texts = data.samples(tokenizer, case, switch, conversations, count)
    if journal.rank == 0:
        shown = conversations or data.synthetic_conversations(data.SHOWN, case["seq_len"], case["thinking"])
        data.write_samples(Path(), shown[: data.SHOWN], texts, {"thinking": case["thinking"], "switch": switch})
        describe(journal, thinking="on" if case["thinking"] else "off", switch=switch, samples=len(rows))
    return rows, texts


def make_trainer(model: Any, case: dict[str, Any], variant: dict[str, Any], tokenizer: Any, rows: list[list[int]],
                 journal: Journal, memory: Any, world_size: int) -> Any:  # fmt: skip
    """The trainer with its data; the first rows are for evaluation."""
    from harness.payload.trainer import MeteredTrainer, dataset, settings

    held_out = case["micro_batch"] * world_size
    return MeteredTrainer(model, case, variant, journal, memory, world_size, args=settings(case, "artifacts"),
                          train_dataset=dataset(rows[held_out:]), eval_dataset=dataset(rows[:held_out]),
                          processing_class=tokenizer)  # fmt: skip


def check_reload(case: dict[str, Any], variant: dict[str, Any], base: str | None, tokenizer: Any, texts: list[str],
                 rows: list[list[int]], before: Any, shapes: dict[str, Any], device: str,
                 journal: Journal) -> None:  # fmt: skip
    """Read the checkpoint back and compare; a difference is an error."""
    from harness.payload import artifacts
    from harness.payload.trainer import checkpoint

    saved = checkpoint(case)
    checks = {**artifacts.check_files(case, saved, shapes),
              "tokenizer": artifacts.check_tokenizer(tokenizer, saved, texts)}  # fmt: skip
    again = artifacts.reload(case, variant, base, saved, device)
    difference = (artifacts.logits(again, rows, case, device) - before).abs().max().item()
    checks["logits"] = difference <= artifacts.TOLERANCE[case["param_dtype"]]
    if journal.rank == 0:
        journal.write("reload", ok=all(checks.values()), max_abs_logit_difference=difference, checks=checks)
    if not all(checks.values()):
        failed = ", ".join(name for name, ok in checks.items() if not ok)
        raise RuntimeError(f"the checkpoint in {saved} does not give back what was trained: {failed} "
                           f"(largest logit difference {difference:g})")  # fmt: skip


def release(device: str) -> None:
    """Give memory back before the next large allocation."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()


def barrier() -> None:
    """Wait for every rank."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def finish(world_size: int) -> None:
    """Leave together: a rank that goes early would break the connections of the others."""
    if world_size > 1:
        import torch

        barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: libraries' exit handlers may wait for ranks that are gone.
    os._exit(status)
