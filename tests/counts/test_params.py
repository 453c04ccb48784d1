"""`peftbench params`: its numbers, what it prints, and that it reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from peftbench.backbones.load import build_meta_backbone
from peftbench.cli.main import main
from peftbench.config import schema
from peftbench.config.compose import compose_points, compose_run
from peftbench.config.schema import Run
from peftbench.counts.run_counts import Built, Known, build_run, count_run
from peftbench.modification.attach import attach
from peftbench.modification.counting import count, count_places
from peftbench.modification.state import fold
from tests.families import FAMILIES, MORE_FAMILIES, PRESETS, build, table

NUMBERS = ("trained", "stored", "paper")


def composed(*overrides: str) -> Run:
    return compose_run(overrides)


def counted(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """What `peftbench params ... --json` prints."""
    assert main(["params", *arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("family", "preset"), table([*FAMILIES, *MORE_FAMILIES]))
def test_places_sum_to_the_totals(family: str, preset: str) -> None:
    """Place by place and in total, and each place's tensors are those that folding leaves there."""
    model = build(family)
    attach(model, PRESETS[preset])
    totals, places = count(model), count_places(model)
    for name in NUMBERS:
        assert sum(getattr(place, name) for place in places) == getattr(totals, name)
    fold(model)
    for place in places:
        left = {name: tuple(p.shape) for name, p in model.get_submodule(place.name).named_parameters()}
        assert place.tensors == left
        assert place.stored == sum(p.numel() for p in model.get_submodule(place.name).parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        "method=mam task=xsum",
        "method=adapter task=sst2",
        "method=bitfit task=sst2",
        "method=mam unfreeze=bias",
        "method=full",
        "method=head",
        "method=prompt",
        "method=lora_ffn modified_representation.stacks=[decoder]",
    ],
)
def test_groups_sum_to_the_totals(overrides: str) -> None:
    """The rows that are printed, with the backbone's own parameters where those are trained."""
    found = count_run(composed(*overrides.split()))
    for name in NUMBERS:
        assert sum(getattr(group, name) for group in found.groups) == getattr(found.totals, name)


PUBLISHED = [  # preset, task: the backbone's parameters without its task head
    ("bart_large", "xsum", 406_291_456),
    ("mbart_large", "xsum", 610_851_840),
    ("roberta_base", "sst2", 124_055_040),  # transformers' RobertaModel has a pooler of 590,592 more
    ("bert_base", "sst2", 109_482_240),
    ("t5_base", "xsum", 222_903_552),
    ("t5_base", "sst2", 222_903_552),
    ("gpt2", "sst2", 124_439_808),
    ("llama", "sst2", 1_235_814_400),
    # What the hub shows for each checkpoint (the sizes in its safetensors), tensors that are tied counted once:
    ("smollm2_135m", "webnlg", 134_515_008),
    ("smollm3_3b", "webnlg", 3_075_098_624),
    ("qwen3_0_6b", "webnlg", 596_049_920),  # shown with the tied output embedding counted twice: 751,632,384
    ("qwen3_4b", "webnlg", 4_022_468_096),
    ("gemma3_270m", "webnlg", 268_098_176),
    ("gemma3_1b", "webnlg", 999_885_952),
    ("llama3_2_1b", "webnlg", 1_235_814_400),
    ("llama3_2_3b", "webnlg", 3_212_749_824),
    ("llama3_1_8b", "webnlg", 8_030_261_248),
    ("modernbert_base", "sst2", 149_014_272),  # 149,655,232 with the head for masked tokens, 640,960
    ("deberta_v3_base", "sst2", 183_831_552),  # transformers' DebertaV2Model, without the discriminator's head
    ("xlm_roberta_base", "sst2", 277_453_056),  # 278,043,648 with the pooler
    ("flan_t5_base", "xsum", 247_577_856),
    ("nllb_600m", "wmt16_enro", 615_073_792),
]


@pytest.mark.parametrize(("model", "task", "parameters"), PUBLISHED)
def test_a_presets_architecture_is_the_published_model(model: str, task: str, parameters: int) -> None:
    run = composed(f"model={model}", f"task={task}", "method=full", *(["task.data_dir=."] if task == "webnlg" else []))
    assert count_run(run).totals.backbone == parameters
    assert run.model.architecture["name_or_path"] == run.model.hub_id


def test_bart_large_by_hand() -> None:
    """Embeddings once: the output embedding is tied to them. d = 1024, ffn 4096, positions 1024 + 2."""
    d, ffn = 1024, 4096
    norm, attention, feed_forward = 2 * d, 4 * (d * d + d), 2 * d * ffn + ffn + d
    encoder = 12 * (attention + feed_forward + 2 * norm)
    decoder = 12 * (2 * attention + feed_forward + 3 * norm)
    positions_and_norms = 2 * (1026 * d + norm)
    assert 50265 * d + encoder + decoder + positions_and_norms == 406_291_456
    assert (
        250027 * d + encoder + decoder + positions_and_norms + 2 * norm == 610_851_840
    )  # mBART ends its stacks in norms


def test_decoders_by_hand() -> None:
    """GPT-2: d = 768, tied embeddings, 1024 positions. Llama 3.2 1B: d = 2048, 8 of 32 heads for keys and values."""
    d = 768
    layer = 12 * d * d + 13 * d  # 3 d of q | k | v, d of W_o, 4 d and d of the FFN, two norms, each with its bias
    assert 50257 * d + 1024 * d + 12 * layer + 2 * d == 124_439_808
    d, ffn = 2048, 8192
    assert 128256 * d + 16 * (2 * d * d + 2 * d * d // 4 + 3 * d * ffn + 2 * d) + d == 1_235_814_400


def test_todays_decoders_by_hand() -> None:
    """A layer has queries and W_o, keys and values, three matrices of the FFN, and its norms; at the end is a norm."""

    def count_decoder(
        words: int, d: int, ffn: int, layers: int, queries: int, keys: int, norms: int, tied: bool = True
    ) -> int:
        layer = 2 * d * queries + 2 * d * keys + 3 * d * ffn + norms
        return (1 if tied else 2) * words * d + layers * layer + d

    assert count_decoder(49152, 576, 1536, 30, 9 * 64, 3 * 64, 2 * 576) == 134_515_008
    assert count_decoder(128256, 2048, 11008, 36, 16 * 128, 4 * 128, 2 * 2048) == 3_075_098_624
    assert count_decoder(151936, 1024, 3072, 28, 16 * 128, 8 * 128, 2 * 1024 + 2 * 128) == 596_049_920
    assert 596_049_920 + 151936 * 1024 == 751_632_384
    assert count_decoder(151936, 2560, 9728, 36, 32 * 128, 8 * 128, 2 * 2560 + 2 * 128) == 4_022_468_096
    assert count_decoder(262144, 640, 2048, 18, 4 * 256, 256, 4 * 640 + 2 * 256) == 268_098_176
    assert count_decoder(262144, 1152, 6912, 26, 4 * 256, 256, 4 * 1152 + 2 * 256) == 999_885_952
    assert count_decoder(128256, 3072, 8192, 28, 3072, 1024, 2 * 3072) == 3_212_749_824
    assert count_decoder(128256, 4096, 14336, 32, 4096, 1024, 2 * 4096, tied=False) == 8_030_261_248


def test_an_output_layer_of_its_own_is_counted(tmp_path: Path) -> None:
    """Flan-T5's. transformers' T5 config forgets that it is not tied, and keeps the checkpoint's weights apart."""
    model = build("t5_gated")
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(embedding))
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "tie_word_embeddings": False}))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    run = composed("task=docsum", "method=full", f"model.path={tmp_path}")
    found = count_run(run).totals.backbone
    assert (
        found
        == sum(p.numel() for p in loaded.parameters())
        == sum(p.numel() for p in build("t5").parameters()) + (embedding.numel() + 2 * 2 * 16 * 32)
    )


def test_t5_base_by_hand() -> None:
    """d = 768, ffn 3072, no biases, one norm before each sub-layer, 32 buckets of position bias for 12 heads."""
    d, ffn = 768, 3072
    encoder, decoder = 4 * d * d + 2 * d * ffn + 2 * d, 8 * d * d + 2 * d * ffn + 3 * d
    assert 32128 * d + 12 * (encoder + decoder) + 2 * (d + 32 * 12) == 222_903_552


@pytest.mark.parametrize("method", ["mam", "full", "prefix"])
def test_nothing_has_memory(method: str) -> None:
    """Every parameter is on the meta device, those that attach adds too; for a folder as for a preset."""
    for overrides in (("task=xsum",), ("task=docsum",), ("task=sst2", "model=bert_base")):
        run = composed(*overrides, f"method={method}")
        model = build_meta_backbone(run.model, run.task)
        attach(model, schema.list_modifications(run), run.unfreeze)
        assert all(parameter.is_meta for parameter in model.parameters())


def test_a_folder_needs_its_config_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers as with the weights loaded."""
    model = build("bert")
    model.config.save_pretrained(tmp_path)
    (found,) = counted(capsys, "method=lora", "task=mnli", f"model.path={tmp_path}", "bottleneck=8")
    attach(model, schema.list_modifications(composed("method=lora", "task=mnli", "bottleneck=8")))
    totals = count(model)
    assert [found[name] for name in ("backbone", "trained", "stored", "paper", "head")] == [
        totals.backbone,
        totals.trained,
        totals.stored,
        totals.paper,
        totals.head,
    ]
    assert found["model"] == tmp_path.name


KNOWN = [  # overrides: trained, stored, paper, head
    ("method=mam task=xsum", 25_202_688 + 61_608_288, 27_414_528, 27_377_664, 0),
    ("method=prefix task=xsum", 62_130_528, 14_745_600, 14_745_600, 0),
    ("method=pfeiffer task=xsum", 29_530_176, 29_530_176, 29_491_200, 0),
    ("method=lora task=xsum bottleneck=16", 2_359_296, 2_359_296, 2_359_296, 0),
    ("method=prompt task=xsum", 204_800, 204_800, 204_800, 0),
    ("method=mam task=sst2", 15_391_520 + 304_320, 599_232, 589_824, 592_130),
    ("method=lora task=mnli", 589_824, 589_824, 589_824, 592_899),
    ("method=bitfit task=sst2", 102_144, 102_144, 102_144, 592_130),
    # W_q and W_v of a fused projection are two places of d x d; the prefix of grouped heads is 2 l (8 x 64) numbers.
    ("method=lora task=sst2 model=gpt2", 589_824, 589_824, 589_824, 1_536),
    ("method=lora_ffn task=sst2 model=t5_base", 24 * 46_080, 24 * 46_080, 24 * 46_080, 592_130),
    ("method=prefix bottleneck=32 prefix_mlp=null task=sst2 model=llama", 524_288, 524_288, 524_288, 4_096),
]


@pytest.mark.parametrize(("overrides", "trained", "stored", "paper", "head"), KNOWN)
def test_known_counts(
    overrides: str, trained: int, stored: int, paper: int, head: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = counted(capsys, *overrides.split())
    assert [found[name] for name in (*NUMBERS, "head")] == [trained, stored, paper, head]
    for name in (*NUMBERS, "head"):
        assert found["percent"][name] == pytest.approx(100 * found[name] / found["backbone"])


OWN_FILES = ("text_classification", "text_to_text", "webnlg")  # whose data is on no hub
TASKS = sorted(path.stem for path in (schema.find_conf_dir() / "task").glob("*.yaml"))


@pytest.mark.parametrize("command", ["params", "explain"])
@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[] if task in OWN_FILES else pytest.mark.slow) for task in TASKS]
)
def test_no_task_needs_data(task: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """But for its labels, where only the data has them: their number is the size of the head."""
    assert {"webnlg", "wmt16_enro", "text_to_text"} <= set(TASKS)
    words = [command, "method=lora", f"task={task}", "--json"]
    if task in ("text_classification", "token_classification"):
        assert main(words) == 2
        sentence = f"task={task} has no labels, and their number is the size of the task head; give task"
        captured = capsys.readouterr()
        assert sentence in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
        words.append("task.labels=[O,B-A]" if task == "token_classification" else "task.labels=[a,b,c]")
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    numbers = found[0] if command == "params" else {**found, **found["totals"]}
    run = composed(*words[1:3], "task.data_dir=.")
    assert (numbers["task"], numbers["model"]) == (task, run.model.name) and numbers["stored"] > 0
    assert (numbers["head"] > 0) == (run.task.kind is not schema.TaskKind.text_to_text)


def test_labels_are_counted_where_a_file_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same number as with the labels named."""
    file = tmp_path / "train.csv"
    file.write_text("text,label\n" + "".join(f"text {row},{'abc'[row % 3]}\n" for row in range(12)), encoding="utf-8")
    (named,) = counted(capsys, "task=text_classification", "task.labels=[a,b,c]")
    (read,) = counted(capsys, "task=text_classification", f"task.train_file={file}")
    assert read["head"] == named["head"] > 0


def test_the_table_of_one_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["params", "method=mam", "task=xsum"]) == 0
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert max(map(len, printed.splitlines())) <= 80
    for line in (
        "mam on bart_large of 406,291,456 parameters without task head",
        "relu · ffn · parallel · scaled 4, bottleneck 512",
        "ffn ×24 down 512×1024 + 512 25,202,688 25,202,688 25,165,824",
        "encoder self heads ×12 down 16×30×64 20,536,096 737,280 737,280",
        "decoder self heads ×12 down 16×30×64 20,536,096 737,280 737,280",
        "decoder cross heads ×12 down 16×30×64 20,536,096 737,280 737,280",
        "total 86,810,976 27,414,528 27,377,664",
        "% of backbone 21.37 6.75 6.74",
    ):
        assert line in lines
    assert "task head" not in "".join(lines[1:])


def test_the_head_stands_beside_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "method=bitfit", "task=sst2"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "the backbone's biases 102,144 102,144 102,144" in lines
    assert "task head, in addition 592,130 592,130" in lines


def labels(*overrides: str) -> list[tuple[str, int]]:
    return [(group.label, group.places) for group in count_run(composed(*overrides)).groups]


def test_places_are_grouped_by_kind() -> None:
    assert labels("method=adapter", "task=sst2") == [("encoder self attention", 12), ("ffn", 12)]
    assert labels("method=lora", "task=xsum", "modified_representation.layers=[-1]") == [
        ("encoder self query_value", 2),
        ("decoder self query_value", 2),
        ("decoder cross query_value", 2),
    ]
    ffn = "decoder ffn_weights"  # the two weights have shapes of their own
    assert labels("method=lora_ffn", "modified_representation.stacks=[decoder]") == [(ffn, 2), (ffn, 2)]
    assert labels("method=prompt") == [("embedding", 1)]
    assert labels("method=head") == []


def test_a_sweep_is_one_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = ["-m", "method=adapter", "modified_representation=attention,ffn", "bottleneck=8,32", "task=xsum"]
    found = counted(capsys, *sweep)
    assert [(run["axes"][0]["modified_representation"], run["axes"][0]["bottleneck"]) for run in found] == [
        ("attention", 8),
        ("attention", 32),
        ("ffn", 8),
        ("ffn", 32),
    ]
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["params", *sweep]) == 0
    printed = capsys.readouterr().out
    assert printed.count("trained") == 1
    for run in found:
        assert f"{run['stored']:,}" in printed and f"{run['percent']['stored']:.2f}" in printed


def test_a_sweep_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns go, the stored count and its share stay."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["params", "-m", "method=full,mam,mh_parallel_adapter", "task=sst2,mnli"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "599,232" in printed and "0.48" in printed and "mnli" in printed


def test_a_point_of_a_sweep_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """The others are counted, the exit code is 1."""
    assert main(["params", "-m", "method=lora", "modified_representation.layers=[99],[0]"]) == 1
    captured = capsys.readouterr()
    assert "lora on mini: modified_representation.layers: 99 is outside" in captured.err
    assert captured.out.count("identity") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["method=lroa"], "method=lroa is unknown; did you mean lora?"),
        (["bottleneck=8,16"], "add -m to run each of them"),
        (["modified_representation.layers=[99]"], "modified_representation.layers: 99 is outside"),
        (
            ["model.path=null", "model.hub_id=some/model"],
            "How model.hub_id=some/model is built is not known without loading it: model.architecture is empty.",
        ),
        (["model.path=null"], "model.hub_id and model.path are both null"),
        (
            ["model=bart_large", "model.hub_id=facebook/bart-base"],
            "model.architecture is that of facebook/bart-large. Give a folder with its config.json",
        ),
        (["model=bert_base", "task=xsum"], "task=xsum writes text and model=bert_base is an encoder alone (bert)"),
        (["model=bert_base", "model.architecture.model_type=xlnet"], "The backbone's model_type is xlnet"),
        (["model=bert_base", "+model.architecture.vocab=9"], "model.architecture.vocab is no key of bert's config"),
        (["model=bert_base", "+model.architecture.hidden_size=wide"], "model.architecture does not fit bert"),
        (["model=bart_large", "+model.architecture.d_model=1000"], "describes no model that can be built"),
        (["model=bert_base", "model.architecture.model_type=null"], "model.architecture has no model_type"),
    ],
)
def test_what_is_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and not captured.out


def test_a_folder_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", f"model.path={tmp_path}"]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_options_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert counted(capsys, "method=lora,head", "-m", "seed=1")[1]["method"] == "head"


def test_counting_touches_no_random_numbers() -> None:
    """A meta model draws none, so that counting before a run changes nothing in it."""
    state = torch.get_rng_state()
    count_run(composed("method=mam"))
    assert torch.equal(state, torch.get_rng_state())


def test_a_sweep_counts_the_same_counts_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Run] = []

    def build(run: Run, *others: Any) -> Built:
        built.append(run)
        return build_run(run, *others)

    monkeypatch.setattr("peftbench.counts.run_counts.build_run", build)
    line = ["-m", "method=lora,bitfit", "trainer.learning_rate=1e-3,1e-4", "seed=1,2"]
    found = counted(capsys, *line)
    assert [(run.method, run.seed) for run in built] == [("lora", 1), ("bitfit", 1)]
    assert [one["method"] for one in found] == 4 * ["lora"] + 4 * ["bitfit"] and found[:4] == 4 * [found[0]]
    known = Known()
    runs = [run for _, run in compose_points(line[1:], multirun=True)]
    assert [count_run(run, known) for run in runs] == [count_run(run) for run in runs]
