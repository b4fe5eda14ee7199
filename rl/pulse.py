"""The controller's pulse through Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from ground.errors import InfraError
from rl.watchdog import Pulse
from rollout.fleet import FleetStats, WorkerStats


def remote_pulse(controller: ActorHandle, incarnation: int) -> Pulse:
    """Ask a controller how it is, which renews its lease."""

    def pulse(seconds: float) -> Mapping[str, object]:
        try:
            answer = controller.pulse.remote(incarnation)
            status = cast(dict[str, object], ray.get(answer, timeout=seconds))
        except GetTimeoutError:
            raise TimeoutError from None
        except RayTaskError as error:
            if isinstance(error.cause, InfraError):
                raise error.cause from None
            raise InfraError("the controller must answer", where="rl", why=str(error)) from None
        except RayError as error:
            raise InfraError(
                "the controller must answer its supervisor, but it is gone",
                where="rl",
                why=(str(error).strip().splitlines() or [""])[-1],
            ) from None
        fleet = cast(FleetStats, status.pop("fleet"))
        others = cast(Sequence[WorkerStats], status.pop("others"))
        seats = [asdict(each) for each in (*fleet.workers, *others)]
        return {**status, **asdict(fleet), "workers": seats}

    return pulse
