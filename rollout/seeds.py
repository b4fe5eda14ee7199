"""Where randomness comes from: seeds of samples, and counter-based uniform numbers.

Nothing here has state: a number is a pure function of what it is for.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_written = json.JSONEncoder(separators=(",", ":")).encode


def sample_seed(run_seed: int, prompt_id: str, pass_: int | str, sample: int) -> int:
    """Seed of one sample: 63 bits of a sha256 over who it is for.

    Args:
        pass_: which draw of the prompt it is, or the name of an occasion ("evaluate sft").
        sample: position in the group.
    """
    identity = _written([run_seed, prompt_id, pass_, sample])
    digest = hashlib.sha256(identity.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniforms(seeds_S: NDArray[np.uint64], counters_S: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) per row, a pure function of (seed, counter): splitmix64 of both.

    Only the upper 52 bits are used, so that `uniform * total < total` holds after rounding too.
    """
    with np.errstate(over="ignore"):
        bits_S = _mix(_mix(seeds_S + _GAMMA) + (counters_S + np.uint64(1)) * _GAMMA)
    return (bits_S >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): each input bit reaches all outputs."""
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))
