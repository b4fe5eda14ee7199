"""`packtrain doctor`: whether this machine and installation can run the trail, and what to mend."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ground.disk import free_bytes, show_bytes
from ground.errors import SetupError
from ground.memory import available_bytes
from rollout.installed import VLLM_FIX, VLLM_RELEASE, is_known, vllm_version
from rollout.sandbox_probe import Probed, probe
from rollout.sandbox_tiers import TIER_FIX, TIERS, Tier

GIB = 1 << 30
ROOMS = ("ground", "rollout", "distill", "curation", "sft", "dpo", "rl", "packtrain")
TESTED = {
    "torch": "2.13",
    "transformers": "5.19",
    "trl": "1.16",
    "accelerate": "1.15",
    "datasets": "5.2",
    "ray": "2.60",
    "peft": "0.21",
    "pydantic": "2.14",
    "reasoning-gym": "0.1.25",
}
"""Library → the release that packtrain was tested with (constraints.txt has the full list)."""
IMPORTS = ("torch", "transformers", "trl", "ray")
IMPORT_SECONDS = 120
LEAST_DISK, LEAST_MEMORY, LEAST_SHARED = 4 * GIB, 3 * GIB, GIB // 2

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Example:
        Finding("fail", "disk", "1.2 GiB free at runs", "free 4 GiB")
    """

    verdict: Verdict
    subject: str
    found: str
    fix: str = ""


def command(arguments: argparse.Namespace) -> int:
    """Look at everything, show it, and fail with exit code 4 if something must be mended."""
    del arguments
    findings = [finding for check in CHECKS for finding in check()]
    _show(findings)
    failures = [finding for finding in findings if finding.verdict == "fail"]
    if failures:
        raise SetupError(
            f"this machine cannot run packtrain yet: {', '.join(f.subject for f in failures)}",
            fix="; ".join(finding.fix for finding in failures),
        )
    return 0


def check_python() -> Iterator[Finding]:
    """The interpreter's version; pip has refused one that is too old."""
    yield Finding("ok", "python", sys.version.split()[0])


def check_versions(
    tested: dict[str, str] | None = None, installed: Callable[[str], str] = metadata.version
) -> Iterator[Finding]:
    """Installed libraries against the tested set; another release is a warning, none a failure."""
    for name, wanted in (TESTED if tested is None else tested).items():
        try:
            found = installed(name)
        except metadata.PackageNotFoundError:
            yield Finding("fail", name, "not installed", f"pip install '{name}=={wanted}.*'")
            continue
        if found.split("+")[0] == wanted or found.startswith(f"{wanted}."):
            yield Finding("ok", name, found)
        else:
            fix = f"pip install '{name}=={wanted}.*' if something misbehaves"
            yield Finding("warn", name, f"{found}; tested with {wanted}", fix)


def check_vllm(version: Callable[[], str | None] = vllm_version) -> Iterator[Finding]:
    """vLLM is needed by recipes that name it as their engine, and by no other."""
    found = version()
    if found is None:
        yield Finding("warn", "vllm", "not installed; engine.kind: vllm needs it", VLLM_FIX)
    elif is_known(found):
        yield Finding("ok", "vllm", f"{found}, for engine.kind: vllm")
    else:
        what = f"{found}; engine.kind: vllm needs {VLLM_RELEASE} and refuses others"
        yield Finding("warn", "vllm", what, VLLM_FIX)


def check_sandboxes(probe: Callable[[Tier], Probed] = probe) -> Iterator[Finding]:
    """Whether the `code` reward has a boundary to run programs in; no other reward needs one."""
    probed = [probe(tier) for tier in TIERS]
    for each in probed:
        if each.holds:
            start = f"{each.seconds * 1000:.0f} ms to start"
            found = f"{each.version}; held {each.held} of {each.attacks} attacks, {start}"
            yield Finding("ok", f"sandbox {each.tier}", found)
        elif any(other.holds for other in probed):
            yield Finding("ok", f"sandbox {each.tier}", f"{each.failure}; not needed")
        else:
            what = f"{each.failure}; the code reward needs one"
            yield Finding("warn", f"sandbox {each.tier}", what, TIER_FIX)


def check_imports() -> Iterator[Finding]:
    """The heavy libraries import, each in a process of its own."""
    for name in IMPORTS:
        if importlib.util.find_spec(name) is None:
            continue  # check_versions has said so
        error = _import_error(name)
        if error:
            fix = (
                "install again with constraints.txt; a torchvision from elsewhere is a common cause"
            )
            yield Finding("fail", f"import {name}", error, fix)
        else:
            yield Finding("ok", f"import {name}", "works")


def check_shadows(folder: Path | None = None) -> Iterator[Finding]:
    """Folders here that `python -m`, which looks here first, would import in place of ours."""
    found = shadows(Path.cwd() if folder is None else folder)
    if found:
        fix = "start packtrain from another folder, or rename them"
        yield Finding("fail", "folders", f"{', '.join(found)} would hide packtrain's own", fix)
    else:
        yield Finding("ok", "folders", "none hides packtrain's own")


def shadows(folder: Path) -> list[str]:
    """Modules in `folder` that are named like rooms of ours and are not ours."""
    here, ours = folder.resolve(), Path(__file__).resolve().parents[1]
    return [str(here / name) for name in ROOMS if here != ours and _is_module(here, name)]


def check_space() -> Iterator[Finding]:
    """Disk, shared memory (Ray's object store) and memory."""
    runs = Path.cwd() / "runs"
    yield _at_least("disk", free_bytes(runs), LEAST_DISK, f"free at {runs}", "free some space")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        fix = "enlarge it (docker run --shm-size=2g); Ray falls back to /tmp, which is slow"
        yield _at_least("shared memory", free, LEAST_SHARED, "free at /dev/shm", fix, "warn")
    yield _at_least("memory", available_bytes(), LEAST_MEMORY, "available", "end other programs")


def check_ports() -> Iterator[Finding]:
    """Ray talks to itself through local ports, so binding one must be possible."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        yield Finding("ok", "ports", "local ports can be opened")
    except OSError as error:
        yield Finding("fail", "ports", str(error), "allow sockets on 127.0.0.1")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_versions,
    check_vllm,
    check_sandboxes,
    check_imports,
    check_shadows,
    check_space,
    check_ports,
)


def _at_least(
    subject: str, found: int, wanted: int, what: str, fix: str, verdict: Verdict = "fail"
) -> Finding:
    if found >= wanted:
        return Finding("ok", subject, f"{show_bytes(found)} {what}")
    return Finding(
        verdict, subject, f"{show_bytes(found)} {what}, {show_bytes(wanted)} wanted", fix
    )


def _import_error(name: str) -> str:
    """The last line of what importing `name` says, or nothing when it works."""
    line = [sys.executable, "-c", f"import {name}"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"takes longer than {IMPORT_SECONDS} s"
    return (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else ""


def _is_module(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()


def _show(findings: Sequence[Finding]) -> None:
    styles = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, padding=(0, 2), show_header=False)
    for finding in findings:
        table.add_row(
            Text(finding.verdict, styles[finding.verdict]),
            Text(finding.subject),
            Text(finding.found),
            Text(finding.fix, "dim"),
        )
    Console().print(table)
