"""Programs of one process that fail in set-up, data, files or the libraries."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

OUT = Path("out")


def save_too_much() -> None:
    """Save 16 MiB in PyTorch's format."""
    import torch

    OUT.mkdir(exist_ok=True)
    print("step 10/10 loss 0.42", flush=True)
    torch.save({"weight": torch.zeros(2**22)}, OUT / "model.pt")


def save_too_much_safely() -> None:
    """Save 16 MiB as safetensors."""
    import torch
    from safetensors.torch import save_file

    OUT.mkdir(exist_ok=True)
    print("step 10/10 loss 0.42", flush=True)
    save_file({"weight": torch.zeros(2**22)}, str(OUT / "model.safetensors"))


def save_beyond_limit() -> None:
    """Save 16 MiB where a file may have 1 MiB."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as with a full disk: the write fails, the process lives
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    save_too_much()


def small_model(**more: Any) -> Any:
    """A Llama of 100,000 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=256,
                                        num_attention_heads=4, num_key_value_heads=4, **more))  # fmt: skip


def _saved() -> Path:
    OUT.mkdir(exist_ok=True)
    small_model().save_pretrained(OUT / "model")
    return OUT / "model"


def torn_checkpoint() -> None:
    """Load a checkpoint whose file was cut in half."""
    from transformers import AutoModelForCausalLM

    folder = _saved()
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    AutoModelForCausalLM.from_pretrained(folder)


def other_shape() -> None:
    """Load a checkpoint into a model of another width."""
    import torch

    torch.save(small_model().state_dict(), _saved() / "state.pt")
    wider = small_model(max_position_embeddings=64, head_dim=16)
    wider.load_state_dict(torch.load(OUT / "model" / "state.pt"))


def torn_pickle() -> None:
    """Load a PyTorch file that was cut in half."""
    import torch

    OUT.mkdir(exist_ok=True)
    file = OUT / "model.pt"
    torch.save({"weight": torch.zeros(2**16)}, file)
    os.truncate(file, file.stat().st_size // 2)
    torch.load(file)


def broken_row() -> None:
    """Load a JSONL file whose third row is broken."""
    from datasets import load_dataset

    OUT.mkdir(exist_ok=True)
    rows = ['{"text": "one"}', '{"text": "two"}', '{"text": "thr', '{"text": "four"}']
    (OUT / "train.jsonl").write_text("\n".join(rows) + "\n")
    load_dataset("json", data_files=str(OUT / "train.jsonl"), cache_dir=str(OUT / "cache"))


def wrong_roles() -> None:
    """Render a conversation that the chat template refuses."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
        "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{{ m['content'] }}"
        "{% endfor %}"
    )
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "user", "content": "a"}], tokenize=False)


def missing_column() -> None:
    """A data set without the column that training reads."""
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "one"}, {"prompt": "two"}])
    print([len(row["text"]) for row in rows])


def foreign_targets() -> None:
    """An adapter for modules that the model does not have."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(small_model(), LoraConfig(target_modules=["query_key_value", "dense_h_to_4h"]))


def no_adapter() -> None:
    """Load an adapter from a folder that holds none."""
    from peft import PeftModel

    OUT.mkdir(exist_ok=True)
    PeftModel.from_pretrained(small_model(), str(OUT))


def unknown_repository() -> None:
    """Ask for a model that is neither here nor, offline, anywhere."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("nobody-at-all/no-such-model")


def unknown_architecture() -> None:
    """A configuration of a type that this version does not know."""
    from transformers import AutoConfig

    OUT.mkdir(exist_ok=True)
    (OUT / "config.json").write_text('{"model_type": "nemotron_z", "architectures": ["NemotronZForCausalLM"]}\n')
    AutoConfig.from_pretrained(OUT)


def missing_module() -> None:
    """Import a library that is not installed."""
    __import__("flash_attn_4_interface")


def broken_library() -> None:
    """Import an extension whose file is no library."""
    OUT.mkdir(exist_ok=True)
    (OUT / "fused_scan.so").write_bytes(b"\x7fELF" + bytes(200))
    sys.path.insert(0, str(OUT.resolve()))
    __import__("fused_scan")


def port() -> None:
    """Serve on a port that another process listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", int(os.environ["DRILL_PORT"])))


def shared_memory() -> None:
    """A data loader's workers pass batches through /dev/shm."""
    import torch
    from torch.utils.data import DataLoader

    for batch in DataLoader([torch.zeros(2**18) for _ in range(8)], batch_size=4, num_workers=2):
        print(len(batch), flush=True)


def no_gpu() -> None:
    """Ask for a GPU where none can be seen."""
    import torch

    torch.zeros(8).to("cuda")


def far_gpu() -> None:
    """Ask for a GPU of a number that no host has."""
    import torch

    torch.zeros(8).to("cuda:99")


def quantized_by_absentee() -> None:
    """Load a checkpoint quantized by a library that is not here."""
    from transformers import AutoModelForCausalLM

    folder = _saved()
    text = (folder / "config.json").read_text()
    more = '"quantization_config": {"quant_method": "gptq", "bits": 4}'
    (folder / "config.json").write_text(f"{text.rstrip()[:-1]}, {more}}}\n")
    AutoModelForCausalLM.from_pretrained(folder)


def waits() -> None:
    """Train slowly, until somebody ends it."""
    import time

    for step in range(1, 1000):
        print(f"step {step}/1000 loss {2 / step:.3f}", flush=True)
        time.sleep(0.5)


# ---------------------------------------------------------------- nothing is wrong


def trainer(**more: Any) -> Any:
    """Transformers' Trainer on a small model."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": [number] * 32, "labels": [number] * 32} for number in range(64)]
    settings = TrainingArguments(output_dir=str(OUT), max_steps=8, per_device_train_batch_size=4, logging_steps=1,
                                 report_to="none", **more)  # fmt: skip
    return Trainer(small_model(), settings, train_dataset=rows, eval_dataset=rows)


def healthy_trainer() -> None:
    """Train, evaluate, save."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    running = trainer()
    print(running.train().metrics)
    print(running.evaluate())
    running.save_model()


def healthy_noise() -> None:
    """Warnings, an error that is caught and tried again, and a good end."""
    import logging

    import torch

    logging.basicConfig(level=logging.INFO)
    warnings.warn("find_unused_parameters=True was specified, but no unused parameter was found", stacklevel=1)
    try:
        __import__("flash_attn")
    except ImportError as error:
        logging.getLogger("model").warning("flash_attn is not installed (%s), sdpa is used", error)
    for attempt in (1, 2):
        try:
            if attempt == 1:
                raise ConnectionResetError(104, "Connection reset by peer")
        except OSError as error:
            logging.getLogger("data").warning("reading shard 3 failed (%s), trying again", error)
    model = torch.nn.Linear(8, 1)
    for step in range(1, 9):
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        print(f"step {step}/8 loss {loss.item():.3f} grad_norm 0.7", flush=True)
    print("training finished in 0.1 s", flush=True)


def healthy_workers() -> None:
    """Data loader workers, a saved and reloaded model."""
    import torch
    from torch.utils.data import DataLoader

    OUT.mkdir(exist_ok=True)
    for step, batch in enumerate(DataLoader([torch.zeros(64) for _ in range(16)], batch_size=4, num_workers=2), 1):
        print(f"step {step}/4 loss {batch.mean().item():.3f}", flush=True)
    torch.save({"weight": torch.zeros(8)}, OUT / "model.pt")
    torch.load(OUT / "model.pt")
    print(f"Model saved to {OUT / 'model.pt'}", flush=True)
