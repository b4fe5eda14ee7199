"""How far DPO has moved the model, and whether that is still light.

All figures are in nats per token, over the tokens of the pairs' answers. Those answers come from
the RL model, but the best and worst of each group were picked, so the divergence is an indication,
not an unbiased estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from dpo.config import GateSection
from dpo.data import PairLogprobs


@dataclass(frozen=True, slots=True)
class GateFigures:
    """What changed between the RL model and the new one."""

    chosen_change: float
    """Log-prob of chosen answers' tokens, after minus before."""
    rejected_change: float
    kl: float
    """KL(RL model ‖ new model) by the K3 estimator, exp(d) - 1 - d with d = after - before."""
    preferred: float
    """Share of pairs whose length-normalised margin has grown."""

    def numbers(self) -> dict[str, float]:
        """For metrics and the manifest."""
        return asdict(self)


def gate_figures(before: Sequence[PairLogprobs], after: Sequence[PairLogprobs]) -> GateFigures:
    """Compare log-probs of the same answers under two models.

    Example:
        one chosen token -1.0 → -0.9 and one rejected -1.0 → -1.2: changes +0.1, -0.2, kl 0.0120
    """
    chosen = [new.chosen - old.chosen for old, new in zip(before, after, strict=True)]
    rejected = [new.rejected - old.rejected for old, new in zip(before, after, strict=True)]
    change = torch.cat([*chosen, *rejected])
    margins = [c.mean() > r.mean() for c, r in zip(chosen, rejected, strict=True)]
    return GateFigures(
        chosen_change=torch.cat(chosen).mean().item(),
        rejected_change=torch.cat(rejected).mean().item(),
        kl=(change.exp() - 1 - change).mean().item(),
        preferred=sum(map(bool, margins)) / len(margins),
    )


def objection(figures: GateFigures, section: GateSection) -> str:
    """Why the new model must not be exported; empty when it may."""
    if not figures.kl <= section.max_kl:
        return (
            f"the model moved {figures.kl:.4f} nats per token from the RL model, "
            f"more than dpo.gate.max_kl {section.max_kl}"
        )
    if not figures.chosen_change >= -section.max_chosen_fall:
        return (
            f"chosen answers became {-figures.chosen_change:.4f} nats per token less likely, "
            f"more than dpo.gate.max_chosen_fall {section.max_chosen_fall}"
        )
    return ""
