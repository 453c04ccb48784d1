"""The command line as a user meets it: what it prints, what it records, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftbench.backbones.load import load_backbone
from peftbench.cli.main import COMMANDS, main
from peftbench.config.schema import EMBEDDED, Model, Task, TaskKind
from peftbench.utils.files import write_lines
from tests.families import long_tail
from tests.live_files import find_live

SUBPROCESS = [sys.executable, "-m", "peftbench"]
# Its usual prefix MLP makes each checkpoint one of 38 MB.
SMALL_MAM = ["method=mam", "bottleneck=8", "mix.attention.bottleneck=4", "mix.attention.prefix_mlp=8"]


@pytest.fixture
def sentiment(tmp_path: Path) -> Path:
    """A folder of labelled sentences, as `task=sst2 task.data_dir=` reads it."""
    folder = tmp_path / "sentiment"
    folder.mkdir()
    rows = [f"{'a fine film' if i % 2 else 'a dull film'} number {i}\t{i % 2}" for i in range(40)]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def smoke(tmp_path: Path, sentiment: Path) -> list[str]:
    """Overrides of a run of a few seconds."""
    return [
        "task=sst2",
        "model=mini",
        f"task.data_dir={sentiment}",
        "debug=smoke",
        "trainer.max_steps=2",
        f"output_dir={tmp_path / 'outputs'}",
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.rglob("record.json"))]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_help_reads_as_it_is_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse shows the %% of some of its texts, and repeats the name of an argument with two values."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    told = capsys.readouterr().out
    usage = told.split("\n\n")[0].split()
    assert ended.value.code == 0 and told.startswith(f"usage: peftbench {command}")
    assert "%%" not in told and not re.search(r"\b(\w+(?: \w+)*) \1$", " ".join(usage))
    assert max(map(len, told.splitlines())) <= 120


def test_no_help_no_refusal_and_no_dry_run_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from peftbench.cli.main import COMMANDS, main\n"
        "assert main(['--help']) == 0\n"
        "for command in COMMANDS:\n"
        "    try:\n"
        "        main([command, '--help'])\n"
        "    except SystemExit:\n"
        "        pass\n"
        "ends = ['--out', 'nowhere/a.txt']\n"
        "for words in (['evaluate'], ['predict', '-'], ['rescore'], ['merge', *ends], ['export', *ends]):\n"
        "    assert main([words[0], 'no-such-run', *words[1:]]) == 2\n"
        "for command in ('train', 'params', 'explain'):\n"
        "    assert main([command, 'method=lroa']) == 2\n"
        f"assert main(['reproduce', 'table5', '--dry-run', 'output_dir={tmp_path}']) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("no-such-run has no run") == 5, done.stderr
    assert done.stderr.count("did you mean lora?") == 3 and "peftbench train" in done.stdout


def test_the_help_of_train_names_options_as_they_are_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "films.yaml").write_text("")
    assert main(["train", "--help", "--config-dir", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "experiment: paper/figure2, " in told and "hydra/launcher: local, ray, slurm" in told
    assert re.search(r"task: chat, [^:]*, films ", told)


def test_one_run_leaves_a_whole_record(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *smoke, "method=mam"]) == 0
    (record,) = records(tmp_path / "outputs")
    folder = next((tmp_path / "outputs").rglob("record.json")).parent
    assert record["status"] == "done" and record["method"] == "mam"
    assert [axes["prefix"] for axes in record["axes"]] == ["", "mix.attention."]
    counts = record["counts"]
    assert counts["stored"] < counts["trained"]
    assert record["scores"]["report"]["examples"] == 16
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        ".lock",
        "adapter/adapter.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "predictions.jsonl",
        "record.json",
    ]
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 16
    printed = capsys.readouterr().out
    assert "relu · ffn · parallel · scaled" in printed and str(folder) in printed.replace("\n", "")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A tiny GPT-2 in a folder, as the published one: neither its config nor its tokenizer knows a pad token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["a fine film number", "a dull film number"], trainer)
    folder = tmp_path / "tiny_gpt2"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    size = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", long_tail(("lora", "mam"), "lora"))
def test_a_decoder_without_a_pad_token_classifies(method: str, smoke: list[str], gpt2: Path, tmp_path: Path) -> None:
    """Texts of unequal length in one batch, with the end-of-text token behind the shorter ones."""
    arguments = ["train", *smoke, f"method={method}", "model=gpt2", f"model.path={gpt2}"]
    assert main(arguments) == 0
    (record,) = records(tmp_path / "outputs")
    assert record["status"] == "done" and record["scores"]["report"]["examples"] == 16


def test_padding_of_a_decoder_stands_behind_the_text(gpt2: Path) -> None:
    """Whatever its tokenizer prefers: a row's logits are those that it has alone."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gpt2, padding_side="left")
    tokenizer.save_pretrained(gpt2)
    task = Task(name="sentiment", kind=TaskKind.classification, labels=["bad", "good"])
    backbone = load_backbone(Model(path=str(gpt2)), task)
    backbone.model.eval()
    texts = ["a fine film number 17", "a dull film"]
    both = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    alone = backbone.tokenizer(texts[1:], return_tensors="pt")
    assert both["input_ids"][1, -1] == 0 and both["attention_mask"][1, -1] == 0
    with torch.no_grad():
        difference = backbone.model(**both).logits[1] - backbone.model(**alone).logits[0]
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("task", long_tail(("stsb", "cola", "mrpc"), "stsb"))
def test_glue_reports_its_own_metrics(task: str, tmp_path: Path) -> None:
    """A regression, Matthews' correlation, and F1 with accuracy, on the selection and the report split."""
    texts = {"sentence": "one", "sentence1": "one", "sentence2": "two"}
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({**texts, "label": i % 2}) + "\n" for i in range(24))
        )
    overrides = [f"task={task}", "model=mini", f"task.data_dir={tmp_path}", "debug=smoke", "trainer.max_steps=2"]
    assert main(["train", *overrides, "method=lora", f"output_dir={tmp_path / 'outputs'}"]) == 0
    (record,) = records(tmp_path / "outputs")
    expected = {"stsb": {"pearson", "spearman"}, "cola": {"matthews", "accuracy"}, "mrpc": {"f1", "accuracy"}}
    assert set(record["scores"]["report"]["metrics"]) == expected[task]
    assert record["scores"]["report"]["split"] == "validation"


def test_translation_by_loss_in_batches_of_tokens(tmp_path: Path) -> None:
    """The paper's way, on a backbone without language codes: raw and normalised BLEU with their signatures."""
    rows = [{"en": "the house " * (1 + i % 5), "ro": "casă " * (1 + i % 5)} for i in range(32)]
    for name in ("train", "dev", "test"):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    overrides = ["task=wmt16_enro", "model=mini", f"task.data_dir={tmp_path}", "debug=smoke", "method=lora"]
    overrides += [
        "trainer.batch_tokens=64",
        "trainer.max_steps=6",
        "trainer.evaluate_every=2",
        f"output_dir={tmp_path / 'outputs'}",
    ]
    assert main(["train", *overrides]) == 0
    (record,) = records(tmp_path / "outputs")
    assert set(record["scores"]["report"]["metrics"]) == {"bleu_ro", "bleu", "chrf"}
    assert set(record["data"]["signatures"]) == {"bleu_ro", "bleu", "chrf"}
    folder = next((tmp_path / "outputs").rglob("record.json")).parent
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in logged if "eval_loss" in line]
    assert len(losses) >= 2 and losses[-1] < losses[0]


def test_a_finished_run_is_not_trained_again(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *smoke, "method=head"]
    assert main(arguments) == 0
    created = [record["created"] for record in records(tmp_path / "outputs")]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "done already" in capsys.readouterr().out
    assert [record["created"] for record in records(tmp_path / "outputs")] == created
    assert main([*arguments, "rerun=true"]) == 0
    assert [record["created"] for record in records(tmp_path / "outputs")] != created


def test_a_sweep_runs_every_combination(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["method=adapter", "insertion_form=sequential,parallel", "modified_representation=attention,ffn"]
    assert main(["train", "-m", *smoke, *sweep]) == 0
    found = records(tmp_path / "outputs")
    points = {(r["axes"][0]["insertion_form"], r["axes"][0]["modified_representation"]) for r in found}
    assert len(found) == len(points) == 4 and all(record["status"] == "done" for record in found)
    assert "4 of 4 runs are done." in capsys.readouterr().out


@pytest.mark.slow
def test_a_budget_is_recorded_with_the_bottlenecks_that_it_became(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep of three budgets of which two come to the same sizes: one run, trained once."""
    assert main(["train", "-m", *smoke, "method=mam", "budget=3%,142k,50k"]) == 0
    assert "2 of 2 runs are done." in capsys.readouterr().out
    small, large = sorted(records(tmp_path / "outputs"), key=lambda record: int(record["counts"]["stored"]))
    assert (small["budget"], large["budget"]) == ("50k", "3%")
    (plan,) = (tmp_path / "outputs").rglob("*.sweep.json")
    assert {point["folder"].rpartition("/")[2] for point in json.loads(plan.read_text())["points"]} == {
        small["run"],
        large["run"],
    }
    assert 45_000 < small["counts"]["stored"] <= 50_000 < 138_000 < large["counts"]["stored"] <= 142_000
    assert all(r["axes"][0]["bottleneck"] > r["axes"][1]["bottleneck"] >= 1 for r in (small, large))
    config = next((tmp_path / "outputs").rglob(f"{large['run']}/config.yaml")).read_text()
    assert "budget: 3%" in config and f"\nbottleneck: {large['axes'][0]['bottleneck']}\n" in config


def test_no_run_of_a_sweep_starts_where_a_budget_is_too_small(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", *smoke, "method=mam,lora", "budget=5%,1k"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2 and "the smallest mam on mini" in error and "the smallest lora on mini" in error
    assert not (tmp_path / "outputs").exists()


def test_one_failing_run_does_not_stop_a_sweep(
    smoke: list[str], tmp_path: Path, sentiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault that only the loaded model shows: the sweep goes on, its table names it, and the exit code is 1."""
    arguments = ["train", "-m", *smoke, "method=lora", "modified_representation.layers=[99],[0]"]
    assert main(arguments) == 1
    assert sorted(str(record["status"]) for record in records(tmp_path / "outputs")) == ["done", "failed"]
    captured = capsys.readouterr()
    assert "modified_representation.layers: 99 is outside" in captured.err
    assert "1 of 2 runs are done." in captured.out


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        (["method=lroa"], ["method=lroa is unknown; did you mean lora?"]),
        (["functional_form=reluu"], ["functional_form=reluu is unknown; did you mean relu?"]),
        (["bottleneck=-3"], ["bottleneck=-3: the bottleneck must be a whole number of at least 1."]),
        (["bottleneck=many"], ["bottleneck=many: a whole number is expected."]),
        (["init=brt"], ["init=brt is unknown; did you mean bert?"]),
        (["init=xavier"], ["init=xavier is unknown. Choices: bert, lora."]),
        (["learning_rate=1", "path=x"], ["did you mean trainer.learning_rate?", "did you mean model.path?"]),
        (["modified_representation.stacks=decoder"], ["a list is expected, as in modified_representation.stacks=["]),
        (["mix=[]", "mix.prefix.bottleneck=3"], ["there is no prefix in the mixture; add one, such as mix=[prefix]."]),
        (["method", "lora"], ["method is not KEY=VALUE", "lora is not KEY=VALUE"]),
        (["task.prompt=read: {source}"], ["cannot be read; if the value itself has commas"]),
        (["task.prompt=Jörg"], ["a letter other than A to Z, put it in both kinds of quotes, 'task.prompt=\"...\"'."]),
        (
            ["search=null"],
            ["search=null chooses nothing; leave search out for its default, or give one of: lr3, lr5, optuna."],
        ),
        (["mix=[null]", "debug=null"], ["mix=[null] chooses nothing; leave mix out", "debug=null chooses nothing;"]),
        (
            ["mix=[prefix]", "mix.attention.modified_representation=value", "task.generation=3"],
            [
                "but keys below it; give mix.attention.modified_representation.name=value.",
                "but keys below it; give one of them, such as task.generation.num_beams=...",
            ],
        ),
        (["experiment/paper=table5"], ["give experiment=paper/table5."]),
        (["+experiment=paper/table5"], ["experiment is already in the config; leave out the +."]),
        (["--method", "lora"], ["--method is no option of peftbench train"]),
        (["-m", "method=lora,mam", "--cfg", "job"], ["--cfg shows the config of one run"]),
        (["--cfg", "job", "metod=lora"], ["did you mean method?"]),
        (["seed=-1"], ["seed=-1: it must be a whole number from 0 to 4294967295."]),
        (["trainer.learning_rate=nan", "trainer.weight_decay=-1"], ["above 0.", "trainer.weight_decay=-1.0"]),
        (["task=stsb", "trainer.label_smoothing=0.1"], ["label_smoothing=0.1 with task=stsb: a number is predicted"]),
        (["composition_function.scale=inf"], ["composition_function.scale=inf: it must be a finite number."]),
        (["bottlenek=3"], ["bottlenek is not a key of the config; did you mean bottleneck?"]),
        (["trainer.epoch=3"], ["trainer.epoch is not a key of the config (in trainer); did you mean epochs?"]),
        (
            ["trainer.foo=1"],
            ["not a key of the config (in trainer); peftbench ls keys trainer lists all."],
        ),
        (["blurb=1"], ["blurb is not a key of the config; peftbench ls keys lists all."]),
        (["lr=1"], ["lr is not a key of the config; did you mean trainer.learning_rate?"]),
        (["task.train=a"], ["(in task); did you mean max_train or train_file or train_split?"]),
        (["task.data_dir=/nowhere"], ["task.data_dir=/nowhere is not a folder"]),
        (["model.path=/nowhere"], ["model.path=/nowhere is not a folder"]),
        (["task=text_to_text"], ["task=text_to_text has no data; give task.train_file=FILE"]),
        (["task.train_file=/nowhere.csv"], ["task.train_file=/nowhere.csv is not a file; give"]),
        (
            ["task.data_files.train=a.csv"],
            ["not a key of the config (in task.data_files); +task.data_files.train=... adds"],
        ),
        (["task.data_files={train:a.csv}"], ["+task.data_files.train=... adds it."]),
        (["+task.data_files={train:/nowhere.csv}"], ["task.data_files.train=/nowhere.csv is not a file; give"]),
        (["task=sst2", "task.paper.lerning_rate=1"], ["(in task.paper); did you mean learning_rate?"]),
        (["task.train_file=nowhere.csv"], ["task.train_file=nowhere.csv is not a file below /"]),
        (["task.text_columns=[]"], ["task.text_columns=[] must name one column, or two for a pair."]),
        (["task.labels=[a,b,a]"], ["task.labels=[a,b,a] names a label twice."]),
        (["task.labels=[a]"], ["task.labels=[a] names one label; two or more are needed."]),
        (["task.metric=f1"], ["task.metric=f1 is the F1 of the second of two labels"]),
        (["task.metric=bleu"], ["task.metric=bleu is unknown. Choices: accuracy, f1, macro_f1, matthews."]),
        (
            ["task=sst2", f"task.validation_file={__file__}", f"task.test_file={__file__}"],
            ["task=sst2 selects and reports on its validation split"],
        ),
        (["bottleneck=8,16"], ["add -m to run each of them"]),
        (["method=[lora,mam]"], ["method=[lora,mam]: method takes one option; use -m and commas to train several."]),
        (
            ["composition_function=gated", "functional_form=relu", "insertion_form=sequential"],
            ["composition_function=gated with insertion_form=sequential means nothing"],
        ),
        (["model.dtype=bfloat16", "trainer.precision=fp32"], ["computes in bfloat16"]),
        (["trainer.graphs=true", "trainer.micro_batch=auto"], ["trainer.graphs=false, or trainer.micro_batch=null"]),
        (["trainer.graphs=true", "trainer.device=cpu"], ["CUDA graphs need a GPU"]),
        (["trainer.graphs=maybe"], ["trainer.graphs=maybe: it must be auto, true or false"]),
        (["trainer.padding_free=true", "method=prompt"], ["use trainer.batching=bucketed"]),
        (["method=mam", "modified_representation.attentions=[self]"], ["modified_representation=ffn has none"]),
        (["method=prompt", "modified_representation.layers=[0]"], ["comes before the first stack"]),
        (["method=full", "functional_form=relu"], ["a modification needs all four axes"]),
        # UniPELT names a size of the prefix that its own mixture has, and this one has not
        (["method=unipelt", "mix=gated_lora"], ["mix.attention.composition_function=none: a modification needs"]),
        (["method=ia3", "insertion_form=parallel"], ["its name is insertion_form=sequential"]),
        (["method=ia3", "functional_form=relu"], ["bottleneck=null: the bottleneck must be a whole number"]),
        (["method=ia3", "composition_function=add"], ["softmax does not see a vector that is added to every key"]),
        (["method=pfeiffer", "functional_form=constant"], ["set bottleneck=null, bias=false"]),
        (["method=pfeiffer", "composition_function=multiply"], ["use unfreeze=norm, or modified_representation=ffn"]),
        (
            ["model.hub_id=some/model"],
            ["some/model changes nothing with model=mini, which ships with peftbench; start from"],
        ),
        # such as output_dir=$UNSET in a shell
        (["output_dir=", "model.path="], ["output_dir= has no value; give one", "model.path= has no value; give one"]),
        (["task.data_dir=", "task.train_split="], ["task.data_dir= has no value", "task.train_split= has no value"]),
        (["search=lr3", "search.keys={}"], ["search.keys={} changes nothing, because a mapping is added to; leave it"]),
        (
            ["hydra/sweeper=nevergrad"],
            ["a plugin of Hydra, which is not installed: pip install hydra-nevergrad-sweeper."],
        ),
        (["jobs=0"], ["jobs=0: it must be a whole number of at least 1, or auto."]),
        (["budget=lots"], ["budget=lots is not a budget; give a share of the backbone such as budget=6.7%"]),
        (["budget=-1"], ["such as budget=599k, budget=27.4M or budget=599232."]),
        (["budget=6,7%"], ["budget=6,7% names several values; add -m to run each of them. A decimal has a point"]),
        (["budget=5%", "bottleneck=8"], ["bottleneck=8 with budget=5%: the bottlenecks are computed from the budget"]),
        (["budget=5%", "mix.attention.bottleneck=8"], ["mix.attention.bottleneck=8 with budget=5%: the bottlenecks"]),
        (["method=bitfit", "budget=5%"], ["budget=5% determines bottlenecks, but method=bitfit has none"]),
        (
            ["budget=5%", "budget_split=[9]"],
            ["for each modification of method=mam, in this order: the root's, mix.att"],
        ),
        (["budget=5%", "budget_split=[inf,1]"], ["budget_split=[inf, 1] must have a number above 0 for each"]),
        (["budget_split=[9,1]"], ["budget_split divides a budget, but there is none; give one"]),
        (["budget=1k"], ["budget=1k: the smallest mam on mini stores 6,534 parameters"]),
        (
            ["method=lroa", "bottleneck=-3", "trainer.learning_rate=0"],
            ["did you mean lora?", "bottleneck=-3", "trainer.learning_rate=0"],
        ),
    ],
)
def test_bad_overrides_are_refused_in_sentences(
    overrides: list[str], sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"output_dir={tmp_path}/outputs", *overrides]) == 2
    error = capsys.readouterr().err
    assert all(sentence in error for sentence in sentences)
    assert "Traceback" not in error and len(error.splitlines()) == len(sentences)
    assert not (tmp_path / "outputs").exists()


def own_csv(folder: Path, rows: str) -> str:
    file = folder / "own.csv"
    file.write_text(rows)
    return f"task.train_file={file}"


TEN_LINES = "\n".join(f'"{"fine" if i % 2 else "dull"}, number {i}",{"good" if i % 2 else "bad"}' for i in range(10))


@pytest.mark.parametrize(
    ("task", "header", "columns"),
    [
        ("text_classification", "text,label", ["trainer.keep=best"]),
        ("text_to_text", "text,label", ["task.source_column=text", "task.target_column=label"]),
    ],
)
def test_a_csv_of_ten_lines_is_enough(
    task: str, header: str, columns: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record says how it was split, and what the labels are."""
    file = own_csv(tmp_path, f"{header}\n{TEN_LINES}\n")
    arguments = ["train", f"task={task}", file, *columns, "debug=smoke", f"output_dir={tmp_path / 'outputs'}"]
    assert main(arguments) == 0
    (record,) = records(tmp_path / "outputs")
    assert {role: split["examples"] for role, split in record["data"]["splits"].items()} == {
        "train": 8,
        "selection": 1,
        "report": 1,
    }
    notes = record["data"]["notes"]
    assert any(
        "own.csv is split by a hash of the input: validation and test each have one in ten" in note for note in notes
    )
    if task == "text_classification":
        assert record["data"]["labels"] == ["bad", "good"]
        assert any("The labels are those of" in note and "in this order: bad, good." in note for note in notes)
    assert notes[0] in capsys.readouterr().out.replace("\n", "") or len(notes[0]) > 80  # wrapped at the console's width


def _torn(folder: Path) -> None:
    (folder / "train.tsv").unlink()
    (folder / "train.jsonl").write_text('{"sentence": "fine", "label": 1}\n{"sentence": "to')


def _unknown_label(folder: Path) -> None:
    (folder / "train.tsv").write_text("sentence\tlabel\nfine\t1\nodd\t7\n")


def _missing_column(folder: Path) -> None:
    (folder / "train.tsv").write_text("sentence\tgrade\nfine\t1\n")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [(_torn, "train.jsonl:2"), (_unknown_label, "train.tsv:3"), (_missing_column, "task.label_column")],
)
def test_bad_files_are_named_with_their_line(
    spoil: Callable[[Path], None],
    sentence: str,
    smoke: list[str],
    sentiment: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(sentiment)
    assert main(["train", *smoke, "method=head"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert list((tmp_path / "outputs").iterdir()) == []  # neither a record nor the lock of a run


@pytest.mark.slow
def test_a_sweep_keeps_what_was_refused_and_says_why(
    smoke: list[str], sentiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _missing_column(sentiment)
    assert main(["train", "-m", *smoke, "method=head", "seed=1,2"]) == 1
    failed = records(tmp_path / "outputs")
    assert [record["error"]["name"] for record in failed] == ["refused", "refused"]
    capsys.readouterr()
    assert main(["train", "-m", *smoke, "method=head", "seed=1,2"]) == 1
    assert f"This run failed before (refused: {failed[0]['error']['message']})" in capsys.readouterr().err


def test_a_model_folder_without_config_and_a_hub_id_without_network(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftbench.backbones.load.explain_missing_hub", lambda: "the hub cannot be reached from here")
    (tmp_path / "empty").mkdir()
    for override, sentence in (
        (f"model.path={tmp_path / 'empty'}", "has no config.json"),
        ("model=roberta_base", "is not in this machine's cache and the hub cannot be reached"),
    ):
        assert main(["train", *smoke, override]) == 2
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_results_as_table_json_and_csv(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = tmp_path / "outputs"
    main(["train", *smoke, "method=lora"])
    torn = outputs / "torn"
    torn.mkdir()
    (torn / "record.json").write_text('{"schema_version": 1, "meth')
    capsys.readouterr()
    assert main(["results", str(outputs)]) == 0
    captured = capsys.readouterr()
    assert "lora" in captured.out and "torn/record.json is left out" in captured.err
    assert main(["results", str(outputs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["method"] == "lora"
    assert main(["results", str(outputs), "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("folder,")
    assert main(["results", str(tmp_path / "nowhere")]) == 2


@pytest.mark.slow
def test_a_users_own_folder_adds_methods(smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "own" / "method" / "tiny_lora.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("# @package _global_\ndefaults:\n  - lora\nmethod: tiny_lora\nbottleneck: 1\n")
    assert main(["train", *smoke, "method=tiny_lora", "--config-dir", str(tmp_path / "own")]) == 0
    (record,) = records(tmp_path / "outputs")
    assert record["method"] == "tiny_lora" and record["axes"][0]["bottleneck"] == 1
    proposed = capsys.readouterr().out.splitlines()[-1].split()
    assert f"--config-dir={tmp_path / 'own'}" in proposed  # the task may be of that folder too
    assert main(["params", *proposed[proposed.index("-m") :]]) == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "# @package _global_\ndefaults:\n  - lora\nbottleneck: 1\n",
            "own.yaml has method: lora; write method: own, the",
        ),
        (
            "# @package _global_\nmethod: own\nbottlneck: 1\n",
            "method/own.yaml: bottlneck is not a key of the config; did you mean bottleneck?",
        ),
        (
            "# @package _global_\ndefaults: [mam]\nmix:\n  attention:\n    initt: bert\n",
            "method/own.yaml: mix.attention.initt is not a key of the config (in mix.attention); did you mean init?",
        ),
        ("# @package _global_\nbottleneck: three\n", "method/own.yaml: bottleneck: a whole number is expected."),
        (
            "# @package _global_\nmodified_representation:\n  layers: 1\n  stacks: encoder\n",
            "method/own.yaml: modified_representation.layers: a list, such as [a, b], is expected.",
        ),
        ("# @package _global_\nlearning_rate: 1\n", "learning_rate is not a key of the config; did you mean trainer."),
        (
            "# @package _global_\nfunctional_form: relu\n",
            "own.yaml: functional_form: relu belongs in the defaults, as - override /functional_form: relu.",
        ),
        ("# @package _global_\ndefaults:\n  - override /functional_form: rellu\n", "functional_form=rellu is unknown"),
        ("# @package _global_\ndefaults: lora\n", "Invalid defaults list in 'method/own', defaults must be a list"),
        ("# @package _global_\ndefaults: [lora]\nbottleneck: ${size.lra.r}\n", "bottleneck: Interpolation key"),
        (
            "method: own\nbottleneck: 1\n",
            "own.yaml: its keys are read as method's own; a file with method: begins with # @package _global_.",
        ),
        ("method: own\nbias: [\n", "own.yaml:3 is not YAML: "),
        ("12\n", "own.yaml holds a value of type int; a file of a group has lines of KEY: VALUE."),
        ("!!set {a, b}\n", "own.yaml holds a value of type set; "),
        ("defaults:\n  - override /functional_form: relu\n", "begins with the line # @package _global_."),
    ],
)
def test_what_is_wrong_in_a_users_own_file(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "method" / "own.yaml"
    file.parent.mkdir()
    file.write_text(text)
    assert main(["train", "method=own", "--config-dir", str(tmp_path), f"output_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("variation", ["[1, 2]", "{value: [1]}"])
def test_what_is_wrong_in_a_users_own_search(
    variation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "own.yaml").write_text(f"name: own\nkeys:\n  trainer.learning_rate: {variation}\n")
    assert main(["train", "search=own", "--config-dir", str(tmp_path), f"output_dir={tmp_path}"]) == 2
    assert "; each of its keys has times: [...] or values: [...], as in conf/search/lr3" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--info", "defaults-tree"], ["--help"]])
def test_hydras_own_flags_work(arguments: list[str]) -> None:
    """In processes of their own: Hydra leaves its logging behind, which writes to a stream of this test alone."""
    done = subprocess.run([*SUBPROCESS, "train", "method=lora", *arguments], capture_output=True, text=True)
    assert done.returncode == 0
    assert "functional_form" in done.stdout


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("sizes.mini.lora.r=3", "    lora:\n      r: 3\n"),
        pytest.param("peft.target_modules=[c_attn]", "  target_modules:\n  - c_attn\n", marks=pytest.mark.slow),
        pytest.param("functional_form.settings.beta=1.5", "    beta: 1.5\n", marks=pytest.mark.slow),
    ],
)
def test_the_config_is_shown_of_keys_that_no_file_has(word: str, shown: str) -> None:
    words = {"peft": ["method=peft", "peft.type=DORA"], "functional_form": ["functional_form._target_=torch.nn.Tanh"]}
    line = [*SUBPROCESS, "train", "method=lora", *words.get(word.partition(".")[0], []), word, "--cfg", "job"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("peftbench train method=ma", ["method=mam"]),
        ("peftbench params -m insertion_form=s", ["insertion_form=sequential"]),
        ("peftbench re", ["results", "report", "reproduce", "rescore"]),
        ("peftbench evaluate 3f2a91c0 task.generation.num_", ["task.generation.num_beams="]),
        ("peftbench train -m method=full and 'task.prompt=\"a {source}\"' method=ma", ["method=mam"]),
        ("peftbench results me", []),
    ],
)
def test_tab_completion_knows_subcommands_groups_and_choices(
    line: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == words


@pytest.mark.slow
def test_ctrl_c_leaves_an_interrupted_record(smoke: list[str], tmp_path: Path) -> None:
    arguments = [*SUBPROCESS, "train", *smoke, "method=lora", "trainer.max_steps=100000"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not find_live(tmp_path / "outputs", "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.5)
        if find_live(tmp_path / "outputs", "record.json") and time.monotonic() > deadline - 90:
            break  # it trains, though nothing has been logged yet
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "peftbench: interrupted; the same line goes on with this run.\n"
    assert [record["status"] for record in records(tmp_path / "outputs")] == ["interrupted"]


@pytest.fixture
def idle_cross_attention(tmp_path: Path) -> Path:
    """A folder with a BERT decoder: as a classifier it has cross-attentions that never run."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    mini = EMBEDDED / "mini"
    vocabulary = json.loads((mini / "config.json").read_text())["vocab_size"]
    model = BertForSequenceClassification(
        BertConfig(vocab_size=vocabulary, is_decoder=True, add_cross_attention=True, pad_token_id=1, **sizes)
    )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(mini / name, folder)
    return folder


def test_a_tensor_that_gets_no_gradient_is_refused_by_name(
    smoke: list[str], idle_cross_attention: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one sentence, a failed record; allow_unused=true goes on and the record lists the tensors."""
    arguments = ["train", *smoke, f"model.path={idle_cross_attention}", "method=lora"]
    names = [
        f"bert.encoder.layer.0.crossattention.self.{part}.modification.function.{tensor}"
        for part in ("query", "value")
        for tensor in ("down", "up")
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in names) and "allow_unused=true" in error
    assert "Traceback" not in error and len(error.splitlines()) == 1
    (record,) = records(tmp_path / "outputs")
    assert record["status"] == "failed" and record["unused"] == names

    assert main([*arguments, "allow_unused=true"]) == 0
    (record,) = records(tmp_path / "outputs")
    assert record["status"] == "done" and record["unused"] == names and record["timings"]["probe_s"] > 0
    assert main([*arguments, "modified_representation.attentions=[self]"]) == 0
    assert sorted(len(record["unused"]) for record in records(tmp_path / "outputs")) == [0, 4]
