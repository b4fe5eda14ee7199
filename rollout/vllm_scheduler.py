"""vLLM's scheduler with one thing more: what is scored is let through while generation is paused.

    paused (keep):  running, waiting ── set aside ──▶ scored alone ──▶ put back, nothing sampled

The parity gate needs it: after a swap of weights an engine stands still and proves by its scores
that it has them. vLLM's own pause holds back everything. Runs in vLLM's process (EngineCore).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


def is_scored(request: Request) -> bool:
    """Whether a request wants log-probs of its prompt: only `Engine.score` does."""
    params = request.sampling_params
    return params is not None and params.prompt_logprobs is not None


class ScoringScheduler(Scheduler):
    """For engines that schedule a step when the one before is done (CPU)."""

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM's, and while paused for scored requests alone."""
        if self.pause_state is not PauseState.PAUSED_ALL:
            return super().schedule(throttle_prefills)
        with self._scored_alone() as held:
            step = super().schedule(throttle_prefills)
            is_stuck = not step.total_num_scheduled_tokens and bool(self.running or self.waiting)
        if is_stuck and held:
            self._make_room()
        return step

    def get_num_unfinished_requests(self) -> int:
        """While paused only scored requests count, so that the engine sleeps without any."""
        if self.pause_state is not PauseState.PAUSED_ALL:
            return super().get_num_unfinished_requests()
        return sum(map(is_scored, self.running)) + sum(map(is_scored, self.waiting))

    @contextmanager
    def _scored_alone(self) -> Iterator[int]:
        """Hide whatever is not scored; tells how many running requests are hidden."""
        held = [request for request in self.running if not is_scored(request)]
        queued = [request for request in self.waiting if not is_scored(request)]
        scored = [request for request in self.waiting if is_scored(request)]
        self.running = [request for request in self.running if is_scored(request)]
        self.waiting = create_request_queue(self.policy)
        for request in scored:
            self.waiting.add_request(request)
        self._pause_state = PauseState.UNPAUSED
        try:
            yield len(held)
        finally:
            self._pause_state = PauseState.PAUSED_ALL
            self.running = held + self.running
            for request in queued:
                self.waiting.add_request(request)

    def _make_room(self) -> None:
        """No block is free for what is scored: the youngest of the others gives its own up, and is
        computed again when generation goes on."""
        youngest = max(
            (request for request in self.running if not is_scored(request)),
            key=lambda request: request.arrival_time,
        )
        self.running.remove(youngest)
        self._preempt_request(youngest, time.monotonic())


class AsyncScoringScheduler(AsyncScheduler, ScoringScheduler):
    """For engines that schedule a step while the one before still runs (GPU)."""
