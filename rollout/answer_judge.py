"""A model as judge of answers: one number in [0, 1] for each, and nothing it could be talked into.

    answers ─▶ refused by rule: 0
           └─▶ cleaned, quoted, scored with canaries among them ─▶ probability, or unjudged

No token of the judge's is ever sampled, parsed or run: what is read are probabilities, so there is
no output to spoof. A judgement is a pure function of prompt, answer, settings and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ground.config import JudgeSettings
from ground.records import Prompt
from rollout.engine import Inference, PromptTooLong, Scores
from rollout.judge_canaries import Canary, Sung, canaries_of
from rollout.judge_guard import Cleaned, Refusal, clean, refusal
from rollout.judge_readers import LikelihoodReader, Reader, Reading, Row, VerdictReader
from rollout.reward_pool import UNJUDGED, ScoredText

if TYPE_CHECKING:
    from ground.chat import ChatTemplate


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdicts on a prompt's answers, in their order, and what came of the canaries.

    Example:
        Judged((ScoredText(0.93, True, {"judge": 0.93}), …), (Sung("colon", False, False), …))
    """

    verdicts: tuple[ScoredText, ...]
    canaries: tuple[Sung, ...] = ()


class AnswerJudge:
    """A judge behind an engine; may be asked from several threads at once.

    Args:
        secret: keys the marks that answers are quoted between.
    """

    def __init__(
        self, engine: Inference, chat: ChatTemplate, settings: JudgeSettings, secret: bytes
    ) -> None:
        self._engine, self._chat, self._settings = engine, chat, settings
        self._reader: Reader = (
            VerdictReader(chat, settings, secret)
            if settings.read == "verdict"
            else LikelihoodReader(chat)
        )

    def judge(self, prompt: Prompt, answers: Sequence[str]) -> Judged:
        """Verdicts on answers to one prompt.

        Raises:
            PromptTooLong: question and reference leave no room for an answer.
        """
        self._require_room(prompt)
        reference = clean(prompt.answer, self._chat).text
        cleaned = [self._clean(answer) for answer in answers]
        refused: list[Refusal | None] = [refusal(each.text, reference) for each in cleaned]
        watched = self._canaries(prompt, answers)
        asked = [each for each, why in zip(cleaned, refused, strict=True) if why is None]
        shown = dict.fromkeys([*asked, *(each for _, each in watched)])
        found = self._ask(prompt, list(shown))
        verdicts = [
            self._verdict(found[each]) if why is None else _refused(why)
            for each, why in zip(cleaned, refused, strict=True)
        ]
        sung = [
            Sung(canary.name, canary.is_right, self._verdict(found[each]).passed)
            for canary, each in watched
        ]
        return Judged(tuple(verdicts), tuple(sung))

    def _canaries(self, prompt: Prompt, answers: Sequence[str]) -> list[tuple[Canary, Cleaned]]:
        """Those that go with these answers, as they are shown; a reference that would be cut is
        none."""
        every, tells_right = self._settings.canary_every, self._reader.tells_right
        found = canaries_of(prompt, answers, every=every, tells_right=tells_right)
        shown = [(canary, self._clean(canary.answer)) for canary in found]
        return [(canary, cleaned) for canary, cleaned in shown if not cleaned.is_cut]

    def _clean(self, answer: str) -> Cleaned:
        return clean(answer, self._chat, self._settings.max_answer_tokens)

    def _ask(self, prompt: Prompt, answers: Sequence[Cleaned]) -> dict[Cleaned, Reading]:
        """Show each until it has a verdict or was shown often enough."""
        found: dict[Cleaned, Reading] = {}
        for ask in range(self._settings.asks):
            left = [a for a in answers if a not in found or not self._is_verdict(found[a])]
            found |= dict(zip(left, self._look(prompt, left, ask), strict=True))
        return found

    def _look(self, prompt: Prompt, answers: Sequence[Cleaned], ask: int) -> list[Reading]:
        rows = [self._reader.rows(prompt, answer, ask) for answer in answers]
        longest = self._settings.max_length
        lengths = [max((len(row.ids) for row in each), default=0) for each in rows]
        ids = [
            row.ids
            for each, length in zip(rows, lengths, strict=True)
            if length <= longest
            for row in each
        ]
        scores = iter(self._engine.score(ids, self._reader.top_k) if ids else [])
        return [
            self._reading(each, [next(scores) for _ in each])
            if length <= longest
            else Reading(0.0, mass=0.0, too_long=length)
            for each, length in zip(rows, lengths, strict=True)
        ]

    def _reading(self, rows: Sequence[Row], scores: Sequence[Scores]) -> Reading:
        """An answer in which there is nothing to read is a bad one."""
        return self._reader.read(rows, scores) if rows else Reading(0.0, mass=1.0)

    def _require_room(self, prompt: Prompt) -> None:
        """A long answer is cut and never the prompt's fault: what counts is the prompt alone."""
        settings = self._settings
        taken = self._reader.num_taken(prompt)
        if taken + settings.max_answer_tokens > settings.max_length:
            raise PromptTooLong(
                f"question and reference must leave {settings.max_answer_tokens} tokens for an "
                f"answer (judge.max_answer_tokens), they take {taken} of judge.max_length "
                f"({settings.max_length})",
                where=f"judge, prompt {prompt.id}",
                fix="raise judge.max_length, or lower judge.max_answer_tokens",
            )

    def _is_verdict(self, reading: Reading) -> bool:
        return reading.mass >= self._settings.min_mass  # NaN is none

    def _verdict(self, reading: Reading) -> ScoredText:
        if not self._is_verdict(reading):
            return ScoredText(0.0, False, error=f"{UNJUDGED}: {self._why(reading)}")
        p = reading.probability
        return ScoredText(p, p >= self._settings.pass_at, {"judge": p, "mass": reading.mass})

    def _why(self, reading: Reading) -> str:
        if reading.too_long:
            return (
                f"question, reference and answer take {reading.too_long} tokens, judge.max_length "
                f"is {self._settings.max_length}"
            )
        if self._settings.read == "likelihood":
            return "the judge's probabilities are no numbers"
        return f"yes and no have {reading.mass:.2g} of the judge's probability"


def _refused(why: Refusal) -> ScoredText:
    return ScoredText(0.0, False, {f"refused:{why}": 1.0})
