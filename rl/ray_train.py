"""Ray Train with nothing but its controller, its group of workers and its watch over them.

    fit() ─▶ controller (an actor here) ─▶ placement group ─▶ a worker per place ─▶ work(settings)

The one place that knows Ray Train's insides (2.60). As it comes it also asks a coordinator of Ray
Data for machines, which it leaves in the cluster for good, born of our job and shared with whoever
else trains there: ours in somebody's cluster are actors that leave with us (rl/cluster.py), so the
places are asked for by rl/seats.py alone. Nor does it start its other helpers, which took 0.6 GB
and 10 s of a processor's time in every life: for data sets, of which it is given none; for
placement groups of a killed controller, which go with our connection; for preempted machines.
What `fit` raises is Ray's own; `own_error` says it in our words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.train import (
    ControllerError,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ground.console import plain_text
from ground.errors import FailureKind, InfraError, PacktrainError, SetupError
from rollout.preflight import ClusterStartError

Settings = Mapping[str, object]

_NODE = "ray.io/node-id"
"""Label by which Ray knows a machine."""
_VARIABLES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Unless the user has set them: how often it looks after its workers, how long it waits for their
places, and that it starts no watcher for preempted machines."""
_FRAME = ("Training failed due to", "[Rank ", "Traceback (", "ray::")
"""How lines of Ray's begin that stand around what was said."""
_WHY = 300
"""Characters of it that are told."""
_MISSING = re.compile(r"(?:ModuleNotFound|Import)Error: .*")


def seated_trainer(
    work: Callable[[dict[str, object]], None],
    settings: dict[str, object],
    bundle: Mapping[str, float],
    places: Sequence[str],
    *,
    name: str,
    folder: Path,
) -> DataParallelTrainer:
    """A trainer whose `fit` has each worker do the work on its machine, once.

    Args:
        work: gets the settings; `ray.train.get_context()` tells the rank.
        bundle: what each worker takes.
        places: ids of the workers' machines; the first one's is rank 0's.
        name, folder: for notes that nobody has any use for.
    """
    for variable, value in _VARIABLES.items():
        os.environ.setdefault(variable, value)
    return _SeatedTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=len(places),
            use_gpu="GPU" in bundle,
            resources_per_worker=dict(bundle),
            label_selector=[{_NODE: place} for place in places],
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


def own_error(error: Exception) -> PacktrainError:
    """Ray Train's failure as one of ours: an attempt that was lost, unless it would be so again."""
    said = _said(str(error))
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for each in failures.values():
        if isinstance(each, PacktrainError) and each.kind is not FailureKind.INFRA:
            return each
    if missing := _MISSING.search(said):
        return SetupError(
            "every machine that gets a rank of the learner must have packtrain and its libraries",
            where="rl.learner",
            why=missing[0],
            fix="submit the run as a Ray job, with which the code travels (docs/launch.md), or "
            "install packtrain there",
        )
    if isinstance(error, ControllerError):
        what = "Ray Train must bring the learner's ranks up"
        return ClusterStartError(what, where="rl.learner", why=said[:_WHY])
    who = ", ".join(f"rank {rank}" for rank in sorted(failures)) or "the learner's ranks"
    lost = f"{who} must go on, the Ray Train worker is lost"
    return InfraError(lost, where="rl.learner", why=said[:_WHY])


def _said(text: str) -> str:
    """The lines of a message or a traceback that say something, on one line.

    Example:
        "Traceback (…):\n  File …\nSetupError: the disk is full\n  fix: …" → "SetupError: the disk
        is full"
    """
    lines = [line for line in plain_text(text).splitlines() if line.strip()]
    said = [line for line in lines if not line[0].isspace() and not line.startswith(_FRAME)]
    return "; ".join(said)


class _SeatedTrainer(DataParallelTrainer):
    """Ray Train's trainer without its helpers."""

    def _create_default_callbacks(self) -> list[Any]:
        return []

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        policy = _Seated(self.scaling_config)
        return super()._initialize_and_run_controller(**settings | {"scaling_policy": policy})


class _Seated(FixedScalingPolicy):
    """So many workers as there are places, and no word to anybody about them."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Nothing is asked for."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing is asked for."""
