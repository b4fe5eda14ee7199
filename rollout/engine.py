"""What an engine is: a thing that samples tokens from a language model under seeds of our own.

    submit(request) → waiting → running → Completion (stop, length or aborted)

A request is a pure function of its fields, the weights and the engine's shape: who else is being
decoded, in which slot and in which order requests came never changes its tokens or log-probs.

T tokens of a completion or of a given sequence, K most likely tokens.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ground.errors import DataError, InfraError
from ground.records import Finish, Segment, Span

if TYPE_CHECKING:
    from torch import Tensor


BLANK = -1
"""Version of an engine that has no weights yet but random ones."""


class PromptTooLong(DataError):
    """A prompt that leaves no room for its completion: the row's fault, not the run's."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion that is wanted.

    Example:
        Request("9c1f.0/3", prompt_ids=(1, 17, 4), max_new_tokens=64, temperature=1.0, seed=77,
                stop_ids=(2,))
    """

    id: str
    """Unique among the requests in flight."""
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    """0 is greedy; log-probs are then those of the distribution at temperature 1."""
    seed: int
    """Fixes every random number of this request, whatever runs beside it."""
    stop_ids: tuple[int, ...]
    """The completion ends with the first of these; that token is its last one."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled for a request.

    Example:
        Completion("9c1f.0/3", Segment("policy", (5, 2), (-0.1, -0.3), (Span(4, 2),)), "stop")
    """

    id: str
    segment: Segment
    finish: Finish


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs of a given sequence at temperature 1, each under the tokens before it.

    Example:
        tokens (1, 17, 4) → logprobs of 17 and of 4; top_ids[1] are the likeliest in place of 4
    """

    logprobs: tuple[float, ...]
    """[T - 1], the first token has none."""
    top_ids: tuple[tuple[int, ...], ...] = ()
    """[T - 1][K], likeliest first; empty when no top was asked for."""
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    """[T - 1][K]"""


class Lent(dict[str, "Tensor"]):
    """Tensors that nobody will write to for as long as an engine uses them: it need not copy them.

    Example:
        engine.load(3, Lent(inbox.open(published)))
    """


class Inference(Protocol):
    """What measuring and judging need of an engine, or of several that are as one
    (rollout/replicas.py); every method may be called from any thread."""

    def submit(self, request: Request) -> Future[Completion]:
        """Queue a request. An impossible one is a `DataError` here and now; the future fails
        only with the engine itself (its cause is in the error)."""
        ...

    def abort(self, ids: Collection[str]) -> None:
        """End these requests now: they complete as "aborted" with the tokens they have, or their
        futures are cancelled. Unknown ids are ignored, they may just have finished."""
        ...

    def score(self, token_ids: Sequence[Sequence[int]], top_k: int = 0) -> list[Scores]:
        """Log-probs of given sequences, in the order given."""
        ...


class Engine(Inference, Protocol):
    """Decodes many requests at once, under weights that change; aborted requests complete."""

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled with."""
        ...

    def waiting(self) -> frozenset[str]:
        """Ids of requests that wait for a place: nothing was computed for them yet.

        Raises:
            InfraError: the engine has found out that it is dead.
        """
        ...

    def pause(self) -> None:
        """Stop between two tokens and keep everything; returns when the engine stands still."""
        ...

    def resume(self) -> None:
        """Go on after `pause`."""
        ...

    def load(self, version: int, weights: Mapping[str, Tensor] | Path) -> None:
        """Swap the weights between two tokens; running sequences go on under the new ones.

        Tensors are copied, unless they come as `Lent`.

        Raises:
            DataError: a tensor is missing, unknown, misshapen or not finite; nothing is changed.
        """
        ...

    def tensors(self) -> Mapping[str, Tensor] | None:
        """The weights as they are in use, under the names of `load`; to look at, while paused.
        None if this engine keeps them in another form."""
        ...

    def close(self) -> None:
        """End; what is still in flight fails with an `InfraError`. Closing twice is harmless."""
        ...


def generate(
    engine: Inference,
    requests: Sequence[Request],
    *,
    timeout_seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Submit all requests and wait for all completions, in the order of the requests.

    Args:
        progress: called with (finished, total) as completions come in.

    Raises:
        InfraError: the deadline passed; the requests left are aborted.
    """
    deadline = time.monotonic() + timeout_seconds
    futures: list[Future[Completion]] = []
    completions: list[Completion] = []
    try:
        futures.extend(engine.submit(request) for request in requests)
        for future in futures:
            completions.append(future.result(max(deadline - time.monotonic(), 0.0)))
            if progress is not None:
                progress(len(completions), len(requests))
    except FutureTimeoutError:
        raise InfraError(
            f"all completions must arrive within {timeout_seconds:g} s, "
            f"{len(completions)} of {len(requests)} did",
            where="generate",
            fix="allow more time, or ask for fewer or shorter completions",
        ) from None
    finally:
        if len(completions) < len(requests):
            engine.abort([request.id for request in requests])
    return completions


async def completed(futures: Sequence[Future[Completion]]) -> list[Completion]:
    """The completions of requests that belong together, in their order.

    The loop is woken once, by the last of them or the first that fails: waking takes the
    interpreter from the engine's thread, which with a tiny model costs a tenth of all tokens when
    each completion does it.

    Raises:
        PacktrainError: what one of them failed with; the others may go on.
    """
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    left, lock = len(futures), threading.Lock()

    def end() -> None:
        if not over.done():
            over.set_result(None)

    def count(future: Future[Completion]) -> None:
        nonlocal left
        has_failed = future.cancelled() or future.exception() is not None
        with lock:
            left -= 1
            is_over = left == 0 or has_failed
        if is_over:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(end)

    for future in futures:
        future.add_done_callback(count)
    if futures:
        await over
    failed = (f for f in futures if f.done() and (f.cancelled() or f.exception()))
    if (first := next(failed, None)) is not None:
        first.result()
    return [future.result() for future in futures]


def check_request(request: Request, *, max_length: int, vocabulary: int) -> None:
    """Refuse a request that the engine's shape can never serve."""
    where = f"request {request.id}"
    length = len(request.prompt_ids)
    if not length:
        raise DataError("a prompt must have at least one token, got none", where=where)
    if request.max_new_tokens < 1:
        raise DataError(
            f"max_new_tokens must be at least 1, got {request.max_new_tokens}", where=where
        )
    if length + request.max_new_tokens > max_length:
        raise PromptTooLong(
            f"prompt + max_new_tokens must fit max_length {max_length}, "
            f"got {length} + {request.max_new_tokens} = {length + request.max_new_tokens}",
            where=where,
            fix="raise engine.max_length, lower max_new_tokens, or drop the prompt",
        )
    if not 0.0 <= request.temperature < float("inf"):
        raise DataError(
            f"temperature must be finite and at least 0, got {request.temperature}", where=where
        )
    low, high = min(request.prompt_ids), max(request.prompt_ids)
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"token ids must lie in 0…{vocabulary - 1}, got {low if low < 0 else high}",
            where=where,
            fix="encode the prompt with the tokenizer that belongs to this model",
        )


def check_scorable(
    token_ids: Sequence[Sequence[int]], top_k: int, *, max_length: int, vocabulary: int
) -> None:
    """Refuse sequences that an engine of this shape cannot score, naming the first."""
    if not 0 <= top_k <= vocabulary:
        raise DataError(f"top_k must be in 0…{vocabulary}, got {top_k}", where="score")
    for index, ids in enumerate(token_ids):
        where = f"score, sequence {index}"
        if not 2 <= len(ids) <= max_length:
            raise DataError(
                f"a sequence must have 2…{max_length} tokens, got {len(ids)}", where=where
            )
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise DataError(f"token ids must lie in 0…{vocabulary - 1}", where=where)


def spans_of(versions: Iterable[int]) -> tuple[Span, ...]:
    """Run-length code of the version of each token: 3, 3, 4 → Span(3, 2), Span(4, 1)."""
    spans: list[Span] = []
    for version in versions:
        if spans and spans[-1].version == version:
            spans[-1] = Span(version, spans[-1].length + 1)
        else:
            spans.append(Span(version, 1))
    return tuple(spans)
