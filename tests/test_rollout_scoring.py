"""From completions to rollouts: what was said, what it is worth, where it stood."""

from __future__ import annotations

from pathlib import Path

import pytest

from ground.chat import ChatTemplate
from ground.model import load_tokenizer
from ground.records import Finish, Message, Prompt, Rollout, Segment
from rollout.config import SamplingSection
from rollout.engine import Completion
from rollout.evaluation import measure
from rollout.fake_engine import FakeEngine
from rollout.reward_pool import RewardPool, ScoredText
from rollout.scoring import rollouts_of, texts_of


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(tiny_model))


def completion(ids: list[int], finish: Finish) -> Completion:
    return Completion("a", Segment("policy", tuple(ids), (-0.5,) * len(ids)), finish)


@pytest.mark.parametrize(
    ("finish", "said"), [("stop", "=>3"), ("length", "=>3!"), ("aborted", "=>3!")]
)
def test_the_stop_id_is_not_said_though_it_be_plain_text(
    chat: ChatTemplate, finish: Finish, said: str
):
    """A stop id such as "!" is no special token, so that decoding alone would leave it in."""
    assert texts_of([completion(chat.encode_text("=>3!"), finish)], chat) == [said]


def test_each_completion_keeps_its_verdict():
    completions = [completion([5, 2], "stop"), completion([7, 8, 9], "length")]
    verdicts = [ScoredText(0.75, True, {"a": 1.0}), ScoredText(0.0, False, error="reward_died: x")]
    assert rollouts_of(completions, ["one", "two"], verdicts) == (
        Rollout(0, (completions[0].segment,), "one", "stop", 0.75, {"a": 1.0}, True),
        Rollout(1, (completions[1].segment,), "two", "length", error="reward_died: x"),
    )
    with pytest.raises(ValueError, match="shorter"):
        rollouts_of(completions, ["one", "two"], verdicts[:1])


def test_an_evaluation_leaves_the_stop_id_out_too(
    chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
):
    (full_stop,) = chat.encode_text("!")
    monkeypatch.setattr(chat, "stop_ids", (full_stop,))
    prompt = Prompt.make((Message("user", "3+0="),), capability="a", reward="exact", answer="3")
    engine = FakeEngine(lambda request: chat.encode_text("=>3!"))
    with RewardPool(1, 10.0) as pool:
        (measured,) = measure(
            engine, chat, [prompt], pool, SamplingSection(max_new_tokens=8), samples=1, seed=0
        )
    engine.close()
    assert (measured.rollouts[0].text, measured.successes) == ("=>3", 1)
