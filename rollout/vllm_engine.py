"""Decoding by vLLM: an `Engine` on its AsyncLLM, on one named thread with an asyncio loop.

    submit → waiting → admitted (a slot is free, the engine does not stand still) → completion
                            └─ no token yet when the weights are swapped: begun anew ─┘

vLLM gets no more requests than it has slots for, so what waits is ours, and is not computed before
its turn. Each version has prompt blocks of its own in vLLM's cache (a salt): a new request never
reads what older weights have computed, a running one keeps what it has.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.outputs import CompletionOutput
from vllm.v1.engine.exceptions import EngineDeadError

from ground import faults
from ground.errors import DataError, InfraError, PacktrainError
from ground.model import load_model, tensors_of
from ground.records import Segment
from rollout.config import EngineSection
from rollout.engine import BLANK, Completion, Request, Scores, check_request, check_scorable
from rollout.failures import sort_failure
from rollout.vllm_process import WORKER, VllmProcess, start_vllm
from rollout.vllm_requests import (
    Sampling,
    completion_of,
    sampling_params,
    scores_of,
    scoring_params,
)
from rollout.vllm_weights import CheckpointForm, Laid

Result = TypeVar("Result")

_ORDER_SECONDS = 600.0
"""Deadline of an order; it waits for one step and for orders before it."""
_START_SECONDS = 600.0
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
        self._death: PacktrainError | None = None
        self._loop = asyncio.new_event_loop()
        self._orders = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._core = self._order("start", self._start(model_path, worker), _START_SECONDS)
        except BaseException:
            self._stop_loop()
            raise

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled with."""
        return self._version

    def submit(self, request: Request) -> Future[Completion]:
        """Queue a request; see `Engine.submit`."""
        shape = {"max_length": self._section.max_length, "vocabulary": self._form.vocabulary}
        check_request(request, **shape)
        future: Future[Completion] = Future()
        future.set_running_or_notify_cancel()
        with self._books:
            self._check_alive()
            if request.id in self._futures:
                raise DataError(
                    "ids of requests in flight must differ", where=f"request {request.id}"
                )
            self._futures[request.id] = future
            self._waiting[request.id] = request
        self._loop.call_soon_threadsafe(self._admit)
        return future

    def waiting(self) -> frozenset[str]:
        """Ids of requests that have no slot yet.

        Raises:
            InfraError: vLLM is dead; whoever looks at its engine from time to time learns it here.
        """
        with self._books:
            if self._death is not None:
                raise self._death
            return frozenset(self._waiting)

    def abort(self, ids: Collection[str]) -> None:
        """Complete these requests as "aborted" with the tokens they have."""
        if ids and self._death is None:
            self._order("abort", self._abort(frozenset(ids)))

    def pause(self) -> None:
        """Stand still between two steps; scores are still taken."""
        self._order("pause", self._pause())

    def resume(self) -> None:
        """Go on after `pause`."""
        self._order("resume", self._resume())

    def load(self, version: int, weights: Mapping[str, Tensor] | Path) -> None:
        """Swap the weights between two steps; returns when the next step will use them.

        Checking and laying out happen on the caller's thread while decoding goes on.
        """
        given = tensors_of(load_model(weights)) if isinstance(weights, Path) else weights
        self._form.check(given)
        laid = Laid(self._form.saved(given))
        try:
            self._order(f"load of version {version}", self._load(version, laid))
        finally:
            laid.close()

    def tensors(self) -> None:
        """vLLM keeps the weights in forms of its kernels; see `Engine.tensors`."""
        return

    def score(self, token_ids: Sequence[Sequence[int]], top_k: int = 0) -> list[Scores]:
        """Log-probs of given sequences, beside what is decoded."""
        shape = {"max_length": self._section.max_length, "vocabulary": self._form.vocabulary}
        check_scorable(token_ids, top_k, **shape)
        return self._order("score", self._score(token_ids, top_k))

    def close(self) -> None:
        """End vLLM's process and our thread; what is in flight fails."""
        if self._thread.is_alive():
            with suppress(PacktrainError):
                self._order("close", self._close())
            self._stop_loop()

    async def _start(self, model_path: Path, worker: str) -> VllmProcess:
        core = start_vllm(
            model_path,
            self._form.config,
            self._section,
            is_blank=self._version == BLANK,
            worker=worker,
        )
        await core.llm.collective_rpc("put_away_rendezvous")
        await core.llm.update_weight_version(str(self._version))
        self._loop.add_reader(core.process.sentinel, self._notice_end)
        return core

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
        await self._core.llm.abort(running)

    async def _pause(self) -> None:
        async with self._orders:
            await self._stand_still()

    async def _resume(self) -> None:
        async with self._orders:
            await self._go_on()

    async def _stand_still(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            await self._core.llm.pause_generation(mode="keep", clear_cache=False)

    async def _go_on(self) -> None:
        if self._is_paused:
            await self._core.llm.resume_generation()
            self._is_paused = False
            self._admit()

    async def _load(self, version: int, laid: Laid) -> None:
        async with self._orders:
            was_paused = self._is_paused
            await self._stand_still()
            await self._take(laid)
            await self._core.llm.update_weight_version(str(version))
            self._version = version
            await self._begin_anew()
            if not was_paused:
                await self._go_on()

    async def _take(self, laid: Laid) -> None:
        """Have all of vLLM's workers take the weights; half of them would be worse than none."""
        order = (laid.path, laid.size, laid.places)
        try:
            await self._core.llm.collective_rpc("take_weights", args=order)
        except EngineDeadError:
            raise
        except Exception as error:
            self._die(InfraError(f"vLLM must take the weights, got {error}", where="vllm engine"))
            raise EngineDeadError from error

    async def _begin_anew(self) -> None:
        """Whoever has no token yet may have read blocks of the old weights, and must not go on."""
        tokenless = [id_ for id_, each in self._running.items() if not each.token_ids]
        for id_ in tokenless:
            self._running[id_].begins_anew = True
        await self._core.llm.abort(tokenless)

    def _admit(self) -> None:
        """Give waiting requests to vLLM, oldest first, as many as it has slots for."""
        with self._books:
            while self._waiting and not self._is_paused and not self._death:
                if len(self._running) >= self._section.num_slots:
                    return
                request = self._waiting.pop(next(iter(self._waiting)))
                self._running[request.id] = sampling = Sampling(request)
                self._loop.create_task(self._serve(sampling))

    async def _serve(self, sampling: Sampling) -> None:
        """A request's way through vLLM, to its end."""
        request = sampling.request
        try:
            completion = await self._sample(sampling)
        except EngineDeadError:
            self._notice_end()
        except Exception as error:
            self._settle(request.id, sort_failure(error, f"request {request.id}"))
        else:
            self._settle(request.id, completion)

    async def _sample(self, sampling: Sampling) -> Completion:
        request, llm = sampling.request, self._core.llm
        params = sampling_params(request)
        while True:
            sampling.begin()
            part: CompletionOutput | None = None
            async for output in llm.generate(self._prompt(request), params, request.id):
                part = output.outputs[0]
                sampling.take(part)
                faults.point("gen.mid")
                if sampling.is_unwanted and not output.finished:
                    await llm.abort(request.id)
            if sampling.is_aborted or not sampling.begins_anew:
                assert part is not None
                return completion_of(sampling, part)

    def _prompt(self, request: Request) -> TokensInput:
        return tokens_input(list(request.prompt_ids), cache_salt=f"version {self._version}")

    async def _score(self, token_ids: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        params = scoring_params(top_k)

        async def score(index: int, ids: Sequence[int]) -> Scores:
            prompt = tokens_input(list(ids), cache_salt=f"version {self._version}")
            outputs = self._core.llm.generate(prompt, params, f"score/{index}")
            (output,) = [output async for output in outputs]
            return scores_of(output, ids, top_k)

        async with self._orders:
            return list(await asyncio.gather(*map(score, range(len(token_ids)), token_ids)))

    async def _close(self) -> None:
        self._die(InfraError("the engine was closed", where="vllm engine"))

    def _notice_end(self) -> None:
        """vLLM's process is gone, and all that it had."""
        core = self._core
        core.process.join(_LAST_SECONDS)
        self._die(
            InfraError(
                f"vLLM's process must live, {core.process.name} (pid {core.process.pid}) "
                f"{core.fate}",
                where="vllm engine",
                fix="the fleet starts a new worker; where there is none, look above for what vLLM "
                "logged and start again",
            )
        )

    def _die(self, cause: PacktrainError) -> None:
        """Nothing may wait for a process that has ended; the first cause counts."""
        with self._books:
            if self._death is not None:
                return
            self._death = cause
            futures, self._futures = list(self._futures.values()), {}
            self._waiting, self._running = {}, {}
        self._loop.remove_reader(self._core.process.sentinel)
        for future in futures:
            future.set_exception(cause)
        self._core.end()
        for task in asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}:
            task.cancel()

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

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death

    def _order(
        self, name: str, action: Coroutine[Any, Any, Result], seconds: float = _ORDER_SECONDS
    ) -> Result:
        """Have the loop do something, and wait for it."""
        if threading.current_thread() is self._thread:
            action.close()
            raise PacktrainError(
                f"{name} must not be ordered by a completion's callback: it would wait for itself",
                where="vllm engine",
            )
        if self._death is not None:
            action.close()
            raise self._death
        done = asyncio.run_coroutine_threadsafe(self._obey(action), self._loop)
        try:
            return done.result(seconds)
        except FutureTimeoutError:
            done.cancel()
            raise InfraError(
                f"{name} must be done within {seconds:g} s, vLLM did not come to it",
                where="vllm engine",
            ) from None
        except CancelledError:  # with the engine
            raise self._death or InfraError(f"{name} was cancelled", where="vllm engine") from None

    async def _obey(self, action: Coroutine[Any, Any, Result]) -> Result:
        try:
            return await action
        except EngineDeadError:
            self._notice_end()
            assert self._death is not None
            raise self._death from None

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ORDER_SECONDS)
