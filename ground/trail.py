"""Where a stage finds its inputs: the last finished stage before it, else the recipe's own path.

A stage that the recipe does not turn on counts as absent, whatever an older recipe left of it.

    herd → prune → targets → sft → mine → rl → dpo         (evaluate follows base, sft, rl, dpo,
                          ↘ taught                          and the arm, which comes last)

What a stage of ours made is verified against its manifest before its path is given out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ground.config import ARMS, STAGES, Head
from ground.errors import DataError, RecipeError
from ground.manifest import read_manifest
from ground.run import RunDir
from ground.storage import verify_directory, verify_file

PLACES = ("base", "sft", "taught", "rl", "dpo")
"""Models that can be evaluated."""

_MODELS = {"herd": "student", "sft": "model", "rl": "model", "dpo": "model"}
_DEMONSTRATIONS = {"herd": "data/sft.jsonl", "prune": "kept.parquet"}
_GROUPS = "groups/"
_PROMPTS = {"herd": "data/prompts.jsonl", "mine": "prompts.parquet"}


@dataclass(frozen=True)
class Trail:
    """The inputs of the stages of one run.

    Example:
        Trail(head, run, ("herd", "sft", "rl")).model_before("rl") → runs/tiny/sft/model once sft is
        done, runs/tiny/herd/student before that, head.model.path without a herd
    """

    head: Head
    run: RunDir
    stages: tuple[str, ...]
    """Those that the recipe turns on, arms among them."""

    def model_before(self, stage: str) -> Path:
        """The model that `stage` starts from."""
        own = self.head.model.path if self.head.model else None
        return self._made_before(stage, _MODELS) or _given("model", "model.path", own)

    def model_of(self, place: str) -> Path:
        """The model to evaluate at one of `PLACES`.

        Raises:
            RecipeError: there is no such place, or its stage is off or not finished.
        """
        if place not in PLACES:
            raise RecipeError(f"a model to evaluate is one of {', '.join(PLACES)}, got '{place}'")
        if place == "base":
            return self.model_before("prune")
        arm = ARMS.get(place)
        stage = arm.stage if arm else place
        if place not in self.stages:
            on = f"set {arm.switch}: true" if arm else f"give the recipe a section '{stage}'"
            raise RecipeError(
                f"stage {place} is off, so there is no model of it to evaluate",
                where=str(self.run.path),
                fix=f"{on}, or evaluate another model",
            )
        if not self.run.is_done(place):
            again = f"python -m {stage}.train RECIPE" + f" --as {place}" * bool(arm)
            raise RecipeError(
                f"stage {place} is not finished, so its model cannot be evaluated",
                where=str(self.run.path),
                fix=f"run the stage first: {again}",
            )
        return self._verified(place, _MODELS[stage])

    def teacher(self) -> Path:
        """The model that judges and teaches."""
        own = self.head.teacher.path if self.head.teacher else None
        made = self._made_before("prune", {"herd": "teacher"})
        return made or _given("teacher", "teacher.path", own)

    def demonstrations_before(self, stage: str) -> Path:
        """The SFT rows that `stage` reads."""
        made = self._made_before(stage, _DEMONSTRATIONS)
        return made or _given("demonstrations", "data.sft", self.head.data.sft)

    def prompts_before(self, stage: str) -> Path:
        """The RL prompts that `stage` reads."""
        made = self._made_before(stage, _PROMPTS)
        return made or _given("prompts", "data.prompts", self.head.data.prompts)

    def targets(self) -> Path:
        """The note of where the teacher's stored targets are (distill/plan.py).

        Raises:
            RecipeError: the stage `targets` is off or not finished.
        """
        made = self._made_before("sft", {"targets": "targets.json"})
        if made is None:
            raise RecipeError(
                "no stored targets: the stage targets is off or not finished",
                where=str(self.run.path),
                fix="give the recipe a section 'targets', and run the stage first: "
                "python -m distill.fill RECIPE",
            )
        return made

    def heldout(self) -> Path:
        """The prompts of evaluations, which nothing trains on."""
        made = self._made_before("prune", {"herd": "data/heldout.jsonl"})
        return made or _given("held-out prompts", "data.heldout", self.head.data.heldout)

    def groups(self) -> tuple[list[Path], int]:
        """The groups that RL left, a file a step, and the version that it exported as its model.

        No files and version 0 when rl is off or not finished.
        """
        if not self._has_made("rl"):
            return [], 0
        manifest, folder = self.run.manifest("rl"), self.run.stage("rl")
        names = sorted(name for name in manifest.files if name.startswith(_GROUPS))
        version = read_manifest(folder / _MODELS["rl"]).facts.get("version")
        if not isinstance(version, int):
            raise DataError(
                f"the manifest must say the model's version, got {version!r}",
                where=str(folder / _MODELS["rl"]),
                fix="make the stage again: packtrain run RECIPE --from rl",
            )
        return [verify_file(folder, name, manifest) for name in names], version

    def _has_made(self, stage: str) -> bool:
        return stage in self.stages and self.run.is_done(stage)

    def _made_before(self, stage: str, makers: dict[str, str]) -> Path | None:
        for earlier in reversed(STAGES[: STAGES.index(stage)]):
            if earlier in makers and self._has_made(earlier):
                return self._verified(earlier, makers[earlier])
        return None

    def _verified(self, stage: str, name: str) -> Path:
        folder = self.run.stage(stage)
        if (folder / name).is_dir():
            verify_directory(folder / name)
            return folder / name
        return verify_file(folder, name)


def made_twice(head: Head, stages: Sequence[str]) -> list[str]:
    """Complaints about inputs that the recipe names although its `herd` makes them.

    Example:
        herd and data.sft → ["data.sft stands beside herd, which makes its own: …"]
    """
    if "herd" not in stages:
        return []
    named = {
        "model": head.model,
        "teacher": head.teacher,
        "data.sft": head.data.sft,
        "data.prompts": head.data.prompts,
        "data.heldout": head.data.heldout,
    }
    return [
        f"{key} stands beside herd, which makes its own: leave one of the two out"
        for key, value in named.items()
        if value is not None
    ]


def _given(noun: str, key: str, path: Path | None) -> Path:
    """The recipe's own path for an input that no finished stage made."""
    if path is None:
        raise RecipeError(
            f"no {noun}: neither a finished stage nor {key} gives any",
            fix=f"set {key}, or run the stage that makes it first",
        )
    if not path.exists():
        raise RecipeError(f"{key} names {path}, which does not exist")
    return path
