"""What a judge is read for, without letting it write a word: two ways, one interface.

    verdict      [code …] question, reference, answer ─▶ p(yes), p(no) where its reply would begin
    likelihood   question, reasoning, "=>" ─▶ p(reference), p(the answer's own conclusion)

`verdict` needs a model that follows instructions. `likelihood` needs one that can solve the tasks
itself: reasoning is worth the probability of the reference behind it (VeriFree, arXiv 2505.21493;
RLPR, 2506.18254). That alone would pay for a wrong conclusion behind good reasoning, so here
the conclusion has to be likely as well, and the lower of the two counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

from ground.answers import before_answer, closing_of, final_answer
from ground.config import JudgeSettings
from ground.errors import DataError
from ground.judging import task_text
from ground.records import Prompt
from rollout.engine import Scores
from rollout.judge_guard import Cleaned, clean
from rollout.judge_prompt import NO, ORDERS, YES, Case, judging_messages

if TYPE_CHECKING:
    from ground.chat import ChatTemplate

_TOP = 20
"""Most likely tokens that are looked at; a verdict beyond them has no mass worth naming."""
_MERGED = 8
"""Tokens by which a text may be longer than its parts."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of one look at the judge.

    Example:
        p(yes) 0.72, p(no) 0.24 → Reading(probability=0.75, mass=0.96)
    """

    probability: float
    """That the answer agrees with the reference."""
    mass: float
    """Share of what the judge might say that is a verdict at all."""
    too_long: int = 0
    """Tokens that did not fit, so that nothing was read."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence to be scored.

    Example:
        Row([1, 17, 4, 88], num_read=1): the place where 88 stands is read
    """

    ids: list[int]
    num_read: int
    """Tokens at its end that matter."""


class Reader(Protocol):
    """A way to have an answer judged by forward passes alone."""

    top_k: int
    """Likeliest tokens that `read` needs at each place."""
    tells_right: bool
    """Whether a bare reference has to be accepted: then it serves as a canary."""

    def rows(self, prompt: Prompt, answer: Cleaned, ask: int) -> list[Row]:
        """Sequences that are to be scored for one answer; none where there is nothing to read."""
        ...

    def num_taken(self, prompt: Prompt) -> int:
        """Tokens of such a sequence that are not the answer's."""
        ...

    def read(self, rows: Sequence[Row], scores: Sequence[Scores]) -> Reading:
        """What the scores of these sequences say."""
        ...


class VerdictReader:
    """Reads how likely the judge's reply begins with yes and with no.

    Raises:
        DataError: the tokenizer begins both words with the same token.
    """

    top_k = _TOP
    tells_right = True

    def __init__(self, chat: ChatTemplate, settings: JudgeSettings, secret: bytes) -> None:
        self._chat, self._secret = chat, secret
        self._orders = ORDERS if settings.both_orders else ORDERS[:1]
        yes, no = ({chat.encode_text(word)[0] for word in words} for words in (YES, NO))
        self._yes, self._no = yes - no, no - yes
        if not self._yes or not self._no:
            raise DataError(
                "yes and no must begin with different tokens",
                where="judge",
                fix="judge with a model whose tokenizer tells them apart",
            )

    def rows(self, prompt: Prompt, answer: Cleaned, ask: int) -> list[Row]:
        """A judging conversation in each order, with a word in the place that is read."""
        case = Case(
            clean(task_text(prompt.messages), self._chat).text,
            clean(prompt.answer, self._chat).text,
            answer.text,
            answer.is_cut,
        )
        placeholder = min(self._yes)
        talks = [judging_messages(case, order, self._secret, ask) for order in self._orders]
        return [Row([*self._chat.encode_prompt(talk), placeholder], num_read=1) for talk in talks]

    def num_taken(self, prompt: Prompt) -> int:
        """Everything around the longest answer, and a little more: at its ends tokens merge."""
        around = self.rows(prompt, Cleaned("", is_cut=True), 0)
        return max(len(row.ids) for row in around) + _MERGED

    def read(self, rows: Sequence[Row], scores: Sequence[Scores]) -> Reading:
        """The order that thinks less of the answer, and the smaller mass."""
        read = [
            self._one(dict(zip(s.top_ids[-1], s.top_logprobs[-1], strict=True))) for s in scores
        ]
        return Reading(min(each.probability for each in read), min(each.mass for each in read))

    def _one(self, top: dict[int, float]) -> Reading:
        yes, no = (
            math.fsum(math.exp(top[token]) for token in sorted(words) if token in top)
            for words in (self._yes, self._no)
        )
        mass = yes + no
        return Reading(yes / mass, mass) if mass > 0 else Reading(0.0, 0.0)  # NaN is no mass


class LikelihoodReader:
    """Reads how likely reference and conclusion are behind the answer's reasoning."""

    top_k = 0
    tells_right = False

    def __init__(self, chat: ChatTemplate) -> None:
        self._chat = chat

    def rows(self, prompt: Prompt, answer: Cleaned, ask: int) -> list[Row]:
        """Question and reasoning, ended by the reference and by the answer's own conclusion."""
        reasoning, conclusion = before_answer(answer.text), final_answer(answer.text)
        if not reasoning or not conclusion:
            return []
        head = [*self._chat.encode_prompt(prompt.messages), *self._chat.encode_text(reasoning)]
        reference = clean(prompt.answer, self._chat).text
        ends = [self._end(each, closing_of(reasoning)) for each in (reference, conclusion)]
        return [Row([*head, *end], num_read=len(end)) for end in ends]

    def num_taken(self, prompt: Prompt) -> int:
        """Question, reference and what ends it."""
        reference = clean(prompt.answer, self._chat).text
        question = self._chat.encode_prompt(prompt.messages)
        return len(question) + len(self._chat.encode_text(reference)) + 1 + _MERGED

    def _end(self, answer: str, closing: str) -> list[int]:
        """The answer with what shows that it is whole: its brace is closed, or the turn ends."""
        if closing:
            return self._chat.encode_text(answer + closing)
        return [*self._chat.encode_text(answer), self._chat.end_of_turn]

    def read(self, rows: Sequence[Row], scores: Sequence[Scores]) -> Reading:
        """The lower of the two, each as the geometric mean of its tokens' probabilities."""
        means = [
            math.exp(fmean(each.logprobs[-row.num_read :]))
            for row, each in zip(rows, scores, strict=True)
        ]
        return Reading(min(means), mass=float(all(map(math.isfinite, means))))
