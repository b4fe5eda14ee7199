"""The work of `benchmarks/launchers.py` with TRL alone: `-m benchmarks.plain_sft WORK OUT`.

What a person would write who uses TRL's SFTTrainer under `accelerate launch`, with our rows and
settings and nothing of ours around it: no signals, no agreed stops, no checks, no checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ground.llama4 import apply_shims


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """See TrainerCallback."""
        self.ends.append(time.time())


def main(work: Path, out: Path) -> None:
    """Train, and leave the times at which steps ended."""
    given = json.loads(work.read_text())
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    apply_shims()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given["model"])
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(given["model"]),
        args=SFTConfig(
            output_dir=str(out.with_suffix("")),
            per_device_train_batch_size=given["rows_per_pass"],
            gradient_accumulation_steps=given["rows_per_step"]
            // (given["rows_per_pass"] * num_ranks),
            max_steps=given["steps"],
            learning_rate=given["learning_rate"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo" if "RANK" in os.environ else None,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(given["rows"]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        out.write_text(json.dumps(clock.ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
