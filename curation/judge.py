"""A model as judge of difficulty: the probabilities of the words easy, medium and hard.

    task → judging conversation → one forward pass → p(easy), p(medium), p(hard) → score

The three labels are those of the Llama 3 report (§4.2.3); reading their probabilities instead of
sampling them is ours: one pass gives what many votes would only approach. A judge that wants to
say something else than a label has not judged; such a row is `unjudged`, never easy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ground.errors import DataError
from ground.judging import judge_messages
from ground.records import LABELS, Label, Message
from rollout.engine import Engine, Scores

if TYPE_CHECKING:
    from ground.chat import ChatTemplate

HARDNESS: Mapping[Label, float] = {"easy": 0.0, "medium": 0.5, "hard": 1.0}
_TOP = 20
"""Most likely tokens that are looked at; a label beyond them has no probability worth naming."""
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge thinks of one task.

    Example:
        p = {easy .2, medium .3, hard .5} → score 0.65, label "hard", mass .98 of all words
    """

    probabilities: Mapping[Label, float] = field(default_factory=dict)
    """Over the three labels, summing to 1; empty when unjudged."""
    mass: float = 0.0
    """Probability of the three labels together among all answers."""
    reason: str = ""
    """Why there is no judgement; empty when there is one."""

    @property
    def is_judged(self) -> bool:
        """False for garbage and for tasks that could not be asked."""
        return bool(self.probabilities)

    @property
    def score(self) -> float | None:
        """Expected hardness, 0 to 1; None when unjudged."""
        if not self.probabilities:
            return None
        return math.fsum(HARDNESS[label] * p for label, p in self.probabilities.items())

    @property
    def label(self) -> Label | None:
        """The likeliest label, the harder one of equals; None when unjudged."""
        if not self.probabilities:
            return None
        return max(LABELS, key=lambda label: (self.probabilities[label], HARDNESS[label]))


class LabelJudge:
    """A judge behind an engine.

    Args:
        min_mass: probability of the labels together below which an answer is garbage.
        max_length: longest judging prompt that the engine takes, less one.

    Raises:
        DataError: the tokenizer begins two of the labels with the same token, so that one pass
            cannot tell them apart.
    """

    def __init__(
        self, engine: Engine, chat: ChatTemplate, *, min_mass: float, max_length: int
    ) -> None:
        self._engine, self._chat = engine, chat
        self._min_mass, self._max_length = min_mass, max_length
        self._first: dict[Label, int] = {label: chat.encode_text(label)[0] for label in LABELS}
        if len(set(self._first.values())) < len(LABELS):
            raise DataError(
                "easy, medium and hard must begin with different tokens, "
                f"got {list(self._first.values())}",
                where="judge",
                fix="judge with a model whose tokenizer tells them apart",
            )

    def judge(
        self,
        tasks: Sequence[Sequence[Message]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Judgement]:
        """Judge tasks, in their order; one that does not fit the context is unjudged."""
        judgements: list[Judgement] = []
        for start in range(0, len(tasks), _BATCH):
            judgements += self._judge_batch(tasks[start : start + _BATCH])
            if progress is not None:
                progress(len(judgements), len(tasks))
        return judgements

    def _judge_batch(self, tasks: Sequence[Sequence[Message]]) -> list[Judgement]:
        """Score each prompt with one label behind it: the top of that place is what we read."""
        placeholder = self._first["easy"]
        rows = [[*self._chat.encode_prompt(judge_messages(task)), placeholder] for task in tasks]
        fitting = [row for row in rows if len(row) <= self._max_length]
        scores = iter(self._engine.score(fitting, top_k=_TOP) if fitting else [])
        return [
            self._read(_top_at_the_end(next(scores)))
            if len(row) <= self._max_length
            else Judgement(reason=f"longer than the judge's {self._max_length} tokens")
            for row in rows
        ]

    def _read(self, top: Mapping[int, float]) -> Judgement:
        """Label probabilities from the most likely tokens and their log-probs."""
        raw: dict[Label, float] = {
            label: math.exp(top[token]) if token in top else 0.0
            for label, token in self._first.items()
        }
        mass = math.fsum(raw.values())
        if not mass >= max(self._min_mass, 1e-12):
            return Judgement(mass=mass, reason=f"the judge's answer is no label (mass {mass:.2g})")
        shares: dict[Label, float] = {label: p / mass for label, p in raw.items()}
        return Judgement(shares, mass)


def _top_at_the_end(scores: Scores) -> dict[int, float]:
    return dict(zip(scores.top_ids[-1], scores.top_logprobs[-1], strict=True))
