"""What choosing prompts is worth: groups with a gradient, and rollouts to a target.

    python -m benchmarks.selection       --quick: one seed

Curriculum, books, slots and survey are those of real runs (curation/curriculum.py, rl/books.py);
the policy is simulated, as benchmarks/selection_world.py says, for a dozen arms of five seeds of
real training do not fit a small machine. So these figures compare ways of choosing under that model
of learning; what they gain a real model is for a benchmark that trains one.

All arms of a seed have the same prompts, the same policy and, for the same draw, the same luck.

    uniform        every prompt alike, nothing replaced
    dapo           every prompt alike, flat groups replaced until the batch is full (DAPO's
                   dynamic sampling, at most 31 draws a slot)
    easy to hard   in the order of mined pass rates, flat groups replaced once
    oracle         `order: chance` on true rates: what not knowing costs
    chance, target the two orders, all else as a recipe has it when it says nothing
    no …           `order: chance` without one part

An arm that uses mined pass rates has paid for them: 8 rollouts of each prompt. So has one that is
surveyed for its askings, as if no capacity were idle.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.selection_world import CAPABILITIES, GROUP_SIZE, MINED, Floats, World
from curation.config import CurriculumSection
from curation.curriculum import Curriculum, Observation
from curation.mixture import Mixture
from curation.posterior import posterior, shifted_rate
from ground.records import Difficulty, Prompt
from rl.books import Books
from rl.buffer import Buffer
from rl.simulate import Durations, make_pool, make_section, run_steps
from rl.source import Draw, Source
from rl.survey import Survey

SEEDS = (0, 1, 2, 3, 4)
PROMPTS, SLOTS, STALENESS = 600, 32, 1
STEPS = 60
"""Over which the target falls; an arm that is slower goes on, to ten times as many at most."""
TARGET = 0.7
"""Pass rate on prompts never trained on; 0.40 at the beginning."""
_MOST = 10 * STEPS


@dataclass(frozen=True, slots=True)
class Beliefs:
    """What is believed of each prompt, by its id.

    The interval is that of the rate as it was when it was seen, moved as far as its capability has
    come: the posterior's own quantiles, where the Beta that draws follow from is close to it.
    """

    low: Floats
    high: Floats
    mean: Floats
    active: NDArray[np.bool_]


class Watched(Curriculum):
    """The real one, which can be asked what it believes."""

    def beliefs(self) -> Beliefs:
        """[P] each, in the order of ids."""
        of, seen = self._strata.of, self._evidence
        beta = stats.beta(1 + seen.successes[of], 1 + (seen.trials - seen.successes)[of])
        low, high = (shifted_rate(beta.ppf(q), seen.shift()[of]) for q in (0.05, 0.95))
        active = ~(self._retired() | self._deferred())[of]
        return Beliefs(low, high, posterior(*seen.today())[0][of], active)


class Blind(Curriculum):
    """Is told nothing, so that it believes for ever what was mined; unmined prompts are alike."""

    def observe(
        self,
        version: int,
        observations: Sequence[Observation],
        refused: Iterable[str] = (),
        *,
        wide: Iterable[str] = (),
    ) -> None:
        """Go on to the next version."""
        super().observe(version, [])


class EasyToHard(Blind):
    """Goes through the prompts of a capability in `STEPS` versions, and then again."""

    def draw(self, version: int, capability: str, n: int) -> Prompt:
        """The n-th from where the version begins."""
        own = [prompt for prompt in self._pool if prompt.capability == capability]
        own.sort(key=lambda prompt: -prompt.difficulty.successes if prompt.difficulty else 0)
        return own[(version * len(own) // STEPS + n) % len(own)]


class Oracle(Blind):
    """Believes the true pass rates, as of ten thousand trials of each prompt at every version."""

    def __init__(self, world: World, section: CurriculumSection, seed: int) -> None:
        self._world = world
        super().__init__(world.prompts, section, seed=seed, group_size=GROUP_SIZE, steps=STEPS)
        self._look()

    def observe(
        self,
        version: int,
        observations: Sequence[Observation],
        refused: Iterable[str] = (),
        *,
        wide: Iterable[str] = (),
    ) -> None:
        """Go on to the next version and look at the policy."""
        super().observe(version, [])
        self._look()

    def _look(self) -> None:
        rates = zip(self._world.prompts, self._world.rates.tolist(), strict=True)
        state = self.state_dict()
        self.load_state_dict(
            version=self.version,
            wide=(),
            pool=str(state["pool"]),
            evidence={prompt.id: [rate * 10_000, 10_000.0] for prompt, rate in rates},
            drift={
                "levels": [0.0] * len(CAPABILITIES),
                "variances": [0.0] * len(CAPABILITIES),
                "since": [0.0] * PROMPTS,
            },
            refused=[],
        )


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to choose prompts.

    Example:
        Arm({"order": "target"});  Arm(kind=Blind, mined=False, refills=30)
    """

    settings: dict[str, object] = field(default_factory=dict)
    """Of `rl.curriculum`."""
    kind: type[Curriculum] = Watched
    mined: bool = True
    refills: int = 1
    quotas: bool = False

    def make(self, world: World, seed: int) -> Books:
        """Books of a run that nobody ends."""
        section = CurriculumSection.model_validate(self.settings)
        pool = world.prompts if self.mined else world.unmined
        if self.kind is Oracle:
            curriculum: Curriculum = Oracle(world, section, seed)
        else:
            curriculum = self.kind(pool, section, seed=seed, group_size=GROUP_SIZE, steps=STEPS)
        even = dict.fromkeys(CAPABILITIES, 1 / len(CAPABILITIES))
        source = Source(
            curriculum,
            steps=_MOST,
            groups_per_step=SLOTS,
            max_staleness=STALENESS,
            max_refills=self.refills,
            mixture=Mixture(even, batch=SLOTS, patience=3) if self.quotas else None,
        )
        buffer = Buffer(groups_per_step=SLOTS, max_staleness=STALENESS)
        survey, groups = None, section.survey_groups
        if groups:
            survey = Survey(pool, groups=groups, max_staleness=STALENESS, seed=seed)
        return Books(source, buffer, lambda record: None, survey=survey)


ARMS = {
    "uniform": Arm(kind=Blind, mined=False, refills=0),
    "dapo": Arm(kind=Blind, mined=False, refills=30),
    "easy to hard": Arm(kind=EasyToHard),
    "oracle": Arm(kind=Oracle),
    "chance": Arm(),
    "target": Arm({"order": "target"}),
    "no posterior": Arm(kind=Blind),
    "no drift": Arm({"drift": 0.0}),
    "no decay": Arm({"decay": 1.0}),
    "no retiring": Arm({"retire_at": 1.0}),
    "no band": Arm({"review_share": 0.5}),
    "no mining": Arm(mined=False),
    "survey": Arm({"survey_groups": 4}),
    "quotas": Arm(quotas=True),
}
"""`no band` gives half of the draws to solved and hopeless prompts; `no retiring` calls a prompt
solved when no answer was wrong; `survey` and `quotas` are additions that are off by themselves."""


@dataclass(slots=True)
class Trial:
    """How an arm went with a seed.

    Example:
        Trial(steps=54, rollouts=19_000, mining=4_800, drawn=2_200, teaching=1_400, …)
    """

    steps: int = 0
    rollouts: int = 0
    """Until the target was reached, mining left out."""
    mining: int = 0
    drawn: int = 0
    """Groups, askings left out."""
    teaching: int = 0
    """Of them with a gradient."""
    errors: list[float] = field(default_factory=list)
    """True less believed pass rate, mean over the active prompts, every fifth version."""
    covered: list[float] = field(default_factory=list)
    """Share of the active prompts whose true rate lies in the 90 % interval."""

    @property
    def cost(self) -> int:
        """Rollouts in all."""
        return self.rollouts + self.mining


def play(arm: Arm, seed: int) -> Trial:
    """Train until the target is reached."""
    world = World(PROMPTS, seed)
    trial = Trial(mining=PROMPTS * MINED if arm.mined else 0)
    books = arm.make(world, seed)
    draws = books.open()
    while trial.steps < _MOST:
        if trial.steps % 5 == 0 and isinstance(books.curriculum, Watched):
            _compare(trial, books.curriculum.beliefs(), world.rates)
        _answer(trial, books, draws, world)
        plan = books.plan(trial.steps)
        world.learn(plan.groups, SLOTS)
        trial.steps += 1
        if world.score >= TARGET:
            break
        draws = books.publish(trial.steps)
    return trial


def _answer(trial: Trial, books: Books, draws: list[Draw], world: World) -> None:
    """All draws and askings that are open, and what replaces them."""
    waiting = draws + books.askings()
    while waiting:
        draw = waiting.pop(0)
        books.send(draw)
        group = world.answer(draw, books.version)
        refill = books.settle(draw, group)
        waiting += [refill] if refill else []
        trial.rollouts += GROUP_SIZE
        if draw.slot >= 0:
            trial.drawn += 1
            trial.teaching += 0 < group.pass_rate < 1


def _compare(trial: Trial, seen: Beliefs, truth: Floats) -> None:
    trial.errors.append(float((truth - seen.mean)[seen.active].mean()))
    inside = (seen.low <= truth) & (truth <= seen.high)
    trial.covered.append(float(inside[seen.active].mean()))


def coverage(seed: int, versions: int = 40, prompts: int = 300) -> tuple[float, float]:
    """Share of prompts and versions whose true rate lies in the 90 % interval, without levels and
    with them, where the curriculum's own assumptions hold: rates are uniform at first, then all
    rise by 0.1 logits a version and each wanders by 0.1 more or less."""
    without, following = (
        _synthetic_coverage(seed, versions, prompts, drift)
        for drift in (0.0, CurriculumSection().drift)
    )
    return without, following


def _synthetic_coverage(seed: int, versions: int, prompts: int, drift: float) -> float:
    dice = np.random.default_rng([seed, 11])
    logits = dice.logistic(size=prompts)
    mined = dice.binomial(MINED, _rates(logits))
    pool = [
        replace(prompt, capability="one", difficulty=Difficulty(successes=int(count), trials=MINED))
        for prompt, count in zip(World(prompts, seed).prompts, mined, strict=True)
    ]
    section = CurriculumSection(drift=drift)
    curriculum = Watched(pool, section, seed=seed, group_size=GROUP_SIZE, steps=versions)
    covered = []
    for version in range(versions):
        truth, seen = _rates(logits), curriculum.beliefs()
        covered.append(float(((seen.low <= truth) & (truth <= seen.high)).mean()))
        ids = [curriculum.draw(version, "one", n).id for n in range(SLOTS)]
        shown = [int(dice.binomial(GROUP_SIZE, truth[int(each, 16)])) for each in ids]
        told = [Observation(i, n, GROUP_SIZE) for i, n in zip(ids, shown, strict=True)]
        curriculum.observe(version + 1, told)
        logits = logits + 0.1 + 0.1 * dice.normal(size=prompts)
    return float(np.mean(covered))


def survey_cost(staleness: int, seed: int) -> float:
    """Seconds of a run with four askings a version over those without, the same otherwise but for
    what is drawn: real controller and fleet on a virtual clock, answers of skewed lengths."""
    seconds = []
    for groups in (0, 4):
        section = make_section(
            steps=20, groups_per_step=16, group_size=8, workers=4, slots=32, staleness=staleness
        )
        chosen = section.curriculum.model_copy(update={"survey_groups": groups})
        durations = Durations(
            tokens=lambda sample: random.Random(sample).lognormvariate(3, 0.6),
            train_seconds=lambda plan: 60.0,
            flat_share=0.4,
        )
        section = section.model_copy(update={"curriculum": chosen})
        seconds.append(run_steps(section, make_pool(400), durations, seed=seed).seconds)
    return seconds[1] / seconds[0]


def _rates(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def measure(quick: bool) -> Report:
    """All arms."""
    seeds = SEEDS[:1] if quick else SEEDS
    trials = {name: [play(arm, seed) for seed in seeds] for name, arm in ARMS.items()}
    covered = np.array([coverage(seed) for seed in seeds])
    spared = {name: _ratios(trials["uniform"], each) for name, each in trials.items()}
    figures = [
        *(
            Figure(f"groups with a gradient, {name}", _share(trials[name]), "of the drawn",
                   tolerance=0.1)
            for name in ("uniform", "dapo", "easy to hard", "oracle", "chance", "target")
        ),
        Figure("groups with a gradient, chance over oracle",
               _share(trials["chance"]) / _share(trials["oracle"]), "x", goal=0.8, tolerance=0.15),
        *(
            Figure(f"rollouts to the target, uniform over {name}", statistics.fmean(spared[name]),
                   "x", tolerance=1.0)
            for name in ("dapo", "easy to hard", "oracle", "chance", "target")
        ),
        Figure("rollouts to the target, uniform over chance, mining not counted",
               statistics.fmean(a.rollouts / b.rollouts for a, b in
                                zip(trials["uniform"], trials["chance"], strict=True)),
               "x", goal=2.0, tolerance=1.0),
        *(
            Figure(f"rollouts to the target, {name} over chance",
                   statistics.fmean(_ratios(trials[name], trials["chance"])), "x")
            for name in list(ARMS)[5:]
        ),
        *(
            Figure(f"seconds with a survey over without, {name}",
                   statistics.fmean(survey_cost(staleness, seed) for seed in seeds), "x",
                   goal=goal, better="lower", tolerance=0.1)
            for name, staleness, goal in (("overlapping", 1, 1.03), ("in turns", 0, None))
        ),
        Figure("belief off, active prompts, no drift", _error(trials["no drift"]), "",
               better="lower", tolerance=0.05),
        Figure("belief off, active prompts", _error(trials["chance"]), "", better="lower",
               tolerance=0.05),
        Figure("90 % interval, synthetic truth: off by",
               abs(float(covered[:, 1].mean()) - 0.9), "",
               goal=0.03, better="lower", tolerance=0.03),
        Figure("90 % interval, synthetic truth, no drift", float(covered[:, 0].mean()), "covered"),
        Figure("90 % interval, simulated learner", _covered(trials["chance"]), "covered",
               tolerance=0.1),
    ]  # fmt: skip
    details = {name: [_told(trial) for trial in each] for name, each in trials.items()}
    return Report(figures, {"trials": details, "coverage": covered.tolist()})


def _told(trial: Trial) -> dict[str, int]:
    shown = {"steps": trial.steps, "rollouts": trial.rollouts, "mining": trial.mining}
    return shown | {"drawn": trial.drawn, "teaching": trial.teaching}


def _share(trials: Sequence[Trial]) -> float:
    return statistics.fmean(trial.teaching / trial.drawn for trial in trials)


def _ratios(one: Sequence[Trial], other: Sequence[Trial]) -> list[float]:
    """Rollouts of one arm over those of another, seed by seed, mining included."""
    return [a.cost / b.cost for a, b in zip(one, other, strict=True)]


def _error(trials: Sequence[Trial]) -> float:
    return statistics.fmean(abs(error) for trial in trials for error in trial.errors)


def _covered(trials: Sequence[Trial]) -> float:
    return statistics.fmean(share for trial in trials for share in trial.covered)


if __name__ == "__main__":
    sys.exit(run_benchmark("selection", measure, seeds=SEEDS))
