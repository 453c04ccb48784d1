"""The sizes of a column on other backbones than its own: the same share of them, said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import BartConfig, LlamaConfig, PretrainedConfig

from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.schema import Run, find_conf_dir, list_modifications
from peftbench.config.sizes import list_sizes_taken
from peftbench.counts import shares
from peftbench.counts.run_counts import count_run
from peftbench.counts.shares import fit_sizes, note_of
from peftbench.records.location import locate_run
from peftbench.records.record import load_records
from tests.families import build, list_methods

METHODS = ("mam", "lora", "lora_ffn", "adapter", "pfeiffer", "prefix", "parallel_adapter", "unipelt", "prefix_lora_ffn")
SMALL = {"d_model": 320, "encoder_ffn_dim": 1280, "decoder_ffn_dim": 1280, "encoder_attention_heads": 5}
SMALL |= {"decoder_attention_heads": 5, "encoder_layers": 6, "decoder_layers": 6, "vocab_size": 8192}
SMALL |= {"max_position_embeddings": 512}
TEXT = ("task=xsum",)


def folder_of(config: PretrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return f"model.path={folder}"


@pytest.fixture
def small(tmp_path: Path) -> str:
    """The config.json of a BART of width 320."""
    return folder_of(BartConfig(**SMALL), tmp_path / "small")


def run_of(*words: str) -> Run:
    return compose_run(words, reads_data=False)


def sizes(run: Run) -> list[int | None]:
    return [m.bottleneck for m in list_modifications(run).values()]


def percent(run: Run) -> float:
    counts = count_run(run).totals
    return counts.percent(counts.stored)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_small_backbone_takes_the_share_of_the_large_one(method: str, small: str) -> None:
    """Of the paper's BART-large: no more, and hardly less."""
    paper = percent(run_of("task=xsum", f"method={method}"))
    run = run_of(*TEXT, "model=bart_large", small, f"method={method}")
    assert 0.95 * paper < percent(run) <= paper
    found = fit_sizes(run)
    assert sizes(found) != sizes(run) and max(size or 0 for size in sizes(found)) < 320


def test_mam_on_a_small_bart(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As `budget` solves it, and told by params and explain."""
    words = [*TEXT, "model=bart_large", small, "method=mam"]
    share = percent(run_of("task=xsum", "method=mam"))
    assert sizes(count_run(run_of(*words)).run) == sizes(count_run(run_of(*words, f"budget={share:.6f}%")).run)
    r, length = sizes(fit_sizes(run_of(*words)))
    note = (
        f"bottleneck={r} mix.attention.bottleneck={length}: the sizes of generation (512, 30) were made for bart_large "
        "and mbart_large; these store the same share of small, 6.75%."
    )
    for command in ("params", "explain"):
        assert main([command, *words, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said[0] if command == "params" else said)["notes"] == [note]
        assert main([command, *words]) == 0
        assert " ".join(note.split()) in " ".join(capsys.readouterr().out.split())
    assert main(["params", "-m", *words[:-1], "method=mam,lora"]) == 0
    assert note in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_decoder_takes_the_share_too(tmp_path: Path) -> None:
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    path = folder_of(LlamaConfig(**shape), tmp_path / "decoder")
    for method in ("mam", "lora"):
        paper = percent(run_of("task=xsum", f"method={method}"))
        assert 0.95 * paper < percent(run_of(*TEXT, "model=llama", path, f"method={method}")) <= paper


@pytest.mark.parametrize(
    "words",
    [
        ("task=xsum",),
        ("task=wmt16_enro",),  # mBART-large, with the paper's sizes for BART-large
        ("task=sst2",),
        ("task=sst2", "model=bert_base"),  # the same layers, another vocabulary
        ("task=doctopic",),
        ("task=docsum",),
        *((row, "task=docsum", "model=mini") for row in ("row=mam_30_512", "row=pa_ffn_1024", "row=prefix_200")),
    ],
)
def test_what_keeps_its_sizes(words: tuple[str, ...]) -> None:
    """The column's own backbone or nearly that, and the rows of the paper's tables on any."""
    for method in ([],) if words[0].startswith("row=") else (["method=mam"], ["method=adapter"]):
        run = run_of(*words, *method)
        assert sizes(fit_sizes(run)) == sizes(run) and note_of(fit_sizes(run)) is None


def test_the_decoders_column_is_two_percent_of_its_backbone() -> None:
    """But for methods without a size, prompts, and whole numbers of r: no more than 2%, the learning rates' share."""
    column = OmegaConf.load(find_conf_dir() / "sizes.yaml")["decoder"]
    sized = [name for name, row in column.items() if name not in ("of", "mix", "prompt") and {"r", "l"} & set(row)]
    assert len(sized) == 15
    for method in sized:
        found = percent(run_of("model=smollm2_135m", "task=webnlg", f"method={method}"))
        assert 1.8 < found <= 2.01, method


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm3_3b", "gemma3_270m", "llama3_1_8b"])
def test_other_decoders_take_the_share_of_smollm2(model: str) -> None:
    """And its learning rates: neither r = 512 nor the rates of BART."""
    for method, rate in (("lora", 2e-3), ("mam", 5e-4), ("lora_all", 5e-4)):
        run = run_of(f"model={model}", "task=webnlg", f"method={method}", "trainer=quick")
        assert run.trainer.learning_rate == rate
        own = percent(run_of("model=smollm2_135m", "task=webnlg", f"method={method}"))
        assert 0.9 * own < percent(run) <= own


def test_every_column_has_every_method() -> None:
    columns = OmegaConf.to_container(OmegaConf.load(find_conf_dir() / "sizes.yaml"))
    assert isinstance(columns, dict)
    methods = set(list_methods()) - {"lora_plus"}  # which takes LoRA's
    for name, column in columns.items():
        assert set(column) - {"of", "mix"} == methods, name


def test_the_columns_own_backbone_in_a_folder_keeps_them(tmp_path: Path) -> None:
    path = folder_of(BartConfig(), tmp_path / "my-bart-large")  # transformers' defaults are nearly BART-large's
    run = run_of("task=xsum", "method=mam", path)
    assert sizes(fit_sizes(run)) == [512, 30]


def test_what_is_typed_stays(small: str) -> None:
    words = (*TEXT, "model=bart_large", small, "method=mam")
    assert sizes(fit_sizes(run_of(*words, "bottleneck=64", "mix.attention.bottleneck=8"))) == [64, 8]
    r, length = sizes(fit_sizes(run_of(*words, "bottleneck=64")))
    assert r == 64 and length is not None and 1 < length < 30
    budget = run_of(*words, "budget=3%")
    assert fit_sizes(budget) is budget


def test_part_of_the_layers_has_the_bottleneck_of_all(small: str) -> None:
    """Layers that are left out are not made up for by larger bottlenecks, and may be there on this backbone alone."""
    words = (*TEXT, "model=bart_large", small, "method=lora")
    some = fit_sizes(run_of(*words, "modified_representation.layers=[-1]", "modified_representation.stacks=[decoder]"))
    assert sizes(some) == sizes(fit_sizes(run_of(*words)))


def test_on_its_own_backbone_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "count_resized", None)
    run = run_of("task=xsum", "method=mam")
    assert not list_sizes_taken(run) and fit_sizes(run) is run


def test_once_is_enough(small: str) -> None:
    """A run that was fitted before its sweep began is itself in its process."""
    found = fit_sizes(run_of(*TEXT, "model=bart_large", small, "method=mam"))
    assert fit_sizes(found) is found


def test_a_backbone_where_the_smallest_is_too_large(tmp_path: Path) -> None:
    """Of 0.5% of a tiny backbone a bottleneck of 1 is more; what it stores is shown."""
    path = folder_of(build("roberta").config, tmp_path / "tiny")
    assert sizes(fit_sizes(run_of("task=sst2", path, "method=adapter"))) == [1]


def test_more_than_the_backbone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "method=lora", "bottleneck=10000"]) == 2
    assert capsys.readouterr().err == (
        "peftbench: bottleneck=10000: 61,440,000 parameters would be stored, 1,297% of the 4,737,408 of mini itself; "
        "give fewer, such as budget=5%.\n"
    )
    assert main(["params", "method=full"]) == 0  # 100% is not more


def test_a_bottleneck_above_the_width_is_said() -> None:
    notes = count_run(run_of("method=lora", "bottleneck=193")).notes
    assert notes == ["bottleneck=193 is above the width of mini, 192."]
    assert count_run(run_of("method=lora", "bottleneck=192")).notes == []
    assert count_run(run_of("method=prefix", "bottleneck=200")).notes == []


def test_a_search_of_bottlenecks_multiplies_what_the_backbone_has(small: str, tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "half.yaml").write_text("name: half\nkeys:\n  bottleneck: {times: [1, 0.5]}\n")
    run = compose_run(
        [*TEXT, "model=bart_large", small, "method=lora", "search=half"], config_dir=str(tmp_path), reads_data=False
    )
    from peftbench.config.search import build_trials

    one = fit_sizes(run)
    (size,) = sizes(one)
    assert size is not None
    found = [sizes(fit_sizes(trial)) for trial in build_trials(one)]
    assert found == [[size], [round(size / 2)]]


def test_train_says_so_and_records_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And names an earlier run, whose bottlenecks were the column's."""
    model = build("bart", vocab_size=300, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64)
    from tests.backbones.test_backbone import saved

    path = f"model.path={saved(model, tmp_path / 'tiny')}"
    rows = "source,target\n" + "".join(f"good {i},good\n" for i in range(40))
    (tmp_path / "rows.csv").write_text(rows)
    words = ["task=text_to_text", f"task.train_file={tmp_path / 'rows.csv'}", "model=bart_large", path, "method=lora"]
    words += ["debug=smoke", "trainer.max_steps=2", f"output_dir={tmp_path / 'outputs'}"]
    before = locate_run(compose_run(words))
    assert main(["train", *words, "bottleneck=200"]) == 2  # more than all of it
    assert "bottleneck=200: 153,600 parameters would be stored, 271% of" in capsys.readouterr().err
    assert main(["train", *words]) == 0
    (record,) = load_records(tmp_path / "outputs")[0]
    (size,) = [axes.bottleneck for axes in record.axes]
    assert record.counts is not None and size is not None and size < 200
    assert record.notes == [
        f"bottleneck={size}: the sizes of generation (200) were made for bart_large and mbart_large; these store the "
        "same share of tiny, 7.26%."
    ]
    assert record.notes[0] in capsys.readouterr().out
    assert main(["train", "-m", *words, "seed=42"]) == 0
    assert "1 of them before" in capsys.readouterr().out
    record.folder.rename(before)  # as if it had been recorded then
    assert main(["train", *words]) == 0
    assert f"{before} is this run with the unchanged sizes of generation" in capsys.readouterr().out
