"""The one place that knows TRL's DPOTrainer; held to what we assume by tests/test_dpo_trainer.py.

TRL gets token ids and the reference's log-probs ready made, so it neither tokenises nor keeps a
second model. The loss is TRL's `sigmoid_norm` and `sft` (Llama 3 report, section 4.1.4):

    -log sigmoid(β (Δ_chosen / |chosen| - Δ_rejected / |rejected|)) + w · NLL(chosen)

with Δ the change of an answer's log-prob against the RL model.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from dpo.config import DpoTrainerSection
from dpo.data import EncodedPair, PairLogprobs
from ground.stage_export import config_kept
from ground.training import FiniteLoss, Fit, Fitted, fit, trainer_arguments

_FEATURES = Features(
    {
        "prompt_ids": Sequence(Value("int64")),
        "chosen_ids": Sequence(Value("int64")),
        "rejected_ids": Sequence(Value("int64")),
        "ref_chosen_logps": Value("float32"),
        "ref_rejected_logps": Value("float32"),
    }
)


def run_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Rows[EncodedPair],
    reference: Rows[PairLogprobs],
    section: DpoTrainerSection,
    where: Fit,
    *,
    seed: int,
    resume: bool,
) -> Fitted:
    """Train `model` in place.

    Args:
        reference: log-probs of the pairs' answers under the model that training started from.
    """
    arguments = trainer_arguments(
        section,
        num_rows=len(pairs),
        ranks=where.ranks,
        seed=seed,
        scratch=where.scratch,
    )
    with config_kept(model):
        trainer = _Dpo(
            model=model,
            args=DPOConfig(
                **arguments,  # pyright: ignore[reportArgumentType]
                beta=section.beta,
                loss_type=["sigmoid_norm", "sft"],
                loss_weights=[1.0, section.nll_weight],
                precompute_ref_log_probs=True,
                max_length=None,
            ),
            train_dataset=_dataset(pairs, reference),
            processing_class=tokenizer,
        )
        return fit(trainer, where, resume=resume)


class _Dpo(FiniteLoss, DPOTrainer):
    """DPOTrainer over rows that are complete, stopping at the first loss that is not finite."""

    def _prepare_dataset(self, dataset: Dataset, *args: object, **kwargs: object) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: object, **kwargs: object) -> Dataset:
        return dataset


def _dataset(pairs: Rows[EncodedPair], reference: Rows[PairLogprobs]) -> Dataset:
    columns = {
        "prompt_ids": [list(pair.prompt_ids) for pair in pairs],
        "chosen_ids": [list(pair.chosen_ids) for pair in pairs],
        "rejected_ids": [list(pair.rejected_ids) for pair in pairs],
        "ref_chosen_logps": [logprobs.chosen.sum().item() for logprobs in reference],
        "ref_rejected_logps": [logprobs.rejected.sum().item() for logprobs in reference],
    }
    return Dataset.from_dict(columns, features=_FEATURES)
