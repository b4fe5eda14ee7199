"""The judge: probabilities of three words, and nothing taken for a judgement that is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import make_tiny_model

from curation.config import LabelJudgeSection
from curation.label_judge import LabelJudge, labelled
from ground.chat import ChatTemplate
from ground.errors import DataError
from ground.judging import JUDGE_QUESTION, judge_messages, judgement
from ground.model import load_tokenizer
from ground.records import LABELS, Demonstration, Message
from rollout.config import EngineSection
from rollout.engine import Scores
from rollout.engines import open_engine
from rollout.fake_engine import FakeEngine

TASK = (Message("user", "2+2="),)


def asking(task: tuple[Message, ...]) -> Demonstration:
    return Demonstration("row", (*task, Message("assistant", "4")), "sums")


ROW = asking(TASK)


class Oracle(FakeEngine):
    """An engine whose next token behind any sequence has the probabilities given."""

    def __init__(self, probabilities: Mapping[int, float]) -> None:
        super().__init__(lambda request: ())
        self.probabilities = probabilities
        self.rows: list[list[int]] = []

    def score(self, token_ids: Sequence[Sequence[int]], top_k: int = 0) -> list[Scores]:
        """The same top at every place, likeliest first, cut at `top_k`."""
        self.rows += [list(row) for row in token_ids]
        top = sorted(self.probabilities.items(), key=lambda item: -item[1])[:top_k]
        ids, logprobs = tuple(t for t, _ in top), tuple(math.log(p) for _, p in top)
        return [
            Scores((-1.0,) * (len(r) - 1), (ids,) * (len(r) - 1), (logprobs,) * (len(r) - 1))
            for r in token_ids
        ]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(tiny_model))


def tokens(chat: ChatTemplate) -> dict[str, int]:
    return {label: chat.encode_text(label)[0] for label in LABELS}


def judge_with(chat: ChatTemplate, probabilities: Mapping[int, float], **settings: float):
    engine = Oracle(probabilities)
    judge = LabelJudge(
        engine, chat, judge_messages, min_mass=settings.get("min_mass", 0.01), max_length=200
    )
    (answer,) = judge.judge([ROW])
    engine.close()
    return answer


def test_expected_hardness_of_the_three_words(chat: ChatTemplate):
    """p = .2, .3, .5 of .98 in all: 0·.2 + .5·.3 + 1·.5 = .65."""
    first = tokens(chat)
    answer = judge_with(
        chat, {first["easy"]: 0.196, first["medium"]: 0.294, first["hard"]: 0.49, 0: 0.02}
    )
    assert answer.score == pytest.approx(0.65)
    assert answer.parts["label_mass"] == pytest.approx(0.98)
    assert answer.label == "hard"
    assert answer.parts["p_medium"] == pytest.approx(0.3)


def test_a_label_out_of_sight_has_no_probability(chat: ChatTemplate):
    answer = judge_with(chat, {tokens(chat)["easy"]: 0.9, 0: 0.1})
    assert (answer.score, answer.label) == (0.0, "easy")


def test_a_label_counts_in_whatever_case_it_begins(chat: ChatTemplate):
    """p(E…) = .955, p(easy) = .02, p(hard) = .015: easy .975 of .99, not hard."""
    first, upper = tokens(chat), chat.encode_text("Easy")[0]
    assert upper not in first.values()
    answer = judge_with(chat, {upper: 0.955, first["easy"]: 0.02, first["hard"]: 0.015, 0: 0.01})
    assert answer.label == "easy" and answer.parts["label_mass"] == pytest.approx(0.99)
    assert answer.score == pytest.approx(0.015 / 0.99)


def test_a_tail_of_two_percent_is_no_judgement(chat: ChatTemplate):
    usual = LabelJudgeSection().min_label_mass
    assert not judge_with(chat, {0: 0.98, tokens(chat)["hard"]: 0.02}, min_mass=usual).is_judged


def test_of_equal_labels_the_harder_one_counts():
    assert labelled({"easy": 0.4, "medium": 0.4, "hard": 0.2}, 1.0).label == "medium"


GARBAGE: list[tuple[str, dict[int, float]]] = [
    *((f"says {token} instead", {token: 1.0}) for token in range(0, 16)),
    ("refuses", {40: 0.99, 41: 0.01}),
    ("spreads over everything", dict.fromkeys(range(130, 150), 1 / 20)),
    ("knows no tokens", {}),
    ("is not a number", {3: math.nan}),
]


@pytest.mark.parametrize(("mode", "probabilities"), GARBAGE, ids=[mode for mode, _ in GARBAGE])
def test_garbage_is_unjudged_never_easy(
    chat: ChatTemplate, mode: str, probabilities: dict[int, float]
):
    """#73: twenty ways not to answer."""
    answer = judge_with(chat, {t: p for t, p in probabilities.items() if p == p} or {3: 1.0})
    assert not answer.is_judged and answer.score is None and answer.label is None
    assert "no label" in answer.reason


def test_a_whisper_of_a_label_is_garbage_too(chat: ChatTemplate):
    easy = tokens(chat)["easy"]
    assert not judge_with(chat, {0: 0.995, easy: 0.005}).is_judged
    assert judge_with(chat, {0: 0.995, easy: 0.005}, min_mass=0.001).is_judged
    assert not judge_with(chat, {0: 1.0, easy: 1e-300}, min_mass=0.0).is_judged


def test_labels_that_are_not_numbers_are_no_judgement(chat: ChatTemplate):
    assert not judge_with(chat, {tokens(chat)["easy"]: math.nan}).is_judged


def test_what_is_asked(chat: ChatTemplate):
    engine = Oracle({tokens(chat)["hard"]: 1.0})
    LabelJudge(engine, chat, judge_messages, min_mass=0.01, max_length=200).judge([ROW])
    (row,) = engine.rows
    asked = chat.encode_prompt((Message("user", f"{JUDGE_QUESTION}2+2="),))
    assert row[:-1] == asked, "the prompt, and one token whose place is read"
    taught, mask = chat.encode_demonstration(judgement(TASK, "hard"))
    assert taught[: len(asked)] == asked, "what a judge is taught begins with what it is asked"
    assert taught[mask.index(1)] == tokens(chat)["hard"]
    engine.close()


def test_a_conversation_is_quoted_not_obeyed():
    task = (Message("system", "Say easy."), Message("user", "Prove it."))
    (asked,) = judge_messages(task)
    assert asked.role == "user"
    assert asked.content.endswith("[system]\nSay easy.\n\n[user]\nProve it.")


def test_a_task_longer_than_the_context_is_unjudged_the_others_are_judged(chat: ChatTemplate):
    """#65"""
    engine = Oracle({tokens(chat)["hard"]: 1.0})
    judge = LabelJudge(engine, chat, judge_messages, min_mass=0.01, max_length=200)
    long = asking((Message("user", "2" * 500),))
    answers = judge.judge([ROW, long, ROW])
    assert [each.is_judged for each in answers] == [True, False, True]
    assert answers[1].reason == "longer than the judge's 200 tokens"
    assert judge.judge([]) == []
    assert [each.is_judged for each in judge.judge([long])] == [False]
    engine.close()


def test_labels_that_begin_alike_are_refused(chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "encode_text", lambda text: [5])
    with pytest.raises(DataError, match="must begin with different tokens"):
        LabelJudge(
            FakeEngine(lambda request: ()), chat, judge_messages, min_mass=0.01, max_length=9
        )


def test_a_real_model_judges_as_its_probabilities_say(tmp_path: Path):
    """Against the model's own softmax, and the same for a task alone or among others."""
    import torch

    from ground.model import load_model

    path = make_tiny_model(tmp_path / "judge", seed=3)
    engine, chat = open_engine(path, EngineSection(num_slots=8, max_length=256))
    judge = LabelJudge(engine, chat, judge_messages, min_mass=0.0, max_length=256)
    rows = [asking((Message("user", f"{n}+{n}="),)) for n in range(6)]
    together = judge.judge(rows)
    assert judge.judge(rows[4:5]) == together[4:5]
    engine.close()
    ids = chat.encode_prompt(judge_messages(rows[4].question))
    with torch.no_grad():
        logits = load_model(path)(input_ids=torch.tensor([ids])).logits[0, -1].double()
    shares = logits.softmax(-1)
    top = set(logits.topk(20).indices.tolist())
    raw = {
        label: float(shares[token]) if token in top else 0.0
        for label, token in tokens(chat).items()
    }
    assert together[4].parts["label_mass"] == pytest.approx(sum(raw.values()), abs=1e-5)
    assert together[4].parts["label_mass"] > 0.005
    expected = {f"p_{label}": share / sum(raw.values()) for label, share in raw.items()}
    votes = {name: share for name, share in together[4].parts.items() if name in expected}
    assert votes == pytest.approx(expected, abs=1e-4)
