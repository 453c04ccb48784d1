"""Write a finished run as a folder for the peft library, and check that peft computes the same with it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.backbones.hub import explain_missing_hub
from peftbench.backbones.load import Backbone, build_meta_backbone, load_backbone, load_config
from peftbench.backbones.unpacking import unpack_backbone
from peftbench.config.schema import DType, Run
from peftbench.evaluation.finished import restore_backbone
from peftbench.exchange.card import write_card
from peftbench.exchange.peft_form import PeftAdapter
from peftbench.modification.attach import attach_run
from peftbench.modification.state import write_tensors
from peftbench.records.record import Record
from peftbench.utils.errors import UserError
from peftbench.utils.files import dump_json, replace_file

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
TOLERANCE = 1e-4  # of the largest logit: more than rounding
TEXTS = (
    "The weather was fine, and nobody had expected that.",
    "Rain.",
    "A long sentence goes on for a while, turns around a corner, says something else, and ends where it began.",
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        difference: the largest difference between peft's logits and ours; None if they were not compared.
        largest: the largest of our logits, in magnitude.
    """

    adapter: PeftAdapter
    difference: float | None = None
    largest: float = 0.0


def export_run(folder: Path, run: Run, record: Record, out: Path, *, check: bool = True) -> Exported:
    """Write the run in `folder` to `out` as peft's files: configuration, tensors and a model card.

    Args:
        check: load what was written with peft, if it is installed, and compare the logits of a few texts.

    Raises:
        UserError: the run has no form in peft, which is found before weights are read; or peft computes something else
            with it, and then nothing is left in `out`.
    """
    bare = build_meta_backbone(run.model, run.task, load_config(run.model))
    attach_run(bare, run)
    PeftAdapter.of(bare, run)
    # transformers would keep the half precision of a folder, and peft's difference would then be one of rounding
    placed = replace(run, model=replace(run.model, dtype=DType.float32))
    backbone = restore_backbone(folder, placed, run.task, unpacked=True)
    adapter = PeftAdapter.of(backbone.model, run, backbone.untrained)
    out.mkdir(parents=True, exist_ok=True)
    with replace_file(out / CONFIG) as file:
        file.write(dump_json(adapter.config, indent=2) + "\n")
    write_tensors(adapter.tensors, out / TENSORS)
    exported = Exported(adapter)
    if check and find_spec("peft") is not None:
        exported = Exported(adapter, *_check(backbone, placed, out))
    write_card(out / CARD, run, record, exported.adapter, exported.difference)
    return exported


def _check(backbone: Backbone, run: Run, out: Path) -> tuple[float, float]:
    try:
        return compare_with_peft(backbone, run, out)
    except UserError:
        for name in (CONFIG, TENSORS):
            (out / name).unlink()
        raise


def compare_with_peft(backbone: Backbone, run: Run, folder: Path) -> tuple[float, float]:
    """Return the largest difference of the logits of our model, and of peft's with a folder, and the largest of ours.

    Args:
        backbone: with the run's modifications, in float32.
        run: with the labels of its task.

    Raises:
        UserError: they differ by more than rounding.
    """
    from peft import PeftModel

    plain = load_backbone(run.model, run.task)
    unpack_backbone(plain.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the next versions of peft and transformers will change
        theirs = PeftModel.from_pretrained(plain.model, str(folder), torch_device="cpu").eval()
    batch = _make_batch(backbone.model, backbone.tokenizer)
    ours, others = compute_logits(backbone.model.eval(), batch), compute_logits(theirs, batch)
    difference, largest = float((ours - others).abs().max()), float(ours.abs().max())
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"{folder}: peft's logits differ from ours by up to {difference:.3g} (the largest is {largest:.3g}), so "
            "that this is another model there; nothing is kept. Please report this."
        )
    return difference, largest


def _make_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    encoded: dict[str, Tensor] = dict(tokenizer(list(TEXTS), return_tensors="pt", padding=True, padding_side="right"))
    limit = getattr(model.config, "max_position_embeddings", None) or 64
    batch = {name: encoded[name][:, : limit // 2] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder and model.get_output_embeddings() is not None:
        batch["decoder_input_ids"] = batch["input_ids"][:, :8]
    return batch


@torch.no_grad()
def compute_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of the positions that are no padding; those of a prompt are left out."""
    outputs = model(**batch)
    logits: Tensor = (
        torch.stack([outputs.start_logits, outputs.end_logits], dim=-1) if "start_logits" in outputs else outputs.logits
    )
    if logits.dim() == 2:
        return logits
    if "decoder_input_ids" in batch:
        return logits.flatten(0, 1)
    length = batch["input_ids"].shape[1]
    return logits[:, -length:][batch["attention_mask"].bool()]


def push_folder(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload an exported folder to the hub as the model OWNER/NAME, which is made if there is none; return its URL.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    complete = f"the folder {folder} is complete"
    if reason := explain_missing_hub():
        raise UserError(f"--push {name}: {reason}; {complete}.")
    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            allow_patterns=[CONFIG, TENSORS, CARD],
            commit_message=f"peftbench export, {folder.name}",
        )
    except Exception as error:  # of the hub's HTTP client, which is another one in each of its major versions
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"--push {name}: the hub refuses ({reason}); hf auth login logs in, and {complete}.") from error
    return str(url)
