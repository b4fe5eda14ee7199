"""Co-distillation in SFT: its loss by hand, shares that are logged and kept, nothing missing."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama, make_tiny_model
from launching import launch_file, needs_deepspeed, run_launch
from torch import Tensor

from distill.config import AlignedShare, DistillSection, StaticShare, TargetsSection
from distill.fill import train as fill_targets
from distill.identity import Identity
from distill.loss import Divergence, distill_loss
from distill.store import TargetStore
from distill.targets import NO_TOKEN, TargetFormat, fitted
from distill.weighting import weighting_of
from ground.entry import stage_entry
from ground.metrics import read_metrics
from ground.model import load_model, load_tokenizer, tensors_of
from ground.run import RunDir
from ground.training_rows import TrainingRow, TrainingRows
from sft.config import SftSection
from sft.soft import Soft, Tally, split, warn_of_unobserved
from sft.train import train

RECIPE = """
name: sums
seed: 3
model: {{path: {model}}}
teacher: {{path: {teacher}}}
data: {{sft: sft.jsonl}}
targets: {{format: {format}, max_length: 100, k: 8, always: ["<|eot|>"], pass_tokens: 400}}
sft:
  max_length: 100
  distill: {distill}
  trainer:
    learning_rate: 3e-3
    rows_per_step: 4
    rows_per_pass: {rows_per_pass}
    max_steps: {steps}
    log_every: 1
    save_every: 3
"""


class Case:
    """Rows of two capabilities, a student, and a teacher of another size."""

    def __init__(self, folder: Path, *, is_mixture: bool = False, **settings: object) -> None:
        self.folder = folder
        model = (make_tiny_model if is_mixture else make_tiny_llama)(folder / "student")
        teacher = make_tiny_model(folder / "teacher", seed=5)
        with (folder / "sft.jsonl").open("w") as file:
            for n in range(10, 34):
                messages = [
                    {"role": "user", "content": f"{n}+{n}="},
                    {"role": "assistant", "content": str(2 * n)},
                ]
                row = {"messages": messages, "capability": "math" if n % 3 else "chat"}
                file.write(json.dumps(row) + "\n")
        self.recipe = folder / "recipe.yaml"
        given = {"distill": "{weighting: static}", "format": "topk_tail"}
        given |= {"rows_per_pass": 4, "steps": 2, **settings}
        self.recipe.write_text(RECIPE.format(model=model, teacher=teacher, **given))

    def run(self, *arguments: str, name: str = "run") -> int:
        argv = [str(self.recipe), *arguments, "--run", str(self.folder / name)]
        return stage_entry("sft", SftSection, train, argv)

    def fill(self, *arguments: str, name: str = "run") -> int:
        argv = [str(self.recipe), *arguments, "--run", str(self.folder / name)]
        return stage_entry("targets", TargetsSection, fill_targets, argv)

    def both(
        self, *arguments: str, name: str = "run", place: str = "sft"
    ) -> list[dict[str, object]]:
        """The metrics of sft, or of its arm, after targets."""
        assert self.fill(name=name) == 0
        assert self.run(*arguments, name=name) == 0
        return read_metrics(self.folder / name / place / "metrics.jsonl")

    def summary(self, stage: str, name: str = "run") -> dict[str, object]:
        summary = RunDir(self.folder / name).manifest(stage).facts["summary"]
        assert isinstance(summary, dict)
        return summary


def number(record: dict[str, object], key: str) -> float:
    return float(str(record[key]))


def test_a_quarter_of_the_teacher_by_hand(tmp_path: Path):
    """The first loss of a whole pass over all rows, from the two models' own logits."""
    case = Case(tmp_path, distill="{weighting: {kind: static, share: 0.25}}")
    (record,) = case.both(
        "sft.trainer.rows_per_step=24",
        "sft.trainer.rows_per_pass=8",
        "sft.trainer.max_steps=1",
    )
    student, teacher = load_model(tmp_path / "student"), load_model(tmp_path / "teacher")
    tokenizer = load_tokenizer(tmp_path / "student")
    hard, soft, count = 0.0, 0.0, 0
    for n in range(10, 34):
        text = f"<|header_start|>user<|header_end|>\n\n{n}+{n}=<|eot|>"
        text += f"<|header_start|>assistant<|header_end|>\n\n{2 * n}<|eot|>"
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            q = student(ids).logits[0].log_softmax(-1)
            t = teacher(ids).logits[0, :, :262].log_softmax(-1)
        for place in range(ids.shape[1] - 3, ids.shape[1]):
            label = int(ids[0, place])
            kept = {label, 260}
            order = t[place - 1].argsort(descending=True).tolist()
            kept |= set([token for token in order if token not in kept][: 10 - len(kept)])
            others = [token for token in range(264) if token not in kept]
            rest = [token for token in others if token < 262]
            pairs = [(t[place - 1, [i]], q[place - 1, [i]]) for i in kept]
            pairs.append((t[place - 1, rest], q[place - 1, others]))
            for of, to in pairs:
                p, log_q = of.exp().sum(), to.logsumexp(-1)
                soft += float(p * (p.log() - log_q))
            hard -= float(q[place - 1, label])
            count += 1
    assert number(record, "loss_hard") == pytest.approx(hard / count, abs=1e-4)
    assert number(record, "loss_soft") == pytest.approx(soft / count, abs=2e-3)
    want = 0.75 * number(record, "loss_hard") + 0.25 * number(record, "loss_soft")
    assert number(record, "loss") == pytest.approx(want, abs=1e-4)
    assert record["alpha/math"] == record["alpha/chat"] == 0.25
    assert (record["unsupported"], record["misfits"]) == (0, 0)


def test_a_share_of_zero_is_plain_sft(tmp_path: Path):
    """Two steps of a mixture of experts: the losses and gradients of TRL, the router's included."""
    case = Case(tmp_path, is_mixture=True, distill="{weighting: {kind: static, share: 0}}")
    records = case.both()
    plain = Case(tmp_path / "plain", is_mixture=True)
    text = plain.recipe.read_text()
    text = "\n".join(line for line in text.splitlines() if "distill" not in line)
    plain.recipe.write_text(text)
    assert plain.run() == 0
    others = read_metrics(plain.folder / "run" / "sft" / "metrics.jsonl")
    for ours, theirs in zip(records, others, strict=True):
        assert number(ours, "loss") == pytest.approx(number(theirs, "loss"), abs=1e-5)
        assert number(ours, "grad_norm") == pytest.approx(number(theirs, "grad_norm"), rel=1e-4)
        hard = number(ours, "loss_hard")
        assert number(ours, "loss") > hard + 1e-4, "the balancing loss comes on top"


def test_as_an_arm_the_taught_student_is_beside_the_plain_one(tmp_path: Path):
    """Each as it would be alone, bit for bit; the plain one needs no targets."""
    whole = "{weighting: {kind: static, share: 0.5}}"
    case = Case(tmp_path / "both", distill=whole.replace("}}", "}, as_arm: true}"))
    assert case.run() == 0 and case.fill() == 0 and case.run("--as", "taught") == 0
    taught = Case(tmp_path / "taught", distill=whole)
    taught.both()
    plain = Case(tmp_path / "plain")
    lines = plain.recipe.read_text().splitlines()
    plain.recipe.write_text("\n".join(line for line in lines if "distill" not in line))
    assert plain.run() == 0
    models = {
        place: tensors_of(load_model(each.folder / "run" / place.split()[-1] / "model"))
        for place, each in (
            *(("our sft", case), ("our taught", case)),
            *(("plain sft", plain), ("taught sft", taught)),
        )
    }

    def are_equal(one: str, other: str) -> bool:
        return all(torch.equal(models[one][name], models[other][name]) for name in models[one])

    assert are_equal("our sft", "plain sft") and are_equal("our taught", "taught sft")
    assert not are_equal("our sft", "our taught")
    assert "alpha" in case.summary("taught") and "alpha" not in case.summary("sft")
    assert plain.run("--as", "taught", name="other") == 2
    assert not (plain.folder / "other").exists(), "refused before anything is begun"


def test_the_teacher_is_learnt_and_costs_one_pass_per_row(tmp_path: Path):
    """Share 1: after two epochs the student is nearer; the store was filled once."""
    case = Case(
        tmp_path, distill="{weighting: {kind: static, share: 1}}", format="sampled", steps=12
    )
    records = case.both()
    assert number(records[-1], "loss_soft") < 0.7 * number(records[0], "loss_soft")
    filled = case.summary("targets")
    assert (filled["rows"], filled["passes"], filled["hits"]) == (24, 24, 0)
    assert case.fill("--overwrite") == 0
    assert case.summary("targets")["passes"] == 0, "made again, and nothing asked again"
    shared = f"targets.store={tmp_path / 'run' / 'teacher-store'}"
    assert case.fill(shared, name="other") == 0
    assert case.summary("targets", "other")["passes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["sft", "taught"])
def test_aligned_learns_its_shares_and_keeps_them_over_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """Stopped in step 2 of 4 and resumed: the same shares and weights, bit for bit; in an arm
    too."""
    distill = "weighting: {kind: aligned, every: 1}, heldout_rows: 4, signal_rows: 8"
    distill = f"{{{distill}, as_arm: {'true' if place == 'taught' else 'false'}}}"
    beside = ("--as", place) if place == "taught" else ()
    whole = Case(tmp_path / "whole", distill=distill, steps=4)
    records = whole.both(*beside, place=place)
    assert whole.summary(place)["heldout_rows"] == 1, "a tenth of 16 and of 8 rows, rounded down"
    assert records[0]["alpha/math"] == pytest.approx(0.7)
    assert records[-1]["alpha/chat"] == pytest.approx(0.7), "nobody looked at its teacher"
    assert records[-1]["alpha/math"] != pytest.approx(0.7, abs=1e-3)
    assert 0 < number(records[-1], "signal_share") < 1
    cut = Case(tmp_path / "cut", distill=distill, steps=4)
    assert cut.fill() == 0
    calls = []

    def stopped(*arguments: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return distill_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("sft.trainer.distill_loss", stopped)
        assert cut.run(*beside) == 143
    kept = cut.folder / "run" / place / "checkpoints" / "step_000002" / "weighting.json"
    assert json.loads(kept.read_text()).keys() == {"math"}
    assert cut.run(*beside, "--resume") == 0
    assert cut.summary(place)["alpha"] == whole.summary(place)["alpha"]
    theirs, ours = (
        tensors_of(load_model(each.folder / "run" / place / "model")) for each in (whole, cut)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_stored_must_be_this_teacher_s_and_complete(tmp_path: Path, capsys):
    case = Case(tmp_path)
    assert case.run() == 2
    assert "no stored targets" in capsys.readouterr().err
    assert case.fill() == 0
    with (tmp_path / "sft.jsonl").open("a") as file:
        messages = [{"role": "user", "content": "9"}, {"role": "assistant", "content": "10"}]
        file.write(json.dumps({"messages": messages, "capability": "math"}) + "\n")
    assert case.run("--overwrite") == 3
    assert "targets of 1 of 25 rows are missing" in capsys.readouterr().err
    make_tiny_model(tmp_path / "teacher", seed=6)
    assert case.run("--overwrite") == 3
    message = capsys.readouterr().err
    assert "not those of this teacher and student: teacher teacher@" in message


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_ranks_see_what_one_sees(tmp_path: Path, kind: str):
    """Shares that are learnt included: the same curves of loss and share."""
    distill = "{weighting: {kind: aligned, every: 2}, heldout_rows: 20, signal_rows: 8}"
    case = Case(tmp_path, distill=distill, rows_per_pass=2, steps=5)
    want = case.both()
    run = case.folder / "two"
    assert case.fill(name="two") == 0
    file = launch_file(kind, tmp_path)
    code, output = run_launch(file, "sft.train", str(case.recipe), "--run", str(run))
    assert code == 0, output[-2000:]
    got = read_metrics(run / "sft" / "metrics.jsonl")
    for key in ("loss", "loss_hard", "loss_soft", "alpha/math", "unsupported"):
        values = ([number(record, key) for record in each] for each in (got, want))
        assert next(values) == pytest.approx(next(values), abs=1e-4), key
    assert number(want[-1], "alpha/math") != pytest.approx(0.7, abs=1e-3)


def row(name: str, capability: str, text: str = "") -> TrainingRow:
    """A conversation of its own, or one that other ids have too."""
    ids = (1, *(text or name).encode())
    return TrainingRow(name, ids, (-100, *ids[1:]), capability)


def test_held_out_rows_are_drawn_from_every_capability():
    """60 and 30 rows, 6 wanted: 4 and 2. Of 3 rows of a third a tenth is less than 1."""
    rows = [row(f"m{n}", "math") for n in range(60)] + [row(f"c{n}", "chat") for n in range(30)]
    rows += [row(f"r{n}", "rare") for n in range(3)]
    trained, held = split(TrainingRows(tuple(rows), ()), 6, seed=1)
    counts = {name: sum(each.capability == name for each in held.rows) for name in ("math", "chat")}
    assert counts == {"math": 4, "chat": 2} and len(held.rows) == 6
    assert {each.id for each in trained.rows} == {each.id for each in rows} - {
        each.id for each in held.rows
    }
    again = split(TrainingRows(tuple(reversed(rows)), ()), 6, seed=1)[1]
    assert {each.id for each in again.rows} == {each.id for each in held.rows}


def test_no_held_out_row_is_trained_under_another_id():
    """100 conversations, each under two ids: of 200 rows 10 are held out, once each, and 180 left.

    Of 19 copies of one conversation beside 10 others, copies are not held: a tenth of 29 is 2.
    """
    rows = [row(f"{n}{copy}", "math", text=f"{n}") for n in range(100) for copy in "ab"]
    trained, held = split(TrainingRows(tuple(rows), ()), 10, seed=1)
    kept, seen = ({each.input_ids for each in some.rows} for some in (trained, held))
    assert (len(held.rows), len(trained.rows)) == (10, 180)
    assert (len(seen), len(kept & seen)) == (10, 0)
    rows = [row(f"c{n}", "chat", text="again") for n in range(19)]
    rows += [row(f"m{n}", "chat") for n in range(10)]
    for seed in range(20):
        trained, held = split(TrainingRows(tuple(rows), ()), 29, seed=seed)
        assert (len(held.rows), len(trained.rows)) == (2, 27)
        assert all(each.id.startswith("m") for each in held.rows)


def test_a_small_capability_gives_one_row_of_ten_and_is_named_below_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Of 200, 10 and 9 rows, 8 wanted: 7, and one where 8 * 10 / 219 rounds to 0, and none."""
    rows = [row(f"m{n}", "math") for n in range(200)] + [row(f"c{n}", "chat") for n in range(10)]
    rows += [row(f"r{n}", "rare") for n in range(9)]
    trained, held = split(TrainingRows(tuple(rows), ()), 8, seed=1)
    assert Counter(each.capability for each in held.rows) == {"math": 7, "chat": 1}
    whose = Identity("teacher@0123456789abcdef", "aa", "bb", 262, "topk_tail k=4")
    store = TargetStore(tmp_path, whose, "topk_tail")
    weighting = weighting_of(AlignedShare(start=0.6), num_steps=4, vocab_size=262)
    section = DistillSection(weighting=AlignedShare(start=0.6))
    warn_of_unobserved(Soft(section, store, Divergence(), weighting, held.rows), trained)
    assert caplog.messages == [
        "no held-out rows of rare: their share stays at start (0.6); "
        "give them 10 rows or more, or set weighting: static"
    ]
    fixed = DistillSection(weighting=StaticShare(kind="static"))
    warn_of_unobserved(Soft(fixed, store, Divergence(), weighting, ()), trained)
    assert len(caplog.messages) == 1, "other weightings look at none"


def test_crafted_targets_are_silenced_and_counted():
    """#86: too short, too long, another token's, NaN, a probability above 1, a token named
    twice; -inf is lawful, and so are several unused outcomes.
    """
    labels = torch.tensor([3, 4, 5, 6])
    logits = torch.zeros(4, 8)
    logits[1, 4] = -torch.inf
    sound = TargetFormat("topk_tail", count=2).make(logits, labels)
    same, count = fitted(sound, labels)
    assert count == 0 and same.is_supported_T.tolist() == [True, False, True, True]
    short, count = fitted(sound.slice(slice(0, 2)), labels)
    assert (count, len(short)) == (2, 4)
    assert short.is_supported_T.tolist() == [True, False, False, False]
    assert short.ids_TK is not None and short.ids_TK[3].tolist() == [6, NO_TOKEN, NO_TOKEN]
    long, count = fitted(sound, labels[:3])
    assert (count, len(long)) == (1, 3)
    shifted, count = fitted(sound, labels + 1)
    assert count == 4 and not shifted.is_supported_T.any()
    assert sound.ids_TK is not None
    ids = sound.ids_TK.clone()
    ids[0, 1:], ids[2, 1:] = NO_TOKEN, 7
    twice, count = fitted(replace(sound, ids_TK=ids), labels)
    assert count == 1 and twice.is_supported_T.tolist() == [True, False, False, True]
    for bad in (math.nan, 0.5, math.inf):
        logprobs = sound.logprobs_TK.clone()
        logprobs[2, 1] = bad
        broken, count = fitted(replace(sound, logprobs_TK=logprobs), labels)
        assert count == 1 and broken.logprobs_TK[2].max() == -torch.inf


def test_the_tally_by_hand():
    """Two passes, three tokens: hard (1 + 2 + 6)/3, share of math (.5 + .25)/2."""
    tally = Tally(["chat", "math"])
    targets = TargetFormat("full").make(torch.zeros(2, 4), torch.tensor([0, 1]))
    tally.add(
        torch.tensor([1.0, 2.0]),
        torch.tensor([3.0, 3.0]),
        torch.tensor([0.5, 1.0]),
        targets,
        torch.tensor([1, 0]),
    )
    silent = replace(targets.slice(slice(0, 1)), realised_T=torch.tensor([-torch.inf]))
    one = torch.tensor([6.0]), torch.tensor([0.0]), torch.tensor([0.25])
    tally.add(*one, silent, torch.tensor([1]))
    tally.add_misfits(1)
    told = tally.metrics(tally.sums)
    want = {"loss_hard": 3.0, "loss_soft": 2.0, "unsupported": 1 / 3, "misfits": 1.0}
    assert told == pytest.approx({**want, "alpha/chat": 1.0, "alpha/math": 0.375})
