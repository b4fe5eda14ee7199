"""Which sandboxes hold on this machine: each is attacked from within before anything relies on it.

settings → tiers, strongest first → installed? starts? a handful of attacks → the first that held
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ground.config import SandboxSettings
from ground.errors import InfraError, SetupError
from ground.records import Prompt
from rollout.sandbox import Guest, GuestFailed, Limits, Sandbox
from rollout.sandbox_guest import decode, encode
from rollout.sandbox_tiers import TIER_FIX, TIERS, Tier, tier_version

logger = logging.getLogger(__name__)

CODE = "code"
"""Name of the reward that runs programs."""
_LIMITS = Limits(cpu_seconds=2)
_SECONDS = 20.0
_LOOP_SECONDS = 0.3
_ATTACKS = """
import os, socket, ctypes, resource

def read_file(aim):
    return open(aim["file"]).read() == aim["secret"]

def list_folder(aim):
    return os.path.basename(aim["file"]) in os.listdir(os.path.dirname(aim["file"]))

def write_file(aim):
    for place in (os.path.dirname(aim["file"]), "/tmp", "/", "/dev/shm", "/var/tmp", os.getcwd()):
        try:
            open(os.path.join(place, "packtrain-probe"), "w").write("x")
            return True
        except OSError:
            pass

def change_mode(aim):
    return os.chmod(aim["file"], 0o777) is None

def connect(aim):
    return socket.create_connection(("127.0.0.1", aim["port"]), 1) is not None

def connect_unix(aim):
    return socket.socket(socket.AF_UNIX).connect(aim["socket"]) is None

def connect_abstract(aim):
    return socket.socket(socket.AF_UNIX).connect("\\0" + aim["abstract"]) is None

def read_environment(aim):
    return bool(set(os.environ) - {"LC_CTYPE", "PWD"})

def signal_starter(aim):
    os.kill(aim["pid"], 0)
    return True

def look_into_starter(aim):
    return bool(open("/proc/%d/environ" % aim["pid"], "rb").read())

def limit_starter(aim):
    return resource.prlimit(aim["pid"], resource.RLIMIT_CORE, (0, 0)) is not None

def become_root(aim):
    return os.getuid() == 0 or os.setuid(0) is None

def enter_namespace(aim):
    return ctypes.CDLL(None).unshare(0x10000000) == 0

def raise_limit(aim):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
    return True

def take_memory(aim):
    return bool(bytearray(2 << 30))

def fork_on(aim):
    for number in range(64):
        if os.fork() == 0:
            import time
            time.sleep(5)
            os._exit(0)
    return True

NAMES = (
    "read_file", "list_folder", "write_file", "change_mode", "connect", "connect_unix",
    "connect_abstract", "read_environment", "signal_starter", "look_into_starter", "limit_starter",
    "become_root", "enter_namespace", "raise_limit", "take_memory", "fork_on",
)

def attack(aim):
    broke = []
    for name in NAMES:
        try:
            if globals()[name](aim):
                broke.append(name)
        except Exception:
            pass
    return len(NAMES), broke
"""


@dataclass(frozen=True, slots=True)
class Probed:
    """What became of attacks from within a tier.

    Example:
        Probed("bubblewrap", "/usr/bin/bwrap", held=15, attacks=15, seconds=0.05)
    """

    tier: Tier
    version: str | None
    """What is installed; None when nothing is."""
    held: int = 0
    attacks: int = 0
    seconds: float = 0.0
    """For starting it once."""
    failure: str = ""
    """Why it is no boundary here; empty when it is one."""

    @property
    def holds(self) -> bool:
        """Every attack was tried, and none came through."""
        return not self.failure


def sandbox_for(settings: SandboxSettings) -> Sandbox:
    """The strongest sandbox that holds here.

    Raises:
        SetupError: none does, and the recipe does not allow running without.
    """
    wanted = TIERS if settings.tier == "auto" else (settings.tier,)
    tried: list[Probed] = []
    for tier in wanted:
        tried.append(probe(tier))
        if tried[-1].holds:
            return Sandbox(tier, _limits(settings))
    why = "; ".join(f"{each.tier}: {each.failure}" for each in tried)
    if settings.allow_unsafe:
        logger.warning("model-written code runs WITHOUT a sandbox (sandbox.allow_unsafe): %s", why)
        return Sandbox("none", _limits(settings))
    raise SetupError(
        "model-written code runs in a sandbox only, and none holds on this machine",
        where="reward code",
        why=why,
        fix=f"{TIER_FIX}; or set sandbox.allow_unsafe: true, which lets it do what you may do",
    )


def sandbox_facts(prompts: Iterable[Prompt], settings: SandboxSettings) -> dict[str, object]:
    """What a stage records about where its programs run; empty when no prompt has any.

    Raises:
        SetupError: there are some, and no sandbox for them.
    """
    if not any(prompt.reward == CODE for prompt in prompts):
        return {}
    return {"sandbox": sandbox_for(settings).tier}


def probe(tier: Tier) -> Probed:
    """Attack a tier from within."""
    version = tier_version(tier)
    if version is None:
        return Probed(tier, None, failure="not installed")
    sandbox = Sandbox(tier, _LIMITS)
    try:
        started = time.monotonic()
        with _serving(sandbox, "def attack(aim): return True", _SECONDS) as guest:
            guest.ask(_question({}))
        seconds = time.monotonic() - started
        attacks, broke = _reach(sandbox)
        broke += ["compute_on"] * _computes_on(sandbox)
    except (InfraError, GuestFailed) as error:
        return Probed(tier, version, failure=f"does not work here ({error})")
    held = attacks + 1 - len(broke)
    failure = f"broken by {', '.join(broke)}" if broke else ""
    return Probed(tier, version, held, attacks + 1, seconds, failure)


def _limits(settings: SandboxSettings) -> Limits:
    return Limits(memory_bytes=settings.memory_mib << 20, processes=settings.processes)


@contextmanager
def _serving(sandbox: Sandbox, source: str, seconds: float) -> Iterator[Guest]:
    header = {"mode": "serve", "sources": [source], "entry_point": "attack"}
    with sandbox.open(header) as guest:
        guest.hear()
        guest.grant(seconds)
        yield guest


def _question(aim: dict[str, object]) -> dict[str, object]:
    return {"args": encode((aim,)), "kwargs": encode({})}


def _reach(sandbox: Sandbox) -> tuple[int, list[str]]:
    """How many attacks there are, and those that reached what lies outside."""
    with (
        tempfile.TemporaryDirectory(prefix="packtrain-probe-") as folder,
        socket.socket() as listener,
        socket.socket(socket.AF_UNIX) as local,
        socket.socket(socket.AF_UNIX) as abstract,
        _serving(sandbox, _ATTACKS, _SECONDS) as guest,
    ):
        place = Path(folder)
        place.chmod(0o777)
        (place / "secret").write_text("outside")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        local.bind(str(place / "socket"))
        (place / "socket").chmod(0o777)
        local.listen()
        abstract.bind(f"\0{place.name}")
        abstract.listen()
        aim: dict[str, object] = {
            "file": str(place / "secret"),
            "secret": "outside",
            "port": listener.getsockname()[1],
            "socket": str(place / "socket"),
            "abstract": place.name,
            "pid": os.getpid(),
        }
        said = guest.ask(_question(aim))
    match decode(said.get("value")):
        case (int(attacks), list(broke)):
            return attacks, [str(name) for name in broke]
    raise GuestFailed("nonsense")


def _computes_on(sandbox: Sandbox) -> bool:
    with _serving(sandbox, "def attack(aim):\n    while True: pass", _LOOP_SECONDS) as guest:
        try:
            guest.ask(_question({}))
        except GuestFailed as failed:
            return failed.ending != "timeout"
    return True
