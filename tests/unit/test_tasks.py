"""Tasks end to end on tiny tokenizers and models: tokens, batches, decoding, scores, baselines, and conf/task."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peftbench.config import Task, TaskKind, Trainer, conf_dir
from peftbench.errors import UserError
from peftbench.tasks.files import read_file
from peftbench.tasks.prepare import KINDS, prepare
from peftbench.tasks.tokens import Encoder, positions

TEXTS = ["the film is good", "a bad film </s> <mask>", "good [SEP] bad", "", "good good good good good good good good"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROLES = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))


def byte_level() -> PreTrainedTokenizerBase:
    """As BART's and RoBERTa's: byte-level BPE, `<s> a </s>` or `<s> a </s></s> b </s>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **ROLES)


def with_template(model: Any, pre_tokenizer: Any) -> PreTrainedTokenizerBase:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **ROLES)


def unigram() -> PreTrainedTokenizerBase:
    """As T5's and mBART's, whose model has the special tokens among its pieces."""
    pieces = [(token, 0.0) for token in SPECIAL] + [(piece, -3.0) for piece in ("▁", *"</>abdfghiklmnost")]
    return with_template(models.Unigram(pieces, unk_id=3), pre_tokenizers.Metaspace())


def word_level() -> PreTrainedTokenizerBase:
    words = sorted({word for text in TEXTS for word in text.split()} - set(SPECIAL))
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    return with_template(models.WordLevel(vocabulary, unk_token="<unk>"), pre_tokenizers.WhitespaceSplit())


def tiny_bert(labels: int = 2) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=512,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
        num_labels=labels,
    )
    return BertForSequenceClassification(config)


def tiny_bart() -> PreTrainedModel:
    sizes = {f"{stack}_{size}": 2 for stack in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    config = BartConfig(
        vocab_size=512,
        d_model=8,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=32,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        **sizes,
    )
    return BartForConditionalGeneration(config)


@pytest.fixture
def reviews(tmp_path: Path) -> Task:
    """Five training rows, of which three are good, and three to select and report on."""
    labels = ["good", "bad", "good", "bad", "good"]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "dev.jsonl", rows[:3])
    return Task(
        name="reviews",
        kind=TaskKind.classification,
        data_dir=str(tmp_path),
        selection_split="validation",
        report_split="validation",
        max_selection=2,
        text_columns=["text"],
        labels=["bad", "good"],
        metric="accuracy",
        baselines=["majority", "head"],
    )


@pytest.fixture
def news(tmp_path: Path) -> Task:
    rows = [{"id": f"n{i}", "document": f"{text}. More.", "summary": text} for i, text in enumerate(TEXTS)]
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    return Task(
        name="news",
        kind=TaskKind.summarization,
        data_dir=str(tmp_path),
        metric="rouge1",
        baselines=["lead1"],
        max_eval=1,
    )


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


@pytest.mark.parametrize("build", [byte_level, unigram, word_level])
def test_no_text_spells_a_special_token(build: Any) -> None:
    tokenizer = build()
    encoder = Encoder(tokenizer, tiny_bert())
    texts = [f"good{token}bad {token} {token}" for token in SPECIAL]
    assert all(special_ids(tokenizer) & set(ids[1:-1]) for ids in tokenizer(texts[:3])["input_ids"])
    for encoded in (encoder(texts, max_length=64), encoder(texts, max_length=64, target=True)):
        for ids in encoded["input_ids"]:
            inner = ids[1:-1] if ids[0] == tokenizer.bos_token_id else ids[:-1]
            assert not special_ids(tokenizer) & set(inner)


def test_plain_text_survives_where_the_tokenizer_can_split_it() -> None:
    tokenizer = byte_level()
    text = "a <mask> in </s> text"
    ids = Encoder(tokenizer, tiny_bert())([text], max_length=64)["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text


def test_lengths() -> None:
    encoder = Encoder(byte_level(), tiny_bert())
    assert encoder.limit == 32
    long = "good " * 100
    assert len(encoder([long], max_length=12)["input_ids"][0]) == 12
    assert len(encoder([long], max_length=512)["input_ids"][0]) == 32
    pair = encoder(["bad"], [long], max_length=12)["input_ids"][0]
    assert (len(pair), pair.count(2)) == (12, 3)


def test_positions() -> None:
    assert positions(tiny_bart()) == 32
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    roberta = RobertaConfig(vocab_size=16, max_position_embeddings=34, pad_token_id=1, **size)
    assert positions(RobertaForSequenceClassification(roberta)) == 32
    t5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert positions(T5ForConditionalGeneration(t5)) is None


def test_a_tokenizer_without_a_pad_token(reviews: Task) -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="has no pad token"):
        prepare(reviews, tokenizer, tiny_bert())


def test_classification(reviews: Task) -> None:
    model = tiny_bert()
    task = prepare(reviews, byte_level(), model)
    assert task.splits == {
        "train": {"split": "train", "examples": 5},
        "selection": {"split": "validation", "examples": 2},
        "report": {"split": "validation", "examples": 3},
    }
    batch = task.collator([task.train[i] for i in range(5)])
    assert batch["labels"].tolist() == [1, 0, 1, 0, 1]
    assert task.decode(model(**batch).logits.detach().numpy())[0] in reviews.labels
    assert task.decode(np.array([[0.1, 0.2], [3.0, -1.0], [0.0, 1.0]])) == ["good", "bad", "good"]
    assert task.score(["good", "bad", "bad"], task.report_rows) == {"accuracy": pytest.approx(200 / 3)}
    assert task.baselines() == {"majority.accuracy": pytest.approx(200 / 3)}
    assert list(task.records(["bad", "bad"], task.selection_rows)) == [
        {"index": 0, "prediction": "bad", "reference": "good"},
        {"index": 1, "prediction": "bad", "reference": "bad"},
    ]


def test_a_pair_has_equally_many_ends_in_every_row(reviews: Task) -> None:
    """BART's classification head refuses a batch whose rows do not."""
    pair = replace(reviews, text_columns=["text", "text"], max_source_length=16)
    rows = prepare(pair, byte_level(), tiny_bart()).train["input_ids"]
    assert {ids.count(2) for ids in rows} == {3}


def test_summarization(news: Task) -> None:
    tokenizer, model = byte_level(), tiny_bart()
    task = prepare(news, tokenizer, model)
    assert task.splits["report"] == {"split": "test", "examples": 1}
    batch = task.collator([task.train[i] for i in range(5)])
    assert batch["labels"].shape == batch["decoder_input_ids"].shape
    assert (batch["labels"] == -100).any()
    assert model(**batch).loss.isfinite()
    # what goes in as a target comes out as text, the padding of labels included
    assert task.decode(batch["labels"].numpy()) == task.references(task.train_rows) == TEXTS
    generated = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3)
    assert len(task.decode(generated.numpy())) == 5
    assert task.baselines() == {f"lead1.{kind}": 100.0 for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
    assert list(task.records(["good"], task.report_rows)) == [
        {"index": 0, "id": "n0", "prediction": "good", "reference": TEXTS[0]}
    ]


def test_a_split_in_two_roles_is_loaded_once(reviews: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path) -> Dataset:
        read.append(path)
        return read_file(path)

    monkeypatch.setattr("peftbench.tasks.load.read_file", counted)
    prepare(reviews, byte_level(), tiny_bert())
    assert [file.name for file in read] == ["train.jsonl", "dev.jsonl"]


def test_the_fingerprint_follows_the_data(reviews: Task) -> None:
    tokenizer, model = byte_level(), tiny_bert()
    first = prepare(reviews, tokenizer, model).fingerprint
    assert prepare(replace(reviews, max_source_length=8), tokenizer, model).fingerprint == first
    assert prepare(replace(reviews, max_train=4), tokenizer, model).fingerprint != first


def test_nothing_is_printed(reviews: Task, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    task = prepare(reviews, byte_level(), tiny_bert())
    task.collator([task.train[0]])
    task.baselines()
    out, err = capfd.readouterr()
    assert (out, err, list(recwarn)) == ("", "", [])


def test_every_kind_has_a_class() -> None:
    assert set(KINDS) == set(TaskKind)


@pytest.mark.parametrize("option", sorted((conf_dir() / "task").glob("*.yaml")), ids=lambda file: str(file.stem))
def test_conf_fits_the_schema(option: Path) -> None:
    assert option.read_text().startswith("# @package _global_\n# ")
    task: Any = OmegaConf.merge(OmegaConf.structured(Task), OmegaConf.load(option).task)
    task = OmegaConf.to_object(task)
    assert task.name == option.stem
    elsewhere = {"eval_batch_size", "precision", "gradient_checkpointing", "checkpoint_minutes", "device"}
    assert not task.paper or set(task.paper) == {field.name for field in fields(Trainer)} - elsewhere
    trainer: Any = OmegaConf.merge(OmegaConf.structured(Trainer), task.paper)
    assert all(trainer[key] == value for key, value in task.paper.items() if key not in ("schedule", "keep"))
    if task.kind is TaskKind.classification:
        assert task.labels and task.text_columns
