"""The schema of a run: the type, default and meaning of every key of `conf/`.

The four axes of He et al. (2022, table 1) and their options make a `Modification`. The root of the config is one
modification, so that `bottleneck=8` and `functional_form=relu` are top-level keys; further ones are in `mix`.
`config/axes.py` says which combinations are valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from peftbench.utils.errors import UserError
from peftbench.utils.files import expand_home

HELP = "help"  # a field's metadata: what the key means

# Names in transformers' ACT2FN of functions of one tensor without parameters; a test compares them with ACT2FN.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "mish", "tanh", "sigmoid", "relu6", "relu2", "leaky_relu")
# Names of transformers' OptimizerNames that need nothing else than trainer's keys, and the packages of some; a test
# compares them. Left out are those that change the training loop, or are for other devices.
OPTIMIZERS: dict[str, str | None] = {
    "adamw": None,
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")),
    **dict.fromkeys(
        (
            "adamw_bnb_8bit",
            "ademamix",
            "ademamix_8bit",
            "lion_8bit",
            "lion_32bit",
            "paged_adamw_32bit",
            "paged_adamw_8bit",
            "paged_ademamix_32bit",
            "paged_ademamix_8bit",
            "paged_lion_32bit",
            "paged_lion_8bit",
            "rmsprop_bnb",
            "rmsprop_bnb_8bit",
            "rmsprop_bnb_32bit",
        ),
        "bitsandbytes",
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
}
# What `trackers` may name, and the module that each needs.
TRACKERS = {name: name for name in ("tensorboard", "wandb", "mlflow", "trackio")}
FUNCTIONAL_FORMS = ("none", "constant", "identity", "softmax", *ACTIVATIONS)

# mypy and OmegaConf both need the members of an Enum spelled out; a user types a member's name.
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
        "all_linear",
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
TaskKind = Enum(
    "TaskKind", ["classification", "regression", "token_classification", "question_answering", "text_to_text"]
)
WITH_LABELS = (TaskKind.classification, TaskKind.token_classification)  # kinds of tasks that predict `Task.labels`
DType = Enum("DType", ["auto", "float32", "bfloat16"])
Quantization = Enum("Quantization", ["none", "nf4", "int8"])
Precision = Enum("Precision", ["auto", "fp32", "bf16", "fp16"])
Schedule = Enum("Schedule", ["linear", "cosine", "constant"])
Keep = Enum("Keep", ["best", "last"])
Batching = Enum("Batching", ["random", "bucketed"])
Compile = Enum("Compile", ["none", "layers"])
Device = Enum("Device", ["auto", "cpu", "cuda"])
Sharding = Enum("Sharding", ["none", "full"])

Sampler = Enum("Sampler", ["tpe", "nsgaii", "random"])
Reported = Enum("Reported", ["chosen", "trials"])

DOCSTRINGS = "docstrings"  # a text for `retention` that is on every machine
LOSS = "loss"  # the only value of `Task.selection_metric` for which lower is better


def key(default: Any, help: str) -> Any:
    """Make a key of the config from its default, which is copied for each config, and its help in `peftbench ls keys`.

    Args:
        default: omegaconf's MISSING for a key that a preset of its group must set.
        help: in plain English: what the key does, its unit, and what null and each choice mean.
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
    _target_: str | None = key(
        None,
        "A form of your own in the place of functional_form.name: the dotted name of a torch.nn.Module that computes "
        "Δh, such as mypkg.Swish2, or its name in the entry points peftbench.functional_forms of an installed package. "
        "null: none.",
    )
    settings: dict[str, Any] = key(
        {},
        "What a form of your own takes in addition to its sizes, as functional_form.settings.KEY=VALUE. {}: nothing.",
    )


@dataclass
class ModifiedRepresentation:
    """Which hidden vectors h are modified; `null` means all of them."""

    name: Representation = key(
        Representation.none,
        "Which hidden vectors h are modified; `peftbench ls axes` describes the choices and shows which combinations "
        "run. none: no modification.",
    )
    stacks: list[Stack] = key(
        [Stack.encoder, Stack.decoder],
        "Stacks in which h is modified: encoder, decoder, or both, as far as the backbone has them.",
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
        "What a parallel form over heads reads. query: each head's query, scaled as in the attention; hidden: the "
        "attention input (table 1); normed_query: an unscaled query of the attention input after a separate LayerNorm "
        "(the paper's code on BART).",
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
        "r, the width between W_down and W_up, or the number l of prefix vectors. null: no bottleneck, as with "
        "functional_form=constant.",
    )
    init: Init = key(
        Init.lora,
        "How W_down and W_up start. bert: both from N(0, 0.02); lora: W_up at 0, so that Δh is 0 and a run begins as "
        "the backbone, unless its composition is gated: (1-λ)h is not h. On a decoder alone, lora starts a prefix as "
        "the keys and values of text that the backbone writes.",
    )
    bias: bool = key(False, "true: W_down and W_up have biases.")
    layer_norm: LayerNormPlace = key(
        LayerNormPlace.none,
        "Where the modification adds a LayerNorm. none: nowhere; input: before W_down; output: after W_up.",
    )
    dropout: float | None = key(
        None, "Probability of dropout after f. null: the backbone's rate, as in the paper's code."
    )
    input_dropout: float = key(0.0, "Probability of dropout on x, before W_down (LoRA's dropout).")
    prefix_mlp: int | None = key(
        None, "Width of the MLP that produces the prefix in training; it is not stored. null: no MLP."
    )


@dataclass
class Fidelity:
    """The places where the paper's text and its released code differ: true follows the code.

    `config/fidelity.py` says to which runs each applies.
    """

    name: str = key(
        "paper",
        "Name of the set of switches, paper or released_code; it changes nothing by itself. With a switch set to true, "
        "the run follows the released code, as the switch's help describes; with false, the paper's text.",
    )
    frozen_task_head: bool = key(False, "The task head keeps its random initialisation; only BitFit trains its biases.")
    attention_adapter_before_output: bool = key(
        False, "The parallel adapter at the attention adds Δh to the concatenated heads, before W_o."
    )
    attention_adapter_norm: bool = key(False, "Adapters at the attention have a LayerNorm before W_down.")
    attention_adapter_bert_init: bool = key(
        False, "Adapters at the attention start at N(0, 0.02), including scaled ones."
    )
    head_adapter_from_mlp: bool = key(
        False, "The prefix's MLP, without biases, produces the weights of the multi-head parallel adapter."
    )
    head_adapter_normed_query: bool = key(
        False,
        "On BART the multi-head parallel adapter reads unscaled queries of the attention input after a separate "
        "LayerNorm.",
    )
    mbart_ffn_adapter_reads_residual: bool = key(
        False, "On mBART the parallel adapter at the FFN reads the residual stream before the FFN's norm."
    )
    dead_parameters: bool = key(
        False, "The code also trains parameters that nothing reads; here they are counted but not created."
    )


@dataclass
class Model:
    """The frozen backbone: a hub id at a revision, or a local folder."""

    name: str = key(MISSING, "Name of the preset, in tables and run folders; with model.path the folder's name.")
    hub_id: str | None = key(None, "Repository on the Hugging Face hub, such as facebook/bart-large. null: none.")
    revision: str | None = key(None, "Branch, tag or commit of model.hub_id. null: the main branch.")
    path: str | None = key(
        None, "A folder with config.json and weights, or with one GGUF file; overrides model.hub_id. null: none."
    )
    dtype: DType = key(
        DType.float32,
        "Type of the frozen weights, float32 or bfloat16; trained weights are always float32. auto: bfloat16 if the "
        "run computes in it on a GPU and trains nothing of the backbone, else float32.",
    )
    quantization: Quantization = key(
        Quantization.none,
        "How the frozen projections of the layers are packed by bitsandbytes while they are loaded: nf4, four bits; "
        "int8, eight bits; none: they are not, or are as model.path stores them. The other weights are then "
        "bfloat16 if the run computes in it on a GPU.",
    )
    attn_implementation: str | None = key(
        None,
        "The attention function, as transformers names it: sdpa, eager, flash_attention_2, flex_attention and others; "
        "modified heads and prompts need sdpa, which has ours. null: transformers' default, sdpa where there is one.",
    )
    sizes: str = key(MISSING, "The column of conf/sizes.yaml from which the method presets take their sizes.")
    chat_template: str | None = key(
        None,
        "A file with a chat template in Jinja, for a tokenizer that has none, or instead of its own. null: the "
        "tokenizer's own.",
    )
    architecture: dict[str, Any] = key(
        {},
        "Used to count parameters without weights or network, in the form of config.json: model_type, the keys that "
        "differ from its defaults in transformers, and name_or_path, the hub id of the described model. Training reads "
        "config.json itself.",
    )


@dataclass
class Generation:
    """Beam search at evaluation; lengths in tokens of the target."""

    num_beams: int = key(6, "Number of beams at evaluation; 1: greedy decoding.")
    min_length: int = key(10, "Minimum number of tokens in a generated text.")
    max_length: int = key(60, "Maximum number of tokens in a generated text.")
    no_repeat_ngram_size: int = key(3, "No sequence of this many tokens occurs twice in a generated text; 0: no limit.")
    length_penalty: float = key(
        1.0,
        "Exponent of the length by which a beam's log-probability is divided; larger values favour longer texts.",
    )


@dataclass
class Task:
    """What is learned and how it is scored."""

    name: str = key(MISSING, "Name of the task, in tables and run folders.")
    kind: TaskKind = key(
        MISSING,
        "What is predicted. classification: a label; regression: a number; token_classification: a label for each "
        "word; question_answering: a part of a context; text_to_text: a generated text.",
    )
    _target_: str | None = key(
        None,
        "A task of your own: the dotted name of a class derived from the one that task.kind has in peftbench.tasks, "
        "such as mypkg.Anagrams, or its name in the entry points peftbench.tasks of an installed package. null: that "
        "class itself.",
    )
    settings: dict[str, Any] = key(
        {}, "What a task of your own reads as self.task.settings, as task.settings.KEY=VALUE. {}: nothing."
    )
    sizes: str = key(MISSING, "The column of conf/sizes.yaml for the task's backbone in the paper.")
    hub_id: str | None = key(None, "Dataset on the Hugging Face hub, such as EdinburghNLP/xsum. null: none.")
    hub_config: str | None = key(None, "Configuration of the hub's dataset, such as ro-en. null: its default.")
    hub_revision: str | None = key(None, "Branch, tag or commit of task.hub_id. null: the main branch.")
    data_dir: str | None = key(
        None, "A folder with train, validation and test files; overrides task.hub_id. null: none."
    )
    data_files: dict[str, Any] = key(
        {}, "A file, or a list of files, for each split, as {SPLIT: FILE}; overrides task.data_dir."
    )
    train_file: Any = key(
        None,
        "The file for task.train_split, whatever its name, or a list of files: their rows follow each other, and "
        "[a.en,a.de] are the columns en and de, line by line. null: none.",
    )
    validation_file: Any = key(None, "The file, or files, for task.selection_split. null: none.")
    test_file: Any = key(None, "The file, or files, for task.report_split. null: none.")
    packages: list[str] | None = key(
        None,
        "For tasks made of docstrings: the Python packages from which they are read; python is the standard library. "
        "null: not such a task.",
    )
    train_split: str = key("train", "Name of the split to train on.")
    selection_split: str = key(
        "validation",
        "Name of the split used to select a state and the trial of a search. held_out: a tenth of the different inputs "
        "of task.train_split, which is then not trained on.",
    )
    report_split: str = key("test", "Name of the split on which the score is computed.")
    further_splits: list[str] = key(
        [], "Splits that are scored in addition to the report split, such as mismatched MNLI; []: none."
    )
    deal_by: str | None = key(
        None,
        "A column of which each value is in one split, such as the domain of a text, where a split is dealt from the "
        "rows of task.train_split: one without a file, and held_out. null: each input is dealt by itself.",
    )
    group_column: str | None = key(
        None,
        "A column that says of which group an example is, such as the domain of a text. Scores of some groups can then "
        "be shown, such as group=unseen: those of which no training example is. null: none.",
    )
    max_train: int | None = key(None, "Number of examples of task.train_split to use, from the start. null: all.")
    max_selection: int | None = key(
        None, "Number of examples of task.selection_split to use, from the start. null: all."
    )
    max_eval: int | None = key(
        None, "Number of examples of task.report_split, and of each further split, to use, from the start. null: all."
    )
    column_names: list[str] = key(
        [], "The names of the columns of .csv and .tsv files without a header. []: a file's first row names them."
    )
    delimiter: str | None = key(
        None, "What separates the columns of .csv and .tsv files. null: a comma in .csv, a tab (\\t) in .tsv."
    )
    text_columns: list[str] = key(
        [],
        "Classification and regression: the column of the text, or the two of a pair. Token classification: the column "
        "of the words, a list or a text with white space between them. Question answering: the columns of the question "
        "and of the context.",
    )
    label_column: str = key(
        "label",
        "Classification and regression: the column of the label or number. Token classification: that of the words' "
        "labels. Question answering: that of the answers.",
    )
    labels: list[str] = key(
        [],
        "Names of the labels in the order of their codes. []: the labels of the training split; a number in the data "
        "is then a name, not a code, unless the data set says which label each code means.",
    )
    source_column: str = key("document", "Text to text: the column of the source.")
    target_column: str = key(
        "summary", "Text to text: the column of the target: a text, or a list of texts that are all right."
    )
    source_join: str | None = key(
        None, "Separator between the parts of a source that is a list of texts. null: sources are single texts."
    )
    prompt: str | None = key(
        None,
        "Text to text: template of the model's input, with {source} in it, and {mask} for the tokenizer's mask token. "
        "Other special tokens, such as <|im_start|>, are typed as they are. "
        "null: the source; for a decoder-only model, which continues with the target, the source and a line break.",
    )
    chat: bool | str = key(
        False,
        "Text to text with a decoder-only model. true: a source (in task.prompt) is a user's turn and its target the "
        "assistant's reply, in the tokenizer's chat template; auto: so for an instruct model, which is one whose "
        "generation stops at the token with which its template ends a turn; false: not so.",
    )
    messages_column: str | None = key(
        None,
        "Chat: the column of conversations, lists of {role, content}, in which the assistant's turns are learned. "
        "task.source_column and task.target_column then name what precedes the last one, and that one. null: not such "
        "a task.",
    )
    tools_column: str | None = key(
        None, "Chat: the column of the tools that the template shows, as lists of JSON schemas. null: no tools."
    )
    merge_references: bool = key(False, "true: rows with equal sources become one example with all their targets.")
    source_language: str | None = key(
        None, "Language of the source, as a code of the backbone, such as mBART's en_XX. null: not set."
    )
    target_language: str | None = key(
        None, "Language of the target, as a code of the backbone, such as mBART's ro_RO. null: not set."
    )
    max_source_length: int = key(
        512, "Maximum number of tokens of an input, including prompt and special tokens; the rest is cut off."
    )
    stride: int = key(
        128,
        "Token classification and question answering: an input of more than task.max_source_length tokens is read in "
        "windows, of which neighbours share this many tokens, or half a window if that is less.",
    )
    max_answer_length: int = key(30, "Question answering: maximum number of tokens of an answer.")
    unanswerable: bool = key(
        False,
        "Question answering. true: some questions have no answer in their context, and the model may say so; false: "
        "each has one.",
    )
    max_target_length: int = key(128, "Maximum number of tokens of a target in training; the rest is cut off.")
    max_length: int = key(
        1024,
        "Chat: maximum number of tokens of a conversation; the rest is cut off. What precedes the assistant's first "
        "turn keeps its last tokens, and leaves room for task.generation.max_length.",
    )
    metric: str = key(
        MISSING,
        "The main score, by which runs are ranked. Classification: accuracy, f1 (of the second of two labels), "
        "macro_f1, matthews; regression: pearson, spearman; token classification: entity_f1, entity_precision, "
        "entity_recall, token_accuracy; question answering: squad_f1, squad_exact_match; text to text: rouge1, rouge2, "
        "rougeL, rougeLsum, bleu, chrf, bleu_ro (without diacritics, as in the paper), exact_match, final_number (as "
        "in GSM8K), choice (as in LLM-Adapters). Or "
        "an evaluate.Metric of your own by its dotted name, such as mypkg.Brevity, or by its name in the entry points "
        "peftbench.metrics of an installed package; its first score counts, higher is better.",
    )
    selection_metric: str | None = key(
        None,
        "The value that selects a state: the main score or, for text to text, loss, where the lowest is best. null: "
        "the main score.",
    )
    generation: Generation = field(default_factory=Generation)
    baselines: list[str] = key(
        [],
        "Scores shown next to the run's. majority: the most frequent label for every example, or word; head: the task "
        "head trained alone; lead1: the source's first sentence; copy: the source, or the context, itself; no_answer: "
        "no answer to any question; []: none.",
    )
    paper: dict[str, Any] = key({}, "The paper's training settings, which trainer=paper uses.")
    quick: dict[str, Any] = key({}, "Settings such as keep and evaluate_every, which trainer=quick uses.")


@dataclass
class Trainer:
    """Optimisation; one optimiser step uses batch_size x accumulation examples."""

    learning_rate: float = key(MISSING, "The learning rate after the warm-up, the maximum of the schedule.")
    epochs: float = key(3.0, "Passes over the training examples; trainer.max_steps overrides it.")
    max_steps: int | None = key(
        None, "Optimiser steps; overrides trainer.epochs. null: as many as trainer.epochs needs."
    )
    batch_size: int = key(32, "Training examples in a batch.")
    batch_tokens: int | None = key(
        None,
        "Tokens in a training batch of examples with similar lengths: their number times the length of the longest; "
        "overrides trainer.batch_size. null: batches have trainer.batch_size examples.",
    )
    accumulation: int = key(1, "Batches whose gradients are added up for one optimiser step.")
    batching: Batching = key(
        Batching.random,
        "Which examples form a batch. random: any; bucketed: examples of similar lengths, padded to a few widths, in "
        "random order.",
    )
    padding_free: bool | str = key(
        "auto",
        "true: the layers get a batch's tokens in one row and compute nothing for padding, which is fast only on a GPU "
        "in bf16 or fp16. auto: there, for backbones that support it.",
    )
    micro_batch: str | None = key(
        None,
        "Examples that go through the model at once, for a batch that does not fit in memory; the gradient is still "
        "that of the whole batch. auto: as many as fit, halved if memory runs out; null: the whole batch.",
    )
    eval_batch_size: int = key(64, "Maximum number of examples in an evaluation batch.")
    eval_batch_tokens: int | None = key(
        None, "Maximum number of input tokens in an evaluation batch. null: only trainer.eval_batch_size limits it."
    )
    schedule: Schedule = key(
        Schedule.linear,
        "The learning rate after the warm-up. linear: decreases linearly to 0; cosine: decreases to 0 along half a "
        "cosine; constant: does not change.",
    )
    warmup: float = key(
        0.06, "Share of the optimiser steps, at least 0 and below 1, in which the learning rate rises from 0."
    )
    weight_decay: float = key(0.0, "AdamW's weight decay, on everything except biases and LayerNorms.")
    max_grad_norm: float = key(1.0, "Maximum norm of the gradient of all trained tensors, by clipping; 0: no clipping.")
    label_smoothing: float = key(
        0.0, "Share of a target's probability, at least 0 and below 1, spread evenly over all labels or tokens."
    )
    optimizer: str = key(
        "adamw",
        "adamw: torch's AdamW, fused on a GPU; or a name of transformers, such as adamw_bnb_8bit, adafactor or "
        "lion_32bit, with the same learning rate, decay, betas and epsilon as far as it has them.",
    )
    lora_plus: float | None = key(
        None,
        "LoRA+: how many times the learning rate of W_down that of W_up is, in modifications whose functional form is "
        "the identity. null: once.",
    )
    betas: list[float] = key([0.9, 0.999], "AdamW's two decay rates, for the mean gradient and for its square.")
    epsilon: float = key(1e-8, "AdamW's epsilon, added to the denominator of its update.")
    keep: Keep = key(
        Keep.last,
        "Which state is reported. last: the state after the last step; best: the best on the selection split.",
    )
    evaluate_every: int | None = key(
        None,
        "With trainer.keep=best: optimiser steps between evaluations on the selection split. null: once per epoch.",
    )
    early_stopping: int | None = key(
        None,
        "With trainer.keep=best: the training ends after this many evaluations in a row on the selection split that "
        "are no better than the best. null: it always runs to its end.",
    )
    class_weights: Any = key(
        None,
        "Classification: how much an example of each label counts in the loss, as numbers in the order of the labels. "
        "balanced: in inverse proportion to the label's share of the training examples; null: all alike.",
    )
    precision: Precision = key(
        Precision.auto,
        "Precision of the computation. fp32: float32; bf16: bfloat16, by autocast if the weights are float32; fp16: "
        "float16 by autocast, with loss scaling, for GPUs without bfloat16; auto: bf16 on a GPU that supports it, else "
        "fp32.",
    )
    gradient_checkpointing: bool = key(
        False, "true: activations are recomputed in the backward pass, which takes less memory and more time."
    )
    compile: Compile = key(
        Compile.none,
        "layers: torch.compile for each layer, which takes a minute at the start; none: nothing is compiled.",
    )
    graphs: bool | str = key(
        "auto",
        "true: on a GPU, the forward and backward pass for each shape of batch is recorded as a CUDA graph and "
        "replayed, which is fast if Python takes longer to launch a backbone's kernels than they take to run. auto: if "
        "a step can be recorded.",
    )
    fused_loss: bool = key(
        True, "true: the loss of target tokens is computed without storing all their logits at once."
    )
    checkpoint_minutes: float = key(
        5.0, "Minutes of training between checkpoints, from which an interrupted run resumes."
    )
    device: Device = key(Device.auto, "Where a run computes: cpu, cuda (a GPU); auto: a GPU if there is one.")
    sharding: Sharding = key(
        Sharding.none,
        "With several devices. full: each has a share of the weights of every layer, and gathers a layer while it "
        "computes (FSDP2), for backbones that do not fit on one; none: each has all weights.",
    )
    devices: str = key(
        "1",
        "Processes that train a run together, each with a GPU of its own, or on the CPU; each batch is shared among "
        "them. auto: one for each visible GPU. Under torchrun, as many as it has started.",
    )


@dataclass
class Variation:
    """What a search tries for a key: multiples of the run's value, values, or with `trials` a range."""

    times: list[float] | None = key(None, "Multiples of the run's value. null: see values.")
    values: list[Any] | None = key(None, "Values to try. null: see times.")
    low: float | None = key(None, "Least value of a range, for search.trials. null: no range.")
    high: float | None = key(None, "Largest value of a range, for search.trials. null: no range.")
    log: bool = key(False, "true: the logarithm of the value is uniform in the range.")


@dataclass
class Search:
    """Runs that are trained first, each combination of the values of `keys` once, to choose by the selection split."""

    name: str = key(MISSING, "Name of the search.")
    keys: dict[str, Variation] = key(
        {},
        "What is tried for each key, as {KEY: {times: [...]}}, multiples of the run's value, or "
        "{KEY: {values: [...]}}; with search.trials also {KEY: {low: A, high: B, log: true}}, a range.",
    )
    seed: int | None = key(None, "Seed of the trials. null: the first seed of the sweep.")
    extend: int = key(
        0,
        "Of a search over one numeric key, how many further values are tried at most, each while the best value is the "
        "outermost that was tried: 1, 3, 10 goes on with 30 and 100. It is the outermost times the ratio of the next "
        "two, with 12 significant digits; an integer is rounded, and moves by at least 1. 0: none is tried.",
    )
    trials: int | None = key(
        None,
        "Runs that Optuna chooses one after another, by the selection scores of those before. null: each combination "
        "of the values is tried once.",
    )
    minutes: float | None = key(
        None,
        "With search.trials, no trial begins after so many minutes, and what is chosen is the best of the trials so "
        "far. null: no limit.",
    )
    sampler: Sampler = key(
        Sampler.tpe, "With search.trials, how Optuna chooses: tpe, nsgaii (a genetic algorithm), or random."
    )
    sampler_seed: int = key(0, "With search.trials, the seed of the sampler.")
    prune: bool = key(
        True,
        "With search.trials and budget=, stop a trial whose look during training is worse than the median of the "
        "others there; looks need trainer.keep=best.",
    )
    report: Reported = key(
        Reported.chosen,
        "Of which runs the report split is scored. chosen: of the runs with the chosen values; a trial is trained and "
        "scored on the selection split alone, and the one that is chosen then goes on from its adapter. trials: of "
        "every trial too.",
    )
    trial: int | None = key(
        None, "Number of the trial that the run is, from 0. null: the run takes the best trial's values."
    )
    further: list[Any] = key(
        [], "With search.trial, the values that search.extend has tried after those of search.keys; peftbench sets it."
    )
    study: str | None = key(None, "The study that the trial is of; peftbench names it. null: it is of none.")


@dataclass
class Run(Modification):
    """The whole config. Keys of `Modification` are its first modification; `mix` holds the others by name."""

    mix: dict[str, Modification] = key(
        {}, "Further modifications by name: mix.NAME.KEY is for one of them what KEY above is for the first."
    )
    peft: dict[str, Any] = key(
        {},
        "A method of the peft library in the place of our own: peft.type is its name, such as DORA; other keys are "
        "those of its config there, such as peft.oft_block_size. bottleneck is its rank, composition_function.scale "
        "its alpha / r, input_dropout its dropout, and modified_representation the projections that it modifies; "
        "{}: none.",
    )
    unfreeze: Unfreeze = key(
        Unfreeze.none,
        "Backbone parameters that are also trained. none: none of them; bias: the biases (BitFit); norm: the weights "
        "and biases of the norms; all: every parameter.",
    )
    allow_unused: bool = key(False, "true: train even if the loss does not depend on every trainable tensor.")
    fidelity: Fidelity = field(default_factory=Fidelity)
    method: str = key(MISSING, "Name of the method, in tables and run folders.")
    model: Model = field(default_factory=Model)
    task: Task = field(default_factory=Task)
    trainer: Trainer = field(default_factory=Trainer)
    sizes: Any = key(None, "Columns of your own beside those of conf/sizes.yaml, or parts of these.")
    size: Any = key(
        None,
        "The column of conf/sizes.yaml for this run. `of` names the backbones for which it was made; on another "
        "backbone the bottlenecks are those that store the same share.",
    )
    budget: str | None = key(
        None,
        "The maximum number of stored parameters, from which the bottlenecks are computed: 6.7% of the backbone, 599k, "
        "27.4M, 599232. null: the bottlenecks are used as given.",
    )
    budget_split: list[float] | None = key(
        None,
        "With several bottlenecks: the ratio of the parameters that they store, such as [9,1], first the root's and "
        "then those of mix. null: the sizes keep their given ratio.",
    )
    seed: int = key(42, "Seed of everything random in a run: new weights, the order of the examples, dropout.")
    search: Search | None = None
    retention: str | None = key(
        None,
        "General text on which the backbone's own language model is measured, before the training and with what was "
        "trained: docstrings, those of Python's standard library; or a file, .txt, .md, or of rows with a column text. "
        "null: not measured.",
    )
    speed: bool = key(
        False,
        "true: how fast the finished run predicts, and how much GPU memory that takes, is measured beside the bare "
        "backbone.",
    )
    callbacks: list[Any] = key(
        [],
        "Callbacks of your own: dotted names of classes derived from transformers.TrainerCallback, such as "
        "mypkg.StopAtLoss, or their names in the entry points peftbench.callbacks of an installed package; with "
        "settings, {_target_: mypkg.StopAtLoss, loss: 0.1}. They can change a training, and belong to a run's name. "
        "[]: none.",
    )
    trackers: list[str] = key(
        [],
        "Experiment trackers that follow a run: tensorboard, wandb, mlflow, trackio. They get the config, the training "
        "log, the score and the counts. []: none.",
    )
    trackers_group: str | None = key(
        None, "Name under which trackers group runs. null: that of the sweep, or of the task and the model."
    )
    debug: str | None = key(None, "Name of the debug preset, such as smoke. null: none.")
    output_dir: str = key("outputs", "Folder for the runs, which are stored in it as TASK/MODEL/METHOD/HASH.")
    rerun: bool = key(False, "true: train again even if the run is done.")
    retry: bool = key(False, "true: a sweep trains failed runs again.")
    jobs: str = key(
        "1", "Runs of a sweep at once, in separate processes. auto: as many as free memory and cores allow."
    )
    mps: bool | str = key(
        False,
        "true: simultaneous runs on one GPU share it through NVIDIA's Multi-Process Service, whose daemon the sweep "
        "starts and stops. auto: if it is installed.",
    )


PACKAGE = Path(__file__).resolve().parent.parent
EMBEDDED = PACKAGE / "backbones"  # the folder of the backbones that ship with the package

# `${embedded:mini}`: the folder of such a backbone.
OmegaConf.register_new_resolver("embedded", lambda name: str(EMBEDDED / name), replace=True)


def find_conf_dir() -> Path:
    """Return the folder with the YAML groups: inside the installed package, or at the top of a checkout."""
    return PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


def list_task_files(task: Task) -> dict[str, list[str]]:
    """Return the user's own files by split."""
    roles = (
        (task.train_split, task.train_file),
        (task.selection_split, task.validation_file),
        (task.report_split, task.test_file),
    )
    named = {**task.data_files, **{split: file for split, file in roles if file is not None}}
    return {split: list_files(value) for split, value in named.items()}


def list_files(value: Any) -> list[str]:
    """Return the value of a key for files as a list: none, one or several."""
    return [] if value is None else [str(file) for file in (value if isinstance(value, list) else [value])]


def is_text_table(file: str) -> bool:
    """Return whether a file is a table of cells with delimiters between them."""
    return file.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def list_modifications(run: Run) -> dict[str, Modification]:
    """Return the modifications of a run by the prefix of their keys: "" for the root's, "mix.NAME." for the others."""
    found: dict[str, Modification] = {}
    if run.functional_form.name != "none":
        found[""] = run
    found.update({f"mix.{name}.": modification for name, modification in run.mix.items()})
    return found


def list_bottlenecks_of(run: Run) -> dict[str, int]:
    """Return the bottlenecks of a run by the prefix of their keys; that of a method of peft is the root's."""
    found = {prefix: m.bottleneck for prefix, m in list_modifications(run).items()}
    if run.peft:
        found[""] = run.bottleneck
    return {prefix: size for prefix, size in found.items() if size is not None}


def has_modification(run: Run) -> bool:
    """Return whether a run adds anything to its backbone, of our own or of peft."""
    return bool(list_modifications(run) or run.peft)


def name_module(prefix: str) -> str:
    """Return the name of a modification's modules in the model: NAME for "mix.NAME.", "modification" for "" (root)."""
    return prefix.split(".")[1] if prefix else "modification"


def get_value(run: Run, key: str) -> Any:
    """Return the value of a dotted key. Raises AttributeError, or in a mapping KeyError, if there is none."""
    node: Any = run
    for part in key.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


def index_by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Return the values of overrides KEY=VALUE, as typed, by their keys without a +."""
    return dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)


def resolve_config(cfg: DictConfig) -> Run:
    """Return the composed config as a typed `Run` with every interpolation resolved."""
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, Run)
    _check_containers(run)
    run.model.name = name_backbone(run.model)
    if isinstance(run.size, dict):
        run.size["taken"] = {
            prefix: size for prefix, size in list_bottlenecks_of(run).items() if _is_from_column(cfg, prefix)
        }
    if run.task.delimiter == r"\t":
        run.task.delimiter = "\t"
    if run.task.prompt is not None:  # a line break on Hydra's command line can only come from the shell
        run.task.prompt = run.task.prompt.replace(r"\n", "\n")
    return run


def _check_containers(node: Any, prefix: str = "") -> None:
    """Raise UserError for a text where a list or a mapping belongs: OmegaConf does not check what an interpolation such
    as ${oc.env:HOME} comes to."""
    schema: Any = type(node)  # mypy: a type is hashable
    for name, wanted in _list_containers(schema).items():
        value, key = getattr(node, name), f"{prefix}{name}"
        if is_dataclass(value):
            _check_containers(value, f"{key}.")
        elif wanted is not None and value is not None and not isinstance(value, wanted):
            kind, example = ("list", "[a,b]") if wanted is list else ("mapping", "{a: b}")
            raise UserError(f"{key}={value}: a {kind} is expected, as {example}.")


@cache
def _list_containers(schema: type) -> dict[str, type | None]:
    """Return for each key of a dataclass whether it is a list or a dict, or None."""
    hints = get_type_hints(schema)
    origins = {name: {get_origin(kind) for kind in (hint, *get_args(hint))} for name, hint in hints.items()}
    return {name: next((kind for kind in (list, dict) if kind in kinds), None) for name, kinds in origins.items()}


def _is_from_column(cfg: DictConfig, prefix: str) -> bool:
    """Return whether a modification's bottleneck comes from the run's column of sizes, not from the command line."""
    node = cfg.mix[prefix.split(".")[1]] if prefix else cfg
    raw = OmegaConf.to_container(OmegaConf.masked_copy(node, "bottleneck"), resolve=False)
    return isinstance(raw, dict) and "${size." in str(raw["bottleneck"])


def name_backbone(model: Model) -> str:
    """Return the backbone's name in tables: the folder's name if `model.path` is given, else the option's name."""
    return expand_home(model.path).resolve().name if model.path else model.name
