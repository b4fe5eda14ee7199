"""Settings of co-distillation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from ground.config import Section


class StaticShare(Section):
    """The same share of the soft target from the first step to the last."""

    kind: Literal["static"]
    share: float = Field(default=0.5, ge=0, le=1)
    """0: hard targets alone; 1: the teacher alone."""


class ScheduleShare(Section):
    """Warm-up, stable, decay over the steps of the run (arXiv 2410.16215)."""

    kind: Literal["schedule"]
    peak: float = Field(default=0.9, ge=0, le=1)
    """Share of the soft target in the stable part."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Part of the steps in which the share rises from 0 to the peak."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """Part of the steps, at the end, in which it falls back to 0."""

    @model_validator(mode="after")
    def _fit_into_the_run(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(
                "warmup and decay together must leave the run its length, got "
                f"{self.warmup} + {self.decay} > 1"
            )
        return self


class EntropyShare(Section):
    """More of the soft target where the teacher is unsure (arXiv 2509.01649)."""

    kind: Literal["entropy"]
    peak: float = Field(default=0.9, ge=0, le=1)
    """Share where the teacher's distribution is uniform over the vocabulary; 0 where it is sure."""


class AlignedShare(Section):
    """The share of each capability follows what held-out rows say of its teacher; the default.

    With `trust` above 0 the soft target wins where held-out rows cannot tell, for it carries no
    label noise.
    """

    kind: Literal["aligned"] = "aligned"
    start: float = Field(default=0.7, ge=0, le=1)
    """Share before anything was observed."""
    rate: float = Field(default=0.2, gt=0, le=1)
    """How far one observation moves a share at most."""
    memory: float = Field(default=0.7, ge=0, lt=1)
    """What an observation leaves of those before it in the averages that a share follows."""
    trust: float = Field(default=0.3, ge=0, le=1)
    """Added to the evidence, which is between -1 and 1, in the teacher's favour."""
    knots: tuple[float, ...] = (0.0, 1.0, 2.5)
    """Entropies of the teacher, in nats, that have shares of their own; between them shares lie on
    a line. A single knot keeps one share per capability."""
    low: float = Field(default=0.02, ge=0, le=1)
    """No share falls below this, so that the teacher is still heard when it gets better."""
    high: float = Field(default=0.98, ge=0, le=1)
    """No share rises above this."""
    every: int = Field(default=10, ge=1)
    """Steps between two observations."""
    labels_from: float = Field(default=0.1, ge=0, le=1)
    """How much the labels' gain counts against the teacher's in the first step; it rises to 1 in
    the last one. 1 asks for the better of the two from the beginning."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.low <= self.start <= self.high:
            raise ValueError(
                f"low <= start <= high must hold, got {self.low}, {self.start}, {self.high}"
            )
        if not self.knots or any(a >= b for a, b in pairwise(self.knots)):
            raise ValueError(f"knots must rise, at least one of them, got {list(self.knots)}")
        return self


class AlignedWeight(Section):
    """The weight of each capability follows how far its teacher agrees with the rewards
    (rl/agreement.py); the default in RL."""

    kind: Literal["aligned"] = "aligned"
    peak: float = Field(default=0.3, ge=0)
    """Weight of a teacher that agrees wholly, in the first step."""
    until: float = Field(default=1.0, gt=0, le=1)
    """Part of the steps in which the weight falls to 0: from there on the teacher is asked, its
    distance is logged, and rewards alone move the student."""
    memory: float = Field(default=0.8, ge=0, lt=1)
    """What a step leaves of those before it in the averages that the agreement is taken from."""


def _full(value: object) -> object:
    """`static` alone is the section with that kind; without a kind it is `aligned`."""
    if isinstance(value, str):
        return {"kind": str(value)}
    return {"kind": "aligned", **value} if isinstance(value, dict) else value


WeightingSection = Annotated[
    StaticShare | ScheduleShare | EntropyShare | AlignedShare,
    Field(discriminator="kind"),
    BeforeValidator(_full),
]
"""`weighting: aligned`, or with settings: `weighting: {kind: static, share: 0.9}`."""

WeightSection = Annotated[
    StaticShare | ScheduleShare | AlignedWeight,
    Field(discriminator="kind"),
    BeforeValidator(_full),
]
"""The same in RL, where there is no hard target: `share` and `peak` are the weight of the soft loss
beside the policy's. `entropy`, which trusts labels where the teacher is sure, has no meaning."""

FormatKind = Literal["full", "topk_tail", "sampled"]
DivergenceKind = Literal["forward", "reverse", "jsd"]


class WordSection(Section):
    """How much of what a teacher says is kept, and how it is asked."""

    format: FormatKind = "sampled"
    """`sampled`: the likeliest tokens, and draws from all others, which leaves no bias in the
    gradient. `topk_tail`: the likeliest tokens, and the mass of all others as one number; needed by
    divergences other than `forward`. `full`: everything, for small vocabularies only."""
    k: int = Field(default=32, ge=1)
    """Likeliest tokens that are kept, beside the realised one and those of `always`."""
    draws: int = Field(default=32, ge=1)
    """Draws that `sampled` makes among the others, for each token."""
    temperature: float = Field(default=1.0, gt=0)
    """Of teacher and student in the soft loss; above 1 it tells more of unlikely tokens."""
    always: list[str] = Field(default_factory=list)
    """Tokens that are kept whatever their probability, as the tokenizer writes them, such as
    `<|eot|>`. The realised token is always kept."""
    pass_tokens: int = Field(default=8192, ge=1)
    """Tokens of one pass of the teacher, padding included; rows of like length go together."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the teacher."""


class TargetsSection(WordSection):
    """What the teacher says to the rows that SFT will train on, kept in a store."""

    max_length: int = Field(default=2048, ge=8)
    """Longest conversation in tokens; at least `sft.max_length`."""
    store: Path | None = None
    """Folder that several runs share, so that no row is ever read twice; by default the run's own,
    `teacher-store`, which stays when the stage is made again."""


class DistillSection(Section):
    """Soft targets beside the hard ones: the stored word of the teacher on each trained token."""

    weighting: WeightingSection = AlignedShare()
    """How soft and hard target share a token."""
    as_arm: StrictBool = False
    """Teach a second student beside the one that learns from the rows alone: what is the teacher's
    word worth here? The trail goes on from the plain one. The other is the arm `taught`, in a
    folder of that name; `evaluate` measures both."""
    divergence: DivergenceKind = "forward"
    """`forward`: KL(teacher || student), which covers all that the teacher does. `reverse`:
    KL(student || teacher), which keeps to what it does most. `jsd`: between the two, see `beta`."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Of `jsd`: near 0 it is like `forward`, near 1 like `reverse` (arXiv 2306.13649)."""
    heldout_rows: int = Field(default=64, ge=1)
    """Rows that `aligned` keeps out of training to see where held-out loss falls, in proportion to
    the data: one of each capability at least, a tenth of its rows at most, so that a capability of
    fewer than 10 rows has none and keeps its share at `start`. Other weightings keep none."""
    signal_heldout: int = Field(default=32, ge=1)
    """Held-out rows that one observation reads, at least one of each capability: they take turns,
    since a share follows several observations anyway."""
    signal_rows: int = Field(default=16, ge=1)
    """Trained rows that it reads: the last ones, whose teacher is compared with the held-out."""


class RolloutDistillSection(WordSection):
    """The teacher's word on the student's own answers, beside their rewards: L_rl + w KL."""

    weighting: WeightSection = AlignedWeight()
    """Weight w of the soft loss: `aligned`, `static` or `schedule`."""
    divergence: DivergenceKind = "forward"
    """As in sft.distill; `reverse` is what on-policy distillation usually means."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Of `jsd`."""
    num_teachers: int = Field(default=1, ge=1)
    """Ray actors that hold the teacher, each whole on one device of its own."""
    cpus_per_teacher: float = Field(default=1, gt=0)
    """What Ray reserves for a teacher."""
    gpus_per_teacher: int = Field(default=0, ge=0, le=1)
    """1: each has a GPU of its own. 0: they compute on processors, also where there are GPUs."""
    speak_deadline_seconds: float = Field(default=120.0, gt=0)
    """For the word on one group; then the teacher is replaced and another one asked."""

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for a teacher, all of one machine."""
        gpus = {"GPU": float(self.gpus_per_teacher)} if self.gpus_per_teacher else {}
        return {"CPU": self.cpus_per_teacher, **gpus}

    @model_validator(mode="after")
    def _divergence_of_what_is_kept(self) -> Self:
        if self.format == "sampled" and self.divergence != "forward":
            raise ValueError(
                f"divergence '{self.divergence}' cannot be computed from sampled targets: set "
                "format to topk_tail, or the divergence to forward"
            )
        return self
