"""Several engines in processes of their own, as one: what `replicas` in a recipe asks for.

    submit ─▶ waiting ─ bundles ─▶ dealer ─▶ engine 0 … n, wherever Ray has room ─▶ completions
    score  ─▶ parts ───────────────▶ │  └─ lost: the bundle goes to another ─▶ the same tokens

A request is a pure function of itself and of the weights, so who answers it changes nothing, and
neither does the death of whoever had begun to. Ray is started for the stage, or joined, as `rl`
does it (rollout/cluster.py); everything is over, processes included, when `replicas_of` ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from transformers import AutoConfig

from rollout.bundle import bundle_of
from rollout.cluster import Need, cluster, resources
from rollout.config import EnginesSection
from rollout.dealer import Dealer
from rollout.engine import Completion, Request, Scores, check_request, check_scorable
from rollout.engine_worker import EngineConfig, EngineWorker
from rollout.machines import Machines, StillMachines
from rollout.places import Places, Want, require_places
from rollout.processes import Reserved
from rollout.ray_machines import RayMachines
from rollout.ray_worker import RayMember
from rollout.roster import Roster
from rollout.seat import Crew, Member, Seat

Value = TypeVar("Value")

_GATHER_SECONDS = 0.01
"""Between the first request and the first bundle: requests come one by one, but quickly."""
_BUNDLES_OF_SLOTS = 8
"""Bundles that fill an engine's slots."""
_AHEAD = 4
"""Times its slots that an engine has in hand, so that none of them stays empty."""
_SEQUENCES = 64
"""Most that are scored at a time."""
_LEASE_SECONDS = 60.0
_BUNDLE_SECONDS = 900.0
"""For what an engine has in hand; one that takes longer hangs."""

logger = logging.getLogger("packtrain")


class EngineMember(Member, Protocol):
    """A member that samples and scores."""

    async def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions, in the order of the requests."""
        ...

    async def score(self, token_ids: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        """See `Engine.score`."""
        ...


class RayEngine(RayMember[EngineWorker]):
    """An `EngineMember` in a process of its own, somewhere in the Ray cluster."""

    def __init__(
        self, config: EngineConfig, bundle: Mapping[str, float], avoided: frozenset[str]
    ) -> None:
        super().__init__(EngineWorker, (config,), bundle, incarnation=0, avoided=avoided)

    async def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """See `EngineWorker.sample`; a pickle each way, Ray's own way costs several times more."""
        asked = pickle.dumps(list(requests))
        return pickle.loads(await self._surely(lambda: self._actor.sample.remote(asked)))

    async def score(self, token_ids: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        """See `EngineWorker.score`."""
        asked = pickle.dumps((token_ids, top_k))
        return pickle.loads(await self._surely(lambda: self._actor.score.remote(asked)))


class Replicas:
    """Engines as one; `start` first, `close` last, the rest from any thread.

    Lives on one asyncio loop, in which its coroutines run; see `replicas_of`.

    Args:
        spawn: makes a new engine (`RayEngine`); returns at once.
        machines: on which they are; without them nothing ever happens to these.
        vocabulary: number of token ids that the model knows.
    """

    def __init__(
        self,
        section: EnginesSection,
        spawn: Callable[[], EngineMember],
        loop: asyncio.AbstractEventLoop,
        machines: Machines | None = None,
        *,
        where: str,
        vocabulary: int,
    ) -> None:
        self._section, self._loop, self._where = section, loop, where
        self._vocabulary = vocabulary
        fleet = section.fleet
        crew = Crew("engine", "engines", f"{where}.engine.num_slots", f"{where}.replicas")
        self._roster = Roster[EngineMember](
            fleet, spawn, lambda event: None, machines or StillMachines(), crew
        )
        in_hand = _AHEAD * _BUNDLES_OF_SLOTS
        self._dealer = Dealer(self._roster, fleet.max_attempts, in_hand)
        self._waiting: deque[tuple[Request, Future[Completion]]] = deque()
        self._bundles: dict[asyncio.Task[None], frozenset[str]] = {}
        self._room = asyncio.Semaphore(in_hand * section.replicas)
        self._sender: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring all up; returns when they have the model.

        Raises:
            WorkersLostError: none came up.
            DataError: a machine does not see the model's folder.
        """
        await self._roster.start()
        await self._roster.refit(0, None)

    def submit(self, request: Request) -> Future[Completion]:
        """See `Engine.submit`; the future fails when no engine is left."""
        check_request(
            request, max_length=self._section.engine.max_length, vocabulary=self._vocabulary
        )
        future: Future[Completion] = Future()
        self._waiting.append((request, future))
        self._loop.call_soon_threadsafe(self._wake)
        return future

    def abort(self, ids: Collection[str]) -> None:
        """Forget these requests and cancel their futures; unknown ids are ignored."""
        self._run(self._abort(frozenset(ids)))

    def score(self, token_ids: Sequence[Sequence[int]], top_k: int = 0) -> list[Scores]:
        """See `Engine.score`."""
        length = self._section.engine.max_length
        check_scorable(token_ids, top_k, max_length=length, vocabulary=self._vocabulary)
        return self._run(self._score(token_ids, top_k))

    async def close(self) -> None:
        """End all engines; their processes are gone when this returns."""
        await self._abort(frozenset(request.id for request, _ in self._waiting))
        tasks = [*self._bundles, *([self._sender] if self._sender else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._roster.close()

    def _run(self, work: Coroutine[None, None, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _wake(self) -> None:
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="send bundles")

    async def _send(self) -> None:
        """Cut what waits into bundles as there is room for them."""
        await asyncio.sleep(_GATHER_SECONDS)
        while self._waiting:
            await self._room.acquire()
            bundle = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            if not bundle:
                self._room.release()
                return
            task = asyncio.create_task(self._sample(bundle), name=f"bundle of {bundle[0][0].id}")
            self._bundles[task] = frozenset(request.id for request, _ in bundle)
            task.add_done_callback(self._through)

    @property
    def _size(self) -> int:
        """Requests of the next bundle; at the end ever fewer, so that all end together."""
        whole = max(self._section.engine.num_slots // _BUNDLES_OF_SLOTS, 1)
        share = math.ceil(len(self._waiting) / (_AHEAD * self._section.replicas))
        return max(min(whole, share), 1)

    def _through(self, task: asyncio.Task[None]) -> None:
        del self._bundles[task]
        self._room.release()

    async def _sample(self, bundle: Sequence[tuple[Request, Future[Completion]]]) -> None:
        requests = [request for request, _ in bundle]
        name = f"request {requests[0].id} and {len(requests) - 1} more"

        async def attempt(seat: Seat[EngineMember], number: int) -> list[Completion]:
            assert seat.worker
            call, seconds = seat.worker.sample(requests), _BUNDLE_SECONDS * seat.in_flight
            return await seat.within(seconds, name, call)

        try:
            completions = await self._dealt(name, attempt)
        except asyncio.CancelledError:
            for _, future in bundle:
                future.cancel()
            raise
        except Exception as error:
            for _, future in bundle:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), completion in zip(bundle, completions, strict=True):
            if not future.done():
                future.set_result(completion)

    async def _score(self, token_ids: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        size = min(math.ceil(len(token_ids) / (_AHEAD * self._section.replicas)), _SEQUENCES)
        parts = [token_ids[start : start + size] for start in range(0, len(token_ids), size or 1)]

        async def scored(part: Sequence[Sequence[int]]) -> list[Scores]:
            async def attempt(seat: Seat[EngineMember], number: int) -> list[Scores]:
                assert seat.worker
                call, seconds = seat.worker.score(part, top_k), _BUNDLE_SECONDS * seat.in_flight
                return await seat.within(seconds, f"scoring {len(part)} sequences", call)

            return await self._dealt(f"scoring {len(part)} sequences", attempt)

        found = await asyncio.gather(*map(scored, parts))
        return [scores for part in found for scores in part]

    async def _dealt(
        self, task: str, attempt: Callable[[Seat[EngineMember], int], Awaitable[Value]]
    ) -> Value:
        fix = "look at the engines' logs for what these prompts do to them"
        return await self._dealer.deal(task, attempt, where=self._where, fix=fix)

    async def _abort(self, ids: frozenset[str]) -> None:
        kept = [each for each in self._waiting if each[0].id not in ids]
        for request, future in self._waiting:
            if request.id in ids:
                future.cancel()
        self._waiting = deque(kept)
        for task, own in list(self._bundles.items()):
            if own <= ids:
                task.cancel()


@contextmanager
def replicas_of(
    model: Path, section: EnginesSection, ours: Reserved, where: str
) -> Iterator[Replicas]:
    """Engines of a model for as long as the body runs, in a Ray cluster of our own or a joined one.

    Args:
        ours: where Ray's files go, and how our processes are told from others.
        where: the section of the recipe, for errors.

    Raises:
        PlacementError: the machines have no room for them.
        SetupError: Ray does not come up, or is none for us.
        WorkersLostError: none of them came up.
    """
    vocabulary = int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)
    with cluster(ours.folder, need_of(section, where), namespace=f"packtrain-{ours.mark}"):
        bundle = bundle_of(section.engine, section.cpus_per_replica, resources())
        config = EngineConfig(model.resolve(), section.engine, _LEASE_SECONDS, where)
        loop = asyncio.new_event_loop()
        machines = RayMachines(bundle)
        engines = Replicas(
            section,
            lambda: RayEngine(config, bundle, machines.avoided),
            loop,
            machines,
            where=where,
            vocabulary=vocabulary,
        )
        with running(loop):
            try:
                asyncio.run_coroutine_threadsafe(engines.start(), loop).result()
                yield engines
            finally:
                asyncio.run_coroutine_threadsafe(engines.close(), loop).result()


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


@contextmanager
def running(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """The loop turns on a thread of its own while the body runs."""
    thread = threading.Thread(target=loop.run_forever, name="replicas", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
