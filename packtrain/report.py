"""`packtrain report`: one self-contained page about a run, to be opened offline and passed on.

Everything that a model, a dataset or a recipe wrote is hostile text: Jinja escapes it, charts are
built by ElementTree, control characters and secrets are removed, and the page's own policy forbids
scripts, requests and any style but ours.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from ground.console import plain_text, say
from ground.logs import redact
from ground.storage import write_file
from packtrain import curation_figures, figures
from packtrain.observe import estimate, mapping, number, read_json, read_rows, text
from packtrain.samples import comparisons, conversation, shorten
from packtrain.status import read_status
from packtrain.verdict import exploration, gains, headline

FOLDER = Path(__file__).parent
EXAMPLES = 3
"""Rows shown of what pruning kept and of what it dropped."""


def command(arguments: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    say(f"{headline(arguments.run)} Report: {write_report(arguments.run, arguments.output)}")
    return 0


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the page of a run, finished or not; return its path.

    Raises:
        DataError: `run` is not a run directory.
    """
    target = output or run / "report.html"
    write_file(target, page(run))
    return target


def page(run: Path) -> str:
    """The whole page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=_plain, percent=_percent, clock=_clock, svg=Markup)
    style = (FOLDER / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html.jinja").render(
        style=Markup(style),
        style_hash=_hash(style),
        made=time.strftime("%Y-%m-%d %H:%M"),
        **contents(run),
    )


def contents(run: Path) -> dict[str, object]:
    """What the page says, section by section; a section without data is empty."""
    status = read_status(run)
    recipe = _read_text(run / "recipe.resolved.yaml")
    models = exploration(run)
    ks = figures.pass_names(values for _, values in models)
    cuts = curation_figures.cuts(run)
    return {
        "name": run.resolve().name,
        "headline": headline(run),
        "gains": gains(run),
        "stages": status.stages,
        "advice": status.advice,
        "models": [_model_row(name, values, ks) for name, values in models],
        "sections": {
            "Accuracy and exploration": figures.accuracy(run)
            + figures.entropy(run)
            + figures.corner_cases(run),
            "Training": figures.training(run),
            "What RL trained on": figures.funnel(run) + figures.timeline(run),
        },
        "curriculum": curation_figures.curriculum(run),
        "pruned": _pruned(run),
        "prune_figures": figures.pruning(run) + curation_figures.labels_left(cuts),
        "cuts": [cut.name for cut in cuts],
        "cut_table": curation_figures.cut_table(cuts),
        "agreement": curation_figures.agreement(run),
        "comparisons": comparisons(run),
        "ledger": _ledger(run),
        "environment": _flat(read_json(run / "env.json")),
        "recipe": redact(recipe),
    }


def _model_row(name: str, values: Mapping[str, object], ks: Sequence[str]) -> dict[str, object]:
    passes = {key: estimate(values.get(key)) for key in ks}
    greedy = values.get("greedy")
    return {
        "name": name,
        "passes": passes,
        "greedy": estimate(greedy) or number(greedy),
        "entropy": number(values.get("entropy")),
        "tokens": number(values.get("mean_tokens")),
        "cut": number(values.get("cut_share")),
        "corner_cases": number(values.get("corner_case_share")),
        "prompts": number(values.get("num_prompts")),
    }


def _pruned(run: Path) -> list[dict[str, object]]:
    """Count, mean score and a few rows of what was kept and dropped."""
    found = []
    for name in ("dropped", "kept"):
        rows = read_rows(run / "prune" / f"{name}.parquet")
        if rows:
            values = figures.scores(run, name)
            mean = sum(values) / len(values) if values else None
            picked = rows[:: max(len(rows) // EXAMPLES, 1)][:EXAMPLES]
            examples = [_pruned_row(row) for row in picked]
            found.append({"name": name, "count": len(rows), "mean": mean, "examples": examples})
    return found


def _pruned_row(row: Mapping[str, object]) -> dict[str, object]:
    difficulty = mapping(row.get("difficulty"))
    return {
        "text": shorten(conversation(row.get("messages"))),
        "capability": text(row.get("capability")),
        "label": text(difficulty.get("label")),
        "score": number(difficulty.get("score")),
        "reason": text(row.get("meta_reason")) or text(row.get("reason")),
    }


def _ledger(run: Path) -> list[tuple[str, str, int]]:
    """(state, reason, draws); the sum is what was drawn."""
    counts = figures.ledger_counts(run)
    return [(state, reason, count) for (state, reason), count in sorted(counts.items())]


def _flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", redact(shown)))
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _hash(style: str) -> str:
    """The style's hash as the page's policy names it."""
    digest = hashlib.sha256(style.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _plain(words: str) -> str:
    """What a model, a dataset or a recipe wrote: no control characters, no secrets."""
    return plain_text(redact(words))


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
