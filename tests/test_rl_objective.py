"""Each setting of `rl.loss` reaches its formula, and masks compose with any of them."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rl.config import RlSection
from rl.objective import Tokens, policy_loss
from rl.objective_config import AipoLoss, CispoLoss, ClipLoss, DecoupledLoss, IcePop, LossSection

RATIOS = (1.0, 9.0, 0.2, 3.0)
ADVANTAGES = (1.0, 2.0, -1.0, -0.5)


def make_tokens(reference: Tensor | None = None) -> Tokens:
    """Four tokens of two rows; log mu = -2, the second row was sampled two versions ago."""
    behavior_N = torch.full((4,), -2.0, dtype=torch.float64)
    ratios_N = torch.tensor(RATIOS, dtype=torch.float64)
    return Tokens(
        logprobs_N=(behavior_N + ratios_N.log()).requires_grad_(),
        behavior_N=behavior_N,
        advantages_N=torch.tensor(ADVANTAGES, dtype=torch.float64),
        ages_N=torch.tensor([0, 0, 1, 1]),
        rows_N=torch.tensor([0, 0, 1, 1]),
        reference_N=reference,
    )


def weights(section: LossSection) -> list[float]:
    """What A * grad log pi is multiplied with, read off the gradient."""
    tokens = make_tokens()
    policy_loss(section, tokens).loss_N.sum().backward()
    assert tokens.logprobs_N.grad is not None
    return (-tokens.logprobs_N.grad / tokens.advantages_N).tolist()


SECTIONS: list[tuple[LossSection, list[float], list[bool]]] = [
    (AipoLoss(), [1, 4, 0.2, 3], [False, True, False, False]),
    (AipoLoss(rho_max=2), [1, 2, 0.2, 2], [False, True, False, True]),
    (CispoLoss(kind="cispo"), [1, 5, 0.2, 3], [False, True, False, False]),
    (CispoLoss(kind="cispo", rho_min=0.5), [1, 5, 0.5, 3], [False, True, True, False]),
    (ClipLoss(kind="clip"), [1, 0, 0, 3], [False, True, True, False]),
    (DecoupledLoss(kind="decoupled"), [1, 2, 0.2, 2], [False, True, False, True]),
    # Of the two tokens of age 1 half of log rho is r: sqrt(0.2) < 0.8 is silenced, as A < 0;
    # sqrt(3) keeps r * min(sqrt(3), 2) = 3. Those of age 0 have pi_prox = mu, so r = rho.
    (
        DecoupledLoss(kind="decoupled", proximal="interpolate"),
        [1, 0, 0, 3],
        [False, True, True, False],
    ),
]


@pytest.mark.parametrize(("section", "expected", "clipped"), SECTIONS)
def test_the_weight_of_each_token_is_that_of_its_formula(
    section: LossSection, expected: list[float], clipped: list[bool]
) -> None:
    assert weights(section) == pytest.approx(expected, abs=1e-12)
    losses = policy_loss(section, make_tokens())
    assert losses.weights_N.tolist() == pytest.approx(expected, abs=1e-12)
    assert losses.clipped_N.tolist() == clipped
    assert losses.kept_N.all()


@pytest.mark.parametrize(("section", "expected", "clipped"), SECTIONS)
def test_masks_compose_with_every_loss_and_take_nothing_from_the_count(
    section: LossSection, expected: list[float], clipped: list[bool]
) -> None:
    del clipped
    masked = section.model_copy(update={"icepop": IcePop(low=0.5, high=5)})
    assert weights(masked) == pytest.approx([expected[0], 0, 0, expected[3]], abs=1e-12)
    plain, dropped = policy_loss(section, make_tokens()), policy_loss(masked, make_tokens())
    assert len(dropped.loss_N) == len(plain.loss_N)
    assert dropped.loss_N[[0, 3]].tolist() == plain.loss_N[[0, 3]].tolist()
    assert dropped.kept_N.tolist() == [True, False, False, True]


def test_the_sequence_mask_drops_a_row() -> None:
    # Row 1: mean log(mu / pi) = (ln 5 - ln 3) / 2 = 0.255, with negative advantages.
    assert weights(AipoLoss(sequence_mask=0.25)) == pytest.approx([1, 4, 0, 0])
    assert weights(AipoLoss(sequence_mask=0.26)) == pytest.approx([1, 4, 0.2, 3])


def test_the_reference_adds_its_weighted_kl() -> None:
    reference_N = torch.full((4,), -2.0, dtype=torch.float64)
    section = AipoLoss(reference_kl=0.1)
    with_kl = policy_loss(section, make_tokens(reference_N)).loss_N
    without = policy_loss(section, make_tokens()).loss_N
    # q = mu here: rho * (1 / rho - 1 + ln rho)
    expected = [0.1 * (1 - rho + rho * math.log(rho)) for rho in RATIOS]
    assert (with_kl - without).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("section", [entry[0] for entry in SECTIONS])
def test_75_no_mask_hides_a_nan(section: LossSection) -> None:
    tokens = make_tokens()
    with torch.no_grad():
        tokens.logprobs_N[1] = math.nan
    masked = section.model_copy(update={"icepop": IcePop(), "sequence_mask": 0.5})
    assert policy_loss(masked, tokens).loss_N[1].isnan()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": {"kind": "clip", "rho_max": 3}}, "Extra inputs"),
        ({"loss": {"kind": "aipo", "low": 0.2}}, "Extra inputs"),
        ({"loss": {"kind": "decoupled", "proximal": "guess"}}, "'recompute' or 'interpolate'"),
        ({"loss": {"icepop": {"low": 2}}}, "less than 1"),
        ({"advantages": {"kind": "centered", "k": 4}}, "Extra inputs"),
        ({"advantages": {"kind": "pass_at_k", "k": 8}}, "below group_size \\(8\\), got 8"),
    ],
)
def test_a_key_of_another_kind_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RlSection.model_validate({"steps": 1, **settings})


def test_a_section_without_a_kind_is_the_default() -> None:
    section = RlSection.model_validate({"steps": 1, "loss": {"rho_max": 3}})
    assert section.loss == AipoLoss(rho_max=3)
    assert section.advantages.kind == "centered"
