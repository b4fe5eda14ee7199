"""The herd's tasks with a teacher that is good at some, and students that learn from both.

    the shipped teacher ── sft on lessons ──▶ a teacher that is `poor` at one capability, where its
                                              answers are guessed, and `terse` at another, where
                                              it never thinks and is wrong half of the time
    the shipped student ── sft on few right demonstrations, and on that teacher, one way to weigh
                           after the other ──▶ loss on new demonstrations, pass@1 on new tasks

Everything is a stage of the product with its own recipe; which capabilities are spoiled follows
from the seed. Demonstrations are so few that they are seen several times.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from transformers import PreTrainedModel

from benchmarks.harness import ROOT
from distill.config import TargetsSection
from distill.fill import train as fill_targets
from ground.chat import ChatTemplate
from ground.config import Data
from ground.entry import stage_entry
from ground.herd.config import HerdSection
from ground.herd.corpus import Authors, Habits
from ground.herd.families import SOLVED
from ground.herd.files import data_files, demonstration_row, heldout_tasks
from ground.herd.tasks import Task, draw
from ground.logprobs import model_logprobs
from ground.model import load_model, load_tokenizer
from ground.records import LABELS
from ground.tables import read_demonstrations
from ground.training_rows import IGNORED, TrainingRow, encode_demonstrations
from rollout.config import EngineSection, SamplingSection
from rollout.engines import open_engine
from rollout.evaluation import measure as sample_and_score
from rollout.reward_pool import RewardPool
from sft.config import SftSection
from sft.train import train as train_sft

HERD = ROOT / "recipes" / "tiny" / "herd"
MAX_LENGTH = 256
CAPABILITIES = sorted({family.capability for family in SOLVED})
GOOD = Habits(think=0.9)
POOR = Habits(think=0.45, slip=(0.9, 0.9, 0.9), guess=(0.9, 0.9, 0.9))
TERSE = Habits(think=0.0, guess=(0.5, 0.5, 0.5))
USUAL = Habits(think=0.45)
"""As the shipped student was taught, but always right."""
_LESSONS = """
name: teacher
seed: {seed}
model: {{path: {model}}}
data: {{sft: {data}}}
sft:
  max_length: 256
  trainer: {{learning_rate: 1e-3, rows_per_step: 32, rows_per_pass: 32, max_steps: {steps}}}
"""
_STUDENT = """
name: student
seed: {seed}
model: {{path: {model}}}
teacher: {{path: {teacher}}}
data: {{sft: {data}}}
targets: {{max_length: 256, store: {store}}}
sft:
  max_length: 256
  distill: {{weighting: {weighting}}}
  trainer: {{learning_rate: 5e-4, rows_per_step: 32, rows_per_pass: 32, max_steps: {steps}}}
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How much work a world is.

    Example:
        Size(rows_per_level=20, lessons_per_level=40, tasks_per_level=8, steps=60, samples=4)
    """

    rows_per_level: int
    """Demonstrations of each family and level that students learn from."""
    lessons_per_level: int
    """Those that spoil the teacher."""
    tasks_per_level: int
    """New tasks, and new demonstrations."""
    steps: int
    """Of a student, and of the teacher's lessons."""
    samples: int
    """Answers to each new task."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model reaches on what it has not seen.

    Example:
        Outcome({"arithmetic": 0.31, …}, {"arithmetic": 0.62, …}).loss → the mean
    """

    losses: Mapping[str, float]
    """Nats a token of new demonstrations, by capability."""
    solved: Mapping[str, float]
    """pass@1 on new tasks, by capability."""

    @property
    def loss(self) -> float:
        """Each capability counts the same."""
        return fmean(self.losses.values())

    @property
    def pass_at_1(self) -> float:
        """Each capability counts the same."""
        return fmean(self.solved.values())


@dataclass(frozen=True, slots=True)
class World:
    """A teacher with its faults, and what students learn from and are measured by.

    Example:
        World.make(folder, seed=3, size=size).play("half", "{kind: static, share: 0.5}")
    """

    folder: Path
    seed: int
    size: Size
    poor: str
    """Capability at which the teacher guesses."""
    terse: str
    """Capability at which it never thinks."""

    @classmethod
    def make(cls, folder: Path, seed: int, size: Size) -> World:
        """Write the data, and have the teacher take its lessons."""
        poor, terse = Random(f"herd world {seed}").sample(CAPABILITIES, 2)
        world = cls(folder, seed, size, poor, terse)
        section = HerdSection.model_validate(
            {
                "demonstrations_per_level": size.rows_per_level,
                "heldout_per_level": size.tasks_per_level,
            }
        )
        (folder / "sft.jsonl").write_text(data_files(section, seed)["sft.jsonl"])
        habits = dict.fromkeys(CAPABILITIES, GOOD) | {poor: POOR, terse: TERSE}
        known = {task.question for task in world.tasks}
        lessons = [
            task for task in _drawn(size.lessons_per_level, seed) if task.question not in known
        ]
        Random(seed).shuffle(lessons)
        _write_answers(folder / "lessons.jsonl", lessons, habits)
        _write_answers(folder / "new.jsonl", world.tasks, dict.fromkeys(CAPABILITIES, USUAL))
        recipe = _LESSONS.format(
            seed=seed, model=HERD / "teacher", data=folder / "lessons.jsonl", steps=size.steps
        )
        world._run("teacher", recipe)
        return world

    @property
    def tasks(self) -> list[Task]:
        """What models are measured by; no model has seen them."""
        section = {"heldout_per_level": self.size.tasks_per_level}
        return heldout_tasks(HerdSection.model_validate(section))

    def play(self, name: str, weighting: str) -> Outcome:
        """Train a student with a weighting, as a recipe writes it, and measure it."""
        recipe = _STUDENT.format(
            seed=self.seed,
            model=HERD / "student",
            teacher=self.model("teacher"),
            data=self.folder / "sft.jsonl",
            store=self.folder / "store",
            weighting=weighting,
            steps=self.size.steps,
        )
        self._run(name, recipe, targets=True)
        return self.measured(self.model(name))

    def model(self, name: str) -> Path:
        """What was trained under a name."""
        return self.folder / name / "sft" / "model"

    def measured(self, path: Path) -> Outcome:
        """A model's loss on new demonstrations, and its answers to new tasks."""
        return Outcome(_losses(path, self.folder / "new.jsonl"), self._solved(path))

    def _solved(self, path: Path) -> dict[str, float]:
        """Each task is asked so many times, on the same sampling seeds for every model."""
        engine, chat = open_engine(path, EngineSection(num_slots=64, max_length=MAX_LENGTH))
        prompts = [task.prompt for task in self.tasks]
        sampling, size = SamplingSection(max_new_tokens=64), self.size
        try:
            with RewardPool(1, 30.0) as pool:
                found = sample_and_score(
                    engine, chat, prompts, pool, sampling, samples=size.samples, seed=self.seed
                )
        finally:
            engine.close()
        shares: dict[str, list[float]] = defaultdict(list)
        for each in found:
            shares[each.prompt.capability].append(each.successes / max(each.trials, 1))
        return {name: fmean(each) for name, each in sorted(shares.items())}

    def _run(self, name: str, recipe: str, *, targets: bool = False) -> None:
        """The stages of a recipe, in a run of that name; the store is shared by all of them.

        Raises:
            SystemExit: one of them failed.
        """
        path = self.folder / f"{name}.yaml"
        path.write_text(recipe)
        argv = [str(path), "--run", str(self.folder / name)]
        code = stage_entry("targets", TargetsSection, fill_targets, argv) if targets else 0
        code = code or stage_entry("sft", SftSection, train_sft, argv)
        if code:
            raise SystemExit(f"{path} ended with {code}")


def _drawn(per_level: int, seed: int) -> list[Task]:
    """Tasks of every family and level."""
    return [
        task
        for family in SOLVED
        for label in LABELS
        for task in islice(draw(family, label, seed, "lessons"), per_level)
    ]


def _write_answers(path: Path, tasks: Sequence[Task], habits: Mapping[str, Habits]) -> None:
    """A file of demonstrations by authors whose habits depend on the capability."""
    authors = {name: Authors(each, path.name, name) for name, each in habits.items()}
    rows = [demonstration_row(task, authors[task.capability].answer(task)) for task in tasks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _losses(path: Path, demonstrations: Path) -> dict[str, float]:
    """Cross-entropy of the answers, mean over the tokens of each capability."""
    model, chat = load_model(path), ChatTemplate(load_tokenizer(path))
    read = read_demonstrations(demonstrations, Data())
    losses: dict[str, list[float]] = defaultdict(list)
    for row in encode_demonstrations(read, chat, MAX_LENGTH).rows:
        losses[row.capability] += _row_losses(model, row)
    return {name: fmean(each) for name, each in sorted(losses.items())}


@torch.no_grad()
def _row_losses(model: PreTrainedModel, row: TrainingRow) -> list[float]:
    ids_1T = torch.tensor([row.input_ids])
    wanted_1T = torch.tensor([[label != IGNORED for label in row.labels]])
    logprobs_1T, _ = model_logprobs(model, ids_1T, torch.ones_like(ids_1T), wanted_BT=wanted_1T)
    return (-logprobs_1T[wanted_1T]).tolist()
