"""Runs of the `rl` stage as jobs of a Ray cluster: what is submitted, and what comes of it."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from ray_nodes import Nodes
from rl_runs import write_project

from ground.metrics import read_metrics
from ground.storage import verify_directory
from rl.journal import read_journal
from rl.ledger import audit_ledger

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("ground", "rollout", "distill", "curation", "sft", "dpo", "rl", "packtrain", "recipes"),
)
HIDDEN = tuple(ROOT / name for name in PACKAGES)
"""Our own code, which travels with a job."""


def project(folder: Path, model: Path, rl: Mapping[str, object]) -> Path:
    """A working directory with all that the job needs, packtrain's own code included."""
    folder.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_project(folder, model, rl=rl)
    return folder


class Job:
    """A folder that is submitted, and the run that comes of it."""

    def __init__(self, work: Path, run: Path) -> None:
        self.work, self.run, self.stage = work, run, run / "rl"
        run.parent.mkdir()

    def submit(self, nodes: Nodes, *flags: str) -> subprocess.Popen[str]:
        return nodes.submit(self.work, [*self._line, *flags])

    def start_beside(self, nodes: Nodes) -> subprocess.Popen[str]:
        """The same command as a process of nobody's, which outlives the cluster that it joins."""
        return subprocess.Popen(
            self._line,
            cwd=self.work,
            env=nodes.environment | {"RAY_ADDRESS": nodes.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def _line(self) -> list[str]:
        return ["python", "-m", "packtrain", "run", "recipe.yaml", "--run", str(self.run)]

    @property
    def version(self) -> int:
        records = read_metrics(self.stage / "metrics.jsonl")
        return max((int(str(record["step"])) for record in records), default=0)

    def ledger(self) -> list[dict[str, object]]:
        return list(read_journal(self.stage / "ledger.jsonl"))

    def events(self, kind: str) -> list[dict[str, object]]:
        file = self.stage / "events.jsonl"
        return [r for r in read_journal(file) if r["kind"] == kind] if file.exists() else []

    def processes(self) -> list[psutil.Process]:
        """Of the run, wherever they are."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(self.run) in process.cmdline():
                    found.append(process)
        return found

    def groups(self) -> Counter[str]:
        """How many groups each worker made."""
        return Counter(str(event["role"]) for event in self.events("rollout"))

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.run / "log").glob("*.log"))

    def check_finished(self, steps: int) -> None:
        """All that a finished stage promises."""
        summary = verify_directory(self.stage).facts["summary"]
        verify_directory(self.stage / "model")
        totals = audit_ledger(self.ledger())
        assert isinstance(summary, dict) and totals == summary["audited"]
        records = read_metrics(self.stage / "metrics.jsonl")
        assert [r["step"] for r in records if "loss" in r] == list(range(1, steps + 1))
