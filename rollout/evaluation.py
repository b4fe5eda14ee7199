"""Measure a model on prompts: sample, score, and say how sure the figures are.

    prompts → encoded (too long: skipped with its reason) → sampled ─┐ scored as they come
                                                                     └→ Measured → summarise

P prompts, n samples of each.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import pyarrow as pa

from ground.errors import DataError
from ground.records import Prompt, Rollout
from rollout.config import STALL_SECONDS, SamplingSection
from rollout.engine import Completion, Inference, PromptTooLong, Request
from rollout.passk import passes, wilson
from rollout.quality import Fault, fault_of, typical
from rollout.reward_pool import Verifier
from rollout.scoring import rollouts_of, texts_of
from rollout.seeds import sample_seed
from rollout.stall import StallClock

if TYPE_CHECKING:
    from ground.chat import ChatTemplate

UNLABELLED = "unlabelled"
PROMPT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field(
            "messages",
            pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
            nullable=False,
        ),
        pa.field("capability", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("successes", pa.int64(), nullable=False),
        pa.field("trials", pa.int64(), nullable=False),
        pa.field("mean_reward", pa.float64()),
        pa.field("texts", pa.list_(pa.string()), nullable=False),
        pa.field("passed", pa.list_(pa.bool_()), nullable=False),
        pa.field("errors", pa.list_(pa.string()), nullable=False),
        pa.field("finish", pa.list_(pa.string()), nullable=False),
        pa.field("num_tokens", pa.list_(pa.int64()), nullable=False),
        pa.field("faults", pa.list_(pa.string()), nullable=False),
        pa.field("num_faulty", pa.int64(), nullable=False),
        pa.field("skipped", pa.string(), nullable=False),
    ]
)
"""`prompts.parquet`: one row per prompt; lists run over the completions kept as examples, whose
`faults` are empty texts where there is none; `num_faulty` counts over all trials."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A prompt and what the model made of it.

    Example:
        Measured(prompt, rollouts of which 3 of 16 passed) → successes 3, trials 16
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    skipped: str = ""
    """Why it was not asked (longer than the context); it then has no rollouts."""
    greedy: Rollout | None = None
    """The likeliest completion, if it was asked for; in none of the counts."""

    @property
    def successes(self) -> int:
        """Rollouts that solved it."""
        return sum(rollout.passed for rollout in self.rollouts)

    @property
    def trials(self) -> int:
        """Rollouts that were scored."""
        return len(self.rollouts)

    @property
    def faults(self) -> tuple[Fault | None, ...]:
        """The plainest fault of form of each rollout; the prompt's right answers are the measure.

        A model that answers at length every time has no outliers: mean tokens tell that.
        """
        model = typical(self.rollouts)
        question = " ".join(message.content for message in self.prompt.messages)
        return tuple(fault_of(rollout, model, question) for rollout in self.rollouts)

    @property
    def label(self) -> str:
        """The difficulty that the prompt came with."""
        difficulty = self.prompt.difficulty
        return difficulty.label or UNLABELLED if difficulty else UNLABELLED


def measure(
    engine: Inference,
    chat: ChatTemplate,
    prompts: Sequence[Prompt],
    reward_pool: Verifier,
    sampling: SamplingSection,
    *,
    samples: int,
    seed: int,
    first: int = 0,
    occasion: str = "evaluate",
    greedy: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> list[Measured]:
    """Sample and score every prompt; the results come in the order of the prompts.

    Args:
        first: number of the first sample; those below it were taken before.
        occasion: sampling seeds follow from (seed, prompt id, occasion, sample), so equal occasions
            on equal weights give equal completions.
        greedy: also decode each prompt once at temperature 0.
        progress: called with (prompts done, prompts) after each.
        stall_seconds: an engine from which no completion at all comes for so long counts as hung.

    Raises:
        InfraError: the engine gave nothing for `stall_seconds`, or the reward pool cannot work.
    """
    asked, clock = list[_Asked](), StallClock(stall_seconds)
    numbers = range(first, first + samples)
    for place, prompt in enumerate(prompts):
        seeds = [sample_seed(seed, prompt.id, occasion, sample) for sample in numbers]
        temperatures = [sampling.temperature] * samples
        if greedy:
            seeds, temperatures = [*seeds, 0], [*temperatures, 0.0]
        asked.append(
            _ask(
                engine,
                chat,
                prompt,
                sampling.max_new_tokens,
                list(zip(temperatures, seeds, strict=True)),
                f"{occasion}/{place}",
            )
        )
    measured: list[Measured] = []
    threads = ThreadPoolExecutor(reward_pool.num_processes, thread_name_prefix="score")
    try:
        clock.watch(each.completions for each in asked)
        scored = [
            threads.submit(_collect, each, samples, chat, reward_pool, clock) for each in asked
        ]
        for future in scored:
            measured.append(future.result())
            if progress is not None:
                progress(len(measured), len(prompts))
    finally:
        if len(measured) < len(prompts):
            engine.abort([id_ for each in asked for id_ in each.requests])
        threads.shutdown(cancel_futures=True)
    return measured


def summarise(measured: Sequence[Measured], ks: Sequence[int], seed: int) -> dict[str, object]:
    """The figures of an evaluation, as `evaluation.json` holds them.

    Skipped prompts are counted and stay out of every mean. `entropy` is the mean of -log p over
    sampled tokens: at temperature 1 an unbiased estimate of the model's entropy per token.
    `corner_case_share` is the share of answers with a fault of form, `faults` the shares by fault.

    Raises:
        DataError: every prompt was skipped.
    """
    answered = [each for each in measured if each.trials]
    if not answered:
        reason = measured[0].skipped if measured else "there are no prompts"
        raise DataError("nothing could be measured", why=reason, where="evaluation")
    rollouts = [rollout for each in answered for rollout in each.rollouts]
    logprobs = [p for r in rollouts for segment in r.segments for p in segment.logprobs]
    skipped = Counter(each.skipped for each in measured if each.skipped)
    errors = Counter(r.error.partition(":")[0] for r in rollouts if r.error)
    return {
        "num_prompts": len(answered),
        "num_skipped": skipped.total(),
        "skipped": dict(skipped.most_common(10)),
        "samples": max(each.trials for each in answered),
        **_passes(answered, ks, seed),
        "mean_reward": fmean(rollout.reward for rollout in rollouts),
        "entropy": -fmean(logprobs) if logprobs else 0.0,
        "mean_tokens": fmean(rollout.num_tokens for rollout in rollouts),
        "cut_share": fmean(rollout.finish == "length" for rollout in rollouts),
        "finish": _shares(rollout.finish for rollout in rollouts),
        **_corner_cases(answered),
        "errors": dict(errors),
        "by_capability": _parts(answered, lambda each: each.prompt.capability, ks, seed),
        "by_difficulty": _parts(answered, lambda each: each.label, ks, seed),
    }


def greedy_accuracy(measured: Sequence[Measured]) -> dict[str, float]:
    """Share of prompts solved by one greedy completion each, with Wilson's interval."""
    passed = [each.greedy.passed for each in measured if each.greedy]
    return asdict(wilson(sum(passed), len(passed)))


def prompt_rows(measured: Iterable[Measured], examples: int) -> list[Mapping[str, object]]:
    """Rows of `PROMPT_SCHEMA`, in the order given."""
    return [
        {
            "id": each.prompt.id,
            "messages": [{"role": m.role, "content": m.content} for m in each.prompt.messages],
            "capability": each.prompt.capability,
            "label": each.label,
            "successes": each.successes,
            "trials": each.trials,
            "mean_reward": fmean(r.reward for r in each.rollouts) if each.rollouts else None,
            "texts": [rollout.text for rollout in each.rollouts[:examples]],
            "passed": [rollout.passed for rollout in each.rollouts[:examples]],
            "errors": [rollout.error for rollout in each.rollouts[:examples]],
            "finish": [rollout.finish for rollout in each.rollouts[:examples]],
            "num_tokens": [rollout.num_tokens for rollout in each.rollouts[:examples]],
            "faults": [fault or "" for fault in each.faults[:examples]],
            "num_faulty": sum(fault is not None for fault in each.faults),
            "skipped": each.skipped,
        }
        for each in measured
    ]


def choose_prompts(prompts: Sequence[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    """At most `limit` prompts, the same ones for the same seed, in their given order."""
    if limit is None or limit >= len(prompts):
        return list(prompts)

    def lot(prompt: Prompt) -> bytes:
        return hashlib.sha256(f"{seed}/{prompt.id}".encode()).digest()

    chosen = {prompt.id for prompt in sorted(prompts, key=lot)[:limit]}
    return [prompt for prompt in prompts if prompt.id in chosen]


@dataclass(frozen=True, slots=True)
class _Asked:
    prompt: Prompt
    requests: tuple[str, ...]
    completions: tuple[Future[Completion], ...]
    skipped: str = ""


def _ask(
    engine: Inference,
    chat: ChatTemplate,
    prompt: Prompt,
    max_new_tokens: int,
    draws: Sequence[tuple[float, int]],
    name: str,
) -> _Asked:
    """Submit the samples of a prompt; one that the engine cannot serve is data, not a crash.

    Args:
        draws: temperature and seed of each.
    """
    ids = tuple(f"{name}/{prompt.id}/{sample}" for sample in range(len(draws)))
    futures: list[Future[Completion]] = []
    try:
        prompt_ids = tuple(chat.encode_prompt(prompt.messages))
        for id_, (temperature, seed) in zip(ids, draws, strict=True):
            request = Request(
                id=id_,
                prompt_ids=prompt_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                stop_ids=chat.stop_ids,
            )
            futures.append(engine.submit(request))
    except DataError as error:
        engine.abort(ids)
        return _Asked(prompt, (), (), error.what)
    return _Asked(prompt, ids, tuple(futures))


def _collect(
    asked: _Asked,
    samples: int,
    chat: ChatTemplate,
    reward_pool: Verifier,
    clock: StallClock,
) -> Measured:
    if asked.skipped:
        return Measured(asked.prompt, (), asked.skipped)
    completions = [clock.wait(future, asked.prompt) for future in asked.completions]
    texts = texts_of(completions, chat)
    try:
        verdicts = reward_pool.score(asked.prompt, texts)
    except PromptTooLong as error:  # for a judge
        return Measured(asked.prompt, (), error.what)
    rollouts = rollouts_of(completions, texts, verdicts)
    sampled = tuple(rollout for rollout in rollouts if rollout.index < samples)
    greedy = next((rollout for rollout in rollouts if rollout.index >= samples), None)
    skipped = "" if sampled else "no answer could be judged"
    return Measured(asked.prompt, sampled, skipped, greedy)


def _passes(
    measured: Sequence[Measured], ks: Sequence[int], seed: int
) -> Mapping[str, Mapping[str, float]]:
    return passes([(each.trials, each.successes) for each in measured], ks, seed)


def _corner_cases(measured: Sequence[Measured]) -> dict[str, object]:
    faults = [fault for each in measured for fault in each.faults]
    shares = _shares(fault or "" for fault in faults)
    return {
        "corner_case_share": 1.0 - shares.pop("", 0.0),
        "faults": shares,
    }


def _shares(values: Iterable[str]) -> dict[str, float]:
    counts = Counter(values)
    return {value: count / counts.total() for value, count in counts.most_common()}


def _parts(
    measured: Sequence[Measured], key: Callable[[Measured], str], ks: Sequence[int], seed: int
) -> dict[str, dict[str, object]]:
    parts: defaultdict[str, list[Measured]] = defaultdict(list)
    for each in measured:
        parts[key(each)].append(each)
    return {
        name: {
            "n": len(part),
            **_passes(part, ks, seed),
            "mean_reward": fmean(r.reward for each in part for r in each.rollouts),
            "corner_case_share": _corner_cases(part)["corner_case_share"],
        }
        for name, part in sorted(parts.items())
    }
