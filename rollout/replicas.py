"""Several engines in processes of their own, as one: what `replicas` in a recipe asks for.

    submit ─▶ waiting ─ bundles ─▶ dealer ─▶ engine 0 … n, wherever Ray has room ─▶ completions
    score  ─▶ parts ───────────────▶ │  └─ lost: the bundle goes to another ─▶ the same tokens

A request is a pure function of itself, the weights and the engine's shape, so on equal machines
who answers it changes nothing, and neither does the death of whoever had begun to. Ray is started
for the stage, or joined, as `rl` does it (rollout/cluster.py); everything is over, processes
included, when `replicas_of` ends.
"""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

from transformers import AutoConfig

from ground.errors import DataError, PacktrainError
from rollout.bundle import bundle_of, need_of
from rollout.cluster import cluster, living, patiently, resources
from rollout.config import EnginesSection
from rollout.dealer import Dealer
from rollout.engine import Completion, Request, Scores, check_request, check_scorable
from rollout.engine_worker import EngineConfig, EngineWorker, UnseenModelError
from rollout.machines import Machines, StillMachines
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
_FIX = "look at the stage's log for what these prompts do to the engines"

Pair = tuple[Request, Future[Completion]]


class EngineMember(Member, Protocol):
    """A member that samples and scores."""

    async def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions, in the order of the requests."""
        ...

    async def score(self, token_ids: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        """See `Engine.score`."""
        ...


class RayEngine(RayMember[EngineWorker]):
    """An `EngineMember` in a process of its own, somewhere in the Ray cluster.

    Args:
        blind: nodes that do not see the model; its own joins them where it finds that out.
    """

    def __init__(
        self,
        config: EngineConfig,
        bundle: Mapping[str, float],
        avoided: frozenset[str],
        blind: set[str],
    ) -> None:
        super().__init__(EngineWorker, (config,), bundle, 0, avoided | blind)
        self._blind = blind

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """See `Member.open`.

        Raises:
            DataError: there is no machine any more that might see the model.
        """
        try:
            await super().open(index, slots_share)
        except UnseenModelError as error:
            self._blind.add(self.node)
            raise told_of(error, self._blind, [node["NodeID"] for node in living()]) from None

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
        self._waiting: deque[Pair] = deque()
        self._bundles: dict[asyncio.Task[None], Sequence[Pair]] = {}
        self._answered: dict[int, float] = {}
        self._room = asyncio.Semaphore(in_hand * section.replicas)
        self._sender: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring all up; returns when they have the model.

        Raises:
            WorkersLostError: none came up.
        """
        await self._roster.start()
        await self._roster.refit(0, None)

    def submit(self, request: Request) -> Future[Completion]:
        """See `Engine.submit`; the future fails when no engine is left."""
        check_request(
            request, max_length=self._section.engine.max_length, vocabulary=self._vocabulary
        )
        future: Future[Completion] = Future()
        self._loop.call_soon_threadsafe(self._take, (request, future))
        return future

    def abort(self, ids: Collection[str]) -> None:
        """Cancel the futures of these requests; unknown ids are ignored.

        An engine ends those that it has begun where all of their bundle are aborted, and samples
        the others to their end.
        """
        self._run(self._abort(frozenset(ids)))

    def score(self, token_ids: Sequence[Sequence[int]], top_k: int = 0) -> list[Scores]:
        """See `Engine.score`."""
        length = self._section.engine.max_length
        check_scorable(token_ids, top_k, max_length=length, vocabulary=self._vocabulary)
        return self._run(self._score(token_ids, top_k))

    async def close(self) -> None:
        """End all engines; their processes are gone when this returns."""
        await self._abort(None)
        if self._sender:
            self._sender.cancel()
        await asyncio.gather(*self._bundles, return_exceptions=True)
        await self._roster.close()

    def _run(self, work: Coroutine[None, None, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _take(self, pair: Pair) -> None:
        self._waiting.append(pair)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="send bundles")

    async def _send(self) -> None:
        """Cut what waits into bundles as there is room for them."""
        await asyncio.sleep(_GATHER_SECONDS)
        while self._waiting:
            await self._room.acquire()
            bundle = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            if not bundle:  # aborted meanwhile
                self._room.release()
                return
            task = asyncio.create_task(self._sample(bundle), name=f"bundle of {bundle[0][0].id}")
            self._bundles[task] = bundle
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

    async def _sample(self, bundle: Sequence[Pair]) -> None:
        """Have a bundle answered; futures that were cancelled meanwhile want nothing any more."""
        requests = [request for request, _ in bundle]
        name = f"request {requests[0].id} and {len(requests) - 1} more"
        try:
            completions = await self._dealt(name, lambda member: member.sample(requests))
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
        name = f"scoring {size} sequences"
        try:
            async with asyncio.TaskGroup() as group:
                works = [self._dealt(name, _scoring(part, top_k)) for part in parts]
                found = [group.create_task(work) for work in works]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [scores for task in found for scores in task.result()]

    async def _dealt(
        self, name: str, ask: Callable[[EngineMember], Coroutine[None, None, Value]]
    ) -> Value:
        """What an engine answers."""

        async def attempt(seat: Seat[EngineMember], number: int) -> Value:
            assert seat.worker
            if seat.in_flight == 1:
                self._answered[seat.index] = self._loop.time()
            seconds = self._section.answer_deadline_seconds
            doing = f"{name} (or any other, see {self._where}.answer_deadline_seconds)"
            answer = await seat.within(
                seconds, doing, ask(seat.worker), more=self._while_it_answers(seat)
            )
            self._answered[seat.index] = self._loop.time()
            return answer

        return await self._dealer.deal(name, attempt, where=self._where, fix=_FIX)

    def _while_it_answers(self, seat: Seat[EngineMember]) -> Iterator[float]:
        """Seconds that an answer still has when its deadline has passed: others came meanwhile."""
        seconds = self._section.answer_deadline_seconds
        while (left := self._answered[seat.index] + seconds - self._loop.time()) > 0:
            yield left

    async def _abort(self, ids: frozenset[str] | None) -> None:
        """See `abort`; None means all."""

        def is_meant(request: Request) -> bool:
            return ids is None or request.id in ids

        for request, future in [*self._waiting, *chain.from_iterable(self._bundles.values())]:
            if is_meant(request):
                future.cancel()
        self._waiting = deque(pair for pair in self._waiting if not is_meant(pair[0]))
        for task, bundle in list(self._bundles.items()):
            if all(future.cancelled() for _, future in bundle):
                task.cancel()


def _scoring(
    part: Sequence[Sequence[int]], top_k: int
) -> Callable[[EngineMember], Coroutine[None, None, list[Scores]]]:
    return lambda member: member.score(part, top_k)


def told_of(error: UnseenModelError, blind: set[str], nodes: Collection[str]) -> PacktrainError:
    """What a machine's blindness is: its own matter, or the end where no other is left."""
    if blind.issuperset(nodes):
        return DataError(error.what, where=error.where, fix=error.fix)
    return error


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
    need, namespace = need_of(section, where), f"packtrain-{ours.mark}"
    with patiently(lambda: cluster(ours.folder, need, namespace=namespace), ours.sweep):
        bundle = bundle_of(section.engine, section.cpus_per_replica, resources())
        config = EngineConfig(model.resolve(), section.engine, _LEASE_SECONDS, where)
        loop = asyncio.new_event_loop()
        machines, blind = RayMachines(bundle), set[str]()
        engines = Replicas(
            section,
            lambda: RayEngine(config, bundle, machines.avoided, blind),
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
