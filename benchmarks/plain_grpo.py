"""GRPO with TRL alone, for benchmarks/time_to_target.py: `-m benchmarks.plain_grpo WORK OUT`.

What a person would write who uses TRL's GRPOTrainer: prompts, a reward function, a config. Nothing
of ours is in the loop but the reward function itself, called in TRL's own process. Every few steps
the clock stops, the weights sit the same exam as ours do (benchmarks/exam.py), and the run ends as
soon as they reach its target.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.exam import Exam, Mark
from ground.config import Data
from ground.llama4 import apply_shims
from ground.model import tensors_of
from ground.tables import read_prompts
from rollout.rewards import Score, Turn, find_reward


class Clock(TrainerCallback):
    """Notes the seconds since the process was asked for, less those of exams and their making."""

    def __init__(self, began: float, exam: Exam, every: int, target: float, stopped: float) -> None:
        self._began, self._exam, self._every, self._target = began, exam, every, target
        self.stopped, self.marks, self.ends = stopped, list[Mark](), list[float]()

    @property
    def seconds(self) -> float:
        """Since the beginning, exams left out."""
        return time.time() - self._began - self.stopped

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Hold an exam where one is due; stop at the target."""
        self.ends.append(self.seconds)
        if state.global_step % self._every:
            return
        seconds, paused = self.seconds, time.time()
        rate = self._exam.rate(tensors_of(model))  # pyright: ignore[reportArgumentType]
        self.marks.append(Mark(state.global_step, seconds, rate))
        control.should_training_stop |= rate >= self._target
        self.stopped += time.time() - paused


def rewarded(
    prompts: Sequence[list[Turn]], completions: Sequence[list[Turn]], **columns: object
) -> list[float | None]:
    """The verifier that our reward processes call, as TRL wants it."""
    scores = find_reward("reasoning_gym")(prompts=prompts, completions=completions, **columns)
    return [each.reward if isinstance(each, Score) else float(each) for each in scores]


def main(work: Path, out: Path) -> None:
    """Train to the target, and leave the marks of all exams and the seconds of all steps."""
    given = json.loads(work.read_text())
    apply_shims()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given["model"])
    rows = [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
            "answer": prompt.answer,
        }
        for prompt in read_prompts(work.parent / given["prompts"], Data())
    ]
    paused = time.time()
    exam = Exam(Path(given["model"]), work.parent / given["heldout"], seed=given["seed"])
    torch.set_num_threads(given["threads"])  # the exam has its own wish
    stopped = time.time() - paused
    clock = Clock(given["began"], exam, given["evaluate_every"], given["target"], stopped)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32),
        args=_settings(given, out),
        reward_funcs=[rewarded],
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    exam.close()
    marks = [[mark.step, mark.seconds, mark.rate] for mark in clock.marks]
    flat = [each["frac_reward_zero_std"] for each in trainer.state.log_history if "reward" in each]
    out.write_text(json.dumps({"marks": marks, "ends": clock.ends, "flat": flat}))


def _settings(given: dict, out: Path) -> GRPOConfig:
    """TRL's defaults where both sides do not share a setting, but for what only suits GPUs."""
    shared = {
        "per_device_train_batch_size": given["rows_per_pass"],
        "gradient_accumulation_steps": given["rollouts_per_step"] // given["rows_per_pass"],
        "num_generations": given["group_size"],
        "max_completion_length": given["max_new_tokens"],
        "max_steps": given["steps"],
        "learning_rate": given["learning_rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": given["warmup_steps"],
        "adam_beta1": given["betas"][0],
        "adam_beta2": given["betas"][1],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "router_aux_loss_coef": 0.0,
        "seed": given["seed"],
    }
    quiet = {
        "output_dir": str(out.with_suffix("")),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return GRPOConfig(**{**shared, **quiet, **given["settings"]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
