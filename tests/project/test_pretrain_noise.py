"""scripts/pretrain.py: the noise, against a naive reference that loops over tokens; the held-out text; a short run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peftbench.tasks.docstrings import assign_split

SCRIPTS = Path(__file__).parents[2] / "scripts"
BOS, PAD, EOS, MASK = 0, 1, 2, 4


@pytest.fixture(scope="module")
def pretrain() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("pretrain")


def random_rows(count: int, width: int, seed: int = 0) -> Tensor:
    """(count, width) rows <s> ... </s> of 1 to `width` - 2 tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 99, (count, width), generator=generator, dtype=torch.int32)
    ends = torch.randint(2, width, (count, 1), generator=generator)
    position = torch.arange(width)
    tokens[:, 0] = BOS
    tokens = torch.where(position == ends, EOS, tokens)
    return torch.where(position > ends, PAD, tokens)


def runs(mask: list[bool]) -> list[int]:
    """The lengths of the runs of True."""
    return [len(run) for run in "".join("x" if m else " " for m in mask).split()]


def naive_infill(tokens: list[int], masked: list[bool]) -> list[int]:
    """What `infill` does to one row, token by token."""
    out: list[int] = []
    for i, token in enumerate(tokens):
        if not masked[i]:
            out += [token] if token != PAD else []
        elif i == 0 or not masked[i - 1]:
            out.append(MASK)
    return out + [PAD] * (len(tokens) - len(out))


def test_infill_equals_the_naive_reference(pretrain: ModuleType) -> None:
    tokens = random_rows(200, 40)
    inner = tokens > MASK
    masked = pretrain.span_mask(inner, torch.Generator().manual_seed(1))
    expected = [naive_infill(row, mask) for row, mask in zip(tokens.tolist(), masked.tolist(), strict=True)]
    assert pretrain.infill(tokens, masked).tolist() == expected


@pytest.mark.parametrize("width", [3, 64, 512])
def test_rows_that_are_all_masked_or_not_at_all(pretrain: ModuleType, width: int) -> None:
    tokens = random_rows(20, width)
    inner = tokens > MASK
    assert torch.equal(pretrain.infill(tokens, torch.zeros_like(inner)), tokens)
    assert torch.equal(
        pretrain.infill(tokens, inner), torch.tensor([[BOS, MASK, EOS] + [PAD] * (width - 3)] * 20, dtype=torch.int32)
    )


def test_spans_have_the_share_and_the_lengths_of_the_paper(pretrain: ModuleType) -> None:
    inner = torch.ones(400, 512, dtype=torch.bool)
    masked = pretrain.span_mask(inner, torch.Generator().manual_seed(0))
    assert masked.float().mean().item() == pytest.approx(0.3, abs=0.01)
    lengths = [length for row in masked.tolist() for length in runs(row)]
    assert sum(lengths) / len(lengths) == pytest.approx(3.05, abs=0.05)
    ones = sum(length == 1 for length in lengths) / len(lengths)
    assert ones == pytest.approx(0.199, abs=0.02)  # Poisson(3): 0.050 for no token, made one, and 0.149 for one
    # No place of a row is spared: its beginning is masked as often as its end, but for the first span's length.
    assert masked[:, 8:16].float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert masked[:, -8:].float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert masked[:, 0].any()


def test_only_inner_tokens_are_masked(pretrain: ModuleType) -> None:
    inner = random_rows(300, 64) > MASK
    masked = pretrain.span_mask(inner, torch.Generator().manual_seed(0))
    assert not (masked & ~inner).any()
    assert masked[inner].float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_half_of_the_rows_lose_their_first_paragraph(pretrain: ModuleType) -> None:
    tokens = random_rows(1, 40).clone()
    tokens[0, 1:39], tokens[0, 39] = torch.arange(5, 43), EOS
    rows = pretrain.Rows(tokens.expand(2000, -1), torch.full((2000,), 10, dtype=torch.int32))
    source = pretrain.corrupt(rows, torch.Generator().manual_seed(0))
    without = torch.tensor([BOS, MASK, *range(15, 43), EOS] + [PAD] * 9, dtype=torch.int32)
    assert (source == without).all(1).float().mean().item() == pytest.approx(0.5, abs=0.03)

    rows.first.zero_()  # rows of a single paragraph never do
    source = pretrain.corrupt(rows, torch.Generator().manual_seed(0))
    assert not (source == without).all(1).any()


def test_the_noise_is_reproducible_and_leaves_the_rows_alone(pretrain: ModuleType) -> None:
    tokens = random_rows(50, 64)
    rows = pretrain.Rows(tokens.clone(), torch.zeros(50, dtype=torch.int32))
    first = pretrain.corrupt(rows, torch.Generator().manual_seed(3))
    assert torch.equal(first, pretrain.corrupt(rows, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, pretrain.corrupt(rows, torch.Generator().manual_seed(4)))
    assert torch.equal(rows.tokens, tokens)


def test_the_decoder_writes_the_original(pretrain: ModuleType) -> None:
    """A model that is certain of the original has no loss, and it is fed </s> and the original but for its end."""
    tokens = random_rows(8, 32)
    fed: list[Tensor] = []

    class Oracle(torch.nn.Module):
        def forward(self, decoder_input_ids: Tensor, **_: object) -> object:
            fed.append(decoder_input_ids)
            output = torch.nn.Module()
            output.logits = 100.0 * torch.nn.functional.one_hot(tokens.long(), 100)
            return output

    rows = pretrain.Rows(tokens, torch.zeros(8, dtype=torch.int32))
    loss = pretrain.infilling_loss(Oracle(), rows, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert (fed[0][:, 0] == EOS).all()
    assert torch.equal(fed[0][:, 1:], tokens[:, :-1].long())


def test_rows_hold_whole_texts_and_know_their_first_paragraph(pretrain: ModuleType) -> None:
    texts = ["A short text.", "Its first paragraph.\n\nAnd the rest, with </s> and <mask> spelt out."]
    tokenizer = pretrain.train_tokenizer(texts, vocab_size=300, length=64)
    buckets = pretrain.make_rows(texts, tokenizer.backend_tokenizer, 64, torch.device("cpu"))
    rows = [(ids, first) for bucket in buckets for ids, first in zip(bucket.tokens, bucket.first.tolist(), strict=True)]
    assert all((ids == BOS).sum() == 1 and (ids == EOS).sum() == 1 and not (ids == MASK).any() for ids, _ in rows)
    assert sorted(tokenizer.decode(ids[ids > MASK]) for ids, _ in rows) == texts
    assert [tokenizer.decode(ids[1 : 1 + first]) for ids, first in rows if first] == ["Its first paragraph."]


def test_a_long_text_becomes_windows_and_an_epoch_holds_each_once(pretrain: ModuleType) -> None:
    text = "".join(map(str, range(100)))  # 190 tokens of one digit: windows of 62, 62, 62 and, dropped, 4
    tokenizer = pretrain.train_tokenizer([], vocab_size=261, length=64)
    buckets = pretrain.make_rows([text], tokenizer.backend_tokenizer, 64, torch.device("cpu"))
    [batch] = pretrain.epoch(buckets, 512, torch.Generator().manual_seed(0))
    assert sorted(map(tokenizer.decode, batch.tokens[:, 1:-1])) == sorted([text[:62], text[62:124], text[124:186]])
    assert not batch.first.any()


def write_package(folder: Path, name: str, documents: dict[str, str]) -> None:
    """A package called `name` in `folder` that has a function for each name and docstring in `documents`."""
    (folder / name).mkdir(parents=True)
    functions = [f'def {function}():\n    """{text}"""\n' for function, text in documents.items()]
    (folder / name / "__init__.py").write_text("\n".join(functions), encoding="utf-8")


def run(pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
    pretrain.main()


def test_held_out_docstrings_are_left_out_under_any_name(
    pretrain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, also_trained = [f"alpha.f{i}" for i in range(50) if assign_split(f"alpha.f{i}") == "train"][:2]
    held_out = next(f"beta.f{i}" for i in range(50) if assign_split(f"beta.f{i}") != "train")
    secret = "The summary that stands in a test row.\n\nIts body has enough words to train on."
    same_summary = "The summary that stands in a test row.\n\nAnother body with quite enough words to train on."
    fine = "A text of its own that is long enough to train on."
    write_package(tmp_path / "src", "alpha", {trained[6:]: secret.upper(), also_trained[6:]: fine})
    write_package(tmp_path / "src", "beta", {held_out[5:]: secret})
    (tmp_path / "notes.md").write_text(same_summary)
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": fine.lower()}) + '\n{"text": "Too short."}\n')

    corpus, files = tmp_path / "corpus.jsonl.gz", [tmp_path / "notes.md", tmp_path / "more.jsonl"]
    run(pretrain, monkeypatch, "--docstrings-path", tmp_path / "src", "--text", *files, "--write-corpus", corpus)
    assert list(pretrain.read_texts([corpus])) == [fine]


@pytest.mark.slow
def test_a_short_run_learns_resumes_and_saves_a_model_that_loads(
    pretrain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.jsonl", tmp_path / "mini"
    lines = [f"Return the number {i} of the list.\n\nThe list holds {i + 1} numbers in all." for i in range(400)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    small = (
        "--vocab-size",
        400,
        "--width",
        32,
        "--heads",
        2,
        "--ffn",
        64,
        "--encoder-layers",
        1,
        "--decoder-layers",
        1,
    )
    short = ("--text", text, "--out", out, "--batch", 8, "--length", 48, "--learning-rate", 0.01, "--device", "cpu")

    with monkeypatch.context() as interrupted:
        interrupted.setattr(pretrain, "save_model", lambda *_: sys.exit("interrupted"))
        with pytest.raises(SystemExit, match="interrupted"):
            run(pretrain, interrupted, *short, *small, "--minutes", 0.03, "--checkpoint-minutes", 0.01)
    before = torch.load(out / "checkpoint.pt", weights_only=True)["progress"]
    run(pretrain, monkeypatch, *short, *small, "--minutes", 0.06, "--resume")

    facts = json.loads((out / "pretraining.json").read_text())
    assert facts["steps"] > before["steps"] > 0
    losses = [
        float(line.split("held out")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if "step" in line
    ]
    assert losses[-1] < losses[0] - 1
    assert facts["held_out_loss"] == losses[-1]
    assert facts["weights_bytes"] == (out / "model.safetensors").stat().st_size
    assert not (out / "checkpoint.pt").exists()

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForSeq2SeqLM.from_pretrained(out)
    ids = tokenizer("Return the number 7.", return_tensors="pt").input_ids
    assert (ids[0, 0], ids[0, -1], len(tokenizer)) == (BOS, EOS, model.config.vocab_size)
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_shuffled_rows_keep_their_words_and_frame(pretrain: ModuleType) -> None:
    """The lesson in copying: the same words between <s> and </s>, in another order."""
    rows = pretrain.Rows(
        torch.tensor([[0, 10, 11, 12, 13, 14, 2, 1], [0, 20, 21, 2, 1, 1, 1, 1]], dtype=torch.int32),
        torch.tensor([3, 0]),
    )
    shuffled = pretrain.shuffled(rows, torch.Generator().manual_seed(1)).tokens
    assert torch.equal(shuffled.sort(dim=1).values, rows.tokens.sort(dim=1).values)
    assert torch.equal(shuffled[:, 0], rows.tokens[:, 0])
    assert shuffled[0, 6:].tolist() == [2, 1] and shuffled[1, 3:].tolist() == [2, 1, 1, 1, 1]
    assert not torch.equal(shuffled[0], rows.tokens[0])
