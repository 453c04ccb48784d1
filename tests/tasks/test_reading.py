"""How each family's tokenizer reads prompts, data, pairs and texts that are too long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)

from peftbench.config.schema import EMBEDDED, Generation, Task, TaskKind
from peftbench.evaluation.finished import read_otherwise
from peftbench.tasks.framing import frame_sources
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.tasks.tokens import Encoder
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.families import DECODERS, FAMILIES, MORE_FAMILIES, build
from tests.tasks.test_completion import tiny_llama
from tests.tasks.test_tasks import byte_level, multilingual, tiny_bart, tiny_bert, tiny_mbart

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [(piece, -3.0) for piece in f"▁{LETTERS}<>/[]|_"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def bert() -> PreTrainedTokenizerBase:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *"[]/<>|", *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def bart() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(EMBEDDED / "mini")
    return tokenizer


def t5() -> PreTrainedTokenizerBase:
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES], extra_ids=3)


def llama() -> PreTrainedTokenizerBase:
    pieces = ["<unk>", "<s>", "</s>", *(piece for piece, _ in PIECES), *(f"<0x{byte:02X}>" for byte in range(256))]
    return LlamaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], pad_token="</s>")


def gpt2() -> PreTrainedTokenizerBase:
    vocabulary = {piece: index for index, piece in enumerate([*ALPHABET, "<|endoftext|>"])}
    return GPT2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")


def qwen() -> PreTrainedTokenizerBase:
    vocabulary = {piece: index for index, piece in enumerate([*ALPHABET, "<|endoftext|>"])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=["<|im_start|>", "<|im_end|>"])


TOKENIZERS: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str]] = {  # and a special token of each
    "bart": (bart, "</s>"),
    "mbart": (lambda: multilingual(MBartTokenizer), "</s>"),
    "roberta": (byte_level, "<s>"),
    "bert": (bert, "[SEP]"),
    "t5": (t5, "</s>"),
    "byt5": (ByT5Tokenizer, "</s>"),  # a slow one
    "llama": (llama, "<s>"),
    "gpt2": (gpt2, "<|endoftext|>"),
    "qwen2": (qwen, "<|im_start|>"),
}
MODEL_OF = {"byt5": "t5"}
TOKENIZER_OF = {"electra": "bert", "distilbert": "bert", "mistral": "llama", "qwen3": "qwen2"}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_special_token_is_one_in_the_prompt_and_text_in_the_data(name: str, goes_on: bool) -> None:
    make, special = TOKENIZERS[name]
    tokenizer = make()
    encoder = Encoder(tokenizer, build(MODEL_OF.get(name, name)))
    opening, closing = encoder.ends()
    source = f"a {special} b"
    (ids,) = frame_sources(encoder, f"c{special}d {{source}}{special}c", [source], 60, goes_on=goes_on)["input_ids"]
    (inner,) = encoder([f"d {source}"], max_length=60, special=False)["input_ids"]
    index = tokenizer.convert_tokens_to_ids(special)
    assert index not in inner and ids.count(index) == 2 + [*opening, *([] if goes_on else closing)].count(index)
    start = len(opening) + len(encoder.typed(f"c{special}"))
    assert ids[start - 1] == index and ids[start : start + len(inner)] == inner
    assert ids[start + len(inner)] == index


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_prompt_is_read_as_the_tokenizer_reads_it(name: str) -> None:
    make, special = TOKENIZERS[name]
    tokenizer = make()
    encoder = Encoder(tokenizer, build(MODEL_OF.get(name, name)))
    (ids,) = frame_sources(encoder, f"a b{special}{{source}}", ["c d"], 60, goes_on=True)["input_ids"]
    opening, _ = encoder.ends()
    whole = tokenizer(f"a b{special}", add_special_tokens=False)["input_ids"]
    assert ids == [*opening, *whole, *tokenizer("c d", add_special_tokens=False)["input_ids"]]


def test_a_token_that_the_tokenizer_puts_there_anyway_is_put_once() -> None:
    encoder = Encoder(bart(), build("bart"))
    (plain,) = frame_sources(encoder, "a {source}", ["b"], 60)["input_ids"]
    assert frame_sources(encoder, "<s>a {source}", ["b"], 60)["input_ids"] == [plain]
    assert frame_sources(encoder, "a {source}</s>", ["b"], 60)["input_ids"] == [plain]
    (twice,) = frame_sources(encoder, "<s></s>a {source}", ["b"], 60)["input_ids"]
    assert twice == [0, 2, *plain[1:]]


def test_a_decoders_prompt_is_never_cut(tmp_path: Path) -> None:
    task = completing(tmp_path, [{"source": "good", "target": "bad"}])
    with pytest.raises(UserError, match="leaves no room for a source in 12 tokens"):
        prepare_data(
            load_task(replace(task, prompt="good film " * 9 + "{source}", max_source_length=12)),
            byte_level(),
            tiny_llama(),
        )


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_pairs_are_told_apart(family: str) -> None:
    """Though the letters of both are the same, and with one text empty."""
    stem = family.removesuffix("_classifier").removesuffix("_gated")
    make, _ = TOKENIZERS[TOKENIZER_OF.get(stem, stem)]
    encoder = Encoder(make(), build(family))
    pairs = [("good day", "with man"), ("good", "day with man"), ("good day with man", ""), ("", "good day with man")]
    found = encoder(*map(list, zip(*pairs, strict=True)), max_length=60)
    assert len(set(map(tuple, found["input_ids"]))) == len(pairs)
    assert bool(encoder.separator) == (family in DECODERS or family == "mbart")
    assert [len(mask) for mask in found["attention_mask"]] == [len(ids) for ids in found["input_ids"]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_of_a_pair_with_a_line_break_the_longer_text_is_cut_first(side: str) -> None:
    tokenizer = gpt2()
    tokenizer.truncation_side = side
    encoder = Encoder(tokenizer, build("gpt2"))

    def read(first: str, second: str, length: int) -> tuple[str, bool]:
        found = encoder([first], [second], max_length=length)
        return tokenizer.decode(found["input_ids"][0]), found["source_cut"][0]

    assert read("abc", "defgh", 9) == ("abc\ndefgh", False)
    assert read("abc", "defgh", 8) == (("abc\ndefg" if side == "right" else "abc\nefgh"), True)
    assert read("abcdef", "gh", 6) == (("abc\ngh" if side == "right" else "def\ngh"), True)
    assert read("abcdef", "ghijkl", 7) == (("abc\nghi" if side == "right" else "def\njkl"), True)


def test_where_no_line_break_is_read_a_pair_is_parted_by_the_end_of_a_text() -> None:
    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "good", "day"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    encoder = Encoder(tokenizer, build("llama"))
    assert encoder(["good"], ["day"], max_length=9)["input_ids"] == [[5, 2, 6]]
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has nothing to put between the texts of a pair"):
        Encoder(tokenizer, build("llama"))(["good"], ["day"], max_length=9)


def test_what_stands_between_pairs_is_noted(tmp_path: Path) -> None:
    rows = [{"text": f"good {i}", "other": "bad", "label": "xy"[i % 2]} for i in range(20)]
    write_lines(tmp_path / "train.jsonl", rows)
    task = Task(
        name="pairs",
        kind=TaskKind.classification,
        train_file=str(tmp_path / "train.jsonl"),
        text_columns=["text", "other"],
        labels=["x", "y"],
        metric="accuracy",
    )
    wide = build("gpt2_classifier")
    wide.resize_token_embeddings(len(gpt2()))
    data = prepare_data(load_task(task), gpt2(), wide)
    assert data.reading() == {"pair_separator": "\n"}
    assert "The tokenizer puts nothing between the texts of a pair: '\\n' is added there." in data.notes
    assert data.notes != load_task(task).notes  # which other backbones share
    told = read_otherwise({}, data.reading())
    assert told is not None and 'pair_separator "\\n"' in told and "train it again" in told
    assert read_otherwise({"reading": data.reading()}, data.reading()) is None
    for other in (
        prepare_data(load_task(replace(task, text_columns=["text"])), gpt2(), wide),
        prepare_data(load_task(task), bert(), tiny_bert()),
    ):
        assert other.reading() == {} and "nothing between" not in " ".join(other.notes)


def completing(folder: Path, rows: list[dict[str, Any]]) -> Task:
    for split in ("train", "validation", "test"):
        write_lines(folder / f"{split}.jsonl", rows)
    return Task(
        name="own",
        kind=TaskKind.text_to_text,
        data_dir=str(folder),
        source_column="source",
        target_column="target",
        max_source_length=32,
        max_target_length=8,
        metric="rougeL",
        generation=Generation(num_beams=1, min_length=0, max_length=6, no_repeat_ngram_size=0),
    )


LONG = [{"source": "good " * 30, "target": "bad " * 20}, *({"source": "good", "target": "bad"} for _ in range(3))]


def test_the_limit_and_the_share_that_was_cut_are_said(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.model_max_length = 12
    data = prepare_data(load_task(completing(tmp_path, LONG)), tokenizer, tiny_bart())
    assert data.limits() == {"sources": 12, "targets": 8}
    assert data.cut == {role: {"sources": 0.25, "targets": 0.25} for role in ("train", "selection", "report")}
    assert [note for note in data.notes if "also trained on" not in note] == [
        "Sources are truncated to 12 tokens (the tokenizer's model_max_length=12; task.max_source_length=32): 25.0% "
        "of train, 25.0% of validation, 25.0% of test.",
        "Targets are truncated to 8 tokens (task.max_target_length=8): 25.0% of train; the end of a text is not learned"
        " there.",
    ]
    assert {"source_cut", "target_cut"} & set(data.train.column_names) == set()


def test_a_few_that_are_cut_are_in_the_record_alone(tmp_path: Path) -> None:
    rows = [LONG[0], *(LONG[1:] * 9)]
    data = prepare_data(load_task(completing(tmp_path, rows)), byte_level(), tiny_bart())
    assert data.cut["train"] == {"sources": pytest.approx(1 / 28), "targets": pytest.approx(1 / 28)}
    assert all("also trained on" in note for note in data.notes)  # each split has the same rows


def test_a_decoders_limit_leaves_room_for_what_it_writes(tmp_path: Path) -> None:
    task = replace(completing(tmp_path, LONG), max_source_length=100)
    data = prepare_data(load_task(task), byte_level(), tiny_llama())
    assert data.limits() == {"sources": 56, "targets": 8}
    for tokens, why in ((64, "the tokenizer's model_max_length=64"), (10**30, "the backbone's positions")):
        tokenizer = byte_level()
        tokenizer.model_max_length = tokens
        data = prepare_data(load_task(replace(task, max_target_length=50)), tokenizer, tiny_llama())
        assert [note for note in data.notes if "also trained on" not in note] == [
            f"Sources are truncated to 14 tokens ({why} less task.max_target_length=50; task.max_source_length=100): "
            "25.0% of train, 25.0% of validation, 25.0% of test."
        ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model", [tiny_bart, tiny_llama])
def test_a_target_that_is_cut_teaches_no_end(model: Any, side: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.truncation_side = side  # of sources; a target is cut at its end
    rows = [{"source": "good", "target": text} for text in ("good film bad day " * 9, "good")]
    data = prepare_data(load_task(completing(tmp_path, rows)), tokenizer, model())
    cut, whole = data.train["labels"][:]
    assert len(cut) == 8 and 2 not in cut and whole[-1] == 2
    assert rows[0]["target"].startswith(tokenizer.decode(cut, skip_special_tokens=True))
    assert data.reading()["cut_targets"] == "no end"
    (exact,) = [len(ids) for ids in data.encoder.ids(["good"])]
    room = exact + (2 if model is tiny_bart else 1)
    for limit, ends in ((room, True), (room - 1, False)):
        task = replace(completing(tmp_path, rows[1:]), max_target_length=limit)
        found = prepare_data(load_task(task), tokenizer, model())
        assert (found.train["labels"][0][-1] == 2) is ends and found.cut["train"]["targets"] == (not ends)
        assert ("cut_targets" in found.reading()) is not ends


@pytest.mark.parametrize("kind", [MBartTokenizer, MBart50Tokenizer])
def test_mbart_begins_a_target_that_is_cut_in_its_language(kind: Any, tmp_path: Path) -> None:
    """The code goes to the front of the decoder's input, and is not learned as what comes after the cut."""
    task = replace(completing(tmp_path, LONG), source_language="en_XX", target_language="ro_RO")
    data = prepare_data(load_task(task), multilingual(kind), tiny_mbart())
    romanian = data.tokenizer.convert_tokens_to_ids("ro_RO")
    batch = data.collator([data.train[0], data.train[1]])
    starts, labels = batch["decoder_input_ids"].tolist(), batch["labels"].tolist()
    assert 2 not in labels[0] and 2 in labels[1]
    if kind is MBartTokenizer:
        assert starts[0][0] == starts[1][0] == romanian
        assert romanian not in labels[0] and romanian in labels[1]
        assert starts[0][1:] == labels[0][:7] and labels[0][7] == -100
    else:
        assert labels[0][0] == labels[1][0] == romanian and -100 not in labels[0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_target_that_fits_is_what_the_tokenizer_makes_of_it(name: str) -> None:
    tokenizer = TOKENIZERS[name][0]()
    encoder = Encoder(tokenizer, build(MODEL_OF.get(name, name)))
    texts = ["good", "bad day", "a", ""]
    opening, closing = encoder.ends(target=True)
    found = [[*opening, *ids, *closing] for ids in encoder.ids(texts, target=True)]
    assert found == tokenizer(text_target=texts)["input_ids"]
