"""Training samples: a user's conversations, checked line by line, or synthetic ones of an exact length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.payload.tokenizer import WORDS

ROLES = ("system", "user", "assistant", "tool")
SHOWN = 5
"""Samples rendered into the job directory."""

Messages = list[dict[str, Any]]


class DataError(Exception):
    """A line of the data file that cannot be trained on."""


def read_conversations(path: str) -> list[Messages]:
    """Every conversation of a JSONL file; raises DataError naming file and line at the first bad one."""
    found = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append(_conversation(f"{path}, line {number}", line))
    if not found:
        raise DataError(f"{path} holds no conversation: one JSON object with `messages` per line is needed")
    return found


def _conversation(place: str, line: str) -> Messages:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: broken JSON: {error}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: no `messages` list with at least one turn")
    for index, message in enumerate(messages, 1):
        _check_turn(f"{place}, turn {index}", index, message)
    if not any(message["role"] == "user" for message in messages):
        raise DataError(f"{place}: no user turn")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{place}: the last turn is `{messages[-1]['role']}`; an assistant turn must answer it")
    return messages


def _check_turn(place: str, index: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{place}: not an object with `role` and `content`")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{place}: role {role!r} is none of {', '.join(ROLES)}")
    if role == "system" and index > 1:
        raise DataError(f"{place}: a system turn must be the first")
    content = message.get("content")
    if role == "assistant" and message.get("tool_calls") and content in (None, ""):
        return
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{place}: the {role} turn is empty")


def synthetic_conversations(count: int, words: int, thinking: bool) -> list[Messages]:
    """`count` conversations whose answers walk round the word list: structure that a model learns in a few steps.

    `words` is the length of an answer in words; a trace is part of it where `thinking` is on.
    """
    return [_walk(start, words, thinking) for start in range(count)]


def _walk(start: int, words: int, thinking: bool) -> Messages:
    stride = 1 + start % 3
    walk = " ".join(WORDS[(start + stride * step) % len(WORDS)] for step in range(words))
    trace = f"<think>\nevery {WORDS[-10 + stride - 1]} word\n</think>\n" if thinking else ""
    question = f"Continue: {WORDS[start % len(WORDS)]}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": trace + walk}]


def with_policy(messages: Messages, thinking: bool, switch: str) -> tuple[Messages, dict[str, Any]]:
    """The conversation and the template arguments that carry the thinking policy, by the template's own switch.

    `switch` is `message` (`/think` or `/no_think` in the system turn) or `template_kwarg` (`enable_thinking`).
    """
    if switch == "template_kwarg":
        return messages, {"enable_thinking": thinking}
    word = "/think" if thinking else "/no_think"
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']} {word}"}, *messages[1:]], {}
    return [{"role": "system", "content": word}, *messages], {}


def render(tokenizer: Any, messages: Messages, thinking: bool, switch: str) -> str:
    """One conversation as the text that the model reads."""
    turns, arguments = with_policy(messages, thinking, switch)
    return tokenizer.apply_chat_template(turns, tokenize=False, **arguments)


def token_ids(tokenizer: Any, text: str, seq_len: int) -> list[int]:
    """At most the first `seq_len` ids of a rendered conversation; the template has placed its special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"][:seq_len]


def samples(tokenizer: Any, case: dict[str, Any], switch: str, conversations: list[Messages] | None, count: int) -> Any:
    """`count` samples as lists of ids, and the texts of the first: the user's, round and round, or synthetic ones.

    A synthetic sample has exactly `seq_len` ids, a user's at most as many.
    """
    seq_len, thinking = case["seq_len"], case["thinking"]
    if conversations is None:
        conversations = synthetic_conversations(min(count, 3 * len(WORDS)), seq_len, thinking)
    texts = [render(tokenizer, messages, thinking, switch) for messages in conversations[:count]]
    rows = [token_ids(tokenizer, text, seq_len) for text in texts]
    return [rows[index % len(rows)] for index in range(count)], texts[:SHOWN]


def write_samples(job_dir: Path, conversations: list[Messages], texts: list[str], policy: dict[str, Any]) -> None:
    """Leave the first samples in the job directory: samples.json (source, text, policy) and samples.txt."""
    shown = [{"messages": messages, "text": text} for messages, text in zip(conversations, texts, strict=False)]
    (job_dir / "samples.json").write_text(json.dumps({**policy, "samples": shown}, indent=1), encoding="utf-8")
    ruler = "\n" + "-" * 40 + "\n"
    (job_dir / "samples.txt").write_text(ruler.join(texts) + "\n", encoding="utf-8")
