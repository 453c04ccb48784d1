"""Conversations as a task: rows, labels, cuts, the loss, what is generated and scored, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from peftbench.backbones.chat_template import list_ends, stop_at_turns
from peftbench.cli.main import main
from peftbench.config.compose import compose_run
from peftbench.config.identity import hash_run
from peftbench.config.schema import Generation, Run, Task, TaskKind, Trainer
from peftbench.config.validity import find_faults
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.predict import compute_mean_loss
from peftbench.records.saved import read_saved_record
from peftbench.tasks.base import TaskData
from peftbench.tasks.batch import NO_TOKEN
from peftbench.tasks.chat import Chat
from peftbench.tasks.completion import LEARNED, Completion
from peftbench.tasks.load import load_task
from peftbench.tasks.prepare import prepare_data
from peftbench.training.batching import Lengths
from peftbench.training.padding_free import PaddingFree, add_lengths
from peftbench.training.token_loss import TokenLoss
from peftbench.utils.errors import UserError
from peftbench.utils.files import write_lines
from tests.backbones.test_chat_template import THREE_TURNS, ids
from tests.chat import QWEN3, chatml, gemma, llama3
from tests.tasks.test_tasks import tiny_bart

END = "<|im_end|>"
SHARED = {"user": "human", "assistant": "gpt", "system": "system"}


def tiny_llama(**more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=512, max_position_embeddings=512, initializer_range=0.3, **{**sizes, **more})
    return LlamaForCausalLM(config).eval()


def make_task(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Task:
    for split in ("train", "validation", "test"):
        write_lines(folder / f"{split}.jsonl", rows)
    settings = {"messages_column": "messages", "source_column": "context", "target_column": "reply", "max_length": 256}
    return Task(
        name="chat",
        kind=TaskKind.text_to_text,
        data_dir=str(folder),
        metric="rougeL",
        generation=Generation(num_beams=1, min_length=0, max_length=8, no_repeat_ngram_size=0),
        **{**settings, **more},
    )


def prepare(task: Task, tokenizer: PreTrainedTokenizerBase | None = None) -> TaskData:
    return prepare_data(load_task(task), tokenizer or chatml(), tiny_llama())


def test_a_conversation_is_learned_turn_by_turn_and_its_last_turn_scored(tmp_path: Path) -> None:
    data = prepare(make_task(tmp_path, [{"messages": THREE_TURNS}]))
    tokenizer = data.tokenizer
    whole = tokenizer.apply_chat_template(THREE_TURNS)["input_ids"]
    example = data.train[0]
    assert [*example["input_ids"], *example["labels"]] == whole[:-1]  # without the line break after the last turn
    labels = [
        index if learned else NO_TOKEN for index, learned in zip(example["labels"], example[LEARNED], strict=True)
    ]
    assert data.collator([example])["labels"].tolist() == [[NO_TOKEN] * len(example["input_ids"]) + labels]
    assert data.collator([example])["input_ids"].tolist() == [whole[:-1]]
    learned = [index for index in labels if index != NO_TOKEN]
    assert tokenizer.decode(learned) == f"Shakespeare did.{END}Around 1600.{END}You are welcome.{END}"

    asked = tokenizer.apply_chat_template(THREE_TURNS[:-1], add_generation_prompt=True)["input_ids"]
    assert data.report[0]["input_ids"] == asked
    assert tokenizer.decode(data.selection[0]["labels"]) == f"You are welcome.{END}" and all(data.selection[0][LEARNED])
    assert data.references(data.report_rows) == ["You are welcome."]
    assert data.lengths == [len(whole) - 1] and data.limits() == {"conversations": 256}
    assert data.cut == {role: {"conversations": 0.0} for role in ("train", "selection", "report")}


@pytest.mark.parametrize("tokenizer", [chatml(), llama3(), gemma()], ids=["chatml", "llama3", "gemma"])
def test_the_loss_is_that_of_the_replies_by_hand(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Of a padded batch, from the logits of apply_chat_template's ids."""
    rows = [{"messages": THREE_TURNS[:count]} for count in (6, 2, 4)]
    data = prepare(make_task(tmp_path, rows), tokenizer)
    model = tiny_llama()
    end = data.template.end_token  # type: ignore[attr-defined]  # of Chat
    total, count = 0.0, 0
    for row in rows:
        whole = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1).detach()
        for place in range(1, len(row["messages"]), 2):
            before = row["messages"][:place]
            start = len(tokenizer.apply_chat_template(before, add_generation_prompt=True)["input_ids"])
            for offset, index in enumerate(ids(tokenizer, f"{row['messages'][place]['content']}{end}")):
                total -= float(scores[start + offset - 1, index])
                count += 1
    batch = data.collator([data.train[i] for i in range(3)])
    assert int((batch["labels"] != NO_TOKEN).sum()) == count
    assert float(model(**batch).loss.detach()) == pytest.approx(total / count, rel=1e-5)


def test_the_loss_without_padding_is_the_same(tmp_path: Path) -> None:
    """Labels of a conversation are not in one piece, and only their logits are computed."""
    data = prepare(make_task(tmp_path, [{"messages": THREE_TURNS[:count]} for count in (6, 2, 4)]))
    lengths = Lengths.of(data, encoder_decoder=False)
    learned = [sum(column) for column in data.train[LEARNED]]
    assert lengths.targets == learned and lengths.sources == data.lengths and lengths.joined
    model = tiny_llama()
    batch = data.collator([data.train[i] for i in range(3)])
    packed = PaddingFree(model, *lengths.longest, (16, 8))
    loss = TokenLoss(model, model.lm_head, pack=packed.targets, smoothing=0.0)
    with packed.active():
        given = packed.load(add_lengths(lambda examples: batch, joined=True)([]))
        found = float(loss(given, count=sum(learned)).detach())
    assert found == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)


def test_selection_by_loss_is_of_the_last_turn(tmp_path: Path) -> None:
    data, model = prepare(make_task(tmp_path, [{"messages": THREE_TURNS}])), tiny_llama()
    whole = data.tokenizer.apply_chat_template(THREE_TURNS)["input_ids"][:-1]
    last = ids(data.tokenizer, f"You are welcome.{END}")
    scores = model(torch.tensor([whole])).logits[0].log_softmax(-1).detach()
    first = len(whole) - len(last)
    expected = -sum(float(scores[first + offset - 1, index]) for offset, index in enumerate(last)) / len(last)
    assert compute_mean_loss(model, data.selection, data.collator, 2) == pytest.approx(expected, rel=1e-5)


def test_generation_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """Which the backbone's files do not name: neither the tokenizer's end nor the generation config's."""
    tokenizer, model = llama3(), tiny_llama()
    model.generation_config.eos_token_id = 1
    data = prepare_data(load_task(make_task(tmp_path, [{"messages": THREE_TURNS}])), tokenizer, model)
    turn_end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert list_ends(model) == [turn_end, 1]
    assert data.taught_ends() == ["<|eot_id|>"]  # type: ignore[attr-defined]  # of TextToText
    assert data.reading()["turn_end"] == "<|eot_id|>"
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[turn_end] = 0
    evaluator = Evaluator(model, data, Run(task=data.task, trainer=Trainer(learning_rate=1.0)))
    assert evaluator.generation is not None and turn_end in evaluator.generation.eos_token_id
    other = tiny_llama()
    other.generation_config.eos_token_id = None
    for _ in range(2):
        stop_at_turns(other, data.template)  # type: ignore[attr-defined]  # of Chat
        assert list_ends(other) == [turn_end]
    assert any(
        note.startswith("The chat template ends a turn with <|eot_id|>: replies are taught") for note in data.notes
    )


def test_a_long_conversation_is_cut_and_its_end_not_taught(tmp_path: Path) -> None:
    full = prepare(make_task(tmp_path, [{"messages": THREE_TURNS}]))
    whole = [*full.train[0]["input_ids"], *full.train[0]["labels"]]
    data = prepare(make_task(tmp_path, [{"messages": THREE_TURNS}], max_length=len(whole) - 3))
    example = data.train[0]
    assert [*example["input_ids"], *example["labels"]] == whole[:-3]
    assert example["labels"][-1] != data.template.end  # type: ignore[attr-defined]  # of Chat
    assert data.cut["train"] == {"conversations": 1.0}
    assert any("Conversations are truncated to" in note and "task.max_length" in note for note in data.notes)
    # What precedes a reply keeps its end, in training as in generation, with room for what is written.
    data = prepare(make_task(tmp_path, [{"messages": THREE_TURNS[:2]}], max_length=24))
    whole = full.tokenizer.apply_chat_template(THREE_TURNS[:1], add_generation_prompt=True)["input_ids"]
    assert data.train[0]["input_ids"] == data.report[0]["input_ids"] == whole[-16:]
    assert data.train[0]["labels"] == ids(data.tokenizer, f"Shakespeare did.{END}")
    with pytest.raises(
        UserError, match=r"task\.generation\.max_length=8 leaves no room for a conversation of 8 tokens"
    ):
        prepare(make_task(tmp_path, [{"messages": THREE_TURNS}], max_length=8))


def test_turns_that_are_shown_otherwise_later_are_examples_of_their_own(tmp_path: Path) -> None:
    data = prepare(make_task(tmp_path, [{"messages": THREE_TURNS}]), chatml(QWEN3))
    assert len(data.train) == 3 and len(data.report) == 1
    assert any("1 conversation is 3 examples" in note for note in data.notes)
    assert [data.tokenizer.decode(labels) for labels in data.train["labels"]] == [
        f"<think>\n\n</think>\n\n{reply}{END}" for reply in ("Shakespeare did.", "Around 1600.", "You are welcome.")
    ]
    assert data.references(data.report_rows) == ["You are welcome."]
    assert data.decode(np.array([data.report[0]["labels"]])) == ["You are welcome."]


def test_forms_of_conversations_are_read_alike(tmp_path: Path) -> None:
    """Lists of messages, ShareGPT's, JSON in a cell, keys that are null, and messages after the last reply."""
    shared = [{"from": SHARED[message["role"]], "value": message["content"]} for message in THREE_TURNS]
    nulls = [{**message, "tool_calls": None} for message in THREE_TURNS]
    forms = [THREE_TURNS, shared, json.dumps(THREE_TURNS), nulls, [*THREE_TURNS, {"role": "user", "content": "Bye"}]]
    data = prepare(make_task(tmp_path, [{"messages": form} for form in forms]))
    assert all(data.train[i] == data.train[0] for i in range(len(forms)))
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"a": 1}}}]
    rows = [{"messages": THREE_TURNS, "tools": tools}, {"messages": THREE_TURNS, "tools": []}]
    template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + chatml().chat_template
    data = prepare(make_task(tmp_path, rows, tools_column="tools"), chatml(template))
    shown = [data.tokenizer.decode(found) for found in data.report["input_ids"]]
    assert shown[0].startswith(json.dumps(tools[0])) and shown[1].startswith("<|im_start|>")


def test_conversations_that_ask_the_same_are_dealt_to_the_same_split(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": reply}]}
        for number in range(12)
        for reply in ("one", "two")
    ]
    write_lines(tmp_path / "all.jsonl", rows)
    task = replace(make_task(tmp_path, rows), data_dir=None, train_file=str(tmp_path / "all.jsonl"))
    loaded = load_task(task)
    asked = {split: set(found["context"]) for split, found in loaded.rows.items()}
    assert len(asked["test"]) == 1 and len(loaded.rows["test"]) == 2
    assert not asked["train"] & asked["test"]


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ([{"role": "user", "content": "Hi"}], "has no turn of the assistant"),
        ([{"role": "assistant", "content": "Hi"}], "the assistant's first turn answers nobody"),
        ([{"role": "usr", "content": "Hi"}], "message 1 has the role 'usr'; did you mean user"),
        ([{"from": "humn", "value": "Hi"}], "message 1 is from 'humn'; did you mean human"),
        (
            [{"text": "Hi"}],
            r"message 1 is .* write \{\"role\": \"user\", \"content\": \"...\"\}, or in ShareGPT's form",
        ),
        ([{"role": "user"}, THREE_TURNS[1]], "message 1 has no content"),
        ("Hi", "is not a conversation: not JSON"),
        ({"a": 1}, "is not a conversation: not a list"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(cell: Any, sentence: str, tmp_path: Path) -> None:
    task = make_task(tmp_path, [{"messages": THREE_TURNS}, {"messages": cell}])
    with pytest.raises(UserError, match=rf"train\.jsonl:2: .*{sentence}"):
        load_task(task)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.messages_column=messages is unknown.* Choices: conversations"):
        load_task(make_task(tmp_path, [{"conversations": THREE_TURNS}]))


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    """Also when its split is dealt from the training file."""
    rows = [{"messages": [{"role": "user", "content": str(i)}, THREE_TURNS[1]]} for i in range(20)]
    rows.insert(7, {"messages": [{"role": "system", "content": "Help."}, *THREE_TURNS[:2]]})
    write_lines(tmp_path / "all.jsonl", rows)
    task = replace(make_task(tmp_path, rows), data_dir=None, train_file=str(tmp_path / "all.jsonl"))
    with pytest.raises(UserError, match=r"all\.jsonl:8: the chat template refuses it: System role not supported\.$"):
        prepare(task, gemma())


def test_encoder_decoders_and_bare_tokenizers_are_refused(tmp_path: Path) -> None:
    loaded = load_task(make_task(tmp_path, [{"messages": THREE_TURNS}]))
    with pytest.raises(UserError, match="task=chat needs a decoder-only backbone, and bart is an encoder-decoder"):
        prepare_data(loaded, chatml(), tiny_bart())
    with pytest.raises(UserError, match=r"has no chat template; give one as model\.chat_template=FILE"):
        prepare_data(loaded, chatml(None), tiny_llama())


def make_pairs(folder: Path, **more: Any) -> Task:
    """A task of a source and targets, of which one spells the end of a turn."""
    rows = [{"context": "Who wrote <|im_end|> Hamlet? " * 4, "reply": ["Shakespeare <|im_end|>did.", "He did."]}]
    return make_task(folder, rows, **{"messages_column": None, "max_source_length": 200, "chat": True, **more})


def test_sources_and_targets_as_turns(tmp_path: Path) -> None:
    tokenizer = chatml()
    data = prepare(make_pairs(tmp_path, prompt="Answer: {source}"), tokenizer)
    plain = data.train_rows[0]
    assert isinstance(data, Chat)
    question = {"role": "user", "content": f"Answer: {plain['context']}"}
    written = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(data.train[0]["input_ids"]) == written
    special = tokenizer.convert_tokens_to_ids(END)
    assert data.train[0]["input_ids"].count(special) == 2  # of the system's and the user's turn
    assert [tokenizer.decode(labels) for labels in data.train["labels"]] == [f"{t}{END}" for t in plain["reply"]]
    assert [labels.count(special) for labels in data.train["labels"]] == [1, 1]
    assert data.references(data.report_rows) == [plain["reply"]]
    # Special tokens that are typed in the prompt are special.
    typed = prepare(make_pairs(tmp_path, prompt="<|endoftext|>{source}"), tokenizer)
    assert typed.train[0]["input_ids"].count(0) == 1 and typed.reading()["special_tokens"] == ["<|endoftext|>"]


def test_a_long_source_is_cut_inside_its_turn(tmp_path: Path) -> None:
    full = prepare(make_pairs(tmp_path))
    room = len(full.train[0]["input_ids"]) - 10
    data = prepare(make_pairs(tmp_path, max_source_length=room, max_target_length=3))
    text = data.tokenizer.decode(data.train[0]["input_ids"])
    assert room - 3 <= len(data.train[0]["input_ids"]) <= room
    assert text.endswith(f"{END}\n<|im_start|>assistant\n") and text.startswith("<|im_start|>system\nYou help")
    assert data.cut["train"] == {"sources": 1.0, "targets": 1.0}
    assert [len(labels) for labels in data.train["labels"]] == [3, 3]
    assert data.template.end not in data.train[0]["labels"]  # type: ignore[attr-defined]  # of Chat
    with pytest.raises(UserError, match="The chat template leaves no room for a source in 9 tokens"):
        prepare(make_pairs(tmp_path, max_source_length=9))


def test_auto_takes_the_template_of_an_instruct_model_and_says_so(tmp_path: Path) -> None:
    """A base model may have one too; its generation does not stop at the end of a turn."""
    loaded = load_task(make_pairs(tmp_path, chat="auto"))
    model = tiny_llama()
    model.generation_config.eos_token_id = [0, 2]
    data = prepare_data(loaded, chatml(), model)
    assert isinstance(data, Chat)
    assert any("go through the chat template (task.chat=auto): generation stops at <|im_end|>" in n for n in data.notes)
    model = tiny_llama()
    model.generation_config.eos_token_id = 0
    data = prepare_data(loaded, chatml(), model)
    assert type(data) is Completion and list_ends(model) == [0]
    assert any("do not go through a chat template (task.chat=auto): generation does not stop" in n for n in data.notes)
    data = prepare_data(loaded, chatml(None), tiny_llama())
    assert type(data) is Completion
    assert any("(task.chat=auto): the tokenizer has no chat template" in note for note in data.notes)
    data = prepare_data(load_task(make_pairs(tmp_path, chat=False)), chatml(), model)
    assert type(data) is Completion and not any("task.chat" in note for note in data.notes)


def test_keys_of_chat_change_no_earlier_name_and_count_in_later_ones(tmp_path: Path) -> None:
    run = compose_run(["task=text_to_text"], reads_data=False)
    named = hash_run(run)
    assert (run.task.chat, run.task.messages_column, run.task.max_length) == (False, None, 1024)
    template = tmp_path / "chatml.jinja"
    template.write_text("a")
    names = [named]
    for key in ("task.chat=auto", "task.chat=true", f"model.chat_template={template}"):
        names.append(hash_run(compose_run(["task=text_to_text", key], reads_data=False)))
    template.write_text("b")
    names.append(hash_run(compose_run(["task=text_to_text", f"model.chat_template={template}"], reads_data=False)))
    names.append(hash_run(compose_run(["task=chat"], reads_data=False)))
    names.append(hash_run(compose_run(["task=chat", "task.max_length=99"], reads_data=False)))
    assert len(set(names)) == len(names)


def test_faults_of_the_keys() -> None:
    def faults(*words: str) -> str:
        with pytest.raises(UserError) as found:
            compose_run(list(words), reads_data=False)
        return str(found.value)

    assert "task.chat=maybe: it must be auto, true or false" in faults("task=text_to_text", "task.chat=maybe")
    assert "task.prompt=a {source} is for sources and targets" in faults("task=chat", "task.prompt='a {source}'")
    assert "conversations have no baseline; use task.baselines=[]" in faults("task=chat", "task.baselines=[copy]")
    assert "task.chat=true is for tasks that write text" in faults("task=sst2", "task.chat=true")
    assert "task.tools_column=a is for conversations" in faults("task=text_to_text", "task.tools_column=a")
    assert "model.chat_template=none.jinja is not a file" in faults("task=chat", "model.chat_template=none.jinja")
    assert find_faults(compose_run(["task=chat"], reads_data=False), reads_data=False) == []


@pytest.mark.slow
def test_a_run_of_conversations_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, recorded, scored again, and merged so that plain transformers stops at a turn's end."""
    model, tokenizer = tiny_llama(eos_token_id=0), chatml(None)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chatml.jinja").write_text(str(chatml().chat_template))
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(20)
    ]
    write_lines(tmp_path / "all.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    line = ["task=chat", "task.train_file=all.jsonl", "model.path=model", "method=lora", "trainer=quick"]
    line += ["trainer.max_steps=2", "task.generation.max_length=4", "trainer.device=cpu"]
    assert main(["train", *line]) == 2  # the tokenizer has no template
    assert main(["train", *line, "model.chat_template=chatml.jinja"]) == 0
    (folder,) = {path.parent for path in (tmp_path / "outputs").rglob("predictions.jsonl")}
    record = read_saved_record(folder)
    assert record.data["ends"] == {"taught": [END], "stops": ["<|endoftext|>", END]}
    assert record.data["reading"]["turn_end"] == END and record.cut_off.keys() >= {"report"}
    assert main(["evaluate", str(folder)]) == 0
    assert main(["merge", str(folder), "--out", "merged"]) == 0
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids(END) in list_ends(merged)
