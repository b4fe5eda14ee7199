"""How far a teacher agrees with the rewards: does it like the rewarded answers better than we do?

    answers of a prompt ─▶ advantage A_i, lead_i ─▶ their correlation, per capability ─▶ weight w

The *lead* of an answer is the sum over its taught tokens of log t - log mu, for the teacher t and
the policy mu that has sampled it; A and lead are taken less their means over the group. Then

    agreement = average(A lead) / sqrt(average(A²) average(lead²))            between -1 and 1
    w         = peak * max(agreement, 0) * max(1 - step / (until * steps), 0)

with averages over all answers, those of earlier steps decaying with `memory`. In Fisher's metric it
is the cosine between the policy's gradient E[A grad log pi] and the step from student to teacher,
E[lead grad log pi]: above 0, to first order, to come nearer to the teacher raises the reward. It
asks no pass of any model: log t comes with the word, log mu with the answer.

*Teacher first.* The answers that teach are those of prompts at which the student is neither always
right nor always wrong. There a teacher goes on to know better after the student has left it behind
on all others, of which nothing is heard; so its weight falls with the steps as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import AlignedWeight


@dataclass(frozen=True, slots=True)
class Lead:
    """An answer as the agreement sees it.

    Example:
        Lead("math", "9c1f.0", advantage=1.0, nats=-0.7)
    """

    capability: str
    group: str
    advantage: float
    nats: float
    """By which the teacher likes it better than who has sampled it."""


class Agreement:
    """The weight of each capability's soft loss in RL; learns from every step's answers.

    Every rank is told the same answers.

    Example:
        two answers of a group, advantages 1 and -1, leads 0.2 and -0.2 → agreement 1,
        weight `peak` in the first step
    """

    def __init__(self, section: AlignedWeight, num_steps: int) -> None:
        self._section, self._num_steps = section, num_steps
        self._sums: dict[str, tuple[float, float, float]] = {}

    @property
    def by_capability(self) -> Mapping[str, float]:
        """The agreement as it stands; 0 where there is nothing to correlate."""
        return {
            name: product / math.sqrt(advantages * leads) if advantages * leads > 0 else 0.0
            for name, (product, advantages, leads) in self._sums.items()
        }

    def see(self, leads: Sequence[Lead]) -> None:
        """Take in a step's answers; those with numbers that are none are left out."""
        groups = defaultdict[tuple[str, str], list[Lead]](list)
        for lead in leads:
            if math.isfinite(lead.nats) and math.isfinite(lead.advantage):
                groups[lead.capability, lead.group].append(lead)
        found = defaultdict[str, list[tuple[float, float]]](list)
        for (name, _), group in groups.items():
            advantage = sum(each.advantage for each in group) / len(group)
            nats = sum(each.nats for each in group) / len(group)
            found[name] += [(each.advantage - advantage, each.nats - nats) for each in group]
        for name, pairs in found.items():
            new = (
                sum(a * b for a, b in pairs) / len(pairs),
                sum(a * a for a, _ in pairs) / len(pairs),
                sum(b * b for _, b in pairs) / len(pairs),
            )
            memory = self._section.memory if name in self._sums else 0.0
            old = self._sums.get(name, new)
            sums = tuple(memory * a + (1 - memory) * b for a, b in zip(old, new, strict=True))
            self._sums[name] = (sums[0], sums[1], sums[2])

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        """See `distill.weighting.Weighting`; 0 for a capability that nothing was heard of."""
        left = max(1 - step / (self._section.until * self._num_steps), 0.0)
        agreement = self.by_capability
        heard_B = [max(agreement.get(name, 0.0), 0.0) for name in capability_B]
        weight_B = self._section.peak * left * torch.tensor(heard_B).reshape(len(capability_B))
        return weight_B.to(supported_BT.device)[:, None] * supported_BT.float()

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        self._sums = {name: _sums_of(sums) for name, sums in state.items()}


def _sums_of(kept: object) -> tuple[float, float, float]:
    assert isinstance(kept, Sequence)
    product, advantages, leads = map(float, kept)
    return product, advantages, leads
