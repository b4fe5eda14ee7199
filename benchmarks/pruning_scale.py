"""Pruning a million rows, the judge aside: rows per second and peak memory.

    synthetic rows with judgements (a twentieth near-duplicates, some misaligned, some unjudged)
    → marked, ordered, cut → a part of them written as the stage writes them

The parts of the prune stage that come behind the judge, on the stage's own functions, in a process
of its own; memory is the peak of its resident set, and time is processor time on one thread, since
machines are busy. Rows are 20 words from a vocabulary of 20,000. Twice the same must give the same
bytes, which is seen on 5,000 rows. `--quick` does 50,000 rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import compress, islice
from pathlib import Path

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from curation.config import PruneSection
from curation.judge import Judgement
from curation.prune import decide
from curation.pruning import SCHEMA, decision_row
from ground.records import Demonstration, Message
from ground.tables import write_rows

ROWS, QUICK_ROWS, TWICE_ROWS = 1_000_000, 50_000, 5_000
_WRITTEN = 50
"""Of so many rows one is written: each takes as long, and memory for a part of them only."""
_VOCABULARY, _WORDS = 20_000, 20
_DUPLICATES, _MISALIGNED, _UNJUDGED = 0.05, 0.02, 0.03
_CAPABILITIES = ("math", "code", "chat", "logic", "tools")
_DEADLINE_SECONDS = 1200


def measure(quick: bool) -> Report:
    """One process for the figures, two small ones for the same bytes."""
    seen = _in_a_process(QUICK_ROWS if quick else ROWS)
    first, second = _in_a_process(TWICE_ROWS), _in_a_process(TWICE_ROWS)
    written = seen["rows"] / _WRITTEN / seen["write_seconds"]
    found = seen["marked"] / (seen["rows"] * _DUPLICATES)
    return Report(
        [
            Figure("rows", seen["rows"]),
            Figure("rows per second, selection", seen["rows"] / seen["select_seconds"], "1/s"),
            Figure("rows per second, writing", written, "1/s"),
            Figure("peak memory", seen["peak"] / 2**30, "GiB", goal=8.0, better="lower"),
            Figure("of that the rows and judgements", seen["loaded"] / 2**30, "GiB"),
            Figure("bytes beyond them, per row", (seen["peak"] - seen["loaded"]) / seen["rows"]),
            Figure("near-duplicates found", found, goal=0.95, tolerance=0.03),
            Figure("kept, of the rows", seen["kept"] / seen["rows"], goal=0.5),
            Figure("equal bytes on a second run", float(first["bytes"] == second["bytes"]), goal=1),
        ],
        seen,
    )


def _in_a_process(rows: int) -> dict:
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.pruning_scale", "--rows", str(rows)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=_DEADLINE_SECONDS,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return json.loads(child.stdout)


def _child(number: int) -> None:
    """Make the rows, prune them, and say what it took."""
    rows, judgements = _synthetic(number)
    loaded = _peak()
    started = time.process_time()
    decisions = decide(PruneSection.model_validate({}), rows, judgements)
    selected = time.process_time()
    kept = [decision.kept for decision in decisions]
    with tempfile.TemporaryDirectory() as folder:
        digest = hashlib.sha256()
        for name, those in (("kept", kept), ("dropped", [not each for each in kept])):
            path = Path(folder) / f"{name}.parquet"
            some = islice(compress(decisions, those), number // 2 // _WRITTEN)
            part = (decision_row(d, "synthetic", "scale") for d in some)
            write_rows(path, part, SCHEMA)
            digest.update(path.read_bytes())
    written = time.process_time()
    figures = {
        "rows": number,
        "kept": sum(kept),
        "marked": sum(decision.mark == "duplicate" for decision in decisions),
        "loaded": loaded,
        "peak": _peak(),
        "select_seconds": selected - started,
        "write_seconds": written - selected,
        "bytes": digest.hexdigest(),
    }
    sys.stdout.write(json.dumps(figures))


def _synthetic(number: int) -> tuple[list[Demonstration], list[Judgement]]:
    """Rows of random words; a twentieth repeats an earlier one with a word more at its end."""
    chance = random.Random(0)
    vocabulary = [f"w{number}" for number in range(_VOCABULARY)]
    rows: list[Demonstration] = []
    judgements: list[Judgement] = []
    for place in range(number):
        words = chance.choices(vocabulary, k=_WORDS)
        if rows and chance.random() < _DUPLICATES:
            earlier = rows[chance.randrange(len(rows))].messages
            words = [*earlier[0].content.split(), *earlier[1].content.split(), "again"]
        question, answer = " ".join(words[: _WORDS // 2]), " ".join(words[_WORDS // 2 :])
        messages = (Message("user", question), Message("assistant", answer))
        capability = chance.choice(_CAPABILITIES)
        rows.append(Demonstration(f"{place:016x}", messages, capability))
        judgements.append(_judgement(chance))
    return rows, judgements


def _judgement(chance: random.Random) -> Judgement:
    if chance.random() < _UNJUDGED:
        return Judgement(reason="longer than the judge's 256 tokens")
    ifd = 1.1 if chance.random() < _MISALIGNED else chance.random()
    parts = {"loss": ifd, "loss_alone": 1.0, "ifd": ifd}
    return Judgement(min(ifd, 1.0), None, parts, is_misaligned=ifd >= 1)


def _peak() -> int:
    """Bytes of the largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if "--rows" in sys.argv:
        _child(int(sys.argv[sys.argv.index("--rows") + 1]))
        sys.exit(0)
    sys.exit(run_benchmark("pruning_scale", measure, seeds=(0,)))
