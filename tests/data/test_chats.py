"""Promises of chats: what is learnt of one is what its assistants say, as it stands in the whole chat."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chainfed_ray.data.chats import chat
from chainfed_ray.data.messages import Chat, Message
from chainfed_ray.data.sources import ColumnSelection, Split, read_split
from chainfed_ray.data.targets import chat_ids, tokenize_texts
from chainfed_ray.errors import InvalidJob
from tests.causal import byte_tokenizer

Pieces = list[tuple[str, bool]]
"""What a template writes, piece by piece, and what of that is learnt."""

_EACH = "{% for m in messages %}"
_ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Take turns') }}{% endif %}"
_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_OPENED = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "llama-3": "{{ bos_token }}" + _EACH + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "llama-2": _EACH + _ALTERNATE + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "qwen2": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + _EACH + _CHATML + _OPENED,
    "qwen3": "{% set ns = namespace(last=-1) %}" + _EACH + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}" + _EACH + "{% if m.role == 'assistant' %}{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}{% endif %}<|im_end|>\n"
    "{% else %}" + _CHATML + "{% endif %}" + _OPENED,
    "gemma": "{{ bos_token }}" + _EACH + _ALTERNATE + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "mistral": "{{ bos_token }}" + _EACH + _ALTERNATE + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}",
}  # fmt: skip


def by_llama_3(said: str, last: bool) -> Pieces:
    return [("<|start_header_id|>assistant<|end_header_id|>\n\n", False), (f"{said.strip()}<|eot_id|>", True)]


def by_llama_2(said: str, last: bool) -> Pieces:
    return [(f" {said.strip()} </s>", True)]


def by_qwen2(said: str, last: bool) -> Pieces:
    return [("<|im_start|>assistant\n", False), (f"{said}<|im_end|>\n", True)]


def by_qwen3(said: str, last: bool) -> Pieces:
    thought = "<think>\n\n</think>\n\n" + said.lstrip("\n") if last else said
    return [("<|im_start|>assistant\n", False), (f"{thought}<|im_end|>\n", True)]


def by_gemma(said: str, last: bool) -> Pieces:
    return [("<start_of_turn>model\n", False), (f"{said.strip()}<end_of_turn>\n", True)]


def by_mistral(said: str, last: bool) -> Pieces:
    return [(f"{said}</s> ", True)]


ASKED: dict[str, tuple[str, str, Callable[[str], str], Callable[[str, bool], Pieces]]] = {
    "llama-3": ("<s>", "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>", str.strip, by_llama_3),
    "llama-2": ("", "<s>[INST] {} [/INST]", str.strip, by_llama_2),
    "qwen2": ("<|im_start|>system\nYou help.<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n", str, by_qwen2),
    "qwen3": ("", "<|im_start|>user\n{}<|im_end|>\n", str, by_qwen3),
    "gemma": ("<s>", "<start_of_turn>user\n{}<end_of_turn>\n", str.strip, by_gemma),
    "mistral": ("<s>", "[INST] {} [/INST]", str, by_mistral),
}
"""Of each form what a chat begins with, how it writes a question, what it makes of one's text, and how it writes an answer."""

words = st.lists(
    st.sampled_from(["\n", " ", "[INST]", "<|im_end|>", "assistant", "\ue000", "é🙂", "a", "user: "]) | st.text(max_size=3),
    min_size=1,
    max_size=4,
).map("".join).filter(lambda text: not {"<", ">", "/"} & set(text.replace("<|im_end|>", "")))  # fmt: skip
rounds = st.lists(st.tuples(words, words), min_size=1, max_size=3)


@cache
def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.add_tokens(
        ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"], special_tokens=True
    )
    tokenizer.chat_template = template
    return tokenizer


def as_chat(asked: list[tuple[str, str]]) -> Chat:
    return tuple(
        message for question, answer in asked for message in (Message("user", question), Message("assistant", answer))
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(asked=rounds)
def test_what_assistants_say_is_learnt_as_it_stands(form: str, asked: list[tuple[str, str]]) -> None:
    """Against the chat as it is put together by hand, token by token."""
    begin, question, cleaned, answered = ASKED[form]
    pieces: Pieces = [(begin, False)]
    for place, (words, said) in enumerate(asked, start=1):
        written = answered(said, place == len(asked))
        if not said.strip():
            written = [(piece, False) for piece, _ in written]
        pieces += [(question.format(cleaned(words)), False), *written]
    tokenizer = with_template(TEMPLATES[form])
    ids, targets = list[int](), list[bool]()
    for piece, wanted in pieces:
        tokens = tokenizer(piece)["input_ids"]
        ids += tokens
        targets += [wanted] * len(tokens)
    found = tokenize_texts(tokenizer, [as_chat(asked)], max_length=10_000)
    assert (
        found.ids.tolist() == ids == chat_ids(tokenizer, as_chat(asked), add_generation_prompt=False, field="messages")
    )
    assert found.targets is not None
    assert found.targets.tolist() == [False, *targets[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("form", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(asked=rounds.filter(lambda asked: all(said.strip() for _, said in asked)))
def test_where_messages_only_add_to_a_chat_a_turn_is_what_it_adds(form: str, asked: list[tuple[str, str]]) -> None:
    tokenizer, messages = with_template(TEMPLATES[form]), as_chat(asked)
    whole = chat_ids(tokenizer, messages, add_generation_prompt=False, field="messages")
    added = [False] * len(whole)
    for place in range(1, len(messages), 2):
        before = chat_ids(tokenizer, messages[:place], add_generation_prompt=True, field="messages")
        after = chat_ids(tokenizer, messages[: place + 1], add_generation_prompt=False, field="messages")
        if after[: len(before)] != before or whole[: len(after)] != after:
            assert form == "qwen3"
            assert len(asked) > 1
            return
        added[len(before) : len(after)] = [True] * (len(after) - len(before))
    found = tokenize_texts(tokenizer, [messages], max_length=10_000)
    assert found.targets is not None
    assert found.targets.tolist() == added


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            TEMPLATES["qwen3"],
            as_chat([("A", "<think>\nwhy\n</think>\n\nB"), ("C", "<think>\nso\n</think>\n\nD")]),
            "B<|im_end|>\n<think>\nso\n</think>\n\nD<|im_end|>\n",
        ),
        (  # the opening of the second answer is written after the first as if that were the last
            TEMPLATES["qwen3"],
            (Message("user", "A"), Message("assistant", "B"), Message("assistant", "C")),
            "B<|im_end|>\nC<|im_end|>\n",
        ),
        (
            _EACH + _CHATML + _OPENED,
            (Message("assistant", "Hello"), Message("user", "A"), Message("assistant", "B")),
            "Hello<|im_end|>\nB<|im_end|>\n",
        ),
        (_EACH + _CHATML + "{% endfor %}{{ eos_token }}", as_chat([("A", "B"), ("C", "D")]), "B<|im_end|>\nD<|im_end|>\n</s>"),
        (_EACH + _CHATML + _OPENED.replace("assistant\n", "assistant\n<think>\n"), as_chat([("A", "B")]), "B<|im_end|>\n"),
        (
            _EACH + "{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>"
            "{% endgeneration %}{{ '\n' }}{% else %}" + _CHATML + "{% endif %}" + _OPENED,
            as_chat([("A", "B"), ("C", "D")]),
            "B<|im_end|>\nD<|im_end|>\n",
        ),
    ],
    ids=["thoughts", "two answers", "a greeting", "an end of all", "an opened thought", "marks"],
)  # fmt: skip
def test_templates_that_do_more_than_add(template: str, messages: Chat, expected: str) -> None:
    tokenizer = with_template(template)
    examples = tokenize_texts(tokenizer, [messages], max_length=10_000)
    assert examples.ids.tolist() == chat_ids(tokenizer, messages, add_generation_prompt=False, field="messages")
    assert examples.targets is not None
    assert tokenizer.decode(examples.ids[examples.targets]) == expected


@pytest.mark.parametrize(
    "template",
    [
        _EACH + "{{ m.content }}\n{% endfor %}Once more: {{ messages[-1].content }}",
        "{{ messages[-1].content | length }} characters{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
    ],
)
def test_a_turn_whose_place_is_not_clear_is_refused(template: str) -> None:
    with pytest.raises(
        InvalidJob, match=r"data\.messages is 'assistant: A long one'; .* the place of this one is not clear"
    ):
        tokenize_texts(
            with_template(template), [(Message("user", "Q"), Message("assistant", "A long one"))], max_length=100
        )


USER, SAID = {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS}
TOOL = {"role": "tool", "content": "4 degrees"}
A, B = Message("user", "A"), Message("assistant", "B")


@pytest.mark.parametrize(
    ("template", "messages", "at_fault", "says"),
    [
        (_EACH + "{% if m.role == 'system' %}{{ raise_exception('No system') }}{% endif %}{{ m.content }}{% endfor %}",
         (Message("system", "Be brief"), A, B), "Be brief", "No system"),
        (TEMPLATES["gemma"], (A, B, B, A), "B", "Take turns"),
    ],
)  # fmt: skip
def test_a_chat_that_the_template_refuses_is_refused_by_the_message_at_fault(
    template: str, messages: Chat, at_fault: str, says: str
) -> None:
    words = (
        rf"data\.messages is .*'content': '{at_fault}'.*; expected a chat that the model's template accepts .*{says}"
    )
    with pytest.raises(InvalidJob, match=words):
        chat_ids(with_template(template), messages, add_generation_prompt=False, field="data.messages")


def test_and_by_its_row_in_the_source_also_when_others_were_held_out() -> None:
    chats = tuple((Message("user", f"Q{row}"), B, *((A, A) if row == 7 else ())) for row in range(1, 11))
    split = Split(chats, (), numbers=range(1, 11)).take(np.array([1, 4, 6, 9]))
    with pytest.raises(InvalidJob, match=r"Take turns\); this one is in row 7$"):
        tokenize_texts(with_template(TEMPLATES["gemma"]), split.texts, 100, numbers=split.numbers)


CALLED = Message("assistant", "", tool_calls=json.dumps(CALLS))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER, SAID], (A, B)),
        ([USER, SAID, USER], (A, B)),
        ([USER], ()),
        ([], ()),
        ([USER, CALL, TOOL, SAID], (A, CALLED, Message("tool", "4 degrees"), B)),
        ([USER, {**CALL, "content": ""}, SAID], (A, CALLED, B)),
        (
            [USER, CALL, {**TOOL, "name": "weather", "tool_call_id": "c1", "refusal": None, "audio": None}, SAID],
            (A, CALLED, Message("tool", "4 degrees", name="weather", tool_call_id="c1"), B),
        ),
        ([{"role": None, "from": "human", "content": None, "value": "A"}, SAID], (A, B)),
        ([USER, {"role": "assistant", "tool_calls": CALLS}, SAID], (A, CALLED, B)),
        ([USER, {**SAID, "weight": 0}, USER, {**SAID, "weight": 1}], (A, B._replace(learnt=False), A, B)),
        ([USER, {**SAID, "loss": False}, USER, {**SAID, "loss": True}], (A, B._replace(learnt=False), A, B)),
        ([USER, {**SAID, "train": False}, USER, {**SAID, "training": 1}], (A, B._replace(learnt=False), A, B)),
        ([USER, {**SAID, "loss": 0.31, "train": "B", "training": [], "masked": 2}], (A, B)),
        ([USER, {**SAID, "masked": True}, USER, {**SAID, "masked": None}], (A, B._replace(learnt=False), A, B)),
        ([{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}], (A, B)),
        ([{"role": "human", "content": "A"}, {"role": "Assistant", "content": "B"}], (A, B)),
        ([USER, {"role": "model", "content": "B"}], (A, B)),
        ([{"role": "user", "content": [{"type": "text", "text": "A"}]}, SAID], (A, B)),
    ],
)
def test_a_chat_is_kept_up_to_what_an_assistant_says_last(messages: list[dict[str, Any]], expected: Chat) -> None:
    for cell in (messages, json.dumps(messages)):
        assert chat(cell, "chat", "row 1") == expected


@pytest.mark.parametrize("cell", [None, "Hello", "{}", 3])
def test_what_is_no_chat_is_refused_by_its_row(cell: Any) -> None:
    with pytest.raises(InvalidJob, match=r"data\.messages is 'chat'; expected a list of messages .* row 7 of x holds"):
        chat(cell, "chat", "row 7 of x")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Hello", "a message with a role and a content"),
        ({"content": "A"}, "a message with a role, such as user or assistant"),
        ({"role": "user"}, "a content that is a text, or a call of a tool"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "a content that is a text, or a call of a tool"),
        ({"role": "user", "content": 3}, "a content that is a text, or a call of a tool"),
        ({**SAID, "weight": 0.5}, "whose weight is 0 or 1"),
        ({**SAID, "weight": "no"}, "whose weight is 0 or 1"),
        (
            {"role": "assistant", "content": "", "function_call": {"name": "f"}},
            "without function_call, which is not read",
        ),
        ({**SAID, "reasoning_content": "Hm."}, "without reasoning_content, which is not read"),
        ({**SAID, "value": "C"}, "with one of content and value"),
        ({**SAID, "tool_calls": "f()"}, "whose tool_calls are a list of objects"),
        ({**SAID, "tool_call_id": 7}, "whose tool_call_id is a text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "text parts alone, not of image_url"),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_place(message: Any, expected: str) -> None:
    with pytest.raises(
        InvalidJob, match=rf"data\.messages is 'chat'; expected .*{expected}; message 2 of row 7 of x is "
    ):
        chat([USER, message], "chat", "row 7 of x")


def test_a_message_of_no_weight_and_a_call_of_a_tool_are_read_and_not_learnt() -> None:
    """The template is given the call, and what follows it answers what is there."""
    written = _EACH + "{{ m.tool_call_id }}{{ m.content }}{% if m.tool_calls %}<call>{% endif %}|{% endfor %}"
    tokenizer = with_template(written)
    messages = (A, CALLED, Message("tool", "4", tool_call_id="c1: "), Message("assistant", "bad", learnt=False), B)
    examples = tokenize_texts(tokenizer, [messages], max_length=100)
    assert tokenizer.decode(examples.ids) == "A|<call>|c1: 4|bad|B|"
    assert examples.targets is not None
    assert tokenizer.decode(examples.ids[examples.targets]) == "B|"


_KNOWN_ROLES = _EACH + "{% if m.role in ('user', 'assistant') %}<{{ m.content | trim }}>{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        ((Message("developer", "Be brief"), A, B), "the content of message 1"),
        ((A, B, Message("tool", "4 degrees"), B), "the content of message 3"),
        ((A, CALLED, B), "the tool_calls of message 2"),
        ((Message("developer", "ok"), Message("user", "is it ok?"), B), "the content of message 1"),
        ((Message("developer", "ok"), Message("user", "ok"), B), "the content of message 1"),
        ((A, Message("tool", "<"), B), "the content of message 2"),
    ],
)
def test_a_message_that_the_template_leaves_out_is_an_error(messages: Chat, lost: str) -> None:
    with pytest.raises(
        InvalidJob, match=rf"that the template writes whole; it leaves out {lost}; this one is in row 7"
    ):
        tokenize_texts(with_template(_KNOWN_ROLES), [messages], max_length=100, numbers=[7])


def test_so_is_one_if_the_template_does_not_accept_other_words_in_all_places() -> None:
    wanted = "{% if 'key' not in messages | map(attribute='content') | join %}{{ raise_exception('No') }}{% endif %}"
    messages = (Message("developer", "ok"), Message("user", "is the key ok?"), B)
    with pytest.raises(InvalidJob, match="leaves out the content of message 1"):
        tokenize_texts(with_template(wanted + _KNOWN_ROLES), [messages], max_length=100)
    assert len(tokenize_texts(with_template(wanted + _KNOWN_ROLES), [messages[1:]], max_length=100)) == 1


def test_a_long_chat_is_written_twice_to_see_that_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, written = with_template(_KNOWN_ROLES), []
    write = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *given, **how: written.append(given) or write(*given, **how)
    )
    chat_ids(tokenizer, as_chat([("ok", "it is ok")] * 50), add_generation_prompt=True, field="messages")
    assert len(written) == 2


def test_and_one_that_a_served_model_is_to_answer() -> None:
    asked = (Message("developer", "Be brief"), A)
    with pytest.raises(InvalidJob, match=r"messages is 'developer: Be brief'; .* leaves out the content of message 1"):
        chat_ids(with_template(_KNOWN_ROLES), asked, add_generation_prompt=True, field="messages")


def test_a_message_that_is_written_in_another_form_is_not_left_out() -> None:
    tokenizer = with_template(_EACH + "<{{ m.content | tojson }}>{% endfor %}")
    assert (
        len(tokenize_texts(tokenizer, [(Message("tool", 'a "word"'), Message("assistant", "B"))], max_length=100)) == 1
    )


@pytest.mark.parametrize("nothing", [None, "", "[]", []])
@pytest.mark.parametrize("beside", ["tools", "functions", "system"])
def test_what_stands_beside_a_chat_is_an_error_and_an_empty_column_is_none(
    beside: str, nothing: Any, tmp_path: Path
) -> None:
    selection = ColumnSelection((("data.messages", "messages"),), None)
    rows = [{"messages": [USER, SAID], beside: nothing}] * 2
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert len(read_split("data.train", f"path:{file}", "train", selection)) == 2
    file.write_text("\n".join(map(json.dumps, [*rows, {"messages": [USER, SAID], beside: "Weather"}])))
    with pytest.raises(InvalidJob, match=rf"chats without {beside} beside them, which are not read; row 3 of path:"):
        read_split("data.train", f"path:{file}", "train", selection)
