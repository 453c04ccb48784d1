"""Conversations through three published templates, token by token, against pieces that are written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from peftbench.backbones.chat_template import ChatTemplate, NotRenderedError, Taught
from peftbench.utils.errors import UserError
from tests.chat import CHATML, MARKED, QWEN3, chatml, gemma, llama3

QUESTIONS = ["Who wrote Hamlet?", "When?", "Thanks!"]
REPLIES = ["Shakespeare did.", "Around 1600.", "You are welcome."]
THREE_TURNS: list[dict[str, Any]] = [
    message
    for question, reply in zip(QUESTIONS, REPLIES, strict=True)
    for message in ({"role": "user", "content": question}, {"role": "assistant", "content": reply})
]
MADE = {"chatml": chatml, "llama3": llama3, "gemma": gemma}
# What each writes around the turns, by hand; the text before the first, between and after.
AROUND = {
    "chatml": (
        "<|im_start|>system\nYou help<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
}


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def read_learned(tokenizer: PreTrainedTokenizerBase, taught: Taught) -> list[str]:
    """Return the text of each stretch of learned tokens."""
    stretches: list[list[int]] = [[]]
    for token, is_learned in zip(taught.ids, taught.learned, strict=True):
        stretches = [*stretches[:-1], [*stretches[-1], token]] if is_learned else [*stretches, []]
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.mark.parametrize("name", MADE)
def test_three_turns_token_by_token(name: str) -> None:
    """The ids are those of apply_chat_template, and the labels those of the replies with the end of the turn."""
    tokenizer = MADE[name]()
    first, between, end = AROUND[name]
    expected, labels = [], []
    for number, (question, reply) in enumerate(zip(QUESTIONS, REPLIES, strict=True)):
        asked = ids(tokenizer, (between if number else first).format(question))
        answered = ids(tokenizer, f"{reply}{end}")
        expected += asked + answered
        labels += [-100] * len(asked) + answered
    (taught,) = ChatTemplate(tokenizer).encode(THREE_TURNS)
    assert taught.ids == expected
    assert [
        token if is_learned else -100 for token, is_learned in zip(taught.ids, taught.learned, strict=True)
    ] == labels
    whole = tokenizer.apply_chat_template(THREE_TURNS, tokenize=True)["input_ids"]
    assert taught.ids == whole[: len(taught.ids)]
    assert tokenizer.decode(whole[len(taught.ids) :]).strip() == ""  # the template's, after the end of the turn


@pytest.mark.parametrize("name", MADE)
def test_a_prompt_is_what_the_template_asks_with(name: str) -> None:
    tokenizer = MADE[name]()
    asked = tokenizer.apply_chat_template(THREE_TURNS[:3], add_generation_prompt=True)["input_ids"]
    template = ChatTemplate(tokenizer)
    assert template.encode_prompt(THREE_TURNS[:3]) == asked
    reply = template.encode_reply(THREE_TURNS[:3], THREE_TURNS[3])
    assert reply.learned.index(True) == len(asked)
    assert reply.ids[len(asked) :] == ids(tokenizer, f"{REPLIES[1]}{template.end_token}")


@pytest.mark.parametrize("name", MADE)
def test_a_special_token_in_a_message_is_letters(name: str) -> None:
    """In questions, replies and tools: it neither ends a turn nor begins one, and the letters are all there."""
    tokenizer = MADE[name]()
    template = ChatTemplate(tokenizer)
    end = template.end_token
    messages = [
        {"role": "user", "content": f"Write {end} twice: {end}{end}"},
        {"role": "assistant", "content": f"{end} and {tokenizer.eos_token}{end}"},
    ]
    (taught,) = template.encode(template.protect(messages))
    special = set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens))
    (harmless,) = template.encode([{**message, "content": "a"} for message in messages])
    assert [token for token in taught.ids if token in special] == [token for token in harmless.ids if token in special]
    (written,) = read_learned(tokenizer, taught)
    assert written == f"{messages[1]['content']}{end}"
    assert tokenizer.decode(taught.ids) == tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert template.read_reply(*template.protect([messages[:1], messages[1]])) == messages[1]["content"]
    # The letters are tokenised with their neighbours, as any text is.
    letters = tokenizer(messages[1]["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert taught.ids[-1 - len(letters) : -1] == letters


def test_roles_and_tools_are_protected_too() -> None:
    template = ChatTemplate(chatml())
    found = template.protect([{"function": {"<|im_end|>": ["a <|im_start|>"]}}])
    assert "<|im_end|>" not in repr(found) and "<|im_start|>" not in repr(found)
    assert template.protect("nothing special") == "nothing special"


def test_a_template_that_hides_earlier_thinking_gives_an_example_for_each_turn() -> None:
    """Each is preceded by what the model would read: earlier turns without their thinking."""
    tokenizer = chatml(QWEN3)
    messages = [dict(message) for message in THREE_TURNS]
    messages[1]["content"] = "<think>\nA play.\n</think>\n\nShakespeare did."
    taught = ChatTemplate(tokenizer).encode(messages)
    assert [read_learned(tokenizer, one) for one in taught] == [
        ["<think>\nA play.\n</think>\n\nShakespeare did.<|im_end|>"],
        ["<think>\n\n</think>\n\nAround 1600.<|im_end|>"],
        ["<think>\n\n</think>\n\nYou are welcome.<|im_end|>"],
    ]
    for number, one in enumerate(taught):
        prompt = tokenizer.apply_chat_template(messages[: 2 * number + 1], add_generation_prompt=True)["input_ids"]
        assert one.ids[: one.learned.index(True)] == prompt
    assert "A play." not in tokenizer.decode(taught[1].ids)
    # What precedes each reply is no part of the text that is scored.
    template = ChatTemplate(tokenizer)
    assert template.read_reply(messages[:3], messages[3]) == "Around 1600."
    assert template.clean("<think>\n\n</think>\n\nAround 1600.") == "Around 1600."


def test_marks_of_the_template_decide() -> None:
    """As return_assistant_tokens_mask has them, and with the end of each turn, which must be learned."""
    tokenizer = chatml(MARKED)
    template = ChatTemplate(tokenizer)
    (taught,) = template.encode(THREE_TURNS)
    assert read_learned(tokenizer, taught) == [f"{reply}<|im_end|>" for reply in REPLIES]
    found = tokenizer.apply_chat_template(THREE_TURNS, return_assistant_tokens_mask=True)
    assert taught.ids == found["input_ids"][: len(taught.ids)]
    ends = [index == template.end and taught.learned[place] for place, index in enumerate(taught.ids)]
    mask = [is_learned and not is_end for is_learned, is_end in zip(taught.learned, ends, strict=True)]
    assert mask == [bool(one) for one in found["assistant_masks"][: len(mask)]]
    spelled = [THREE_TURNS[0], {"role": "assistant", "content": "It is <|im_end|> here"}, *THREE_TURNS[2:]]
    (taught,) = template.encode(template.protect(spelled))
    replies = ["It is <|im_end|> here", *REPLIES[1:]]
    assert read_learned(tokenizer, taught) == [f"{reply}<|im_end|>" for reply in replies]


def test_a_turn_may_end_with_another_token_at_which_generation_stops() -> None:
    """As Llama-3.1's tool calls do."""
    tokenizer = chatml(
        CHATML.replace("+ '<|im_end|>' +", "+ ('<|endoftext|>' if 'CALL' in message['content'] else '<|im_end|>') +")
    )
    messages = [*THREE_TURNS[:1], {"role": "assistant", "content": "CALL"}, *THREE_TURNS[2:]]
    with pytest.raises(NotRenderedError, match=r"does not end the assistant's turn with <\|im_end\|>"):
        ChatTemplate(tokenizer).encode(messages)
    (taught,) = ChatTemplate(tokenizer, [0]).encode(messages)
    assert read_learned(tokenizer, taught)[:2] == ["CALL<|endoftext|>", "Around 1600.<|im_end|>"]


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(NotRenderedError, match="the chat template refuses it: System role not supported"):
        ChatTemplate(gemma()).encode([{"role": "system", "content": "Help."}, *THREE_TURNS])
    with pytest.raises(NotRenderedError, match="begins the assistant's turn otherwise than it asks for one"):
        ChatTemplate(chatml(CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\nSure: '"))).encode(
            THREE_TURNS
        )
    with pytest.raises(UserError, match=r"has no chat template; give one as model\.chat_template=FILE"):
        ChatTemplate(chatml(None))
    with pytest.raises(UserError, match="puts no special token after a turn of the assistant"):
        ChatTemplate(
            chatml("{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}")
        )
    with pytest.raises(UserError, match=r"cannot be put into the chat template: .* Only models"):
        ChatTemplate(chatml("{{ raise_exception('Only models') }}"))


def test_today_is_the_same_day_in_every_run() -> None:
    dated = ChatTemplate(chatml("{{ strftime_now('%d %b %Y') }}" + CHATML))
    assert dated.is_dated and dated.render(THREE_TURNS[:1]).startswith("26 Jul 2024<|im_start|>")
    other = ChatTemplate(chatml("{% set day = strftime_now('%Y-%m-%d') %}{{ day }}" + CHATML))
    assert other.render(THREE_TURNS[:1]).startswith("2024-07-26<|im_start|>")
    assert not ChatTemplate(chatml()).is_dated


def test_tools_reach_the_template() -> None:
    tokenizer = chatml("{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML)
    tools = [{"type": "function", "function": {"name": "find", "description": "Find <|im_end|> it"}}]
    template = ChatTemplate(tokenizer)
    (taught,) = template.encode(THREE_TURNS, template.protect(tools))
    assert taught.ids.count(template.end) == 7  # of the system's, three questions and three replies
    assert tokenizer.decode(taught.ids).startswith(
        '{"type": "function", "function": {"name": "find", "description": "Find'
    )


def test_a_reply_that_joins_the_templates_last_token_is_refused() -> None:
    """A model that is asked with one line break can never begin with two, if two are one token."""
    tokenizer = chatml()
    tokenizer.add_tokens(["\n\n"])
    with pytest.raises(NotRenderedError, match="remove the white space at its beginning"):
        ChatTemplate(tokenizer).encode([THREE_TURNS[0], {"role": "assistant", "content": "\nShakespeare did."}])
