"""A metric of one's own: peftbench train --config-dir docs/own_metric task.metric=my_metrics.WithinOne"""

import datasets
import evaluate


class WithinOne(evaluate.Metric):
    """100 x the share of predicted labels whose length in letters is within one of the right label's."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        near = [abs(len(ours) - len(right)) <= 1 for ours, right in zip(predictions, references, strict=True)]
        return {"within_one": 100 * sum(near) / len(near)}
