"""Looks at a Ray cluster before we join it: is it there, are we let in, does it run what we run?

    asked as we are   ─▶ its versions, or refused, or silent
    asked as nobody   ─▶ must be refused: whoever is let in can run code as us

Each question is put by a process of its own, rollout/knock.py, because `ray.init`
waits for minutes for a cluster that is gone, and says something else of most of these.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from ground.errors import InfraError, SetupError
from rollout.processes import ADDRESS

_PROBE_SECONDS = 20.0
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


class ClusterStartError(InfraError):
    """Ray did not come up, as happens on a machine that is too busy: no fault of the run."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a cluster says to somebody; versions where it lets him in.

    Example:
        Answer(ray="2.60.0", python="3.11.7"), Answer(refusal="InvalidAuthToken: …")
    """

    ray: str = ""
    python: str = ""
    refusal: str = ""
    """Why it lets him not in."""
    silence: str = ""
    """Why there is no answer."""


def check_cluster(address: str) -> None:
    """See that a cluster can be joined, and by nobody without its token.

    Raises:
        SetupError: it is not for us as it is, or we are not for it.
        ClusterStartError: it does not answer, which may pass.
    """
    if address.startswith("ray://"):
        raise SetupError(
            f"{ADDRESS} must name the cluster itself, got a client's address: {address}",
            where="Ray",
            fix="submit the command as a job: ray job submit -- packtrain run …",
        )
    _require_token_file(os.environ)
    answer = _ask(address, os.environ)
    if answer.silence:
        why = answer.silence + _holder_of(address)
        raise ClusterStartError(must_answer(address), where="Ray", why=why)
    if answer.refusal:
        raise _not_let_in(address, answer, os.environ)
    _require_versions(address, answer)
    nobody = {name: text for name, text in os.environ.items() if not name.startswith("RAY_AUTH_")}
    stranger = _ask(address, nobody | {_MODE: "disabled"})
    if stranger.silence:
        why = f"asked without a token: {stranger.silence}"
        raise ClusterStartError(must_answer(address), where="Ray", why=why)
    if not stranger.refusal:
        raise SetupError(
            f"the Ray cluster at {address} must ask for a token, it lets anybody run code",
            where="Ray",
            fix="start every node with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN_PATH "
            "(`ray get-auth-token --generate` makes one)",
        )


def must_answer(address: str) -> str:
    """What is asked of a cluster first."""
    return f"the Ray cluster at {address} ({ADDRESS}) must answer"


def _ask(address: str, environment: Mapping[str, str]) -> Answer:
    """What the cluster says to somebody with this environment."""
    line = [sys.executable, "-m", "rollout.knock", address]
    try:
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Answer(silence=f"no answer within {_PROBE_SECONDS:g} s")
    with suppress(ValueError, IndexError):
        return Answer(**json.loads(done.stdout.splitlines()[-1]))
    told = [text for text in done.stderr.splitlines() if text.strip()] or ["no answer"]
    return Answer(silence=told[-1])


def _require_token_file(environment: Mapping[str, str]) -> None:
    """Ray aborts the process that looks for a token in vain."""
    path = environment.get(_TOKEN_PATH, "")
    if path and not environment.get(_TOKEN) and not Path(path).is_file():
        raise SetupError(
            f"{_TOKEN_PATH} must name the file with the cluster's token, there is none at {path}",
            where="Ray",
            fix=f"copy the token there, or unset {_TOKEN_PATH}",
        )


def _not_let_in(address: str, answer: Answer, environment: Mapping[str, str]) -> SetupError:
    says = "refuses ours" if environment.get(_MODE) == "token" else f"got none ({_MODE} is not set)"
    return SetupError(
        f"the Ray cluster at {address} asks for its token and {says}",
        where="Ray",
        why=answer.refusal,
        fix=f"set {_MODE}=token, and {_TOKEN_PATH} to a copy of the token file that its nodes were "
        "started with",
    )


def _require_versions(address: str, answer: Answer) -> None:
    """Ray's messages and pickles are not the same in any two versions."""
    ours = Answer(ray.__version__, platform.python_version())
    if (answer.ray, answer.python) != (ours.ray, ours.python):
        raise SetupError(
            f"the Ray cluster at {address} must run what we run: it has Ray {answer.ray} and "
            f"Python {answer.python}, we have Ray {ours.ray} and Python {ours.python}",
            where="Ray",
            fix=f"run the command with Python {answer.python} and ray=={answer.ray}, or start the "
            "cluster with ours",
        )


def _holder_of(address: str) -> str:
    """Who listens at an address of this machine, if that is one and we may know."""
    host, _, port = address.rpartition(":")
    own = {"localhost"} | {a.address for found in psutil.net_if_addrs().values() for a in found}
    if host not in own:
        return ""
    for found in psutil.net_connections("tcp"):
        listens = found.status == psutil.CONN_LISTEN and found.laddr
        if listens and str(listens.port) == port and found.pid:
            with suppress(psutil.Error):
                return f"; port {port} is held by {psutil.Process(found.pid).name()} ({found.pid})"
    return f"; nobody holds port {port}"
