"""vLLM servers of a tiny model without weights, which cannot start or lose a worker."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

from harness.payload.drills.deed import done, intend

OUT = Path("out")
POLL_S = 0.5


def small_cache() -> None:
    """A vLLM server whose cache holds no request of the length that it shall serve."""
    serve("--max-model-len", "1000000")


def unknown_parser() -> None:
    """A vLLM server with a reasoning parser that it does not have."""
    serve("--reasoning-parser", "nano_v9")


def crowded() -> None:
    """A vLLM server on a GPU whose memory another process holds."""
    serve("--max-model-len", "1024")


def worker_killed() -> None:
    """A vLLM server over two workers, of which the second is killed once the server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    intend("the server ended before one of its workers could be killed")
    threading.Thread(target=_kill_worker, args=(port,), daemon=True).start()
    serve("--tensor-parallel-size", "2", "--max-model-len", "1024", "--max-num-seqs", "4", port=port)
    sys.exit(1)  # the server itself may end with 0


def _kill_worker(port: int) -> None:
    """SIGKILL for the second worker, as soon as the server says that it is well."""
    while not _well(port):
        time.sleep(POLL_S)
    for worker in _processes("Worker_TP1"):
        done()
        os.kill(worker, signal.SIGKILL)


def _well(port: int) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as said:
        return int(said.status) == 200
    return False


def _processes(title: str) -> list[int]:
    """Those of this session whose title ends so: other servers on this machine have workers too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            if words.endswith(title) and os.getsid(int(folder.name)) == os.getsid(0):
                found.append(int(folder.name))
    return found


def serve(*more: str, port: int = 0) -> None:
    """Run vLLM's server in this process."""
    _save_model()
    memory = [] if os.environ.get("DRILL_DEVICE") == "cpu" else ["--kv-cache-memory-bytes", "268435456"]
    sys.argv = ["api_server", "--model", str(OUT), "--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager",
                "--port", f"{port}", *memory, *more]  # fmt: skip
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def _save_model() -> None:
    """The configuration and the tokenizer of a tiny model."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=256,
                num_key_value_heads=4, max_position_embeddings=2_000_000,
                architectures=["LlamaForCausalLM"]).save_pretrained(OUT)  # fmt: skip
    words = {chr(33 + number): number for number in range(90)}
    words |= {f"<{number}>": number for number in range(90, 256)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="!")), eos_token="!",
                            unk_token="!").save_pretrained(OUT)  # fmt: skip
