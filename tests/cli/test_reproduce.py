"""The paper's tables as sweeps: every row composes to what the paper printed, and its scores stand beside ours."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from peftbench.cli.reproduce import describe_runs, main
from peftbench.config.compose import compose_points, compose_run
from peftbench.config.rows import read_rows, read_scores
from peftbench.config.schema import Run, find_conf_dir
from peftbench.records.record import Score
from peftbench.records.recording import record_run
from peftbench.utils.errors import UserError

TABLES = sorted(file.stem for file in (find_conf_dir() / "experiment" / "paper").glob("*.yaml"))
SEEDS = [42, 2, 4, 6, 8]
ROWS = list(read_rows())
METHODS = sorted(file.stem for file in (find_conf_dir() / "method").glob("*.yaml"))
PRINTED = {
    **{row: read_scores(row, "") for row in ROWS},
    **{f"method={name}": read_scores(None, name) for name in METHODS},
}
SCORES: Any = {  # by table and row
    table: {name.removeprefix("method="): of[table] for name, of in PRINTED.items() if table in of}
    for table in dict.fromkeys(table for of in PRINTED.values() for table in of)
}


def swept(table: str) -> dict[str, list[str]]:
    """What a table's file goes over, by key."""
    params = OmegaConf.load(find_conf_dir() / "experiment" / "paper" / f"{table}.yaml").hydra.sweeper.params
    return {str(key): [str(word).strip() for word in str(value).split(",")] for key, value in params.items()}


def composed(names: list[str], *default: str) -> list[Any]:
    """The names as parameters of a test; those that are not `default` take long to compose and are slow."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


@cache
def points(*overrides: str) -> list[tuple[list[str], Run]]:
    return compose_points(overrides, multirun=True)


def names(found: list[tuple[list[str], Run]]) -> list[str]:
    return [next(word for word in words if word.startswith("row=")).removeprefix("row=") for words, _ in found]


def test_every_table_and_figure_is_there() -> None:
    assert sorted([f"table{n}" for n in (2, 3, 4, 5, 6, 12)] + [f"figure{n}" for n in (2, 4, 5)]) == TABLES


@pytest.mark.parametrize("table", [table for table in TABLES if table in SCORES])
def test_a_table_names_the_rows_whose_scores_are_known(table: str) -> None:
    assert sorted(swept(table)["method" if table == "table2" else "row"]) == sorted(SCORES[table])


@pytest.mark.parametrize("table", composed(TABLES, "table5"))
def test_a_table_sweeps_the_rows_whose_scores_are_known(table: str) -> None:
    if table == "table2":
        found = points(f"experiment=paper/{table}", "seed=42")
        assert {(run.task.name, run.method) for _, run in found} == {
            (t, m) for m, of in SCORES[table].items() for t in of
        }
        assert {run.trainer.learning_rate for _, run in found} == {1e-4}
        assert [run.seed for _, run in points(f"experiment=paper/{table}", "method=lora", "task=sst2")] == SEEDS
        return
    found = points(f"experiment=paper/{table}")
    tasks = {"xsum": ("bart_large", 100_000), "wmt16_enro": ("mbart_large", 50_000)}
    assert all((run.model.name, run.trainer.max_steps) == tasks[run.task.name] for _, run in found)
    of_task = {task: [point for point in found if point[1].task.name == task] for task in tasks}
    if table in SCORES:
        for task, runs in of_task.items():
            assert sorted(names(runs)) == sorted(row for row, of in SCORES[table].items() if task in of)
    else:
        assert of_task["xsum"] == found
    assert all(len(set(names(runs))) == len(runs) for runs in of_task.values())
    assert points(f"experiment=paper/{table}", "row=prefix_200")[0][1].bottleneck == 200


def test_every_row_stands_in_a_table() -> None:
    assert {name for table in TABLES if table != "table2" for name in swept(table)["row"]} == set(ROWS)


@pytest.mark.parametrize("row", composed(ROWS, "mam_30_512", "lora_ffn_102_s1"))
def test_a_row_has_the_sizes_in_its_name(row: str) -> None:
    run = compose_run(["task=xsum", f"row={row}"])
    sizes = [run.bottleneck, *(one.bottleneck for one in run.mix.values())]
    assert sorted(int(digits) for digits in re.findall(r"(?<=_)\d+", row)) == sorted(s for s in sizes if s is not None)


@pytest.mark.slow
def test_rows_are_those_whose_parameters_are_counted() -> None:
    """scripts/paper_counts.py has the same tables, and shows that their percentages are the paper's."""
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "paper_counts.py"))
    for table in script["TABLES"]:
        ours = [run for _, run in points(f"experiment=paper/table{table.number}", "task=xsum", "seed=42")]
        theirs = [compose_run(["task=xsum", "trainer=paper", *row.overrides.split()]) for row in table.rows]
        assert sorted(map(repr, ours)) == sorted(map(repr, theirs))


def test_scores_are_within_what_the_tables_can_hold() -> None:
    for of_rows in SCORES.values():
        for of in of_rows.values():
            assert all(10 < value < 100 for value in of.values() if isinstance(value, float))
            assert "rouge" not in of or of["rouge"][1] == of["xsum"]  # ROUGE-2 is the main one


def test_a_sweep_needs_m(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="An experiment that sweeps over row is a sweep; add -m to run it"):
        compose_run(["experiment=paper/table5"])
    assert compose_run(["experiment=paper/table5", "row=pa_ffn_512"]).bottleneck == 512
    with pytest.raises(UserError, match="experiment=paper/table55 is unknown; did you mean paper/table5"):
        points("experiment=paper/table55")


def test_a_dry_run_lists_what_is_done_and_what_is_to_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["task=docsum", "trainer=quick", "debug=smoke", f"output_dir={tmp_path}"]
    (row,) = points("experiment=paper/table5", "row=pa_ffn_512", *overrides)
    (line,) = describe_runs("table5", [row])
    from peftbench.records.location import locate_run

    with record_run(line.run, locate_run(line.run), []) as record:
        record.scores["report"] = Score("test", 16, {"rouge2": 7.0})
        record.score = 7.0
    record.timings["total_s"] = 100.0
    record.save()
    assert main(["table5", "--dry-run", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "1 of 5 runs are done." in printed and "the other 4 take about 6:40" in printed
    assert printed.count("missing") == 4 and printed.count("~1:40") == 4 and "7.00" in printed


def test_the_papers_score_and_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = points("experiment=paper/table5", "row=pa_ffn_512", f"output_dir={tmp_path}")
    from peftbench.records.location import locate_run

    with record_run(row[1], locate_run(row[1]), []) as record:
        record.score = 21.5
    main(["table5", "row=pa_ffn_512", "--dry-run", f"output_dir={tmp_path}"])
    assert re.search(r"pa_ffn_512 +done .* 20\.98 +21\.50 +\+0\.52", capsys.readouterr().out)
    record.model.name = "mbart_large"  # the paper's backbone for another task
    record.save()
    main(["table5", "row=pa_ffn_512", "--dry-run", f"output_dir={tmp_path}"])
    assert "+" not in capsys.readouterr().out
    main(["table5", "row=pa_ffn_512", "task.max_train=100", "--dry-run", f"output_dir={tmp_path}"])
    assert "+" not in capsys.readouterr().out
    with pytest.raises(UserError, match="table=tabel5 is unknown; did you mean table5"):
        main(["tabel5"])


@pytest.mark.slow
def test_figures_have_the_scores_that_tables_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures 2, 4 and 5 print none of their own; all their points are rows of tables."""
    for figure in ("figure2", "figure4", "figure5"):
        found = describe_runs(figure, points(f"experiment=paper/{figure}", f"output_dir={tmp_path}"))
        assert all(line.paper is not None for line in found)
    main(["figure5", "row=full,pa_ffn_1024", "--dry-run", f"output_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert printed.startswith("\nfigure5: xsum with bart_large\n")
    assert re.search(r"full .* 21\.94\s", printed) and re.search(r"pa_ffn_1024 .* 21\.24\s", printed)
    main(["table12", "--dry-run", f"output_dir={tmp_path}"])
    assert "table12: xsum with bart_large, wmt16_enro with mbart_large\n" in capsys.readouterr().out
