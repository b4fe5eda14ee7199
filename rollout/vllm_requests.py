"""Requests on their way through vLLM, and answers: between our words and vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from ground import faults
from ground.errors import DivergedError
from ground.records import Finish, Segment, Span
from rollout.engine import Completion, Request, Scores

_FINISHES: dict[str | None, Finish] = {"stop": "stop", "length": "length", "abort": "aborted"}


@dataclass(slots=True)
class Sampling:
    """A request that vLLM has."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    begins_anew: bool = False
    """It had no token when the weights were swapped."""
    is_aborted: bool = False

    @property
    def is_unwanted(self) -> bool:
        """Whether vLLM should stop working on it; it may not have had it yet when it was told."""
        return self.begins_anew or self.is_aborted

    def begin(self) -> None:
        """From nothing, under the weights of now."""
        self.begins_anew = False
        self.token_ids.clear()
        self.logprobs.clear()

    def take(self, part: CompletionOutput) -> None:
        """Tokens that are new in it, each with its log-prob."""
        assert part.logprobs is not None
        for places, id_ in zip(part.logprobs, part.token_ids, strict=True):
            assert places is not None
            self.token_ids.append(id_)
            self.logprobs.append(places[id_].logprob)


async def sampled(llm: AsyncLLM, sampling: Sampling, salt: Callable[[], str]) -> Completion:
    """Have vLLM complete a request, from the beginning as often as it has to begin anew.

    Args:
        salt: whose blocks of its prompt it may use, when it begins.
    """
    request, params = sampling.request, _sampling_params(sampling.request)
    while True:
        sampling.begin()
        part: CompletionOutput | None = None
        prompt = tokens_input(list(request.prompt_ids), cache_salt=salt())
        async for output in llm.generate(prompt, params, request.id):
            part = output.outputs[0]
            sampling.take(part)
            faults.point("gen.mid")
            if sampling.is_unwanted and not output.finished:
                await llm.abort(request.id)
        if sampling.is_aborted or not sampling.begins_anew:
            assert part is not None
            return completion_of(sampling, part)


async def scored(llm: AsyncLLM, name: str, ids: Sequence[int], top_k: int, salt: str) -> Scores:
    """Have vLLM score a sequence."""
    prompt = tokens_input(list(ids), cache_salt=salt)
    (output,) = [output async for output in llm.generate(prompt, _scoring_params(top_k), name)]
    return scores_of(output, ids, top_k)


def _sampling_params(request: Request) -> SamplingParams:
    """What asks vLLM for a completion: its tokens come with the first one and at the end."""
    return SamplingParams(
        temperature=request.temperature,
        seed=request.seed,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_ids),
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def completion_of(sampling: Sampling, end: CompletionOutput) -> Completion:
    """What was sampled; versions come from vLLM, which knows what each step ran with.

    Raises:
        DivergedError: a log-prob is not finite.
    """
    request, count = sampling.request, len(sampling.token_ids)
    broken = np.flatnonzero(~np.isfinite(sampling.logprobs))
    if len(broken):
        raise DivergedError(
            f"logits must be finite, those of token {broken[0]} are not",
            where=f"request {request.id}",
            fix="lower the learning rate, or go back to an earlier checkpoint",
        )
    spans = tuple(
        Span(int(span.version), min(span.end, count) - span.start)
        for span in end.weight_versions or ()
        if span.start < count
    )
    segment = Segment("policy", tuple(sampling.token_ids), tuple(sampling.logprobs), spans)
    return Completion(request.id, segment, _FINISHES[end.finish_reason])


def _scoring_params(top_k: int) -> SamplingParams:
    """What asks vLLM for log-probs of a prompt; it samples a token behind it all the same."""
    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=top_k,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scores_of(output: RequestOutput, ids: Sequence[int], top_k: int) -> Scores:
    """Log-probs of a prompt's tokens but the first, and the likeliest in place of each."""
    assert output.prompt_logprobs is not None
    first, *rest = output.prompt_logprobs
    places = [place for place in rest if place is not None]
    assert first is None and len(places) == len(rest) == len(ids) - 1
    tops = [sorted(place.items(), key=lambda item: item[1].rank or 0)[:top_k] for place in places]
    return Scores(
        tuple(place[id_].logprob for place, id_ in zip(places, ids[1:], strict=True)),
        tuple(tuple(id_ for id_, _ in top) for top in tops) if top_k else (),
        tuple(tuple(each.logprob for _, each in top) for top in tops) if top_k else (),
    )
