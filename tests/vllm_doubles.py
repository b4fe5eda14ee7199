"""vLLM's workers without our remedies, or failing; a module that vLLM's process can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from rollout.vllm_worker import WeightTaker


class PacksExpertsOnce(WeightTaker):
    """As vLLM 0.32 is: experts stay packed as they were first loaded."""

    def forget_packed_experts(self) -> None:
        """Leave them."""


class PacksHeadsOnce(WeightTaker):
    """As vLLM 0.32 is: a head that is tied to the embeddings stays as it was first loaded."""

    def pack_heads(self) -> None:
        """Leave them."""


class DiesAtLast(WeightTaker):
    """Its process is killed when the model is there and all but one step of the start is done."""

    def put_away_rendezvous(self) -> None:
        """The end."""
        os.kill(os.getpid(), signal.SIGKILL)


class FailsInTheMiddle(WeightTaker):
    """Weights arrive, and something fails before they can be used."""

    def take_weights(self, path: str, size: int, places: Mapping[str, Any]) -> None:
        """Take some."""
        super().take_weights(path, size, places)
        raise RuntimeError("half of them")


class TakesLong(WeightTaker):
    """Loading takes longer than anybody waits."""

    def take_weights(self, path: str, size: int, places: Mapping[str, Any]) -> None:
        """Take them late."""
        time.sleep(5)
        super().take_weights(path, size, places)
