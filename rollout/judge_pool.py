"""A judge in the process of a stage that measures a model by itself: `mine` and `evaluate`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ground.records import Prompt
from rollout.answer_judge import AnswerJudge
from rollout.engines import open_engine
from rollout.judge_canaries import Tally
from rollout.judge_reward import JUDGE
from rollout.judge_source import JudgeSource
from rollout.reward_pool import RewardPool, ScoredText, Verifier


class JudgedPool:
    """Prompts with `reward: judge` go to the judge, all others to the pool."""

    def __init__(self, pool: Verifier, judge: AnswerJudge, tally: Tally) -> None:
        self._pool, self._judge, self._tally = pool, judge, tally
        self._lock = threading.Lock()

    @property
    def num_processes(self) -> int:
        """Calls that can be under way at once."""
        return self._pool.num_processes

    def score(self, prompt: Prompt, texts: Sequence[str]) -> list[ScoredText]:
        """See `Verifier.score`.

        Raises:
            JudgeError: the judge fails its canaries, or gives no verdicts.
            PromptTooLong: question and reference are too long for it.
        """
        if prompt.reward != JUDGE:
            return self._pool.score(prompt, texts)
        judged = self._judge.judge(prompt, texts)
        with self._lock:
            self._tally.see(prompt.id, judged.verdicts, judged.canaries)
        return list(judged.verdicts)


@contextmanager
def beside_judge(pool: RewardPool, source: JudgeSource | None) -> Iterator[Verifier]:
    """The pool, with a judge beside it where one is wanted.

    It computes with as many threads as this process has: bits depend on them.
    """
    if source is None:
        yield pool
        return
    section = source.engine.model_copy(update={"threads": torch.get_num_threads()})
    engine, chat = open_engine(source.model, section)
    try:
        judge = AnswerJudge(engine, chat, source.settings, source.secret)
        yield JudgedPool(pool, judge, Tally(source.settings))
    finally:
        engine.close()
