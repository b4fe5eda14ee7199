"""Settings of pruning, mining and the curriculum."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ground.config import Section
from rollout.config import EnginesSection, MeasureSection, SamplingSection

PRESETS = {"small": 0.5, "behemoth": 0.95}
"""What Meta reports removing: over half of the SFT data for small models, 95 % for Behemoth."""


def _a_label_unless_told(value: object) -> object:
    """A judge without `kind` is of kind label; the keys are then checked for that one."""
    return {"kind": "label", **value} if isinstance(value, dict) else value


class _Judge(Section):
    """What judges of all kinds are asked to keep to."""

    max_unjudged: float = Field(default=0.2, ge=0, le=1)
    """The stage stops when a larger share of the rows is left unjudged."""
    min_canaries: float = Field(default=0.8, ge=0, le=1)
    """The stage stops when the judge gets a smaller share of its canaries right: pairs of rows
    whose order is known (curation/canaries.py). A judge that guesses gets about half. At 0 they
    are asked and reported only."""


class LabelJudgeSection(_Judge):
    """The teacher's probabilities of the words easy, medium and hard."""

    kind: Literal["label"] = "label"
    wording: Literal["quoted", "bare"] = "quoted"
    """How it is asked. `quoted`: the task is cleaned, cut to fit and quoted between marks that it
    cannot know, and some canaries try to talk the judge into a label. `bare`: behind the question,
    as it stands, for a judge that was taught no other."""
    min_label_mass: float = Field(default=0.1, ge=0, le=1)
    """Probability of the three words together below which an answer is garbage: `unjudged`."""


class IfdJudgeSection(_Judge):
    """How little the question helps the teacher with the answer (arXiv 2308.12032): loss of the
    answer behind its question over its loss alone. Rows at 1 or above are misaligned and go first.
    """

    kind: Literal["ifd"]
    min_canaries: float = Field(default=0.7, ge=0, le=1)
    """As for all judges. Of 32 pairs from the data itself, in which an answer may by chance fit the
    question that it was swapped to; a judge that guesses reaches it once in a hundred times."""


class SolveRateJudgeSection(_Judge):
    """How seldom the teacher solves the row, by the row's own reward; rows without a checkable
    answer stay unjudged."""

    kind: Literal["solve_rate"]
    samples: int = Field(default=8, ge=1)
    """Completions per row."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the samples."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens of a completion at most; a row that leaves less room is unjudged."""
    reward_processes: int = Field(default=1, ge=1)
    """Killable verifier processes."""
    reward_deadline_seconds: float = Field(default=10.0, gt=0)
    """A verifier that takes longer is killed; the completion that did it counts as wrong."""

    @property
    def sampling(self) -> SamplingSection:
        """What is asked of the engine for each completion."""
        return SamplingSection(temperature=self.temperature, max_new_tokens=self.max_new_tokens)


JudgeSection = Annotated[
    LabelJudgeSection | IfdJudgeSection | SolveRateJudgeSection,
    Field(discriminator="kind"),
    BeforeValidator(_a_label_unless_told),
]
"""Scores of different kinds are not comparable (docs/pruning.md)."""


class DuplicatesSection(Section):
    """When two SFT rows are nearly the same (curation/duplicates.py)."""

    similarity: float = Field(default=0.8, gt=0, le=1)
    """Share of common shingles (Jaccard, as MinHash estimates it) from which on, of the questions
    and of the answers; 0.8 is that of Lee et al. (arXiv 2107.06499)."""
    words: int = Field(default=5, ge=1)
    """Words of a shingle; letters, in scripts without blanks."""


class CalibrationSection(Section):
    """Some of the rows are judged by other kinds too, to see whether they agree."""

    rows: int = Field(default=200, ge=8)
    """Chosen by lot; all of them where there are fewer."""
    judges: list[JudgeSection] = Field(
        default=[IfdJudgeSection(kind="ifd"), SolveRateJudgeSection(kind="solve_rate")],
        min_length=1,
    )
    """Of kinds other than `prune.judge`; what they think changes nothing but the report, so that
    they get no canaries, and may leave unjudged what they like."""

    @model_validator(mode="after")
    def _nothing_stops_them(self) -> Self:
        for judge in self.judges:
            fields = type(judge).model_fields
            ignored = [
                name
                for name, value in (
                    ("max_unjudged", judge.max_unjudged),
                    ("min_canaries", judge.min_canaries),
                )
                if value != fields[name].default
            ]
            if ignored:
                raise ValueError(
                    f"calibration.judges must not set {' or '.join(ignored)}: these stop the stage "
                    "for prune.judge alone, calibration only reports"
                )
        return self


class PruneSection(EnginesSection):
    """Remove the easiest part of the SFT data."""

    judge: JudgeSection = LabelJudgeSection()
    """Who says how hard an SFT row is: `kind` label, ifd or solve_rate."""
    fraction: float | Literal["small", "behemoth"] = Field(default=0.5)
    """Share of the whole set that is removed; `small` is 0.5, `behemoth` 0.95."""
    per: Literal["capability", "all"] = "capability"
    """Remove the same share of every capability, or the easiest rows wherever they are."""
    unjudged: Literal["proportional", "keep", "drop"] = "proportional"
    """What becomes of rows without a judgement: `proportional` takes the same share of them as of
    the judged ones, by lot; `keep` takes them last, `drop` first."""
    duplicates: DuplicatesSection | None = DuplicatesSection()
    """Of rows that are nearly the same, question and answer, the hardest stays in its place and the
    others go before the easiest; null looks for none."""
    calibration: CalibrationSection | None = None
    """Ask judges of other kinds about some rows, and report how far they agree; null asks none."""
    shard_size: int = Field(default=1024, ge=1)
    """Rows after which the judgements are committed; --resume goes on behind the last shard."""

    @model_validator(mode="after")
    def _a_share(self) -> Self:
        if not 0 <= self.share < 1:
            raise ValueError(f"fraction must be at least 0 and below 1, got {self.fraction}")
        return self

    @model_validator(mode="after")
    def _judges_fit_the_engine(self) -> Self:
        for judge in self.judges:
            if isinstance(judge, SolveRateJudgeSection):
                self.engine.require_room(judge.max_new_tokens, "judge.max_new_tokens")
                self.engine.require_temperature(judge.temperature, "judge.temperature")
        return self

    @model_validator(mode="after")
    def _each_kind_once(self) -> Self:
        kinds = [judge.kind for judge in self.judges]
        if len(set(kinds)) < len(kinds):
            raise ValueError(
                f"calibration.judges must be of other kinds than judge and differ, got {kinds}"
            )
        return self

    @property
    def judges(self) -> list[LabelJudgeSection | IfdJudgeSection | SolveRateJudgeSection]:
        """The judge that decides, and those that are compared with it."""
        return [self.judge, *(self.calibration.judges if self.calibration else ())]

    @property
    def share(self) -> Fraction:
        """The fraction as it is written: 0.95 is 19/20, not the float beside it."""
        return Fraction(str(PRESETS.get(str(self.fraction), self.fraction)))


class MineSection(MeasureSection):
    """Measure how often the model solves each RL prompt."""

    temperature: float = Field(default=1.0, gt=0)
    """Of the samples, as RL will draw them."""
    solved_at: float = Field(default=0.9, gt=0, le=1)
    """Pass rate from which a prompt counts as solved."""
    pilot: int | None = Field(default=None, ge=1)
    """Samples of every prompt in a first wave; those of which all were right, or none, get no more,
    but for `audit_share` of them. null, or no fewer than `samples`, takes all of all prompts."""
    audit_share: float = Field(default=0.1, gt=0, le=1)
    """Of the prompts that a pilot has settled, those that get all samples nevertheless: what they
    show keeps pass@k unbiased."""
    shard_size: int = Field(default=512, ge=1)
    """Prompts after which the work is committed; --resume goes on behind the last one."""


class CurriculumSection(Section):
    """How draws follow from pass rates."""

    order: Literal["chance", "target"] = "chance"
    """What a draw is weighed by. `chance`: that a group of the prompt would have a gradient.
    `target`: that its pass rate is close to one which falls while training goes on, so that the
    curriculum rises from easy to hard."""
    target_from: float = Field(default=0.75, gt=0, lt=1)
    """Pass rate that `target` aims at in the first version."""
    target_to: float = Field(default=0.30, gt=0, lt=1)
    """And in the last one; in between it goes evenly, by versions."""
    target_width: float = Field(default=0.2, gt=0)
    """Standard deviation of the bell around it, by which pass rates are weighed."""
    target_margin: float = Field(default=0.25, gt=0)
    """With `target`, prompts whose pass rate is further above it count as solved for now."""
    decay: float = Field(default=0.9, gt=0, le=1)
    """What a version leaves of older evidence: its policy is gone (MoPPS, arXiv 2507.04632). For
    what prompts do on their own; what they do together is `drift`."""
    drift: float = Field(default=0.2, ge=0)
    """Logits by which the pass rates of a capability may move together in a version, as a standard
    deviation: what is shown by some prompts is believed of all. 0 believes it of none."""
    retire_at: float = Field(default=0.9, gt=0, le=1)
    """A prompt with this pass rate or more is solved (ScaleRL, arXiv 2510.13786)."""
    review_share: float = Field(default=0.02, ge=0, lt=1)
    """Share of the draws that look again at solved prompts and at those never solved yet."""
    survey_groups: int = Field(default=0, ge=0)
    """Groups of a version that are only asked how hard their prompts are by now, those of the whole
    pool that were not observed for longest first; nobody trains on them. They are sampled where no
    draw wants a place. With max_staleness 0 their step waits for them; else what is not in when the
    step is ready is left out."""
    round_every: int = Field(default=10, ge=1)
    """Versions after which what is known of the prompts is written to rl/curriculum."""

    def target_at(self, progress: float) -> float:
        """The pass rate that `target` aims at after this share of the versions, 0 to 1.

        Example:
            0.75 → 0.30: target_at(1/3) == 0.6
        """
        return self.target_from + (self.target_to - self.target_from) * min(progress, 1.0)
