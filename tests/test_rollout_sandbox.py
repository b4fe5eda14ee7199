"""Model-written programs and the sandboxes that hold them: attacks of every family gain nothing."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from code_attacks import EXHAUSTS, METADATA, REACHES, program_of
from sandboxes import absent, some_sandbox

from ground.config import SandboxSettings
from ground.errors import InfraError
from ground.records import Message, Prompt
from packtrain.doctor import check_sandboxes
from rollout.code_runs import run_tests
from rollout.code_tests import Scripts
from rollout.sandbox import Limits, Sandbox
from rollout.sandbox_filter import system_call_filter
from rollout.sandbox_guest import decode, encode
from rollout.sandbox_probe import Probed, probe, sandbox_facts
from rollout.sandbox_tiers import TIERS, Tier

SEVEN = Scripts((("", "7\n"),))
tiers = pytest.mark.parametrize("tier", TIERS, indirect=True)


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Tier:
    """One that can be started here."""
    chosen: Tier = request.param
    if missing := absent(chosen):
        pytest.skip(missing)
    return chosen


@dataclass(frozen=True)
class Outside:
    """Things that a program would like to reach, and whether one of them was."""

    folder: Path
    aim: dict[str, object]
    datagrams: socket.socket
    signalled: threading.Event

    def untouched(self) -> bool:
        """Nothing was written, removed, received or signalled."""
        try:
            self.datagrams.recv(1)
            return False
        except BlockingIOError:
            pass
        secret, socket_ = self.folder / "secret", self.folder / "socket"
        names = sorted(path.name for path in self.folder.iterdir())
        return (
            names == ["secret", "socket"]
            and secret.read_text() == self.aim["secret"]
            and secret.stat().st_mode & 0o777 == 0o666
            and socket_.is_socket()
            and not self.signalled.is_set()
        )


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """Files, sockets, a shared segment and a process that anybody at all may reach."""
    with _outside() as there:
        yield there


@contextmanager
def _outside() -> Iterator[Outside]:
    folder = Path(f"/var/tmp/packtrain-outside-{secrets.token_hex(6)}")
    folder.mkdir()
    folder.chmod(0o777)
    secret = folder / "secret"
    secret.write_text(secrets.token_hex(8))
    secret.chmod(0o666)
    signalled = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: signalled.set())
    key = secrets.randbelow(1 << 30) + 1
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(key, 4096, 0o1666)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as local,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        datagrams.bind(("127.0.0.1", 0))
        datagrams.setblocking(False)
        local.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        abstract.bind(f"\0{folder.name}")
        local.listen()
        abstract.listen()
        aim: dict[str, object] = {
            "file": str(secret),
            "secret": secret.read_text(),
            "folder": str(folder),
            "port": server.getsockname()[1],
            "udp": datagrams.getsockname()[1],
            "socket": str(folder / "socket"),
            "abstract": folder.name,
            "pid": os.getpid(),
            "key": key,
        }
        try:
            yield Outside(folder, aim, datagrams, signalled)
        finally:
            signal.signal(signal.SIGUSR1, before)
            libc.shmctl(segment, 0, None)
            for path in (*folder.iterdir(), folder):
                path.rmdir() if path.is_dir() else path.unlink()


def came_through(tier: Tier, bodies: dict[str, str], there: Outside) -> dict[str, str]:
    """The attacks that got something, and what."""
    header = {"mode": "serve", "sources": [program_of(bodies)], "entry_point": "attack"}
    with Sandbox(tier, Limits(cpu_seconds=20)).open(header) as guest:
        guest.grant(60.0)
        assert "loaded" in guest.hear(), "the attacks themselves must be a program"
        said = guest.ask({"args": encode((list(bodies), there.aim)), "kwargs": encode({})})
    came = decode(said["value"])
    assert isinstance(came, dict)
    return came


@tiers
@pytest.mark.parametrize("family", REACHES)
def test_nothing_outside_is_reached(tier: Tier, family: str, outside: Outside):
    hidden = METADATA if tier == "sandlock" else set()
    came = came_through(tier, REACHES[family], outside)
    assert not {name: got for name, got in came.items() if name not in hidden}
    assert outside.untouched()


def test_the_attacks_are_attacks(outside: Outside):
    """Without a boundary they come through: reads, connections, datagrams, signals, new files."""
    chosen = ["read_1", "network_1", "network_10", "process_1", "write_1", "write_13"]
    everything = {name: body for family in REACHES.values() for name, body in family.items()}
    assert len(everything) + len(EXHAUSTS) >= 150
    try:
        came = came_through("none", {name: everything[name] for name in chosen}, outside)
        assert list(came) == chosen and not outside.untouched()
    finally:
        Path("/tmp/packtrain-planted").unlink(missing_ok=True)


@pytest.mark.slow
@tiers
@pytest.mark.parametrize("name", EXHAUSTS)
def test_nothing_is_used_up(tier: Tier, name: str):
    """Each ends in time, takes nobody's verdict with it, and leaves no process behind."""
    before = children()
    sandbox = Sandbox(tier, Limits(processes=8, memory_bytes=256 << 20))
    started = time.monotonic()
    ran = run_tests(sandbox, EXHAUSTS[name], SEVEN, 1.0)
    assert time.monotonic() - started < 60
    assert not ran.passed, ran
    assert run_tests(sandbox, "print(7)", SEVEN, 20.0).passed, "its neighbour"
    end_children_but(before)
    assert children() <= before


def test_an_endless_loop_and_a_flood_end():
    sandbox = some_sandbox()
    assert run_tests(sandbox, "while True: pass", SEVEN, 0.2).outcome == "timeout"
    assert run_tests(sandbox, EXHAUSTS["output-flood"], SEVEN, 20.0).outcome == "flood"
    assert run_tests(sandbox, EXHAUSTS["memory"], SEVEN, 20.0).outcome == "raised"


def children() -> set[int]:
    return {process.pid for process in descendants()}


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def end_children_but(before: set[int]) -> None:
    """What a reward process does after each call, among children that are others'."""
    left = [process for process in descendants() if process.pid not in before]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


@tiers
def test_a_sandbox_is_trusted_only_after_it_was_attacked(tier: Tier):
    probed = probe(tier)
    assert probed.holds and probed.held == probed.attacks == 17


def test_limits_alone_are_no_sandbox():
    probed = probe("none")
    assert not probed.holds and "read_file" in probed.failure and "connect" in probed.failure
    held = ("read_environment", "raise_limit", "take_memory", "compute_on")
    assert not any(name in probed.failure for name in held if os.getuid() or name != "raise_limit")


def test_a_stage_records_the_sandbox_only_where_there_are_programs():
    def asked(reward: str) -> Prompt:
        return Prompt.make((Message("user", "?"),), capability="c", reward=reward, answer="x")

    settings = SandboxSettings()
    assert sandbox_facts([asked("exact")], settings) == {}
    chosen = some_sandbox().tier
    assert sandbox_facts([asked("exact"), asked("code")], settings) == {"sandbox": chosen}


def test_a_sandbox_that_does_not_start_is_nobodys_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InfraError, match="a sandbox must start, got: FileNotFoundError"):
        run_tests(Sandbox("bubblewrap"), "print(7)", SEVEN, 1.0)


def test_the_doctor_shows_which_sandbox_holds():
    def some(tier: Tier) -> Probed:
        if tier == "sandlock":
            return Probed(tier, None, failure="not installed")
        return Probed(tier, "0.8.0", held=17, attacks=17, seconds=0.025)

    def broken(tier: Tier) -> Probed:
        return Probed(tier, "1", held=16, attacks=17, failure="broken by read_file")

    holds, missing = check_sandboxes(some)
    assert (holds.verdict, missing.verdict) == ("ok", "ok")
    assert holds.found == "0.8.0; held 17 of 17 attacks, 25 ms to start"
    assert missing.found == "not installed; not needed"
    assert [f.verdict for f in check_sandboxes(broken)] == ["warn", "warn"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_by_number(machine: str):
    """The program is run here, on numbers: what the kernel would answer to a call."""
    program = system_call_filter(machine)
    assert program is not None and system_call_filter("riscv64") is None
    own, clone, open_, socket_, prlimit, unshare = {
        "x86_64": (0xC000003E, 56, 2, 41, 302, 272),
        "aarch64": (0xC00000B7, 220, 56, 198, 261, 97),
    }[machine]
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000

    def answer(number: int, argument: int = 0, architecture: int = own) -> int:
        return interpreted(program, {0: number, 4: architecture, 16: argument})

    assert answer(open_) == allow and answer(unshare) == refuse
    assert answer(open_, architecture=0x40000003) == kill
    assert answer(open_ | 0x40000000) == answer(435) == 0x00050026
    assert answer(clone, 17) == allow and answer(clone, 0x10000000 | 17) == refuse
    assert [answer(socket_, family) for family in (1, 2, 10)] == [allow] * 3
    assert [answer(socket_, family) for family in (0, 3, 16, 17, 40)] == [refuse] * 5
    assert answer(prlimit, 0) == allow and answer(prlimit, 1234) == refuse


def interpreted(program: bytes, data: dict[int, int]) -> int:
    """What a BPF program of loads, jumps and returns comes to."""
    lines = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    place, loaded = 0, 0
    while True:
        code, yes, no, value = lines[place]
        if code == 0x06:
            return value
        if code == 0x20:
            loaded = data[value]
            place += 1
            continue
        held = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
        place += 1 + (yes if held else no)
