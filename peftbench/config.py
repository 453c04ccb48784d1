"""The schema of a run: what every key of `conf/` may hold. Imports no torch.

The four axes of He et al. (2022, table 1) and their options make a `Modification`. The root of the config is one of
them, so that `bottleneck=8` and `functional_form=relu` are keys of their own; further ones stand under `mix`.
Which combinations mean something is said in `axes.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

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


@dataclass
class FunctionalForm:
    """f in Δh = f(x W_down) W_up; or `constant`, Δh = l."""

    name: str = "none"  # constant, identity, softmax, or an activation (ACTIVATIONS)


@dataclass
class ModifiedRepresentation:
    """Which hidden vectors h are modified; `null` means all of them."""

    name: Representation = Representation.none
    stacks: list[Stack] = field(default_factory=lambda: [Stack.encoder, Stack.decoder])
    attentions: list[AttentionKind] = field(default_factory=lambda: list(AttentionKind))
    layers: list[int] | None = None  # indices in each stack; negative ones count from the top
    # What a parallel form over heads reads: each head's query, scaled as the attention has it; the attention input
    # (table 1); or an unscaled query of the attention input behind a LayerNorm of its own (the paper's code on BART).
    head_input: HeadInput = HeadInput.query
    # What a parallel form over the FFN of a pre-norm family reads: its normed input, or the residual before the norm.
    ffn_input: FFNInput = FFNInput.normed


@dataclass
class InsertionForm:
    """What f reads: h itself (sequential) or the input x of the sub-module that computes h (parallel)."""

    name: Insertion = Insertion.none


@dataclass
class CompositionFunction:
    """How Δh joins h: h + Δh (add), h + sΔh (scaled), (1-λ)h + λΔh (gated), h + λΔh (gated_add), h ∘ (1 + Δh)
    (multiply)."""

    name: Composition = Composition.none
    scale: float = 1.0  # s; LoRA's alpha / r
    learned: bool = False  # s is a trained scalar, which starts at `scale`


@dataclass
class Modification:
    """One point on the four axes, with the options that the paper or its code has."""

    functional_form: FunctionalForm = field(default_factory=FunctionalForm)
    modified_representation: ModifiedRepresentation = field(default_factory=ModifiedRepresentation)
    insertion_form: InsertionForm = field(default_factory=InsertionForm)
    composition_function: CompositionFunction = field(default_factory=CompositionFunction)
    bottleneck: int | None = None  # r, or the number l of prefix vectors; null for a constant
    init: Init = Init.lora  # bert: both weights from N(0, 0.02); lora: W_up = 0, so that a run begins as the backbone
    bias: bool = False  # beside W_down and W_up
    layer_norm: LayerNormPlace = LayerNormPlace.none  # one of its own: before W_down, or behind W_up
    dropout: float | None = None  # after f; null: the backbone's own rate, as in the paper's code
    input_dropout: float = 0.0  # on x, before W_down (LoRA's dropout)
    prefix_mlp: int | None = None  # width of the MLP that produces the prefix in training; null: none


@dataclass
class Fidelity:
    """The places where the paper's text and its released code differ: true has it as in the code.

    `fidelity.py` says of each what it does, and to which runs.
    """

    name: str = "paper"  # of the set; it changes nothing by itself
    frozen_task_head: bool = False
    attention_adapter_before_output: bool = False
    attention_adapter_norm: bool = False
    attention_adapter_bert_init: bool = False
    head_adapter_from_mlp: bool = False
    head_adapter_normed_query: bool = False
    mbart_ffn_adapter_reads_residual: bool = False
    dead_parameters: bool = False


@dataclass
class Model:
    """The frozen backbone: a hub id at a revision, or a local folder."""

    name: str = MISSING
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None  # a folder with config.json and weights; wins over hub_id
    # Of the frozen weights; what is trained stays float32. auto: bfloat16 where the run computes in it on a GPU and
    # trains nothing of the backbone, else float32.
    dtype: DType = DType.float32
    sizes: str = MISSING  # which column of conf/sizes.yaml the method presets take
    # For counting without weights or network, as in config.json: model_type, the keys that differ from transformers'
    # defaults for it, and name_or_path, the hub id that this describes. Training reads config.json itself.
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class Generation:
    """Beam search at evaluation; lengths in tokens of the target."""

    num_beams: int = 6
    min_length: int = 10
    max_length: int = 60
    no_repeat_ngram_size: int = 3
    length_penalty: float = 1.0


@dataclass
class Task:
    """What is learned and how it is scored."""

    name: str = MISSING
    kind: TaskKind = MISSING
    sizes: str = MISSING  # which column of conf/sizes.yaml suits this task's paper backbone
    hub_id: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    data_dir: str | None = None  # a folder with train/validation/test files; wins over hub_id
    data_files: dict[str, str] = field(default_factory=dict)  # split: file; wins over data_dir
    # The files of train_split, selection_split and report_split, without knowing what the task calls them.
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    packages: list[str] | None = None  # docstring tasks: where the text comes from
    train_split: str = "train"
    selection_split: str = "validation"  # by which a state, and the trial of a search, is selected
    report_split: str = "test"  # which the score stands on
    further_splits: list[str] = field(default_factory=list)  # scored beside the report split, such as mismatched MNLI
    max_train: int | None = None  # examples, the first ones of the split; null: all
    max_selection: int | None = None  # likewise of selection_split
    max_eval: int | None = None  # likewise of report_split and further_splits
    text_columns: list[str] = field(default_factory=list)  # classification: one text or a pair
    label_column: str = "label"
    # Names in the order of their codes; []: those of the training split, where a number is no code unless the data set
    # says which label each code is.
    labels: list[str] = field(default_factory=list)
    source_column: str = "document"
    target_column: str = "summary"  # a text, or a list of texts that are all right
    source_join: str | None = None  # what to put between the parts of a source that is a list; null: none is
    # What the model reads, with {source} in it and {mask} where the tokenizer's mask token shall stand; other special
    # tokens, such as <|im_start|>, are typed as they are. null: the source, and for a decoder alone, which is to go on
    # with the target, a line break behind it.
    prompt: str | None = None
    merge_references: bool = False  # rows with equal sources are one example with all their targets
    source_language: str | None = None  # codes of backbones that have them, such as mBART's en_XX
    target_language: str | None = None
    max_source_length: int = 512  # tokens
    max_target_length: int = 128  # tokens
    metric: str = MISSING  # the main score, by which runs are ranked
    selection_metric: str | None = None  # by which a state is selected; loss: the lowest; null: the main score
    generation: Generation = field(default_factory=Generation)
    baselines: list[str] = field(default_factory=list)  # scores shown beside the run's: majority, head, lead1
    paper: dict[str, Any] = field(default_factory=dict)  # the paper's training settings, taken by trainer=paper
    quick: dict[str, Any] = field(default_factory=dict)  # keep, evaluate_every and the like, taken by trainer=quick


@dataclass
class Trainer:
    """Optimisation; one optimiser step sees batch_size x accumulation examples."""

    learning_rate: float = MISSING
    epochs: float = 3.0
    max_steps: int | None = None  # optimiser steps; wins over epochs
    batch_size: int = 32
    batch_tokens: int | None = None  # batches of like lengths, examples x the longest of them; wins over batch_size
    accumulation: int = 1  # batches to an optimiser step
    # Which examples a batch holds: random ones, or those of like lengths, padded to a few widths, in random order.
    batching: Batching = Batching.random
    # The layers see a batch's tokens in one row and compute nothing for padding; quick on a GPU in bf16 alone. auto:
    # there, and for backbones that can have it.
    padding_free: bool | str = "auto"
    # Examples that go through the model at once, a part of the batch where memory is short; the gradient stays that of
    # the whole batch. auto: the most that fit, halved where memory runs out; null: the batch.
    micro_batch: str | None = None
    eval_batch_size: int = 64
    eval_batch_tokens: int | None = None  # at most so many input tokens, too, in a batch to be predicted
    schedule: Schedule = Schedule.linear
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    epsilon: float = 1e-8
    keep: Keep = Keep.last  # which state is reported: the last, or the best on the selection split
    evaluate_every: int | None = None  # optimiser steps between looks at the selection split; null: once an epoch
    precision: Precision = Precision.auto  # auto: bf16 autocast on a GPU that has it, else fp32
    gradient_checkpointing: bool = False
    compile: Compile = Compile.none  # torch.compile, layer by layer, which takes a minute at the start
    # On a GPU each shape of batch is recorded as a CUDA graph, forward and backward pass, and replayed: quick where
    # Python takes longer to launch a backbone's kernels than they take. auto: where a step can be recorded.
    graphs: bool | str = "auto"
    fused_loss: bool = True  # the loss of target tokens without all their logits at once
    checkpoint_minutes: float = 5.0  # of training between checkpoints, from which an interrupted run goes on
    device: Device = Device.auto


@dataclass
class Variation:
    """What a search tries for a key: multiples of the value that the run comes with, or values."""

    times: list[float] | None = None
    values: list[Any] | None = None


@dataclass
class Search:
    """Runs that are trained first, each combination of the values of `keys` once, to choose by the selection split."""

    name: str = MISSING
    keys: dict[str, Variation] = field(default_factory=dict)
    seed: int | None = None  # of the trials; null: the first seed of the sweep
    trial: int | None = (
        None  # the run is this one of the trials, counted from 0; null: it takes the best trial's values
    )


@dataclass
class Run(Modification):
    """The whole config. Keys of `Modification` are its first modification; `mix` holds the others by name."""

    mix: dict[str, Modification] = field(default_factory=dict)  # further modifications: mix.NAME.KEY as KEY above
    unfreeze: Unfreeze = Unfreeze.none  # backbone parameters that are trained too: biases (BitFit), norms or all
    allow_unused: bool = False  # train although the loss does not depend on every trainable tensor
    fidelity: Fidelity = field(default_factory=Fidelity)
    method: str = MISSING
    model: Model = field(default_factory=Model)
    task: Task = field(default_factory=Task)
    trainer: Trainer = field(default_factory=Trainer)
    sizes: Any = None  # conf/sizes.yaml
    size: Any = None  # its column for this run; `of`: the backbones it was made for, on others the shares are the same
    # The stored count that the bottlenecks are solved for: 6.7% of the backbone, 599k, 27.4M, 599232; null: none.
    budget: str | None = None
    # Of several bottlenecks: the ratio of what they store, such as [9, 1], the root's first and then those of `mix`;
    # null: their sizes keep the ratio that they come with.
    budget_split: list[float] | None = None
    seed: int = 42
    search: Search | None = None
    debug: str | None = None
    output_dir: str = "outputs"  # runs lie there as TASK/MODEL/METHOD/HASH
    rerun: bool = False  # train again although the run is done
    retry: bool = False  # a sweep trains again what failed before
    jobs: str = "1"  # runs of a sweep at once, in processes of their own; auto: by free memory and cores
    # true: runs at once on one GPU share it through NVIDIA's Multi-Process Service, whose daemon the sweep starts and
    # ends; auto: where that is installed.
    mps: bool | str = False


# `${embedded:mini}`: the folder of a backbone that ships inside the package.
OmegaConf.register_new_resolver("embedded", lambda name: str(Path(__file__).resolve().parent / name), replace=True)


def conf_dir() -> Path:
    """The folder with the YAML groups: inside the installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


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
