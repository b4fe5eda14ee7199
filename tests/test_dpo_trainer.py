"""The adapter on TRL's DPOTrainer: loss by hand, exact resumption; the gate's arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model

from dpo.config import DpoTrainerSection, GateSection
from dpo.data import EncodedPair, PairLogprobs, encode_pair, encode_pairs, pair_logprobs
from dpo.gate import gate_figures, objection
from dpo.trainer import run_dpo
from ground.chat import ChatTemplate
from ground.checkpoints import Checkpoints
from ground.errors import DivergedError
from ground.metrics import Metrics, read_metrics
from ground.model import load_model, load_tokenizer, tensors_of
from ground.records import Message, Pair, Prompt
from ground.training import Fit

SECTION = DpoTrainerSection(
    learning_rate=1e-3,
    rows_per_step=4,
    rows_per_pass=2,
    max_steps=4,
    save_every=2,
    log_every=1,
    router_balance=0.0,
)


def pair(number: int, reason: str = "wrong") -> Pair:
    messages = (Message("user", f"{number}+{number}="),)
    prompt = Prompt(str(number), messages, "sums", "exact", str(2 * number))
    return Pair(prompt, f"{2 * number}", f"{2 * number + 1}, no more", reason)


class Bench:
    """A tiny model, eight pairs and a folder to train in."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        path = make_tiny_model(folder / "base", seed=seed)
        self.model, self.tokenizer = load_model(path), load_tokenizer(path)
        self.chat = ChatTemplate(self.tokenizer)
        self.pairs, _ = encode_pairs([pair(n) for n in range(10, 18)], self.chat, 100)
        self.checkpoints = Checkpoints(folder / "stage" / "checkpoints", keep=2)
        self.metrics_file = folder / "stage" / "metrics.jsonl"

    def score(self) -> list[PairLogprobs]:
        return pair_logprobs(self.model, self.pairs, pad_id=self.chat.pad_id, rows_per_pass=8)

    def train(self, reference: list[PairLogprobs], *, resume: bool = False, **changes: object):
        section = SECTION.model_copy(update=changes)
        with Metrics(self.metrics_file) as metrics:
            where = Fit(self.folder / "stage", metrics, self.checkpoints, section.max_seconds)
            fitted = run_dpo(
                self.model,
                self.tokenizer,
                self.pairs,
                reference,
                section,
                where,
                seed=1,
                resume=resume,
            )
            return fitted.steps


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def shifted(reference: list[PairLogprobs], chosen: float) -> list[PairLogprobs]:
    """A reference under which every chosen token was less likely by `chosen` nats."""
    return [PairLogprobs(one.chosen - chosen, one.rejected) for one in reference]


def test_trl_s_loss_by_hand(bench: Bench):
    """Contract: sigmoid_norm + 0.2 NLL, with all figures from our own log-probs.

    The reference is shifted by 2 nats a chosen token, so the length-normalised margin is exactly 2
    and the preference part is -log sigmoid(0.1 * 2).
    """
    reference = bench.score()
    nll = -float(torch.cat([one.chosen for one in reference]).mean())
    bench.train(shifted(reference, 2.0), max_steps=1, rows_per_step=8, rows_per_pass=8)
    expected = math.log(1 + math.exp(-0.1 * 2)) + 0.2 * nll
    assert read_metrics(bench.metrics_file)[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_the_reference_is_ours_and_the_first_margin_is_zero(bench: Bench):
    bench.train(bench.score(), max_steps=1)
    record = read_metrics(bench.metrics_file)[0]
    assert record["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_training_prefers_the_chosen_answers(bench: Bench):
    reference = bench.score()
    assert bench.train(reference, max_steps=20, save_every=50) == 20
    figures = gate_figures(reference, bench.score())
    assert figures.preferred == 1.0
    assert figures.chosen_change > 0 > figures.rejected_change - figures.chosen_change
    assert figures.kl > 0


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path):
    whole, cut = Bench(tmp_path / "whole"), Bench(tmp_path / "cut")
    reference = whole.score()
    whole.train(reference)
    cut.train(reference, max_seconds=1e-9)
    assert [path.name for path in cut.checkpoints.steps()] == ["step_000001"]
    again = Bench(tmp_path / "again", seed=5)
    again.checkpoints = cut.checkpoints
    assert again.train(reference, resume=True) == 4
    ours, theirs = tensors_of(whole.model), tensors_of(again.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nan_stops(bench: Bench):
    reference = bench.score()
    reference[3] = PairLogprobs(reference[3].chosen * math.nan, reference[3].rejected)
    with pytest.raises(DivergedError, match="loss must be finite"):
        bench.train(reference)


def test_answers_end_their_turn_unless_they_were_cut_off():
    from conftest import make_tiny_tokenizer

    chat = ChatTemplate(make_tiny_tokenizer())
    wrong, truncated = encode_pair(pair(10), chat), encode_pair(pair(10, "truncated"), chat)
    assert wrong.prompt_ids == tuple(chat.encode_prompt([Message("user", "10+10=")]))
    assert wrong.chosen_ids == (*chat.encode_text("20"), chat.end_of_turn)
    assert wrong.rejected_ids == (*truncated.rejected_ids, chat.end_of_turn)
    system = Pair(pair(10).prompt, "20", "21", "wrong", system="Be brief.")
    assert encode_pair(system, chat).prompt_ids == tuple(
        chat.encode_prompt([Message("system", "Be brief."), Message("user", "10+10=")])
    )


def test_long_pairs_are_left_out_and_counted(bench: Bench):
    length = bench.pairs[0].length
    pairs = [pair(10), pair(100_000)]
    kept, skipped = encode_pairs(pairs, bench.chat, length)
    assert (len(kept), skipped) == (1, 1)


def test_log_probs_of_pairs_do_not_depend_on_padding_or_batching(bench: Bench):
    pairs = [*bench.pairs, EncodedPair((256, 5), (6, 7, 8, 9, 10, 11, 12, 260), (9,))]
    together = pair_logprobs(bench.model, pairs, pad_id=261, rows_per_pass=18)
    alone = pair_logprobs(bench.model, pairs, pad_id=261, rows_per_pass=1)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.chosen, other.chosen, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.rejected, other.rejected, atol=1e-5, rtol=1e-5)
    assert [len(together[-1].chosen), len(together[-1].rejected)] == [8, 1]


def test_gate_figures_by_hand():
    before = [PairLogprobs(torch.tensor([-1.0]), torch.tensor([-1.0]))]
    after = [PairLogprobs(torch.tensor([-0.9]), torch.tensor([-1.2]))]
    figures = gate_figures(before, after)
    assert figures.chosen_change == pytest.approx(0.1, abs=1e-6)
    assert figures.rejected_change == pytest.approx(-0.2, abs=1e-6)
    # ((e^0.1 - 1 - 0.1) + (e^-0.2 - 1 + 0.2)) / 2 = (0.0051709 + 0.0187308) / 2
    assert figures.kl == pytest.approx(0.0119508, abs=1e-6)
    assert figures.preferred == 1.0


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [(0.0, 0.0, ""), (0.1, -1.0, "max_kl"), (-0.05, 0.0, "max_chosen_fall"), (math.nan, 0, "kl")],
)
def test_the_gate_objects_to_far_moves_and_falling_answers(chosen, rejected, message):
    before = [PairLogprobs(torch.tensor([-1.0]), torch.tensor([-1.0]))]
    after = [PairLogprobs(torch.tensor([-1.0 + chosen]), torch.tensor([-1.0 + rejected]))]
    result = objection(gate_figures(before, after), GateSection())
    assert message in result and bool(result) == bool(message)
