"""Which points of the four axes mean something, and which settings do: one table of rules. Imports no torch.

`faults(run)` returns a plain sentence for every rule that a config breaks, each naming the key as it is typed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peftbench.config import (
    FUNCTIONAL_FORMS,
    AttentionKind,
    Composition,
    DType,
    HeadInput,
    Insertion,
    LayerNormPlace,
    Modification,
    Precision,
    Representation,
    Run,
    Stack,
    TaskKind,
    Unfreeze,
    modifications,
)
from peftbench.errors import unknown


@dataclass(frozen=True)
class Rule:
    """A combination that is refused: `broken(m)` says whether m breaks it, `sentence` why and what would be right."""

    broken: Callable[[Modification], bool]
    sentence: str  # {p} stands for the prefix of the keys: "" or "mix.NAME."


# Representations among which `attentions` has nothing to choose.
WITHOUT_ATTENTION = (Representation.ffn, Representation.ffn_weights, Representation.layer, Representation.embedding)

RULES = (
    Rule(
        lambda m: len({axis == "none" for axis in _axes(m)}) == 2,
        "{p}functional_form={f}, {p}modified_representation={r}, {p}insertion_form={i}, {p}composition_function={c}: "
        "a modification needs all four axes; give each a value other than none, or start from a preset such as "
        "method=lora.",
    ),
    Rule(
        lambda m: m.composition_function.name is Composition.gated and m.insertion_form.name is Insertion.sequential,
        "{p}composition_function=gated with {p}insertion_form=sequential means nothing: the gate weighs h against a Δh "
        "that is computed beside it from the same x; use insertion_form=parallel, or composition_function=add or "
        "scaled.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.layer and m.insertion_form.name is Insertion.parallel
        ),
        "{p}modified_representation=layer with {p}insertion_form=parallel means nothing: the layer's output is read "
        "after its add & norm and has no sub-layer beside it; use insertion_form=sequential, or "
        "modified_representation=ffn.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.embedding
            and (m.functional_form.name, m.insertion_form.name, m.composition_function.name)
            != ("softmax", Insertion.parallel, Composition.gated)
        ),
        "{p}modified_representation=embedding is prompt tuning: the layers attend to vectors put before the input, so "
        "it goes with functional_form=softmax, insertion_form=parallel and composition_function=gated only.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.heads
            and m.insertion_form.name is Insertion.parallel
            and m.functional_form.name == "softmax"
            and m.composition_function.name is Composition.gated
            and m.modified_representation.head_input is HeadInput.hidden
        ),
        "{p}composition_function=gated weighs by the attention mass on the prefix (eq. 8), which is a function of the "
        "query: use {p}modified_representation.head_input=query, or composition_function=add or scaled.",
    ),
    Rule(
        lambda m: (
            m.functional_form.name == "softmax"
            and m.composition_function.name is Composition.gated
            and m.modified_representation.name in (Representation.heads, Representation.embedding)
            and (m.bias, m.layer_norm, m.dropout, m.input_dropout) != (False, LayerNormPlace.none, None, 0.0)
        ),
        "{p}functional_form=softmax with {p}composition_function=gated joins the attention itself, under the "
        "backbone's own dropout: {p}bias, {p}layer_norm, {p}dropout and {p}input_dropout must keep their "
        "defaults false, none, null and 0.",
    ),
    Rule(
        lambda m: (
            m.prefix_mlp is not None
            and (
                m.modified_representation.name is not Representation.heads
                or (
                    m.insertion_form.name is Insertion.parallel
                    and m.modified_representation.head_input is HeadInput.hidden
                )
            )
        ),
        "{p}prefix_mlp={mlp} makes vectors of a head's width: it goes with modified_representation=heads and "
        "head_input=query only; set {p}prefix_mlp=null.",
    ),
    Rule(
        lambda m: m.bottleneck is None or m.bottleneck < 1,
        "{p}bottleneck={b}: the bottleneck must be a whole number of at least 1.",
    ),
    Rule(
        lambda m: m.prefix_mlp is not None and m.prefix_mlp < 1,
        "{p}prefix_mlp={mlp}: the MLP's width must be at least 1, or null for none.",
    ),
    Rule(
        lambda m: m.dropout is not None and not 0 <= m.dropout < 1,
        "{p}dropout={dropout}: a rate lies in [0, 1), or is null for the backbone's own.",
    ),
    Rule(
        lambda m: not 0 <= m.input_dropout < 1,
        "{p}input_dropout={input_dropout}: a rate lies in [0, 1).",
    ),
    Rule(
        lambda m: m.composition_function.learned and m.composition_function.name is not Composition.scaled,
        "{p}composition_function.learned=true needs {p}composition_function=scaled: only a scale can be learned.",
    ),
    Rule(
        lambda m: m.composition_function.scale == 0,
        "{p}composition_function.scale=0 would switch the modification off; give any other number.",
    ),
    Rule(
        lambda m: not m.modified_representation.stacks,
        "{p}modified_representation.stacks=[] leaves nothing to modify; choices: encoder, decoder.",
    ),
    Rule(
        lambda m: not m.modified_representation.attentions,
        "{p}modified_representation.attentions=[] leaves nothing to modify; choices: self, cross.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name in WITHOUT_ATTENTION
            and list(m.modified_representation.attentions) != list(AttentionKind)
        ),
        "{p}modified_representation.attentions chooses among attentions, and {p}modified_representation={r} has none; "
        "leave it out.",
    ),
    Rule(
        lambda m: (
            m.modified_representation.name is Representation.embedding
            and (list(m.modified_representation.stacks) != list(Stack) or m.modified_representation.layers is not None)
        ),
        "{p}modified_representation=embedding stands before the first stack: leave {p}modified_representation.stacks "
        "and layers out.",
    ),
    Rule(
        lambda m: m.modified_representation.layers == [],
        "{p}modified_representation.layers=[] leaves nothing to modify; give indices such as [0,1,-1], or null for "
        "all.",
    ),
)

METRICS = {
    TaskKind.classification: ("accuracy",),
    TaskKind.summarization: ("rouge1", "rouge2", "rougeL", "rougeLsum"),
}


BASELINES = {
    TaskKind.classification: ("majority", "head"),
    TaskKind.summarization: ("lead1",),
}


def faults(run: Run) -> list[str]:
    """All that is wrong with `run`, one plain sentence each; an empty list where it can run."""
    found = [sentence for prefix, m in modifications(run).items() for sentence in _modification_faults(prefix, m)]
    if run.functional_form.name == "none" and any(axis != "none" for axis in _axes(run)):
        found.extend(_modification_faults("", run))
    found.extend(_number_faults(run))
    found.extend(_path_faults(run))
    if run.unfreeze is not Unfreeze.none and run.model.dtype is not DType.float32:
        found.append(
            f"unfreeze={run.unfreeze.name} trains the backbone's own parameters, which must then be float32; set "
            "model.dtype=float32."
        )
    if run.trainer.precision is Precision.fp32 and run.model.dtype is DType.bfloat16:
        found.append(
            "trainer.precision=fp32 with model.dtype=bfloat16: a bfloat16 backbone runs under bfloat16 autocast; set "
            "trainer.precision=auto, or model.dtype=float32."
        )
    nothing = not run.mix and all(axis == "none" for axis in _axes(run)) and run.unfreeze is Unfreeze.none
    if nothing and run.task.kind is not TaskKind.classification:
        found.append(
            f"method={run.method} with task={run.task.name} leaves nothing to train: only classification has a task "
            "head; use a method that changes the backbone, such as method=lora or method=full."
        )
    for baseline in run.task.baselines:
        if baseline not in BASELINES[run.task.kind]:
            found.append(unknown("task.baselines", baseline, BASELINES[run.task.kind]))
    if run.task.metric not in METRICS[run.task.kind]:
        found.append(unknown("task.metric", run.task.metric, METRICS[run.task.kind]))
    return found


def _axes(m: Modification) -> tuple[str, str, str, str]:
    return (
        m.functional_form.name,
        m.modified_representation.name.name,
        m.insertion_form.name.name,
        m.composition_function.name.name,
    )


def _modification_faults(prefix: str, m: Modification) -> Iterator[str]:
    if m.functional_form.name not in FUNCTIONAL_FORMS:
        yield unknown(f"{prefix}functional_form.name", m.functional_form.name, FUNCTIONAL_FORMS)
        return
    form, representation, insertion, composition = _axes(m)
    for rule in RULES:
        if rule.broken(m):
            yield rule.sentence.format(
                p=prefix,
                f=form,
                r=representation,
                i=insertion,
                c=composition,
                b=m.bottleneck,
                mlp=m.prefix_mlp,
                dropout=m.dropout,
                input_dropout=m.input_dropout,
            )
            if rule is RULES[0]:  # with an axis missing the other rules would only repeat it
                return


def _path_faults(run: Run) -> Iterator[str]:
    """Paths that lead nowhere; what stands in them is looked at when it is read."""
    folders = {"model.path": run.model.path, "task.data_dir": run.task.data_dir}
    files = {f"task.data_files.{split}": file for split, file in run.task.data_files.items()}
    for key, path in folders.items():
        if path is not None and not Path(path).expanduser().is_dir():
            yield f"{key}={path} is not a folder; give the path of an existing one."
    for key, path in files.items():
        if not Path(path).expanduser().is_file():
            yield f"{key}={path} is not a file; give the path of an existing one."


def _number_faults(run: Run) -> Iterator[str]:
    trainer, task = run.trainer, run.task
    at_least_one = {
        "trainer.batch_size": trainer.batch_size,
        "trainer.accumulation": trainer.accumulation,
        "trainer.eval_batch_size": trainer.eval_batch_size,
        "trainer.max_steps": trainer.max_steps,
        "trainer.evaluate_every": trainer.evaluate_every,
        "task.max_train": task.max_train,
        "task.max_selection": task.max_selection,
        "task.max_eval": task.max_eval,
        "task.max_source_length": task.max_source_length,
        "task.max_target_length": task.max_target_length,
        "task.generation.num_beams": task.generation.num_beams,
        "task.generation.max_length": task.generation.max_length,
    }
    for key, number in at_least_one.items():
        if number is not None and number < 1:
            yield f"{key}={number}: it must be a whole number of at least 1."
    for key, value in {"trainer.learning_rate": trainer.learning_rate, "trainer.epochs": trainer.epochs}.items():
        if value <= 0:
            yield f"{key}={value}: it must be above 0."
    for key, share in {"trainer.warmup": trainer.warmup, "trainer.label_smoothing": trainer.label_smoothing}.items():
        if not 0 <= share < 1:
            yield f"{key}={share}: it lies in [0, 1)."
    if trainer.checkpoint_minutes < 0:
        yield f"trainer.checkpoint_minutes={trainer.checkpoint_minutes}: it must be at least 0."
    if task.generation.min_length > task.generation.max_length:
        yield (
            f"task.generation.min_length={task.generation.min_length} is above "
            f"task.generation.max_length={task.generation.max_length}; make it at most that."
        )
    if len(trainer.betas) != 2 or not all(0 <= beta < 1 for beta in trainer.betas):
        yield f"trainer.betas={trainer.betas}: Adam takes two numbers in [0, 1), such as [0.9,0.999]."
