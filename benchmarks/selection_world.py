"""A simulated policy that learns from what it is asked, for benchmarks of which prompt to ask.

    pass rate of a prompt ──▶ answers ──▶ groups with a gradient ──▶ step ──▶ pass rates …

Nothing here is measured on a model; it is a model of learning, and what follows from it holds as
far as it does:

1. A prompt has a difficulty b and is solved with chance sigmoid(a(b) + e). The skill a of a
   capability is a curve over difficulties, e is the prompt's own.
2. A group of rewards with mean q teaches 4 q (1 - q): the variance of its advantages, 0 when flat.
3. What a group teaches is learnt for difficulties nearby, exp(-(b - b')^2 / (2 * 1.5^2)) as much, a
   fifth of that in the other capabilities, and again a fifth as much on top for the prompt itself.
4. A step moves the skill by the mean over the groups it kept times sqrt(kept / slots): Adam makes
   steps of one size, and a fuller batch has less noise.
5. Some prompts have no answer that could be right, whatever is learnt.

53 % of the prompts begin solved, 23 % beyond reach, 4 % without an answer, 20 % in between: of
groups drawn uniformly four in five have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ground.records import Difficulty, Group, Message, Prompt, Rollout, Segment, Span
from rl.source import Draw
from rollout.seeds import sample_seed

Floats = NDArray[np.float64]

CAPABILITIES: tuple[str, ...] = ("code", "logic", "math")
GROUP_SIZE = 8
MINED = 8
"""Samples of each prompt before training."""
_REACH, _ACROSS, _OWN = 1.5, 0.2, 0.2
_RATE = 0.35
"""Logits that a full batch of groups with q = 1/2 teaches in a step."""
_GRID = np.linspace(-8, 10, 73)


class World:
    """Prompts and a policy whose pass rates on them are known.

    Example:
        world = World(prompts=600, seed=0)
        group = world.answer(draw, version=0);  …;  world.learn(groups, slots=32)
    """

    def __init__(self, prompts: int, seed: int) -> None:
        self._seed, self._dice = seed, np.random.default_rng([seed, 7])
        self._difficulty = self._draw(prompts)
        self._heldout = np.linspace(-3.2, 5.0, 83)
        self._own = np.zeros(prompts)
        self._possible = self._dice.random(prompts) >= 0.04
        self._code = np.arange(prompts) % len(CAPABILITIES)
        self._skill = np.zeros((len(CAPABILITIES), len(_GRID)))
        mined = self._dice.binomial(MINED, self.rates)
        self.prompts = [
            Prompt(
                f"{number:016x}",
                (Message("user", "x"),),
                CAPABILITIES[self._code[number]],
                "exact",
                "",
                Difficulty(successes=int(count), trials=MINED),
            )
            for number, count in enumerate(mined)
        ]

    @property
    def unmined(self) -> list[Prompt]:
        """The same prompts as if nobody had looked at them."""
        return [replace(prompt, difficulty=None) for prompt in self.prompts]

    @property
    def rates(self) -> Floats:
        """[P] chance of a right answer to each prompt, by the policy as it is."""
        return _sigmoid(self._skills() - self._difficulty + self._own) * self._possible

    @property
    def score(self) -> float:
        """Mean pass rate on prompts never trained on, of all difficulties that can be learnt."""
        everyone = range(len(CAPABILITIES))
        levels = [np.interp(self._heldout, _GRID, self._skill[code]) for code in everyone]
        return float(np.mean([_sigmoid(level - self._heldout) for level in levels]))

    def answer(self, draw: Draw, version: int) -> Group:
        """A group, sampled by the policy as it is; by the draw's own luck in every arm."""
        number = int(draw.prompt.id, 16)
        luck = np.random.default_rng(sample_seed(self._seed, draw.prompt.id, draw.number, 0))
        passed = (luck.random(GROUP_SIZE) < self._rate(number)).tolist()
        segments = (Segment("policy", (7,), (-0.5,), (Span(version, 1),)),)
        rollouts = tuple(
            Rollout(index, segments, text="", reward=float(is_right), passed=is_right)
            for index, is_right in enumerate(passed)
        )
        return Group(draw.group_id, draw.prompt, (1,), rollouts)

    def learn(self, groups: Sequence[Group], slots: int) -> None:
        """Take a step on the groups that a batch of so many slots kept."""
        size = _RATE / (max(len(groups), 1) * slots) ** 0.5
        for group in groups:
            number, share = int(group.prompt.id, 16), group.pass_rate
            gain = size * 4 * share * (1 - share)
            near = np.exp(-((_GRID - self._difficulty[number]) ** 2) / (2 * _REACH**2))
            own = np.arange(len(CAPABILITIES)) == self._code[number]
            self._skill += gain * np.where(own, 1.0, _ACROSS)[:, None] * near
            self._own[number] += _OWN * gain

    def _draw(self, count: int) -> Floats:
        """[P] difficulties: solved, beyond reach, and in between."""
        kind = self._dice.random(count)
        solved, beyond = self._dice.uniform(-7, -3.5, count), self._dice.uniform(4, 8, count)
        between = self._dice.uniform(-3.2, 3.5, count)
        return np.select([kind < 0.55, kind < 0.79], [solved, beyond], between)

    def _rate(self, number: int) -> float:
        skill = np.interp(self._difficulty[number], _GRID, self._skill[self._code[number]])
        level = skill - self._difficulty[number] + self._own[number]
        return float(_sigmoid(level)) * bool(self._possible[number])

    def _skills(self) -> Floats:
        """[P] skill of each prompt's capability at its difficulty."""
        everyone = np.stack([np.interp(self._difficulty, _GRID, skill) for skill in self._skill])
        return everyone[self._code, np.arange(len(self._code))]


def _sigmoid(level: Floats | float) -> Floats:
    return 1 / (1 + np.exp(-np.asarray(level)))
