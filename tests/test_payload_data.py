"""Training data and chat templates: what is refused, what a sample looks like, who switches thinking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from harness.payload import data
from harness.payload.tokenizer import WORDS, chat_template_text, special_tokens

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def jsonl(folder: Path, *rows: Any) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


# ---------------------------------------------------------------- what is refused


def test_good_lines_are_read_and_blank_ones_skipped(tmp_path: Path) -> None:
    assert data.read_conversations(jsonl(tmp_path, GOOD, "", GOOD)) == [GOOD["messages"]] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"messages": [', "broken JSON"),
        ("[1, 2]", "no `messages`"),
        ({"text": "a"}, "no `messages`"),
        ({"messages": []}, "no `messages`"),
        (turns(("user", "a"), ("bot", "b")), "turn 2: role 'bot' is none of system, user, assistant, tool"),
        (turns(("user", "  "), ("assistant", "b")), "turn 1: the user turn is empty"),
        (turns(("user", "a"), ("assistant", None)), "turn 2: the assistant turn is empty"),
        (turns(("user", "a"), ("system", "s"), ("assistant", "b")), "turn 2: a system turn must be the first"),
        (turns(("assistant", "b")), "no user turn"),
        (turns(("user", "a")), "the last turn is `user`"),
        ({"messages": ["a"]}, "turn 1: not an object"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, row: Any, said: str) -> None:
    path = jsonl(tmp_path, GOOD, row, GOOD)
    with pytest.raises(data.DataError) as caught:
        data.read_conversations(path)
    assert f"{path}, line 2" in str(caught.value)
    assert said in str(caught.value)


def test_a_file_without_a_conversation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="holds no conversation"):
        data.read_conversations(jsonl(tmp_path, ""))


def test_a_tool_call_may_come_without_text(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    row = {"messages": [GOOD["messages"][0], call, {"role": "tool", "content": "1"}, GOOD["messages"][1]]}
    assert len(data.read_conversations(jsonl(tmp_path, row))[0]) == 4


# ---------------------------------------------------------------- synthetic samples


def test_synthetic_conversations_are_valid_and_have_structure(tmp_path: Path) -> None:
    made = data.synthetic_conversations(7, 40, thinking=True)
    rows = [{"messages": messages} for messages in made]
    assert data.read_conversations(jsonl(tmp_path, *rows)) == made
    words = made[3][1]["content"].split("</think>\n")[1].split()
    assert words[0] == WORDS[3]
    assert words[len(WORDS) :] == words[: 40 - len(WORDS)]
    assert len(words) == 40


def test_a_trace_is_written_only_where_thinking_is_on() -> None:
    texts = {on: data.synthetic_conversations(1, 9, on)[0][1]["content"] for on in (True, False)}
    assert texts[True].startswith("<think>\n")
    assert "think" not in texts[False]


class _WordTokenizer:
    """Ids are word numbers; enough of a tokenizer for `samples`."""

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, **_: Any) -> str:
        assert tokenize is False
        return " ".join(message["content"] for message in messages)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert add_special_tokens is False
        return {"input_ids": list(range(len(text.split())))}


def test_synthetic_samples_have_exactly_the_length_asked() -> None:
    case = {"seq_len": 33, "thinking": True}
    rows, texts = data.samples(_WordTokenizer(), case, "message", None, 250)
    assert {len(row) for row in rows} == {33}
    assert (len(rows), len(texts)) == (250, 5)


def test_own_samples_go_round_and_are_cut_at_the_length_asked() -> None:
    own = [GOOD["messages"], turns(("user", "a " * 50), ("assistant", "b"))["messages"]]
    rows, texts = data.samples(_WordTokenizer(), {"seq_len": 8, "thinking": False}, "template_kwarg", own, 5)
    assert [len(row) for row in rows] == [2, 8, 2, 8, 2]
    assert len(texts) == 2


# ---------------------------------------------------------------- the thinking policy and the templates


def rendered(template: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps  # transformers' own: Jinja's would escape for HTML
    return environment.from_string(chat_template_text(template)).render(messages=messages, **arguments)


HISTORY = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>\nold thought\n</think>\nfirst"},
    {"role": "user", "content": "two"},
]


def asked(template: str, thinking: bool, messages: list[dict[str, Any]] = HISTORY) -> str:
    switch = "message" if template == "nemotron_v2" else "template_kwarg"
    policy, arguments = data.with_policy(messages, thinking, switch)
    return rendered(template, policy, add_generation_prompt=True, **arguments)


@pytest.mark.parametrize("template", ["chatml", "nemotron_v2"])
def test_the_switch_decides_how_an_answer_begins(template: str) -> None:
    assert asked(template, True).endswith("<think>\n")
    assert asked(template, False).endswith("<think></think>")


@pytest.mark.parametrize("template", ["chatml", "nemotron_v2"])
def test_thinking_is_on_unless_switched_off(template: str) -> None:
    assert rendered(template, HISTORY, add_generation_prompt=True).endswith("<think>\n")


@pytest.mark.parametrize("template", ["chatml", "nemotron_v2"])
def test_an_earlier_trace_is_cut_and_the_last_one_kept(template: str) -> None:
    answered = [*HISTORY, {"role": "assistant", "content": "<think>\nnew thought\n</think>\nsecond"}]
    text = rendered(template, answered)
    assert "old thought" not in text
    assert "first" in text
    assert "<think>\nnew thought\n</think>\nsecond" in text


@pytest.mark.parametrize("template", ["chatml", "nemotron_v2"])
def test_an_answer_without_a_trace_says_so(template: str) -> None:
    assert "<think></think>b" in rendered(template, GOOD["messages"])


def test_chatml_keeps_earlier_traces_on_request() -> None:
    assert "old thought" in rendered("chatml", HISTORY, truncate_history_thinking=False)


def test_v2_obeys_the_last_switch_and_hides_it_from_the_model() -> None:
    messages = [{"role": "system", "content": "be brief /no_think"}, {"role": "user", "content": "a /think"}]
    text = rendered("nemotron_v2", messages, add_generation_prompt=True)
    assert text == "<SPECIAL_10>System\nbe brief\n<SPECIAL_11>User\na\n<SPECIAL_11>Assistant\n<think>\n"


def test_the_policy_joins_a_system_turn_that_is_there() -> None:
    messages = [{"role": "system", "content": "be brief"}, *GOOD["messages"]]
    changed, arguments = data.with_policy(messages, False, "message")
    assert (changed[0]["content"], len(changed), arguments) == ("be brief /no_think", 3, {})
    assert messages[0]["content"] == "be brief"


def test_whole_texts_of_a_tool_round() -> None:
    call = {"function": {"name": "add", "arguments": {"x": 1, "unit": "m"}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "2"}]  # fmt: skip
    assert rendered("chatml", messages) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think></think>\n<tool_call>\n<function=add>\n"
        "<parameter=x>\n1\n</parameter>\n<parameter=unit>\nm\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )
    v2 = rendered("nemotron_v2", messages, tools=[{"function": {"name": "add"}}])
    assert '<AVAILABLE_TOOLS>[{"name": "add"}]</AVAILABLE_TOOLS>' in v2
    assert '<TOOLCALL>[{"name": "add", "arguments": {"x": 1, "unit": "m"}}]</TOOLCALL>\n<SPECIAL_12>\n' in v2
    assert v2.endswith("<SPECIAL_11>User\n<TOOL_RESPONSE>[2]</TOOL_RESPONSE>\n")


@pytest.mark.parametrize("template", ["chatml", "nemotron_v2"])
def test_special_tokens_stand_at_the_ids_of_the_real_tokenizers(template: str) -> None:
    tokens = special_tokens(template)
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert (
        tokens[10:13]
        == {
            "chatml": ["<|im_start|>", "<|im_end|>", "<think>"],
            "nemotron_v2": ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"],
        }[template]
    )
    assert len(set(tokens)) == 16
