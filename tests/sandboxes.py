"""Which sandboxes can be started here: being installed is not enough, kernels refuse some.

Only starting counts: one that starts and does not hold must turn its tests red.
"""

from __future__ import annotations

import functools

import pytest

from ground.config import SandboxSettings
from ground.errors import InfraError
from rollout.sandbox import Sandbox
from rollout.sandbox_probe import sandbox_for
from rollout.sandbox_tiers import TIERS, Tier, tier_version


@functools.cache
def absent(tier: Tier) -> str:
    """Why a tier cannot be started on this machine; empty when it can."""
    if tier_version(tier) is None:
        return f"{tier} is not installed"
    try:
        with Sandbox(tier).open({"mode": "run", "source": "", "stdin": ""}):
            return ""
    except InfraError as error:
        return str(error)


def some_sandbox() -> Sandbox:
    """The one that a run would choose; skips the test where none can be started."""
    missing = [absent(tier) for tier in TIERS]
    if all(missing):
        pytest.skip("; ".join(missing))
    return sandbox_for(SandboxSettings())
