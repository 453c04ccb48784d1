"""Which special tokens hold where a backbone's files name other ones."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import processors

from peftbench.backbones.special_tokens import Named, settle
from peftbench.tasks.tokens import Encoder
from peftbench.utils.errors import UserError
from tests.tasks.test_completion import tiny_llama
from tests.tasks.test_tasks import byte_level, multilingual, tiny_bart, tiny_bert, tiny_mbart, unigram, word_level

SPECIAL = {0, 1, 2, 3, 4}.__contains__


@pytest.mark.parametrize(
    ("named", "end", "ends"),
    [
        (((2,), (2,), (2,)), 2, (2,)),
        (((1,), (2,), (2,)), 2, (2, 1)),  # the model's own wins
        (((4,), (2,), (3, 4)), 4, (3, 4, 2)),  # a chat model's: the tokenizer's is one of its own
        (((), (2,), (4,)), 4, (4, 2)),  # generation knows better
        (((2,), (), ()), 2, (2,)),
        (((2,), (9,), (9,)), 2, (2,)),  # an ordinary word, which a default makes an end
        (((9,), (9,), (9,)), 9, (9,)),  # unless all agree
        (((), (9,), ()), None, ()),
        (((), (), ()), None, ()),
    ],
)
def test_the_end_of_a_text(named: tuple[tuple[int, ...], ...], end: int | None, ends: tuple[int, ...]) -> None:
    assert Named(*named).chosen(SPECIAL) == end
    assert Named(*named).all(SPECIAL) == ends


def test_what_files_hold() -> None:
    assert Named.of(2, [2, 3, 2], None) == Named((2,), (2, 3), ())
    assert Named.of(2, [2, 3], None).differ() and not Named.of(2, [2], None).differ()


@pytest.mark.parametrize("tokenizer", [byte_level, unigram, word_level])
@pytest.mark.parametrize(
    ("model", "writes"), [(tiny_bart, True), (tiny_bart, False), (tiny_llama, True), (tiny_llama, False)]
)
def test_files_that_agree_stay_what_they_are(model: Any, tokenizer: Any, writes: bool) -> None:
    found, own = model(), tokenizer()
    found.config.pad_token_id = 1  # which Llama's config leaves to the tokenizer

    def held() -> list[Any]:
        values = [found.config.to_dict(), found.generation_config.to_dict()]
        return [*values, own.special_tokens_map, own.backend_tokenizer.to_str()]

    before = held()
    assert settle(found, own, writes) == []
    assert held() == before


def test_a_decoders_end_is_its_own() -> None:
    """The tokenizer's is what begins a turn: the model learns the end at which it stops."""
    model, tokenizer = tiny_llama(pad_token_id=1), byte_level()
    tokenizer.eos_token = "<mask>"
    notes = settle(model, tokenizer, writes=True)
    assert notes == [
        "The backbone's eos_token is <mask> (4) in tokenizer_config.json, </s> (2) in config.json, </s> (2) in "
        "generation_config.json: </s> ends the texts that are learnt, and generation stops at </s> and <mask>."
    ]
    assert tokenizer.eos_token_id == 2 and model.generation_config.eos_token_id == [2, 4]
    assert settle(tiny_llama(pad_token_id=1), tokenizer, writes=True) == []


def test_an_end_that_only_the_config_knows_stops_generation_too() -> None:
    model, tokenizer = tiny_llama(pad_token_id=1), byte_level()
    model.config.eos_token_id = [2, 4]
    (note,) = settle(model, tokenizer, writes=True)
    assert "generation stops at </s> and <mask>" in note and tokenizer.eos_token_id == 2
    assert model.generation_config.eos_token_id == [2, 4]


@pytest.mark.parametrize("kind", ["template", "roberta", "sequence"])
def test_an_encoder_decoders_texts_end_with_its_own_end(kind: str) -> None:
    """Sources, targets and pairs, where a wrong eos_token has made its way into the tokenizer's rules."""
    tokenizer = byte_level()
    single, ids = "<s> $A <mask>", [("<s>", 0), ("<mask>", 4)]
    rules: dict[str, Any] = {
        "template": processors.TemplateProcessing(single, "<s> $A <mask> $B <mask>", special_tokens=ids),
        "roberta": processors.RobertaProcessing(("<mask>", 4), ("<s>", 0), add_prefix_space=False),
    }
    rules["sequence"] = processors.Sequence([processors.ByteLevel(), rules["template"]])
    tokenizer.backend_tokenizer.post_processor = rules[kind]
    tokenizer.eos_token = "<mask>"
    model = tiny_bart()
    (note,) = settle(model, tokenizer, writes=True)
    assert "</s> ends the texts that are learnt, and generation stops at </s> and <mask>" in note
    encoder = Encoder(tokenizer, model)
    for ids in (
        *encoder(["good"], max_length=9, target=True)["input_ids"],
        *encoder(["good"], ["bad"], max_length=9)["input_ids"],
    ):
        assert (ids[0], ids[-1]) == (0, 2)


def test_what_begins_each_text_does_not_stop_generation() -> None:
    model, tokenizer = tiny_bart(), byte_level()
    tokenizer.eos_token = "<s>"
    (note,) = settle(model, tokenizer, writes=True)
    assert "</s> ends the texts" in note and model.generation_config.eos_token_id == 2


def test_a_tokenizer_that_ends_no_text_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    with pytest.raises(UserError, match=r"does not end a text with </s>, at which generation stops; name the token"):
        Encoder(tokenizer, tiny_bart())
    Encoder(tokenizer, tiny_bert())


@pytest.mark.parametrize("kind", ["MBartTokenizer", "MBart50Tokenizer"])
def test_mbarts_codes_are_left_alone(kind: str) -> None:
    tokenizer, model = multilingual(getattr(transformers, kind)), tiny_mbart()
    before = tokenizer.backend_tokenizer.to_str()
    assert settle(model, tokenizer, writes=True) == [] and tokenizer.backend_tokenizer.to_str() == before
    Encoder(tokenizer, model)


def test_what_an_encoder_decoder_begins_with_is_one() -> None:
    """Training shifts the targets by the config's, generation begins with its own."""
    for config, generation in ((2, 0), (None, 0), (0, None)):
        model = tiny_bart()
        model.config.decoder_start_token_id = config
        model.generation_config.decoder_start_token_id = generation
        notes = settle(model, byte_level(), writes=True)
        assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 0
        assert len(notes) == (None not in (config, generation))
        assert not notes or "decoder_start_token is </s> (2) in config.json, <s> (0) in generation_config" in notes[0]


@pytest.mark.parametrize(
    ("tokenizer_pad", "config_pad", "expected", "noted"),
    [
        ("<pad>", 4, 4, True),
        ("<pad>", None, 1, False),
        (None, 4, 4, False),
        (None, None, 2, False),
        ("<pad>", 300, 1, True),  # an ordinary word
        ("<pad>", 9999, 1, False),  # no token of the embedding
        ("<pad>", -1, 1, False),
    ],
)
def test_what_pads_is_one(tokenizer_pad: str | None, config_pad: int | None, expected: int, noted: bool) -> None:
    """The config's, by which a classifier finds a text's last token; what generation fills up with follows."""
    tokenizer, model = byte_level(), tiny_llama()
    tokenizer.pad_token, model.config.pad_token_id = tokenizer_pad, config_pad
    notes = settle(model, tokenizer, writes=False)
    assert (tokenizer.pad_token_id, model.config.pad_token_id) == (expected, expected)
    assert model.generation_config.pad_token_id is None and bool(notes) is noted
    model.generation_config.pad_token_id = 0
    (note,) = settle(model, tokenizer, writes=False)
    assert "<s> (0) in generation_config.json" in note
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == expected


def test_a_pad_token_without_an_embedding_is_not_used() -> None:
    """As where somebody has added [PAD] to a tokenizer, and not to the model."""
    tokenizer, model = byte_level(), tiny_llama()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(tokenizer.pad_token_id)
    (note,) = settle(model, tokenizer, writes=False)
    assert f"pad_token [PAD] ({len(tokenizer) - 1}) is not used: the embedding has {len(tokenizer) - 1} rows" in note
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2


def test_texts_begin_as_the_tokenizer_begins_them() -> None:
    tokenizer, model = byte_level(), tiny_llama(pad_token_id=1)
    model.config.bos_token_id = model.generation_config.bos_token_id = 4
    (note,) = settle(model, tokenizer, writes=True)
    assert "bos_token is <s> (0) in tokenizer_config.json, <mask> (4) in config.json" in note
    assert tokenizer.bos_token_id == model.config.bos_token_id == model.generation_config.bos_token_id == 0
