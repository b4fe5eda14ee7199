"""A step on two real ranks over gloo is the step on one."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rl_rank
from rl_doubles import make_learner
from safetensors.torch import load_file

SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(model: Path, out: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    roots = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ranks = [
        subprocess.Popen(
            [sys.executable, rl_rank.__file__, str(model), str(out)],
            env=os.environ
            | place
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            | {"PYTHONPATH": os.pathsep.join(filter(None, roots))},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, said = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_75_two_ranks_make_the_step_of_one_and_refuse_a_nan_together(
    tiny_model: Path, tmp_path: Path
) -> None:
    """With every loss: numbers, gradients and weights."""
    run_ranks(tiny_model, tmp_path)
    for loss, rank in itertools.product(rl_rank.LOSSES, range(2)):
        expected, wanted = rl_rank.train(make_learner(tiny_model, loss=loss, **rl_rank.SETTINGS))
        found = json.loads((tmp_path / f"{loss['kind']}_{rank}.json").read_text())
        for step, (got, want) in enumerate(zip(found["numbers"], expected["numbers"], strict=True)):
            assert got == pytest.approx(want, rel=1e-6, abs=1e-9), f"{loss}, {rank}, step {step}"
        assert found["error"] == expected["error"]
        assert "must be finite, got nan and a gradient norm nan" in found["error"]
        assert found["kept"] and expected["kept"]
        tensors = load_file(tmp_path / f"{loss['kind']}_{rank}.safetensors")
        assert sum(name.startswith("gradient") for name in wanted) == 3
        for name, want in wanted.items():
            size = want.abs().max() if name.startswith("gradient") else 1.0
            assert size > 0
            assert (tensors[name] - want).abs().max() < 1e-6 * size, (loss, name)
