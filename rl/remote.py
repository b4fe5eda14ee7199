"""The controller as the learner sees it through Ray: blocking calls with deadlines, our errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol, cast

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch import Tensor

from ground import faults
from ground.errors import InfraError, PacktrainError
from rl.buffer import Outcome, Plan
from rl.job import Job
from rollout.handover import Outbox, Parcel
from rollout.weights import Probes, Published, this_node

_POLL_SECONDS = 0.5
_TELL_SECONDS = 2.0
"""For an order that a controller which is too busy to hear it obeys later."""
_SLACK_SECONDS = 30.0
"""The controller's own deadlines say more, so ours come later."""


class _Method(Protocol):
    def remote(self, *args: object) -> ray.ObjectRef: ...


class _Actor(Protocol):
    """An actor's methods by name (Ray makes them when it runs)."""

    def __getattr__(self, name: str) -> _Method: ...


class RemoteLoop:
    """The controller and the weight keeper of one life of the loop.

    Example:
        loop = RemoteLoop(job); loop.begin(0, tensors); loop.next_batch(0, lambda: False, 0.0)
    """

    def __init__(self, job: Job) -> None:
        self._seconds = job.section.step_deadline_seconds + _SLACK_SECONDS
        self._look_seconds = job.section.publication_seconds + _SLACK_SECONDS
        self._life = job.incarnation
        with our_errors("find the controller"):
            self._controller = cast(_Actor, ray.get_actor(job.controller_name, job.namespace))
        keeper = cast(_Actor, self._call("start", self._controller.keeper.remote()))
        self._outbox = Outbox(_Keeper(keeper, self._call), this_node())

    def found(self, base: Mapping[str, Tensor], scale: float) -> None:
        """See `Outbox.found`."""
        self._outbox.found(base, scale)

    def begin(
        self,
        version: int,
        weights: Mapping[str, Tensor],
        saved: object,
        replayed: Sequence[Sequence[Outcome]],
    ) -> None:
        """Publish the first weights and let the fleet start, the books being where we are."""
        self._keep(version, weights)
        self._call("start", self._controller.begin.remote(self._life, version, saved, replayed))

    def pack(
        self, version: int, weights: Mapping[str, Tensor], probes: Callable[[], Probes] = Probes
    ) -> Parcel:
        """The learner's own copy of its live weights, for `publish`; see `Outbox.pack`."""
        return self._outbox.pack(version, weights, probes)

    def next_batch(
        self, step: int, stop: Callable[[], bool], step_seconds: float
    ) -> tuple[Plan, dict[str, float]] | None:
        """Wait for a step's plan; None as soon as `stop` says so."""
        answer = self._controller.next_batch.remote(self._life, step, step_seconds)
        deadline = time.monotonic() + self._seconds
        while not stop():
            try:
                with our_errors(f"give step {step} its groups"):
                    return cast(
                        tuple[Plan, dict[str, float]], ray.get(answer, timeout=_POLL_SECONDS)
                    )
            except TimeoutError:
                self._check_deadline(deadline, f"give step {step} its groups")
        return None

    def publish(self, version: int, weights: Mapping[str, Tensor], evaluate: bool) -> float | None:
        """Make a version known to all; returns once it is, with its validation if asked."""
        self._keep(version, weights)
        faults.point("publish.kept")
        answer = self._controller.publish.remote(self._life, version, evaluate)
        seconds = self._look_seconds if evaluate else self._seconds
        return cast(float | None, self._call(f"publish version {version}", answer, seconds))

    def evaluate(self, version: int) -> float | None:
        """Look at the version that was published last."""
        answer = self._controller.evaluate.remote(self._life, version)
        purpose = f"evaluate version {version}"
        return cast(float | None, self._call(purpose, answer, self._look_seconds))

    def leave(self) -> None:
        """The run was asked to end: what is being published has a few seconds left.

        Where that cannot be said, what is being published tells why.
        """
        with suppress(InfraError):
            self._call("leave", self._controller.leave.remote(self._life), _TELL_SECONDS)

    def state(self) -> dict[str, object]:
        """The books as of the last publication."""
        return cast(
            dict[str, object], self._call("save", self._controller.state.remote(self._life))
        )

    def close(self, reason: str) -> dict[str, int]:
        """End the loop; returns the ledger's closing sums."""
        return cast(
            dict[str, int], self._call("close", self._controller.close.remote(self._life, reason))
        )

    def _keep(self, version: int, weights: Mapping[str, Tensor]) -> None:
        parcel = weights if isinstance(weights, Parcel) else self.pack(version, weights)
        self._outbox.send(parcel)

    def _call(
        self,
        purpose: str,
        answer: ray.ObjectRef,
        seconds: float | None = None,
        who: str = "controller",
    ) -> object:
        seconds = self._seconds if seconds is None else seconds
        try:
            with our_errors(purpose, who):
                return ray.get(answer, timeout=seconds)
        except TimeoutError:
            raise _late(purpose, seconds, who) from None

    def _check_deadline(self, deadline: float, purpose: str) -> None:
        if time.monotonic() > deadline:
            raise _late(purpose, self._seconds)


class _Keeper:
    """The weight keeper's calls that the outbox makes, with our deadlines and errors."""

    def __init__(self, actor: _Actor, call: Callable[..., object]) -> None:
        self._actor = actor
        self._call = partial(call, who="weight keeper")

    def node(self) -> str:
        """See `WeightKeeper.node`."""
        return str(self._call("start", self._actor.node.remote()))

    def buffers(self, size: int, at_least: int = 0) -> list[str]:
        """See `WeightKeeper.buffers`."""
        answer = self._actor.buffers.remote(size, at_least)
        return cast(list[str], self._call("make room for weights", answer))

    def publish(self, published: Published) -> None:
        """See `WeightKeeper.publish`."""
        answer = self._actor.publish.remote(published)
        self._call(f"keep version {published.version}", answer)

    def has_room(self, size: int) -> bool:
        """See `WeightKeeper.has_room`."""
        return bool(self._call("make room for weights", self._actor.has_room.remote(size)))

    def deliver(self, published: Published, content: NDArray[np.uint8]) -> None:
        """See `WeightKeeper.deliver`."""
        answer = self._actor.deliver.remote(published, content)
        self._call(f"keep version {published.version}", answer)


@contextmanager
def our_errors(purpose: str, who: str = "controller") -> Iterator[None]:
    """Turn Ray's errors into ours: a typed one from the other side, else "the actor is gone"."""
    try:
        yield
    except GetTimeoutError:
        raise TimeoutError(purpose) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PacktrainError):
            raise cause from error
        if isinstance(cause, RayError):  # whom the other side asked is gone
            raise InfraError(
                f"the {who} must {purpose}", where="learner", why=str(cause)
            ) from error
        raise
    except (RayError, ValueError) as error:
        raise InfraError(
            f"the {who} must {purpose}, but it is gone", where="learner", why=str(error)
        ) from error


def _late(purpose: str, seconds: float, who: str = "controller") -> InfraError:
    return InfraError(f"the {who} must {purpose} within {seconds:g} s", where="learner")
