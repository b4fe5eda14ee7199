"""The parity gate: after a hand-over an engine proves that it computes with what was published.

    load → bytes (checksums of the tensors in use) → function (log-probs of the probes) → admitted
                          └────────── ParityError: not a token is sampled ──────────┘

Bytes find anything, but only where the engine keeps tensors in the published form; the function is
seen in every engine. Its tolerance comes with the probes, from noise that the learner measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ground.errors import ParityError
from rollout.checksums import checksums
from rollout.engine import Engine
from rollout.weights import Probe, Probes, Published

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Drift:
    """How far an engine's log-probs are from the learner's, in nats.

    Example:
        Drift(typical=4e-7, worst=1.9e-6, row=3, token=17, got=-2.31, wanted=-2.31)
    """

    typical: float
    """Median over probes of their root mean square: what a fault moves and one odd row does not."""
    worst: float
    row: int
    token: int
    """Place of the worst token in its probe."""
    got: float
    wanted: float


@dataclass(frozen=True, slots=True)
class Proof:
    """A gate that was passed: how near the engine was, and what it took.

    Example:
        Proof(bytes_seconds=0.002, probe_seconds=0.011, drift=Drift(…))
    """

    bytes_seconds: float
    probe_seconds: float
    drift: Drift | None
    """None where there was nothing to compare."""


def prove(engine: Engine, published: Published, tensors: Mapping[str, Tensor] | None) -> Proof:
    """Return if the engine, which stands still, has the weights of this version.

    Args:
        tensors: the published ones, to say how far off a wrong one is.

    Raises:
        ParityError: naming the worst tensor, or the worst token of a probe.
    """
    started = time.monotonic()
    wrong = wrong_tensors(engine, published.checksums)
    if wrong:
        raise ParityError(
            f"the engine must have the weights of version {published.version}, {len(wrong)} of "
            f"{len(published.checksums)} tensors are others: {_described(engine, wrong, tensors)}",
            where="parity gate",
        )
    seen = time.monotonic()
    drift = drift_of(engine, published.probes)
    if drift and not is_within(drift, published.probes):
        raise ParityError(
            f"the engine must compute as the learner does under version {published.version}: token "
            f"{drift.token} of probe {drift.row} must have log-prob {drift.wanted:.7g}, got "
            f"{drift.got:.7g}",
            where="parity gate",
            why=f"off by {drift.worst:.2g} nats (allowed {published.probes.worst:.2g}), a typical "
            f"probe by {drift.typical:.2g} (allowed {published.probes.typical:.2g})",
        )
    return Proof(seen - started, time.monotonic() - seen, drift)


def wrong_tensors(engine: Engine, published: Mapping[str, str]) -> list[str]:
    """Names of tensors in use whose bytes are not the published ones; none if it cannot be seen."""
    live = engine.tensors()
    if live is None:
        return []
    sums = checksums({name: live[name] for name in published if name in live})
    return [name for name, wanted in published.items() if sums.get(name) != wanted]


def drift_of(engine: Engine, probes: Probes) -> Drift | None:
    """Have the engine score the probes and compare; a number that is not finite is worst."""
    if not probes.rows:
        return None
    scores = engine.score([probe.token_ids for probe in probes.rows])
    return _drift([score.logprobs for score in scores], probes.rows)


def is_within(drift: Drift, probes: Probes) -> bool:
    """Whether the tolerances hold; NaN is within none."""
    return drift.typical <= probes.typical and drift.worst <= probes.worst


def _drift(got: Sequence[Sequence[float]], rows: Sequence[Probe]) -> Drift:
    off = [
        np.nan_to_num(np.abs(np.subtract(each[: len(row.logprobs)], row.logprobs)), nan=math.inf)
        for each, row in zip(got, rows, strict=True)
    ]
    row = max(range(len(rows)), key=lambda index: off[index].max(initial=0.0))
    token = int(off[row].argmax())
    return Drift(
        typical=float(np.median([np.sqrt(np.mean(each**2)) for each in off if len(each)])),
        worst=float(off[row][token]),
        row=row,
        token=token + 1,
        got=got[row][token],
        wanted=rows[row].logprobs[token],
    )


def _described(engine: Engine, wrong: Sequence[str], tensors: Mapping[str, Tensor] | None) -> str:
    """The worst first, each with its largest error where one can be taken."""
    live, published = engine.tensors() or {}, tensors or {}
    errors = {name: _error(live.get(name), published.get(name)) for name in wrong}
    ranked = sorted(wrong, key=lambda name: -errors[name])
    shown = ", ".join(f"{name} (off by {errors[name]:.2g})" for name in ranked[:_SHOWN])
    return shown + (", …" if len(ranked) > _SHOWN else "")


def _error(live: Tensor | None, published: Tensor | None) -> float:
    if live is None or published is None or live.shape != published.shape:
        return math.inf
    error = float((live.double() - published.double().to(live.device)).abs().max())
    return math.inf if math.isnan(error) else error
