"""Log-probs tile by tile against all logits at once: peak memory and time, forward and backward.

    loss = mean of token log-probs at vocabulary 128k, entropy measured beside it as RL does,
    gradient to hidden states and head → peak memory above what was there before, and time

Each measurement is a process of its own; the two sides alternate, so that a busy machine disturbs
both alike. Memory is the peak of the resident set over the whole call, the head's gradient, which
both sides need, included. Time is processor time on one thread. `--quick` measures a third of the
tokens once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from statistics import median

import psutil
import torch
from torch import Tensor

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from ground.logprobs import token_logprobs

VOCABULARY, HIDDEN = 131_072, 256
TOKENS, QUICK_TOKENS = 3072, 1024
REPEATS = 5
SIDES = ("tiles", "naive", "bare")
"""bare: naive without the entropy, which costs it two more passes over all logits."""
_POLL_SECONDS = 0.002


def measure(quick: bool) -> Report:
    """Fresh processes by turns; medians of memory and of each pair's ratio of times."""
    tokens, repeats = (QUICK_TOKENS, 1) if quick else (TOKENS, REPEATS)
    runs = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            runs[side].append(_in_a_process(side, tokens))
    tiles, naive = runs["tiles"], runs["naive"]
    share = _middle(tiles, "peak") / _middle(naive, "peak")
    drift = max(
        abs(ours["loss"] - theirs["loss"]) for ours, theirs in zip(tiles, naive, strict=True)
    )
    return Report(
        [
            # A third of the tokens saves less, since the head's gradient stays the same.
            Figure(
                "peak memory, share of naive",
                share,
                goal=None if quick else 1 / 8,
                better="lower",
                tolerance=0.1,
            ),
            Figure(
                "time, share of naive",
                _ratio(tiles, naive),
                goal=None if quick else 1.1,
                better="lower",
                tolerance=0.25,
            ),
            Figure("time, share of naive without entropy", _ratio(tiles, runs["bare"])),
            Figure("peak memory of tiles", _middle(tiles, "peak") / 2**20, "MiB"),
            Figure("peak memory of naive", _middle(naive, "peak") / 2**20, "MiB"),
            Figure("difference of the losses", drift, goal=1e-5, better="lower"),
        ],
        {"vocabulary": VOCABULARY, "hidden": HIDDEN, "tokens": tokens, "runs": runs},
    )


def one_side(side: str, tokens: int) -> dict[str, float]:
    """Forward and backward in this process: bytes above the start, processor seconds, the loss."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    with _Peak() as peak:
        start = time.process_time()
        if side == "tiles":
            logprobs, _ = token_logprobs(hidden, weight, targets)
        else:
            logprobs = _naive(hidden, weight, targets, with_entropy=side == "naive")
        loss = logprobs.mean()
        loss.backward()
        seconds = time.process_time() - start
    return {"peak": peak.above, "seconds": seconds, "loss": loss.item()}


def _naive(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, with_entropy: bool
) -> Tensor:
    """What one writes first: logits, log-softmax, gather; the entropy without a gradient."""
    logprobs_NV = (hidden_NH @ weight_VH.T).log_softmax(-1)
    if with_entropy:
        with torch.no_grad():
            (logprobs_NV.exp() * logprobs_NV).sum(-1).neg_()
    return logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1)


class _Peak:
    """Largest resident set of this process within the block, above that at its start."""

    def __init__(self) -> None:
        self._process, self._done = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._base, self._largest = self._resident(), 0

    def __enter__(self) -> _Peak:
        self._base = self._resident()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def above(self) -> float:
        """Bytes."""
        return self._largest - self._base

    def _resident(self) -> int:
        return self._process.memory_info().rss

    def _watch(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self._largest = max(self._largest, self._resident())


def _in_a_process(side: str, tokens: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.logprob_memory", "--side", side, str(tokens)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    return json.loads(done.stdout)


def _ratio(runs: Sequence[dict[str, float]], others: Sequence[dict[str, float]]) -> float:
    """Median ratio of times over the turns."""
    return median(a["seconds"] / b["seconds"] for a, b in zip(runs, others, strict=True))


def _middle(runs: Sequence[dict[str, float]], name: str) -> float:
    return median(run[name] for run in runs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        json.dump(one_side(sys.argv[2], int(sys.argv[3])), sys.stdout)
        sys.exit(0)
    sys.exit(run_benchmark("logprob_memory", measure, seeds=(0,)))
