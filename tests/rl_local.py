"""The whole loop in one process: real engines, books, controller and learner; no Ray.

A life is `learn` of rl/learn.py with a controller on a thread beside it. `Killer` ends a life at a
named point, as if the process were gone: from then on every point raises and nothing is written.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from distill.plan import plan_teaching
from distill.word import Word
from ground.chat import ChatTemplate
from ground.checkpoints import Checkpoints
from ground.faults import POINTS
from ground.model import load_model, load_tokenizer
from ground.records import Group, Message, Prompt, Rollout
from rl.actors import restore_books
from rl.books import Books
from rl.buffer import Outcome, Plan
from rl.config import RlSection
from rl.consumed import Consumed, read_plan
from rl.controller import Controller
from rl.job import Job, Report
from rl.journal import Journal, read_journal
from rl.learn import learn
from rl.ledger import audit_ledger
from rl.pool import Pool
from rl.rounds import Rounds
from rl.speech import open_teacher, word_on
from rollout.assembly import joined
from rollout.engine import Completion, Request
from rollout.hf_engine import HfEngine
from rollout.systems import SystemInstruction
from rollout.task import GroupTask
from rollout.weights import Probes

OF_WORKERS = {
    name for kind, name in POINTS if kind in ("rollout", "courier", "reward", "judge", "engine")
}
"""A worker's end is the fleet's business; nothing of the learner's or controller's dies with it."""


Value = TypeVar("Value")


class Killed(BaseException):
    """The process is gone."""


class Killer:
    """Stands in for `faults.point`; kills at the n-th passage of a point in a life.

    Example:
        killer.aim("step.applied", 2);  …  → Killed at the second step of the next life
    """

    def __init__(self) -> None:
        self._name, self._left = "", 0
        self.is_dead = False
        self.passed: list[str] = []

    def aim(self, name: str, nth: int) -> None:
        self._name, self._left, self.is_dead = name, nth, False

    def rest(self) -> None:
        self._name, self.is_dead = "", False

    def point(self, name: str) -> None:
        if name in OF_WORKERS:
            return
        self.check()
        self.passed.append(name)
        self._left -= name == self._name
        if name == self._name and self._left == 0:
            self.is_dead = True
        self.check()

    def corrupted(self, name: str, value: Value) -> Value:
        self.point(name)
        return value

    def check(self) -> None:
        if self.is_dead:
            raise Killed


def make_prompts(count: int = 12) -> tuple[Prompt, ...]:
    return tuple(
        Prompt.make(
            (Message("user", f"letters {number}"),),
            capability=("one", "two")[number % 2],
            reward="even",
            answer="",
        )
        for number in range(count)
    )


def rollouts_of(found: Sequence[Completion]) -> tuple[Rollout, ...]:
    """A rollout is right when its first token is a multiple of four."""
    rights = [completion.segment.token_ids[0] % 4 == 0 for completion in found]
    return tuple(
        Rollout(
            index,
            (completion.segment,),
            text=f"{len(completion.segment.token_ids)} tokens",
            finish=completion.finish,
            reward=float(is_right),
            reward_parts={"first": float(is_right)},
            passed=is_right,
        )
        for index, (completion, is_right) in enumerate(zip(found, rights, strict=True))
    )


class LocalFleet:
    """Engines behind the fleet's interface; which one gets a group, and how late, is random."""

    def __init__(self, job: Job, num_workers: int, jitter: float, seed: int) -> None:
        self._template = ChatTemplate(load_tokenizer(job.model))
        shape = job.section.engine
        self._engines = [
            HfEngine(
                load_model(job.model),
                num_slots=shape.num_slots,
                max_length=shape.max_length,
                pad_id=self._template.pad_id,
                version=-1,
            )
            for _ in range(num_workers)
        ]
        self._jitter, self._random = jitter, random.Random(seed)

    async def publish(self, version: int, weights: object) -> None:
        tensors = cast(Mapping[str, Tensor], weights)
        for engine in self._engines:
            await asyncio.sleep(self._random.random() * self._jitter)
            await asyncio.to_thread(engine.load, version, dict(tensors))

    async def rollout(self, task: GroupTask) -> Group:
        engine = self._random.choice(self._engines)
        await asyncio.sleep(self._random.random() * self._jitter)
        prompt_ids = tuple(self._template.encode_prompt(task.messages))
        requests = requests_of(task, prompt_ids, self._template.stop_ids)
        try:
            found = await asyncio.gather(*(asyncio.wrap_future(engine.submit(r)) for r in requests))
        except asyncio.CancelledError:
            await asyncio.to_thread(engine.abort, [request.id for request in requests])
            raise
        await asyncio.sleep(self._random.random() * self._jitter)
        rollouts = rollouts_of(found)
        return Group(task.id, task.prompt, prompt_ids, rollouts, task.applied_system)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


def requests_of(
    task: GroupTask, prompt_ids: tuple[int, ...], stop_ids: tuple[int, ...]
) -> list[Request]:
    asked = task.sampling
    return [
        Request(
            f"{task.id}/{index}",
            prompt_ids,
            asked.max_new_tokens,
            asked.temperature,
            seed,
            stop_ids,
        )
        for index, seed in enumerate(task.seeds)
    ]


class LocalTeachers:
    """A real teacher behind the classroom's interface; how late its word comes is random."""

    places = 2

    def __init__(self, job: Job, jitter: float) -> None:
        assert job.section.distill and job.teaching
        self._teaching, self._jitter = job.teaching, jitter
        self._teacher = open_teacher(job.section.distill, job.teaching)
        self._random, self._lock = random.Random(job.incarnation), threading.Lock()
        self.asked = 0

    async def speak(self, group: Group) -> Word:
        await asyncio.sleep(self._random.random() * self._jitter)
        self.asked += 1
        return await asyncio.to_thread(self._speak, group)

    def _speak(self, group: Group) -> Word:
        with self._lock:
            return word_on(group, self._teacher, self._teaching)


class LocalLoop:
    """The controller's side, on a thread of its own."""

    def __init__(self, job: Job, pool: Pool, killer: Killer, jitter: float = 0.0) -> None:
        self._job, self._pool, self._killer = job, pool, killer
        self._ledger = Journal(job.directory / "ledger.jsonl", buffered=True)
        self._books = Books.of(job.section, pool.training, job.seed, self._ledger.append)
        self._rounds = Rounds(job.directory / "curriculum", job.section.curriculum.round_every)
        self._fleet = LocalFleet(job, job.section.fleet.num_workers, jitter, job.incarnation)
        self._controller = Controller(
            self._books,
            self._fleet,
            job.section,
            seed=job.seed,
            validation=pool.validation,
            system_of=lambda prompt, pass_: SystemInstruction(),
            in_flight=job.section.groups_in_flight,
            note=lambda event: None,
            teachers=LocalTeachers(job, jitter) if job.teaching else None,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._is_gone = False
        self._base: dict[str, Tensor] = {}
        self._scale = 0.0

    def found(self, base: Mapping[str, Tensor], scale: float) -> None:
        self._base = {name: tensor.clone() for name, tensor in base.items()}
        self._scale = scale

    def _whole(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a worker makes of what is handed over."""
        if not self._base:
            return weights
        return self._base | joined(self._base, weights, self._scale)

    def begin(
        self,
        version: int,
        weights: Mapping[str, Tensor],
        saved: object,
        replayed: Sequence[Sequence[Outcome]],
    ) -> None:
        prompts = {prompt.id: prompt for prompt in self._pool.training}
        books = cast(Mapping[str, object] | None, saved)
        restore_books(self._books, self._ledger, self._rounds, books, replayed, prompts)
        self._call(self._controller.begin(version, self._whole(weights)))

    def pack(
        self, version: int, weights: Mapping[str, Tensor], probes: Callable[[], Probes]
    ) -> dict[str, Tensor]:
        probes()
        return {name: tensor.clone() for name, tensor in weights.items()}

    def next_batch(
        self, step: int, stop: Callable[[], bool], step_seconds: float
    ) -> tuple[Plan, dict[str, float]] | None:
        return self._call(self._controller.next_batch(step))

    def publish(self, version: int, weights: Mapping[str, Tensor], evaluate: bool) -> float | None:
        whole = self._whole(weights)
        return self._call(self._controller.publish(version, whole, evaluate=evaluate))

    def evaluate(self, version: int) -> float | None:
        return self._call(self._controller.evaluate(version))

    def leave(self) -> None:
        self._loop.call_soon_threadsafe(self._controller.leave)

    def state(self) -> dict[str, object]:
        async def state() -> dict[str, object]:
            return {**self._controller.state(), "ledger_bytes": self._ledger.sync()}

        return self._call(state())

    def close(self, reason: str) -> dict[str, int]:
        sums = self._call(self._controller.close(reason))
        self._ledger.close()
        self.vanish()
        return sums

    def vanish(self) -> None:
        """Be gone without a word."""

        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._is_gone = True
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)
            self._fleet.close()

    def _call(self, work: Coroutine[None, None, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(0.02)
            except FutureTimeoutError:
                if future.done():
                    raise
                self._killer.check()
                if self._is_gone:
                    raise Killed from None


class Ear:
    """What the learner told."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.scores: dict[int, float] = {}

    def say(self, report: Report) -> None:
        self.reports.append(report)

    def score(self, version: int, score: float) -> None:
        self.scores[version] = score


class LocalRun:
    """A run of the stage: lives in one folder, one after another."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        killer: Killer,
        jitter: float = 0.0,
        **settings: object,
    ) -> None:
        teacher = settings.pop("teacher", None)
        assert teacher is None or isinstance(teacher, Path)
        self.section = RlSection.model_validate(
            {
                "steps": 4,
                "groups_per_step": 2,
                "group_size": 4,
                "sampling": {"max_new_tokens": 6},
                "engine": {"num_slots": 8, "max_length": 64},
                "fleet": {"num_workers": 2},
                "optimizer": {"learning_rate": 1e-2},
                "validation": {"prompts": 2, "samples": 2, "evaluate_every": 2},
                "checkpoint_every": 2,
                "max_empty_steps": 100,
                **settings,
            }
        )
        prompts = make_prompts()
        self.pool = Pool(prompts[2:], prompts[:2])
        self.directory, self._killer, self._jitter = directory, killer, jitter
        distill = self.section.distill
        teaching = plan_teaching(distill, teacher, model, 64) if distill and teacher else None
        self._job = Job(
            teaching=teaching,
            section=self.section,
            seed=3,
            run_name="toy",
            incarnation=0,
            model=model,
            directory=directory,
            log_directory=directory,
        )
        self.lives = 0
        self.ear = Ear()

    def live(self) -> bool:
        """One life; False when it was killed."""
        self.lives += 1
        self.ear = Ear()
        loops: list[LocalLoop] = []
        job = self._job.model_copy(update={"incarnation": self.lives})

        def join(job: Job) -> LocalLoop:
            loops.append(LocalLoop(job, self.pool, self._killer, self._jitter))
            return loops[0]

        try:
            learn(job, self.ear, join)
            return True
        except Killed:
            return False
        finally:
            for loop in loops:
                loop.vanish()

    def facts(self) -> dict[str, object]:
        """Everything that must not depend on kills: weights, moments, RNG, books, sums, export."""
        steps = self._job.section.steps
        cut = Checkpoints(self.directory / "checkpoints").latest()
        assert cut is not None and cut.name == f"step_{steps:06d}"
        books = json.loads((cut / "books.json").read_text())
        books.pop("ledger_bytes")
        files = [cut / "model.safetensors", cut / "optimizer.safetensors"]
        files += sorted((self.directory / "model").glob("*.safetensors"))
        sums = audit_ledger(read_journal(self.directory / "ledger.jsonl"))
        return {
            "hashes": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
            "books": books,
            "guards": json.loads((cut / "guards.json").read_text()),
            "sums": sums,
            "scores": list(read_journal(self.directory / "validation.jsonl")),
            "plans": [read_plan(path) for path in Consumed(self.directory / "groups").files()],
        }
