"""The `ifd` judge: how much a question helps with its answer (arXiv 2308.12032).

    loss(A | Q): mean -log p of the answer's tokens behind the question
    loss(A):     the same behind an empty question
    IFD = loss(A | Q) / loss(A)

A question that gives its answer away has an IFD near 0: there is little to learn. Near 1 the
answer is as surprising as without the question, so following it has to be learned. From 1 on the
question makes the answer *less* likely: the two do not belong together, the row is misaligned.

The answer is the last assistant turn with the token that ends it, as SFT trains on it. What stands
in for "no question" is ours: an empty message of the user in the model's own template, so that the
ratio is about the question and not about a conversation without a beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from curation.judge import Judgement, too_long
from ground.records import Demonstration, Message
from rollout.engine import Inference, Scores

if TYPE_CHECKING:
    from ground.chat import ChatTemplate

_NOTHING = Message("user", "")
_LEAST_LOSS = 1e-6
"""Nats: an answer that is certain without its question has no ratio to speak of."""
_BATCH = 128


class IfdJudge:
    """A judge that reads the answers behind an engine.

    Args:
        max_length: longest conversation that the engine takes.
    """

    def __init__(self, engine: Inference, chat: ChatTemplate, *, max_length: int) -> None:
        self._engine, self._chat, self._max_length = engine, chat, max_length

    def judge(self, rows: Sequence[Demonstration]) -> list[Judgement]:
        """Judge the pairs; one that does not fit the context is unjudged."""
        return [
            judgement
            for start in range(0, len(rows), _BATCH)
            for judgement in self._judge_batch(rows[start : start + _BATCH])
        ]

    def _judge_batch(self, rows: Sequence[Demonstration]) -> list[Judgement]:
        pairs = [
            [
                self._chat.encode_demonstration(messages)
                for messages in (row.messages, (_NOTHING, row.messages[-1]))
            ]
            for row in rows
        ]
        fits = [max(len(ids) for ids, _ in pair) <= self._max_length for pair in pairs]
        fitting = [ids for pair, fit in zip(pairs, fits, strict=True) if fit for ids, _ in pair]
        scores = iter(self._engine.score(fitting) if fitting else [])
        return [
            judged(*(_answer_loss(next(scores), mask) for _, mask in pair))
            if fit
            else too_long(self._max_length)
            for pair, fit in zip(pairs, fits, strict=True)
        ]


def judged(loss: float, loss_alone: float) -> Judgement:
    """The judgement that two mean losses amount to; `score` is the IFD, 1 at most.

    Example:
        judged(0.6, 1.5) → score 0.4;  judged(1.8, 1.5) → IFD 1.2, score 1, misaligned
    """
    parts = {"loss": loss, "loss_alone": loss_alone}
    if not (math.isfinite(loss) and math.isfinite(loss_alone)):
        return Judgement(reason="the judge's losses are not finite")
    if loss_alone < _LEAST_LOSS:
        return Judgement(parts=parts, reason="the answer is certain without its question")
    ifd = loss / loss_alone
    return Judgement(min(ifd, 1.0), None, {**parts, "ifd": ifd}, is_misaligned=ifd >= 1.0)


def _answer_loss(scores: Scores, mask: Sequence[int]) -> float:
    """Mean -log p over the last trained stretch of a conversation."""
    end = len(mask) - mask[::-1].index(1)
    start = end
    while start and mask[start - 1]:
        start -= 1
    answer = scores.logprobs[start - 1 : end - 1]  # the first token has no log-prob
    return -math.fsum(answer) / len(answer)
