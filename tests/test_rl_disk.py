"""A disk that is full, or gives back other bytes, wherever the learner writes what it needs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rl_local import Killer, LocalRun

from ground import faults
from ground.errors import DataError, PacktrainError, SetupError

SETTINGS = {"max_staleness": 0, "steps": 6}
STAGED = ("journal.staged", "cut.staged", "best.staged", "export")
"""Points between the bytes and their commit."""


class FullDisk(Killer):
    """The disk is full at the point that it is aimed at, and nowhere else."""

    def check(self) -> None:
        if self.is_dead:
            self.rest()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def patched(monkeypatch: pytest.MonkeyPatch, killer: Killer) -> Killer:
    monkeypatch.setattr(faults, "point", killer.point)
    monkeypatch.setattr(faults, "corrupted", killer.corrupted)
    return killer


@pytest.mark.slow
def test_43_a_full_disk_at_any_writing_point_is_typed_and_the_next_life_ends_alike(
    tiny_model: Path, ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = patched(monkeypatch, FullDisk())
    whole = LocalRun(ram_path / "whole", tiny_model, disk, **SETTINGS)
    assert whole.live()
    run = LocalRun(ram_path / "run", tiny_model, disk, **SETTINGS)
    for point in STAGED:
        disk.aim(point, 2 if point == "journal.staged" else 1)
        with pytest.raises(SetupError, match="the disk is full") as caught:
            run.live()
        assert caught.value.exit_code == 4, point
        assert not list(run.directory.rglob("*.staging")), "no half of anything"
    assert run.live()
    assert run.facts() == whole.facts()


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)


def newest(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[-1]


NEVER = ("export", 99)
DAMAGES: dict[str, tuple[tuple[str, int], Callable[[Path], Path]]] = {
    "journal": (("step.applied", 4), lambda run: newest(run / "groups", "step_*.parquet")),
    "cut, weights": (("cut.committed", 2), lambda run: newest(run, "checkpoints/*/model.*")),
    "cut, moments": (("cut.committed", 2), lambda run: newest(run, "checkpoints/*/optimizer.*")),
    "cut, books": (("cut.committed", 2), lambda run: newest(run, "checkpoints/*/books.json")),
    "export": (NEVER, lambda run: newest(run, "model/*.safetensors")),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGES)
def test_bytes_that_came_back_wrong_are_made_again(
    tiny_model: Path, ram_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Synchronous: the step is asked again, the cut before takes more steps of the journal, and a
    stage without its manifest exports again."""
    killer = patched(monkeypatch, Killer())
    whole = LocalRun(ram_path / "whole", tiny_model, killer, **SETTINGS)
    assert whole.live()
    run = LocalRun(ram_path / "run", tiny_model, killer, **SETTINGS)
    aim, path_of = DAMAGES[what]
    killer.aim(*aim)
    assert run.live() == (aim is NEVER)
    flip(path_of(run.directory))
    killer.rest()
    assert run.live()
    assert run.facts() == whole.facts()


@pytest.mark.slow
def test_best_weights_that_came_back_wrong_are_refused_by_name(
    tiny_model: Path, ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their version lies before the last cut, so nobody can make them again."""
    killer = patched(monkeypatch, Killer())
    run = LocalRun(ram_path / "run", tiny_model, killer, **SETTINGS)
    killer.aim("export", 1)
    assert not run.live()
    flip(newest(run.directory, "checkpoints/best/*/model.safetensors"))
    killer.rest()
    with pytest.raises(DataError, match="every checkpoint is damaged") as caught:
        run.live()
    assert isinstance(caught.value, PacktrainError) and "best" in caught.value.where
