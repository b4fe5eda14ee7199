"""The student's forward pass with the soft loss in it, for wrappers that hook into forward.

B sequences, T tokens, N trained tokens of a pass in the order of the mask.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from distill.loss import Divergence, soft_losses
from distill.targets import TeacherTargets
from ground.logprobs import LogprobModel, head_weight, spoken_logprobs
from ground.packing import hidden_states


class TaughtModel(LogprobModel):
    """`LogprobModel` that also tells how far the student is from its teacher.

    The backbone runs once for both. Under DDP everything that has a gradient must come out of one
    forward pass, so the soft loss is made here and not from hidden states outside.
    """

    def __init__(self, model: PreTrainedModel, divergence: Divergence) -> None:
        super().__init__(model)
        self._divergence = divergence

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor,
        wanted_BT: Tensor,
        temperature: float,
        said: TeacherTargets,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and entropies [B, T] as `model_logprobs` gives them; distances [N] in nats.

        Args:
            wanted_BT: the trained tokens, each of which has context.
            said: the teacher's word on them.
        """
        hidden_BTH = hidden_states(self.model, tokens_BT, segments_BT)
        head_VH = head_weight(self.model)
        logprobs_BT, entropy_BT = spoken_logprobs(
            hidden_BTH, head_VH, tokens_BT, segments_BT, temperature, wanted_BT
        )
        place_BT = wanted_BT[:, 1:].bool()
        soft_N = soft_losses(hidden_BTH[:, :-1][place_BT], head_VH, said, self._divergence)
        return logprobs_BT, entropy_BT, soft_N
