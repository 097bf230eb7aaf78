"""Secrets and terminal control never pass; ordinary log text does."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.scrub import MASK, scrub

SECRET = "q9Zx7Lw2Rt5Vb8Nm3Kp6"


@pytest.mark.parametrize(
    "line",
    [
        f"HF_TOKEN={SECRET}",
        f"export HF_TOKEN='{SECRET}'",
        f"env: {{'HF_TOKEN': '{SECRET}', 'HOME': '/root'}}",
        f'{{"hub_token": "{SECRET}", "x": 1}}',
        f'{{"message": "{{\\"api_key\\": \\"{SECRET}\\"}}"}}',
        f"AWS_SECRET_ACCESS_KEY = {SECRET}",
        f"WANDB_API_KEY={SECRET} python train.py",
        f"password={SECRET}",
        f"password = '{SECRET}",
        f"db_password: {SECRET}, host: a",
        f"client(api_key={SECRET}, timeout=3)",
        f"machine api.wandb.ai login user password {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"authorization: Basic {SECRET}==",
        f"curl -H 'Authorization: token {SECRET}' https://x",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f"huggingface-cli login --token {SECRET}",
        f"https://user:{SECRET}@host.example/path",
        f"https://user:p@{SECRET}@host.example/path",
        f"fatal: could not read from https://{SECRET}@git.example/a.git",
        f"GET /x?token={SECRET}&page=2",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END",
        f"nvapi-{SECRET}",
        f"ghp_{SECRET}{SECRET}",
        f"hf_{SECRET}",
        f"hf_\x1b[1m{SECRET}",
    ],
)
def test_a_secret_is_masked(line: str) -> None:
    found = scrub(line)
    assert SECRET not in found
    assert MASK in found


def test_access_keys_of_a_known_shape_are_masked_without_a_name() -> None:
    assert scrub("AKIA" + "ABCDEFGH12345678") == MASK
    assert "0123" not in scrub("wandb: logged in with " + "0123456789" * 4)


@pytest.mark.parametrize(
    "line",
    [
        "tokens: 4096, padded_tokens: 4096, tokens_per_s=1234.5",
        "the tokenizer has eos_token='<|im_end|>' and pad_token='<|pad|>'",
        "KeyError: 'token'",
        "json.decoder.JSONDecodeError: unexpected token: '<'",
        "commit 0123456789abcdef0123456789abcdef01234567",
        'File "/usr/lib/python3/site-packages/x.py", line 3, in key',
        "https://huggingface.co/nvidia/model and http://[::1]:8000/v1",
        "max_tokens=12 key: 7 password must be set",
        "Größe 3 GiB → fine\tnext",
        "a\nb\n\nc\n",
    ],
)
def test_ordinary_text_passes_unchanged(line: str) -> None:
    assert scrub(line) == line


def test_terminal_control_goes_and_lines_stay() -> None:
    assert scrub("\x1b[1;31mred\x1b[0m\r\nnext \x1b]0;title\x07\x00\x9b\u202eend") == "red\nnext end"
    assert scrub("10%\r20%") == "10% 20%"


PIECES = st.sampled_from(
    ["hf_", "TOKEN=", "_key", ": ", "=", "'", '"', "\\", "\\\"", "Bearer ", "authorization", "password ", "://", "@",
     ":", "wandb", "a" * 20, "0" * 40, "AKIA", "eyJ", ".", ",", ";", ")", " ", "\n", "\r", "\x1b", "[", "0m", MASK,
     "-----BEGIN PRIVATE KEY-----", "\ud800", "é", "&", "secret", "token", "/"]
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(PIECES, max_size=25).map("".join)))
@example("\x1b\x1b[0m[31m")
def test_scrubbing_twice_is_scrubbing_once(text: str) -> None:
    once = scrub(text)
    assert scrub(once) == once
    assert once.count("\n") == text.count("\n")
    once.encode("utf-8")


@pytest.mark.parametrize(
    "unit",
    ["A", " ", "TOKEN=", 'KEY="', "KEY='", "_key=,", "://", "://a:", "wandb", "\x1b]", "\x1b[0", "bearer ", "eyJa.",
     "\\", '\\"', ",;)", "-----BEGIN PRIVATE KEY-----", "\r", "hf_", "AKIA"],
)  # fmt: skip
def test_a_hostile_line_costs_linear_time(unit: str) -> None:
    def cost(size: int) -> float:
        line = "KEY=" + unit * (size // len(unit))
        began = time.perf_counter()
        scrub(line)
        return time.perf_counter() - began

    small = min(cost(60_000) for _ in range(3))
    large = cost(600_000)
    # Ten times the text; quadratic time would take a hundred times as long.
    assert large < 40 * max(small, 0.002)
