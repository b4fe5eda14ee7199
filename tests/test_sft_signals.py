"""What an observation reads: rows by turns, and no more of them than it may."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from distill.config import AlignedShare
from distill.targets import TargetFormat, TeacherTargets
from distill.weighting import weighting_of
from ground.model import load_model
from ground.training_rows import TrainingRow
from sft.signals import Signals, in_turn


def row(number: int, capability: str) -> TrainingRow:
    ids = (1, 2 + number, 3, 4 + number)
    return TrainingRow(f"{capability}{number}", ids, (-100, -100, *ids[2:]), capability)


def spoken(rows: Sequence[TrainingRow]) -> TeacherTargets:
    """Of the two trained tokens of each row."""
    labels = torch.tensor([label for each in rows for label in each.labels[2:]])
    return TargetFormat("topk_tail", 2).make(torch.zeros(len(labels), 262), labels)


def test_every_row_has_its_turn():
    """2 of 3: a b, c a, b c, and from the beginning."""
    rows = [row(number, "math") for number in range(3)]
    ids = [[each.id for each in in_turn(rows, 2, turn)] for turn in range(4)]
    a, b, c = (each.id for each in rows)
    assert ids == [[a, b], [c, a], [b, c], [a, b]]


def test_an_observation_reads_no_more_rows_than_it_may(tiny_model: Path):
    """4 of 12 held-out rows in proportion to 9 and 3: 3 and 1; and the 2 rows of each."""
    heldout = [row(n, "math") for n in range(9)] + [row(n, "chat") for n in range(3)]
    last = [row(n, name) for n in (10, 11) for name in ("math", "chat")]
    model = load_model(tiny_model)
    seen: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.extend(tuple(ids.tolist()) for ids in kwargs["input_ids"])

    assert isinstance(model.base_model, nn.Module)
    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    signals = Signals(heldout, spoken, heldout_at_once=4, temperature=1.0, rows_per_pass=2)
    weighting = weighting_of(AlignedShare(every=5), num_steps=20, vocab_size=262)
    read = []
    for step in (5, 10, 15):
        signals.observe(model, last, weighting, step=step)
        assert len(seen) == 4 + 4
        read += seen
        seen.clear()
    trained = {each.input_ids for each in last}
    assert {ids for ids in read if ids not in trained} == {each.input_ids for each in heldout}
    assert weighting.shares.keys() == {"math", "chat"}
