"""Toy worlds whose truth is known: two domains, a teacher that errs in one of four ways, students.

A context is a domain and two words of it; the truth is a random network's distribution over the
next token, sharp for one half of the first words and flat for the other. The teacher is the truth
with a small error of its own and, in each domain, one fault at a severity that is drawn anew:

    wrong_low   another network's answer, as sure of itself, on a share of the sharp contexts
    good        no more than the small error
    wrong_high  another network's answer on a share of the flat contexts
    smooth      the truth at a temperature between 1 and 4
    random      another network's answer everywhere (no world of the eight; for the drive alone)

One domain's fault is severe, the other's slight. `multi` trains many epochs over few tokens, which
are learned by heart; `single` draws new ones in every step. Students are small MLPs in torch; many
are trained side by side on the same data from the same start, one for each way to weigh.

S students, C contexts, V tokens, B tokens of a batch, F features, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.signal import HeadTokens, SoftTokens, token_gains
from distill.weighting import HeldoutWeighting

KINDS = ("wrong_low", "good", "wrong_high", "smooth")
REGIMES = ("multi", "single")
DOMAINS = ("first", "second")
VOCABULARY, WORDS, WIDTH = 24, 24, 40
BATCH, TRAINED_TOKENS, HELDOUT_TOKENS = 256, 3000, 1000
IN_TURN, RECENT = 500, 2
"""Held-out tokens that one observation looks at, and batches before it, as many as by default."""
LEARNING_RATE = 4e-3


@dataclass(frozen=True, slots=True)
class World:
    """The truth and what the teacher makes of it, for every context.

    Example:
        World.draw("wrong_low", "multi", seed=3)
    """

    kind: str
    regime: str
    truth_CV: Tensor
    teacher_CV: Tensor
    domain_C: Tensor
    features_CF: Tensor
    entropy_C: Tensor
    """Of the teacher, in nats."""
    share: float
    """Of the first domain among the tokens."""
    severity: tuple[float, float]

    @classmethod
    def draw(cls, kind: str, regime: str, seed: int) -> World:
        """A world that follows from its seed."""
        dice = torch.Generator().manual_seed(seed)
        context_C = torch.arange(2 * WORDS**2)
        domain_C = context_C // WORDS**2
        words_C2 = torch.stack([context_C // WORDS % WORDS, context_C % WORDS], 1)
        truth, other, error = (_network(dice) for _ in range(3))
        is_sharp_C = _marked(dice, torch.full((2,), 0.5))[domain_C, words_C2[:, 0]]
        scale_C1 = torch.where(is_sharp_C, 6.0, 1.2)[:, None]
        truth_CV = (truth(domain_C, words_C2) * scale_C1).softmax(-1)
        other_CV = (other(domain_C, words_C2) * scale_C1).softmax(-1)
        log_CV = truth_CV.clamp_min(1e-6).log()
        log_CV = log_CV + _uniform(dice, 0.1, 0.3) * error(domain_C, words_C2)
        severe, slight = _uniform(dice, 0.6, 1.0), _uniform(dice, 0.0, 0.4)
        severity = (severe, slight) if _uniform(dice, 0, 1) < 0.5 else (slight, severe)
        is_hit_C = _marked(dice, torch.tensor(severity))[domain_C, words_C2[:, 0]]
        if kind == "smooth":
            log_CV = log_CV / (1 + 3 * torch.tensor(severity)[domain_C, None])
        elif kind != "good":
            hit = {"wrong_low": is_hit_C & is_sharp_C, "wrong_high": is_hit_C & ~is_sharp_C}
            is_hit_C = hit.get(kind, torch.ones_like(is_hit_C))
            log_CV = torch.where(is_hit_C[:, None], other_CV.clamp_min(1e-9).log(), log_CV)
        teacher_CV = log_CV.softmax(-1)
        return cls(
            kind,
            regime,
            truth_CV,
            teacher_CV,
            domain_C,
            torch.cat([F.one_hot(words_C2).flatten(1), F.one_hot(domain_C)], 1).float(),
            torch.special.entr(teacher_CV).sum(-1),
            _uniform(dice, 0.4, 0.6),
            severity,
        )

    def sample(self, count: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
        """Contexts and the tokens that followed them."""
        domain_B = (torch.rand(count, generator=dice) > self.share).long()
        contexts_B = domain_B * WORDS**2 + torch.randint(WORDS**2, (count,), generator=dice)
        return contexts_B, torch.multinomial(self.truth_CV[contexts_B], 1, generator=dice)[:, 0]

    def distance(self, logprobs_SCV: Tensor) -> Tensor:
        """KL(truth || student) in nats, mean over each domain's contexts, [S, 2]."""
        entropy_C = torch.special.entr(self.truth_CV).sum(-1)
        kl_SC = -(self.truth_CV * logprobs_SCV).sum(-1) - entropy_C
        return torch.stack([kl_SC[:, self.domain_C == domain].mean(-1) for domain in (0, 1)], -1)


class Students:
    """Equal networks with weights of their own: features → W → W → W → V."""

    def __init__(self, count: int, features: int, dice: torch.Generator) -> None:
        shapes = ((features, WIDTH), (1, WIDTH), (WIDTH, WIDTH), (1, WIDTH), (WIDTH, WIDTH))
        shapes = (*shapes, (1, WIDTH), (VOCABULARY, WIDTH))
        scales = (0.5, 0.0, WIDTH**-0.5, 0.0, WIDTH**-0.5, 0.0, 0.1 * WIDTH**-0.5)
        self.weights = [
            (torch.randn(*shape, generator=dice) * scale).repeat(count, 1, 1).requires_grad_()
            for shape, scale in zip(shapes, scales, strict=True)
        ]

    def hidden(self, features_BF: Tensor, part: slice = slice(None)) -> Tensor:
        """What the heads see, [S, B, W]."""
        hidden_SBW = features_BF
        for weight, bias in zip(self.weights[:-1:2], self.weights[1:-1:2], strict=True):
            hidden_SBW = torch.relu(hidden_SBW @ weight[part] + bias[part])
        return hidden_SBW

    def logprobs(self, features_BF: Tensor) -> Tensor:
        """[S, B, V]"""
        return (self.hidden(features_BF) @ self.weights[-1].transpose(1, 2)).log_softmax(-1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the students of a world ended.

    Example:
        distance_S2 [[0.41, 0.30]], heldout_S2 [[2.1, 1.9]], shares of step 100 and the end
    """

    distance_S2: Tensor
    """KL to the truth, by domain."""
    heldout_S2: Tensor
    """Cross-entropy of the held-out tokens, by domain."""
    shares: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    """Step → each student's shares."""


def train(
    world: World, rules: Sequence[HeldoutWeighting], seed: int, steps: int, stop: int | None = None
) -> Outcome:
    """One student per rule, all from the same start on the same batches.

    Args:
        stop: the last step that is taken of a run of `steps`; all of them by default.
    """
    dice = torch.Generator().manual_seed(1_000_003 * seed + 1)  # another stream than the world's
    students = Students(len(rules), world.features_CF.shape[1], dice)
    optimizer = torch.optim.Adam(students.weights, lr=LEARNING_RATE, betas=(0.9, 0.98))
    few = world.sample(TRAINED_TOKENS, dice)
    heldout = world.sample(HELDOUT_TOKENS, dice)
    recent: list[tuple[Tensor, Tensor]] = []
    outcome_shares: dict[int, list[dict[str, float]]] = {}
    for step in range(stop or steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 2 * (1 - step / steps))
        if world.regime == "multi":
            picked_B = torch.randint(TRAINED_TOKENS, (BATCH,), generator=dice)
            contexts_B, labels_B = few[0][picked_B], few[1][picked_B]
        else:
            contexts_B, labels_B = world.sample(BATCH, dice)
        loss = _loss(world, students, rules, step, contexts_B, labels_B)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        recent = [*recent, (contexts_B, labels_B)][-RECENT:]
        for place, rule in enumerate(rules):
            if rule.observe_every and (step + 1) % rule.observe_every == 0:
                turn = step // rule.observe_every
                _observe(world, students, place, rule, step + 1, _in_turn(heldout, turn), recent)
        if step + 1 in (100, stop or steps):
            outcome_shares[step + 1] = [dict(rule.shares) for rule in rules]
    with torch.no_grad():
        distance_S2 = world.distance(students.logprobs(world.features_CF))
        heldout_SB = students.logprobs(world.features_CF[heldout[0]])
        heldout_SB = -heldout_SB.gather(-1, heldout[1].expand(len(rules), -1)[..., None])[..., 0]
    is_first_B = world.domain_C[heldout[0]] == 0
    heldout_S2 = torch.stack([heldout_SB[:, mask].mean(-1) for mask in (is_first_B, ~is_first_B)])
    return Outcome(distance_S2, heldout_S2.T, outcome_shares)


def _loss(
    world: World,
    students: Students,
    rules: Sequence[HeldoutWeighting],
    step: int,
    contexts_B: Tensor,
    labels_B: Tensor,
) -> Tensor:
    """Sum over the students of (1 - a) CE + a KL, but for the teacher's own entropy."""
    names = [DOMAINS[domain] for domain in world.domain_C[contexts_B].tolist()]
    entropy_B1 = world.entropy_C[contexts_B, None]
    known_B1 = torch.ones_like(entropy_B1, dtype=torch.bool)
    shares = [rule.weights(step, names, entropy_B1, known_B1) for rule in rules]
    share_SB1 = torch.stack(shares)
    hard_BV = F.one_hot(labels_B, VOCABULARY)
    target_SBV = hard_BV + share_SB1 * (world.teacher_CV[contexts_B] - hard_BV)
    return -(target_SBV * students.logprobs(world.features_CF[contexts_B])).sum() / BATCH


def _in_turn(heldout: tuple[Tensor, Tensor], turn: int) -> tuple[Tensor, Tensor]:
    """The part of the held-out tokens whose turn it is."""
    part = (torch.arange(IN_TURN) + turn * IN_TURN) % HELDOUT_TOKENS
    return heldout[0][part], heldout[1][part]


@torch.no_grad()
def _observe(
    world: World,
    students: Students,
    place: int,
    rule: HeldoutWeighting,
    step: int,
    heldout: tuple[Tensor, Tensor],
    recent: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Tell a rule, domain by domain, what the held-out tokens say of the last batches' teacher."""
    contexts_N, labels_N = (torch.cat(parts) for parts in zip(*recent, strict=True))
    head_VW = students.weights[-1][place]
    for domain, name in enumerate(DOMAINS):
        sides = []
        for contexts, labels in (heldout, (contexts_N, labels_N)):
            mine = world.domain_C[contexts] == domain
            features = world.features_CF[contexts[mine]]
            hidden = students.hidden(features, slice(place, place + 1))[0]
            sides.append(HeadTokens(hidden, labels[mine]))
        mine_N = contexts_N[world.domain_C[contexts_N] == domain]
        soft = SoftTokens(None, world.teacher_CV[mine_N], torch.zeros(len(mine_N)))
        gains = token_gains(sides[0], sides[1], soft, head_VW)
        rule.observe(step, name, gains, world.entropy_C[mine_N])


def _network(dice: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """Random logits of (domain, words), about one in size."""
    width = 24
    first, second = torch.randn(2, WORDS, width, generator=dice)
    domains = torch.randn(2, width, generator=dice)
    head = torch.randn(width, VOCABULARY, generator=dice) / math.sqrt(width)

    def logits(domain_C: Tensor, words_C2: Tensor) -> Tensor:
        inside = first[words_C2[:, 0]] + second[words_C2[:, 1]] + domains[domain_C]
        return torch.tanh(0.7 * inside) @ head

    return logits


def _marked(dice: torch.Generator, share_2: Tensor) -> Tensor:
    """Words of each domain that are marked, as large a share as asked for, [2, words]."""
    ranks = [torch.randperm(WORDS, generator=dice) for _ in range(2)]
    return torch.stack(ranks) < (share_2 * WORDS).round()[:, None]


def _uniform(dice: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=dice).item()
