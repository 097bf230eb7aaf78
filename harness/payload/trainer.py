"""TRL's `SFTTrainer` with every setting given and the clocks of `meter` in its hooks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from harness.payload import artifacts, proof
from harness.payload import model as models
from harness.payload.journal import Journal, NotAsRequested
from harness.payload.meter import MemoryMeter, RoutingMeter, StepMeter


def settings(case: dict[str, Any], output_dir: str) -> SFTConfig:
    """All that decides what is measured, with no library default left open."""
    cuda = case["device"] == "cuda"
    return SFTConfig(
        output_dir=output_dir,
        # what is trained on
        max_length=case["seq_len"],
        packing=False,
        padding_free=False,
        pad_to_multiple_of=None,
        shuffle_dataset=False,
        completion_only_loss=False,
        assistant_only_loss=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        dataloader_drop_last=True,
        # steps
        max_steps=case["steps"],
        per_device_train_batch_size=case["micro_batch"],
        per_device_eval_batch_size=case["micro_batch"],
        gradient_accumulation_steps=case["grad_accum"],
        average_tokens_across_devices=True,
        learning_rate=case["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        loss_type="nll",
        seed=case["seed"],
        data_seed=case["seed"],
        # memory and speed
        bf16=models.autocast(case),
        fp16=False,
        gradient_checkpointing=case["activation_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if case["activation_checkpointing"] else None,
        activation_offloading=False,
        torch_compile=False,
        use_liger_kernel=False,
        use_cache=False,
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        # what is written
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",  # evaluated once, after the checkpoint: on a CPU bitsandbytes repacks 4-bit weights then
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=case["steps"],
        save_only_model=False,
        save_total_limit=None,
        load_best_model_at_end=False,
        report_to="none",
        disable_tqdm=True,
        push_to_hub=False,
    )


def dataset(rows: list[list[int]]) -> Dataset:
    """Rows of token ids as a dataset whose every token counts towards the loss."""
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


class MeteredTrainer(SFTTrainer):
    """Trains one case, proves it before the first step, and says what happens as it happens."""

    def __init__(self, model: Any, case: dict[str, Any], variant: dict[str, Any], journal: Journal,
                 memory: MemoryMeter, world_size: int, **arguments: Any) -> None:  # fmt: skip
        self.case, self.variant, self.journal, self.memory = case, variant, journal, memory
        self.tokenizer = arguments["processing_class"]
        self.meter = StepMeter(journal, memory, case, world_size)
        super().__init__(model=model, **arguments)
        self.sharded = case["strategy"] == "fsdp"
        if self.sharded:
            # Autocast alone: what is sharded brings its own gradient reduction, and accelerate, which knows nothing
            # of it, would wrap it in DDP.
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        self.add_callback(_Hooks(self))
        # The outer model's own hooks: on a GPU they see what DDP and FSDP2 wrap, without their waiting.
        self.model.register_forward_pre_hook(self._forward_begins, prepend=True)
        self.model.register_forward_hook(self._forward_ends)

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """The payload has put it where it belongs; offloaded shards must stay on the host."""
        if self.case["strategy"] != "fsdp":
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The case's optimizer, as `payload/model.py` builds it."""
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = models.optimizer(self.model if model is None else model, self.case)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Fetch the step's micro-batches, on the clock."""
        self.meter.begin()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.meter.count(batches, items)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        self.meter.data_arrived()
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
        """One micro-batch, forward and backward."""
        loss = super().training_step(*arguments, **more)
        self.meter.add_loss(loss)
        return loss

    def _forward_begins(self, *_: Any) -> None:
        if self.model.training:
            self.meter.forward_begins()

    def _forward_ends(self, *_: Any) -> None:
        if self.model.training:
            self.meter.forward_ends()

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        """The one small evaluation."""
        self.journal.enter("eval")
        routing = RoutingMeter(self.model)
        self.memory.restart()
        began = time.monotonic()
        metrics = super().evaluate(*arguments, **more)
        duration_s = time.monotonic() - began
        self.memory.record("eval")
        self.journal.write(
            "eval", loss=metrics["eval_loss"], duration_s=duration_s, expert_tokens_max_over_mean=routing.stop()
        )
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.journal.enter("save")
        self.memory.restart()
        began = time.monotonic()
        if self.sharded:
            artifacts.consolidate(self.model, self.tokenizer, checkpoint(self.case), self.args.process_index)
        else:
            super()._save_checkpoint(model, trial)
        self.memory.record("save")
        if self.args.should_save:
            files = [path for path in checkpoint(self.case).rglob("*") if path.is_file()]
            self.journal.write("save", bytes=sum(path.stat().st_size for path in files), files=len(files),
                               writer_rank=self.args.process_index,
                               duration_s=time.monotonic() - began)  # fmt: skip

    def prove(self) -> None:
        """Write what really is set up; raises NotAsRequested where the case asks for something else."""
        found = proof.examine(self.model_wrapped, self.optimizer, self.case, self.variant)
        found["memory_cap"] = self.memory.cap.facts() if self.memory.cap else None
        found["mismatches"] += artifacts.misplaced(self.case)
        self.journal.write("proof", **found)
        if found["mismatches"]:
            raise NotAsRequested("; ".join(found["mismatches"]))


def checkpoint(case: dict[str, Any]) -> Path:
    """Where the one checkpoint of a case lies, relative to the job directory."""
    return Path("artifacts") / f"checkpoint-{case['steps']}"


class _Hooks(TrainerCallback):
    """The moments that `Trainer` announces."""

    def __init__(self, trainer: MeteredTrainer) -> None:
        self.trainer, self.meter, self.journal = trainer, trainer.meter, trainer.journal

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.prove()
        self.journal.enter("train")
        self.trainer.memory.restart()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.meter.backward_ends()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.meter.optimizer_ends()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.meter.write(state.global_step, float(logs["grad_norm"]), float(logs["learning_rate"]))
