"""Tasks end to end on tiny tokenizers and models: tokens, batches, decoding, scores, baselines, and conf/task."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Translation
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peftbench.backbones.load import load_backbone
from peftbench.config.compose import compose_run
from peftbench.config.schema import Device, Generation, Keep, Model, Run, Task, TaskKind, Trainer, find_conf_dir
from peftbench.evaluation import predict as predict_module
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.predict import compute_mean_loss, predict
from peftbench.tasks.deal import ROW, number_rows
from peftbench.tasks.files import read_file
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import KINDS, prepare_data
from peftbench.tasks.tokens import Encoder, count_positions
from peftbench.training.batching import count_batches_per_epoch
from peftbench.training.checkpoint import Checkpoints
from peftbench.training.fit import Criterion, Recipe, Resuming, fit_model
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines

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


def tiny_mbart() -> PreTrainedModel:
    sizes = {f"{stack}_{size}": 2 for stack in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    config = MBartConfig(
        vocab_size=512, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=64, **sizes
    )
    return MBartForConditionalGeneration(config)


@pytest.fixture
def reviews(tmp_path: Path) -> Task:
    """Five training rows, of which three are good, and three to select and report on."""
    labels = ["good", "bad", "good", "bad", "good"]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "dev.jsonl", rows[:3])
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
        write_lines(tmp_path / f"{split}.jsonl", rows)
    return Task(
        name="news",
        kind=TaskKind.text_to_text,
        data_dir=str(tmp_path),
        metric="rouge1",
        baselines=["lead1"],
        max_eval=1,
    )


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


def test_a_length_that_special_tokens_fill_is_refused() -> None:
    """Tokenizers truncate nothing below the number of their special tokens, and at it nothing is left of a text."""
    tokenizer = byte_level()
    encoder = Encoder(tokenizer, tiny_bert())
    for pairs, what in ((None, "text"), (["bad"], "pair of texts")):
        own = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
        assert own > 0 and len(encoder(["good good"], pairs, max_length=own + 1)["input_ids"][0]) == own + 1
        for length in range(1, own + 1):
            said = f"task.max_source_length={length}: the tokenizer adds {own} tokens to each {what}"
            with pytest.raises(UserError, match=said):
                encoder(["good good"], pairs, max_length=length)


def test_positions() -> None:
    assert count_positions(tiny_bart()) == 32
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    roberta = RobertaConfig(vocab_size=16, max_position_embeddings=34, pad_token_id=1, **size)
    assert count_positions(RobertaForSequenceClassification(roberta)) == 32
    t5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert count_positions(T5ForConditionalGeneration(t5)) is None


def test_a_tokenizer_without_a_pad_token(reviews: Task) -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="has no pad token"):
        prepare_data(load_task(reviews), tokenizer, tiny_bert())


def test_classification(reviews: Task) -> None:
    model = tiny_bert()
    task = prepare_data(load_task(reviews), byte_level(), model)
    assert task.splits == {
        "train": {"split": "train", "examples": 5},
        "selection": {"split": "validation", "examples": 2, "of": 3},
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
    taken = number_rows(task.report_rows).select([2, 0])
    assert [one["index"] for one in task.records(["bad", "bad"], taken)] == [2, 0]


def test_regression(tmp_path: Path) -> None:
    """One output, the mean squared error, and predictions that lose no digit on their way through words."""
    rows = [{"text": text, "label": number / 2} for number, text in enumerate(TEXTS)]
    for name in ("train", "dev"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    task = Task(
        name="scores",
        kind=TaskKind.regression,
        data_dir=str(tmp_path),
        report_split="validation",
        text_columns=["text"],
        metric="pearson",
    )
    model = tiny_bert(labels=1)
    data = prepare_data(load_task(task), byte_level(), model)
    batch = data.collator([data.train[i] for i in range(5)])
    assert batch["labels"].tolist() == [0, 0.5, 1, 1.5, 2]
    outputs = model.eval()(**batch)
    assert outputs.loss.item() == pytest.approx(((outputs.logits[:, 0] - batch["labels"]) ** 2).mean().item())
    predictions = outputs.logits.detach().numpy()
    assert [np.float32(text) for text in data.decode(predictions)] == list(predictions[:, 0])
    assert data.score(["0", "1", "2", "3", "4"], data.report_rows) == pytest.approx({"pearson": 100, "spearman": 100})
    assert data.baselines() == {}


def multilingual(kind: Any) -> PreTrainedTokenizerBase:
    """An mBART tokenizer of a few letters and three languages."""
    codes = [(code, 0.0) for code in ("ar_AR", "en_XX", "ro_RO")]
    letters = [(letter, -3.0) for letter in "▁abcdefghinorstuăâ"]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return kind(vocab=[*special, *letters, *codes, ("<mask>", 0.0)], src_lang="ar_AR", model_max_length=64)


@pytest.fixture
def translation(news: Task) -> Task:
    return replace(news, source_language="en_XX", target_language="ro_RO", metric="bleu_ro", baselines=["copy"])


def test_mbart_reads_one_language_and_writes_another(translation: Task) -> None:
    """The paper's: codes at the end, and the target's, turned to the front, starts the decoder."""
    tokenizer, model = multilingual(MBartTokenizer), tiny_mbart()
    data = prepare_data(load_task(translation), tokenizer, model)
    batch = data.collator([data.train[0], data.train[2]])
    english, romanian = tokenizer.convert_tokens_to_ids(["en_XX", "ro_RO"])
    assert data.train[0]["input_ids"][-2:] == [2, english]
    assert data.train[0]["labels"][-2:] == [2, romanian]
    assert batch["decoder_input_ids"][:, 0].tolist() == [romanian, romanian]
    assert batch["decoder_input_ids"][0, 1:].tolist() == batch["labels"][0, :-1].tolist()
    run = Run(task=translation, trainer=Trainer(learning_rate=1.0))
    generated = Evaluator(model, data, run).generation
    assert generated is not None
    assert (generated.decoder_start_token_id, generated.forced_bos_token_id) == (romanian, None)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model.generate(**inputs, generation_config=generated)[:, 0].tolist() == [romanian, romanian]


def test_mbart50_is_forced_to_write_the_language_first(translation: Task) -> None:
    tokenizer, model = multilingual(MBart50Tokenizer), tiny_mbart()
    data = prepare_data(load_task(translation), tokenizer, model)
    english, romanian = tokenizer.convert_tokens_to_ids(["en_XX", "ro_RO"])
    assert data.train[0]["input_ids"][0] == english
    assert data.train[0]["labels"][0] == romanian
    assert model.generation_config is not None and model.generation_config.forced_bos_token_id == romanian


def test_no_more_is_written_than_the_backbone_has_positions_for(news: Task) -> None:
    model = tiny_bart().eval()
    data = prepare_data(
        load_task(replace(news, generation=Generation(min_length=100, max_length=200))), byte_level(), model
    )
    evaluator = Evaluator(model, data, Run(task=data.task, trainer=Trainer(learning_rate=1.0)))
    evaluator.score("report")
    assert evaluator.generation is not None and evaluator.generation.max_length == 32


def test_a_language_that_the_backbone_has_not(translation: Task) -> None:
    with pytest.raises(UserError, match=r"task\.target_language=ro is unknown; did you mean ro_RO\?"):
        prepare_data(load_task(replace(translation, target_language="ro")), multilingual(MBartTokenizer), tiny_mbart())


def test_a_backbone_without_language_codes_translates_too(translation: Task) -> None:
    data = prepare_data(load_task(translation), byte_level(), tiny_bart())
    scores = data.baselines()
    assert scores["copy.bleu_ro"] >= 0 and set(data.signatures) == set()  # a baseline leaves no signature
    data.score(["a"], data.report_rows)
    assert set(data.signatures) == {"bleu_ro", "bleu", "chrf"}


def test_the_selection_loss_is_the_mean_over_all_tokens(news: Task) -> None:
    """Whatever the batches; with label smoothing as in training."""
    model = tiny_bart().eval()
    data = prepare_data(load_task(news), byte_level(), model)
    total, tokens = 0.0, 0
    for example in data.selection:
        batch = data.collator([example])
        labels = batch.pop("labels")[0]
        nll = -model(**batch).logits[0].log_softmax(-1).detach()
        total += float((0.9 * nll[range(len(labels)), labels] + 0.1 * nll.mean(-1)).sum())
        tokens += len(labels)
    for batch_size in (1, 3):
        loss = compute_mean_loss(model, data.selection, data.collator, batch_size, label_smoothing=0.1)
        assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_padding_stands_behind_a_text(news: Task, tmp_path: Path) -> None:
    """Whatever the tokenizer prefers: the loss of a batch is that of its examples alone."""
    tiny_bart().save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(tmp_path, padding_side="left").save_pretrained(tmp_path)
    backbone = load_backbone(Model(path=str(tmp_path)), news)
    data, model = prepare_data(load_task(news), backbone.tokenizer, backbone.model), backbone.model.eval()
    alone, together = (compute_mean_loss(model, data.selection, data.collator, batch_size) for batch_size in (1, 3))
    assert together == pytest.approx(alone, rel=1e-6)


def test_training_sees_every_example_once_an_epoch_in_batches_of_tokens(news: Task, tmp_path: Path) -> None:
    """Through transformers' Trainer: no batch is too large, and the second epoch has another order than the first."""
    rows = [{"document": "good " * (1 + i % 7), "summary": "bad"} for i in range(40)]
    write_lines(tmp_path / "train.jsonl", rows)
    model = tiny_bart()
    data = prepare_data(load_task(news), byte_level(), model)
    collate, seen = data.collator, []

    def noted(examples: list[dict[str, Any]]) -> Any:
        seen.append([len(example["input_ids"]) for example in examples])
        return collate(examples)

    data.collator = noted
    settings = Trainer(learning_rate=1e-3, epochs=2, batch_tokens=32, device=Device.cpu)
    nowhere = Checkpoints(tmp_path, minutes=60, stamp="")
    recipe, criterion = Recipe(settings, seed=1), Criterion(evaluate=dict, metric="rouge1")
    fitted = fit_model(model, data, recipe, criterion, Resuming(nowhere))
    each = count_batches_per_epoch(data, settings)
    assert fitted.steps == 2 * each == len(seen)
    assert all(len(batch) * max(batch) <= 32 or len(batch) == 1 for batch in seen)
    first, second = seen[:each], seen[each:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == sorted(data.lengths)
    assert first != second


@pytest.mark.parametrize(
    "own", [{"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 5.0}, {"max_new_tokens": 9}]
)
def test_what_a_backbone_says_of_generation_is_not_done(own: dict[str, Any], news: Task) -> None:
    """As a chat model's generation_config.json does; its beams end as it says, and its file stays what it is."""
    model = tiny_bart().eval()
    task = replace(news, generation=Generation(num_beams=2, min_length=4, max_length=6, no_repeat_ngram_size=0))
    data, run = prepare_data(load_task(task), byte_level(), model), Run(task=task, trainer=Trainer(learning_rate=1.0))
    _, expected = Evaluator(model, data, run).score("report")
    for key, value in own.items():
        setattr(model.generation_config, key, value)
    before = model.generation_config
    for early_stopping in (None, True):
        before.early_stopping = early_stopping
        evaluator = Evaluator(model, data, run)
        assert evaluator.score("report")[1] == expected
        assert evaluator.generation is not None and evaluator.generation.early_stopping is early_stopping
    assert model.generation_config is before


def test_a_text_of_no_tokens_is_refused(news: Task) -> None:
    """An encoder-decoder's begins with a token of its own. It is said before training, not at the first look at dev."""
    model = tiny_bart()
    task = replace(news, generation=Generation(num_beams=1, min_length=0, max_length=1, no_repeat_ngram_size=0))
    data, run = prepare_data(load_task(task), byte_level(), model), Run(task=task, trainer=Trainer(learning_rate=1.0))
    with pytest.raises(UserError, match=r"task\.generation\.max_length=1: .* give 2 or more"):
        Evaluator(model, data, run)


def test_predictions_do_not_depend_on_the_batches(news: Task) -> None:
    """Longest first, at most so many examples and tokens at once, and back in their own order."""
    model = tiny_bart().eval()
    data = prepare_data(load_task(replace(news, max_eval=None)), byte_level(), model)
    generation = GenerationConfig(max_length=6, num_beams=2, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)
    lengths = [len(ids) for ids in data.report["input_ids"]]
    expected = predict(model, data.report, data.collator, 1, generation=generation)
    for batch_size, max_tokens in ((5, None), (2, None), (5, 2 * max(lengths)), (5, 1), (3, 20)):
        sizes: list[int] = []
        ids = predict(
            model,
            data.report,
            data.collator,
            batch_size,
            max_tokens=max_tokens,
            generation=generation,
            on_batch=sizes.append,
        )
        assert np.array_equal(ids, expected)
        assert sum(sizes) == 5 and max(sizes) <= batch_size
        starts = np.cumsum([0, *sizes[:-1]])
        longest = [sorted(lengths, reverse=True)[start] for start in starts]
        fits = [size * length <= (max_tokens or 10**6) for size, length in zip(sizes, longest, strict=True)]
        assert all(fit or size == 1 for fit, size in zip(fits, sizes, strict=True))


def test_a_batch_that_does_not_fit_is_halved(news: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those behind it, which are nearly as long; one example that does not fit is an error."""
    model = tiny_bart().eval()
    data = prepare_data(load_task(replace(news, max_eval=None)), byte_level(), model)
    generation = GenerationConfig(max_length=6, num_beams=2, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)
    expected = predict(model, data.report, data.collator, 5, generation=generation)
    generate, room = predict_module._generate, 2

    def small(model: Any, batch: dict[str, Any], *others: Any) -> Any:
        if len(batch["input_ids"]) > room:
            raise torch.OutOfMemoryError("no room")
        return generate(model, batch, *others)

    monkeypatch.setattr(predict_module, "_generate", small)
    sizes: list[int] = []
    ids = predict(model, data.report, data.collator, 4, generation=generation, on_batch=sizes.append)
    assert np.array_equal(ids, expected) and sizes == [2, 2, 1]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        predict(model, data.report, data.collator, 4, generation=generation)


def test_columns_of_columns_are_opened_and_lists_joined(tmp_path: Path, news: Task) -> None:
    """As WMT has its pairs on the hub, WebNLG its triples, and E2E one row for each reference."""
    rows = [{"translation": {"en": ["good", "bad"], "ro": f"n{i}"}} for i in (1, 2)]
    rows.append({"translation": {"en": ["bad"], "ro": "n3"}})
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    task = replace(news, source_column="en", target_column="ro", source_join=" | ", max_eval=None)
    loaded = load_task(task).rows["test"]
    assert loaded["en"][:] == ["good | bad", "good | bad", "bad"]
    assert loaded["ro"][:] == ["n1", "n2", "n3"]
    merged = load_task(replace(task, merge_references=True)).rows["test"]
    assert (merged["en"][:], merged["ro"][:]) == (["good | bad", "bad"], [["n1", "n2"], ["n3"]])
    assert merged[ROW][:] == [0, 2]
    write_lines(tmp_path / "test.jsonl", [*rows, {"translation": {"en": ["bad"], "ro": None}}])
    with pytest.raises(UserError, match=r"test\.jsonl:4: column ro holds None, not text"):
        load_task(replace(task, merge_references=True))


def test_a_translation_of_the_hub_is_opened(tmp_path: Path, news: Task) -> None:
    """wmt/wmt16 says that its column is a Translation, which is no dict to `datasets`."""
    features = Features({"translation": Translation(languages=["ro", "en"])})
    rows = {"translation": [{"en": "good", "ro": f"n{i}"} for i in range(3)]}
    (tmp_path / "hub").mkdir()
    for split in ("train", "validation", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / f"{split}.parquet")
    task = replace(news, data_dir=str(tmp_path / "hub"), source_column="en", target_column="ro", max_eval=None)
    loaded = load_task(task).rows["test"]
    assert (loaded["en"][:], loaded["ro"][:]) == (["good"] * 3, ["n0", "n1", "n2"])


def test_parts_of_columns_keep_their_long_names_where_the_short_one_is_taken(tmp_path: Path, news: Task) -> None:
    rows = [{"a": {"text": "x", "deep": {"in": "y"}}, "b": {"text": "z"}, "in": "w", "c": {"c": "v"}}]
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    task = replace(news, source_column="a.text", target_column="b.text")
    found = load_task(task).rows["test"]
    assert found[0] == {"a.text": "x", "a.deep.in": "y", "b.text": "z", "in": "w", "c": "v"}


def test_a_row_with_two_targets_trains_on_both(news: Task, tmp_path: Path) -> None:
    rows = [{"document": text, "summary": ["good", "bad"] if i % 2 else ["bad"]} for i, text in enumerate(TEXTS)]
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    tokenizer = byte_level()
    data = prepare_data(load_task(news), tokenizer, tiny_bart())
    written = tokenizer.batch_decode(data.train["labels"][:], skip_special_tokens=True)
    assert written == ["bad", "good", "bad", "bad", "good", "bad", "bad"]
    assert [data.splits[role]["examples"] for role in ("train", "selection", "report")] == [7, 5, 1]
    assert len(data.train_rows) == len(data.selection_rows) == 5
    assert data.score(["bad"] * 5, data.selection_rows)["rouge1"] == 100
    assert [row["reference"] for row in data.records(["bad", "bad"], data.selection_rows.select([0, 1]))] == [
        ["bad"],
        ["good", "bad"],
    ]
    assert len(prepare_data(load_task(replace(news, max_train=2)), tokenizer, tiny_bart()).train) == 3


def test_a_pair_has_equally_many_ends_in_every_row(reviews: Task) -> None:
    """BART's classification head refuses a batch whose rows do not."""
    pair = replace(reviews, text_columns=["text", "text"], max_source_length=16)
    rows = prepare_data(load_task(pair), byte_level(), tiny_bart()).train["input_ids"]
    assert {ids.count(2) for ids in rows} == {3}


def test_summarization(news: Task) -> None:
    tokenizer, model = byte_level(), tiny_bart()
    task = prepare_data(load_task(news), tokenizer, model)
    assert task.splits["report"] == {"split": "test", "examples": 1, "of": 5}
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
    read: list[str] = []

    def counted(path: str, *others: Any) -> Dataset:
        read.append(path)
        return read_file(path, *others)

    monkeypatch.setattr("peftbench.tasks.file_set.read_file", counted)
    prepare_data(load_task(reviews), byte_level(), tiny_bert())
    assert [Path(file).name for file in read] == ["train.jsonl", "dev.jsonl"]


def test_the_fingerprint_follows_the_data(reviews: Task) -> None:
    tokenizer, model = byte_level(), tiny_bert()
    first = prepare_data(load_task(reviews), tokenizer, model).fingerprint
    assert prepare_data(load_task(replace(reviews, max_source_length=8)), tokenizer, model).fingerprint == first
    assert prepare_data(load_task(replace(reviews, max_train=4)), tokenizer, model).fingerprint != first


def test_nothing_is_printed(reviews: Task, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    task = prepare_data(load_task(reviews), byte_level(), tiny_bert())
    task.collator([task.train[0]])
    task.baselines()
    out, err = capfd.readouterr()
    assert (out, err, list(recwarn)) == ("", "", [])


def test_every_kind_has_a_class() -> None:
    assert set(KINDS) == set(TaskKind)


@pytest.mark.parametrize("option", sorted((find_conf_dir() / "task").glob("*.yaml")), ids=lambda file: str(file.stem))
def test_conf_fits_the_schema(option: Path) -> None:
    assert option.read_text().startswith("# @package _global_\n# ")
    task: Any = OmegaConf.merge(OmegaConf.structured(Task), OmegaConf.load(option).task)
    task = OmegaConf.to_object(task)
    assert task.name == option.stem
    stated = {  # by the paper or its scripts
        *("learning_rate", "epochs", "max_steps", "batch_size", "batch_tokens", "accumulation", "schedule", "warmup"),
        *("weight_decay", "max_grad_norm", "label_smoothing", "betas", "epsilon", "keep", "evaluate_every"),
    }
    assert set(task.quick) <= {"label_smoothing", "batch_tokens", "keep", "evaluate_every"}  # what quick.yaml reads
    assert not task.paper or set(task.paper) == stated
    trainer: Any = OmegaConf.merge(OmegaConf.structured(Trainer), task.paper)
    assert all(trainer[key] == value for key, value in task.paper.items() if key not in ("schedule", "keep"))
    if task.kind is TaskKind.classification:
        assert task.text_columns and bool(task.labels) != (task.name == "text_classification")


PAPER_TASKS = {
    "xsum": (5e-5, 100_000, 16, None, 4, 0.1, 0.1),
    "wmt16_enro": (5e-5, 50_000, 64, 4096, 4, 1.0, 0.1),
    "mnli": (1e-4, None, 32, None, 1, 1.0, 0.0),
    "sst2": (1e-4, None, 32, None, 1, 1.0, 0.0),
}


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_the_papers_tasks_have_the_papers_settings(name: str) -> None:
    """Table 8 by default, for every method; trainer=quick is shorter and has the method's learning rate."""

    def trainer(*overrides: str) -> Trainer:
        run = compose_run([f"task={name}", "method=lora", *overrides])
        return run.trainer

    paper = trainer()
    found = (paper.learning_rate, paper.max_steps, paper.batch_size, paper.batch_tokens, paper.accumulation)
    assert (*found, paper.max_grad_norm, paper.label_smoothing) == PAPER_TASKS[name]
    assert paper == trainer("trainer=paper")
    quick = trainer("trainer=quick")
    assert quick.keep is Keep.best and quick.evaluate_every == {"sst2": 500, "mnli": 2000}.get(name)
    assert quick.batch_tokens == paper.batch_tokens
    assert (quick.learning_rate, quick.epochs, quick.max_steps, quick.accumulation) == (1e-3, 3, None, 1)


def test_the_document_names_every_task() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    tasks = {option.stem for option in (find_conf_dir() / "task").glob("*.yaml")}
    assert {name for name in tasks if f"`{name}`" not in text} == set()
