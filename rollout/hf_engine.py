"""Continuous decoding of a transformers model, on one named thread.

    submit → waiting → admit (a slot is free) → a token per step → completion, slot free again

Each turn of the thread: obey orders (load, score, abort), admit, draw first tokens, one decode
step for all slots. Orders are obeyed between two steps only, so weights never change under a
forward pass. Every step has the same shapes, so a sequence gets the same bits in any company.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ground import faults
from ground.errors import DataError, DivergedError, InfraError, PacktrainError
from ground.records import Finish, Segment
from rollout.config import SLOT_STEP
from rollout.engine import Completion, Request, Scores, check_request, check_scorable
from rollout.failures import sort_failure
from rollout.hf_model import SlotModel
from rollout.hf_slots import Slots

Result = TypeVar("Result")

_LOOK_AHEAD = 64
"""Waiting requests among which prompts are looked for that can be prefilled in one batch."""
_ORDER_SECONDS = 600.0
"""Deadline of an order; it waits for one decode step and for orders before it."""


class HfEngine:
    """An `Engine` on a transformers causal model (Llama, Llama 4 text), which it owns from now on.

    Args:
        num_slots: sequences decoded at once, rounded up to a multiple of 8; part of the shape
            that fixes bits.
        max_length: tokens of prompt and completion together; part of the shape too.
        pad_id: fills rows that nobody reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_length: int,
        pad_id: int,
        version: int = 0,
    ) -> None:
        num_slots = -(-num_slots // SLOT_STEP) * SLOT_STEP
        self._model = SlotModel(model, num_slots=num_slots, max_length=max_length, pad_id=pad_id)
        self._slots = Slots(num_slots, max_length)
        self._max_length, self._version = max_length, version
        self._futures: dict[str, Future[Completion]] = {}
        self._waiting: dict[str, Request] = {}
        self._orders: list[tuple[Callable[[], None], Future[Any]]] = []
        self._changed = threading.Condition()
        self._is_paused = self._is_closed = False
        self._death: PacktrainError | None = None
        self._thread = threading.Thread(target=self._run, name="hf-decode", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled with."""
        return self._version

    def submit(self, request: Request) -> Future[Completion]:
        """Queue a request; see `Engine.submit`."""
        check_request(request, max_length=self._max_length, vocabulary=self._model.vocabulary)
        future: Future[Completion] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            self._check_alive()
            if request.id in self._futures:
                raise DataError(
                    "ids of requests in flight must differ", where=f"request {request.id}"
                )
            self._futures[request.id] = future
            self._waiting[request.id] = request
            self._changed.notify_all()
        return future

    def waiting(self) -> frozenset[str]:
        """Ids of requests that have no slot yet."""
        with self._changed:
            return frozenset(self._waiting)

    def abort(self, ids: Collection[str]) -> None:
        """Complete these requests as "aborted" with the tokens they have."""
        wanted = set(ids)
        if wanted and self._thread.is_alive():
            self._order("abort", lambda: self._abort(wanted))

    def pause(self) -> None:
        """Stand still between two steps; orders are still obeyed."""

        def pause() -> None:
            self._is_paused = True

        self._order("pause", pause)

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def load(self, version: int, weights: Mapping[str, Tensor] | Path) -> None:
        """Swap the weights between two steps; returns when the next step will use them.

        Reading and checking happen on the caller's thread while decoding goes on.
        """
        given = self._model.read(weights) if isinstance(weights, Path) else weights
        self._model.check(given)
        tensors = self._model.own(given)

        def load() -> None:
            self._model.load(tensors)
            self._version = version

        self._order(f"load of version {version}", load)

    def tensors(self) -> Mapping[str, Tensor]:
        """The model's own tensors; see `Engine.tensors`."""
        return self._model.tensors()

    def score(self, token_ids: Sequence[Sequence[int]], top_k: int = 0) -> list[Scores]:
        """Log-probs of given sequences, a small batch between each two decode steps."""
        shape = {"max_length": self._max_length, "vocabulary": self._model.vocabulary}
        check_scorable(token_ids, top_k, **shape)
        scores: dict[int, Scores] = {}
        for members in self._model.score_batches([len(ids) for ids in token_ids]):
            rows = [token_ids[index] for index in members]
            batch = self._order("score", partial(self._model.score, rows, top_k))
            scores.update(zip(members, batch, strict=True))
        return [scores[index] for index in range(len(token_ids))]

    def close(self) -> None:
        """End the thread; what is in flight fails."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout=_ORDER_SECONDS)

    def _order(self, name: str, action: Callable[[], Result]) -> Result:
        """Have the decode thread do something between two steps, and wait for it."""
        if threading.current_thread() is self._thread:
            raise PacktrainError(
                f"{name} must not be ordered by a completion's callback: it would wait for itself",
                where="hf engine",
            )
        done: Future[Result] = Future()

        def obey() -> None:
            try:
                done.set_result(action())
            except Exception as error:
                done.set_exception(error)

        with self._changed:
            self._check_alive()
            self._orders.append((obey, done))
            self._changed.notify_all()
        try:
            return done.result(_ORDER_SECONDS)
        except FutureTimeoutError:
            raise InfraError(
                f"{name} must be done within {_ORDER_SECONDS:g} s, the decode thread did not come "
                "to it",
                where="hf engine",
            ) from None

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
            cause: PacktrainError = InfraError("the engine was closed", where="hf engine")
        except Exception as error:
            cause = sort_failure(error, "decoding")
        self._die(cause)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once closed."""

        def has_work() -> bool:
            can_decode = bool(self._waiting) or bool(self._slots.is_taken_S.any())
            return bool(self._orders) or self._is_closed or (can_decode and not self._is_paused)

        with self._changed:
            self._changed.wait_for(has_work)
            return not self._is_closed

    def _turn(self) -> None:
        self._obey()
        if self._is_paused:
            return
        fresh_S = self._admit()
        if fresh_S.any():
            self._draw(fresh_S)
        if self._slots.is_taken_S.any():
            tokens_S, positions_S = self._slots.last_S, self._slots.positions_S
            self._model.decode(torch.from_numpy(tokens_S), torch.from_numpy(positions_S))
            self._draw(self._slots.is_taken_S.copy())
            faults.point("gen.mid")

    def _obey(self) -> None:
        with self._changed:
            orders, self._orders = self._orders, []
        for obey, _ in orders:
            obey()

    def _admit(self) -> NDArray[np.bool_]:
        """Move waiting requests into free slots, oldest first; returns the slots [S] just taken."""
        with self._changed:
            num_free = int((~self._slots.is_taken_S).sum())
            admitted = [self._waiting.pop(id_) for id_ in list(islice(self._waiting, num_free))]
            ahead = islice(self._waiting.values(), _LOOK_AHEAD if admitted else 0)
            upcoming = [request.prompt_ids for request in (*admitted, *ahead)]
        before_S = self._slots.is_taken_S.copy()
        for request in admitted:
            self._model.start(self._slots.take(request), request.prompt_ids, upcoming)
        return self._slots.is_taken_S & ~before_S

    def _draw(self, rows_S: NDArray[np.bool_]) -> None:
        """Draw and record the next token of these rows; complete those that end with it."""
        tokens_S, logprobs_S = self._slots.draw(self._model.logits_SV, rows_S)
        broken_S = rows_S & ~np.isfinite(logprobs_S)
        for slot in np.flatnonzero(broken_S):
            self._fail(int(slot))
        for slot in self._slots.record(rows_S & ~broken_S, tokens_S, logprobs_S, self._version):
            self._complete(int(slot))

    def _complete(self, slot: int, finish: Finish | None = None) -> None:
        request = self._slots.requests[slot]
        assert request is not None
        segment, natural = self._slots.release(slot)
        self._future(request.id).set_result(Completion(request.id, segment, finish or natural))

    def _fail(self, slot: int) -> None:
        request = self._slots.requests[slot]
        assert request is not None
        count = int(self._slots.counts_S[slot])
        self._slots.release(slot)
        self._model.clear(slot)
        self._future(request.id).set_exception(
            DivergedError(
                f"logits must be finite, those of token {count} are not",
                where=f"request {request.id}, weights version {self._version}",
                fix="lower the learning rate, or go back to an earlier checkpoint",
            )
        )

    def _abort(self, ids: set[str]) -> None:
        with self._changed:
            waiting = [self._waiting.pop(id_) for id_ in ids if id_ in self._waiting]
        for request in waiting:
            self._future(request.id).set_result(
                Completion(request.id, Segment("policy", ()), "aborted")
            )
        for slot, running in enumerate(self._slots.requests):
            if running is not None and running.id in ids:
                self._complete(slot, "aborted")

    def _future(self, id_: str) -> Future[Completion]:
        with self._changed:
            return self._futures.pop(id_)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death
        if self._is_closed:
            raise InfraError("the engine was closed", where="hf engine")

    def _die(self, cause: PacktrainError) -> None:
        """Nothing may wait for a thread that has ended."""
        with self._changed:
            self._death = cause
            futures: list[Future[Any]] = [
                *self._futures.values(),
                *(done for _, done in self._orders),
            ]
            self._futures, self._waiting, self._orders = {}, {}, []
        for future in futures:
            future.set_exception(cause)
