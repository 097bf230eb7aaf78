"""The smoke request: one chat completion, and what it proves of template, policy, adapter and answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

QUESTION = "Write a haiku about multi-GPU training."
MAX_TOKENS = 64
SWITCH = {True: "/think", False: "/no_think"}
NOISE_FACTOR = 10.0
NOISE_FLOOR = 1e-5
"""In log-probability: below what one step of fp32 rounding moves in a vocabulary's softmax."""

Post = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Path and JSON body -> JSON answer."""


def messages(thinking: bool, style: str | None) -> list[dict[str, str]]:
    """The conversation; where thinking is switched in a message, a system message does it."""
    asked = [{"role": "user", "content": QUESTION}]
    return [{"role": "system", "content": SWITCH[thinking]}, *asked] if style == "message" else asked


def rendered(post: Post, model: str, chat: list[dict[str, str]]) -> tuple[list[int], str]:
    """Token ids and text of the prompt as the server makes it of `chat`, with its own default template arguments."""
    tokens = post("/tokenize", {"model": model, "messages": chat, "add_generation_prompt": True})["tokens"]
    return tokens, str(post("/detokenize", {"model": model, "tokens": tokens})["prompt"])


def thinking_obeyed(prompt: str, thinking: bool) -> bool:
    """Does the prompt end as the policy wants: on with an open `<think>`, off with a closed one."""
    return prompt.rstrip().endswith("<think>" if thinking else "</think>")


def well_formed(answer: dict[str, Any]) -> bool:
    """Has the answer the shape of an OpenAI chat completion with one finished choice."""
    choices = answer.get("choices")
    if answer.get("object") != "chat.completion" or not isinstance(choices, list) or len(choices) != 1:
        return False
    message = choices[0].get("message") or {}
    texts = (message.get("content"), message.get("reasoning"), message.get("reasoning_content"))
    has_text = all(text is None or isinstance(text, str) for text in texts) and any(text is not None for text in texts)
    return message.get("role") == "assistant" and has_text and choices[0].get("finish_reason") in ("stop", "length")


def generated_tokens(answer: dict[str, Any]) -> int:
    """Tokens that the server says it generated."""
    return int((answer.get("usage") or {}).get("completion_tokens") or 0)


def text_of(answer: dict[str, Any]) -> str:
    """Reasoning and content of the answer, whichever there is."""
    message = (answer.get("choices") or [{}])[0].get("message") or {}
    parts = (message.get("reasoning") or message.get("reasoning_content"), message.get("content"))
    return "\n".join(part for part in parts if part)[:2000]


def ask(post: Post, model: str, chat: list[dict[str, str]], max_tokens: int) -> tuple[dict[str, Any], float]:
    """The answer and its latency in seconds."""
    began = time.monotonic()
    body = {"model": model, "messages": chat, "max_tokens": max_tokens, "temperature": 0.0}
    return post("/v1/chat/completions", body), time.monotonic() - began


def prompt_logprobs(post: Post, model: str, tokens: list[int]) -> list[float]:
    """The log-probability of every prompt token but the first."""
    body = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    entries = post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
    pairs = zip(tokens[1:], entries[1:], strict=True)
    return [float(entry[str(token)]["logprob"]) for token, entry in pairs]


def largest_difference(left: list[float], right: list[float]) -> float:
    """The largest absolute difference between two lists of equal length."""
    return max((abs(a - b) for a, b in zip(left, right, strict=True)), default=0.0)


def differs(from_base: float, noise: float) -> bool:
    """Is a difference in log-probability more than the same request asked twice shows."""
    return from_base > max(NOISE_FACTOR * noise, NOISE_FLOOR)


def compare(post: Post, adapter: str, base: str, tokens: list[int]) -> tuple[float, float]:
    """Largest difference of the adapter's log-probabilities from the base's, and of the base's from themselves."""
    first, again = (prompt_logprobs(post, base, tokens) for _ in range(2))
    return largest_difference(prompt_logprobs(post, adapter, tokens), first), largest_difference(first, again)


def judge(answer: dict[str, Any], latency_s: float, prompt: str, thinking: bool) -> dict[str, Any]:
    """The fields of `schema.Smoke`; `ok` where every check holds."""
    checks = {
        "json_well_formed": well_formed(answer),
        "thinking_obeyed": thinking_obeyed(prompt, thinking),
        "tokens_generated": generated_tokens(answer) > 0,
    }
    return {
        "ok": all(checks.values()),
        "latency_s": latency_s,
        "generated_tokens": generated_tokens(answer),
        "text": text_of(answer),
        "checks": checks,
    }


def with_check(result: dict[str, Any], name: str, held: bool) -> dict[str, Any]:
    """`result` with one more check."""
    return {**result, "ok": result["ok"] and held, "checks": {**result["checks"], name: held}}
