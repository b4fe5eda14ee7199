"""An engine that plays back a script: for tests of what stands above engines, without a model.

engine = FakeEngine(lambda request: (5, 6, 2), seconds=lambda request: 0.01)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ground.errors import DataError, InfraError
from ground.records import Finish, Segment
from rollout.engine import Completion, Request, Scores, check_request, spans_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class _Playing:
    """A request on its way through the script."""

    request: Request
    answer: tuple[int, ...]
    seconds_per_token: float
    due: float
    future: Future[Completion]
    versions: list[int]


class FakeEngine:
    """Answers are scripted; tokens of one answer come evenly spread over its seconds.

    Args:
        answer: token ids for a request; cut behind the first stop id and at `max_new_tokens`.
        seconds: how long the whole answer takes.
        version: of the weights it pretends to have.
        logprob: recorded for every token.
    """

    def __init__(
        self,
        answer: Callable[[Request], Sequence[int]],
        *,
        seconds: Callable[[Request], float] = lambda request: 0.0,
        version: int = 0,
        logprob: float = -0.5,
        max_length: int = 1 << 20,
        vocabulary: int = 1 << 20,
    ) -> None:
        self.loads: list[int] = []
        self._answer, self._seconds, self._version, self._logprob = (
            answer,
            seconds,
            version,
            logprob,
        )
        self._max_length, self._vocabulary = max_length, vocabulary
        self._playing: dict[str, _Playing] = {}
        self._changed = threading.Condition()
        self._is_paused = self._is_closed = False
        self._thread = threading.Thread(target=self._play, name="fake-decode", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        """Version given to the next token."""
        return self._version

    def submit(self, request: Request) -> Future[Completion]:
        """Start playing the answer to a request."""
        check_request(request, max_length=self._max_length, vocabulary=self._vocabulary)
        answer = _until_stop(tuple(self._answer(request))[: request.max_new_tokens], request)
        pace = self._seconds(request) / max(len(answer), 1)
        future: Future[Completion] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            if self._is_closed:
                raise InfraError("the engine is closed", where=f"request {request.id}")
            if request.id in self._playing:
                raise DataError(
                    "ids of requests in flight must differ", where=f"request {request.id}"
                )
            due = time.monotonic() + pace
            self._playing[request.id] = _Playing(request, answer, pace, due, future, [])
            self._changed.notify_all()
        return future

    def waiting(self) -> frozenset[str]:
        """None ever: there is a place for every request."""
        return frozenset()

    def abort(self, ids: Collection[str]) -> None:
        """Complete these requests as they stand."""
        with self._changed:
            aborted = [self._playing.pop(id_) for id_ in ids if id_ in self._playing]
        for playing in aborted:
            self._complete(playing, "aborted")

    def pause(self) -> None:
        """No token is given out until `resume`."""
        with self._changed:
            self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def load(self, version: int, weights: Mapping[str, Tensor] | Path) -> None:
        """Take on a version; the weights are looked at by nobody."""
        with self._changed:
            self.loads.append(version)
            self._version = version

    def tensors(self) -> Mapping[str, Tensor] | None:
        """It has none."""
        return None

    def score(self, token_ids: Sequence[Sequence[int]], top_k: int = 0) -> list[Scores]:
        """The scripted log-prob for every token; the top is always the given token alone."""
        return [
            Scores(
                (self._logprob,) * (len(ids) - 1),
                tuple((token,) for token in ids[1:]) if top_k else (),
                ((self._logprob,),) * (len(ids) - 1) if top_k else (),
            )
            for ids in token_ids
        ]

    def close(self) -> None:
        """End; what is in flight fails."""
        with self._changed:
            self._is_closed = True
            lost, self._playing = list(self._playing.values()), {}
            self._changed.notify_all()
        for playing in lost:
            playing.future.set_exception(InfraError("the engine was closed"))
        self._thread.join(timeout=5)

    def _play(self) -> None:
        while True:
            with self._changed:
                if self._is_closed:
                    return
                finished = [] if self._is_paused else self._advance(time.monotonic())
                if not finished:
                    self._changed.wait(self._idle_seconds())
            for playing in finished:
                last = playing.answer[-1:]
                stopped = bool(last) and last[0] in playing.request.stop_ids
                self._complete(playing, "stop" if stopped else "length")

    def _advance(self, now: float) -> list[_Playing]:
        """Give out every token that is due; returns the requests that got their last one."""
        for playing in self._playing.values():
            while playing.due <= now and len(playing.versions) < len(playing.answer):
                playing.versions.append(self._version)
                playing.due += playing.seconds_per_token
        finished = [
            playing
            for playing in self._playing.values()
            if len(playing.versions) == len(playing.answer)
        ]
        for playing in finished:
            del self._playing[playing.request.id]
        return finished

    def _idle_seconds(self) -> float | None:
        if self._is_paused or not self._playing:
            return None
        next_due = min(playing.due for playing in self._playing.values())
        return max(next_due - time.monotonic(), 0.0)

    def _complete(self, playing: _Playing, finish: Finish) -> None:
        count = len(playing.versions)
        segment = Segment(
            "policy", playing.answer[:count], (self._logprob,) * count, spans_of(playing.versions)
        )
        playing.future.set_result(Completion(playing.request.id, segment, finish))


def _until_stop(answer: tuple[int, ...], request: Request) -> tuple[int, ...]:
    stops = [place for place, token in enumerate(answer) if token in request.stop_ids]
    return answer[: stops[0] + 1] if stops else answer
