"""General text on which a backbone's own language modelling is measured, and how each kind of backbone reads it.

The text is cut into blocks of equal length. A decoder alone predicts each token from those before it. A backbone with a
mask token, or with T5's sentinels, predicts masked tokens: an encoder alone 15% of single ones, an encoder-decoder 15%
in spans of three, as in BERT (Devlin et al. 2019), BART (Lewis et al. 2020) and T5 (Raffel et al. 2020). What is masked
is the same for every run of a backbone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.backbones.sites import find_family
from peftbench.config.schema import DOCSTRINGS
from peftbench.tasks.batch import NO_TOKEN, make_decoder_inputs
from peftbench.tasks.docstrings import STDLIB, assign_split, gather_packages, read_versions
from peftbench.tasks.files import READERS, get_ending, read_file
from peftbench.tasks.tokens import Encoder
from peftbench.utils.errors import UserError

LENGTH, BLOCKS = 256, 64  # tokens of a block, and how many blocks are read
FEWEST = 64  # tokens, below which a loss says nothing
MASKED, SPAN = 0.15, 3
TEXTS = (".txt", ".md")
COLUMN = "text"  # of a file of rows


class GeneralText(NamedTuple):
    """A text, what it is called, and a hash of it."""

    name: str
    text: str

    @property
    def stamp(self) -> str:
        """Twelve hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


class Block(NamedTuple):
    """What a model reads, and the tokens whose loss counts; each of shape (1, tokens).

    `decoder_input_ids` is None unless the model is an encoder-decoder. Labels that do not count are `NO_TOKEN`. Logits
    and labels are at the same positions, also for a decoder alone.
    """

    input_ids: Tensor
    labels: Tensor
    decoder_input_ids: Tensor | None = None


def read_general_text(source: str) -> GeneralText:
    """Return the text of `retention=`: docstrings of the standard library that no training split has, or of a file.

    Raises:
        UserError: the file cannot be read, or has no column `text`.
    """
    if source == DOCSTRINGS:
        held_out = [one.text for one in gather_packages([STDLIB]) if assign_split(one.name) == "test"]
        (version,) = read_versions([STDLIB]).values()
        return GeneralText(f"docstrings of Python {version}", "\n\n".join(held_out))
    file = Path(source).expanduser()
    if get_ending(source) in READERS:
        rows = read_file(source, [COLUMN])
        if COLUMN not in rows.column_names or not all(isinstance(cell, str) for cell in rows[COLUMN][:]):
            raise UserError(f"retention={source} has no column {COLUMN} with texts; give such a file, or a .txt file.")
        return GeneralText(file.name, "\n\n".join(rows[COLUMN][:]))
    if file.suffix.lower() not in TEXTS:
        raise UserError(f"retention={source} is no {', '.join((*TEXTS, *READERS))} file.")
    try:
        return GeneralText(file.name, file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"retention={source} cannot be read as UTF-8: {error}.") from error


def make_blocks(general: GeneralText, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Block]:
    """Return what a language model reads of a text.

    Raises:
        UserError: the text is too short, or the model has no language modelling of its own.
    """
    encoder = Encoder(tokenizer, model)
    opening, closing = encoder.ends()
    (ids,) = encoder.ids([general.text[: 12 * LENGTH * BLOCKS]])
    room = min(LENGTH, encoder.limit) - len(opening) - len(closing)
    cut = [ids[start : start + room] for start in range(0, len(ids), room)]
    cut = [block for block in cut[:BLOCKS] if len(block) == room] or cut[:1]
    if sum(map(len, cut)) < FEWEST:
        raise UserError(f"retention: {general.name} has {len(ids)} tokens; {FEWEST} are needed, and more are better.")
    generator = torch.Generator().manual_seed(0)
    if model.config.is_encoder_decoder:
        sentinels = _list_sentinels(tokenizer)
        written_opening, written_closing = encoder.ends(target=True)
        if sentinels:
            return [_fill_sentinels(block, opening, closing, sentinels, model, generator) for block in cut]
        mask = _require_mask(model, tokenizer)
        ends = (opening, closing, written_opening, written_closing)
        return [_fill_spans(block, ends, mask, model, generator) for block in cut]
    if set(find_family(model.config.model_type).stacks) == {"decoder"}:
        return [_continue(block, opening) for block in cut]
    mask = _require_mask(model, tokenizer)
    return [_fill_tokens(block, opening, closing, mask, generator) for block in cut]


def _require_mask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    mask: int | None = tokenizer.mask_token_id
    if mask is None:
        raise UserError(
            f"retention: {model.config.model_type} has no mask token and no sentinels, and so no language modelling of "
            "its own to measure; leave retention out."
        )
    return mask


def _list_sentinels(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of <extra_id_0>, <extra_id_1> and so on."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[name])
    return found


def _continue(block: Sequence[int], opening: Sequence[int]) -> Block:
    ids = [*opening, *block]
    return Block(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))


def _fill_tokens(
    block: Sequence[int], opening: Sequence[int], closing: Sequence[int], mask: int, generator: torch.Generator
) -> Block:
    ids = torch.tensor(block)
    masked = _choose(len(block), 1, generator)
    read = torch.cat([torch.tensor(opening), ids.masked_fill(masked, mask), torch.tensor(closing)]).long()
    edges = [torch.full((len(end),), NO_TOKEN) for end in (opening, closing)]
    return Block(read[None], torch.cat([edges[0], ids.masked_fill(~masked, NO_TOKEN), edges[1]]).long()[None])


def _fill_spans(
    block: Sequence[int],
    ends: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    mask: int,
    model: PreTrainedModel,
    generator: torch.Generator,
) -> Block:
    """Each span is read as one mask token; the whole text is written, and the loss of what was masked counts."""
    opening, closing, written_opening, written_closing = ends
    masked = _choose(len(block), SPAN, generator)
    read = [*opening, *_collapse(block, masked, [mask] * len(block)), *closing]
    written = torch.tensor([[*written_opening, *block, *written_closing]])
    counts = torch.zeros(written.shape, dtype=torch.bool)
    counts[0, len(written_opening) : len(written_opening) + len(block)] = masked
    return Block(torch.tensor([read]), written.masked_fill(~counts, NO_TOKEN), make_decoder_inputs(model, written))


def _fill_sentinels(
    block: Sequence[int],
    opening: Sequence[int],
    closing: Sequence[int],
    sentinels: Sequence[int],
    model: PreTrainedModel,
    generator: torch.Generator,
) -> Block:
    """Each span is read as a sentinel; the sentinels are written with their spans, whose loss counts."""
    masked = _choose(len(block), SPAN, generator)
    read = [*opening, *_collapse(block, masked, sentinels), *closing]
    written: list[int] = []
    counts: list[bool] = []
    marks = iter(sentinels)
    for place, token in enumerate(block):
        if not masked[place]:
            continue
        if place == 0 or not masked[place - 1]:
            written.append(next(marks))
            counts.append(False)
        written.append(token)
        counts.append(True)
    labels = torch.tensor([written])
    return Block(
        torch.tensor([read]),
        labels.masked_fill(~torch.tensor([counts]), NO_TOKEN),
        make_decoder_inputs(model, labels),
    )


def _choose(tokens: int, span: int, generator: torch.Generator) -> Tensor:
    """Return which of the tokens are masked: `MASKED` of them, in spans that do not touch; at least one span."""
    cells = tokens // (span + 1)  # each holds one span at most, and a token that is not masked
    wanted = max(1, round(MASKED * tokens / span))
    chosen = torch.randperm(cells, generator=generator)[:wanted]
    masked = torch.zeros(tokens, dtype=torch.bool)
    for cell in chosen.tolist():
        masked[cell * (span + 1) : cell * (span + 1) + span] = True
    return masked


def _collapse(block: Sequence[int], masked: Tensor, marks: Sequence[int]) -> list[int]:
    """Return the tokens with each masked span as one mark, in the order of `marks`."""
    found: list[int] = []
    left = iter(marks)
    for place, token in enumerate(block):
        if not masked[place]:
            found.append(token)
        elif place == 0 or not masked[place - 1]:
            found.append(next(left))
    return found
