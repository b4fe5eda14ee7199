"""Copying tensors and proving that they are the same, at the speed of memory.

A checksum is xxh3 (64 bits) over the pieces of a tensor, each taken while the piece is in the
processor's cache. It finds what broke on the way; it does not stop one who wants to deceive.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from typing import TypeVar

import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_digest

from ground import faults
from rollout.layout import Layout, Place

_PIECE_BYTES = 2 << 20
"""Fits a processor's cache."""
_ALONE_BYTES = 4 * _PIECE_BYTES
"""Less than this is not worth a second thread."""
_MAX_THREADS = 4
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}

Item = TypeVar("Item")
Result = TypeVar("Result")


def checksums(
    tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
) -> dict[str, str]:
    """Checksum of each tensor's shape, type and bytes.

    Args:
        into: tensors of the same forms. They are filled on the way, and the checksums are those of
            what then stands in them.
    """
    pieces = [
        (source, target)
        for name, tensor in tensors.items()
        for source, target in zip(
            _pieces(tensor), _pieces(tensor if into is None else into[name]), strict=True
        )
    ]

    def digest(piece: tuple[Tensor, Tensor]) -> bytes:
        source, target = piece
        if into is not None:
            faults.point("publish.copy")
            target.copy_(source)
        return xxh3_64_digest(target.cpu().numpy().data)

    digests = iter(spread(digest, pieces, [source.nbytes for source, _ in pieces]))
    sums = {}
    for name, tensor in tensors.items():
        whole = xxh3_64(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for _ in _pieces(tensor):
            whole.update(next(digests))
        sums[name] = whole.hexdigest()
    return sums


def views(layout: Layout, memory: mmap | bytearray) -> dict[str, Tensor]:
    """The tensors of a layout where they lie in `memory`, which they keep alive."""
    return {name: _view(memory, place) for name, place in layout.places.items()}


def spread(
    work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int]
) -> list[Result]:
    """Results in order; much work is shared out to a few threads in runs of about equal size."""
    total, count = sum(sizes), min(_MAX_THREADS, os.cpu_count() or 1)
    if total < _ALONE_BYTES or count == 1:
        return [work(item) for item in items]
    runs: list[list[Item]] = [[] for _ in range(count)]
    done = 0
    for item, size in zip(items, sizes, strict=True):
        runs[min(done * count // total, count - 1)].append(item)
        done += size
    with ThreadPoolExecutor(count, thread_name_prefix="bytes") as pool:
        return [result for run in pool.map(lambda run: [*map(work, run)], runs) for result in run]


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    if not tensor.numel():
        return ()
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_PIECE_BYTES)


def _view(memory: mmap | bytearray, place: Place) -> Tensor:
    dtype, count = _DTYPES[place.dtype], math.prod(place.shape)
    if not count:
        return torch.empty(place.shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=place.offset)
    return flat.view(place.shape)
