"""The `label` judge: the probabilities of the words easy, medium and hard.

    task → judging conversation → one forward pass → p(easy), p(medium), p(hard) → score

A word is read in whatever case the judge begins it, with a blank before it or none.

The three labels are those of the Llama 3 report (§4.2.3); reading their probabilities instead of
sampling them is ours: one pass gives what many votes would only approach. A judge that wants to
say something else than a label has not judged; such a row is `unjudged`, never easy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from curation.judge import Judgement, too_long
from curation.label_prompt import Ask
from ground.errors import DataError
from ground.records import LABELS, Demonstration, Label
from rollout.engine import Inference, Scores

if TYPE_CHECKING:
    from ground.chat import ChatTemplate

HARDNESS: Mapping[Label, float] = {"easy": 0.0, "medium": 0.5, "hard": 1.0}
_TOP = 20
"""Most likely tokens that are looked at; a label beyond them has no probability worth naming."""
_BATCH = 256


class LabelJudge:
    """A judge of words behind an engine.

    Args:
        ask: words the question (curation/label_prompt.py).
        min_mass: probability of the labels together below which an answer is garbage.
        max_length: longest judging prompt that the engine takes, less one.

    Raises:
        DataError: the tokenizer begins two of the labels with the same token, so that one pass
            cannot tell them apart.
    """

    def __init__(
        self,
        engine: Inference,
        chat: ChatTemplate,
        ask: Ask,
        *,
        min_mass: float,
        max_length: int,
    ) -> None:
        self._engine, self._chat, self._ask = engine, chat, ask
        self._min_mass, self._max_length = min_mass, max_length
        first: dict[Label, list[int]] = {label: _beginnings(label, chat) for label in LABELS}
        shared = Counter(token for tokens in first.values() for token in tokens)
        self._first: dict[Label, list[int]] = {
            label: [token for token in tokens if shared[token] == 1]
            for label, tokens in first.items()
        }
        if not all(self._first.values()):
            raise DataError(
                "easy, medium and hard must begin with different tokens, "
                f"got {list(first.values())}",
                where="judge",
                fix="judge with a model whose tokenizer tells them apart",
            )

    def judge(self, rows: Sequence[Demonstration]) -> list[Judgement]:
        """Judge the questions; one that does not fit the context is unjudged."""
        return [
            judgement
            for start in range(0, len(rows), _BATCH)
            for judgement in self._judge_batch(rows[start : start + _BATCH])
        ]

    def _judge_batch(self, rows: Sequence[Demonstration]) -> list[Judgement]:
        """Score each prompt with one label behind it: the top of that place is what we read."""
        placeholder = self._first["easy"][0]
        asked = [[*self._chat.encode_prompt(self._ask(row.question)), placeholder] for row in rows]
        fitting = [ids for ids in asked if len(ids) <= self._max_length]
        scores = iter(self._engine.score(fitting, top_k=_TOP) if fitting else [])
        return [
            self._read(_top_at_the_end(next(scores)))
            if len(ids) <= self._max_length
            else too_long(self._max_length)
            for ids in asked
        ]

    def _read(self, top: Mapping[int, float]) -> Judgement:
        """Label probabilities from the most likely tokens and their log-probs."""
        raw: dict[Label, float] = {
            label: math.fsum(math.exp(top[token]) for token in tokens if token in top)
            for label, tokens in self._first.items()
        }
        mass = math.fsum(raw.values())
        if not mass >= max(self._min_mass, 1e-12):
            return Judgement(
                parts={"label_mass": mass},
                reason=f"the judge's answer is no label (mass {mass:.2g})",
            )
        return labelled({label: p / mass for label, p in raw.items()}, mass)


def labelled(probabilities: Mapping[Label, float], mass: float) -> Judgement:
    """The judgement that probabilities over the three labels amount to.

    `score` is the expected hardness; `label` the likeliest one, the harder of equals.

    Args:
        probabilities: summing to 1.
        mass: probability of the three labels together among all answers.

    Example:
        p = {easy .2, medium .3, hard .5} → score 0.65, label "hard"
    """
    votes = {f"p_{label}": p for label, p in probabilities.items()}
    return Judgement(
        score=math.fsum(HARDNESS[label] * p for label, p in probabilities.items()),
        label=max(LABELS, key=lambda label: (probabilities[label], HARDNESS[label])),
        parts={**votes, "label_mass": mass},
    )


def _beginnings(label: Label, chat: ChatTemplate) -> list[int]:
    """First tokens of a label in each of its forms."""
    words = (label, label.capitalize(), label.upper())
    return sorted({chat.encode_text(blank + word)[0] for word in words for blank in ("", " ")})


def _top_at_the_end(scores: Scores) -> dict[int, float]:
    return dict(zip(scores.top_ids[-1], scores.top_logprobs[-1], strict=True))
