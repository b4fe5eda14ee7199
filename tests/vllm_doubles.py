"""vLLM's workers without our remedies; a module of its own, since vLLM's process imports it."""

from __future__ import annotations

from rollout.vllm_worker import WeightTaker


class PacksExpertsOnce(WeightTaker):
    """As vLLM 0.32 is: experts stay packed as they were first loaded."""

    def forget_packed_experts(self) -> None:
        """Leave them."""


class PacksHeadsOnce(WeightTaker):
    """As vLLM 0.32 is: a head that is tied to the embeddings stays as it was first loaded."""

    def pack_heads(self) -> None:
        """Leave them."""
