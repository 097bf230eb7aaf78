"""Takes secrets and terminal control out of text that a log, a library or a person wrote. Standard library only.

Every pattern begins at a literal and then only runs over characters, without a choice to go back on, so that a hostile
line of any length costs linear time. Newlines stay, so that line numbers hold.
"""

from __future__ import annotations

import re

MASK = "***"

_CONTROL = re.compile(
    r"\x1b\[[0-?]{0,64}[ -/]{0,8}[@-~]"  # CSI: colours, cursor
    r"|\x1b\][^\x07\x1b\n]{0,4096}(?:\x07|\x1b\\)"  # OSC: titles, links
    r"|\x1b[()][0-9A-B]"  # character sets
    r"|\r(?=\n)"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)

_QUOTED = r"(?P<quote>\\?[\"'])(?:(?!(?P=quote))(?:\\[^\n]|[^\n\\]))++"
_BARE = r"(?:[^\s\"'&\\,;)\]}]|[,;)\]}](?=[^\s\"'&\\]))++"
_SIGN = r"\\?[\"']?[ \t]{0,8}[=:][ \t]{0,8}"
# Names of tokens that are words of a tokenizer, not secrets.
_NO_TOKENIZER = "".join(rf"(?<!{name})" for name in ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "image"))

_NAMED = re.compile(
    rf"(?P<name>{_NO_TOKENIZER}(?:_token|_key|-token|-key|apikey|secret|password|passwd|passphrase|authorization)"
    rf"{_SIGN}(?:\\?[\"']?(?:bearer|basic|token)[ \t]{{1,8}})?)"
    rf"(?:{_QUOTED}|(?P<bare>{_BARE}))",
    re.IGNORECASE,
)
_SHORT_NAMED = re.compile(
    r"(?P<name>\b(?:token|key)(?:\\?[\"']?[=:][ \t]{0,8}|[ \t]{1,8})\\?[\"']?|\bbearer[ \t]{1,8}|\bpassword[ \t]{1,8})"
    r"[A-Za-z0-9_\-.+/=~]{16,}+",
    re.IGNORECASE,
)
_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf_|nvapi-|ghp_|gho_|ghs_|github_pat_|glpat-|wandb_v1_|xoxb-|xoxp-)[A-Za-z0-9_\-]{10,}+"
    r"|sk-[A-Za-z0-9_\-]{20,}+|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])"
    r"|eyJ[A-Za-z0-9_\-]{10,}+\.[A-Za-z0-9_\-.]{10,}+)"
)
_WANDB = re.compile(r"(?P<name>wandb[^\n]{0,40}?(?<![0-9a-f]))[0-9a-f]{40}(?![0-9a-f])", re.IGNORECASE)
_URL = re.compile(r"://[^\s/\"'<>]{1,1024}@")
_PEM = re.compile(r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----[A-Za-z0-9+/=\s\\]*+")


def _mask_named(match: re.Match[str]) -> str:
    """The name and the opening quote as they were, the value masked."""
    return f"{match['name']}{match['quote'] or ''}{MASK}"


def plain(text: str) -> str:
    """`text` without terminal control and characters that no file can hold; a lone carriage return becomes a space."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return _CONTROL.sub("", text).replace("\r", " ")


def scrub(text: str) -> str:
    """`text` with every secret masked and no terminal control; never raises, linear in its length."""
    text = plain(text)
    text = _PEM.sub(lambda key: MASK + "\n" * key[0].count("\n"), text)
    text = _URL.sub(f"://{MASK}@", text)
    text = _KNOWN.sub(MASK, text)
    text = _NAMED.sub(_mask_named, text)
    text = _SHORT_NAMED.sub(rf"\g<name>{MASK}", text)
    return _WANDB.sub(rf"\g<name>{MASK}", text)
