"""What the launcher asked for, read from the environment that it gives to every rank.

    accelerate launch --config_file F -m sft.train …  →  RANK, WORLD_SIZE, ACCELERATE_USE_… → Launch

accelerate makes something else in silence where a machine lacks what was asked for (FSDP2 on a CPU
becomes DDP, two ranks without a backend become two worlds of one); so we read what was asked for,
and ground/ranks.py compares it with what came of it. This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ground.errors import SetupError

Kind = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
"""How the model is spread over the ranks; `single` is one process without a launcher."""

_ZERO: Mapping[int, Kind] = {2: "zero2", 3: "zero3"}
_OF_RANKS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_OFFLOADS = (
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
)
HELD = "TORCHELASTIC_USE_AGENT_STORE"
"""Says `True` where a process that outlives us holds the ranks' store."""
_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launcher asked this process to be.

    Example:
        Launch(kind="zero3", rank=1, num_ranks=2)
    """

    kind: Kind = "single"
    rank: int = 0
    num_ranks: int = 1
    offloads: bool = False
    """DeepSpeed is to keep weights or moments outside the GPU."""

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that locks the run, writes what lasts, and speaks."""
        return self.rank == 0

    @property
    def is_zero(self) -> bool:
        """DeepSpeed was asked for."""
        return self.kind.startswith("zero")

    @property
    def layout(self) -> str:
        """How a trainer's checkpoint lies on the disk: whole, or every rank with its part."""
        return "whole" if self.kind in ("single", "ddp") else str(self)

    def __str__(self) -> str:
        return in_words(self.kind, self.num_ranks)


def in_words(kind: str, num_ranks: int) -> str:
    """`ddp on 2 ranks`."""
    return f"{kind} on {num_ranks} rank{'' if num_ranks == 1 else 's'}"


def launch_of(environment: Mapping[str, str]) -> Launch:
    """Read what was asked for.

    Raises:
        SetupError: the launch file asks for something that packtrain does not run.
    """
    if (precision := environment.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", ""):
        raise _unknown(f"mixed precision ({precision})")
    if "RANK" not in environment:
        return Launch()
    rank, num_ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _zero_launch(environment, rank, num_ranks)
    return Launch(_plain_kind(environment), rank, num_ranks)


def of_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a launcher makes a process a rank: for a rank's own child.

    Whoever held the store for us, the launcher or rank 0's process, holds it for the child too.
    """
    given = {name: value for name, value in environment.items() if _is_of_launcher(name)}
    return given | {HELD: str(True)} if "RANK" in given else given


def variables_of(launch: Launch, host: str, port: int, *, attempt: int = 0) -> dict[str, str]:
    """The variables by which a process becomes that rank; `launch_of` reads them.

    Every rank sees its own device alone, which is number 0 to it.

    Args:
        host, port: of the ranks' store, which a process holds that is none of the ranks.
    """
    given = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(launch.rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(launch.num_ranks),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        HELD: str(True),
    }
    if launch.is_zero:
        given |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
        given |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": launch.kind.removeprefix("zero")}
    return given


def _is_of_launcher(name: str) -> bool:
    return name in _OF_RANKS or name.startswith(_PREFIXES)


def _plain_kind(environment: Mapping[str, str]) -> Kind:
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        return _fsdp_kind(environment.get("FSDP_VERSION", "1"))
    if _is_on(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise _unknown("Megatron-LM")
    return "ddp"


def _zero_launch(environment: Mapping[str, str], rank: int, num_ranks: int) -> Launch:
    """From the launch file's own fields, or from the DeepSpeed file that it names."""
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if not file or file == "none":
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        devices = [environment.get(name, "none") for name in _OFFLOADS]
    else:
        stage, devices = _zero_of_file(file)
    if stage not in _ZERO:
        raise _unknown(f"ZeRO stage {stage}")
    return Launch(_ZERO[stage], rank, num_ranks, any(each != "none" for each in devices))


def _zero_of_file(file: str) -> tuple[int, list[str]]:
    """Stage and offload devices of a DeepSpeed file; its `auto` is what the launch file says."""
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        zero = settings["zero_optimization"]
        stage = int(zero["stage"])
        parts = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
        devices = [str(part.get("device", "none")) for part in parts]
        precisions = [name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SetupError(
            "deepspeed_config_file must name a JSON file with zero_optimization.stage",
            where=file,
            why=f"{type(error).__name__}: {error}",
            fix="mend the file, or use zero_stage in the launch file instead",
        ) from error
    if forced := [name for name in precisions if settings[name]["enabled"] != "auto"]:
        raise _unknown(f"mixed precision ({forced[0]})")
    return stage, devices


def _fsdp_kind(version: str) -> Kind:
    if version != "2":
        raise _unknown(f"FSDP version {version}")
    return "fsdp2"


def _unknown(what: str) -> SetupError:
    return SetupError(
        f"the launch file asks for {what}, which packtrain does not run",
        where="accelerate launch",
        fix="start from a file of recipes/accelerate: cpu, ddp, fsdp2, zero2 or zero3",
    )


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")
