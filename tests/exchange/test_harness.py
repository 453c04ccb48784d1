"""lm-evaluation-harness on a finished run, with own tasks in YAML: its figures are those of the model by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerBase

from peftbench import load_harness_model, load_run
from peftbench.utils.errors import UserError
from tests.families import build
from tests.finished import make_run, save_backbone, save_tiny_bert
from tests.tasks.test_tasks import byte_level

CHOICES = [" bad", " good films"]
ROWS = [{"question": f"good film {number}", "choices": CHOICES, "answer": number % 2} for number in range(5)]
CHOOSE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
LIKELY = """\
output_type: multiple_choice
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
WRITTEN = """\
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def without_ends() -> PreTrainedTokenizerBase:
    """A tokenizer that adds no tokens around a text, as those of many decoders."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return tokenizer


def evaluate(run: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the harness finds for each row of both tasks."""
    import lm_eval  # takes seconds
    from lm_eval.tasks import TaskManager

    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, rest in (("likely", LIKELY), ("written", WRITTEN)):
        head = CHOOSE.format(name=name, file=folder / "rows.jsonl", cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(head + rest)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    model = load_harness_model(run, device="cpu", batch_size=3)
    found = lm_eval.simple_evaluate(
        model=model, tasks=["likely", "written"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    acc = [sample["acc"] for sample in samples["likely"]]
    assert found["results"]["likely"]["acc,none"] == sum(acc) / len(ROWS)
    return samples


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_a_decoder(method: str, tmp_path: Path) -> None:
    tokenizer = without_ends()
    backbone = save_backbone(tmp_path / "llama", build("llama", vocab_size=512, max_position_embeddings=128), tokenizer)
    words = ["task=text_to_text", "model=llama", f"model.path={backbone}", f"method={method}", "bottleneck=3"]
    samples = evaluate(make_run(tmp_path / "run", *words), tmp_path / "tasks")
    model, tokenizer = load_run(tmp_path / "run")
    bare = build("llama", vocab_size=512, max_position_embeddings=128)
    apart = 0.0
    for row, likely, written in zip(ROWS, samples["likely"], samples["written"], strict=True):
        question = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        for choice, (told, _) in zip(CHOICES, likely["filtered_resps"], strict=True):
            ids = tokenizer(str(row["question"]) + choice, return_tensors="pt")["input_ids"]
            size = ids.shape[1] - question.shape[1]
            totals = []
            for one in (model, bare):
                logits = one(ids).logits[0, -size - 1 : -1].log_softmax(-1)
                totals.append(float(logits.gather(-1, ids[0, -size:, None]).sum()))
            assert told == pytest.approx(totals[0], abs=1e-4)
            apart = max(apart, abs(totals[0] - totals[1]))
        ids = model.generate(question, max_new_tokens=6, do_sample=False)[0, question.shape[1] :]
        assert written["resps"][0][0] == tokenizer.decode(ids, skip_special_tokens=True).split("\n\n")[0]
    assert apart > 0.1  # the adapter is there


@pytest.mark.slow
def test_an_encoder_decoder(tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path / "bart", build("bart", vocab_size=512), byte_level())
    run = make_run(tmp_path / "run", "task=text_to_text", "model=bart_large", f"model.path={backbone}", "method=lora")
    samples = evaluate(run, tmp_path / "tasks")
    model, tokenizer = load_run(run)
    source = tokenizer(ROWS[0]["question"], return_tensors="pt")["input_ids"]
    target = tokenizer(CHOICES[1], add_special_tokens=False, return_tensors="pt")["input_ids"]
    logits = model(source, labels=target).logits[0].log_softmax(-1)
    wanted = float(logits.gather(-1, target[0, :, None]).sum())
    assert samples["likely"][0]["filtered_resps"][1][0] == pytest.approx(wanted, abs=1e-4)


def test_a_run_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    words = ["task=text_classification", "model=bert_base", f"model.path={save_tiny_bert(tmp_path / 'bert')}"]
    run = make_run(tmp_path / "run", *words, "method=lora", labels=("a", "b"))
    with pytest.raises(UserError, match="has a run of classification, and the harness scores models that write text"):
        load_harness_model(run)


def test_the_package_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("peftbench.exchange.harness.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm_eval is not installed: pip install peftbench\[harness\]"):
        load_harness_model(tmp_path)
