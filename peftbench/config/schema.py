"""The schema of a run: what every key of `conf/` may hold. Imports no torch.

The four axes of He et al. (2022, table 1) and their options make a `Modification`. The root of the config is one of
them, so that `bottleneck=8` and `functional_form=relu` are keys of their own; further ones stand under `mix`.
Which combinations mean something is said in `config/axes.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

HELP = "help"  # a field's metadata: what the key means

# Names of transformers' ACT2FN that are functions of one tensor without parameters; a test holds them to ACT2FN.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "mish", "tanh", "sigmoid", "relu6", "relu2", "leaky_relu")
FUNCTIONAL_FORMS = ("none", "constant", "identity", "softmax", *ACTIVATIONS)

# mypy and OmegaConf both want the members of an Enum spelled out; a member's name is what a user types.
Representation = Enum(
    "Representation",
    [
        "none",
        "heads",
        "heads_joint",
        "attention",
        "query",
        "key",
        "value",
        "query_value",
        "key_value",
        "output",
        "ffn",
        "ffn_weights",
        "ffn_intermediate",
        "attention_ffn",
        "layer",
        "embedding",
    ],
)
Insertion = Enum("Insertion", ["none", "sequential", "parallel"])
Composition = Enum("Composition", ["none", "add", "scaled", "gated", "gated_add", "multiply"])
Stack = Enum("Stack", ["encoder", "decoder"])
AttentionKind = Enum("AttentionKind", ["self", "cross"])
HeadInput = Enum("HeadInput", ["query", "hidden", "normed_query"])
FFNInput = Enum("FFNInput", ["normed", "residual"])
Init = Enum("Init", ["bert", "lora"])
LayerNormPlace = Enum("LayerNormPlace", ["none", "input", "output"])
Unfreeze = Enum("Unfreeze", ["none", "bias", "norm", "all"])
TaskKind = Enum("TaskKind", ["classification", "regression", "text_to_text"])
DType = Enum("DType", ["auto", "float32", "bfloat16"])
Precision = Enum("Precision", ["auto", "fp32", "bf16"])
Schedule = Enum("Schedule", ["linear", "cosine", "constant"])
Keep = Enum("Keep", ["best", "last"])
Batching = Enum("Batching", ["random", "bucketed"])
Compile = Enum("Compile", ["none", "layers"])
Device = Enum("Device", ["auto", "cpu", "cuda"])

LOSS = "loss"  # of the values of `Task.selection_metric` the one that is better when lower


def key(default: Any, help: str) -> Any:
    """A key of the config: its default, of which each config gets a copy, and what `peftbench ls keys` says of it.

    Args:
        default: omegaconf's MISSING for a key that a preset of its group must set.
        help: in plain English: what the key does, its unit, what null and each choice mean.
    """
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={HELP: help})
    return field(default=default, metadata={HELP: help})


@dataclass
class FunctionalForm:
    """f in Δh = f(x W_down) W_up; or `constant`, Δh = l."""

    name: str = key(
        "none",
        f"f in Δh = f(x W_down) W_up: identity, softmax, or an activation ({', '.join(ACTIVATIONS)}). constant: Δh "
        "is a trained vector; none: no modification.",
    )


@dataclass
class ModifiedRepresentation:
    """Which hidden vectors h are modified; `null` means all of them."""

    name: Representation = key(
        Representation.none,
        "Which hidden vectors h are modified; `peftbench ls axes` says what each choice is and which of them run with "
        "which others. none: no modification.",
    )
    stacks: list[Stack] = key(
        [Stack.encoder, Stack.decoder], "In which stacks h is modified: encoder, decoder, or both, as far as there are."
    )
    attentions: list[AttentionKind] = key(
        list(AttentionKind),
        "At which attentions h is modified: self, cross (a decoder's attention to the encoder), or both.",
    )
    layers: list[int] | None = key(
        None,
        "Indices of the modified layers in each stack, from 0; negative ones count from the top. null: all layers.",
    )
    head_input: HeadInput = key(
        HeadInput.query,
        "What a parallel form over heads reads. query: each head's query, scaled as the attention has it; hidden: the "
        "attention input (table 1); normed_query: an unscaled query of the attention input after a LayerNorm of its "
        "own (the paper's code on BART).",
    )
    ffn_input: FFNInput = key(
        FFNInput.normed,
        "What a parallel form over the FFN of a pre-norm family reads. normed: the FFN's input, after the norm; "
        "residual: the residual stream before the norm.",
    )


@dataclass
class InsertionForm:
    """What f reads: h itself (sequential) or the input x of the sub-module that computes h (parallel)."""

    name: Insertion = key(
        Insertion.none,
        "What f reads. sequential: h itself; parallel: x, the input of the sub-module that computes h; none: no "
        "modification.",
    )


@dataclass
class CompositionFunction:
    """How Δh joins h: h + Δh (add), h + sΔh (scaled), (1-λ)h + λΔh (gated), h + λΔh (gated_add), h ∘ (1 + Δh)
    (multiply)."""

    name: Composition = key(
        Composition.none,
        "How Δh joins h. add: h + Δh; scaled: h + sΔh; gated: (1-λ)h + λΔh, where λ is the attention on a prefix or a "
        "learned gate; gated_add: h + λΔh with a learned gate; multiply: h ∘ (1 + Δh); none: no modification.",
    )
    scale: float = key(1.0, "s in h + sΔh (composition_function=scaled); LoRA's alpha / r.")
    learned: bool = key(False, "true: s is a trained scalar, which starts at composition_function.scale.")


@dataclass
class Modification:
    """One point on the four axes, with the options that the paper or its code has."""

    functional_form: FunctionalForm = field(default_factory=FunctionalForm)
    modified_representation: ModifiedRepresentation = field(default_factory=ModifiedRepresentation)
    insertion_form: InsertionForm = field(default_factory=InsertionForm)
    composition_function: CompositionFunction = field(default_factory=CompositionFunction)
    bottleneck: int | None = key(
        None,
        "r, the width between W_down and W_up, or the number l of prefix vectors. null: there is none, as with "
        "functional_form=constant.",
    )
    init: Init = key(
        Init.lora,
        "How W_down and W_up start. bert: both from N(0, 0.02); lora: W_up at 0, so that a run begins as the backbone.",
    )
    bias: bool = key(False, "true: W_down and W_up have biases.")
    layer_norm: LayerNormPlace = key(
        LayerNormPlace.none,
        "Where the modification has a LayerNorm of its own. none: nowhere; input: before W_down; output: after W_up.",
    )
    dropout: float | None = key(
        None, "Probability of dropout after f. null: the backbone's own rate, as in the paper's code."
    )
    input_dropout: float = key(0.0, "Probability of dropout on x, before W_down (LoRA's dropout).")
    prefix_mlp: int | None = key(
        None, "Width of the MLP that produces the prefix in training; it is not stored. null: no MLP."
    )


@dataclass
class Fidelity:
    """The places where the paper's text and its released code differ: true has it as in the code.

    `config/fidelity.py` says of each to which runs it applies.
    """

    name: str = key(
        "paper",
        "Name of the set of switches, paper or released_code; it changes nothing by itself. Of the switches, true "
        "has a place as in the released code, which their help describes, and false as in the paper's text.",
    )
    frozen_task_head: bool = key(
        False, "The task head stays as it was initialised, at random; only BitFit trains its biases."
    )
    attention_adapter_before_output: bool = key(
        False, "The parallel adapter at the attention adds Δh to the concatenated heads, before W_o."
    )
    attention_adapter_norm: bool = key(False, "Adapters at the attention have a LayerNorm of their own before W_down.")
    attention_adapter_bert_init: bool = key(False, "Adapters at the attention begin at N(0, 0.02), scaled ones too.")
    head_adapter_from_mlp: bool = key(
        False, "The weights of the multi-head parallel adapter are made by the prefix's MLP, without biases."
    )
    head_adapter_normed_query: bool = key(
        False,
        "On BART the multi-head parallel adapter reads unscaled queries of the attention input behind a LayerNorm of "
        "its own.",
    )
    mbart_ffn_adapter_reads_residual: bool = key(
        False, "On mBART the parallel adapter at the FFN reads the residual stream before the FFN's norm."
    )
    dead_parameters: bool = key(
        False, "The code also trains parameters that nothing reads; here they are counted, not made."
    )


@dataclass
class Model:
    """The frozen backbone: a hub id at a revision, or a local folder."""

    name: str = key(MISSING, "Name of the preset, in tables and run folders; with model.path the folder's name.")
    hub_id: str | None = key(None, "Repository on the Hugging Face hub, such as facebook/bart-large. null: none.")
    revision: str | None = key(None, "Branch, tag or commit of model.hub_id. null: the main branch.")
    path: str | None = key(None, "A folder with config.json and weights; wins over model.hub_id. null: none.")
    dtype: DType = key(
        DType.float32,
        "Type of the frozen weights, float32 or bfloat16; what is trained stays float32. auto: bfloat16 where the run "
        "computes in it on a GPU and trains nothing of the backbone, else float32.",
    )
    sizes: str = key(MISSING, "Which column of conf/sizes.yaml the method presets take their sizes from.")
    architecture: dict[str, Any] = key(
        {},
        "For counting without weights or network, as in config.json: model_type, the keys that differ from "
        "transformers' defaults for it, and name_or_path, the hub id that this describes. Training reads config.json "
        "itself.",
    )


@dataclass
class Generation:
    """Beam search at evaluation; lengths in tokens of the target."""

    num_beams: int = key(6, "Beams of the search at evaluation; 1: greedy decoding.")
    min_length: int = key(10, "Fewest tokens of a generated text.")
    max_length: int = key(60, "Most tokens of a generated text.")
    no_repeat_ngram_size: int = key(3, "No run of so many tokens occurs twice in a generated text; 0: no such limit.")
    length_penalty: float = key(
        1.0,
        "Exponent of the length by which a beam's log-probability is divided; above 0, larger favours longer texts.",
    )


@dataclass
class Task:
    """What is learned and how it is scored."""

    name: str = key(MISSING, "Name of the task, in tables and run folders.")
    kind: TaskKind = key(
        MISSING,
        "What is predicted. classification: a label; regression: a number; text_to_text: a text, which is generated.",
    )
    sizes: str = key(MISSING, "Which column of conf/sizes.yaml suits the task's backbone in the paper.")
    hub_id: str | None = key(None, "Dataset on the Hugging Face hub, such as EdinburghNLP/xsum. null: none.")
    hub_config: str | None = key(None, "Configuration of the hub's dataset, such as ro-en. null: its default.")
    hub_revision: str | None = key(None, "Branch, tag or commit of task.hub_id. null: the main branch.")
    data_dir: str | None = key(
        None, "A folder with train, validation and test files; wins over task.hub_id. null: none."
    )
    data_files: dict[str, str] = key({}, "A file for each split, as {SPLIT: FILE}; wins over task.data_dir.")
    train_file: str | None = key(None, "The file of task.train_split, whatever the task calls it. null: none.")
    validation_file: str | None = key(
        None, "The file of task.selection_split, whatever the task calls it. null: none is given."
    )
    test_file: str | None = key(None, "The file of task.report_split, whatever the task calls it. null: none is given.")
    packages: list[str] | None = key(
        None,
        "Tasks made of docstrings: the Python packages that they are read from; python is the standard library. "
        "null: the task is not made of them.",
    )
    train_split: str = key("train", "Name of the split to train on.")
    selection_split: str = key(
        "validation", "Name of the split by which a state, and the trial of a search, is selected."
    )
    report_split: str = key("test", "Name of the split that the score is of.")
    further_splits: list[str] = key(
        [], "Splits that are scored besides the report split, such as mismatched MNLI; []: none."
    )
    max_train: int | None = key(None, "Examples of task.train_split that are used, the first ones. null: all.")
    max_selection: int | None = key(None, "Examples of task.selection_split that are used, the first ones. null: all.")
    max_eval: int | None = key(
        None, "Examples of task.report_split, and of each further split, that are used, the first ones. null: all."
    )
    text_columns: list[str] = key([], "Classification and regression: the column of the text, or the two of a pair.")
    label_column: str = key("label", "Classification and regression: the column of the label or number.")
    labels: list[str] = key(
        [],
        "Names of the labels in the order of their codes. []: those of the training split. A number is then no code, "
        "unless the data set says which label each code is.",
    )
    source_column: str = key("document", "Text to text: the column that is read.")
    target_column: str = key(
        "summary", "Text to text: the column that is to be written; a text, or a list of texts that are all right."
    )
    source_join: str | None = key(
        None, "What to put between the parts of a source that is a list of texts. null: sources are single texts."
    )
    prompt: str | None = key(
        None,
        "Text to text: what the model reads, with {source} in it, and {mask} where the tokenizer's mask token goes. "
        "Other special tokens, such as <|im_start|>, are typed as they are. "
        "null: the source, and for a decoder alone, which is to go on with the target, a line break after it.",
    )
    merge_references: bool = key(False, "true: rows with equal sources are one example with all their targets.")
    source_language: str | None = key(
        None, "Language of the source, as a code that the backbone has, such as mBART's en_XX. null: none is set."
    )
    target_language: str | None = key(
        None, "Language of the target, as a code that the backbone has, such as mBART's ro_RO. null: none is set."
    )
    max_source_length: int = key(
        512, "Tokens of an input, its prompt and special tokens included; the rest is cut off."
    )
    max_target_length: int = key(128, "Tokens of a target in training; the rest is cut off.")
    metric: str = key(
        MISSING,
        "The main score, by which runs are ranked. Classification: accuracy, f1 (of the second of two labels), "
        "macro_f1, matthews; regression: pearson, spearman; text to text: rouge1, rouge2, rougeL, rougeLsum, bleu, "
        "chrf, bleu_ro (without diacritics, as in the paper), exact_match.",
    )
    selection_metric: str | None = key(
        None,
        "By which a state is selected: the main score, or, for text to text, loss, of which the lowest is best. null: "
        "the main score.",
    )
    generation: Generation = field(default_factory=Generation)
    baselines: list[str] = key(
        [],
        "Scores shown next to the run's. majority: the most frequent label for every example; head: the task head "
        "trained alone; lead1: the source's first sentence; copy: the source itself; []: none.",
    )
    paper: dict[str, Any] = key({}, "The paper's training settings, which trainer=paper takes.")
    quick: dict[str, Any] = key({}, "Settings such as keep and evaluate_every, which trainer=quick takes.")


@dataclass
class Trainer:
    """Optimisation; one optimiser step sees batch_size x accumulation examples."""

    learning_rate: float = key(MISSING, "AdamW's learning rate after the warm-up, the highest of the schedule.")
    epochs: float = key(3.0, "Passes over the training examples; trainer.max_steps wins over them.")
    max_steps: int | None = key(None, "Optimiser steps; wins over trainer.epochs. null: as many as the epochs have.")
    batch_size: int = key(32, "Training examples in a batch.")
    batch_tokens: int | None = key(
        None,
        "Tokens in a training batch: examples of like lengths, their number x the longest of them; wins over "
        "trainer.batch_size. null: batches have trainer.batch_size examples.",
    )
    accumulation: int = key(1, "Batches whose gradients make one optimiser step.")
    batching: Batching = key(
        Batching.random,
        "Which examples a batch holds. random: any; bucketed: those of like lengths, padded to a few widths, in random "
        "order.",
    )
    padding_free: bool | str = key(
        "auto",
        "true: the layers see a batch's tokens in one row and compute nothing for padding, which is quick on a GPU in "
        "bf16 alone. auto: there, and for backbones that can have it.",
    )
    micro_batch: str | None = key(
        None,
        "Examples that go through the model at once, a part of the batch where memory is short; the gradient stays "
        "that of the whole batch. auto: the most that fit, halved where memory runs out; null: the batch.",
    )
    eval_batch_size: int = key(64, "Examples in a batch to be predicted, at most.")
    eval_batch_tokens: int | None = key(
        None, "Input tokens in a batch to be predicted, at most. null: only trainer.eval_batch_size limits it."
    )
    schedule: Schedule = key(
        Schedule.linear,
        "The learning rate after the warm-up. linear: falls to 0 along a line; cosine: falls to 0 along half a cosine; "
        "constant: stays.",
    )
    warmup: float = key(
        0.06, "Share of the optimiser steps, at least 0 and below 1, in which the learning rate rises from 0."
    )
    weight_decay: float = key(0.0, "AdamW's weight decay, on all but biases and LayerNorms.")
    max_grad_norm: float = key(1.0, "Norm to which the gradient of all trained tensors is clipped; 0: no clipping.")
    label_smoothing: float = key(
        0.0, "Share of a target's probability, at least 0 and below 1, that is spread evenly over all labels or tokens."
    )
    betas: list[float] = key([0.9, 0.999], "AdamW's two decay rates, of the mean gradient and of its square.")
    epsilon: float = key(1e-8, "AdamW's epsilon, which is added to the denominator of its update.")
    keep: Keep = key(
        Keep.last,
        "Which state is reported. last: the one after the last step; best: the best on the selection split.",
    )
    evaluate_every: int | None = key(
        None,
        "With trainer.keep=best: optimiser steps between evaluations on the selection split. null: once an epoch.",
    )
    precision: Precision = key(
        Precision.auto,
        "What the model computes in. fp32: float32; bf16: bfloat16, by autocast where the weights are float32; auto: "
        "bf16 on a GPU that has it, else fp32.",
    )
    gradient_checkpointing: bool = key(
        False, "true: activations are computed again in the backward pass, which takes less memory and more time."
    )
    compile: Compile = key(
        Compile.none,
        "layers: torch.compile, layer by layer, which takes a minute at the start; none: nothing is compiled.",
    )
    graphs: bool | str = key(
        "auto",
        "true: on a GPU each shape of batch is recorded as a CUDA graph, forward and backward pass, and replayed, "
        "which is quick where Python takes longer to launch a backbone's kernels than they take. auto: where a step "
        "can be recorded.",
    )
    fused_loss: bool = key(True, "true: the loss of target tokens is computed without all their logits at once.")
    checkpoint_minutes: float = key(
        5.0, "Minutes of training between checkpoints, from which an interrupted run goes on."
    )
    device: Device = key(Device.auto, "Where a run computes: cpu, cuda (a GPU); auto: a GPU where there is one.")


@dataclass
class Variation:
    """What a search tries for a key: multiples of the value that the run comes with, or values."""

    times: list[float] | None = key(None, "Multiples of the value that the run comes with. null: see values.")
    values: list[Any] | None = key(None, "Values to be tried as they are. null: see times.")


@dataclass
class Search:
    """Runs that are trained first, each combination of the values of `keys` once, to choose by the selection split."""

    name: str = key(MISSING, "Name of the search.")
    keys: dict[str, Variation] = key(
        {},
        "What is tried for each key, as {KEY: {times: [...]}}, multiples of the value that the run comes with, or "
        "{KEY: {values: [...]}}.",
    )
    seed: int | None = key(None, "Seed of the trials. null: the first seed of the sweep.")
    trial: int | None = key(
        None, "The run is this one of the trials, counted from 0. null: it takes the best trial's values."
    )


@dataclass
class Run(Modification):
    """The whole config. Keys of `Modification` are its first modification; `mix` holds the others by name."""

    mix: dict[str, Modification] = key(
        {}, "Further modifications by name: mix.NAME.KEY is to one of them what KEY above is to the first."
    )
    unfreeze: Unfreeze = key(
        Unfreeze.none,
        "Backbone parameters that are trained too. none: none of them; bias: the biases (BitFit); norm: the norms' "
        "weights and biases; all: every parameter.",
    )
    allow_unused: bool = key(False, "true: train although the loss does not depend on every trainable tensor.")
    fidelity: Fidelity = field(default_factory=Fidelity)
    method: str = key(MISSING, "Name of the method, in tables and run folders.")
    model: Model = field(default_factory=Model)
    task: Task = field(default_factory=Task)
    trainer: Trainer = field(default_factory=Trainer)
    sizes: Any = key(None, "The columns of conf/sizes.yaml.")
    size: Any = key(
        None,
        "The column of conf/sizes.yaml for this run. `of` names the backbones that it was made for; on another "
        "backbone the bottlenecks are those that store the same share.",
    )
    budget: str | None = key(
        None,
        "The number of stored parameters that the bottlenecks are solved for: 6.7% of the backbone, 599k, 27.4M, "
        "599232. null: the bottlenecks are as they are given.",
    )
    budget_split: list[float] | None = key(
        None,
        "Of several bottlenecks: the ratio of what they store, such as [9,1], the root's first and then those of mix. "
        "null: their sizes keep the ratio that they come with.",
    )
    seed: int = key(42, "Seed of all that is random in a run: new weights, the order of the examples, dropout.")
    search: Search | None = None
    debug: str | None = key(None, "Name of the debug preset, such as smoke. null: none.")
    output_dir: str = key("outputs", "Folder of the runs, which are in it as TASK/MODEL/METHOD/HASH.")
    rerun: bool = key(False, "true: train again although the run is done.")
    retry: bool = key(False, "true: a sweep trains again what failed before.")
    jobs: str = key(
        "1", "Runs of a sweep at once, in processes of their own. auto: as many as free memory and cores allow."
    )
    mps: bool | str = key(
        False,
        "true: runs at once on one GPU share it through NVIDIA's Multi-Process Service, whose daemon the sweep starts "
        "and ends. auto: where that is installed.",
    )


PACKAGE = Path(__file__).resolve().parent.parent
EMBEDDED = PACKAGE / "backbones"  # the folder of the backbones that ship inside the package

# `${embedded:mini}`: the folder of such a backbone.
OmegaConf.register_new_resolver("embedded", lambda name: str(EMBEDDED / name), replace=True)


def conf_dir() -> Path:
    """The folder with the YAML groups: inside the installed package, or at the top of a checkout."""
    return PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


def task_files(task: Task) -> dict[str, str]:
    """The user's own files by split."""
    roles = (
        (task.train_split, task.train_file),
        (task.selection_split, task.validation_file),
        (task.report_split, task.test_file),
    )
    return {**task.data_files, **{split: file for split, file in roles if file is not None}}


def modifications(run: Run) -> dict[str, Modification]:
    """The modifications of a run by the prefix of their keys: "" for the root's, "mix.NAME." for the others."""
    found: dict[str, Modification] = {}
    if run.functional_form.name != "none":
        found[""] = run
    found.update({f"mix.{name}.": modification for name, modification in run.mix.items()})
    return found


def module_name(prefix: str) -> str:
    """The name of a modification's modules in the model: NAME for "mix.NAME.", "modification" for the root's."""
    return prefix.split(".")[1] if prefix else "modification"


def value_at(run: Run, key: str) -> Any:
    """The value of a dotted key. Raises AttributeError, or in a mapping KeyError, where there is none."""
    node: Any = run
    for part in key.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """The values of overrides KEY=VALUE, as typed, by their keys without a +."""
    return dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)


def resolve(cfg: DictConfig) -> Run:
    """The composed config as a typed `Run` with every interpolation resolved."""
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, Run)
    run.model.name = backbone_name(run.model)
    if isinstance(run.size, dict):
        run.size["taken"] = {
            prefix: m.bottleneck for prefix, m in modifications(run).items() if _is_from_column(cfg, prefix)
        }
    if run.task.prompt is not None:  # Hydra's command line has no line break but that of the shell
        run.task.prompt = run.task.prompt.replace(r"\n", "\n")
    return run


def _is_from_column(cfg: DictConfig, prefix: str) -> bool:
    """Whether a modification has its bottleneck from the run's column of sizes, and not from what was typed."""
    node = cfg.mix[prefix.split(".")[1]] if prefix else cfg
    raw = OmegaConf.to_container(OmegaConf.masked_copy(node, "bottleneck"), resolve=False)
    return isinstance(raw, dict) and "${size." in str(raw["bottleneck"])


def backbone_name(model: Model) -> str:
    """What tables call the backbone: the folder's name where `model.path` is given, else the option's name."""
    return Path(os.path.expanduser(model.path)).resolve().name if model.path else model.name
