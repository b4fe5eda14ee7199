"""Settings of the `dpo` stage; light by default, because DPO can undo what RL has found."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from ground.config import Section
from ground.lora import LoraSection
from ground.trainer_config import TrainerSection
from rollout.quality import OUTLIER_RATIO, OUTLIER_TOKENS

Reason = Literal[
    "truncated",
    "repetition",
    "language_mix",
    "needless_refusal",
    "format_break",
    "length_outlier",
    "regression",
    "wrong",
]


class PairsSection(Section):
    """Which preferences are mined from the groups of the RL stage."""

    reasons: list[Reason] = Field(default_factory=lambda: list(get_args(Reason)))
    """What may be bad about a rejected answer; all but the last two are rules of its form, a
    `regression` is a failure where an earlier model had solved the prompt every time."""
    max_wrong_share: float = Field(default=0.25, ge=0, le=1)
    """Pairs that are only `wrong` are at most this share of all: being right is RL's business."""
    max_age: int = Field(default=20, ge=0)
    """Groups sampled up to this many versions before or after the base count as on-policy."""
    max_pairs: int = Field(default=512, ge=1)
    """At most so many, one per prompt, nearest first, capabilities in turn."""
    min_pairs: int = Field(default=8, ge=1)
    """With fewer there is nothing to learn, and the RL model goes on unchanged."""
    outlier_ratio: float = Field(default=OUTLIER_RATIO, gt=1)
    """A length outlier has more than so many times the tokens of the chosen answer, or, if it
    failed, the chosen one has so many times its tokens: it skipped the work."""
    outlier_tokens: int = Field(default=OUTLIER_TOKENS, ge=1)
    """… and differs from it by at least so many tokens."""


class DpoTrainerSection(TrainerSection):
    """As for SFT, with the two numbers of the loss."""

    learning_rate: float = Field(default=1e-6, gt=0)
    rows_per_step: int = Field(default=32, ge=1)
    """Pairs of an optimizer step."""
    rows_per_pass: int = Field(default=8, ge=1)
    """Pairs that one device holds at once."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the RL model."""
    nll_weight: float = Field(default=0.2, ge=0)
    """Weight of the log-likelihood of chosen answers (Llama 3 report, section 4.1.4)."""


class GateSection(Section):
    """How far the model may move; beyond it the RL model is exported, and the run says so."""

    max_kl: float = Field(default=0.05, gt=0)
    """Nats per token between the RL model and the new one, on the pairs' answers."""
    max_chosen_fall: float = Field(default=0.02, ge=0)
    """Nats per token by which chosen answers may become less likely."""


class DpoSection(Section):
    """Light DPO for corner cases of response quality."""

    pairs: PairsSection = PairsSection()
    trainer: DpoTrainerSection = DpoTrainerSection()
    gate: GateSection = GateSection()
    max_length: int = Field(default=2048, ge=8)
    """Longest prompt with answer in tokens; longer pairs are left out."""
    lora: LoraSection | None = None
    """Train a low-rank adapter and leave it beside the merged model; left out, all weights."""
