"""The `herd` stage: `python -m ground.herd.train RECIPE`.

shipped student and teacher → copied          herd/student  herd/teacher
herd.rebuild=true           → trained anew         "             "
reasoning-gym               → written         herd/data/{sft,prompts,heldout}.jsonl
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ground.chat import ChatTemplate
from ground.console import progress
from ground.entry import Stage, stage_entry
from ground.errors import DataError
from ground.herd.config import HerdSection, Lessons, Shape
from ground.herd.files import data_files, heldout_tasks
from ground.herd.lessons import Course, teach
from ground.herd.shape import new_model
from ground.herd.tokenizer import build_tokenizer
from ground.leaving import leave
from ground.model import export_model
from ground.storage import commit_directory, verify_directory, write_file

_REPORT_EVERY = 20


def train(stage: Stage[HerdSection]) -> dict[str, object]:
    """Put both models and all data files into the stage's folder."""
    section, seed = stage.section, stage.head.seed
    models = (
        ("student", section.student, section.student_lessons),
        ("teacher", section.teacher, section.teacher_lessons),
    )
    for name, shape, lessons in models:
        if section.rebuild:
            _raise_model(stage, name, shape, lessons)
        else:
            _copy_model(_shipped(section) / name, stage.directory / name)
    files = data_files(section, seed)
    for name, content in files.items():
        (stage.directory / "data").mkdir(exist_ok=True)
        write_file(stage.directory / "data" / name, content)
    rows = {name: content.count("\n") for name, content in files.items()}
    return {"rebuilt": section.rebuild, "rows": rows}


def _shipped(section: HerdSection) -> Path:
    return section.shipped or Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "herd"


def _copy_model(source: Path, target: Path) -> None:
    """Copy a shipped model, file by file of its manifest, hashes checked."""
    if not source.is_dir():
        raise DataError(
            "the herd's shipped model is missing",
            where=str(source),
            fix="make it: python -m ground.herd.train recipes/tiny/recipe.yaml herd.rebuild=true",
        )
    manifest = verify_directory(source)
    with commit_directory(target, manifest.facts) as staging:
        for name in manifest.files:
            shutil.copyfile(source / name, staging / name)


def _raise_model(stage: Stage[HerdSection], name: str, shape: Shape, lessons: Lessons) -> None:
    """Train one model from nothing and export it in bfloat16."""
    seed, began = stage.head.seed, time.monotonic()
    tokenizer = build_tokenizer(shape.max_length)
    model = new_model(shape, tokenizer, seed)
    forbidden = {task.question for task in heldout_tasks(stage.section)}
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step % _REPORT_EVERY == 0 or step == lessons.steps:
            mean = sum(losses) / len(losses)
            losses.clear()
            stage.metrics.log(step, {"loss": mean}, model=name)
            progress(stage.directory, step, lessons.steps, loss=mean)

    teach(model, ChatTemplate(tokenizer), Course(lessons, forbidden, seed, name), lessons, report)
    facts = {
        "stage": "herd",
        "model": name,
        "seed": seed,
        "shape": shape.model_dump(),
        "lessons": lessons.model_dump(),
        "parameters": model.num_parameters(),
        "seconds": round(time.monotonic() - began),
        "licence": "Apache-2.0; trained from nothing on questions of reasoning-gym (Apache-2.0).",
    }
    with commit_directory(stage.directory / name, facts) as staging:
        export_model(model.bfloat16(), tokenizer, staging, facts)


if __name__ == "__main__":
    leave(stage_entry("herd", HerdSection, train))
