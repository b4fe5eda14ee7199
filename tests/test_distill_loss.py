"""The soft loss: numbers by hand, bounds that always hold, gradients, and what cannot break it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ground_logprobs import LargestTensor
from torch import Tensor

from distill.loss import FLOOR, Divergence, distill_loss, token_losses
from distill.outcomes import outcome_logits
from distill.targets import NO_TOKEN, TargetFormat, TeacherTargets, joined
from ground.errors import RecipeError

FULL = TargetFormat("full")
KINDS = (Divergence("forward"), Divergence("reverse"), Divergence("jsd", beta=0.3))


class Case:
    """Random students and teachers of N tokens over V ids, in float64 unless told otherwise."""

    def __init__(self, num: int, vocabulary: int, seed: int = 3, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.generator = generator
        self.hidden = torch.randn(num, 6, generator=generator, dtype=dtype).requires_grad_()
        self.weight = torch.randn(vocabulary, 6, generator=generator, dtype=dtype).requires_grad_()
        self.labels = torch.randint(vocabulary, (num,), generator=generator)
        self.teacher = 2 * torch.randn(num, vocabulary, generator=generator)

    def targets(self, format: TargetFormat) -> TeacherTargets:
        return format.make(self.teacher, self.labels, self.generator)

    def losses(self, targets: TeacherTargets, divergence: Divergence) -> tuple[Tensor, Tensor]:
        return token_losses(self.hidden, self.weight, self.labels, targets, divergence)

    def gradient(self, targets: TeacherTargets, divergence: Divergence = KINDS[0]) -> Tensor:
        return torch.autograd.grad(self.losses(targets, divergence)[1].sum(), self.hidden)[0]


def coin(student: float, teacher: float, kind: Divergence) -> tuple[float, float]:
    """Hard and soft loss where label 0 has these probabilities, of two tokens."""
    weight = torch.tensor([[math.log(student / (1 - student))], [0.0]], dtype=torch.float64)
    logits = torch.tensor([[math.log(teacher / (1 - teacher)), 0.0]], dtype=torch.float64)
    labels = torch.tensor([0])
    targets = TargetFormat("topk_tail", count=1).make(logits, labels)
    one = torch.ones(1, 1, dtype=torch.float64)
    hard, soft = token_losses(one, weight, labels, targets, kind)
    return hard.item(), soft.item()


def test_two_coins_by_hand():
    """t = [.9, .1], q = [.5, .5], m = [.7, .3] for β = .5."""
    hard, forward = coin(0.5, 0.9, Divergence("forward"))
    assert hard == pytest.approx(math.log(2))
    assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)
    reverse = coin(0.5, 0.9, Divergence("reverse"))[1]
    assert reverse == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), abs=1e-6)
    jsd = coin(0.5, 0.9, Divergence("jsd", beta=0.5))[1]
    by_hand = 0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3)
    by_hand += 0.5 * math.log(5 / 7) + 0.5 * math.log(5 / 3)
    assert jsd == pytest.approx(by_hand / 2, abs=1e-6)


def test_the_mass_that_is_not_kept_is_one_outcome():
    """t = [.5 | .3 .2], q = [.25 | .5 .25], only label 0 kept: two outcomes, .5 and .25 of them."""
    weight = torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.5, 0.3, 0.2]]).log()
    labels, one = torch.tensor([0]), torch.ones(1, 1, dtype=torch.float64)
    targets = TargetFormat("topk_tail", count=0).make(teacher, labels)
    assert targets.tail_T.exp().item() == pytest.approx(0.5)
    hard, soft = token_losses(one, weight, labels, targets, Divergence())
    assert hard.item() == pytest.approx(math.log(4))
    assert soft.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), abs=1e-6)


def test_shares_are_mixed_and_divided_by_the_tokens_of_the_step():
    """(.75 · 2 + .25 · 4) + 8 = 10.5, over 5 tokens."""
    hard, soft = torch.tensor([2.0, 8.0]), torch.tensor([4.0, 1.0])
    assert distill_loss(hard, soft, torch.tensor([0.25, 0.0]), 5).item() == pytest.approx(2.1)
    assert distill_loss(hard[:0], soft[:0], torch.tensor([]), 0).item() == 0


@settings(max_examples=60)
@given(
    st.integers(0, 9), st.integers(1, 14), st.sampled_from(KINDS), st.floats(0.3, 4), st.booleans()
)
def test_less_that_is_kept_is_never_more_loss(seed, k, kind, scale, is_masked):
    """KL and JSD over outcomes that are put together are at most those over all of them."""
    case = Case(5, 16, seed)
    case.teacher *= scale
    if is_masked:
        case.teacher[:, 7:11] = -torch.inf
        kind = KINDS[0]
    whole = case.losses(case.targets(FULL), kind)
    part = case.losses(case.targets(TargetFormat("topk_tail", count=k, always=(3,))), kind)
    torch.testing.assert_close(part[0], whole[0])
    assert (part[1] <= whole[1] + 1e-6).all() and (part[1] >= -1e-6).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_full_and_all_of_topk_agree(monkeypatch, kind):
    """Also where the student's head has rows that are no tokens, and over tiles of two columns."""
    monkeypatch.setattr("ground.logprobs.BLOCK_TOKENS", 4)
    monkeypatch.setattr("ground.logprobs.TILE_ELEMENTS_CPU", 8)
    case = Case(9, 16)
    case.teacher, case.labels = case.teacher[:, :13], case.labels % 13
    whole = case.targets(FULL)
    part = case.targets(TargetFormat("topk_tail", count=13))
    for ours, theirs in zip(case.losses(part, kind), case.losses(whole, kind), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        case.gradient(part, kind), case.gradient(whole, kind), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_hold_in_fp64(monkeypatch, kind, temperature):
    monkeypatch.setattr("ground.logprobs.BLOCK_TOKENS", 2)
    monkeypatch.setattr("ground.logprobs.TILE_ELEMENTS_CPU", 6)
    case = Case(5, 8)
    targets = case.targets(TargetFormat("topk_tail", count=3, temperature=temperature))
    kind = Divergence(kind.kind, kind.beta, temperature)

    def losses(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_losses(hidden, weight, case.labels, targets, kind)

    assert torch.autograd.gradcheck(losses, (case.hidden, case.weight))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_by_the_logits_is_q_minus_t(temperature):
    """Of the forward KL, times the temperature (squared, over the one of the logits)."""
    case = Case(4, 8)
    format = TargetFormat("full", temperature=temperature)
    logits = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(8, dtype=torch.float64)
    kind = Divergence(temperature=temperature)
    soft = token_losses(logits, eye, case.labels, case.targets(format), kind)[1]
    q = (logits / temperature).softmax(-1)
    t = (case.teacher.double() / temperature).softmax(-1)
    gradient = torch.autograd.grad(soft.sum(), logits)[0]
    torch.testing.assert_close(gradient, temperature * (q - t), atol=1e-6, rtol=0)


@pytest.mark.parametrize("exact", [0, 3])
def test_the_mean_of_sampled_gradients_is_the_full_one(exact):
    """4,096 draws of one token's targets: within 2 % of the gradient, and of the loss."""
    one = Case(1, 32)
    case = Case(4096, 32)
    case.hidden = one.hidden.detach().expand(4096, -1).clone().requires_grad_()
    case.weight, case.labels = one.weight, one.labels.expand(4096)
    case.teacher = one.teacher.expand(4096, -1)
    sampled = case.targets(TargetFormat("sampled", count=4, exact=exact, always=(5, 6)))
    assert sampled.logprobs_TK.exp().sum(-1).sub(1).abs().max() < 1e-5
    want = one.gradient(one.targets(FULL))[0]
    off = (case.gradient(sampled).mean(0) - want).norm() / want.norm()
    assert off < 0.02
    single = (case.gradient(sampled)[0] - want).norm() / want.norm()
    assert single > 0.02, "draws that are not random would hide a bias"
    loss = case.losses(sampled, Divergence())[1].mean()
    assert loss.item() == pytest.approx(one.losses(one.targets(FULL), Divergence())[1].item(), 0.02)


def test_the_likeliest_are_kept_as_they_are_and_the_rest_is_drawn():
    """t = [.5 .25 .125 .125], label 3, one likeliest: 3 and 0 exactly, .375 drawn from 1 and 2."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().expand(4096, -1)
    labels = torch.full((4096,), 3)
    format = TargetFormat("sampled", count=2, exact=1)
    targets = format.make(teacher, labels, torch.Generator().manual_seed(0))
    assert targets.ids_TK is not None and targets.ids_TK[:, :2].unique(dim=0).tolist() == [[3, 0]]
    probs_TK = targets.logprobs_TK.exp()
    torch.testing.assert_close(probs_TK[:, :2].mean(0), torch.tensor([0.125, 0.5]))
    torch.testing.assert_close(probs_TK[:, 2:].sum(1), torch.full((4096,), 0.375))
    is_one_TK = targets.ids_TK == 1
    assert (probs_TK * is_one_TK).sum(1).mean().item() == pytest.approx(0.25, rel=0.02)
    assert format.width(4) == 4 and str(format) == "sampled draws=2 k=1"


def test_draws_are_the_same_under_the_same_seed():
    case, format = Case(3, 32), TargetFormat("sampled", count=8)
    made = [
        format.make(case.teacher, case.labels, torch.Generator().manual_seed(seed)).logprobs_TK
        for seed in (1, 1, 2)
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("kind", "format"),
    [(KINDS[0], "sampled"), *((kind, name) for kind in KINDS for name in ("full", "topk_tail"))],
    ids=str,
)
def test_tokens_without_support_cost_nothing_and_break_nothing(kind, format):
    """A silent teacher, one that forbids the label, and one that knows one token only."""
    case = Case(3, 8)
    case.teacher[1, case.labels[1]] = -torch.inf
    case.teacher[2] = -torch.inf
    case.teacher[2, case.labels[2]] = 0.0
    targets = case.targets(TargetFormat(format, count=2))
    targets.logprobs_TK[0] = targets.tail_T[0] = targets.realised_T[0] = -torch.inf
    assert targets.is_supported_T.tolist() == [False, False, True]
    hard, soft = case.losses(targets, kind)
    assert torch.isfinite(hard).all() and torch.isfinite(soft).all()
    assert soft[0].item() == 0
    gradient = case.gradient(targets, kind)
    assert torch.isfinite(gradient).all() and gradient[0].abs().max() == 0
    if kind.kind == "forward":
        assert soft[2].item() == pytest.approx(hard[2].item(), abs=1e-6)
    if kind.kind == "reverse" and format == "full":
        assert soft[2].item() < -FLOOR + 1


def test_how_tokens_are_dealt_out_does_not_matter():
    """All at once, or each pass with its own part of them."""
    case = Case(7, 16)
    targets = case.targets(TargetFormat("topk_tail", count=4))
    shares = torch.linspace(0, 1, 7)
    whole = distill_loss(*case.losses(targets, KINDS[0]), shares, 7)
    parts = []
    for part in (slice(0, 3), slice(3, 4), slice(4, 4), slice(4, 7)):
        losses = token_losses(
            case.hidden[part], case.weight, case.labels[part], targets.slice(part), KINDS[0]
        )
        parts.append(distill_loss(*losses, shares[part], 7))
    torch.testing.assert_close(sum(parts), whole)
    again = joined([targets.slice(slice(0, 3)), targets.slice(slice(3, 7))])
    assert again.ids_TK is not None and torch.equal(again.ids_TK, targets.ids_TK)  # pyright: ignore[reportArgumentType]


def test_no_tensor_of_all_logits_is_ever_made():
    case = Case(4096, 2000, dtype=torch.float32)
    targets = case.targets(TargetFormat("topk_tail", count=8))
    with LargestTensor() as largest:
        hard, soft = case.losses(targets, Divergence())
        (hard + soft).sum().backward()
    assert largest.elements <= 2**20 < 4096 * 2000 / 7


def test_a_model_in_half_precision_has_the_losses_of_its_numbers():
    """Arithmetic is in fp32 whatever the model's own: equal losses, gradients rounded once."""
    half = Case(9, 300, dtype=torch.bfloat16)
    whole = Case(9, 300, dtype=torch.bfloat16)
    whole.hidden = half.hidden.detach().float().requires_grad_()
    whole.weight = half.weight.detach().float().requires_grad_()
    for format in (FULL, TargetFormat("topk_tail", count=4), TargetFormat("sampled", count=4)):
        targets = half.targets(format)
        for ours, theirs in zip(
            half.losses(targets, KINDS[0]), whole.losses(targets, KINDS[0]), strict=True
        ):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs)
        gradient = half.gradient(targets)
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, whole.gradient(targets).bfloat16())


def test_ids_that_pick_nothing_are_left_out():
    """Logits [0, ln 3, ln 5]: of picked [1, -1] the rest is ln(1 + 5)."""
    weight = torch.tensor([[1.0], [3.0], [5.0]]).log()
    picked, rest = outcome_logits(torch.ones(1, 1), weight, torch.tensor([[1, NO_TOKEN]]))
    assert picked.tolist() == [[pytest.approx(math.log(3)), -math.inf]]
    assert rest.item() == pytest.approx(math.log(6))


def test_the_realised_token_comes_first_and_named_ones_are_kept():
    """Likeliest are 4 and 3; 0 was realised and 1 is named, whatever their probability."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    targets = TargetFormat("topk_tail", count=1, always=(1,)).make(logits, torch.tensor([0]))
    assert targets.ids_TK is not None
    assert targets.ids_TK[0, 0] == 0 and set(targets.ids_TK[0].tolist()) == {0, 1, 4}
    again = TargetFormat("topk_tail", count=1, always=(1,)).make(logits, torch.tensor([1]))
    assert again.ids_TK is not None and again.ids_TK[0].tolist() == [1, 4, 3]
    drawn = TargetFormat("sampled", count=2, always=(1,)).make(
        logits, torch.tensor([1]), torch.Generator().manual_seed(0)
    )
    assert drawn.ids_TK is not None and drawn.ids_TK[0, :2].tolist() == [1, 4]
    assert not {1, 4} & set(drawn.ids_TK[0, 2:].tolist()), "what is kept is not drawn again"


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_what_draws_cannot_tell_is_refused(kind):
    Divergence(kind).require_format("topk_tail")
    with pytest.raises(RecipeError, match="cannot be computed from sampled targets"):
        Divergence(kind).require_format("sampled")
