"""Publishes versions in the background, keeps checkpoints and the best weights.

    publish(snapshot) ──▶ keeper ──▶ controller (hand-over, slots, evaluation) ──▶ score, best, cut

One publication at a time, on a thread named `publish`: the learner trains on meanwhile and waits
only when it has the next version ready before the last one is out. What fails there fails the
learner at its next call. A score is written down before the best weights are chosen by it, and
these before the cut: after a kill at any point the rest can be done again (`catch_up`). A run that
is asked to end breaks off a look that takes long, for there may be no workers left. No cut is made
beyond the version that is owed it, so that a restart comes by there: the journal has the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ground import faults
from ground.checkpoints import Checkpoints
from ground.manifest import read_manifest
from rl.snapshot import Snapshot, read_weights, write_cut, write_weights
from rl.versions import Versions
from rollout.handover import digest_of

_POLL_SECONDS = 0.2
"""Between two looks whether the run is asked to end."""


class Loop(Protocol):
    """What the learner's side needs of the controller's, wherever that runs."""

    def publish(self, version: int, weights: Mapping[str, Tensor], evaluate: bool) -> float | None:
        """Make a version known to all; returns once it is, with its validation if asked."""
        ...

    def evaluate(self, version: int) -> float | None:
        """Look at the version that was published last."""
        ...

    def leave(self) -> None:
        """Give what is being published a few seconds more; a look that is broken off has no
        score."""
        ...

    def state(self) -> dict[str, object]:
        """The books as of the last publication."""
        ...


@dataclass(frozen=True, slots=True)
class Best:
    """The version that did best on the validation slice; the later one of two equals.

    Example:
        Best(version=30, score=0.61)
    """

    version: int
    score: float


class Publisher:
    """Hands versions out in order: `publish → … → finish`."""

    def __init__(
        self,
        loop: Loop,
        checkpoints: Checkpoints,
        best: Checkpoints,
        digests: Versions[str],
        scores: Versions[float | None],
        tell_score: Callable[[int, float], None],
    ) -> None:
        self._loop, self._checkpoints, self._kept = loop, checkpoints, best
        self._digests, self._scores, self._tell_score = digests, scores, tell_score
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._current: Future[None] | None = None
        self._is_leaving = False
        self._owed: int | None = None
        self.best = _read_best(best)

    def publish(
        self, snapshot: Snapshot, *, evaluate: bool, save: bool, stop: Callable[[], bool]
    ) -> None:
        """Begin to publish, once the publication before is done; see `finish` for `stop`."""
        self.finish(stop)
        self._current = self._thread.submit(self._publish, snapshot, evaluate, save)

    def catch_up(self, snapshot: Snapshot, *, evaluate: bool, save: bool) -> None:
        """Begin what the publication of the version that a restart goes on from still owes."""
        self._current = self._thread.submit(self._complete, snapshot, evaluate, save)

    def repeat(self, version: int, model: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Tell the score of a version that was looked at before a restart, and judge it by that.

        Returns:
            Whether its weights are those of before, bit for bit. They should be; on another
            processor, or with other libraries or threads, they are only nearly so.
        """
        score = self._scores.get(version)
        if score is not None:
            self._tell_score(version, score)
            if self.best is None or version > self.best.version:
                self._consider(version, score, model)
        before, now = self._digests.get(version), digest_of(model())
        if before != now:
            self._digests.record(version, now)
        return before in (None, now)

    def owes_look(self, version: int) -> bool:
        """Whether nobody has written down yet how a version did."""
        return version not in self._scores

    def forget_after(self, version: int) -> None:
        """Later versions are going to be made again: their scores and weights are of no run."""
        self._digests.forget_after(version)
        self._scores.forget_after(version)
        self._kept.forget_after(version)
        if self.best is not None and self.best.version > version:
            self.best = None

    def finish(self, stop: Callable[[], bool]) -> None:
        """Wait for the publication under way, if any, and raise what went wrong in it.

        Its steps (hand-over, evaluation, files) have their own deadlines; once `stop` says so the
        first two have a few seconds left.
        """
        current, self._current = self._current, None
        while current and not wait([current], _POLL_SECONDS).done:
            if stop() and not self._is_leaving:
                self._is_leaving = True
                self._loop.leave()
        if current:
            current.result()

    def save(self, snapshot: Snapshot) -> None:
        """Commit a checkpoint of the last published version, unless one before it is owed a look.

        A restart goes on from an older cut then, by way of that version.
        """
        if self._owed is not None and snapshot.version > self._owed:
            return
        books = self._loop.state()
        facts = {"books_version": books["version"]}

        def write(folder: Path) -> None:
            write_cut(folder, snapshot, books)
            faults.point("cut.staged")

        self._checkpoints.commit(snapshot.version, write, facts)
        faults.point("cut.committed")

    def best_weights(self) -> Mapping[str, Tensor] | None:
        """The weights that did best; None when nothing was evaluated."""
        folder = self._kept.latest()
        return read_weights(folder) if folder else None

    def _publish(self, snapshot: Snapshot, evaluate: bool, save: bool) -> None:
        faults.point("publish.begin")
        self._digests.record(snapshot.version, digest_of(snapshot.model))
        score = self._loop.publish(snapshot.version, snapshot.model, evaluate)
        faults.point("publish.done")
        if evaluate:
            self._looked(snapshot, score)
        if save:
            self.save(snapshot)

    def _complete(self, snapshot: Snapshot, evaluate: bool, save: bool) -> None:
        if evaluate:
            self._looked(snapshot, self._loop.evaluate(snapshot.version))
        if save:
            self.save(snapshot)

    def _looked(self, snapshot: Snapshot, score: float | None) -> None:
        if score is None and self._is_leaving:
            self._owed = self._owed or snapshot.version
            return
        self._scores.record(snapshot.version, score)
        faults.point("score.recorded")
        if score is not None:
            self._tell_score(snapshot.version, score)
            self._consider(snapshot.version, score, lambda: snapshot.model)

    def _consider(
        self, version: int, score: float, model: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        if self.best is None or score >= self.best.score:
            self.best = Best(version, score)
            weights = model()

            def write(folder: Path) -> None:
                write_weights(folder, weights)
                faults.point("best.staged")

            self._kept.commit(version, write, {"score": score})
            faults.point("best.kept")


def _read_best(kept: Checkpoints) -> Best | None:
    folder = kept.latest()
    if folder is None:
        return None
    facts = read_manifest(folder).facts
    return Best(int(str(facts["step"])), float(str(facts["score"])))
