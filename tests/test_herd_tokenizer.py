"""The demo's tokenizer: short prompts, operands token by token, any text back unchanged."""

from __future__ import annotations

from itertools import islice
from typing import cast

import pytest
from transformers import PreTrainedTokenizerFast

from ground.chat import ChatTemplate
from ground.herd.families import SOLVED
from ground.herd.tasks import draw
from ground.herd.tokenizer import build_tokenizer
from ground.judging import judge_messages
from ground.records import LABELS, Message


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(512)


def test_the_vocabulary_is_small(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 512


def test_digits_and_letters_of_operands_are_single_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.tokenize("Spell this word backward (example: sun -> nus): abc") == [
        "Spell this word backward (example: sun -> nus): ",
        *"abc",
    ]
    assert tokenizer.tokenize("4;+12=16=>16") == [*"4;+12=16", "=>", *"16"]


def test_labels_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [len(tokenizer.tokenize(label)) for label in LABELS] == [1, 1, 1]


@pytest.mark.parametrize(
    "text", ["", "naïve 漢字 🦙", "a\n\n b", "horses, horse", "<|nothing|>", "easyhard top-red"]
)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_chat_begins_once_and_each_turn_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(tokenizer)
    messages = (Message("user", "Calculate 4 + 5."), Message("assistant", "=>9"))
    ids, mask = chat.encode_demonstration(messages)
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nCalculate 4 + 5.<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n=>9<|eot|>"
    )
    trained = [token for token, is_trained in zip(ids, mask, strict=True) if is_trained]
    assert tokenizer.decode(trained) == "=>9<|eot|>"
    assert chat.encode_prompt(messages[:1]) == ids[: len(ids) - len(trained)]


def test_the_template_marks_the_same_tokens_as_ours(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = (Message("user", "Calculate 4 + 5."), Message("assistant", "=>9"))
    theirs = cast(
        dict[str, list[int]],
        tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            return_assistant_tokens_mask=True,
            return_dict=True,
        ),
    )
    ids, mask = ChatTemplate(tokenizer).encode_demonstration(messages)
    assert theirs["input_ids"] == ids
    assert theirs["assistant_masks"] == [int(is_trained) for is_trained in mask]


def test_prompts_and_answers_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(tokenizer)
    tasks = [
        task
        for family in SOLVED
        for label in LABELS
        for task in islice(draw(family, label, "test"), 40)
    ]
    prompts = [len(chat.encode_prompt(task.prompt.messages)) for task in tasks]
    answers = [len(chat.encode_text(task.completion(think=True))) for task in tasks]
    assert max(prompts) <= 96 and sum(prompts) / len(prompts) <= 40
    assert max(answers) <= 63 and sum(answers) / len(answers) <= 32


def test_a_judge_reads_the_question_behind_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(tokenizer)
    task = (Message("user", "Calculate 4 + 5."),)
    plain, judged = chat.encode_prompt(task), chat.encode_prompt(judge_messages(task))
    assert len(judged) == len(plain) + 1
