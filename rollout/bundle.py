"""What a worker takes of a Ray cluster: processors, and the GPUs of its engine.

A vLLM engine that is cut over GPUs needs them all on one machine, so a worker with GPUs has one
bundle of a placement group of its own; importable without Ray. Whether the cluster has room for all
of them is asked before the first is born (rollout/places.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rollout.config import EngineSection, EnginesSection, FleetSection
from rollout.places import Need, Places, Want, require_places
from rollout.task import WorkerConfig

Resources = Mapping[str, float]


def bundle_of(engine: EngineSection, cpus: float, nodes: Sequence[Resources]) -> dict[str, float]:
    """Processors and, unless it runs on these alone, GPUs of one worker; all of one machine.

    Args:
        nodes: what each living machine of the cluster has in all.

    Example:
        tensor_parallel 2, nodes [{"CPU": 16, "GPU": 8}] → {"CPU": 1, "GPU": 2}
    """
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    if engine.kind != "vllm" or (engine.tensor_parallel == 1 and not has_gpus):
        return {"CPU": cpus}
    return {"CPU": cpus, "GPU": float(engine.tensor_parallel)}


def need_of(section: EnginesSection, where: str) -> Need:
    """What the engines need of the cluster."""
    fix = f"lower {where}.replicas or {where}.cpus_per_replica"
    count = section.replicas * section.cpus_per_replica

    def check(nodes: Sequence[Mapping[str, float]]) -> None:
        bundle = bundle_of(section.engine, section.cpus_per_replica, nodes)
        wanted = Places("engines", section.replicas, bundle)
        more = f"{fix}, or {where}.engine.tensor_parallel, or add machines"
        require_places(wanted, nodes, where=where, fix=more)

    return Need(
        [Want("engines", count, f"{where}: replicas x cpus_per_replica")],
        check,
        where,
        fix,
        checks_own=True,
    )


def with_affordable_spare(config: WorkerConfig, nodes: Sequence[Resources]) -> FleetSection:
    """The recipe's fleet; without a spare where that would hold a whole worker's GPUs idle."""
    if "GPU" in bundle_of(config.engine, config.fleet.cpus_per_worker, nodes):
        return config.fleet.model_copy(update={"spare": False})
    return config.fleet
