"""What `packtrain run` shows: a live panel on a terminal, plain lines in a pipe.

Both follow the files that the stages write (progress.json, metrics.jsonl); neither parses text.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ground.console import plain_text, say
from packtrain.observe import (
    Progress,
    estimate,
    evaluation,
    last_metrics,
    number,
    read_progress,
)
from packtrain.samples import newest_sample
from packtrain.steps import Step
from rollout.passk import Estimate

NUMBERS = (
    ("reward", "reward"),
    ("pass_rate", "pass rate"),
    ("loss", "loss"),
    ("entropy", "entropy"),
    ("kept_share", "kept"),
    ("flat_share", "flat"),
    ("stale_share", "stale"),
    ("error_share", "errors"),
    ("learner_idle_share", "trainer idle"),
    ("rollout_idle_share", "rollout idle"),
)
"""Metric → its name on the panel, in the order of importance."""


class Panel(Protocol):
    """What the runner tells about its steps."""

    def begin(self, index: int, line: Sequence[str]) -> None:
        """A step starts with this command."""
        ...

    def refresh(self) -> None:
        """Some time has passed."""
        ...

    def end(self, index: int, seconds: float, code: int) -> None:
        """A step has ended."""
        ...

    def close(self) -> None:
        """No more steps."""
        ...


class PlainPanel:
    """Lines for a pipe or a log file; the stages' own lines come between them."""

    def __init__(self, run: Path, steps: Sequence[Step]) -> None:
        self._run, self._steps = run, steps

    def begin(self, index: int, line: Sequence[str]) -> None:
        """`[3/9] python -m sft.train …`"""
        say(f"[{index + 1}/{len(self._steps)}] {shown_line(line)}")

    def refresh(self) -> None:
        """The stages speak for themselves."""

    def end(self, index: int, seconds: float, code: int) -> None:
        """`[3/9] sft done seconds=41.3 pass@1=0.412`"""
        step = self._steps[index]
        outcome = {0: "done", 130: "stopped", 143: "stopped"}.get(code, f"failed code={code}")
        score = pass_at_1(self._run, step)
        tail = f" pass@1={score.mean:.4f}" if score and code == 0 else ""
        say(f"[{index + 1}/{len(self._steps)}] {step.title} {outcome} seconds={seconds:.1f}{tail}")

    def close(self) -> None:
        """Nothing is held."""


class LivePanel:
    """A table of the steps, and below it the numbers and a sample of the one that runs.

    It is drawn only in `refresh`, by the runner's own thread.
    """

    def __init__(self, run: Path, steps: Sequence[Step], console: Console) -> None:
        self._run, self._steps = run, steps
        self._seconds: dict[int, float] = {}
        self._failed: dict[int, int] = {}
        self._current: int | None = None
        self._started = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def begin(self, index: int, line: Sequence[str]) -> None:
        """Print the command above the table and mark the step."""
        self._current, self._started = index, time.monotonic()
        self._live.console.print(
            Text(f"[{index + 1}/{len(self._steps)}] {shown_line(line)}", style="dim")
        )
        self.refresh()

    def refresh(self) -> None:
        """Draw the state of the files."""
        self._live.update(self.render(), refresh=True)

    def end(self, index: int, seconds: float, code: int) -> None:
        """Tick the step, or cross it."""
        self._seconds[index] = seconds
        if code:
            self._failed[index] = code
        self._current = None
        self.refresh()

    def close(self) -> None:
        """Leave the last picture on the terminal."""
        self._live.stop()

    def render(self) -> RenderableType:
        """The whole panel."""
        table = Table.grid(padding=(0, 2))
        for index, step in enumerate(self._steps):
            table.add_row(*self._row(index, step))
        parts: list[RenderableType] = [table]
        if self._current is not None:
            parts += self._details(self._steps[self._current])
        return Frame(Group(*parts), title=f"packtrain {self._run.name}", title_align="left")

    def _row(self, index: int, step: Step) -> tuple[RenderableType, ...]:
        score = pass_at_1(self._run, step)
        verdict = f"pass@1 {score.mean:.1%}" if score else ""
        if index in self._failed:
            return Text("✗", "red"), step.title, "", Text(f"code {self._failed[index]}", "red")
        if index == self._current:
            progress = read_progress(self._run / step.folder)
            elapsed = time.monotonic() - self._started
            return Text("▸", "cyan"), step.title, _bar(progress), _eta(progress, elapsed)
        if index in self._seconds:
            return Text("✓", "green"), step.title, f"{self._seconds[index]:.0f} s", verdict
        is_done = (self._run / step.folder / "manifest.json").is_file()
        return Text("✓" if is_done else "·", "dim"), Text(step.title, "dim"), "", verdict

    def _details(self, step: Step) -> list[RenderableType]:
        progress = read_progress(self._run / step.folder)
        numbers = panel_numbers(progress, last_metrics(self._run, step.folder))
        line = Text("   ".join(f"{name} {value}" for name, value in numbers), style="cyan")
        sample = newest_sample(self._run / step.folder)
        if not sample:
            return [line]
        cut = plain_text(sample).replace("\n", " ⏎ ")[:300]
        return [line, Text("sample ", style="dim").append(cut, style="italic")]


def open_panel(run: Path, steps: Sequence[Step]) -> Panel:
    """Live when stdout is a terminal that can move its cursor, else plain."""
    console = Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LivePanel(run, steps, console)
    return PlainPanel(run, steps)


def panel_numbers(
    progress: Progress | None, metrics: Mapping[str, object]
) -> list[tuple[str, str]]:
    """What is worth showing of a stage's newest numbers; shares as percentages."""
    known = {**(progress.numbers if progress else {}), **metrics}
    found = []
    for key, name in NUMBERS:
        value = number(known.get(key))
        if value is not None:
            is_share = key.endswith("_share") or key == "pass_rate"
            found.append((name, f"{value:.0%}" if is_share else f"{value:.3g}"))
    return found


def pass_at_1(run: Path, step: Step) -> Estimate | None:
    """The score of an evaluation step that is done."""
    return estimate(evaluation(run, step.stage).get("pass@1")) if step.is_evaluation else None


def shown_line(line: Sequence[str]) -> str:
    """A command as a user would type it: the interpreter without its folder."""
    python = Path(line[0]).name
    return shlex.join([python, *line[1:]]).replace(
        f"{python} -m accelerate.commands.launch", "accelerate launch"
    )


def _bar(progress: Progress | None) -> RenderableType:
    if progress is None or progress.total <= 0:
        return ProgressBar(total=None, width=30, pulse=True)
    return ProgressBar(total=progress.total, completed=progress.step, width=30)


def _eta(progress: Progress | None, elapsed: float) -> str:
    if progress is None:
        return f"{elapsed:.0f} s"
    left = "" if progress.eta_seconds is None else f", {progress.eta_seconds:.0f} s left"
    return f"{progress.step}/{progress.total}  {elapsed:.0f} s{left}"
