"""A Ray cluster of two nodes on this machine, as an operator would start it, for jobs of ours.

The second node lives in a mount namespace where given folders are empty: what a job needs of them
has to travel.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from launching import free_port
from rl_runs import wait_until

_JOB = Path(__file__).parents[1] / "recipes" / "ray" / "job.yaml"
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class Nodes:
    """The head, with one processor, and a node without sight of some folders, with one more.

    Args:
        hidden: folders that are empty where the second node's processes run.
        token: whether the cluster asks for one.
    """

    def __init__(self, hidden: Sequence[Path] = (), *, token: bool = True) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token" if token else "disabled",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.hidden = hidden
        self._begin()
        self.other: subprocess.Popen[bytes] | None = None
        self._seen = 0

    def _begin(self) -> None:
        self.port, self.dashboard, agent, self._other_agent = (free_port() for _ in range(4))
        line = [*_start_line(agent), "--head", f"--port={self.port}", f"--temp-dir={self.place}"]
        line += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        line.append(f"--dashboard-port={self.dashboard}")
        self.head = self._open(line, "head.log")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def wait_for_head(self) -> None:
        """Return when the first node is up; on a busy machine Ray may need another try."""

        def answers() -> bool:
            if self.head.poll() is not None:
                self._begin()
            line = [*_RAY, "health-check", "--address", self.address]
            return not subprocess.run(line, env=self.environment, capture_output=True).returncode

        wait_until(answers, 180, "head")

    def join(self) -> None:
        """Bring the second node up; it has files of its own also where the head keeps Ray's."""
        hide = "".join(f"mount -t tmpfs none {path} && " for path in (*self.hidden, self.place))
        ray = " ".join([*_start_line(self._other_agent), f"--address={self.address}"])
        line = ["unshare", "--mount", "sh", "-c", f"{hide}cd {self.place} && exec {ray}"]
        log = self.place / "other.log"
        self._seen = log.stat().st_size if log.exists() else 0
        self.other = self._open(line, log.name)

    def wait_for_jobs(self) -> None:
        """Return when jobs can be submitted."""

        def answers() -> bool:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.dashboard}/api/version", timeout=5)
            except urllib.error.HTTPError:
                return True  # it asks for its token
            except OSError:
                return False
            return True

        wait_until(answers, 120, "dashboard", self.head)

    def wait_for_other(self) -> None:
        """Return when the second node has joined; on a busy machine Ray may need another try."""
        log = self.place / "other.log"

        def is_up() -> bool:
            if self.other and self.other.poll() is not None:
                self.join()
            return "Ray runtime started" in log.read_text()[self._seen :]

        wait_until(is_up, 180, "second node")

    def submit(self, folder: Path, command: Sequence[str]) -> subprocess.Popen[str]:
        """`ray job submit` of a command with a folder as its working directory."""
        line = [*_RAY, "job", "submit", "--address", f"http://127.0.0.1:{self.dashboard}"]
        line += ["--runtime-env", str(_JOB), "--working-dir", str(folder), "--", *command]
        return subprocess.Popen(
            line,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node's processes, all at once."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(node.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def drain_head(self, seconds: int) -> None:
        """Say that the head's machine will be taken away."""
        line = [*_RAY, "drain-node", "--address", self.address, "--reason-message", "a test"]
        line += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--node-id", self._head_id()]
        line += ["--deadline-remaining-seconds", str(seconds)]
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True)
        assert not done.returncode, done.stderr

    def _head_id(self) -> str:
        ask = "import ray; ray.init(log_to_driver=False); print(ray.nodes()[0]['NodeID'])"
        environment = self.environment | {"RAY_ADDRESS": self.address}
        line = [sys.executable, "-c", ask]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()[-1]

    def kill_gcs(self) -> None:
        """End the process that the whole cluster hangs on."""
        for process in psutil.Process(self.head.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "gcs_server" in process.name():
                    process.kill()

    def close(self) -> None:
        for node in (self.other, self.head):
            if node:
                self.end(node)
        shutil.rmtree(self.place, ignore_errors=True)

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.place.glob("*.log")))

    def _open(self, line: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.place / log).open("ab") as output:
            return subprocess.Popen(
                line,
                env=self.environment,
                stdout=output,
                stderr=output,
                cwd=self.place,
                start_new_session=True,
            )


@contextmanager
def two_nodes(hidden: Sequence[Path]) -> Iterator[Nodes]:
    nodes = Nodes(hidden)
    try:
        nodes.wait_for_head()
        nodes.join()
        nodes.wait_for_jobs()
        nodes.wait_for_other()
        yield nodes
    except BaseException:
        sys.stderr.write(nodes.logs())
        raise
    finally:
        nodes.close()


def _start_line(agent_port: int) -> list[str]:
    """A node with one processor; no port of it is a fixed one, for there are several here."""
    ports = ["--min-worker-port=0", "--max-worker-port=0"]
    ports += [f"--dashboard-agent-listen-port={agent_port}"]
    return [*_RAY, "start", "--block", "--num-cpus=1", *ports]
