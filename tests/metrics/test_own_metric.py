"""A metric of the user's own: the example of the docs, and what is refused before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftbench.cli.main import main
from peftbench.config import own_parts
from peftbench.config.compose import compose_run
from peftbench.config.own_parts import load_class
from peftbench.metrics.measure import measure
from peftbench.metrics.own_metric import find_own_metric_fault
from peftbench.utils.errors import UserError
from tests.own_parts import EXAMPLE, importable

NAME = "my_parts.WithinOne"
BROKEN = """
import evaluate

side_effect = []

class NoNumber(evaluate.Metric):
    def _info(self):
        import datasets
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        return {"score": "high"}

class Fails(NoNumber):
    def _compute(self, predictions, references):
        raise ZeroDivisionError("no texts")

def function(predictions, references):
    side_effect.append("called")
    return {"score": 1.0}
"""


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The example's folder and one with broken metrics can be imported from, in each test only."""
    (tmp_path / "broken_metrics.py").write_text(BROKEN, encoding="utf-8")
    with importable(monkeypatch, EXAMPLE, tmp_path):
        yield


def test_its_first_score_counts_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    predictions, references = ["ab", "abc", "a", "abcd"], ["ab", "ab", "abcd", "ab"]
    assert measure(NAME, predictions, references).scores == {NAME: 50.0}
    assert f"task.metric={NAME} imports my_parts." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("os.system", "task.metric=os.system is not a class derived from evaluate.Metric."),
        ("subprocess.Popen", "task.metric=subprocess.Popen is not a class derived from evaluate.Metric."),
        ("broken_metrics.function", "task.metric=broken_metrics.function is not a class derived from evaluate.Metric."),
        ("broken_metrics.Missing", "task.metric=broken_metrics.Missing: broken_metrics has no Missing."),
        ("no_such_package.Metric", "task.metric=no_such_package.Metric cannot be imported (ModuleNotFoundError: No"),
        ("broken_metrics.NoNumber", "task.metric=broken_metrics.NoNumber must return a dict of numbers, the main"),
        ("broken_metrics.Fails", "task.metric=broken_metrics.Fails fails: ZeroDivisionError: no texts"),
    ],
)
def test_what_is_no_metric_is_refused_without_a_call(
    name: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "debug=smoke", f"task.metric={name}", f"output_dir={tmp_path / 'runs'}"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert getattr(sys.modules.get("broken_metrics"), "side_effect", []) == []


def test_a_module_of_python_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_parts, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    for name in ("os.system", "antigravity.fly", "system"):
        with pytest.raises(UserError, match="is not a class derived from"):
            load_class("task.metric", name, dict)


def test_installed_packages_offer_metrics_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_parts, "list_entry_points", lambda key: {"within_one": NAME})
    assert compose_run(["task.metric=within_one"]).task.metric == NAME
    assert find_own_metric_fault(NAME) is None
    with pytest.raises(UserError, match=r"task.metric=within_two is unknown"):
        compose_run(["task.metric=within_two"])
