"""Settings of where tokens come from: engine, sampling, fleet."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from ground.config import Section

SLOT_STEP = 8
"""Slots come in multiples of this: with odd numbers of rows kernels treat the last ones apart."""

_PARITY_NATS = {"hf": 0.0, "vllm": 8e-6}
"""Twice the largest typical drift from the learner that was measured of vLLM's CPU kernels."""

_VLLM_TEMPERATURES = 0.01, 2.0
"""What vLLM 0.32 samples at as it is told, besides 0."""


class EngineSection(Section):
    """One engine: its kind and its shape."""

    kind: Literal["hf", "vllm"] = "hf"
    """`hf` decodes with transformers: equal shapes give equal bits. `vllm` decodes with vLLM, which
    has to be installed: faster on GPUs, and equal to a tolerance."""
    num_slots: int = Field(default=64, ge=1)
    """Sequences decoded at once; `hf` takes as long for a step however many slots are filled."""
    max_length: int = Field(default=512, ge=2)
    """Tokens of prompt and completion together."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the engine's process."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one machine that each `vllm` engine is cut over; they are one bundle of a Ray
    placement group. On a CPU only 1 is possible."""
    memory_share: float | None = Field(default=None, gt=0, le=1)
    """Share of a device's memory that `vllm` takes for weights and KV cache. Left out: 0.9 of a
    GPU; on a CPU as much cache as `num_slots` sequences of `max_length` need."""
    transfer: Literal["memory", "nccl", "gloo"] = "memory"
    """How `rl` brings new weights into `vllm`. `memory`: mapped on the machine that keeps them,
    through Ray's object store from elsewhere. `nccl`: broadcast from GPU to GPU. `gloo`: the same
    through processors, for machines without one. Beside `rl.lora` only `memory`."""
    parity_floor: float | None = Field(default=None, ge=0)
    """Nats that the parity gate allows a typical probe to be off, however little the learner's own
    noise is; a single token may be off by ten times that. Left out: 0 for `hf`, and what was
    measured for `vllm`'s kernels, 8e-6."""

    @model_validator(mode="after")
    def _only_vllm(self) -> Self:
        """Keys that would be ignored are refused."""
        others = {"tensor_parallel": 1, "memory_share": None, "transfer": "memory"}
        named = [key for key, usual in others.items() if getattr(self, key) != usual]
        if self.kind != "vllm" and named:
            raise ValueError(f"{', '.join(named)} belongs to kind: vllm, got kind: {self.kind}")
        return self

    @property
    def parity_nats(self) -> float:
        """See `parity_floor`."""
        return _PARITY_NATS[self.kind] if self.parity_floor is None else self.parity_floor

    def with_slots(self, share: float) -> Self:
        """The same with a share of the slots, in steps of `SLOT_STEP`, one at least.

        Example:
            num_slots 40, share 0.5 → 16
        """
        steps = max(int(share * self.num_slots) // SLOT_STEP, 1)
        return self if share == 1 else self.model_copy(update={"num_slots": steps * SLOT_STEP})

    def require_temperature(self, temperature: float, key: str = "temperature") -> None:
        """Refuse temperatures that the engine does not sample at as they are.

        vLLM raises those near 0 to 0.01 and says nothing, so that log-probs are not those of what
        was asked for; those above 2 it refuses, when it comes to them.

        Raises:
            ValueError: naming the key of the section that asks for it.
        """
        low, high = _VLLM_TEMPERATURES
        if self.kind == "vllm" and temperature and not low <= temperature <= high:
            raise ValueError(
                f"{key} must be 0 or lie within {low} and {high} for kind: vllm, got {temperature}"
            )

    def require_room(self, max_new_tokens: int, key: str = "max_new_tokens") -> None:
        """Refuse completions that leave no room for a prompt.

        Raises:
            ValueError: naming the key of the section that asks for them.
        """
        if max_new_tokens >= self.max_length:
            raise ValueError(
                f"{key} must be below engine.max_length ({self.max_length}), which holds the "
                f"prompt too, got {max_new_tokens}"
            )


class SamplingSection(Section):
    """How completions are sampled; top-p and top-k are left out because they bias RL."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    max_new_tokens: int = Field(default=128, ge=1)
    """The completion ends here at the latest, with finish "length"."""


class FleetSection(Section):
    """How many rollout workers there are and when one counts as lost."""

    num_workers: int = Field(default=1, ge=1)
    """Ray actors with one engine each."""
    max_workers: int | None = Field(default=None, ge=1)
    """The fleet grows up to this and shrinks down to `min_workers` when learner and fleet drift
    apart (rl/balance.py); left out, it keeps `num_workers`."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """What Ray reserves for a worker."""
    reward_processes: int = Field(default=1, ge=1)
    """Killable verifier processes of each worker."""
    reward_deadline_seconds: float = Field(default=10.0, gt=0)
    """A verifier that takes longer is killed; the completion that did it scores 0."""
    start_deadline_seconds: float = Field(default=120.0, gt=0)
    """From creating a worker to its first acknowledged weights."""
    rollout_deadline_seconds: float = Field(default=300.0, gt=0)
    """For sampling one group on one worker, from its first place in the engine; then the worker is
    replaced. Verifiers have `reward_deadline_seconds` besides."""
    publish_deadline_seconds: float = Field(default=120.0, gt=0)
    """From handing over weights to a worker's acknowledgement; then the worker is replaced. Weights
    that come from another machine through memory have as long again whenever a part has come."""
    ping_every_seconds: float = Field(default=1.0, gt=0)
    """How often a worker is asked whether it lives."""
    suspect_after_seconds: float = Field(default=1.0, gt=0)
    """A worker whose answer takes longer gets no new work until it answers."""
    ping_deadline_seconds: float = Field(default=15.0, gt=0)
    """A worker that is silent for longer is killed and replaced."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of one worker without a finished group in between, before it is given up."""
    min_workers: int = Field(default=1, ge=1)
    """The run stops when fewer than these are left."""
    spare: bool = True
    """Keep a process ready that has its libraries imported: a lost worker is back seconds sooner,
    for the memory of one Python process with torch in it. Where workers have GPUs (`vllm`) there is
    none, whatever is said here: it would hold those of a whole worker and do nothing with them."""
    backoff_seconds: float = Field(default=0.5, ge=0)
    """Pause before the second restart in a row, then twice that; the first is made at once."""
    max_attempts: int = Field(default=5, ge=1)
    """Workers that may be lost under one group before the group itself is blamed."""

    @property
    def most_workers(self) -> int:
        """Workers that there may be at a time."""
        return self.num_workers if self.max_workers is None else self.max_workers

    @property
    def room_seconds(self) -> float:
        """How long a fleet that is too small to go on waits for a machine with room."""
        return (self.max_restarts + 1) * self.start_deadline_seconds

    @property
    def patience_seconds(self) -> float:
        """Longest time that a worker may spend on coming up, over all its lives."""
        lives = self.max_restarts + 1
        life = self.start_deadline_seconds + self.publish_deadline_seconds
        return lives * life + self.backoff_seconds * 2**lives

    @model_validator(mode="after")
    def _grows_from_where_it_begins(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ValueError(
                f"max_workers must be at least num_workers ({self.num_workers}), "
                f"got {self.max_workers}"
            )
        return self


STALL_SECONDS = 900.0
"""An engine from which no completion comes for so long counts as hung."""


class EnginesSection(Section):
    """What a stage samples and scores with."""

    engine: EngineSection = EngineSection()
    replicas: int = Field(default=0, ge=0)
    """Engines in processes of their own, on whatever machines of the Ray cluster have room (on this
    one where the run is no job of a cluster); 0: one, in the stage's own process. On equal machines
    the answers are the same, whoever gives them and whoever dies meanwhile."""
    cpus_per_replica: float = Field(default=1.0, gt=0)
    """Processors that Ray reserves for each of them."""
    start_deadline_seconds: float = Field(default=600.0, gt=0)
    """From a replica's birth until it has read the model."""
    answer_deadline_seconds: float = Field(default=1800.0, gt=0)
    """A replica that has requests and answers none of them for so long hangs, and is replaced. It
    answers an eighth of its slots at a time, so the slowest of so many completions counts."""
    max_restarts: int = Field(default=3, ge=0)
    """Lives of a replica that may be lost in a row without an answer."""

    @model_validator(mode="after")
    def _weights_stay(self) -> Self:
        if self.engine.transfer != "memory":
            raise ValueError(
                "engine.transfer belongs to rl, where weights change, got "
                f"{self.engine.transfer} in a stage that samples under the same weights throughout"
            )
        return self

    @property
    def stall_seconds(self) -> float:
        """After which nobody waits for a completion any more; replicas find out by themselves."""
        return math.inf if self.replicas else STALL_SECONDS

    @property
    def fleet(self) -> FleetSection:
        """The replicas, held to the same rules as rollout workers."""
        return FleetSection(
            num_workers=self.replicas,
            cpus_per_worker=self.cpus_per_replica,
            start_deadline_seconds=self.start_deadline_seconds,
            max_restarts=self.max_restarts,
            spare=False,
        )


class MeasureSection(EnginesSection):
    """How a model is measured on prompts: sampled so and so often, scored, counted."""

    samples: int = Field(default=16, ge=1)
    """Completions per prompt."""
    k: list[int] = Field(default=[1, 4, 16], min_length=1)
    """pass@k is estimated for these, none larger than `samples`."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the samples; entropy is that of the model only at 1."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens of a completion at most; a prompt that leaves less room is skipped and counted."""
    reward_processes: int = Field(default=1, ge=1)
    """Killable verifier processes."""
    reward_deadline_seconds: float = Field(default=10.0, gt=0)
    """A verifier that takes longer is killed; the completion that did it scores 0."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if min(self.k) < 1 or max(self.k) > self.samples:
            raise ValueError(f"k must lie within 1 and samples ({self.samples}), got {self.k}")
        return self

    @model_validator(mode="after")
    def _room_for_prompts(self) -> Self:
        self.engine.require_room(self.max_new_tokens)
        return self

    @model_validator(mode="after")
    def _a_temperature_of_the_engines(self) -> Self:
        self.engine.require_temperature(self.temperature)
        return self

    @property
    def sampling(self) -> SamplingSection:
        """What is asked of the engine for each completion."""
        return SamplingSection(temperature=self.temperature, max_new_tokens=self.max_new_tokens)


class EvaluateSection(MeasureSection):
    """How the models of a run are measured on the held-out prompts."""

    greedy: bool = False
    """Also decode each prompt once at temperature 0."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Measure on that many prompts, chosen by the run's seed; all of them when left out."""
    systems: int = Field(default=1, ge=0)
    """Completions per prompt under instructions that are drawn from the recipe's `systems`, once
    with constraint values of training and once with others; 0 leaves that out, and so does a recipe
    whose instructions have no constraints."""
    examples: int = Field(default=4, ge=0)
    """Completions per prompt that are kept as text."""
