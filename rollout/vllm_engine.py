"""Decoding by vLLM: an `Engine` on its AsyncLLM, on one named thread with an asyncio loop.

    submit → waiting → admitted (a slot is free, the engine does not stand still) → completion
                            └─ no token yet when the weights are swapped: begun anew ─┘

vLLM gets no more requests to complete than it has slots for, so what waits is ours, and is not
computed before its turn; sequences to score it gets all at once, and takes in turns. Each load has
prompt blocks of its own in vLLM's cache (a salt): a new request never reads what older weights have
computed, a running one keeps what it has.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from ground.errors import DataError, InfraError, PacktrainError
from ground.model import load_model, tensors_of
from ground.records import Segment
from rollout.config import EngineSection
from rollout.engine import BLANK, Completion, Request, Scores, check_request, check_scorable
from rollout.failures import sort_failure
from rollout.loop_thread import LoopThread
from rollout.vllm_process import WORKER, VllmProcess, start_vllm
from rollout.vllm_requests import Sampling, sampled, scored
from rollout.vllm_transfer import both_ends
from rollout.vllm_weights import CheckpointForm, Laid

Result = TypeVar("Result")

_ORDER_SECONDS = 600.0
"""Deadline of an order; it waits for one step and for orders before it."""
_START_SECONDS = 600.0
_CLOSE_SECONDS = 30.0
_LAST_SECONDS = 5.0
"""A process that has failed says so before it ends."""


class VllmEngine:
    """An `Engine` on vLLM, which runs in a process of its own and ends with ours.

    Args:
        section: its shape; of kind "vllm".
        worker: mixed into vLLM's worker class.

    Raises:
        SetupError: this machine has not the devices that are asked for.
        InfraError: vLLM did not come up.
    """

    def __init__(
        self, model_path: Path, section: EngineSection, *, version: int = 0, worker: str = WORKER
    ) -> None:
        self._section, self._version = section, version
        self._form = CheckpointForm(model_path)
        self._futures: dict[str, Future[Completion]] = {}
        self._waiting: dict[str, Request] = {}
        self._running: dict[str, Sampling] = {}
        self._books = threading.Lock()
        """Guards the three above, which callers look at from their own threads."""
        self._is_paused = False
        self._num_loads = 0
        self._core: VllmProcess | None = None
        self._orders = asyncio.Lock()
        self._loop = LoopThread("vllm", "vllm engine")
        try:
            self._order("start", lambda: self._start(model_path, worker), _START_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled with."""
        return self._version

    def submit(self, request: Request) -> Future[Completion]:
        """Queue a request; see `Engine.submit`."""
        shape = {"max_length": self._section.max_length, "vocabulary": self._form.vocabulary}
        check_request(request, **shape)
        try:
            self._section.require_temperature(request.temperature)
        except ValueError as error:
            raise DataError(str(error), where=f"request {request.id}") from None
        future: Future[Completion] = Future()
        future.set_running_or_notify_cancel()
        with self._books:
            if self._loop.death is not None:
                raise self._loop.death
            if request.id in self._futures:
                raise DataError(
                    "ids of requests in flight must differ", where=f"request {request.id}"
                )
            self._futures[request.id] = future
            self._waiting[request.id] = request
            self._loop.soon(self._admit)
        return future

    def waiting(self) -> frozenset[str]:
        """Ids of requests that have no slot yet.

        Raises:
            InfraError: vLLM is dead; whoever looks at its engine from time to time learns it here.
        """
        with self._books:
            if self._loop.death is not None:
                raise self._loop.death
            return frozenset(self._waiting)

    def abort(self, ids: Collection[str]) -> None:
        """Complete these requests as "aborted" with the tokens they have."""
        if ids and self._loop.death is None:
            self._order("abort", lambda: self._abort(frozenset(ids)))

    def pause(self) -> None:
        """Stand still between two steps; scores are still taken."""
        self._order("pause", self._pause)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._order("resume", self._resume)

    def load(self, version: int, weights: Mapping[str, Tensor] | Path) -> None:
        """Swap the weights between two steps; returns when the next step will use them.

        Checking and laying out happen on the caller's thread while decoding goes on.
        """
        given = tensors_of(load_model(weights)) if isinstance(weights, Path) else weights
        self._form.check(given)
        laid = Laid(self._form.saved(given))
        order = (laid.path, laid.size, laid.places)
        take = partial(self._asked, "take_weights", *order)
        try:
            self._order(f"load of version {version}", lambda: self._load(version, take))
        finally:
            laid.close()

    def join(self, invitation: dict[str, Any], joined: Callable[[], Awaitable[None]]) -> None:
        """Have vLLM's workers join a broadcast group.

        Args:
            invitation: what they join with.
            joined: has the sender join meanwhile.
        """

        async def join() -> None:
            async with self._changing("joining a broadcast group"):
                joining = self._asked("init_weight_transfer_engine", invitation)
                await both_ends(joined(), joining)

        self._order("join", join)

    def receive(
        self, version: int, manifest: dict[str, Any], sent: Callable[[], Awaitable[None]]
    ) -> None:
        """Swap in weights that are broadcast to the group that was joined; see `load`.

        Args:
            manifest: names, types and shapes, in the order in which they come.
            sent: has the sender send them meanwhile; they were checked there.
        """

        async def take() -> None:
            await both_ends(sent(), self._asked("receive_weights", manifest))

        self._order(f"load of version {version}", lambda: self._load(version, take))

    def tensors(self) -> None:
        """vLLM keeps the weights in forms of its kernels; see `Engine.tensors`."""
        return

    def score(self, token_ids: Sequence[Sequence[int]], top_k: int = 0) -> list[Scores]:
        """Log-probs of given sequences, beside what is decoded."""
        shape = {"max_length": self._section.max_length, "vocabulary": self._form.vocabulary}
        check_scorable(token_ids, top_k, **shape)
        return self._order("score", lambda: self._score(token_ids, top_k))

    def close(self) -> None:
        """End vLLM's process and our thread; what is in flight fails."""
        with suppress(PacktrainError):
            self._order("close", self._close, _CLOSE_SECONDS)
        self._loop.end()

    @property
    def _llm(self) -> AsyncLLM:
        assert self._core is not None
        return self._core.llm

    async def _start(self, model_path: Path, worker: str) -> None:
        core = self._core = start_vllm(
            model_path,
            self._form.config,
            self._section,
            is_blank=self._version == BLANK,
            worker=worker,
        )
        self._loop.loop.add_reader(core.process.sentinel, self._notice_end)
        await core.llm.collective_rpc("put_away_rendezvous")
        await core.llm.update_weight_version(str(self._version))

    async def _abort(self, ids: Collection[str]) -> None:
        with self._books:
            unborn = [self._waiting.pop(id_) for id_ in ids if id_ in self._waiting]
            running = [id_ for id_ in ids if id_ in self._running]
        for request in unborn:
            self._future(request.id).set_result(
                Completion(request.id, Segment("policy", ()), "aborted")
            )
        for id_ in running:
            self._running[id_].is_aborted = True
        await self._llm.abort(running)

    async def _pause(self) -> None:
        async with self._changing("pause"):
            await self._stand_still()

    async def _resume(self) -> None:
        async with self._changing("resume"):
            await self._go_on()

    async def _stand_still(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            await self._llm.pause_generation(mode="keep", clear_cache=False)

    async def _go_on(self) -> None:
        if self._is_paused:
            await self._llm.resume_generation()
            self._is_paused = False
            self._admit()

    async def _load(self, version: int, take: Callable[[], Awaitable[None]]) -> None:
        async with self._changing(f"load of version {version}"):
            was_paused = self._is_paused
            await self._stand_still()
            await take()
            await self._llm.update_weight_version(str(version))
            self._version = version
            self._num_loads += 1
            await self._begin_anew()
            if not was_paused:
                await self._go_on()

    async def _asked(self, what: str, *given: object) -> None:
        """All of vLLM's workers have done something."""
        await self._llm.collective_rpc(what, args=given)

    @asynccontextmanager
    async def _changing(self, what: str) -> AsyncIterator[None]:
        """One change at a time, and all of it: whoever fails inside or is told to break off leaves
        vLLM as nobody knows it, with half of the weights perhaps, and it must not go on."""
        async with self._orders:
            try:
                yield
            except EngineDeadError:
                raise
            except BaseException as error:
                got = f"{type(error).__name__}: {error}".removesuffix(": ")
                self._die(InfraError(f"{what} must be done wholly, got {got}", where="vllm engine"))
                raise

    async def _begin_anew(self) -> None:
        """Whoever has no token yet may have read blocks of the old weights, and must not go on."""
        tokenless = [id_ for id_, each in self._running.items() if not each.token_ids]
        for id_ in tokenless:
            self._running[id_].begins_anew = True
        await self._llm.abort(tokenless)

    def _admit(self) -> None:
        """Give waiting requests to vLLM, oldest first, as many as it has slots for."""
        with self._books:
            while self._waiting and not self._is_paused and self._loop.death is None:
                if len(self._running) >= self._section.num_slots:
                    return
                request = self._waiting.pop(next(iter(self._waiting)))
                self._running[request.id] = sampling = Sampling(request)
                self._loop.loop.create_task(self._serve(sampling))

    async def _serve(self, sampling: Sampling) -> None:
        """A request's way through vLLM, to its end."""
        request = sampling.request
        try:
            completion = await sampled(self._llm, sampling, lambda: self._salt)
        except EngineDeadError:
            await self._mourn()
        except Exception as error:
            self._settle(request.id, sort_failure(error, f"request {request.id}"))
        else:
            self._settle(request.id, completion)

    @property
    def _salt(self) -> str:
        """Of prompt blocks; a version may be loaded twice, with other numbers."""
        return f"load {self._num_loads}"

    async def _score(self, token_ids: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        async with self._orders:
            asked = enumerate(token_ids)
            scores = (scored(self._llm, f"score/{n}", ids, top_k, self._salt) for n, ids in asked)
            return list(await asyncio.gather(*scores))

    async def _close(self) -> None:
        self._die(InfraError("the engine was closed", where="vllm engine"))

    def _notice_end(self) -> None:
        """The kernel says that vLLM's process is gone."""
        assert self._core is not None
        self._loop.loop.remove_reader(self._core.process.sentinel)
        self._mourning = self._loop.loop.create_task(self._mourn())

    async def _mourn(self) -> None:
        """vLLM's process is gone, or has said that it goes, and so is all that it had.

        How it ended is waited for on another thread: ours has others to tell.
        """
        core = self._core
        assert core is not None
        await asyncio.to_thread(core.wait, _LAST_SECONDS)
        self._die(core.obituary)

    def _die(self, cause: PacktrainError) -> None:
        """Nothing may wait for a process that has ended; the first cause counts."""
        with self._books:
            if self._loop.death is not None:
                return
            self._loop.die(cause)
            futures, self._futures = list(self._futures.values()), {}
            self._waiting, self._running = {}, {}
        for future in futures:
            future.set_exception(cause)
        if self._core is not None:
            self._loop.loop.remove_reader(self._core.process.sentinel)
            self._core.end()
        self._loop.cancel_others()

    def _settle(self, id_: str, result: Completion | PacktrainError) -> None:
        with self._books:
            self._running.pop(id_, None)
            future = self._futures.pop(id_, None)
        if future is None:  # it failed with the engine
            return
        if isinstance(result, Completion):
            future.set_result(result)
        else:
            future.set_exception(result)
        self._admit()

    def _future(self, id_: str) -> Future[Completion]:
        with self._books:
            return self._futures.pop(id_)

    def _order(
        self,
        name: str,
        action: Callable[[], Coroutine[Any, Any, Result]],
        seconds: float = _ORDER_SECONDS,
    ) -> Result:
        """Have the loop do something with vLLM, and wait for it."""

        async def surely() -> Result:
            try:
                return await action()
            except EngineDeadError:
                await self._mourn()
                raise

        return self._loop.order(name, surely, seconds)
