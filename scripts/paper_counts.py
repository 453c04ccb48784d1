#!/usr/bin/env python
"""Prints docs/paper_counts.md: the parameter counts of the paper's tables next to peftbench's own.

    python scripts/paper_counts.py > docs/paper_counts.md

Rows are data: a line of a table of He et al. (2022), the overrides that reproduce it here, and the percentage printed
there. The counts are those of `peftbench params`. A percentage that differs from the printed one must have a reason.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from functools import cache

from peftbench.config.compose import compose_run
from peftbench.config.schema import Run
from peftbench.counts.run_counts import count_run
from peftbench.modification.counting import Counts

OF_BART = "the paper divides by BART-large's parameters here too, though the backbone is mBART-large"
SMALL = (
    "the paper's slip: 0.1% is not what its formula gives, neither of BART-large's parameters (0.54% for attention, "
    "0.36% for FFN) nor of mBART-large's"
)
LORA = (
    "the paper's slip: its tables 5 and 12 print 6.1% for the same r = 102, and 7.2% is the share of LoRA (attn), r=200"
)


@dataclass(frozen=True)
class Row:
    """One line of a table. `reason` says why its percentage is not ours."""

    label: str
    overrides: str
    printed: str  # in %, with the decimals that the paper prints
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """One table of the paper. The percentages are of `model`; `also` is a second backbone of the same rows."""

    number: int
    title: str
    task: str
    model: str
    rows: tuple[Row, ...]
    also: str = ""
    note: str = ""


NAMES = {"bart_large": "BART-large", "mbart_large": "mBART-large", "roberta_base": "RoBERTa-base"}
SA_ATTENTION = "method=adapter modified_representation=attention"
SA_FFN = "method=adapter modified_representation=ffn"
PA_ATTENTION, PA_FFN = "method=parallel_adapter_attention", "method=parallel_adapter"

TABLES = (
    Table(
        2,
        "MNLI and SST-2, RoBERTa-base",
        "sst2",
        "roberta_base",
        (
            Row("full fine-tuning", "method=full", "100"),
            Row("BitFit", "method=bitfit", "0.1"),
            Row("prefix", "method=prefix", "0.5"),
            Row("LoRA", "method=lora", "0.5"),
            Row("adapter", "method=adapter", "0.5"),
            Row("MAM adapter", "method=mam", "0.5"),
        ),
        note="""\
LoRA and MAM have the sizes of the paper's scripts. The paper does not print those of prefix and adapter: here they are
chosen for the same share, so these two rows prove nothing. The task head, {head:,} parameters or
{head_percent:.2f}% of the backbone, is not included in the counts.""",
    ),
    Table(
        3,
        "insertion form, XSum (BART-large) and en-ro (mBART-large)",
        "xsum",
        "bart_large",
        (
            Row("prefix, l=200", "method=prefix bottleneck=200", "3.6"),
            Row("SA (attn), r=200", f"{SA_ATTENTION} bottleneck=200", "3.6"),
            Row("SA (ffn), r=200", f"{SA_FFN} bottleneck=200", "2.4"),
            Row("PA (attn), r=200", f"{PA_ATTENTION} bottleneck=200", "3.6"),
            Row("PA (ffn), r=200", f"{PA_FFN} bottleneck=200", "2.4"),
        ),
        also="mbart_large",
    ),
    Table(
        4,
        "modified representation, en-ro (mBART-large)",
        "xsum",
        "mbart_large",
        (
            Row("PA (attn), r=200", f"{PA_ATTENTION} bottleneck=200", "3.6", OF_BART),
            Row("prefix, l=200", "method=prefix bottleneck=200", "3.6", OF_BART),
            Row("MH PA (attn), r=200", "method=mh_parallel_adapter bottleneck=200", "3.6", OF_BART),
            Row("prefix, l=30", "method=prefix bottleneck=30", "0.1", SMALL),
            Row("prefix, l=30, -gating", "method=prefix_no_gating bottleneck=30", "0.1", SMALL),
            Row("PA (ffn), r=30", f"{PA_FFN} bottleneck=30", "0.1", SMALL),
            Row("PA (attn), r=30", f"{PA_ATTENTION} bottleneck=30", "0.1", SMALL),
            Row("MH PA (attn), r=30", "method=mh_parallel_adapter bottleneck=30", "0.1", SMALL),
        ),
        also="bart_large",
    ),
    Table(
        5,
        "composition function, XSum (BART-large)",
        "xsum",
        "bart_large",
        (
            Row("LoRA (ffn), r=102, s=4", "method=lora_ffn bottleneck=102", "6.1"),
            Row("LoRA (ffn), r=102, s=1", "method=lora_ffn bottleneck=102 composition_function.scale=1", "6.1"),
            Row("PA (ffn), r=512", f"{PA_FFN} bottleneck=512", "6.1"),
            Row("scaled PA (ffn), r=512, s=4", "method=scaled_parallel_adapter bottleneck=512", "6.1"),
            Row(
                "scaled PA (ffn), r=512, trained s",
                "method=scaled_parallel_adapter bottleneck=512 composition_function.scale=1 "
                "composition_function.learned=true",
                "6.1",
            ),
        ),
    ),
    Table(
        6,
        "all methods, XSum (BART-large) and en-ro (mBART-large)",
        "xsum",
        "bart_large",
        (
            Row("full fine-tuning, published and the paper's run", "method=full", "100"),
            Row("BitFit", "method=bitfit", "0.1"),
            Row("prompt tuning", "method=prompt bottleneck=200", "0.1"),
            Row("prefix tuning, l=200", "method=prefix bottleneck=200", "3.6"),
            Row("Pfeiffer adapter, r=600", "method=pfeiffer bottleneck=600", "7.2"),
            Row("LoRA (ffn), r=102", "method=lora_ffn bottleneck=102", "7.2", LORA),
            Row("PA (ffn), r=1024", f"{PA_FFN} bottleneck=1024", "12.3"),
            Row(
                "PA (attn, r=30) + PA (ffn, r=512)",
                "method=pa_attention_pa_ffn bottleneck=512 mix.attention.bottleneck=30",
                "6.7",
            ),
            Row(
                "prefix (attn, l=30) + LoRA (ffn, r=102)",
                "method=prefix_lora_ffn bottleneck=102 mix.attention.bottleneck=30",
                "6.7",
            ),
            Row("MAM adapter, l=30, r=512", "method=mam bottleneck=512 mix.attention.bottleneck=30", "6.7"),
        ),
        also="mbart_large",
    ),
    Table(
        12,
        "bottleneck dimensions, XSum (BART-large) and en-ro (mBART-large)",
        "xsum",
        "bart_large",
        (
            Row("prefix, r=200", "method=prefix bottleneck=200", "3.6"),
            Row("prefix, r=512", "method=prefix bottleneck=512", "9.2"),
            Row("LoRA (attn), r=200", "method=lora bottleneck=200", "7.2"),
            Row("SA (attn), r=200", f"{SA_ATTENTION} bottleneck=200", "3.6"),
            Row("SA (attn), r=512", f"{SA_ATTENTION} bottleneck=512", "9.2"),
            Row("PA (attn), r=200", f"{PA_ATTENTION} bottleneck=200", "3.6"),
            Row("PA (attn), r=512", f"{PA_ATTENTION} bottleneck=512", "9.2"),
            Row("LoRA (ffn), r=102", "method=lora_ffn bottleneck=102", "6.1"),
            Row("SA (ffn), r=200", f"{SA_FFN} bottleneck=200", "2.4"),
            Row("SA (ffn), r=512", f"{SA_FFN} bottleneck=512", "6.1"),
            Row("SA (ffn), r=1024", f"{SA_FFN} bottleneck=1024", "12.3"),
            Row("PA (ffn), r=200", f"{PA_FFN} bottleneck=200", "2.4"),
            Row("PA (ffn), r=512", f"{PA_FFN} bottleneck=512", "6.1"),
            Row("PA (ffn), r=1024", f"{PA_FFN} bottleneck=1024", "12.3"),
        ),
        also="mbart_large",
    ),
)

INTRODUCTION = """\
# The paper's parameter counts, and ours

Every row of tables 2, 3, 4, 5, 6 and 12 of He et al. (2022), counted by `peftbench params` with the overrides shown.
`scripts/paper_counts.py` writes this file; a test checks that it is up to date.

- **stored** is what a checkpoint needs: biases and learned scales included, the prefix's training-time MLP folded away.
- **formula** is appendix B's count, which leaves out biases. The paper's percentages are computed from it. It is
  compared with the printed percentage at the decimals printed.
- Percentages are of the backbone: {bart:,} parameters of BART-large, {mbart:,} of mBART-large,
  {roberta:,} of RoBERTa-base without its task head.
- **equal**: the formula's percentage, rounded, is the printed one. **equal, cut off**: it is the printed one if further
  digits are cut off instead of rounded. Where the two differ in tables 3, 5, 6 and 12, the paper prints the cut number,
  except for the two 0.1% of table 6, which are 0.08 and 0.05. Rounded shares of a backbone of {low:.1f}M to
  {high:.1f}M parameters would fit all these rows too.
- The en-ro columns of tables 3, 6 and 12 have mBART-large as backbone. The paper prints one percentage for both
  columns, that of BART-large; the formula's share of mBART-large is in a separate column.
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(document(), end="")


def document() -> str:
    """The whole Markdown file."""
    bart, mbart = (counted("xsum", model, "method=full").backbone for model in ("bart_large", "mbart_large"))
    roberta = counted("sst2", "roberta_base", "method=full").backbone
    low, high = fitting_backbone()
    opening = INTRODUCTION.format(bart=bart, mbart=mbart, roberta=roberta, low=low / 1e6, high=high / 1e6)
    return "\n".join([opening, *(line for table in TABLES for line in section(table))])


def section(table: Table) -> Iterator[str]:
    """A table of the paper as lines of Markdown."""
    yield f"## Table {table.number}: {table.title}\n"
    if table.note:
        first = counted(table.task, table.model, table.rows[0].overrides)
        yield table.note.format(head=first.head, head_percent=first.percent(first.head)) + "\n"
    yield f"`peftbench params task={table.task} model={table.model}` and:\n"
    headers = ["row", "overrides", "stored", "stored, %", "formula, %"]
    if table.also:
        headers.append(f"formula, % of {NAMES[table.also]}")
    headers += ["paper, %", ""]
    yield f"| {' | '.join(headers)} |"
    yield "|---|---|" + "---:|" * (len(headers) - 3) + "---|"
    for row in table.rows:
        counts = counted(table.task, table.model, row.overrides)
        cells = [row.label, f"`{row.overrides}`", f"{counts.stored:,}"]
        cells += [f"{counts.percent(counts.stored):.2f}", f"{counts.percent(counts.paper):.2f}"]
        if table.also:
            other = counted(table.task, table.also, row.overrides)
            cells.append(f"{other.percent(other.paper):.2f}")
        cells += [row.printed, verdict(table, row)]
        yield f"| {' | '.join(cells)} |"
    yield ""


def verdict(table: Table, row: Row) -> str:
    """Says whether the formula's percentage is the printed one, or gives the row's reason.

    Raises:
        ValueError: the percentages differ and the row has no reason, or they are equal and it has one.
    """
    counts = counted(table.task, table.model, row.overrides)
    printed = Decimal(row.printed)
    exact = Decimal(100 * counts.paper) / counts.backbone
    found = ""
    if exact.quantize(printed, ROUND_HALF_UP) == printed:
        found = "equal"
    elif exact.quantize(printed, ROUND_DOWN) == printed:
        found = "equal, cut off"
    if bool(found) == bool(row.reason):
        raise ValueError(f"table {table.number}, {row.label}: ours is {exact:.4f}%, printed {printed}%, no fit")
    return found or row.reason


def fitting_backbone() -> tuple[float, float]:
    """The backbone sizes between which BART-large's rounded percentages are the printed ones, over rows that fit."""
    low, high = 0.0, math.inf
    for table in TABLES:
        for row in table.rows:
            if table.model == "bart_large" and "." in row.printed and not row.reason:
                paper, printed = counted(table.task, table.model, row.overrides).paper, float(row.printed)
                low, high = max(low, 100 * paper / (printed + 0.05)), min(high, 100 * paper / (printed - 0.05))
    return low, high


@cache
def counted(task: str, model: str, overrides: str) -> Counts:
    """The totals of `peftbench params task=TASK model=MODEL OVERRIDES`."""
    run = composed(f"task={task} {overrides}")
    return count_run(replace(run, model=composed(f"task={task} model={model} method=full").model)).totals


@cache
def composed(overrides: str) -> Run:
    """The validated run. Composing is slower than counting, so runs are cached and the backbone is set afterwards."""
    return compose_run(overrides.split())


if __name__ == "__main__":
    main()
