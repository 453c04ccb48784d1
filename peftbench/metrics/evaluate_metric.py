"""The metrics as Hugging Face's library evaluate has them, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import getdoc

from datasets import Features, Value
from datasets import Sequence as ListOf
from evaluate import Metric, MetricInfo

from peftbench.config.schema import TaskKind
from peftbench.config.task_validity import METRIC_NAMES
from peftbench.metrics.measure import DEFINITIONS, measure


class EvaluateMetric(Metric):
    """All scores of the metric that has a score called `name`, as an `evaluate.Metric` that leaves no files.

    >>> EvaluateMetric("accuracy").compute(predictions=["yes", "no"], references=["yes", "yes"])
    {'accuracy': 50.0}

    Attributes:
        labels: as in `compute_statistics`.
        signatures: how exactly the scores were computed, once they have been.
    """

    def __init__(self, name: str, labels: Sequence[str] = ()) -> None:
        self.metric, self.labels = name, labels
        self.signatures: dict[str, str] = {}
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        """evaluate would make a folder in the user's home, which need not be one that can be written to."""
        root: str = self._data_dir_root
        return root

    def _info(self) -> MetricInfo:
        text = Value("string")
        several = METRIC_NAMES[TaskKind.text_to_text] + METRIC_NAMES[TaskKind.question_answering]
        references = [text, ListOf(text)] if self.metric in several else [text]
        return MetricInfo(
            description=getdoc(DEFINITIONS[self.metric]),
            citation="",
            inputs_description="predictions, references: equally many strings; references of texts may be lists.",
            features=[Features({"predictions": text, "references": one}) for one in references],
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        scores, self.signatures = measure(self.metric, predictions, references, self.labels)
        return scores
