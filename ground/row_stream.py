"""The order in which a light stage reads its rows, however many ranks share the work."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RowStream(Sampler[int]):
    """One shuffled pass over the rows after another, cut at the run's last step.

    Every step takes the next `rows_per_step` rows and the ranks deal these out among themselves, so
    that a step's rows depend on the seed alone. A step that reaches the end of a pass goes on with
    the next one: there is no ragged step, which ranks would have to fill up with doubled rows.

    Example:
        3 rows, 4 wanted: 2 0 1 | 0
    """

    def __init__(self, num_rows: int, num_wanted: int, seed: int) -> None:
        self._num_rows, self._num_wanted, self._seed = num_rows, num_wanted, seed

    def __len__(self) -> int:
        return self._num_wanted

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        left = self._num_wanted
        while left > 0:
            order = torch.randperm(self._num_rows, generator=generator).tolist()
            yield from order[:left]
            left -= self._num_rows
