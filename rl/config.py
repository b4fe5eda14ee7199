"""Settings of the `rl` stage."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from curation.config import CurriculumSection
from distill.config import RolloutDistillSection
from ground.config import Section
from ground.lora import LoraSection
from rl.objective_config import (
    AdvantageSection,
    AipoLoss,
    BaselineAdvantages,
    LossSection,
    PassAtKAdvantages,
)
from rollout.config import EngineSection, FleetSection, SamplingSection


class OptimizerSection(Section):
    """AdamW at a constant rate after a linear warm-up."""

    learning_rate: float = Field(default=1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class LearnerSection(Section):
    """The learner's ranks, where Ray is to start them: each is a worker of Ray Train, on this or
    any other machine of the cluster (rl/train_ranks.py). `accelerate launch` starts ranks of its
    own, on one machine, and has no use for this section."""

    num_ranks: int = Field(default=1, ge=1)
    """Processes that train together. 1 is a process of the supervisor's own, for which nothing is
    reserved. Another number may be given whenever a stopped run goes on: the steps stay the
    same."""
    max_ranks: int | None = Field(default=None, ge=1)
    """The learner goes up to this and down to `min_ranks`, at a cut, when another split of the same
    devices between it and the fleet would be faster by more than a band (rl/share.py); left out,
    it keeps `num_ranks`. Needs `fleet.max_workers`: what one gets the other gives."""
    min_ranks: int = Field(default=1, ge=1)
    """See `max_ranks`."""
    spread: Literal["ddp", "zero2", "zero3"] = "ddp"
    """What a rank holds: the whole model (ddp), a part of gradients and moments (zero2), or a part
    of the weights as well (zero3, DeepSpeed)."""
    cpus_per_rank: float = Field(default=1, gt=0)
    """What Ray reserves for a rank. Ranks without GPUs are dealt out over the machines one by one,
    beginning with the run's own; `threads` is what each computes with."""
    gpus_per_rank: int = Field(default=0, ge=0, le=1)
    """1: each rank has a GPU, and a machine is filled before the next one is begun. 0: ranks
    compute on processors, also where there are GPUs."""
    room_seconds: float = Field(default=60.0, ge=0)
    """How long a run that lost a machine waits until all its ranks and workers have room again;
    then it ends with what they want and what there is."""

    @property
    def is_in_ray(self) -> bool:
        """Whether Ray starts the ranks."""
        return max(self.num_ranks, self.max_ranks or 1) > 1

    @property
    def reserved_cpus(self) -> float:
        """Processors that Ray keeps for the ranks."""
        return self.num_ranks * self.cpus_per_rank if self.is_in_ray else 0.0

    @model_validator(mode="after")
    def _begins_within_its_bounds(self) -> Self:
        if self.max_ranks is None and self.min_ranks > 1:
            raise ValueError("min_ranks belongs to max_ranks, got it alone")
        if self.max_ranks is not None and self.max_ranks < self.num_ranks:
            raise ValueError(
                f"max_ranks must be at least num_ranks ({self.num_ranks}), got {self.max_ranks}"
            )
        if self.min_ranks > self.num_ranks:
            raise ValueError(
                f"min_ranks must be at most num_ranks ({self.num_ranks}), got {self.min_ranks}"
            )
        return self


class ValidationSection(Section):
    """A slice of the prompts that is only looked at; picks the weights that are exported."""

    prompts: int = Field(default=96, ge=0)
    """Taken from the pool by content hash, never trained on; 0 keeps the last weights."""
    samples: int = Field(default=2, ge=1)
    """Answers to each prompt, at the training temperature."""
    evaluate_every: int = Field(default=10, ge=1)
    """Versions between two looks; the last version is always looked at."""


class RlSection(Section):
    """Online RL: how much, how fresh, from what and where."""

    steps: int = Field(ge=1)
    """Optimizer steps, each of which publishes a version of the weights."""
    groups_per_step: int = Field(default=32, ge=1)
    """Slots that a step consumes; filtered ones make the batch smaller."""
    group_size: int = Field(default=8, ge=2)
    """Rollouts of a group; at least 2 to form a baseline."""
    max_staleness: int = Field(default=1, ge=0)
    """Versions between a sample's oldest token and the learner; 0 is synchronous training."""
    late: Literal["wait", "drop"] = "wait"
    """What the learner does about slots that are not in when their step is due: wait for them, or
    drop them and ask their prompts again in the next slots that open."""
    late_floor: float = Field(default=0.9, gt=0, le=1)
    """Share of a step's slots that must be in before the others can be dropped."""
    max_refills: int = Field(default=1, ge=0)
    """Draws that may replace a flat group, one after another."""
    quotas: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Share of the *trained* groups by capability, e.g. {math: 0.5, code: 0.5}; they sum to 1 and
    name every capability of the prompts. Empty: draws go where groups are most likely to teach."""
    sampling: SamplingSection = SamplingSection()
    engine: EngineSection = EngineSection()
    fleet: FleetSection = FleetSection()
    learner: LearnerSection = LearnerSection()
    advantages: AdvantageSection = BaselineAdvantages()
    loss: LossSection = AipoLoss()
    optimizer: OptimizerSection = OptimizerSection()
    lora: LoraSection | None = None
    """Train a low-rank adapter: it alone is handed over, and each worker adds it to the base that
    it got at the beginning. Left out, all weights are trained and handed over."""
    distill: RolloutDistillSection | None = None
    """Learn from the recipe's teacher too, who speaks to each group that teaches; left out, from
    the rewards alone."""
    curriculum: CurriculumSection = CurriculumSection()
    validation: ValidationSection = ValidationSection()
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Tokens, padding included, of one forward and backward pass."""
    pack_tokens: int = Field(default=0, ge=0)
    """Rows are packed side by side into sequences of at most so many tokens; 0 keeps one row per
    sequence, like lengths together."""
    ess_floor: float = Field(default=0.5, ge=0, le=1)
    """Effective share of a step's tokens below which the step is made smaller; 0 never brakes."""
    max_braked_steps: int = Field(default=10, ge=1)
    """Braked steps in a row before the run stops."""
    max_empty_steps: int = Field(default=3, ge=1)
    """Steps in a row without any group that teaches, before the curriculum is widened; after as
    many with widened draws the run stops with the reasons."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the learner; the workers have `engine.threads` each."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Versions between two checkpoints; the last version is always kept."""
    checkpoints_kept: int = Field(default=2, ge=1)
    max_restarts: int = Field(default=2, ge=0)
    """Times that the run may go on from its last checkpoint after losing learner or controller."""
    step_deadline_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for a step's groups or for a publication."""
    silent_seconds: float = Field(default=60.0, gt=0)
    """A learner or controller that gives no sign of life for so long hangs (for its first it has
    three minutes): it is killed and the loop goes on from its last checkpoint. Signs come every
    second or two from threads of their own, also in the middle of a long step, since kernels run
    without the interpreter's lock."""
    lease_seconds: float = Field(default=150.0, gt=0)
    """Workers and controller end themselves when their owner is silent for so long."""
    watchdog_seconds: float = Field(default=120.0, gt=0)
    """When nothing moves for so long, the log says what is waited for and where everybody stands
    (log/stacks); nothing is killed for it."""

    @property
    def groups_in_flight(self) -> int:
        """Groups that the fleet is given at a time: twice what the engines have places for, and one
        more each.

        Of a group whose answers differ in length most places are free before it ends; with as many
        groups as places a fifth of the fleet idles under heavy skew (benchmarks/overlap.py).
        """
        per_worker = 2 * math.ceil(self.engine.num_slots / self.group_size) + 1
        return per_worker * self.fleet.most_workers

    @property
    def publication_seconds(self) -> float:
        """Longest that a publication may take with its files and its look, whose groups come in
        turns and wait for a place as long as they then sample."""
        turns = math.ceil(self.validation.prompts / self.groups_in_flight)
        return 2 * self.step_deadline_seconds + 2 * turns * self.fleet.rollout_deadline_seconds

    @property
    def max_starved_steps(self) -> int:
        """Steps in a row without any group that teaches, before the run stops: those that widen the
        curriculum, those whose slots were open by then, and as many again with widened draws."""
        return 2 * self.max_empty_steps + self.max_staleness

    @model_validator(mode="after")
    def _samples_from_the_policy(self) -> Self:
        if self.sampling.temperature <= 0:
            raise ValueError("sampling.temperature must be positive in RL, got 0 (greedy)")
        self.engine.require_temperature(self.sampling.temperature, "sampling.temperature")
        return self

    @model_validator(mode="after")
    def _adapters_go_through_memory(self) -> Self:
        if self.lora and self.engine.transfer != "memory":
            raise ValueError(
                f"engine.transfer {self.engine.transfer} is for whole weights, with lora only the "
                "adapter is handed over: leave engine.transfer out"
            )
        return self

    @model_validator(mode="after")
    def _room_for_prompts(self) -> Self:
        self.engine.require_room(self.sampling.max_new_tokens, "sampling.max_new_tokens")
        return self

    @model_validator(mode="after")
    def _lease_outlasts_silence(self) -> Self:
        if self.lease_seconds <= self.silent_seconds:
            raise ValueError(
                f"lease_seconds must be above silent_seconds ({self.silent_seconds:g}), got "
                f"{self.lease_seconds:g}"
            )
        return self

    @model_validator(mode="after")
    def _leads_compare_like_with_like(self) -> Self:
        distill, temperature = self.distill, self.sampling.temperature
        if distill is None or distill.weighting.kind != "aligned":
            return self
        if distill.temperature != temperature:
            raise ValueError(
                "weighting 'aligned' compares the teacher with the policy that samples: "
                f"distill.temperature must be sampling.temperature ({temperature:g}), got "
                f"{distill.temperature:g}; or set distill.weighting to static"
            )
        return self

    @model_validator(mode="after")
    def _quotas_share_a_step(self) -> Self:
        if self.quotas and abs(sum(self.quotas.values()) - 1) > 1e-6:
            raise ValueError(f"quotas must sum to 1, got {sum(self.quotas.values()):g}")
        least = 2 * sum(quota > 0 for quota in self.quotas.values())
        if self.groups_per_step < least:
            raise ValueError(
                f"quotas need two groups of a step for each capability: groups_per_step must be at "
                f"least {least}, got {self.groups_per_step}"
            )
        if self.quotas and not self.curriculum.review_share:
            raise ValueError(
                "quotas need curriculum.review_share above 0: a capability whose prompts are all "
                "solved or hopeless would never be asked again"
            )
        return self

    @model_validator(mode="after")
    def _ranks_and_workers_exchange_devices(self) -> Self:
        if self.learner.max_ranks is None:
            return self
        if self.fleet.max_workers is None:
            raise ValueError(
                "learner.max_ranks needs fleet.max_workers: what the learner gets the fleet gives"
            )
        has_gpus = self.engine.kind == "vllm" and self.learner.gpus_per_rank == 1
        is_even = self.learner.cpus_per_rank == self.fleet.cpus_per_worker
        if not has_gpus and (self.learner.gpus_per_rank or not is_even):
            raise ValueError(
                "with learner.max_ranks ranks and workers must take the same devices: a GPU each "
                "(gpus_per_rank: 1 and engine.kind: vllm) or equal cpus_per_rank and "
                "fleet.cpus_per_worker"
            )
        return self

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        if self.lora and self.lora.dropout:
            raise ValueError(
                "lora.dropout must be 0 in RL, where the sampler has none and every ratio pi / mu "
                f"would be off by it, got {self.lora.dropout}"
            )
        return self

    @model_validator(mode="after")
    def _adapters_stand_on_whole_weights(self) -> Self:
        if self.lora and self.learner.spread != "ddp":
            raise ValueError(
                "lora goes with learner.spread: ddp alone (an adapter's gradients and moments are "
                f"small, and its base is read whole), got {self.learner.spread}"
            )
        return self

    @model_validator(mode="after")
    def _teachers_speak_to_whole_weights(self) -> Self:
        if self.distill and self.learner.spread == "zero3":
            raise ValueError(
                "distill needs the whole model on each rank, for its loss reads the LM head's "
                "weights: set learner.spread to ddp or zero2, got zero3"
            )
        return self

    @model_validator(mode="after")
    def _sets_smaller_than_groups(self) -> Self:
        chosen = self.advantages
        if isinstance(chosen, PassAtKAdvantages) and chosen.k >= self.group_size:
            raise ValueError(
                f"advantages.k must be below group_size ({self.group_size}), got {chosen.k}"
            )
        return self
