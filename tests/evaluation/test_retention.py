"""The backbone's own language model before and after a training: what it reads, its loss, and how fast a run is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.backbones.load import load_backbone, load_language_model
from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.evaluation import speed
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.general_text import (
    Block,
    GeneralText,
    _choose,
    _fill_sentinels,
    make_blocks,
    read_general_text,
)
from peftbench.evaluation.retention import (
    compute_language_modelling,
    measure_after,
    measure_before,
    put_trained_tensors,
)
from peftbench.evaluation.speed import write_to_the_end
from peftbench.modification.attach import attach, attach_run
from peftbench.modification.state import FILE_NAME, fold, save
from peftbench.records.record import Record, Throughput, load_records
from peftbench.tasks.batch import NO_TOKEN
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.utils.errors import UserError
from tests.families import build, modification, shake
from tests.finished import save_tiny_bert

TEXT = " ".join(f"The {colour} film of part {number} is good." for number in range(90) for colour in ("red", "blue"))


def load_mini() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    run = compose_run(["task=doctopic"])
    backbone = load_language_model(run.model, run.task)
    return backbone.model.eval(), backbone.tokenizer


def test_an_encoder_decoder_reads_each_span_as_one_mask_and_writes_the_whole_text() -> None:
    model, tokenizer = load_mini()
    general = GeneralText("text", TEXT)
    blocks = make_blocks(general, model, tokenizer)
    (ids,) = tokenizer([TEXT], add_special_tokens=False)["input_ids"]
    for number, block in enumerate(blocks):
        assert block.decoder_input_ids is not None
        written = block.decoder_input_ids[0, 1:].tolist()[1:]  # after the decoder's start and <s>
        room = 256 - 2
        assert written == ids[number * room :][: len(written)]
        counted = block.labels[0] != NO_TOKEN
        whole = torch.tensor([*block.decoder_input_ids[0, 1:].tolist(), 2])
        assert block.labels[0][counted].tolist() == whole[counted].tolist()
        masks = block.input_ids[0] == tokenizer.mask_token_id
        assert int(counted.sum()) == 3 * int(masks.sum())
        assert int(counted.sum()) / room == pytest.approx(0.15, abs=0.02)
        assert block.input_ids.shape[1] == room + 2 - 2 * int(masks.sum())
    again = make_blocks(general, model, tokenizer)
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(blocks, again, strict=True))


def test_sentinels_are_written_with_the_spans_that_they_replace() -> None:
    model = build("t5")
    block, sentinels = list(range(10, 50)), [90, 91, 92, 93]
    found = _fill_sentinels(block, [], [1], sentinels, model, torch.Generator().manual_seed(0))
    assert found.decoder_input_ids is not None
    read = found.input_ids[0].tolist()
    written = [*found.decoder_input_ids[0, 1:].tolist(), 0][: found.labels.shape[1]]
    spans: dict[int, list[int]] = {}
    mark = 0
    for token in [*written[:-1], int(found.labels[0, -1])]:
        if token in sentinels:
            mark = token
        spans.setdefault(mark, []).extend([] if token in sentinels else [token])
    put_back = [token for one in read[:-1] for token in (spans[one] if one in sentinels else [one])]
    assert put_back == block and read[-1] == 1
    assert sum(map(len, spans.values())) == int((found.labels != NO_TOKEN).sum()) == 6


def test_masked_spans_never_touch() -> None:
    for seed in range(5):
        masked = _choose(254, 3, torch.Generator().manual_seed(seed))
        runs = "".join("x" if one else " " for one in masked.tolist()).split()
        assert set(runs) == {"xxx"} and len(runs) == 13


@torch.no_grad()
def test_the_loss_of_a_decoder_is_that_of_transformers() -> None:
    model = build("llama")
    run = compose_run(["task=docsum", "trainer.device=cpu"])
    ids = torch.randint(5, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    found = compute_language_modelling(run, model, [Block(ids[:, :-1], ids[:, 1:])])
    assert found.loss == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)
    right = model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:]
    assert found.accuracy == pytest.approx(100 * float(right.float().mean()))


@pytest.mark.parametrize(
    ("trained", "writer", "form", "representation"),
    [
        ("bart_classifier", "bart", "relu", "ffn"),
        ("llama_classifier", "llama", "identity", "query_value"),
        ("t5_classifier", "t5", "softmax", "heads"),
        ("gpt2_classifier", "gpt2", "constant", "value"),
    ],
)
def test_what_was_trained_with_a_task_head_is_put_into_the_language_model(
    trained: str, writer: str, form: str, representation: str, tmp_path: Path
) -> None:
    insertion = "sequential" if form == "constant" else "parallel"
    composition = "gated" if form == "softmax" else "add"
    m = modification(form, representation, insertion, composition, dropout=None)
    classifier, model = build(trained), build(writer)
    model.base_model.load_state_dict(classifier.base_model.state_dict(), strict=False)
    attach(classifier, {"": m})
    shake(classifier)
    fold(classifier)
    save(classifier, tmp_path)
    attach(model, {"": m})
    put_trained_tensors(model, tmp_path / FILE_NAME)
    ours = {n.removeprefix(f"{model.base_model_prefix}."): t for n, t in model.named_parameters()}
    theirs = {n.removeprefix(f"{classifier.base_model_prefix}."): t for n, t in classifier.named_parameters()}
    attached = [name for name in ours if "modification" in name]
    assert len(attached) > 1
    assert all(torch.equal(ours[name], theirs[name]) for name in attached)
    with pytest.raises(UserError, match="has no tensor"):
        other = build(writer)
        attach(other, {"": modification("relu", "attention")})
        put_trained_tensors(other, tmp_path / FILE_NAME)


@pytest.mark.slow
def test_a_method_that_changes_nothing_forgets_nothing_and_one_that_does_is_seen(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:2500], encoding="utf-8")
    run = compose_run(["method=lora", "task=doctopic", f"retention={tmp_path / 'text.txt'}", "trainer.device=cpu"])
    backbone = load_backbone(run.model, run.task)
    attach_run(backbone.model, run, backbone.untrained)
    save(backbone.model, tmp_path / "adapter", backbone.untrained)
    before = measure_before(run)
    after = measure_after(run, tmp_path, before).after
    assert before.after is None and after == before.before  # W_up is 0
    assert 0 < before.before.loss < math.log(backbone.model.config.vocab_size)
    shake(backbone.model)
    save(backbone.model, tmp_path / "adapter", backbone.untrained)
    shaken = measure_after(run, tmp_path, before).after
    assert shaken is not None and shaken.loss > before.before.loss + 0.1


def test_an_encoder_fills_masked_tokens(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert")
    config = BertConfig.from_pretrained(folder)
    (tmp_path / "text.txt").write_text("film good " * 100, encoding="utf-8")
    words = ["task=doctopic", f"model.path={folder}", "model=bert_base", f"retention={tmp_path / 'text.txt'}"]
    run = compose_run([*words, "trainer.device=cpu"])
    with pytest.raises(UserError, match=r"loads the backbone's own language model, head too: .* are missing"):
        measure_before(run)  # it was saved with a classifier's head
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    found = measure_before(run)
    assert found.before.loss == pytest.approx(math.log(config.vocab_size), rel=0.1)  # random weights
    backbone = load_language_model(run.model, run.task)
    blocks = make_blocks(read_general_text(str(run.retention)), backbone.model, backbone.tokenizer)
    masks = sum(int((block.input_ids == backbone.tokenizer.mask_token_id).sum()) for block in blocks)
    assert masks == found.tokens == sum(int((block.labels != NO_TOKEN).sum()) for block in blocks)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("short.txt", "two words", "short.txt has 2 tokens; 64 are needed"),
        ("rows.jsonl", '{"words": "a"}\n', "has no column text with texts"),
        ("image.png", "x", "image.png is no .txt, .md, .tsv"),
        ("latin.txt", b"\xe9\xe9", "cannot be read as UTF-8"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_sentence(
    name: str, content: str | bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        measure_before(compose_run(["task=doctopic", f"retention={tmp_path / name}", "trainer.device=cpu"]))
    assert sentence in str(error.value)


def test_neither_is_part_of_a_name_and_shares_of_weights_are_refused(tmp_path: Path) -> None:
    assert hash_run(compose_run(["retention=docstrings", "speed=true"])) == hash_run(compose_run([]))
    with pytest.raises(
        UserError, match=r"retention=nowhere.txt is not a file.*; give docstrings, or the path of an existing one"
    ):
        compose_run(["retention=nowhere.txt"])
    with pytest.raises(UserError, match=r"trainer.sharding=full with speed=true is not supported"):
        compose_run(["trainer.sharding=full", "speed=true"])


@pytest.mark.slow
def test_texts_are_written_to_their_full_length() -> None:
    few = "task.packages=[json,logging,email]"
    run = compose_run(["task=docsum", few, "debug=smoke", "trainer.device=cpu", "task.max_eval=4"])
    loaded = load_task(run.task)
    backbone = load_backbone(run.model, loaded.task)
    data = prepare_data(loaded, backbone.tokenizer, backbone.model)
    evaluator = Evaluator(backbone.model, data, run)
    assert evaluator.generation is not None
    evaluator.generation = write_to_the_end(evaluator.generation)
    written = evaluator.predict("report")
    assert written.shape == (4, run.task.generation.max_length)
    assert (written[:, 1:-1] != NO_TOKEN).all()  # BART is made to end a text in the last place


def test_half_as_many_examples_are_tried_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[int] = []

    def measure(run: object, loaded: object, backbone: object, examples: int) -> speed._Measured:
        tried.append(examples)
        if examples > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return speed._Measured(examples, 10, Throughput(2.0, 5))

    monkeypatch.setattr(speed, "_measure", measure)
    monkeypatch.setattr(speed, "load_task", lambda task: SimpleNamespace(task=task))
    for name in ("load_backbone", "restore_backbone"):
        monkeypatch.setattr(speed, name, lambda *args: None)
    found = speed.measure_speed(compose_run(["task=doctopic", "trainer.eval_batch_size=12"]), tmp_path)
    assert tried == [12, 6, 3, 3] and (found.of, found.examples, found.tokens) == ("read", 3, 10)


@pytest.mark.slow
def test_what_a_question_costs_is_measured(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"Which colour is {i}?",
            "context": f"{i} is red.",
            "answers": {"text": ["red"], "answer_start": [len(f"{i} is ")]},
        }
        for i in range(40)
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["task=question_answering", f"task.train_file={tmp_path / 'qa.jsonl'}", "model=mini", "method=lora"]
    words += ["debug=smoke", "trainer.device=cpu", "speed=true", f"output_dir={tmp_path / 'runs'}"]
    assert main(["train", *words]) == 0
    (record,), _ = load_records(tmp_path / "runs")
    assert record.speed is not None and record.speed.of == "read"
    assert record.speed.tokens > 5 * record.speed.examples > 0


@pytest.mark.slow
def test_a_finished_run_is_measured_when_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = ["train", "debug=smoke", "task=docsum", "trainer.device=cpu", f"output_dir={tmp_path / 'runs'}"]

    def read(method: str) -> Record:
        (record,) = (one for one in load_records(tmp_path / "runs")[0] if one.method == method)
        return record

    assert main([*words, "method=full"]) == 0
    plain = read("full")
    assert plain.retention is plain.speed is None
    asked = [f"retention={tmp_path / 'text.txt'}", "speed=true"]
    assert main([*words, "method=full", *asked]) == 0
    later = read("full")
    assert later.score == plain.score and later.created == plain.created  # not trained again
    assert later.retention is not None and later.retention.after is not None and later.speed is not None
    assert later.retention.after.loss != later.retention.before.loss
    assert later.speed.of == "written" and later.speed.tokens == later.speed.examples * 11 == 88
    assert later.speed.trained.tokens_per_s > 0 and later.speed.bare.memory_bytes is None
    assert later.timings["total_s"] == plain.timings["total_s"] and later.timings["measure_s"] > 0

    assert main([*words, "method=lora", *asked]) == 0
    lora = read("lora")
    assert lora.retention is not None and lora.retention.before == later.retention.before
    assert main([*words, "method=lora"]) == 0  # is found
    capsys.readouterr()
    shown = "method,forgetting,general_loss,general_accuracy_before,speed,token_ms,use_memory,adapter"
    assert main(["results", str(tmp_path / "runs"), "--show", shown, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    (row,) = (row for row in rows if row["method"].startswith("lora"))
    assert lora.retention.after is not None and lora.adapter_bytes is not None
    assert row["forgetting"] == pytest.approx(lora.retention.after.loss - lora.retention.before.loss)
    assert row["adapter"] == pytest.approx(lora.adapter_bytes / 2**20) and row["use_memory"] is None
    assert main(["results", str(tmp_path / "runs")]) == 0
    assert "Δ loss" in capsys.readouterr().out
    assert main(["plot", str(tmp_path / "runs"), "--x", "general_loss", "--out", str(tmp_path / "plot.svg")]) == 0
    assert "loss on general text after the training" in (tmp_path / "plot.svg").read_text()
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert '"forgetting"' in page and '"token_ms"' in page and f"{lora.retention.after.loss}" in page

    (tmp_path / "text.txt").write_text(TEXT[::-1], encoding="utf-8")
    assert main([*words, "method=lora", *asked]) == 0  # another text is measured anew
    other = read("lora").retention
    assert other is not None and other.stamp != lora.retention.stamp and other.before != lora.retention.before
