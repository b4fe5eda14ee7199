"""Whose business a failure is."""

from __future__ import annotations

import errno

import pytest

from ground.errors import DataError, InfraError, PacktrainError
from rollout.failures import sort_failure, sorted_failures


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even this fails")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__}-{getattr(error, 'errno', None)}",
)
def test_what_the_machine_lacks_is_the_machines(error: BaseException) -> None:
    """#9"""
    assert isinstance(sort_failure(error, "group 7"), InfraError)


@pytest.mark.parametrize(
    "error", [KeyError("x"), OSError(errno.EACCES, "denied"), SystemExit(3), Unreadable()]
)
def test_what_is_unknown_is_a_defect_and_told_with_its_place(error: BaseException) -> None:
    """#18"""
    with (
        pytest.raises(PacktrainError, match="group 7 failed: ") as caught,
        sorted_failures("group 7"),
    ):
        raise error
    assert not isinstance(caught.value, InfraError)
    assert "test_rollout_failures.py" in caught.value.why


def test_our_own_errors_pass_as_they_are_and_memory_has_its_own_advice() -> None:
    own = DataError("answer is null", where="rows.jsonl:7")
    assert sort_failure(own, "group 7") is own
    advice = sort_failure(MemoryError(), "training", memory_fix="lower rl.micro_batch_tokens")
    assert advice.fix == "lower rl.micro_batch_tokens"
