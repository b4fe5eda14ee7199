"""Typed errors: each says what is wrong, where, why, and how to mend it, and owns an exit code.

    raise DataError("answer is null", where="data/sft.jsonl:14", fix="give every row an answer")

prints

    packtrain: data/sft.jsonl:14: answer is null
      fix: give every row an answer

Exit codes: 0 done, 2 recipe, 3 data, 4 environment, 5 diverged or no signal, 6 workers lost,
130/143 interrupted and saved, 1 a defect of ours (with its traceback).
"""

from __future__ import annotations

from enum import StrEnum


class FailureKind(StrEnum):
    """Who has to act on a failure; decided before it crosses a process boundary.

    INFRA is retried and excluded from statistics, DATA is counted against its row,
    CODE stops the run loudly (every unknown failure is CODE), OPERATOR is an order to stop.
    """

    INFRA = "infra"
    DATA = "data"
    CODE = "code"
    OPERATOR = "operator"


class PacktrainError(Exception):
    """Base of every error that a user is meant to read.

    Args:
        what: one sentence: requirement, then what was found.
        where: file:line, stage or component; empty when `what` names it.
        why: the cause, if it is not plain from `what`.
        fix: what the reader can do now.
    """

    exit_code = 1
    kind = FailureKind.CODE

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what, where, why, fix)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def _rebuild(
    kind: type[PacktrainError], what: str, where: str, why: str, fix: str
) -> PacktrainError:
    return kind(what, where=where, why=why, fix=fix)


class RecipeError(PacktrainError):
    """The recipe, a flag or an override is wrong (exit 2)."""

    exit_code = 2
    kind = FailureKind.OPERATOR


class DataError(PacktrainError):
    """A row, file, model or checkpoint that was given to us is unusable (exit 3)."""

    exit_code = 3
    kind = FailureKind.DATA


class SetupError(PacktrainError):
    """The machine or the surroundings do not allow the run: locks, disk, versions (exit 4)."""

    exit_code = 4
    kind = FailureKind.OPERATOR


class DivergedError(PacktrainError):
    """Training produced non-finite numbers, or there is nothing left to learn from (exit 5)."""

    exit_code = 5


class WorkersLostError(PacktrainError):
    """Too few workers are left to go on (exit 6)."""

    exit_code = 6
    kind = FailureKind.INFRA


class InfraError(PacktrainError):
    """One attempt failed for a reason outside the sample: dead process, lost node, deadline."""

    exit_code = 6
    kind = FailureKind.INFRA


class ParityError(InfraError):
    """A worker's engine does not compute with the weights that it was handed."""
