"""Settings of where tokens come from: engine, sampling, fleet."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ground.config import Section


class EngineSection(Section):
    """One engine: its kind and its shape. Equal shapes give equal bits."""

    kind: Literal["hf", "vllm"] = "hf"
    """`hf` decodes with transformers and is always there; `vllm` needs the extra of that name."""
    num_slots: int = Field(64, ge=1)
    """Sequences decoded at once; a step costs the same however many slots are filled."""
    max_length: int = Field(512, ge=2)
    """Tokens of prompt and completion together."""
    threads: int = Field(1, ge=1)
    """CPU threads of the engine's process."""


class SamplingSection(Section):
    """How completions are sampled; top-p and top-k are left out because they bias RL."""

    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    max_new_tokens: int = Field(128, ge=1)
    """The completion ends here at the latest, with finish "length"."""


class FleetSection(Section):
    """How many rollout workers there are and when one counts as lost."""

    num_workers: int = Field(1, ge=1)
    """Ray actors with one engine each."""
    cpus_per_worker: float = Field(1, gt=0)
    """What Ray reserves for a worker."""
    reward_processes: int = Field(1, ge=1)
    """Killable verifier processes of each worker."""
    reward_deadline_seconds: float = Field(10.0, gt=0)
    """A verifier that takes longer is killed; the completion that did it scores 0."""
    start_deadline_seconds: float = Field(120.0, gt=0)
    """From creating a worker to its first acknowledged weights."""
    rollout_deadline_seconds: float = Field(300.0, gt=0)
    """One group, sampled and scored, on one worker; then the worker is replaced."""
    publish_deadline_seconds: float = Field(120.0, gt=0)
    """From handing over weights to a worker's acknowledgement; then the worker is replaced."""
    ping_every_seconds: float = Field(1.0, gt=0)
    """How often a worker is asked whether it lives."""
    ping_deadline_seconds: float = Field(15.0, gt=0)
    """A worker that is silent for longer is killed and replaced."""
    max_restarts: int = Field(3, ge=0)
    """Restarts of one worker without a finished group in between, before it is given up."""
    backoff_seconds: float = Field(0.5, ge=0)
    """Pause before the first restart; doubles with each one in a row."""
    max_attempts: int = Field(5, ge=1)
    """Workers that may be lost under one group before the group itself is blamed."""
