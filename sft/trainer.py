"""The one place that knows TRL's SFTTrainer; held to what we assume by tests/test_sft_trainer.py.

TRL gets rows that are tokenised and labelled already. Its loss comes from hidden states in chunks,
so that no [B, T, V] tensor exists, and is divided by the trained tokens of the whole step, so that
it does not depend on how a step is split into passes.
"""

from __future__ import annotations

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ground.trainer_config import TrainerSection
from ground.training import FiniteLoss, Fit, Fitted, config_kept, fit, trainer_arguments
from ground.training_rows import TrainingRows

_FEATURES = Features({"input_ids": Sequence(Value("int64")), "labels": Sequence(Value("int64"))})


def run_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: TrainingRows,
    section: TrainerSection,
    where: Fit,
    *,
    seed: int,
    resume: bool,
) -> Fitted:
    """Train `model` in place."""
    arguments = trainer_arguments(
        section,
        num_rows=len(rows.rows),
        ranks=where.ranks,
        seed=seed,
        scratch=where.scratch,
    )
    with config_kept(model):
        trainer = _Sft(
            model=model,
            args=SFTConfig(
                **arguments,  # pyright: ignore[reportArgumentType]
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=_dataset(rows),
            processing_class=tokenizer,
        )
        return fit(trainer, where, resume=resume)


class _Sft(FiniteLoss, SFTTrainer):
    """SFTTrainer that stops at the first loss that is not finite."""


def _dataset(rows: TrainingRows) -> Dataset:
    columns = {
        "input_ids": [list(row.input_ids) for row in rows.rows],
        "labels": [list(row.labels) for row in rows.rows],
    }
    return Dataset.from_dict(columns, features=_FEATURES)
