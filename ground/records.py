"""The nouns that rooms hand to each other: frozen, slotted, free of behaviour that needs torch.

Shapes: G rollouts of a group, T tokens of a segment.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

Role = Literal["system", "user", "assistant", "tool"]
Label = Literal["easy", "medium", "hard"]
Finish = Literal["stop", "length", "aborted"]

_ID_CODE = "i"
_ID_BYTES = array(_ID_CODE).itemsize

LABELS: tuple[Label, ...] = ("easy", "medium", "hard")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Example:
        Message("user", "2 + 2 ="), Message("assistant", "4")
    """

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How hard a prompt is thought or measured to be, and by whom.

    Example:
        Difficulty(label="hard", score=0.83, judged_by="teacher@3f9a", successes=2, trials=16)
    """

    label: Label | None = None
    score: float | None = None
    """0 is easiest, 1 hardest."""
    judged_by: str = ""
    successes: int = 0
    trials: int = 0
    version: int = 0
    """Version of the policy that made the trials."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task that can be asked any number of times, and how an answer to it is scored.

    Example:
        Prompt.make((Message("user", "2+2="),), capability="arithmetic", reward="exact", answer="4")
    """

    id: str
    """Content hash: equal tasks have equal ids, different tasks different ones."""
    messages: tuple[Message, ...]
    capability: str
    reward: str
    """Registered name of the reward function (rollout/rewards.py)."""
    answer: str
    """What the reward compares with; its format is the reward's own."""
    difficulty: Difficulty | None = None

    @staticmethod
    def make(
        messages: tuple[Message, ...],
        *,
        capability: str,
        reward: str,
        answer: str,
        difficulty: Difficulty | None = None,
    ) -> Prompt:
        """Build a prompt whose id follows from its content (difficulty left out)."""
        identity = content_id(messages, reward, answer)
        return Prompt(identity, messages, capability, reward, answer, difficulty)


def content_id(messages: tuple[Message, ...], reward: str = "", answer: str = "") -> str:
    """Sixteen hex digits of a sha256 over messages, reward and answer."""
    content = [[message.role, message.content] for message in messages]
    payload = json.dumps([content, reward, answer], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """An SFT row: a conversation whose assistant turns are to be imitated.

    Example:
        Demonstration("9c1…", (Message("user", "2 + 2 ="), Message("assistant", "4")), "arithmetic")
    """

    id: str
    messages: tuple[Message, ...]
    """The last one is the assistant's."""
    capability: str
    reward: str = ""
    answer: str = ""
    difficulty: Difficulty | None = None

    @property
    def question(self) -> tuple[Message, ...]:
        """The conversation up to the last assistant turn."""
        return self.messages[:-1]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens sampled under one version of the weights.

    Example:
        (Span(version=3, length=20), Span(version=4, length=12)) for a rollout swapped in flight
    """

    version: int
    length: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens from one source: the policy, or its environment (tool results; no log-probs).

    Between processes tokens travel as bytes, and become numbers again where somebody reads them:
    whoever only passes a segment on, as the controller does, pays for copying 12 bytes a token.

    Example:
        Segment("policy", token_ids=(17, 4, 2), logprobs=(-0.1, -0.7, 0.0), versions=(Span(3, 3),))
    """

    source: Literal["policy", "environment"]
    token_ids: tuple[int, ...]
    """[T]"""
    logprobs: tuple[float, ...] = ()
    """[T], natural log under the distribution that was sampled from (after temperature)."""
    versions: tuple[Span, ...] = ()
    _bytes: tuple[bytes, bytes] | None = field(default=None, init=False, repr=False, compare=False)
    """Token ids (int32) and log-probs (float64) of a segment that came from another process."""

    @property
    def num_tokens(self) -> int:
        """T"""
        packed = self._bytes
        return len(packed[0]) // _ID_BYTES if packed else len(self.token_ids)

    def __reduce__(self) -> tuple[object, ...]:
        ids, logprobs = self._bytes or (
            array(_ID_CODE, self.token_ids).tobytes(),
            array("d", self.logprobs).tobytes(),
        )
        return _arrived, (self.source, ids, logprobs, self.versions)

    if not TYPE_CHECKING:  # only fields that were not set come here, and they have their types

        def __getattr__(self, name: str) -> object:
            if name not in ("token_ids", "logprobs"):
                raise AttributeError(name)
            if (packed := self._bytes) is not None:  # else another thread was faster
                object.__setattr__(self, "token_ids", tuple(array(_ID_CODE, packed[0])))
                object.__setattr__(self, "logprobs", tuple(array("d", packed[1])))
                object.__setattr__(self, "_bytes", None)
            return object.__getattribute__(self, name)


def _arrived(
    source: Literal["policy", "environment"],
    ids: bytes,
    logprobs: bytes,
    versions: tuple[Span, ...],
) -> Segment:
    """A segment as it comes out of a pickle."""
    segment = object.__new__(Segment)
    object.__setattr__(segment, "source", source)
    object.__setattr__(segment, "versions", versions)
    object.__setattr__(segment, "_bytes", (ids, logprobs))
    return segment


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer to a prompt, sampled and scored.

    Example:
        Rollout(0, (segment,), text="2+2 => 4", finish="stop", reward=1.0, passed=True)
    """

    index: int
    """Position in the group; with (run seed, prompt id, pass) it fixes the sampling seed."""
    segments: tuple[Segment, ...]
    text: str
    finish: Finish = "stop"
    reward: float = 0.0
    """Drives the advantage."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    passed: bool = False
    """The verifier's verdict; drives pass@k and the curriculum."""
    error: str = ""
    """Why the completion earned nothing (`reward_timeout: …`); empty when all went well."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Group:
    """The G rollouts of one draw of a prompt: the unit of baselines, filters and accounting.

    Example:
        verdicts [yes, no, no, yes] → pass_rate 0.5
    """

    id: str
    """`<prompt id>.<pass>`: the pass counts draws of the same prompt within a run."""
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    """The rendered and encoded prompt, system instruction included."""
    rollouts: tuple[Rollout, ...]
    system: str = ""
    """The system instruction that was put in front, if any."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """[G]"""
        return tuple(rollout.reward for rollout in self.rollouts)

    @property
    def pass_rate(self) -> float:
        """Share of rollouts whose verifier said yes."""
        return sum(rollout.passed for rollout in self.rollouts) / len(self.rollouts)

    @property
    def versions(self) -> frozenset[int]:
        """Versions of the weights that sampled the group's policy tokens."""
        return frozenset(
            span.version
            for rollout in self.rollouts
            for segment in rollout.segments
            for span in segment.versions
        )

    @property
    def oldest_version(self) -> int:
        """Version of the weights that sampled the group's oldest policy token."""
        return min(self.versions)


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: the same prompt answered well and badly, and what was bad about it.

    Example:
        Pair(prompt, chosen="2+2 => 4", rejected="2+2 => 4 => 4 => 4", reason="repetition")
    """

    prompt: Prompt
    chosen: str
    rejected: str
    reason: str
    system: str = ""
