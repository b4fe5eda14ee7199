"""What is said when a fleet is too small to go on."""

from __future__ import annotations

from collections.abc import Sequence

from ground.errors import WorkersLostError
from rollout.config import FleetSection
from rollout.seat import Crew, Seat


def too_few(
    section: FleetSection, seats: Sequence[Seat], left: int, crew: Crew
) -> WorkersLostError:
    """So many workers are left when the others have spent their restarts."""
    lacked_memory = any(seat.memory_losses for seat in seats)
    fix = f"lower {crew.memory_key} or {crew.number_key}" if lacked_memory else "mend the cause"
    return WorkersLostError(
        f"at least {section.min_workers} of {len(seats)} {crew.all} must live, {left} are "
        f"left after {section.max_restarts} restarts in a row",
        where="fleet",
        why=_causes(seats),
        fix=f"{fix}, then go on with --resume",
    )


def no_room(
    section: FleetSection, seats: Sequence[Seat], left: int, crew: Crew
) -> WorkersLostError:
    """So many workers have a place; for the others no machine has had room for too long."""
    return WorkersLostError(
        f"at least {section.min_workers} of {len(seats)} {crew.all} must have a place, "
        f"{left} have one: for {section.room_seconds:g} s no machine had room",
        where="fleet",
        why=_causes(seats),
        fix="bring machines back (`ray start` on each) or free them of other jobs, then go on "
        "with --resume",
    )


def _causes(seats: Sequence[Seat]) -> str:
    return "; ".join(f"{each.name}: {each.causes[-1]}" for each in seats if each.causes)
