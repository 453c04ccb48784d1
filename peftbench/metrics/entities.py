"""F1 of entities, such as names, that labels of words mark; an example is a text with a label for each of its words."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from peftbench.metrics.statistics import References, Statistics, divide

ENTITY_SCORES = ("entity_f1", "entity_precision", "entity_recall", "token_accuracy")


def compute_entities(
    predictions: Sequence[str], references: References, labels: Sequence[str]
) -> dict[str, Statistics]:
    """F1, precision and recall of entities, and accuracy of words, in percent.

    An example is the labels of a text's words with spaces between them, "B-PER I-PER O". An entity is right if its
    first word, its last one and its type are. With tp the entities that are right, p those predicted and t the true
    ones, over all examples: precision = tp / p, recall = tp / t, F1 = 2 tp / (p + t); 0 where tp = 0. The entities are
    those of the package seqeval (Nakayama, 2018) in its default mode, that of conlleval (Tjong Kim Sang and Buchholz,
    2000): an I- that follows no word of its type begins an entity.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    hits, counts = [], []
    for ours, right in zip(predictions, references, strict=True):
        tags, true = ours.split(), str(right).split()
        found, wanted = set(get_entities(tags)), set(get_entities(true))
        hits.append([len(found & wanted), len(found), len(wanted)])
        counts.append([sum(tag == other for tag, other in zip(tags, true, strict=True)), len(true)])
    rows, words = np.array(hits, dtype=float), np.array(counts, dtype=float)
    tp, p, t = rows.T[:, :, None]
    signature = f"seqeval:{version('seqeval')}|mode:default"
    return {
        "entity_f1": _share(2 * tp, p + t, signature),
        "entity_precision": _share(tp, p, signature),
        "entity_recall": _share(tp, t, signature),
        "token_accuracy": _share(words[:, :1], words[:, 1:], ""),
    }


def _share(part: np.ndarray, whole: np.ndarray, signature: str) -> Statistics:
    """Return the score 100 x the sum of `part` / the sum of `whole`; both are (examples, 1)."""
    rows = np.concatenate([part, whole], axis=1)
    return Statistics(rows, lambda sums, n: 100 * divide(sums[..., 0], sums[..., 1]), signature)
