"""The picture of docs/distill.md: bytes a token against the error of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.stored_words import Words

_MARKERS = "xosD"
_LEAST = 1e-4
"""Where an error's axis begins."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One way of keeping, at several sizes.

    Example:
        Curve("topk_tail", sizes=[60, 102], token_errors=[0.7, 0.6], batch_errors=[0.8, 0.7])
    """

    name: str
    sizes: list[int]
    """Bytes a token."""
    token_errors: list[float]
    batch_errors: list[float]

    def add(self, size: int, words: Words, gradient_TH: Tensor) -> None:
        """A point of the curve."""
        self.sizes.append(size)
        self.token_errors.append(words.token_error(gradient_TH))
        self.batch_errors.append(words.batch_error(gradient_TH))

    def as_json(self) -> dict[str, object]:
        """For the committed results."""
        return {
            "name": self.name,
            "bytes": self.sizes,
            "token": [round(error, 5) for error in self.token_errors],
            "batch": [round(error, 5) for error in self.batch_errors],
        }


def draw(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """One column a teacher: errors of single tokens above, of a batch below."""
    figure = Figure(figsize=(4.2 * len(curves), 6.4), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex="col", sharey=True)
    for column, (teacher, each) in enumerate(curves.items()):
        _panel(axes[0, column], each, is_batch=False)
        _panel(axes[1, column], each, is_batch=True)
        axes[0, column].set_title(teacher)
        axes[1, column].set_xlabel("bytes a token")
    axes[0, 0].set_ylabel("relative error of a token's gradient")
    axes[1, 0].set_ylabel("relative error of a batch's gradient")
    axes[0, 0].legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(axes: Axes, curves: Sequence[Curve], *, is_batch: bool) -> None:
    for marker, curve in zip(_MARKERS, curves, strict=True):
        errors = curve.batch_errors if is_batch else curve.token_errors
        axes.plot(
            curve.sizes, [max(each, _LEAST) for each in errors], marker=marker, label=curve.name
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
