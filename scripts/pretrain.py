#!/usr/bin/env python
"""Pretrains the embedded backbone, `model=mini`: a small BART whose bf16 weights are smaller than 10 MB.

    python scripts/pretrain.py --docstrings all --minutes 8 --out mini

The text is docstrings (`--docstrings` of installed packages, `--docstrings-path` of unpacked ones) and files
(`--text`). The validation and test docstrings of `peftbench.tasks.docstrings` are held out, and so is every text
that equals one of them or begins with the same summary. `--write-corpus` saves the resulting text and stops; with
`--text` and that file, a machine without those packages can pretrain too.

The objective is BART's text infilling (Lewis et al. 2020): 30% of the tokens are masked in spans of Poisson(3)
tokens, each span becomes one <mask>, and the decoder writes the whole text. Unlike in BART no span is empty.
In half of the texts that have several paragraphs the one span is the first paragraph instead: in a docstring,
its summary. The run begins with a lesson in copying (`--copying`).

A row of a batch is one document, or one window of a document longer than `--length` tokens; batches hold rows of
similar length and about `--batch` x `--length` tokens. The learning rate rises linearly and falls along a cosine to
zero over `--minutes` of wall clock, so the schedule completes on any machine. The vocabulary is a byte-level BPE,
trained on the same text. `--out` becomes a folder for `from_pretrained`, with `pretraining.json` next to the weights.
`--start` with such a folder continues from its weights, with its vocabulary and a new schedule.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from peftbench.tasks.docstrings import (
    STDLIB,
    SUMMARY_LENGTH,
    Docstring,
    assign_split,
    gather_folder,
    gather_packages,
    normalise_text,
    read_versions,
)
from peftbench.utils.errors import UserError

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # in BART's order
BOS, PAD, EOS, UNK, MASK = range(5)

MASKED_SHARE = 0.3
MEAN_SPAN = 3.0
FIRST_PARAGRAPH_SHARE = 0.5

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".jsonl"}
MIN_WORDS = 8  # of a text; a shorter one has nothing from which to infer a masked word
MIN_WINDOW = 16  # tokens of a long document's last window
WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512)  # of rows, in tokens; a row has the smallest width that holds it
HELD_OUT_PERCENT = 1  # of the texts, never trained on, for the held-out loss
EVALUATION_SEED = 0
EVALUATION_BATCHES = 8  # at most, so that evaluations with small batches are short on a slow machine
REPORTS = 20  # lines of progress in a run
WARMUP = 0.04  # of the time
FINE_TUNING_DROPOUT = 0.1  # stored in the saved config; so small a model needs none in pretraining


# The text


def collect(args: argparse.Namespace) -> list[str]:
    """The texts to pretrain on, each once, without those of held-out docstrings."""
    groups = [gather_packages([package]) for package in importable_packages(args.docstrings)]
    groups += [gather_folder(folder, folder.name) for folder in package_folders(args.docstrings_path)]
    docstrings = [docstring for group in groups for docstring in group]
    # Each package was gathered by itself, so a text in two packages occurs under both names. It is held out if either
    # name is, since a task may select either package.
    withheld = held_out_texts(docstrings)
    texts: dict[str, str] = {}
    trainable = (docstring.text for docstring in docstrings if assign_split(docstring.name) == "train")
    for text in (*trainable, *read_texts(args.text)):
        key, first = normalise_text(text), normalise_text(text.partition("\n\n")[0])
        if len(text.split()) >= MIN_WORDS and key not in withheld and first not in withheld:
            texts.setdefault(key, text)
    return list(texts.values())


def held_out_texts(docstrings: Iterable[Docstring]) -> set[str]:
    """The normalised texts of validation and test docstrings, and those summaries that a task would use."""
    held_out = [docstring for docstring in docstrings if assign_split(docstring.name) != "train"]
    texts = {normalise_text(docstring.text) for docstring in held_out}
    return texts | {normalise_text(d.summary) for d in held_out if len(d.summary) >= SUMMARY_LENGTH.start}


def importable_packages(names: list[str]) -> list[str]:
    """`names`, with `all` replaced by the standard library and every installed top-level package."""
    if names != ["all"]:
        return names
    found = [STDLIB]
    for name in sorted(importlib.metadata.packages_distributions()):
        try:
            read_versions([name])
        except UserError:  # a compiled module, or a folder that is not a package
            continue
        found.append(name)
    return found


def package_folders(folders: list[Path]) -> list[Path]:
    """The packages in `folders`, which contain packages as `site-packages` does."""
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    return [path for path in paths if path.is_dir() and path.name.isidentifier()]


def read_texts(paths: list[Path]) -> Iterator[str]:
    """The texts of files, and of all text files below folders. Files may be gzipped (.gz).

    A text is the `text` of each line of a .jsonl file, otherwise the whole file.
    """
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
            if suffix not in TEXT_SUFFIXES or not file.is_file():
                continue
            opener = gzip.open if file.suffix == ".gz" else open
            with opener(file, "rt", encoding="utf-8", errors="replace") as stream:
                if suffix == ".jsonl":
                    yield from (json.loads(line)["text"] for line in stream)
                else:
                    yield stream.read()


def write_corpus(texts: list[str], path: Path) -> None:
    """Write `texts` as gzipped JSON lines, for `--text`."""
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def is_held_out(text: str) -> bool:
    """Whether `text` is used for the held-out loss; depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


# The vocabulary and the rows


def train_tokenizer(texts: list[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens that frames a text as <s> ... </s>, and a pair as BART does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


@dataclass
class Rows:
    """Rows of one width, on the device.

    `tokens` (rows, width) int32: <s> ... </s> and padding. `first` (rows,) int32: how many tokens after <s> make
    up the document's first paragraph; 0 if the row holds no other paragraph, or does not begin a document.
    """

    tokens: Tensor
    first: Tensor


def make_rows(texts: list[str], tokenizer: Tokenizer, length: int, device: torch.device) -> list[Rows]:
    """`texts` as rows of at most `length` tokens, by width."""
    # A token ends where a blank line begins, so a text's tokens are those of its first paragraph and those of the rest.
    parts = [part for text in texts for first, gap, rest in [text.partition("\n\n")] for part in (first, gap + rest)]
    encoded = encode(tokenizer, parts)
    widths = [width for width in WIDTHS if width < length] + [length]
    tokens: dict[int, list[list[int]]] = {width: [] for width in widths}
    firsts: dict[int, list[int]] = {width: [] for width in widths}
    for paragraph, rest in zip(encoded[::2], encoded[1::2], strict=True):
        document = paragraph + rest
        for start in range(0, len(document), length - 2):
            window = [BOS, *document[start : start + length - 2], EOS]
            if start and len(window) < MIN_WINDOW:
                continue
            width = next(width for width in widths if width >= len(window))
            tokens[width].append(window + [PAD] * (width - len(window)))
            firsts[width].append(len(paragraph) if not start and rest and len(paragraph) < len(window) - 2 else 0)
    return [
        Rows(
            torch.tensor(tokens[width], dtype=torch.int32, device=device),
            torch.tensor(firsts[width], dtype=torch.int32, device=device),
        )
        for width in widths
        if tokens[width]
    ]


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without <s> and </s>; a text that spells a special token does not become one."""
    tokenizer.encode_special_tokens = True
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    tokenizer.encode_special_tokens = False
    return ids


def epoch(buckets: list[Rows], tokens_per_batch: int, generator: torch.Generator) -> Iterator[Rows]:
    """All rows once, as batches in random order, each from one bucket.

    A bucket's last batch is left out unless it is full or the only one, so that all steps have about the same size.
    """
    device = generator.device
    chunks: list[tuple[Rows, Tensor]] = []
    for rows in buckets:
        total, width = rows.tokens.shape
        count = max(1, tokens_per_batch // width)
        order = torch.randperm(total, generator=generator, device=device)
        chunks += [(rows, order[i : i + count]) for i in range(0, max(1, total - count + 1), count)]
    for i in torch.randperm(len(chunks), generator=generator, device=device).tolist():
        rows, chunk = chunks[i]
        yield Rows(rows.tokens[chunk], rows.first[chunk])


# The noise: without loops over examples, and without waiting for the device


def span_mask(inner: Tensor, generator: torch.Generator) -> Tensor:
    """Choose the tokens to mask: spans of max(1, Poisson(3)) tokens that never touch, 30% of `inner` on average.

    `inner` (rows, width) bool marks the tokens that may be masked, which must be contiguous; the result
    has the same shape.
    """
    rows, width = inner.shape
    pairs = width // 2 + 1  # of a gap and a span, each at least one token long: enough to cover every row
    spans = torch.full((rows, pairs), MEAN_SPAN, device=inner.device)
    spans = torch.poisson(spans, generator=generator).clamp_(min=1)
    mean_span = MEAN_SPAN + math.exp(-MEAN_SPAN)  # the clamp makes empty spans, a share of e^-3, one long
    mean_gap = mean_span * (1 - MASKED_SHARE) / MASKED_SHARE
    gaps = torch.empty_like(spans).geometric_(1 / mean_gap, generator=generator)
    gaps[:, 0] -= 1  # a row may begin with a span
    ends = (gaps + spans).cumsum(1)
    # +1 where a span starts and -1 where it ends sum to 1 within spans. What is beyond the row goes to its last column,
    # which is cut off.
    edges = torch.zeros(rows, width + 1, device=inner.device)
    edges.scatter_add_(1, (ends - spans).clamp(max=width).long(), torch.ones_like(ends))
    edges.scatter_add_(1, ends.clamp(max=width).long(), -torch.ones_like(ends))
    return (edges[:, :width].cumsum(1) > 0.5) & inner


def infill(tokens: Tensor, masked: Tensor) -> Tensor:
    """Replace each run of `masked` tokens by one <mask>, close the gaps, and pad to the same width.

    `tokens`, `masked` and the result are (rows, width).
    """
    width = tokens.shape[1]
    starts = masked & ~F.pad(masked, (1, -1))
    kept = (starts | ~masked) & (tokens != PAD)
    place = torch.where(kept, kept.cumsum(1) - 1, width)  # dropped tokens go to a column that is cut off
    moved = torch.full((tokens.shape[0], width + 1), PAD, dtype=tokens.dtype, device=tokens.device)
    moved.scatter_(1, place, torch.where(masked, MASK, tokens))
    return moved[:, :width]


def shuffled(rows: Rows, generator: torch.Generator) -> Rows:
    """`rows` with the tokens between <s> and </s> in random order: text that can be copied but not guessed."""
    tokens = rows.tokens
    key = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    key[:, 0] = -1  # <s> stays first, </s> comes after the text, and padding after </s>
    key = torch.where(tokens == EOS, 2.0, torch.where(tokens == PAD, 3.0, key))
    return Rows(tokens.gather(1, key.argsort(dim=1)), torch.zeros_like(rows.first))


def corrupt(rows: Rows, generator: torch.Generator) -> Tensor:
    """The encoder's input for `rows`, (rows, width), with spans masked, or in some rows the first paragraph."""
    tokens, first = rows.tokens, rows.first[:, None]
    position = torch.arange(tokens.shape[1], device=tokens.device)
    inner = (tokens != BOS) & (tokens != EOS) & (tokens != PAD)
    draw = torch.rand(first.shape, generator=generator, device=tokens.device)
    whole_first = (draw < FIRST_PARAGRAPH_SHARE) & (first > 0)
    in_first = (position >= 1) & (position <= first)
    return infill(tokens, torch.where(whole_first, in_first, span_mask(inner, generator)))


# Training


def new_model(args: argparse.Namespace, vocab_size: int) -> BartForConditionalGeneration:
    """A BART of the sizes in `args`, with random weights."""
    config = BartConfig(
        vocab_size=vocab_size,
        d_model=args.width,
        encoder_layers=args.encoder_layers,
        decoder_layers=args.decoder_layers,
        encoder_attention_heads=args.heads,
        decoder_attention_heads=args.heads,
        encoder_ffn_dim=args.ffn,
        decoder_ffn_dim=args.ffn,
        max_position_embeddings=args.positions,
        dropout=args.dropout,
        init_std=args.init_std,
        activation_function="gelu",
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
    )
    model = BartForConditionalGeneration(config)
    for stack in (model.model.encoder, model.model.decoder):
        sinusoids(stack.embed_positions.weight, args.init_std)
    return model


@torch.no_grad()
def sinusoids(weight: Tensor, std: float) -> None:
    """Initialise learned positions (positions, width) as sinusoids of standard deviation `std`.

    They are the same in both stacks, and the previous position is one rotation away, which copying needs first.
    """
    positions, width = weight.shape
    rates = torch.exp(torch.arange(0, width, 2, device=weight.device) * (-math.log(10_000) / width))
    angles = torch.arange(positions, device=weight.device)[:, None] * rates
    weight.copy_(std * math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1))


def infilling_loss(model: torch.nn.Module, rows: Rows, generator: torch.Generator, copying: float = 1.0) -> Tensor:
    """The mean loss, in nats per token, of writing the whole text.

    `copying` is the progress of the lesson in copying. In its first half the source is the target, in its second half
    spans are masked, and in both the words are shuffled. From 1 on, rows are unchanged.
    """
    if copying < 1:
        rows = shuffled(rows, generator)
    source, target = rows.tokens if copying < 0.5 else corrupt(rows, generator), rows.tokens.long()
    with torch.autocast(target.device.type, torch.bfloat16, enabled=target.device.type == "cuda"):
        logits = model(
            input_ids=source,
            attention_mask=(source != PAD).long(),
            decoder_input_ids=F.pad(target, (1, -1), value=EOS),  # BART's decoder starts from </s>
            use_cache=False,
        ).logits
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=PAD)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, buckets: list[Rows], tokens_per_batch: int) -> float:
    """The mean loss over held-out rows, in nats per token, with the same rows and the same noise at each call."""
    model.eval()
    generator = torch.Generator(buckets[0].tokens.device).manual_seed(EVALUATION_SEED)
    total = count = torch.zeros((), device=generator.device)
    for rows in islice(epoch(buckets, tokens_per_batch, generator), EVALUATION_BATCHES):
        size = (rows.tokens != PAD).sum()
        total = total + infilling_loss(model, rows, generator) * size
        count = count + size
    model.train()
    return float(total / count)


def learning_rate(done: float, peak: float) -> float:
    """The rate after a share `done` of the time: a linear rise, then a cosine to zero."""
    if done < WARMUP:
        return peak * done / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARMUP) / (1 - WARMUP))))


@dataclass
class Progress:
    """The progress of a run."""

    steps: int = 0
    tokens: int = 0  # of text, without padding
    seconds: float = 0.0


def train(
    model: BartForConditionalGeneration, train_rows: list[Rows], held_out: list[Rows], args: argparse.Namespace
) -> tuple[Progress, float]:
    """Train `model` in place until the time is over. Returns the progress and the held-out loss."""
    device = train_rows[0].tokens.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    progress = Progress()
    state_file = args.out / "checkpoint.pt"
    if args.resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])

    budget, per_batch, peak = args.minutes * 60, args.batch * args.length, args.learning_rate
    good = copy.deepcopy(model.state_dict())
    report_every, checkpoint_every = budget / REPORTS, args.checkpoint_minutes * 60
    generator = torch.Generator(device).manual_seed(args.seed + progress.steps)
    if args.compile:
        model.compile()
    model.train()

    began = time.monotonic() - progress.seconds
    next_report, next_checkpoint = progress.seconds + report_every, progress.seconds + checkpoint_every
    losses = seen = skipped = torch.zeros((), device=device)  # since the last report; reading them waits
    reported = copy.copy(progress)

    def report() -> float:
        nonlocal losses, seen, skipped, reported
        progress.tokens += int(seen)
        progress.seconds = time.monotonic() - began
        steps, seconds = progress.steps - reported.steps, progress.seconds - reported.seconds
        loss = held_out_loss(model, held_out, per_batch)
        print(
            f"{progress.seconds:6.0f} s  step {progress.steps:6d}  loss {float(losses) / max(steps, 1):.4f}  "
            f"held out {loss:.4f}  {(progress.tokens - reported.tokens) / seconds:,.0f} tokens/s"
            + (f"  {int(skipped)} steps skipped" if skipped else ""),
            flush=True,
        )
        losses = seen = skipped = torch.zeros((), device=device)
        reported = copy.copy(progress)
        return loss

    while (seconds := time.monotonic() - began) < budget:
        for rows in epoch(train_rows, per_batch, generator):
            seconds = time.monotonic() - began
            if seconds >= budget:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(seconds / budget, peak)
            copying = seconds / (budget * args.copying) if args.copying else 1.0
            loss = infilling_loss(model, rows, generator, copying)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            # A gradient that is not finite would ruin the weights. The fused optimiser then skips the step, as it does
            # for torch's GradScaler, and the CPU need not wait for the result.
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.steps += 1
            losses, skipped = losses + loss.detach().nan_to_num(), skipped + optimizer.found_inf
            seen = seen + (rows.tokens != PAD).sum()
            if seconds >= next_report:
                if math.isfinite(report()):
                    good = copy.deepcopy(model.state_dict())
                else:
                    peak /= 2
                    model.load_state_dict(good)
                    optimizer.state.clear()
                    print(f"diverged: resuming from the last report, with a peak rate of {peak:g}", flush=True)
                next_report += report_every
                if seconds >= next_checkpoint:
                    save_state(state_file, model, optimizer, progress)
                    next_checkpoint += checkpoint_every
    return progress, report()


def save_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write what `--resume` needs, first to a temporary file, so that `path` is never a broken file."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def save_model(model: BartForConditionalGeneration, out: Path) -> int:
    """Write bf16 weights and the config to `out`. Returns the size of the weights' file in bytes."""
    saved = copy.deepcopy(model).bfloat16()
    saved.config.dropout = FINE_TUNING_DROPOUT
    saved.save_pretrained(out)
    return (out / "model.safetensors").stat().st_size


# The command line


def parse_args() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = parser.add_argument_group("text")
    text.add_argument("--docstrings", nargs="+", default=[], metavar="PACKAGE", help="installed packages, or: all")
    text.add_argument(
        "--docstrings-path", nargs="+", type=Path, default=[], metavar="FOLDER", help="folders of unpacked packages"
    )
    text.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="PATH", help=".txt, .md, .rst, .jsonl (.gz), or folders"
    )
    text.add_argument("--write-corpus", type=Path, metavar="FILE", help="write the text to FILE (.jsonl.gz) and stop")

    model = parser.add_argument_group("model")
    model.add_argument("--vocab-size", type=int, default=8192)
    model.add_argument("--width", type=int, default=192, help="size of a hidden state (%(default)s)")
    model.add_argument("--heads", type=int, default=6, help="attention heads (%(default)s)")
    model.add_argument("--ffn", type=int, default=768, help="size of the feed-forward layers (%(default)s)")
    model.add_argument("--encoder-layers", type=int, default=4)
    model.add_argument("--decoder-layers", type=int, default=2)
    model.add_argument("--positions", type=int, default=512, help="longest input in tokens (%(default)s)")
    model.add_argument("--dropout", type=float, default=0.0, help="while pretraining (%(default)s)")
    model.add_argument(
        "--init-std", type=float, default=0.07, help="of the weights at the start (%(default)s, about 1/sqrt(width))"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("mini"), help="output folder (%(default)s)")
    run.add_argument("--minutes", type=float, default=8.0, help="time to train, in wall clock (%(default)s)")
    run.add_argument(
        "--copying",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the time, at the start, on shuffled words, which can only be copied; without it the decoder "
        "learns to guess text long before it learns to read the source (%(default)s)",
    )
    run.add_argument("--batch", type=int, default=64, help="rows of --length tokens in a batch (%(default)s)")
    run.add_argument("--length", type=int, default=256, help="longest row in tokens (%(default)s)")
    run.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (%(default)s)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=2.0,
        help="minutes between checkpoints (%(default)s); one is written with the next line of progress",
    )
    run.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    run.add_argument(
        "--start", type=Path, metavar="FOLDER", help="continue from the model in FOLDER; needs no lesson in copying"
    )

    args = parser.parse_args()
    if not (args.docstrings or args.docstrings_path or args.text):
        parser.error("name a source of text: --docstrings, --docstrings-path or --text")
    if args.length > args.positions:
        parser.error("--length must not exceed --positions")
    if args.start:
        args.copying = 0.0
        if not (args.start / "pretraining.json").is_file():
            parser.error(f"--start: {args.start} is not a folder that this script wrote")
    if args.resume and not (args.out / "checkpoint.pt").is_file():
        parser.error(f"there is no checkpoint to resume from in {args.out}")
    return args


def main() -> None:
    args = parse_args()
    texts = collect(args)
    characters = sum(map(len, texts))
    print(f"{len(texts):,} texts, {characters:,} characters", flush=True)
    if args.write_corpus:
        write_corpus(texts, args.write_corpus)
        return

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # see peftbench.backbones.attention_kernels
    device = torch.device(args.device)

    train_texts = [text for text in texts if not is_held_out(text)]
    if args.resume or args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out if args.resume else args.start)
    else:
        tokenizer = train_tokenizer(train_texts, args.vocab_size, args.positions)
    tokenizer.save_pretrained(args.out)
    backend = tokenizer.backend_tokenizer
    train_rows = make_rows(train_texts, backend, args.length, device)
    held_out = make_rows([text for text in texts if is_held_out(text)], backend, args.length, device)
    if not (train_rows and held_out):
        raise UserError("There is too little text to train on and to hold some out; name more sources.")
    corpus_tokens = sum(int((rows.tokens != PAD).sum()) for rows in train_rows)

    if args.start:
        config = BartConfig.from_pretrained(args.start, dropout=args.dropout)
        model = BartForConditionalGeneration.from_pretrained(args.start, config=config, dtype=torch.float32).to(device)
    else:
        with device:
            model = new_model(args, len(tokenizer))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{corpus_tokens:,} tokens to train on, {parameters:,} parameters, {len(tokenizer):,} words", flush=True)
    progress, loss = train(model, train_rows, held_out, args)

    weights_bytes = save_model(model, args.out)
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "steps": progress.steps,
        "tokens_seen": progress.tokens,
        "minutes": round(progress.seconds / 60, 2),
        "held_out_loss": round(loss, 4),
        "parameters": parameters,
        "weights_bytes": weights_bytes,
        "corpus_texts": len(texts),
        "corpus_bytes": sum(len(text.encode()) for text in texts),
        "corpus_tokens": corpus_tokens,
        "corpus_fingerprint": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "settings": {
            name: getattr(args, name) for name in ("batch", "length", "learning_rate", "dropout", "seed", "compile")
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    if args.start:
        facts["start"] = json.loads((args.start / "pretraining.json").read_text(encoding="utf-8"))
    (args.out / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"held-out loss {loss:.4f}; weights of {weights_bytes:,} bytes in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"pretrain.py: {error}") from None
