"""A backbone is loaded whole or refused: only a task head may be missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from peftbench.backbones.load import Backbone, load_backbone
from peftbench.backbones.sites import find_family
from peftbench.config.schema import Model, Task, TaskKind
from peftbench.modification.attach import attach
from peftbench.modification.counting import count
from peftbench.utils.errors import UserError
from tests.families import CONTINUING, FAMILIES, MORE_FAMILIES, PRESETS, WRITING, build

CLASSIFY = Task(name="some", kind=TaskKind.classification, labels=["a", "b", "c"])
WRITE = Task(name="some", kind=TaskKind.text_to_text)
ALL = [*FAMILIES, *MORE_FAMILIES]
WRITERS = [family for family in ALL if family in (*WRITING, *CONTINUING)]
CHECKPOINTS = (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    vocabulary = {word: code for code, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "good"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)])
    backend.post_processor = end
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, task: Task) -> Backbone:
    return load_backbone(Model(name="tiny", path=str(folder)), task)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The folder with other tensors in its file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def checkpoints(family: str, folder: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    """What the classes for other tasks save of the same backbone, drawn anew."""
    config = build(family).config
    config.num_labels = len(CLASSIFY.labels)
    for auto in CHECKPOINTS:
        if type(config) in auto._model_mapping:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield auto.__name__, auto.from_config(deepcopy(config)).eval()  # which some classes change


def same_backbone(ours: PreTrainedModel, theirs: PreTrainedModel) -> bool:
    """Whether every parameter of their backbone is in ours, and equal."""
    mine = ours.base_model.state_dict()
    other = {
        name: tensor
        for name, tensor in theirs.base_model.state_dict().items()
        if not name.startswith(("pooler", "lm_head", "final_logits_bias", "classification_head"))
    }
    return len(other) > 10 and all(name in mine and torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize("family", ALL)
def test_a_classifier_from_any_checkpoint_of_its_family(family: str, tmp_path: Path) -> None:
    """All of the backbone is taken, and what is new is its head."""
    tried = 0
    for name, model in checkpoints(family, tmp_path):
        if family.startswith(("bart", "mbart")) and name == "AutoModelForCausalLM":
            with pytest.raises(UserError, match="does not hold the weights of the backbone"):  # their decoder alone
                loaded(saved(model, tmp_path / name), CLASSIFY)
            continue
        found = loaded(saved(model, tmp_path / name), CLASSIFY)
        heads = find_family(model.config.model_type).task_head
        assert all(new.split(".")[0] in heads or ".pooler." in new for new in found.untrained), name
        assert same_backbone(found.model, model), name
        assert bool(found.untrained) == (name != "AutoModelForSequenceClassification"), name
        tried += 1
    assert tried >= 2


@pytest.mark.parametrize("family", WRITERS)
def test_a_writer_from_any_checkpoint_with_its_output_embedding(family: str, tmp_path: Path) -> None:
    tied = family not in ("t5_gated", *CONTINUING) or family == "gpt2"
    tried = 0
    for name, model in checkpoints(family, tmp_path):
        if family in ("bart", "mbart") and name == "AutoModelForCausalLM":
            continue  # their decoder alone, by its config.json
        folder = saved(model, tmp_path / name)
        whole = any("lm_head" in part for part, _ in model.named_parameters(remove_duplicate=False)) or tied
        try:
            found = loaded(folder, WRITE)
        except UserError as error:
            assert not whole and "Only a task head may be missing" in str(error), name
            continue
        assert found.untrained == frozenset(), name
        assert same_backbone(found.model, model), name
        tried += 1
    assert tried


def test_what_is_left_of_other_tasks_is_passed_over(tmp_path: Path) -> None:
    for auto in (AutoModelForQuestionAnswering, AutoModelForTokenClassification):
        model = auto.from_config(build("roberta").config)
        assert loaded(saved(model, tmp_path / auto.__name__), CLASSIFY).untrained


def test_another_number_of_labels_is_a_new_head(tmp_path: Path) -> None:
    found = loaded(saved(build("roberta", num_labels=5), tmp_path), CLASSIFY)
    assert found.untrained == {"classifier.out_proj.weight", "classifier.out_proj.bias"}


@pytest.mark.parametrize("family", ALL)
def test_names_with_a_prefix_are_refused(family: str, tmp_path: Path) -> None:
    """As DataParallel writes them: not one of the weights would be taken."""
    folder = rewritten(saved(build(family), tmp_path), lambda found: {f"module.{n}": t for n, t in found.items()})
    with pytest.raises(UserError, match=r"does not hold.*\d+ tensors are missing \(.*, \.\.\.\).* module\."):
        loaded(folder, WRITE if family in WRITERS else CLASSIFY)


@pytest.mark.parametrize("family", ALL)
def test_a_layer_that_the_file_lacks_is_refused(family: str, tmp_path: Path) -> None:
    model = build(family)
    layer = next(name for name, module in model.named_modules() if name.endswith(".1") and module.parameters())
    folder = rewritten(
        saved(model, tmp_path), lambda found: {n: t for n, t in found.items() if not n.startswith(f"{layer}.")}
    )
    with pytest.raises(UserError, match=rf"model\.path={tmp_path} does not hold .* are missing \({layer}\."):
        loaded(folder, WRITE if family in WRITERS else CLASSIFY)


def test_one_bias_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query.bias"
    folder = rewritten(saved(build("bert"), tmp_path), lambda found: {n: t for n, t in found.items() if n != name})
    with pytest.raises(UserError, match=rf": 1 tensor is missing \({name}\)\. Only a task head"):
        loaded(folder, CLASSIFY)


@pytest.mark.parametrize("family", ALL)
def test_an_embedding_of_another_height_is_refused(family: str, tmp_path: Path) -> None:
    """The file has 99 rows, config.json says 103."""
    folder, other = saved(build(family), tmp_path / "file"), build(family, vocab_size=103)
    other.config.save_pretrained(folder)
    with pytest.raises(UserError, match=r"ha(s another shape|ve other shapes) \(.*: 99 x \d+, not 103 x"):
        loaded(folder, WRITE if family in WRITERS else CLASSIFY)


@pytest.mark.parametrize("family", ALL)
def test_layers_that_the_config_does_not_have_are_refused(family: str, tmp_path: Path) -> None:
    """A file of two layers under a config.json of one would be another backbone than either says."""
    keys = {"bart": "encoder_layers", "mbart": "encoder_layers", "t5": "num_layers", "distilbert": "n_layers"}
    keys |= {"gpt2": "n_layer"}
    key = keys.get(family.split("_")[0], "num_hidden_layers")
    folder = saved(build(family), tmp_path)
    build(family, **{key: 1}, **({"layer_types": None} if family.startswith("qwen") else {})).config.save_pretrained(
        folder
    )
    with pytest.raises(UserError, match=r"tensors have no place in it \(.*\.1\."):
        loaded(folder, WRITE if family in WRITERS else CLASSIFY)


@pytest.mark.parametrize(
    ("family", "name", "like"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (2,)),
        ("gpt2", "transformer.h.0.attn.masked_bias", ()),
        ("gpt2", "transformer.h.0.attn.bias", (1, 1, 64, 64)),
        ("bert", "bert.embeddings.position_ids", (1, 64)),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", (32, 4)),
    ],
)
def test_what_is_computed_now_may_be_in_an_old_file(family: str, name: str, like: tuple[int], tmp_path: Path) -> None:
    folder = rewritten(saved(build(family), tmp_path), lambda found: {**found, name: torch.zeros(like)})
    assert not loaded(folder, WRITE if family in WRITERS else CLASSIFY).untrained


def test_a_new_pooler_counts_as_head(tmp_path: Path) -> None:
    """BERT from a masked language model: what LoRA trains is 4 r d at each of two layers, as with a pooler."""
    config = build("bert").config
    counts = []
    for auto in (AutoModelForMaskedLM, AutoModelForSequenceClassification):
        found = loaded(saved(auto.from_config(config), tmp_path / auto.__name__), CLASSIFY)
        attach(found.model, PRESETS["lora"], untrained=found.untrained)
        counts.append(count(found.model, found.untrained))
    without, with_pooler = counts
    assert without.trained == without.stored == with_pooler.trained == 2 * 4 * 8 * 16
    assert without.head == with_pooler.head + 16 * 16 + 16
    assert without.backbone == with_pooler.backbone
