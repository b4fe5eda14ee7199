"""The whole recipe: the head and every stage's section, as one schema.

Stages validate their own section; only the command needs them all at once. This module must stay
free of torch and ray, and so must every `config.py` it imports.
"""

from __future__ import annotations

from curation.config import MineSection, PruneSection
from distill.config import TargetsSection
from dpo.config import DpoSection
from ground.config import Head
from ground.herd.config import HerdSection
from ground.recipe import RecipeDocument
from rl.config import RlSection
from rollout.config import EvaluateSection
from sft.config import SftSection


class Recipe(Head):
    """One YAML file: a stage is on when its section is there."""

    herd: HerdSection | None = None
    """Make tokenizer, teacher and student from scratch (tiny recipes only)."""
    prune: PruneSection | None = None
    """Drop the easiest part of the SFT data, as the teacher judges it."""
    targets: TargetsSection | None = None
    """Store what the teacher says to the rows that SFT trains on."""
    sft: SftSection | None = None
    """Light supervised fine-tuning on what is left."""
    mine: MineSection | None = None
    """Measure pass@k of the RL prompts with the model that SFT made."""
    rl: RlSection | None = None
    """Asynchronous online RL on verifiable rewards."""
    dpo: DpoSection | None = None
    """Light preference optimisation for corner cases."""
    evaluate: EvaluateSection | None = None
    """Evaluate the base, what sft, rl and dpo made of it, and arms."""


def read_recipe(document: RecipeDocument) -> Recipe:
    """The validated recipe; all errors at once.

    Raises:
        RecipeError: something is wrong with it.
    """
    return document.read(Recipe)
