"""Weights on their way into vLLM: checked, named as in a checkpoint, and laid out in memory.

    published tensors → check (nothing changes yet) → a checkpoint's names → memory without a name

vLLM reads a checkpoint; the learner has what transformers made of one, which for some families has
experts fused that the checkpoint has apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from ground.errors import InfraError, SetupError
from ground.model import blank_model
from rollout.checksums import views
from rollout.hf_weights import check_weights
from rollout.layout import Layout
from rollout.shared_memory import SharedBuffer


class CheckpointForm:
    """What the tensors of a model folder are called, and of what shape and type they are.

    Example:
        form = CheckpointForm(path); form.check(weights); parcel = Laid(form.saved(weights))
    """

    def __init__(self, model_path: Path) -> None:
        self._blank = blank_model(model_path)

    @property
    def config(self) -> PretrainedConfig:
        """The model's config.json."""
        return self._blank.config

    @property
    def vocabulary(self) -> int:
        """Rows of the LM head."""
        return int(self.config.get_text_config().vocab_size)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit, as `hf` would."""
        check_weights(self._blank.state_dict(keep_vars=True), weights)

    def saved(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same under the names, and cut as, `save_pretrained` would write them."""
        return revert_weight_conversion(self._blank, dict(weights))


class Laid:
    """Tensors in memory of our own that processes of this machine may open, until `close`.

    Every hand-over has new memory: whatever still refers to an older one is never written to.

    Raises:
        InfraError: the machine has not that much memory left; another worker's may.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        layout = Layout.of(tensors)
        try:
            self._buffer = SharedBuffer(layout.size)
        except SetupError as error:
            raise InfraError(
                f"weights on their way to vLLM need {layout.size:,} bytes of shared memory besides "
                "those of the worker",
                where="vllm engine",
                why=error.why,
                fix="give the workers' machine more memory, or lower rl.fleet.num_workers",
            ) from error
        for name, place in views(layout, self._buffer.map()).items():
            place.copy_(tensors[name])
        self.size = layout.size
        self.places: dict[str, Any] = {
            name: (place.offset, place.shape, place.dtype) for name, place in layout.places.items()
        }

    @property
    def path(self) -> str:
        """Where other processes open it."""
        return self._buffer.path

    def close(self) -> None:
        """Give the memory back once nobody else has it."""
        self._buffer.close()
