"""packtrain leads a base model along a trail of post-training stages.

From Python: `packtrain.run("recipe.yaml")`, `packtrain.Run("runs/tiny")`; see packtrain/api.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packtrain.api import Run as Run
    from packtrain.api import run as run


def __getattr__(name: str) -> object:
    """Import what is asked for only then: the command must answer at once."""
    if name not in ("Run", "run"):
        raise AttributeError(f"module 'packtrain' has no attribute '{name}'")
    return getattr(import_module("packtrain.api"), name)
