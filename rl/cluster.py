"""What a life of the loop needs of its Ray cluster, and the machines that it finds there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray._private.state import available_resources_per_node

from distill.config import RolloutDistillSection
from rl.config import LearnerSection, RlSection
from rl.seats import Machine, Wanted, seats
from rollout.bundle import bundle_of
from rollout.cluster import NAMESPACE
from rollout.cluster import cluster as ray_cluster
from rollout.config import EngineSection, FleetSection
from rollout.judge_source import JudgeSource
from rollout.places import Need, Places, Want, require_places

_MODELS_KEPT = 1
"""Room for a version that goes to another machine; here weights lie in the keeper's own memory."""
_FEWER = (
    "lower rl.fleet.num_workers (or max_workers), rl.fleet.cpus_per_worker or "
    "rl.engine.tensor_parallel (on processors alone only 1 is possible), or add machines"
)
_FEWER_RANKS = (
    "lower rl.learner.num_ranks or cpus_per_rank, rl.fleet.num_workers (or max_workers) or "
    "cpus_per_worker, or add machines"
)
_FEWER_TEACHERS = "; or lower rl.distill.num_teachers or rl.distill.cpus_per_teacher"
_FEWER_JUDGES = "; or lower judge.replicas or judge.cpus_per_replica"


@dataclass(frozen=True, slots=True)
class Others:
    """Who needs places besides workers and learner.

    Example:
        Others(distill, judge).places(nodes) → teachers and judges, each with what it takes
    """

    distill: RolloutDistillSection | None
    judge: JudgeSource | None

    @property
    def are_there(self) -> bool:
        """Whether there are any."""
        return self.distill is not None or self.judge is not None

    def places(self, nodes: Sequence[Mapping[str, float]]) -> list[Places]:
        """What each of them takes of one machine."""
        found = list[Places]()
        if teach := self.distill:
            found.append(Places("teachers", teach.num_teachers, teach.bundle))
        if judge := self.judge:
            bundle = bundle_of(judge.engine, judge.fleet.cpus_per_worker, nodes)
            found.append(Places("judges", judge.fleet.num_workers, bundle))
        return found

    def processors(self) -> list[Want]:
        """What they take of a machine's processors."""
        wants = list[Want]()
        if teach := self.distill:
            count = teach.num_teachers * teach.cpus_per_teacher
            wants.append(Want("teachers", count, "rl.distill: num_teachers x cpus_per_teacher"))
        if judge := self.judge:
            count = judge.fleet.num_workers * judge.fleet.cpus_per_worker
            wants.append(Want("judges", count, "judge: replicas x cpus_per_replica"))
        return wants

    @property
    def fewer(self) -> str:
        """Keys by which there would be fewer of them, behind those of workers."""
        return _FEWER_TEACHERS * bool(self.distill) + _FEWER_JUDGES * bool(self.judge)


def cluster(
    folder: Path,
    fleet: FleetSection,
    engine: EngineSection,
    model: Path,
    *,
    learner: LearnerSection | None = None,
    distill: RolloutDistillSection | None = None,
    judge: JudgeSource | None = None,
    namespace: str = NAMESPACE,
    is_first: bool = True,
) -> AbstractContextManager[str]:
    """Join or start Ray for a life of the loop; see `rollout.cluster.cluster`.

    Args:
        model: folder of the weights that will be handed over; decides the object store's size.
        learner: how its ranks are started; by default Ray has nothing to do with them.
        distill: how many teachers there are, if any.
        judge: the model behind `reward: judge`, whose replicas want room as well.
        is_first: whether there is no reason to wait for a machine that was lost.
    """
    learner = learner or LearnerSection()
    need = need_of(fleet, engine, learner, Others(distill, judge), model)
    seconds = 0.0 if is_first else learner.room_seconds
    return ray_cluster(folder, need, namespace=namespace, seconds=seconds)


def need_of(
    fleet: FleetSection, engine: EngineSection, learner: LearnerSection, others: Others, model: Path
) -> Need:
    """What all of them need together."""
    cpus = fleet.most_workers * fleet.cpus_per_worker
    wants = [Want("rollout workers", cpus, "rl.fleet: workers x cpus_per_worker")]
    fix = "lower rl.fleet.num_workers or rl.fleet.cpus_per_worker"
    if ranks := learner.reserved_cpus:
        wants.append(Want("learner ranks", ranks, "rl.learner: num_ranks x cpus_per_rank"))
        fix += ", rl.learner.num_ranks or rl.learner.cpus_per_rank"

    def check(nodes: Sequence[Mapping[str, float]]) -> None:
        bundle = bundle_of(engine, fleet.cpus_per_worker, nodes)
        workers = Places("rollout workers", fleet.most_workers, bundle)
        few, besides = _FEWER + others.fewer, others.places(nodes)
        require_places(workers, nodes, where="rl.fleet", fix=few, besides=besides)

    return Need(
        [*wants, *others.processors()],
        check,
        where="rl.fleet",
        fix=fix + others.fewer,
        spare_cpus=fleet.spare * fleet.cpus_per_worker,
        weights_bytes=_MODELS_KEPT * sum(p.stat().st_size for p in model.glob("*.safetensors")),
        checks_own=others.are_there,
    )


def seats_beside(
    others: Others, section: RlSection, bundle: Mapping[str, float], here: Sequence[Machine]
) -> list[str]:
    """Machines of the ranks, of which teachers, judges and workers all find their places too.

    Raises:
        PlacementError: with want and have, once the others have theirs.
    """
    fleet, whole = section.fleet, [machine.resources for machine in here]
    each, left = bundle_of(section.engine, fleet.cpus_per_worker, whole), whole
    for crew in others.places(whole):
        left = crew.taken_from(left)
    free = [replace(m, resources=rest) for m, rest in zip(here, left, strict=True)]
    ranks, workers = Wanted(section.learner.num_ranks, bundle), Wanted(fleet.most_workers, each)
    return seats(ranks, workers, free, fix=_FEWER_RANKS + others.fewer)


def machines() -> list[Machine]:
    """The living machines of the cluster that we are in, our own first."""
    own = ray.get_runtime_context().get_node_id()
    found = [Machine(n["NodeID"], n["Resources"]) for n in ray.nodes() if n["Alive"]]
    return sorted(found, key=lambda machine: machine.id != own)


def free_machines() -> list[Machine]:
    """The same machines with what nobody has taken of them at the moment."""
    free = available_resources_per_node()
    return [Machine(each.id, free.get(each.id, {})) for each in machines()]
