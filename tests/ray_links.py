"""A Ray cluster of two machines and the cable between them, which can be pulled or made thin.

    head ─ link0 ═══════ link0 ─ other      each: network, process ids and Ray's files of its own

A machine is a set of namespaces that a process of ours holds: it goes with that process, and with
it all that runs there, the cable included, whatever ends the test.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shutil import which

import psutil
from rl_runs import wait_until

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_HOLD = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"
"""Process 1 of a machine: reaps whatever ends there, and holds the rest."""
_PORT = 6379


_PROBE = """
ip link add link0 type veth peer name link1 && ip link set lo up &&
tc qdisc add dev link0 root tbf rate 1mbit burst 16kb latency 200ms
"""


def why_not() -> str:
    """Why machines cannot be made here; empty if they can."""
    tools = ("setpriv", "unshare", "nsenter", "ip", "tc")
    if missing := [tool for tool in tools if not which(tool)]:
        return f"machines of one's own need {', '.join(missing)} (util-linux, iproute2)"
    line = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "sh", "-c", _PROBE]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        return f"machines need the right to make namespaces and cables: {done.stderr.strip()}"
    return ""


class Machine:
    """Namespaces with an address of their own, on a network of two."""

    def __init__(self, address: str, place: Path) -> None:
        self.address, self.place = address, place
        line = ["setpriv", "--pdeathsig", "KILL"]
        line += ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*line, sys.executable, "-S", "-c", _HOLD], stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: bool(self._inside()), 30, "namespaces", self._holder)
        self.pid = self._inside()[0].pid

    def start(
        self, line: Sequence[str], output: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Run something on this machine."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--"]
        with output.open("ab") as log:
            return subprocess.Popen(
                [*enter, *line],
                env=environment,
                stdout=log,
                stderr=log,
                cwd=self.place,
            )

    def set_up(self, *words: str) -> None:
        """A command for its network."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--"]
        done = subprocess.run([*enter, *words], capture_output=True, text=True)
        assert not done.returncode, f"{words}: {done.stderr}"

    def route_to(self, other: Machine) -> None:
        """The cable is there and leads to the other machine."""
        self.set_up("ip", "link", "set", "link0", "up")
        words = ["route", "replace", f"{other.address}/32", "dev", "link0", "src", self.address]
        self.set_up("ip", *words)

    def processes(self) -> list[psutil.Process]:
        """All that run there but the one that holds it."""
        with suppress(psutil.NoSuchProcess):
            space = _pid_space(self.pid)
            return [
                process
                for process in psutil.process_iter()
                if process.pid != self.pid and _pid_space(process.pid) == space
            ]
        return []

    def clear(self) -> None:
        """Kill all that runs there; the machine stays."""
        while processes := self.processes():
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def switch_off(self) -> None:
        """Everything there ends at once."""
        self._holder.kill()
        self._holder.wait()

    def _inside(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._holder.pid).children()
        return []


class LinkedNodes:
    """The head and one more node, with so many processors each.

    Args:
        settings: Ray's own, of the head, which are the cluster's.
    """

    def __init__(self, settings: dict[str, object], cpus: int = 1) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="links-", dir="/tmp"))
        self.head = Machine("10.77.0.1", self.place)
        self.other = Machine("10.77.0.2", self.place)
        self._settings, self._cpus = settings, cpus
        self.other_is_sound = False
        """Whether its node is up and Ray has never lost it."""
        self._starts = self._folders = 0
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), str(Path(__file__).parents[1])]
            ),
        }
        line = ["ip", "link", "add", "link0", "netns", str(self.head.pid), "type", "veth"]
        line += ["peer", "name", "link0", "netns", str(self.other.pid)]
        subprocess.run(line, check=True)
        for machine in (self.head, self.other):
            machine.set_up("ip", "link", "set", "lo", "up")
            machine.set_up("ip", "address", "add", f"{machine.address}/32", "dev", "lo")
        self.plug()

    @property
    def address(self) -> str:
        return f"{self.head.address}:{_PORT}"

    def plug(self) -> None:
        """The cable is in."""
        self.head.route_to(self.other)
        self.other.route_to(self.head)

    def pull(self) -> None:
        """The cable is out: each machine goes on by itself."""
        self.head.set_up("ip", "link", "set", "link0", "down")

    def thicken(self) -> None:
        """As much as it takes goes through again."""
        self.head.set_up("sh", "-c", "tc qdisc delete dev link0 root 2>/dev/null || true")

    def thin(self, rate: str) -> None:
        """No more than that goes from the head to the other node from now on, as `1mbit`."""
        words = ["dev", "link0", "root", "tbf", "rate", rate, "burst", "16kb", "latency", "200ms"]
        self.head.set_up("tc", "qdisc", "replace", *words)

    def start_head(self) -> None:
        line = ["--head", f"--port={_PORT}", "--include-dashboard=false"]
        line += [f"--system-config={json.dumps(self._settings)}"]
        self._bring_up(self.head, "head", line)

    def start_other(self) -> None:
        """Bring the second node up, in place of one that is there."""
        self.other.clear()
        self._starts += 1
        self._bring_up(self.other, f"other{self._starts}", [f"--address={self.address}"])

    def tell_other(self, number: int) -> None:
        """Send a signal to `ray start` on the second node."""
        for process in self.other.processes():
            with suppress(psutil.Error):
                if "start" in process.cmdline() and "--block" in process.cmdline():
                    process.send_signal(number)

    def play(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A Python module on the head's machine."""
        line = [sys.executable, "-u", "-m", module, *arguments]
        environment = self.environment | {"RAY_ADDRESS": self.address}
        return self.head.start(line, self.place / f"{arguments[0]}.log", environment)

    def new_folder(self) -> Path:
        """One in which nothing has been said."""
        self._folders += 1
        folder = self.place / f"said{self._folders}"
        folder.mkdir()
        return folder

    def close(self) -> None:
        for machine in (self.other, self.head):
            machine.switch_off()
        shutil.rmtree(self.place, ignore_errors=True)

    def logs(self) -> str:
        return "".join(
            f"--- {path.name}\n{path.read_text()[-6000:]}\n"
            for path in sorted(self.place.glob("*.log"))
        )

    def _bring_up(self, machine: Machine, name: str, line: Sequence[str]) -> None:
        """Return when its node is there; on a busy machine Ray may need another try."""
        line = [*_RAY, "start", "--block", f"--num-cpus={self._cpus}", *line]
        line += [f"--node-ip-address={machine.address}", "--object-store-memory=100000000"]
        (self.place / name).mkdir()
        line += [f"--temp-dir={self.place / name}"]
        log, node = self.place / f"{name}.log", list[subprocess.Popen[bytes]]()

        def is_up() -> bool:
            if not node or node[-1].poll() is not None:
                machine.clear()
                node.append(machine.start(line, log, self.environment))
            return "Ray runtime started" in log.read_text()

        try:
            wait_until(is_up, 300, f"{name} node")
        except BaseException:
            sys.stderr.write(self.logs())
            raise


def _pid_space(pid: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""
