"""A tokenizer for cases without a checkpoint: byte-level BPE, trained in a second, as many ids as the model has.

Needs only `tokenizers` and `transformers`, so that the training and the serving environment build the same one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"
# fmt: off
WORDS = [
    "amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "ivory", "jade", "kite", "lotus",
    "maple", "nickel", "ocean", "pearl", "quartz", "river", "slate", "topaz", "umber", "violet", "willow", "zinc",
    "north", "south", "east", "west", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
]
# fmt: on
"""What synthetic samples are made of."""


def special_tokens(chat_template: str) -> list[str]:
    """The 16 lowest ids in order, as the real tokenizers place them (0 pads, 1 begins, 2 or 12 ends)."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{index}>" for index in range(3, 16))]
    if chat_template == "chatml":
        tokens[10:14] = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    return tokens


def chat_template_text(name: str) -> str:
    """The Jinja text of a template in `templates/`."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def build(variant: dict[str, Any]) -> Any:
    """A `PreTrainedTokenizerFast` with exactly `vocab_size` ids and the chat template of `variant`.

    Ids that training does not fill get printable stand-ins, so that any id that a random model emits decodes.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    specials = special_tokens(variant["chat_template"])
    size = int(variant["config"]["vocab_size"])
    end = "<SPECIAL_12>" if variant["chat_template"] == "nemotron_v2" else "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_filled(_trained(specials, size), size)),
        bos_token="<s>",
        eos_token=end,
        pad_token="<unk>",
        unk_token="<unk>",
        model_max_length=int(variant["config"]["max_position_embeddings"]),
    )
    tokenizer.chat_template = chat_template_text(variant["chat_template"])
    return tokenizer


def _trained(specials: list[str], size: int) -> dict[str, Any]:
    """A byte-level BPE of at most `size` ids, as the content of its tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size < len(specials) + 256:
        raise ValueError(f"a vocabulary of {size} ids is too small: {len(specials) + 256} are bytes and special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, 1024),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [f" {word} {word.capitalize()} {word}. {word}\n" for word in WORDS]
    corpus += ["System User Assistant Continue: /think /no_think every word repeats. Answer in JSON.\n"]
    tokenizer.train_from_iterator(corpus * 4, trainer)
    return json.loads(tokenizer.to_str())


def _filled(content: dict[str, Any], size: int) -> str:
    """`content` with stand-ins for the ids up to `size`; "Ġ" is a leading space in byte-level spelling."""
    vocabulary = content["model"]["vocab"]
    for index in range(len(vocabulary), size):
        vocabulary[f"Ġx{index}"] = index
    return json.dumps(content)
