"""All ranks' learners as one: what rank 0 does with its own, it first tells the others to do too.

    rank 0:   step(plan) ─▶ order ─▶ its learner          (rl/loop.py knows no ranks)
    others:   follow():     order ─▶ their learner, until the order to end

Most of what a learner does takes all ranks: gradients are added up over them, and under ZeRO no
rank has all weights or moments. So only one place decides (rank 0's loop); the others do alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from ground.errors import DivergedError
from ground.ranks import Ranks, lost_ranks
from ground.records import Group
from rl.buffer import Plan
from rl.learner import Learner
from rl.prober import Prober
from rollout.weights import Probes

_Word = Literal["step", "load", "brake", "lesson", "weights", "moments", "live", "probes", "end"]


@dataclass(frozen=True, slots=True)
class _Order:
    """What all ranks do next.

    Example:
        _Order("step", plan)
    """

    word: _Word
    subject: Any = None


class Ensemble:
    """The learners of all ranks.

    Example:
        rank 0: Ensemble(learner, prober, ranks).step(plan);  others: ….follow()
    """

    def __init__(self, learner: Learner, prober: Prober, ranks: Ranks) -> None:
        self._learner, self._prober, self._ranks = learner, prober, ranks
        self._update = learner.update

    def step(self, plan: Plan) -> dict[str, float]:
        """See `Learner.step`."""
        return cast(dict[str, float], self._together(_Order("step", plan)))

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """See `Learner.load`; the other ranks get the tensors from here and read no file."""
        self._together(_Order("load", (model, optimizer)))

    @property
    def braked_steps(self) -> int:
        """Braked steps in a row, which a cut keeps."""
        return self._learner.brake.steps

    def go_on_braking(self, steps: int) -> None:
        """Count braked steps from where a cut was made."""
        self._together(_Order("brake", steps))

    @property
    def lesson_state(self) -> dict[str, object]:
        """The weights of the soft term, which a cut keeps; empty without a teacher."""
        return self._learner.lesson.state_dict() if self._learner.lesson else {}

    def go_on_with_lesson(self, state: Mapping[str, object]) -> None:
        """Weigh the soft term from where a cut was made."""
        self._together(_Order("lesson", state))

    def model_tensors(self) -> dict[str, Tensor]:
        """See `Learner.model_tensors`."""
        order = _Order("weights")
        return self._together(order) if self._update.splits_weights else self._do(order)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See `Learner.optimizer_tensors`."""
        order = _Order("moments")
        return self._together(order) if self._update.splits_moments else self._do(order)

    def probes_of(self, groups: Sequence[Group]) -> Callable[[], Probes]:
        """See `Prober.measure`, to be asked within `live`.

        A forward pass takes every rank that has a part of the weights, and none of them may be
        whole then: where that is so, the probes are measured now.
        """
        order = _Order("probes", groups)
        if not self._update.splits_weights:
            return lambda: self._do(order)
        measured = self._together(order)
        return lambda: measured

    @contextmanager
    def live(self) -> Iterator[Mapping[str, Tensor]]:
        """What is trained, itself, whole while this lasts."""
        if self._update.splits_weights:
            self._tell(_Order("live"))
        with self._lost(), self._update.whole():
            yield self._learner.live_tensors()

    def end(self) -> None:
        """Let the other ranks go."""
        self._tell(_Order("end"))

    def follow(self) -> None:
        """Do what rank 0 orders, until the end.

        Raises:
            InfraError: no order came in time, or a rank is gone.
        """
        while (order := self._ranks.shared(_Order("end"))).word != "end":
            # A step that diverges does so on all ranks: what becomes of it is rank 0's to say.
            with suppress(DivergedError), self._lost():
                self._do(order)

    def _together(self, order: _Order) -> Any:
        self._tell(order)
        with self._lost():
            return self._do(order)

    def _tell(self, order: _Order) -> None:
        self._ranks.shared(order)

    def _do(self, order: _Order) -> Any:
        learner = self._learner
        match order.word:
            case "step":
                return learner.step(order.subject)
            case "load":
                return learner.load(*order.subject)
            case "brake":
                learner.brake.steps = order.subject
            case "lesson" if learner.lesson:
                learner.lesson.load_state_dict(order.subject)
            case "weights":
                return learner.model_tensors()
            case "moments":
                return learner.optimizer_tensors()
            case "probes":
                return self._prober.measure(order.subject)
            case "live":
                with self._update.whole():
                    return None
        return None

    def _lost(self) -> Any:
        return lost_ranks(self._ranks.launch, "go on with the others", self._ranks.seconds)
