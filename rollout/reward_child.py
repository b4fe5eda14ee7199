"""The process that runs reward functions and may be killed at any moment: `python -m` only.

    read a line → call the reward → sweep what it forked → write a line

Requests and replies are JSON lines over one inherited socket, a reply carries its request's nonce;
stdout and stderr belong to the reward function. The process ends when the socket closes.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import BinaryIO

from ground import faults
from ground.errors import InfraError
from ground.records import Message, Prompt
from ground.roles import enter_role
from rollout.descendants import adopt_orphans, end_children
from rollout.rewards import (
    Refusal,
    Score,
    call_reward,
    find_registered,
    find_reward,
    load_rewards,
    reward_names,
)

_MAX_MESSAGE = 500


def main(descriptor: int, max_memory_bytes: int, files: list[Path]) -> None:
    """Serve requests until the other end closes."""
    enter_role("reward")
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(max_memory_bytes)
    adopt_orphans()
    threading.Thread(target=_end_with, args=(descriptor,), name="watchdog", daemon=True).start()
    with channel.makefile("rb") as questions, channel.makefile("wb") as replies:
        for line in questions:
            _serve(json.loads(line), files, replies)


def _limit_memory(max_bytes: int) -> None:
    """Lower the limit on our address space; one that we were born with (`ulimit -v`) stays."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(request: dict[str, object], files: list[Path], replies: BinaryIO) -> None:
    try:
        faults.point("score")
        reply = _answer(request, files)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are the reward's failures too
        reply = {"raised": _describe(error), "infra": isinstance(error, InfraError)}
    end_children()
    line = json.dumps({**reply, "nonce": request["nonce"]}, allow_nan=False)
    replies.write(line.encode() + b"\n")
    replies.flush()


def _answer(request: dict[str, object], files: list[Path]) -> dict[str, object]:
    match request:
        case {"do": "start"}:
            for path in files:
                load_rewards(path)
            return {"names": reward_names()}
        case {"do": "load", "reward": str(name)}:
            found = find_registered(name)
            if found.prepare is not None:
                found.prepare()
            return {"one_by_one": found.one_by_one}
        case {"do": "score", "prompt": dict(asked), "texts": list(texts), "audit": audit}:
            _limit_cpu(float(str(request["cpu_seconds"])))
            prompt = Prompt(**{**asked, "messages": tuple(Message(*m) for m in asked["messages"])})
            verdicts = _score(prompt, texts)
            drifted = bool(audit) and _score(prompt, texts) != verdicts
            return {"verdicts": verdicts, "drifted": drifted}
    raise ValueError(f"unknown request {request.get('do')!r}")


def _score(prompt: Prompt, texts: list[str]) -> list[dict[str, object]]:
    return [_plain(score) for score in call_reward(find_reward(prompt.reward), prompt, texts)]


def _plain(score: Score | Refusal) -> dict[str, object]:
    if isinstance(score, Refusal):
        return {"refused": score.reason}
    return {"reward": score.reward, "passed": score.passed, "parts": score.parts}


def _describe(error: BaseException) -> dict[str, str]:
    """What was raised and where; an exception whose own text raises is described without it."""
    try:
        message = str(error)[:_MAX_MESSAGE]
    except BaseException:
        message = "(its message cannot be read)"
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return {"type": type(error).__name__, "message": message, "where": where}


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end a call that computes on, even when nobody is left to kill us."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _end_with(descriptor: int) -> None:
    """Wait for the other end to close, in a reward call or out of it; then take all along."""
    poll = select.poll()
    poll.register(descriptor, 0)  # hang-ups are reported without being asked for
    poll.poll()
    end_children()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
