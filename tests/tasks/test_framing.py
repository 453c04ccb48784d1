"""Prompts around sources, against the tokenizer's own ids of the whole text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftbench.config.compose import compose_run
from peftbench.config.schema import EMBEDDED
from peftbench.tasks.framing import frame_sources
from peftbench.tasks.tokens import Encoder
from peftbench.utils.errors import UserError
from tests.families import build

MINI = EMBEDDED / "mini"


@pytest.fixture
def encoder() -> Encoder:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MINI)
    return Encoder(tokenizer, build("bart"))


def test_the_whole_is_tokenised_as_one_text_would_be(encoder: Encoder) -> None:
    texts = ["a long day", "two\nlines"]
    found = frame_sources(encoder, "Summary:\n\n{source}", texts, 60)
    assert found["input_ids"] == encoder.tokenizer([f"Summary:\n\n{text}" for text in texts])["input_ids"]
    assert [len(mask) for mask in found["attention_mask"]] == [len(ids) for ids in found["input_ids"]]
    assert frame_sources(encoder, "{source}", texts, 60)["input_ids"] == encoder(texts, max_length=60)["input_ids"]


def test_a_mask_is_the_mask_token_in_the_prompt_and_text_in_a_source(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    (ids,) = frame_sources(encoder, "{mask}\n\n{source} ({mask})", ["a <mask> day"], 60)["input_ids"]
    assert ids[1] == tokenizer.mask_token_id and ids.count(tokenizer.mask_token_id) == 2
    assert tokenizer.decode(ids) == "<s><mask>\n\na <mask> day (<mask>)</s>"
    assert ids[:1] == [tokenizer.bos_token_id] and ids[-1:] == [tokenizer.eos_token_id]


def test_a_source_is_cut_and_the_prompt_is_not(encoder: Encoder) -> None:
    (ids,) = frame_sources(encoder, "{mask}\n\n{source} in short:", ["word " * 100], 30)["input_ids"]
    assert len(ids) == 30
    text = encoder.tokenizer.decode(ids)
    assert text.startswith("<s><mask>\n\nword word") and text.endswith(" in short:</s>")


def test_what_cannot_be_framed_is_refused(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="leaves no room for a source in 6 tokens"):
        frame_sources(encoder, "a rather long prompt before {source}", ["text"], 6)
    maskless = SimpleNamespace(mask_token_id=None, name_or_path="some")
    with pytest.raises(UserError, match=r"task.prompt has \{mask\}, but the tokenizer of some has no mask token"):
        frame_sources(SimpleNamespace(tokenizer=maskless), "{mask} {source}", ["text"], 6)  # type: ignore[arg-type]  # all it reads


def test_a_typed_line_break_is_one() -> None:
    run = compose_run(["task=xsum", 'task.prompt="{mask}\\n\\n{source}"'])
    assert run.task.prompt == "{mask}\n\n{source}"
    run = compose_run(["task=xsum", 'task.prompt="<|im_start|>user\\n{source}<|im_end|>[SEP]"'])
    assert run.task.prompt == "<|im_start|>user\n{source}<|im_end|>[SEP]"
