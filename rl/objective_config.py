"""Settings of what a step of RL makes of rewards: advantages (rl/advantages.py) and a loss on them
(rl/objective.py)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ground.config import Section


def _kind(default: str) -> BeforeValidator:
    """A section without `kind` is of the default kind; the keys are then checked for that one."""
    return BeforeValidator(
        lambda value: {"kind": default, **value} if isinstance(value, dict) else value
    )


class BaselineAdvantages(Section):
    """Reward compared with its group's mean (rl/advantages.py)."""

    kind: Literal["centered", "batch_std", "group_std", "leave_one_out"] = "centered"
    """centered: no division (Dr.GRPO); batch_std: over the step's deviation (ScaleRL); group_std:
    over the group's own (GRPO); leave_one_out: against the mean of the others (RLOO)."""


class PassAtKAdvantages(Section):
    """What an answer adds to a set of k of which one must be right; from verdicts, not rewards."""

    kind: Literal["pass_at_k"]
    k: int = Field(default=4, ge=1)
    """Below group_size; 1 equals group_std of the verdicts."""


AdvantageSection = Annotated[
    BaselineAdvantages | PassAtKAdvantages, Field(discriminator="kind"), _kind("centered")
]


class IcePop(Section):
    """Drop tokens on which learner and sampler disagree too much (IcePop)."""

    low: float = Field(default=0.5, ge=0, lt=1)
    high: float = Field(default=5.0, gt=1)
    """Tokens with pi / mu outside low…high teach nothing."""


class PolicyLoss(Section):
    """What every policy loss can be combined with; all off by default."""

    icepop: IcePop | None = None
    sequence_mask: float | None = Field(default=None, gt=0)
    """Drop answers with a negative advantage whose mean log(mu / pi) is above this, e.g. 0.5."""
    reference_kl: float = Field(default=0.0, ge=0)
    """Weight of the KL to the model that the stage began with; above 0 the learner keeps a copy."""


class AipoLoss(PolicyLoss):
    """Truncated importance weights on every token (LlamaRL)."""

    kind: Literal["aipo"] = "aipo"
    rho_max: float = Field(default=4.0, ge=1)
    """Truncation of pi / mu; LlamaRL uses 2 to 10."""


class CispoLoss(PolicyLoss):
    """Importance weights clipped, not the tokens (MiniMax-M1)."""

    kind: Literal["cispo"]
    rho_max: float = Field(default=5.0, ge=1)
    rho_min: float = Field(default=0.0, ge=0, le=1)
    """Lower bound of pi / mu; 0 is none."""


class ClipLoss(PolicyLoss):
    """PPO's clip with two widths (DAPO); a clipped token has no gradient."""

    kind: Literal["clip"]
    low: float = Field(default=0.2, gt=0, le=1)
    high: float = Field(default=0.28, gt=0)


class DecoupledLoss(PolicyLoss):
    """PPO's clip around a proximal policy, weighted by proximal over sampler (AReaL)."""

    kind: Literal["decoupled"]
    low: float = Field(default=0.2, gt=0, le=1)
    high: float = Field(default=0.2, gt=0)
    weight_max: float = Field(default=2.0, ge=1)
    """Truncation of pi_prox / mu."""
    proximal: Literal["recompute", "interpolate"] = "recompute"
    """recompute: the learner at the start of the step, which takes one update, so that the clip
    never binds and the gradient is aipo's with rho_max = weight_max; interpolate: between sampler
    and learner by the token's age (A-3PO)."""


LossSection = Annotated[
    AipoLoss | CispoLoss | ClipLoss | DecoupledLoss, Field(discriminator="kind"), _kind("aipo")
]
