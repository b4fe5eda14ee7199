"""What a rollout worker takes of a Ray cluster: a bundle of one machine, or nothing special.

A vLLM engine that is cut over GPUs needs them all on one machine, so a worker has one bundle of a
placement group of its own; importable without Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ground.errors import SetupError
from rollout.config import FleetSection
from rollout.task import WorkerConfig

Resources = Mapping[str, float]


def bundle_of(config: WorkerConfig, nodes: Sequence[Resources]) -> dict[str, float] | None:
    """Processors and GPUs of one worker; None where it runs on processors alone.

    Args:
        nodes: what each living machine of the cluster has in all.

    Raises:
        SetupError: no machine of the cluster has as much; with a table of want and have.

    Example:
        tensor_parallel 2, nodes [{"CPU": 16, "GPU": 8}] → {"CPU": 1, "GPU": 2}
    """
    engine, cpus = config.engine, config.fleet.cpus_per_worker
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    if engine.kind != "vllm" or (engine.tensor_parallel == 1 and not has_gpus):
        return None
    bundle = {"CPU": cpus, "GPU": float(engine.tensor_parallel)}
    if not any(_fits(bundle, node) for node in nodes):
        raise SetupError(
            f"a rollout worker needs {_shown(bundle)} of one machine, no machine of the cluster "
            "has that",
            where="rl.engine.tensor_parallel",
            why="; ".join(f"machine {n} has {_shown(node)}" for n, node in enumerate(nodes)),
            fix="lower rl.engine.tensor_parallel (on processors alone only 1 is possible) or "
            "rl.fleet.cpus_per_worker, or add machines",
        )
    return bundle


def with_affordable_spare(config: WorkerConfig, nodes: Sequence[Resources]) -> FleetSection:
    """The recipe's fleet; without a spare where that would hold a whole worker's GPUs idle."""
    if bundle_of(config, nodes) is None:
        return config.fleet
    return config.fleet.model_copy(update={"spare": False})


def _fits(bundle: Resources, node: Resources) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in bundle.items())


def _shown(resources: Resources) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
