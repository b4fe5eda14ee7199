"""The launcher's store: what ranks tell each other where there is no process group, or none yet.

    rank 0: tell("sft/verdict", "go")     others: hear("sft/verdict") → "go"

Who waits here polls, so that a signal ends the wait at once: torch's own waits answer no signal,
and a rank that sits in one is killed half a minute later without having said a word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from torch.distributed import (
    DistError,
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from ground.errors import InfraError
from ground.launch import HELD, Launch, launch_of

_POLL_SECONDS = 0.05
_CONNECT_SECONDS = 300.0


class Roll:
    """Words by name, for all ranks of a launch.

    Example:
        roll = Roll(os.environ);  roll.tell("sft/verdict", "go")
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.launch: Launch = launch_of(environment)
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        connected = self._connected(environment)
        self.port = connected.port
        """Where the others find the store, also where any free port was asked for (0)."""
        # What ranks of an earlier attempt have told is not for those of this one.
        self.store = PrefixStore(f"attempt/{attempt}", connected)

    def _connected(self, environment: Mapping[str, str]) -> TCPStore:
        """The launcher's store, or rank 0's own where the launcher holds none.

        Raises:
            InfraError: it cannot be reached.
        """
        is_held = environment.get(HELD) == str(True)
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        try:
            return TCPStore(
                host,
                port,
                self.launch.num_ranks,
                is_master=not is_held and self.launch.is_main,
                timeout=timedelta(seconds=_CONNECT_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,  # all Rolls of rank 0's process share one
            )
        except DistError as error:
            raise self._lost(f"reach the store at {host}:{port}", str(error)) from error

    def tell(self, name: str, word: str) -> None:
        """Leave a word for the others."""
        self._asked(name, lambda: self.store.set(name, word))

    def heard(self, name: str) -> str | None:
        """The word of that name, if it was told already."""
        return self._asked(
            name, lambda: self.store.get(name).decode() if self.store.check([name]) else None
        )

    def hear(self, name: str, purpose: str, seconds: float) -> str:
        """Wait for a word.

        Raises:
            InfraError: it did not come in time, or the launcher is gone.
        """
        deadline = time.monotonic() + seconds
        while (word := self.heard(name)) is None:
            if time.monotonic() > deadline:
                raise self._lost(f"{purpose} within {seconds:g} s")
            time.sleep(_POLL_SECONDS)
        return word

    def beat(self) -> None:
        """Give a sign of life."""
        self._asked("a sign of life", lambda: self._count(self.launch.rank, 1))

    def beats(self, rank: int) -> int:
        """Signs of life that a rank has given so far."""
        return int(self._asked("signs of life", lambda: self._count(rank, 0)) or 0)

    def _count(self, rank: int, more: int) -> str:
        return str(self.store.add(f"beats/{rank}", more))

    def gather(self, name: str, seconds: float) -> None:
        """Wait until every rank is here.

        Raises:
            InfraError: naming the first rank that is not.
        """
        self.tell(f"{name}/here/{self.launch.rank}", "here")
        for rank in range(self.launch.num_ranks):
            self.hear(f"{name}/here/{rank}", f"find rank {rank}", seconds)

    def _asked(self, name: str, ask: Callable[[], str | None]) -> str | None:
        try:
            return ask()
        except DistError as error:
            raise self._lost(f"reach the launcher's store for {name}", str(error)) from error

    def _lost(self, what: str, why: str = "") -> InfraError:
        return InfraError(
            f"rank {self.launch.rank} of {self.launch.num_ranks} must {what}",
            where="accelerate launch",
            why=why[:300],
            fix="look at the other ranks' logs, then continue with --resume",
        )
